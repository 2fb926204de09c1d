// SPDX-License-Identifier: Apache-2.0
//
// When memory pre-copy does not come to an end by itself: what is tried next. A pure state machine:
// the migration's statistics in, changes of its limits out.
//
//   Convergence convergence(limits);            // set limits.initial_downtime before the start
//   for (const ConvergenceAction& action : convergence.step(now, progress)) carry out
//
// Pre-copy sends all memory, then in every further iteration what was written meanwhile, and stops
// the guest when the rest fits into the allowed downtime. While each iteration is smaller than the
// one before, nothing needs doing. When it has stopped getting smaller (kStalled iterations in a
// row without at least kProgress less than the smallest so far), the allowed downtime is raised
// step by step up to its limit; the smallest that will do gives the shortest blackout. If that is
// not enough, the guest's CPUs are throttled, up to their limit. Then there is nothing left: the
// caller gives up when its time is over, or goes on for ever.
//
// What has been sent is not yet at the target: buffers lie between. With `wait_for_target` hardly any
// downtime (kWhileBehind) is allowed until the target's QEMU has taken what the source's had given when
// everything had been sent once; for at most kTargetPatience.
//
// Threads: none; use from one.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "memmig/hypervisor.h"

namespace drover::memmig {

struct SetDowntime {
  std::chrono::milliseconds value{0};
  bool operator==(const SetDowntime&) const = default;
};
// The guest's CPUs may be held up for at most this share of the time; the hypervisor goes up to it
// by itself while the guest writes too fast.
struct SetThrottle {
  unsigned max_percent = 0;
  bool operator==(const SetThrottle&) const = default;
};
struct GiveUp {
  std::string why;
  bool operator==(const GiveUp&) const = default;
};
using ConvergenceAction = std::variant<SetDowntime, SetThrottle, GiveUp>;

class Convergence {
 public:
  // An iteration that leaves less than this share of the best one so far is progress.
  static constexpr double kProgress = 0.9;
  static constexpr unsigned kStalled = 2;
  static constexpr double kDowntimeFactor = 1.5;
  static constexpr std::chrono::milliseconds kLeastRaised{100};  // the first time
  static constexpr unsigned kThrottleStep = 20;  // percent

  // Not none at all: QEMU looks for what was written meanwhile only when less is left than it may take with the guest
  // stopped, and stops it when nothing is left that it knows of (7.2, ram_save_pending()).
  static constexpr std::chrono::milliseconds kWhileBehind{1};
  static constexpr std::chrono::seconds kTargetPatience{30};

  explicit Convergence(const ConvergenceLimits& limits, bool wait_for_target = false);

  // One look at the statistics; call it as often as they are read. Several looks at the same
  // iteration count once.
  std::vector<ConvergenceAction> step(Instant now, const MigrationProgress& progress);

  [[nodiscard]] std::chrono::milliseconds downtime() const { return downtime_; }
  [[nodiscard]] unsigned throttle() const { return throttle_; }
  [[nodiscard]] bool waiting() const { return waiting_; }  // for the target
  // Everything has been tried.
  [[nodiscard]] bool exhausted() const;

 private:
  [[nodiscard]] bool target_is_behind(Instant now, const MigrationProgress& progress);

  ConvergenceLimits limits_;
  bool waiting_;
  std::optional<Instant> all_sent_at_;  // once
  std::optional<Length> awaited_;       // what had been given about then
  // The first one (numbered 1) sends everything and says nothing about the guest's writing.
  std::uint64_t first_judged_ = 2;
  std::chrono::milliseconds downtime_;
  unsigned throttle_ = 0;
  std::uint64_t iteration_ = 0;
  Length largest_rest_;  // of this iteration: what it began with
  bool have_best_ = false;
  Length best_rest_;
  unsigned stalled_ = 0;
  bool started_ = false;
  Instant start_;
  bool gave_up_ = false;
};

}  // namespace drover::memmig
