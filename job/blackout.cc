// SPDX-License-Identifier: Apache-2.0
#include "job/blackout.h"

#include <algorithm>

namespace drover::job {
namespace {

using std::chrono::microseconds;

// Events of two hosts may come in another order than they happened.
microseconds between(Instant from, Instant until) {
  return std::max(microseconds(0), std::chrono::duration_cast<microseconds>(until - from));
}

}  // namespace

std::optional<BlackoutParts> blackout_parts(const BlackoutMarks& marks) {
  for (const Instant mark :
       {marks.stopped, marks.quiesced, marks.drain_began, marks.drained, marks.barrier_passed,
        marks.memory_there, marks.guard_began, marks.guarded, marks.running}) {
    if (mark == Instant()) return std::nullopt;
  }
  BlackoutParts parts;
  parts.quiesce = between(marks.stopped, marks.quiesced);
  parts.drain = between(marks.drain_began, marks.drained);
  parts.barrier = between(marks.drained, marks.barrier_passed);
  // What the target says is believed as far as it fits in between.
  microseconds left = parts.barrier;
  const auto of_barrier = [&left](microseconds said) {
    const microseconds took = std::clamp(said, microseconds(0), left);
    left -= took;
    return took;
  };
  parts.compare = of_barrier(marks.barrier.compare);
  parts.flush = of_barrier(marks.barrier.flush);
  parts.release = of_barrier(marks.barrier.release);
  parts.disks = between(marks.quiesced, marks.barrier_passed);
  parts.memory = between(marks.quiesced, marks.memory_there);
  parts.wait = between(std::max({marks.barrier_passed, marks.memory_there, marks.quiesced}),
                       marks.guard_began);
  parts.guard = between(marks.guard_began, marks.guarded);
  parts.resume = between(marks.guarded, marks.running);
  return parts;
}

}  // namespace drover::job
