#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole thing on one machine: installs what is needed, builds drover, makes two hosts, and moves a live
# guest that writes to its disks all the time from one to the other and back. Ends with a verdict.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

if [ "$(id -u)" -ne 0 ]; then
  echo "demo.sh: it makes namespaces and runs libvirt: run it as root (sudo ./demo.sh)" >&2
  exit 2
fi

./setup.sh
cmake --preset release
cmake --build --preset release --target drover
exec /usr/bin/python3 tests/lab/demo.py
