// SPDX-License-Identifier: Apache-2.0
//
// Which disks to move so that the storages of a host are evenly used: a pure function. It reads no
// clock and no disk; the same problem gives the same plan.
//
//   RebalanceProblem problem;
//   problem.storages = {{"/mnt/a", 100_GiB}, {"/mnt/b", 100_GiB}};
//   problem.disks = {{"web1", "vda", 0, 60_GiB}, {"db1", "vda", 0, 30_GiB}};
//   DROVER_ASSIGN(RebalancePlan plan, plan_rebalance(problem));
//   for (const RebalanceStep& step : plan.steps) ...   // in this order, one after the other
//
// What "even" means. Each storage has a *share*:
//   by space: used bytes / capacity. The *mean* is all used bytes / all capacity.
//   by io:    the load of its disks / the load of all disks. The mean is 1 / number of storages.
// Moving disks does not change the mean. A storage is within the tolerance when its share differs
// from the mean by at most `tolerance` (0.05: five points of a hundred). The goal is reached when
// every storage is, and no storage holds disks of two guests that are to be kept apart.
//
// What a plan keeps to, reached or not:
//   - At no step is a storage filled beyond what it may hold, while both copies of the step's disk
//     exist: used + the disk's bytes <= `fullest`. The old copy goes only after the step.
//   - Never worse than before: at its end no storage is further outside the tolerance than it was,
//     and no step puts a disk beside one of a guest that it is to be kept apart from. (On the way
//     a storage may be outside: when two disks change places.)
//   - Disks that are `fixed` stay; there are at most `most_moves` steps.
// Among those that reach the goal it is the one that moves the fewest bytes, then the one of the
// fewest steps: proven for small problems (`proven`), near it for large ones. If the goal can't be
// reached the plan comes as near as it can, and `obstacles` says why.
//
// Time and memory are bounded by counts of what was tried (RebalanceEffort), not by a clock.
//
// Threads: any. Errors: InvalidArgument (a disk on a storage that is not there, no capacity, ...).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace drover::job {

// How much a plan may try. For tests; the defaults take about a second at 10,000 disks.
struct RebalanceEffort {
  std::uint64_t descent = 50'000'000;      // in each of two descents to a first plan
  std::uint64_t exact = 6'000'000;         // in the search that proves
  std::uint64_t neighbourhood = 20'000;    // in each search around one move
  std::uint64_t improvement = 60'000'000;  // in all of those
  std::uint64_t detours = 100'000;         // in the search for steps by way of a third storage
};

struct RebalanceProblem {
  enum class By { Space, Io };

  struct Storage {
    std::string name;
    Length capacity;
    Length other;    // used by what is not in `disks`
    Length fullest;  // a step never fills it beyond this; zero: the capacity
  };

  struct Disk {
    std::string guest;
    std::string target;       // "vda"
    std::size_t storage = 0;  // index
    Length allocated;         // what it takes, and what moving it copies
    std::uint64_t load = 0;   // in whatever unit, the same for all
    std::string fixed;        // why it can't move ("it is pinned"); empty: it can
  };

  By by = By::Space;
  double tolerance = 0.05;
  std::size_t most_moves = std::numeric_limits<std::size_t>::max();
  std::vector<Storage> storages;
  std::vector<Disk> disks;
  // Each group: guests of which no two may have disks on one storage.
  std::vector<std::vector<std::string>> apart;
  RebalanceEffort effort;
};

struct RebalanceStep {
  std::size_t disk = 0;  // indexes into the problem
  std::size_t source = 0;
  std::size_t target = 0;
  Length bytes;
  // Shares of the two storages before and after it.
  double source_before = 0;
  double source_after = 0;
  double target_before = 0;
  double target_after = 0;
  Length target_free;  // left on the target while both copies exist, of what it may hold
  std::string reason;  // a sentence
};

struct RebalancePlan {
  std::vector<RebalanceStep> steps;
  double mean = 0;
  std::vector<double> before;  // the storages' shares
  std::vector<double> after;
  Length bytes;          // copied by all steps
  bool reached = false;  // the goal, after the last step
  bool needed = false;   // the goal was not reached before the first
  bool proven = false;   // that no other plan reaches it with fewer bytes; or that none does
  std::vector<std::string> obstacles;  // sentences; empty when reached
};

Result<RebalancePlan> plan_rebalance(const RebalanceProblem& problem);

// What these moves, in this order, would come to: for what is left of a plan when the world may
// have changed since. Blocked: one of them can't be carried out, or they leave a storage worse than
// it is; the message says which. Errors otherwise as above.
struct RebalanceWish {
  std::size_t disk = 0;
  std::size_t target = 0;
};
Result<RebalancePlan> assess_moves(const RebalanceProblem& problem,
                                   const std::vector<RebalanceWish>& moves);

// The share of a storage that is at its tolerance's ends, as the planner counts: inclusive, in
// bytes or load. For tests and for those who check a plan.
struct RebalanceBand {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
};
std::vector<RebalanceBand> rebalance_bands(const RebalanceProblem& problem);

}  // namespace drover::job
