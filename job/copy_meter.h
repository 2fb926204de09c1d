// SPDX-License-Identifier: Apache-2.0
//
// A relocation's progress as people are shown it: amounts that never fall, a rate over the last
// seconds, the time that is left, the time that each phase took.
//
// Threads: one.
#pragma once

#include <deque>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "job/move.h"

namespace drover::job {

class CopyMeter {
 public:
  explicit CopyMeter(const std::vector<DiskPlan>& disks);
  // A new phase has begun.
  void enter(Phase phase);
  // What is copied of one disk, and how much there is to copy; zero: not known. `done`: it has gone
  // over.
  void disk(std::size_t index, Length copied, Length data, bool done);

  // A quarter of a second has passed since the last progress().
  [[nodiscard]] bool due() const;
  Progress progress(Phase phase);

  [[nodiscard]] Length data() const;
  [[nodiscard]] std::chrono::milliseconds elapsed() const;
  [[nodiscard]] std::vector<std::pair<Phase, std::chrono::milliseconds>> phase_times() const {
    return phase_times_;
  }

 private:
  struct Sample {
    Instant at;
    Length copied;
  };
  const Instant start_;
  Instant phase_start_;
  Phase phase_ = Phase::Plan;
  std::vector<std::pair<Phase, std::chrono::milliseconds>> phase_times_;
  Instant last_{};
  std::vector<DiskProgress> disks_;
  std::deque<Sample> samples_;
};

}  // namespace drover::job
