// SPDX-License-Identifier: Apache-2.0
//
// A bandwidth limit as a token bucket: pure, time is an argument.
//
//   if (throttle.may_start(now)) { throttle.take(now, bytes); ... } else { try again at
//   throttle.ready() }
//
// It allows what is begun while tokens are left, into debt, and then pauses until the debt is paid:
// the rate holds over any second, and pieces larger than a moment's share still go. Threads: one.
#pragma once

#include <algorithm>

#include "base/clock.h"
#include "base/units.h"

namespace drover::blockcopy {

class Throttle {
 public:
  // Bytes per second; zero: no limit.
  explicit Throttle(Length per_second = Length()) : per_second_(per_second) {}

  void set_rate(Length per_second) { per_second_ = per_second; }
  [[nodiscard]] Length rate() const { return per_second_; }

  [[nodiscard]] bool may_start(Instant now) const {
    return per_second_ == Length() || free_at_ <= now;
  }
  // When may_start() will be true.
  [[nodiscard]] Instant ready() const { return free_at_; }

  void take(Instant now, Length bytes) {
    if (per_second_ == Length()) return;
    const std::chrono::duration<double> cost(static_cast<double>(bytes.bytes()) /
                                             static_cast<double>(per_second_.bytes()));
    free_at_ = std::max(free_at_, now - kBurst) + std::chrono::duration_cast<Duration>(cost);
  }

 private:
  // What was not used up to this long ago may be used now: pauses of the event loop cost no rate.
  static constexpr Duration kBurst = std::chrono::milliseconds(20);
  Length per_second_;
  Instant free_at_{};
};

}  // namespace drover::blockcopy
