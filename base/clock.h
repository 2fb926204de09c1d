// SPDX-License-Identifier: Apache-2.0
//
// Time as engines see it. State machines take an Instant as an argument and never read a clock,
// so that a simulation can give them its own.
#pragma once

#include <chrono>

namespace drover {

using Instant = std::chrono::steady_clock::time_point;
using Duration = std::chrono::steady_clock::duration;

inline Instant now() { return std::chrono::steady_clock::now(); }

}  // namespace drover
