// SPDX-License-Identifier: Apache-2.0
#include "mirror/lane_queue.h"

#include <algorithm>
#include <utility>

namespace drover::mirror {

LaneQueue::Chunk LaneQueue::chunk_of(const OutFrame& frame) const {
  return {frame.disk, frame.extent.offset.bytes() / chunk_size_.bytes()};
}

bool LaneQueue::has_chunk(const std::deque<OutFrame>& queue, Chunk chunk) const {
  return std::ranges::any_of(queue, [&](const OutFrame& one) { return chunk_of(one) == chunk; });
}

void LaneQueue::push(OutFrame frame) {
  const bool background = frame.type == FrameType::Copy || frame.type == FrameType::Compare;
  const bool bulk = background || has_chunk(bulk_, chunk_of(frame));
  (bulk ? bulk_ : urgent_).push_back(std::move(frame));
}

std::optional<OutFrame> LaneQueue::pop() {
  if (empty()) return std::nullopt;
  // A copy that was queued behind a write to its chunk stays behind it.
  const bool bulks_turn = urgent_.empty() || (urgent_in_a_row_ >= kUrgentShare && !bulk_.empty() &&
                                              !has_chunk(urgent_, chunk_of(bulk_.front())));
  std::deque<OutFrame>& from = bulks_turn ? bulk_ : urgent_;
  std::optional<OutFrame> frame(std::move(from.front()));
  from.pop_front();
  if (bulks_turn) {
    urgent_in_a_row_ = Length();
  } else {
    urgent_in_a_row_ += frame->extent.length;
  }
  return frame;
}

bool LaneQueue::abandon(std::uint16_t disk, std::uint64_t token) {
  for (std::deque<OutFrame>* queue : {&urgent_, &bulk_}) {
    const auto found = std::ranges::find_if(*queue, [&](const OutFrame& frame) {
      return frame.disk == disk && frame.token == token;
    });
    if (found == queue->end()) continue;
    queue->erase(found);
    return true;
  }
  return false;
}

void LaneQueue::clear() {
  urgent_.clear();
  bulk_.clear();
}

}  // namespace drover::mirror
