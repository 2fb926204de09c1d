#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is needed, builds, and runs the tests: unit, contract, fuzz and simulation with ctest, then
# the two-host lab with pytest (DROVER_LAB_LONG=1: with those that take long). Ends with both runners' own
# summaries; fails if a test fails.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

if [ "$(id -u)" -ne 0 ]; then
  echo "test.sh: the lab makes namespaces and runs libvirt: run it as root (sudo ./test.sh)" >&2
  exit 2
fi

./setup.sh
cmake --preset release
cmake --build --preset release

failed=0
ctest --preset release -j "$(nproc)" || failed=1
/usr/bin/python3 -m pytest tests/lab -n 2 -ra --durations=10 || failed=1  # two labs: much of it is waiting
exit "$failed"
