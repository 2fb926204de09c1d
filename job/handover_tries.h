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
  void memory_starts() { starting_ = true; }
  void memory_moves() { slow_ = 0; }
  void link_was_down() { slow_ = 0; }
  Verdict failed(bool slow) {
    const bool often = std::exchange(starting_, false) && ++failed_ >= kMost;
    if (slow && ++slow_ >= kMost) return Verdict::TooSlow;
    return often ? Verdict::TooOften : Verdict::Again;
  }

 private:
  Duration pause_ = kFirstPause;
  bool starting_ = false;  // the guest on the target
  int failed_ = 0;         // handovers that had come to that, ever
  int slow_ = 0;           // in a row
};

}  // namespace drover::job
