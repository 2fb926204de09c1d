// SPDX-License-Identifier: Apache-2.0
//
// Turns what the engine counts into what people are shown: amounts that never fall, a rate over the last
// seconds, the time that is left, the time each phase took.
//
// Threads: memory() from any; everything else from one.
#pragma once

#include <deque>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "job/move.h"
#include "mirror/engine.h"

namespace drover::job {

class ProgressMeter {
 public:
  explicit ProgressMeter(std::function<Instant()> clock);
  // A new phase has begun.
  void enter(Phase phase);
  void copy(const mirror::MirrorEngine::EngineStatus& status);
  // How far each disk's copy is; `copied` may fall, what is shown does not.
  void disks(const std::vector<DiskProgress>& disks);
  void memory(Length total, Length remaining);
  // A quarter of a second has passed since the last progress().
  [[nodiscard]] bool due() const;
  Progress progress(Phase phase);

  [[nodiscard]] std::chrono::milliseconds elapsed() const;
  [[nodiscard]] std::vector<std::pair<Phase, std::chrono::milliseconds>> phase_times() const {
    return phase_times_;
  }

 private:
  struct Sample {
    Instant at;
    Length copied;
  };
  const std::function<Instant()> now_;
  const Instant start_;
  Instant phase_start_;
  Phase phase_ = Phase::Plan;
  std::vector<std::pair<Phase, std::chrono::milliseconds>> phase_times_;
  Instant last_;
  Progress progress_;
  std::deque<Sample> samples_;
  std::mutex mutex_;  // guards the two below
  Length memory_total_;
  Length memory_remaining_;
};

}  // namespace drover::job
