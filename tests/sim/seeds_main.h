// SPDX-License-Identifier: Apache-2.0
//
// The command line of a simulation's program: runs seeds on all cores, or replays one.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace drover::sim {

// Options has `trace`, Stats +=.
template <class Options, class Stats>
struct Simulation {
  std::string program;  // for the command that replays a seed
  std::string purpose;
  std::function<std::optional<std::string>(std::uint64_t seed, const Options&, Stats*)> run;
  std::function<std::string(const Stats&)> tell;  // what happened in all of them
};

// The exit code: 0 without a violation.
template <class Options, class Stats>
int run_seeds(int argc, char** argv, const Simulation<Options, Stats>& simulation) {
  constexpr std::uint64_t kMostTold = 10;
  CLI::App app{simulation.purpose};
  std::uint64_t first = 1;
  std::uint64_t count = 100000;
  std::uint64_t seed = 0;
  unsigned threads = std::max(1U, std::thread::hardware_concurrency());
  Options options;
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
  Stats total;
  std::uint64_t failures = 0;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> workers;
  for (unsigned t = 0; t < threads; ++t) {
    workers.emplace_back([&] {
      Stats stats;
      for (std::uint64_t s = next++; s < first + count; s = next++) {
        if (const auto violation = simulation.run(s, options, &stats)) {
          const std::lock_guard lock(mutex);
          if (++failures <= kMostTold) {
            fmt::print("seed {}: {}\n  replay: build/tests/{} --seed {} --trace\n", s, *violation,
                       simulation.program, s);
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
  fmt::print("{} seeds, {} violations, {:.1f} s: {}\n", count, failures, seconds,
             simulation.tell(total));
  return failures == 0 ? 0 : 1;
}

}  // namespace drover::sim
