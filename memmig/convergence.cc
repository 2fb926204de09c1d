// SPDX-License-Identifier: Apache-2.0
#include "memmig/convergence.h"

#include <fmt/format.h>

#include <algorithm>

namespace drover::memmig {

Convergence::Convergence(const ConvergenceLimits& limits, bool wait_for_target)
    : limits_(limits),
      waiting_(wait_for_target),
      downtime_(std::min(wait_for_target ? kWhileBehind : limits.initial_downtime,
                         limits.max_downtime)) {}

bool Convergence::target_is_behind(Instant now, const MigrationProgress& progress) {
  if (progress.iteration < 2) return true;  // the first sends everything
  if (!all_sent_at_) all_sent_at_ = now;
  if (now - *all_sent_at_ >= kTargetPatience) return false;
  if (!progress.transit) return true;  // not known now
  const auto [given, loaded] = *progress.transit;
  if (!awaited_) awaited_ = given;
  return loaded < *awaited_;
}

bool Convergence::exhausted() const {
  return downtime_ >= limits_.max_downtime &&
         (!limits_.auto_converge || throttle_ >= limits_.max_throttle_percent);
}

std::vector<ConvergenceAction> Convergence::step(Instant now, const MigrationProgress& progress) {
  std::vector<ConvergenceAction> actions;
  if (gave_up_) return actions;
  if (!started_) {
    started_ = true;
    start_ = now;
  }

  if (waiting_ && !target_is_behind(now, progress)) {
    waiting_ = false;
    downtime_ = std::min(limits_.initial_downtime, limits_.max_downtime);
    actions.emplace_back(SetDowntime{downtime_});
    first_judged_ = progress.iteration + 1;  // the others' ends were not this downtime's
  }

  if (progress.iteration != iteration_) {
    // What the iteration before began with, judged now that it is over.
    if (iteration_ >= first_judged_ && !waiting_) {
      if (!have_best_ || static_cast<double>(largest_rest_.bytes()) <
                             kProgress * static_cast<double>(best_rest_.bytes())) {
        best_rest_ = largest_rest_;
        have_best_ = true;
        stalled_ = 0;
      } else {
        ++stalled_;
      }
    }
    iteration_ = progress.iteration;
    largest_rest_ = Length(0);
  }
  largest_rest_ = std::max(largest_rest_, progress.memory_remaining);

  if (stalled_ >= kStalled && !exhausted()) {
    stalled_ = 0;
    // What counts as progress is measured anew under the new limits.
    have_best_ = false;
    if (downtime_ < limits_.max_downtime) {
      const auto raised = std::chrono::duration_cast<std::chrono::milliseconds>(
          downtime_ * kDowntimeFactor + std::chrono::milliseconds(1));
      downtime_ = std::min(limits_.max_downtime, std::max(raised, kLeastRaised));
      actions.emplace_back(SetDowntime{downtime_});
    } else {
      throttle_ = std::min(limits_.max_throttle_percent, throttle_ + kThrottleStep);
      actions.emplace_back(SetThrottle{throttle_});
    }
  }

  if (limits_.give_up_after.count() > 0 && now - start_ >= limits_.give_up_after) {
    gave_up_ = true;
    actions.emplace_back(
        GiveUp{fmt::format("the guest writes its memory faster than it can be sent: {} left after "
                           "{} s in iteration {} "
                           "with {} ms of downtime allowed and its CPUs held up for at most {} %",
                           format_length(largest_rest_), limits_.give_up_after.count(),
                           progress.iteration, downtime_.count(), throttle_)});
  }
  return actions;
}

}  // namespace drover::memmig
