// SPDX-License-Identifier: Apache-2.0
//
// A set of a disk's 4 KiB blocks, kept by chunk: a chunk is in it not at all, whole, or with a mask
// of its blocks. Memory is bounded: when `max_masks` chunks have a mask, further ones are taken
// whole. So the set may hold more than was added, never less.
//
// Threads: none of its own; use from one. add() allocates only when the table of masks doubles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "mirror/block_mask.h"
#include "mirror/chunk_set.h"

namespace drover::mirror {

class BlockSet {
 public:
  struct Options {
    std::uint64_t chunks = 0;
    std::size_t blocks_per_chunk = BlockMask::kBits;
    std::size_t max_masks = 0;
    bool full = false;
  };
  explicit BlockSet(const Options& options);

  [[nodiscard]] bool contains(std::uint64_t chunk) const { return chunks_.contains(chunk); }
  // The chunk's blocks in the set; BlockMask::all() if it is in it whole.
  [[nodiscard]] BlockMask blocks(std::uint64_t chunk) const;
  void add(std::uint64_t chunk, const BlockMask& blocks);
  void erase(std::uint64_t chunk);
  // Whole chunks [first, end).
  void add_range(std::uint64_t first, std::uint64_t end);
  void erase_range(std::uint64_t first, std::uint64_t end);
  void clear();

  // The smallest chunk >= first of which there is something in the set.
  [[nodiscard]] std::optional<std::uint64_t> next(std::uint64_t first) const {
    return chunks_.next(first);
  }
  [[nodiscard]] std::optional<std::uint64_t> next_outside(std::uint64_t first,
                                                          const ChunkSet& other) const {
    return chunks_.next_outside(first, other);
  }
  [[nodiscard]] std::uint64_t count() const { return chunks_.count(); }  // chunks
  [[nodiscard]] bool has_mask(std::uint64_t chunk) const { return find(chunk) != nullptr; }
  [[nodiscard]] std::size_t masks() const { return used_; }  // chunks with a mask
  [[nodiscard]] std::uint64_t masked_blocks() const { return masked_blocks_; }  // theirs

 private:
  struct Slot {
    std::uint64_t name = 0;  // of the chunk: its number and one; 0: free
    BlockMask blocks;
  };
  [[nodiscard]] std::size_t home(std::uint64_t name) const;
  [[nodiscard]] const BlockMask* find(std::uint64_t chunk) const;
  void put_mask(std::uint64_t chunk, const BlockMask& blocks);
  void drop_mask(std::uint64_t chunk);
  void drop_masks(std::uint64_t first, std::uint64_t end);
  void grow();

  BlockMask whole_;
  std::size_t max_masks_;
  ChunkSet chunks_;
  std::vector<Slot> slots_;  // open addressing, linear probing, at most half full
  std::size_t used_ = 0;
  std::uint64_t masked_blocks_ = 0;
};

}  // namespace drover::mirror
