#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the micro-benchmarks and runs them: arbiter, chunk map, zero check, codec, frames, and NBD write round
# trips beside those of nbdkit's memory plugin. Prints Google Benchmark's own table: of each the median, mean and
# spread of five repetitions, in random order, so that the machine's moods favour none.
#
#   bench/micro.sh [--benchmark_filter=REGEX ...]       # options go to the runner; all of it takes 2 minutes
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
cmake --preset release >/dev/null
cmake --build --preset release --target micro >&2
exec build/bench/micro --benchmark_repetitions=5 --benchmark_min_time=0.3 --benchmark_enable_random_interleaving=true \
  --benchmark_display_aggregates_only=true --benchmark_counters_tabular=true "$@"
