// SPDX-License-Identifier: Apache-2.0
//
// move_sim: runs seeds of the simulation of a whole move, on all cores, or replays one.
//
//   move_sim --count 1000000            a million seeds
//   move_sim --seed 4711 --trace        that one, step by step
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "tests/sim/move_sim.h"

int main(int argc, char** argv) {
  using drover::sim::MoveSimOptions;
  using drover::sim::MoveSimStats;
  CLI::App app{"Simulates whole moves under every interleaving and fault that the seeds bring."};
  std::uint64_t first = 1;
  std::uint64_t count = 100000;
  std::uint64_t seed = 0;
  unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  MoveSimOptions options;
  app.add_option("--first", first, "the first seed")->capture_default_str();
  app.add_option("--count", count, "how many seeds")->capture_default_str();
  app.add_option("--seed", seed, "run this one only");
  app.add_option("--threads", threads)->capture_default_str();
  app.add_flag("--trace", options.trace, "print what happens (with --seed)");
  CLI11_PARSE(app, argc, argv);
  if (seed != 0) {
    first = seed;
    count = threads = 1;
  }
  std::atomic<std::uint64_t> next = first;
  std::mutex mutex;
  MoveSimStats total;
  std::uint64_t failures = 0;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> workers;
  for (unsigned t = 0; t < threads; ++t) {
    workers.emplace_back([&] {
      MoveSimStats stats;
      for (std::uint64_t s = next++; s < first + count; s = next++) {
        if (const auto violation = run_move_sim(s, options, &stats)) {
          const std::lock_guard lock(mutex);
          if (++failures <= 10) {
            fmt::print("seed {}: {}\n  replay: build/tests/move_sim --seed {} --trace\n", s,
                       *violation, s);
          }
        }
      }
      const std::lock_guard lock(mutex);
      total += stats;
    });
  }
  for (std::thread& worker : workers) worker.join();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print(
      "{} seeds, {} violations, {:.1f} s: {} moved, {} undone, {} held, {} killed, {} resumed; {} "
      "steps, {} "
      "guest "
      "writes (worst {} us), {} faults\n",
      count, failures, seconds, total.moved, total.undone, total.held, total.killed, total.resumed,
      total.steps, total.guest_writes, total.worst_write_us, total.faults);
  return failures == 0 ? 0 : 1;
}
