// SPDX-License-Identifier: Apache-2.0
//
// mirror_sim: runs seeds of the mirror's simulation, on all cores, or replays one.
//
//   mirror_sim --count 1000000            a million seeds
//   mirror_sim --seed 4711 --trace        that one, step by step
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "tests/sim/mirror_sim.h"

int main(int argc, char** argv) {
  using drover::sim::MirrorSimOptions;
  using drover::sim::MirrorSimStats;
  CLI::App app{"Simulates one disk's mirror under every interleaving that the seeds bring."};
  std::uint64_t first = 1;
  std::uint64_t count = 100000;
  std::uint64_t seed = 0;
  unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  MirrorSimOptions options;
  app.add_option("--first", first, "the first seed")->capture_default_str();
  app.add_option("--count", count, "how many seeds")->capture_default_str();
  app.add_option("--seed", seed, "run this one only");
  app.add_option("--threads", threads)->capture_default_str();
  app.add_flag("--trace", options.trace, "print each step (with --seed)");
  CLI11_PARSE(app, argc, argv);
  if (seed != 0) {
    first = seed;
    count = threads = 1;
  }
  std::atomic<std::uint64_t> next = first;
  std::mutex mutex;
  MirrorSimStats total;
  std::uint64_t failures = 0;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> workers;
  for (unsigned t = 0; t < threads; ++t) {
    workers.emplace_back([&] {
      MirrorSimStats stats;
      for (std::uint64_t s = next++; s < first + count; s = next++) {
        if (const auto violation = run_mirror_sim(s, options, &stats)) {
          const std::lock_guard lock(mutex);
          if (++failures <= 10) {
            fmt::print("seed {}: {}\n  replay: mirror_sim --seed {} --trace\n", s, *violation, s);
          }
        }
      }
      const std::lock_guard lock(mutex);
      total.steps += stats.steps;
      total.guest_writes += stats.guest_writes;
      total.forwarded += stats.forwarded;
      total.copies += stats.copies;
      total.expired += stats.expired;
      total.lanes_lost += stats.lanes_lost;
      total.crashes += stats.crashes;
      total.restarts += stats.restarts;
      total.rotations += stats.rotations;
      total.damaged += stats.damaged;
    });
  }
  for (std::thread& worker : workers) worker.join();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print(
      "{} seeds, {} violations, {:.1f} s: {} steps, {} guest writes, {} forwarded, {} copies, "
      "{} answered at the bound, {} lanes lost, {} runners killed, {} targets restarted, {} "
      "bitmaps "
      "replaced, {} chunks found damaged\n",
      count, failures, seconds, total.steps, total.guest_writes, total.forwarded, total.copies,
      total.expired, total.lanes_lost, total.crashes, total.restarts, total.rotations, total.damaged);
  return failures == 0 ? 0 : 1;
}
