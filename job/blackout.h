// SPDX-License-Identifier: Apache-2.0
//
// Where the milliseconds of the blackout went: from the moments that the driver saw to the parts
// that the summary shows. Pure.
#pragma once

#include <optional>

#include "base/clock.h"
#include "job/move.h"
#include "mirror/link.h"

namespace drover::job {

// By this host's monotonic clock; Instant(): not seen. Those of the last handover.
struct BlackoutMarks {
  Instant stopped;   // the source's CPUs
  Instant quiesced;  // and its disks, as QEMU says
  Instant drain_began;
  Instant drained;  // the target has answered every write
  Instant barrier_passed;
  Instant memory_there;  // the target guest stands still, complete
  Instant guard_began;
  Instant guarded;
  Instant running;               // the target guest
  mirror::BarrierTimes barrier;  // by the target's clock
};

// None: this process did not see the whole of it.
std::optional<BlackoutParts> blackout_parts(const BlackoutMarks& marks);

}  // namespace drover::job
