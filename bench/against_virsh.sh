#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# drover move against virsh migrate --copy-storage-all: the same guest in the same lab, cold caches, taking
# turns; prints each run and the medians (the README's table). What the columns mean: tests/lab/baseline.py.
#
#   sudo bench/against_virsh.sh [RUNS]        # default 5, about 25 s each
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
exec /usr/bin/python3 tests/lab/baseline.py --movers virsh,drover --runs "${1:-5}"
