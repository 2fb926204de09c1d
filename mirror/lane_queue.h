// SPDX-License-Identifier: Apache-2.0
//
// The order in which a lane sends what was given to it. Frames of one chunk keep their order;
// between chunks a guest's write (or zeroes) overtakes the copies that wait, so that a guest does
// not wait behind megabytes of background copy. The copies still get their share of a lane that the
// guest keeps busy. Pure; the lane guards it.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <utility>

#include "base/units.h"
#include "mirror/lanes.h"

namespace drover::mirror {

class LaneQueue {
 public:
  explicit LaneQueue(Length chunk_size) : chunk_size_(chunk_size) {}

  void push(OutFrame frame);
  // The next to send.
  std::optional<OutFrame> pop();
  // Takes a waiting frame out. False: no such frame waits.
  bool abandon(std::uint16_t disk, std::uint64_t token);
  void clear();
  [[nodiscard]] bool empty() const { return urgent_.empty() && bulk_.empty(); }

 private:
  // After so many bytes of urgent frames in a row a copy that waits has its turn: of a lane that a guest
  // keeps busy the copy gets half, for the guest waits for neither before the handover, and in the
  // handover what is left to copy must become less.
  static constexpr Length kUrgentShare = Length(std::uint64_t{1} << 20);
  using Chunk = std::pair<std::uint16_t, std::uint64_t>;
  [[nodiscard]] Chunk chunk_of(const OutFrame& frame) const;
  [[nodiscard]] bool has_chunk(const std::deque<OutFrame>& queue, Chunk chunk) const;

  // A frame overtakes nothing of its own chunk: what would, waits in bulk_ itself.
  std::deque<OutFrame> urgent_;
  std::deque<OutFrame> bulk_;
  Length chunk_size_;
  Length urgent_in_a_row_;
};

}  // namespace drover::mirror
