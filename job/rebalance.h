// SPDX-License-Identifier: Apache-2.0
//
// Rebalancing this host's storages: looks at them, plans (job/rebalance_plan.h) and, if wished,
// carries the plan out, one move after the other.
//
//   auto world = real_rebalance_world(options.uri, {check, relocate});
//   DROVER_ASSIGN(RebalanceProposal proposal, propose_rebalance(options, *world, cancel));
//   DROVER_ASSIGN(RebalanceSummary summary, rebalance(options, *world, observer, cancel));
//
// After each move the storages are looked at again. What is left of the plan goes on as long as it
// can be carried out and leads to where it was to lead; else a new plan is made. So in a world that
// only rebalancing changes, what is done is what was proposed.
//
// Threads: the functions block until all is done; the observer is called on the caller's thread,
// what the moves say on threads of theirs.
//
// Errors: what memmig/storage.h and job/rebalance_plan.h say of names and numbers; NotFound: a
// pinned disk or a guest that is not there, or no guest's disk on any of the storages; Cancelled.
// Moves that are done stay done.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "job/move.h"
#include "job/rebalance_plan.h"
#include "memmig/storage.h"

namespace drover::job {

struct RebalanceOptions {
  std::vector<std::string> storages;  // directories and pools
  RebalanceProblem::By by = RebalanceProblem::By::Space;
  double tolerance = 0.05;
  std::size_t most_moves = std::numeric_limits<std::size_t>::max();
  std::vector<std::vector<std::string>> apart;            // guests, by name or UUID
  std::vector<std::pair<std::string, std::string>> pins;  // guest (as before) and disk ("vda")
  std::chrono::milliseconds window = std::chrono::seconds(10);  // by io: loads are sampled so long
  std::string uri = "qemu:///system";
};

// One disk that goes from one storage to another.
struct RebalanceMove {
  std::string guest;
  std::string uuid;
  std::string disk;    // "vda"
  std::string path;    // its file, now
  std::string source;  // storages, as the user named them
  std::string target;
  std::string directory;  // the target's; the new file goes there
  Length bytes;
};

// What is asked of the host.
class RebalanceWorld {
 public:
  virtual ~RebalanceWorld() = default;
  RebalanceWorld(const RebalanceWorld&) = delete;
  RebalanceWorld& operator=(const RebalanceWorld&) = delete;

  virtual Result<memmig::StorageReport> look(const std::vector<std::string>& storages) = 0;
  // Takes as long as `window`. Cancelled.
  virtual Result<std::vector<memmig::DiskLoad>> loads(std::chrono::milliseconds window,
                                                      Cancel& cancel) = 0;
  // Whether the move can begin; changes nothing. Blocked with the reason if it can't.
  virtual Status check(const RebalanceMove& move, Cancel& cancel) = 0;
  // Moves the disk: afterwards the guest uses the new file, and the old one is gone; after an error
  // neither.
  virtual Status carry_out(const RebalanceMove& move, Observer& observer, Cancel& cancel) = 0;

 protected:
  RebalanceWorld() = default;
};

// How one disk is moved.
struct RebalanceMover {
  std::function<Status(const RebalanceMove&, Cancel&)> check;
  std::function<Status(const RebalanceMove&, Observer&, Cancel&)> carry_out;
};
// By relocating it (job/relocate.h). The new file keeps its name; if another has that already it is
// named by the guest and the disk.
RebalanceMover relocating_mover(const std::string& uri);

std::unique_ptr<RebalanceWorld> real_rebalance_world(const std::string& uri, RebalanceMover mover);

struct RebalanceProposal {
  memmig::StorageReport report;
  std::vector<memmig::DiskLoad> loads;  // by io: of the report's disks, in their order
  RebalanceProblem problem;             // its disks and storages are the report's, in their order
  RebalancePlan plan;
  std::vector<RebalanceMove> moves;  // the plan's steps
};

// Looks and plans; changes nothing. Moves that can't begin (RebalanceWorld::check(), asked of the
// first ones) are planned around; the notes of the report say which.
Result<RebalanceProposal> propose_rebalance(const RebalanceOptions& options, RebalanceWorld& world,
                                            Cancel& cancel);

class RebalanceObserver {
 public:
  virtual ~RebalanceObserver() = default;
  // The plan that is now followed; `why` says why another one than before, of the first it is
  // empty.
  virtual void proposed(const RebalanceProposal& proposal, const std::string& why) = 0;
  // The move number `number` (from 1 on, over all plans) begins or has ended.
  virtual void begins(std::size_t number, const RebalanceMove& move) = 0;
  virtual void ended(std::size_t number, const RebalanceMove& move, const Status& status) = 0;
  // What the move under way says of itself.
  virtual Observer& of_move() = 0;
};

struct RebalanceSummary {
  std::size_t moves = 0;  // that were done
  Length bytes;
  std::size_t failed = 0;  // moves that were tried in vain
  // At the end, as looked at then: nothing is left to do, or `last.plan.obstacles` say what is.
  RebalanceProposal last;
  bool reached = false;
};

// A move that fails is not tried again; the others go on without it (but not after Cancelled,
// Unreachable, Denied, Held and Internal: those end it).
Result<RebalanceSummary> rebalance(const RebalanceOptions& options, RebalanceWorld& world,
                                   RebalanceObserver& observer, Cancel& cancel);

}  // namespace drover::job
