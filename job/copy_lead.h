// SPDX-License-Identifier: Apache-2.0
//
// Whether the copy ends soon: then the target's QEMU can be started meanwhile. Pure.
//
//   CopyLead lead;
//   if (lead.look(now, left, copied)) ...    // now and then while it goes on; reset() after an outage
//
// Starting the guest's QEMU on the target takes libvirt half a second, or two beside a copy on two slow processors (it makes
// some hundred calls to it, one after the other), in which the link has nothing to carry. So it begins
// kLead before the copy's end, as far as the copy's rate tells when that is. Not much earlier: from
// then on QEMU on the source logs what the guest writes to its memory, which costs the guest a little.
//
// Threads: none; use from one.
#pragma once

#include <chrono>
#include <optional>

#include "base/clock.h"
#include "base/units.h"

namespace drover::job {

class CopyLead {
 public:
  static constexpr Duration kLead = std::chrono::milliseconds(2000);
  // The rate is that of the last one to two of these, or of what there is from the first part of one on.
  static constexpr Duration kWindow = std::chrono::milliseconds(1000);
  static constexpr Duration kLeast = std::chrono::milliseconds(150);

  // `left` to be copied now; `copied` since it began, again and again if need be. True: what is left takes at most kLead,
  // at the rate at which both change: holes that are found are not copied, and what is only compared, or written again
  // by the guest, does not get less.
  bool look(Instant now, Length left, Length copied);
  void reset() { *this = CopyLead(); }

 private:
  struct Mark {
    Instant at;
    Length left;
    Length copied;
  };
  std::optional<Mark> before_;  // where the window before began
  std::optional<Mark> mark_;    // and the present one
};

}  // namespace drover::job
