// SPDX-License-Identifier: Apache-2.0
#include "mirror/block_set.h"

#include <utility>

#include "base/check.h"

namespace drover::mirror {

BlockSet::BlockSet(const Options& options)
    : whole_(BlockMask::range(0, options.blocks_per_chunk)),
      max_masks_(options.max_masks),
      chunks_(options.chunks, options.full) {}

BlockMask BlockSet::blocks(std::uint64_t chunk) const {
  if (!chunks_.contains(chunk)) return {};
  const BlockMask* const mask = find(chunk);
  return mask != nullptr ? *mask : BlockMask::all();
}

void BlockSet::add(std::uint64_t chunk, const BlockMask& blocks) {
  if (blocks.empty()) return;
  if (chunks_.contains(chunk)) {
    const BlockMask* const mask = find(chunk);
    if (mask == nullptr || mask->covers(blocks)) return;
    const BlockMask joined = *mask | blocks;
    drop_mask(chunk);
    if (!joined.covers(whole_)) put_mask(chunk, joined);
    return;
  }
  chunks_.insert(chunk);
  if (!blocks.covers(whole_) && used_ < max_masks_) put_mask(chunk, blocks);
}

void BlockSet::erase(std::uint64_t chunk) {
  chunks_.erase(chunk);
  drop_mask(chunk);
}

void BlockSet::add_range(std::uint64_t first, std::uint64_t end) {
  chunks_.insert_range(first, end);
  drop_masks(first, end);
}

void BlockSet::erase_range(std::uint64_t first, std::uint64_t end) {
  chunks_.erase_range(first, end);
  drop_masks(first, end);
}

void BlockSet::drop_masks(std::uint64_t first, std::uint64_t end) {
  if (used_ == 0) return;
  if (end - first <= slots_.size()) {
    for (std::uint64_t chunk = first; chunk < end; ++chunk) drop_mask(chunk);
    return;
  }
  std::vector<std::uint64_t> covered;
  for (const Slot& slot : slots_) {
    if (slot.name > first && slot.name <= end) covered.push_back(slot.name - 1);
  }
  for (const std::uint64_t chunk : covered) drop_mask(chunk);
}

void BlockSet::clear() {
  chunks_.erase_range(0, chunks_.size());
  slots_.clear();
  used_ = 0;
  masked_blocks_ = 0;
}

// Fibonacci hashing: neighbours, which is what a guest writes, spread over the table.
std::size_t BlockSet::home(std::uint64_t name) const {
  return static_cast<std::size_t>((name * 0x9e3779b97f4a7c15ULL) >> 32) & (slots_.size() - 1);
}

const BlockMask* BlockSet::find(std::uint64_t chunk) const {
  if (used_ == 0) return nullptr;
  for (std::size_t at = home(chunk + 1); slots_[at].name != 0;
       at = (at + 1) & (slots_.size() - 1)) {
    if (slots_[at].name == chunk + 1) return &slots_[at].blocks;
  }
  return nullptr;
}

void BlockSet::put_mask(std::uint64_t chunk, const BlockMask& blocks) {
  if ((used_ + 1) * 2 > slots_.size()) grow();
  std::size_t at = home(chunk + 1);
  while (slots_[at].name != 0) at = (at + 1) & (slots_.size() - 1);
  slots_[at] = {chunk + 1, blocks};
  ++used_;
  masked_blocks_ += blocks.count();
}

void BlockSet::drop_mask(std::uint64_t chunk) {
  const BlockMask* const mask = find(chunk);
  if (mask == nullptr) return;
  masked_blocks_ -= mask->count();
  --used_;
  std::size_t hole = home(chunk + 1);
  while (slots_[hole].name != chunk + 1) hole = (hole + 1) & (slots_.size() - 1);
  // What was pushed on by the slot that goes moves back.
  const std::size_t last = slots_.size() - 1;
  for (std::size_t at = (hole + 1) & last; slots_[at].name != 0; at = (at + 1) & last) {
    const std::size_t way = (at - home(slots_[at].name)) & last;
    if (way < ((at - hole) & last)) continue;
    slots_[hole] = slots_[at];
    hole = at;
  }
  slots_[hole].name = 0;
}

void BlockSet::grow() {
  constexpr std::size_t kFirst = 16;
  std::vector<Slot> old = std::exchange(slots_, {});
  slots_.resize(old.empty() ? kFirst : old.size() * 2);
  for (const Slot& slot : old) {
    if (slot.name == 0) continue;
    std::size_t at = home(slot.name);
    while (slots_[at].name != 0) at = (at + 1) & (slots_.size() - 1);
    slots_[at] = slot;
  }
}

}  // namespace drover::mirror
