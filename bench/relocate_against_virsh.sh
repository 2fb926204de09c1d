#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# drover relocate against virsh blockcopy --pivot: the same guest's disks between the same two filesystems, cold
# caches, taking turns; prints each run and the medians. What the columns mean: tests/lab/relocate_baseline.py.
#
#   sudo bench/relocate_against_virsh.sh [RUNS]        # default 3, about 20 s each
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
exec /usr/bin/python3 tests/lab/relocate_baseline.py --runs "${1:-3}"
