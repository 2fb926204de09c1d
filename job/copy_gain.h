// SPDX-License-Identifier: Apache-2.0
//
// Whether the copy gains on a guest that writes all the time. Pure.
//
//   CopyGain gain;
//   switch (gain.look(now, left, copied)) ...    // now and then while it goes on; reset() after an outage
//
// A guest that writes more than the link takes makes blocks Pending as fast as they are copied, and
// what is left never gets little enough for the handover. In strict mode it does, whatever the guest
// writes, since writes wait for the target then: so such a guest is handed over with more left, as long
// as that takes at most kStrict at the copy's rate; and where it never gets that far the move is
// refused, not tried for ever.
//
// Threads: none; use from one.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#include "base/clock.h"
#include "base/units.h"

namespace drover::job {

class CopyGain {
 public:
  // A verdict takes so long and so much copied: less says little.
  static constexpr Duration kWindow = std::chrono::seconds(10);
  static constexpr Length kEnough = Length(std::uint64_t{64} << 20);
  // It does not gain if what is left fell by less than one part in so many of what was copied.
  static constexpr std::uint64_t kLeastShare = 16;
  static constexpr Duration kStrict = std::chrono::minutes(2);
  static constexpr Duration kPatience = std::chrono::minutes(10);

  enum class Verdict {
    Gaining,   // or not known yet
    HandOver,  // it does not gain, and what is left takes at most kStrict
    Waiting,   // it does not gain, and too much is left
    Refuse,    // for kPatience
  };
  // `left` to be copied now; `copied` since it began, again and again if need be.
  Verdict look(Instant now, Length left, Length copied);
  void reset() { *this = CopyGain(); }

 private:
  struct Mark {
    Instant at;
    Length left;
    Length copied;
  };
  // By less than a kLeastShare of what was copied since.
  static bool gained_little(const Mark& since, Length left, Length copied);

  std::optional<Mark> mark_;    // where the present window began
  std::optional<Mark> losing_;  // since when; until it has gained on all that was copied since
  Length rate_;                 // of the copy, per second, in the last window
};

}  // namespace drover::job
