#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# drover against virsh migrate --copy-storage-all, nbdcopy, qemu-img convert and cp, in the lab: prints tables (and
# which goals are reached), writes compare.md, compare.svg and compare.json. bench/README.md says what they mean.
#
#   sudo bench/compare.sh [--quick] [--runs N] [--only SCENARIO,...] [--output DIR]
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
exec /usr/bin/python3 bench/compare.py "$@"
