// SPDX-License-Identifier: Apache-2.0
//
// How soon a handover that failed is tried again, and when no more: pure.
//
//   HandoverTries tries;
//   not_before = now + tries.pause();
//   if (tries.failed(too_slow) != HandoverTries::Verdict::Again) ... the move is undone
//
// A handover is slow when it was broken off because a write of the guest's would have waited for
// too long. What was slow before counts only as long as it stays so: not once the memory began to
// move (the disks were equal by then) or the link was down meanwhile (which explains it).
//
// Threads: none; use from one.
#pragma once

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/clock.h"

namespace drover::job {

class HandoverTries {
 public:
  static constexpr int kMost = 10;  // of either kind
  static constexpr Duration kFirstPause = std::chrono::seconds(1);
  static constexpr Duration kLongestPause = std::chrono::seconds(60);

  enum class Verdict { Again, TooOften, TooSlow };

  // Before the next try; longer each time.
  Duration pause() { return std::exchange(pause_, std::min(2 * pause_, kLongestPause)); }
  void memory_moves() {
    moving_ = true;
    slow_ = 0;
  }
  void link_was_down() { slow_ = 0; }
  Verdict failed(bool slow) {
    if (std::exchange(moving_, false) && ++failed_ >= kMost) return Verdict::TooOften;
    return slow && ++slow_ >= kMost ? Verdict::TooSlow : Verdict::Again;
  }

 private:
  Duration pause_ = kFirstPause;
  bool moving_ = false;  // its memory
  int failed_ = 0;       // handovers after their memory began to move, ever
  int slow_ = 0;         // in a row
};

}  // namespace drover::job
