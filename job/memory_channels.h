// SPDX-License-Identifier: Apache-2.0
//
// How many connections the guest's memory takes. Pure.
#pragma once

#include "base/units.h"

namespace drover::job {

inline constexpr unsigned kMostMemoryChannels = 8;

// `asked`: 0 leaves it to drover. `cores`: of the host that has fewer; 0: not known. `bandwidth`:
// per second, zero: no limit.
unsigned memory_channels(unsigned asked, unsigned cores, Length bandwidth);

}  // namespace drover::job
