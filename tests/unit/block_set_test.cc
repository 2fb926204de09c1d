// SPDX-License-Identifier: Apache-2.0
//
// BlockMask, ChunkSet and BlockSet against plain models.
#include "mirror/block_set.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "base/random.h"

namespace drover::mirror {
namespace {

TEST(BlockMask, ShiftsAndRanges) {
  for (std::size_t first = 0; first < 256; first += 7) {
    for (std::size_t end = first + 1; end <= 256; end += 13) {
      const BlockMask mask = BlockMask::range(first, end);
      EXPECT_EQ(mask.count(), end - first);
      EXPECT_EQ(mask.first(), first);
      EXPECT_EQ(mask.end(), end);
      EXPECT_EQ(mask.shifted_down(first), BlockMask::range(0, end - first));
    }
  }
  EXPECT_TRUE(BlockMask::range(9, 9).empty());
  EXPECT_TRUE(BlockMask::all().covers(BlockMask::range(0, 256)));
}

TEST(ChunkSet, EqualsAPlainSet) {
  constexpr std::uint64_t kSize = 3 * ChunkSet::kPage + 1000;
  Random random(1);
  for (const bool full : {false, true}) {
    ChunkSet set(kSize, full);
    std::set<std::uint64_t> model;
    for (std::uint64_t i = 0; full && i < kSize; ++i) model.insert(i);
    for (int step = 0; step < 400; ++step) {
      const std::uint64_t first = random.below(kSize);
      const std::uint64_t end = first + random.below(std::min<std::uint64_t>(
                                            kSize - first + 1, random.one_in(3) ? kSize : 3));
      const bool insert = random.one_in(2);
      if (insert) {
        set.insert_range(first, end);
      } else {
        set.erase_range(first, end);
      }
      for (std::uint64_t i = first; i < end; ++i) {
        if (insert) {
          model.insert(i);
        } else {
          model.erase(i);
        }
      }
      ASSERT_EQ(set.count(), model.size());
      const std::uint64_t probe = random.below(kSize);
      ASSERT_EQ(set.contains(probe), model.contains(probe));
      const auto next = model.lower_bound(probe);
      ASSERT_EQ(set.next(probe),
                next == model.end() ? std::nullopt : std::optional<std::uint64_t>(*next));
      const std::uint64_t limit = random.below(2 * kSize);
      ASSERT_EQ(set.next(probe, limit), next == model.end() || *next >= limit
                                            ? std::nullopt
                                            : std::optional<std::uint64_t>(*next));
    }
  }
}

TEST(ChunkSet, FindsWhatAnotherHasNot) {
  constexpr std::uint64_t kSize = 2 * ChunkSet::kPage + 77;
  Random random(5);
  ChunkSet set(kSize, true);
  ChunkSet other(kSize);
  for (int step = 0; step < 300; ++step) {
    const std::uint64_t first = random.below(kSize);
    other.insert_range(first, first + random.below(std::min<std::uint64_t>(kSize - first, 400)));
    set.erase(random.below(kSize));
    other.erase(random.below(kSize));
    const std::uint64_t from = random.below(kSize);
    std::optional<std::uint64_t> expected;
    for (std::uint64_t i = from; i < kSize && !expected; ++i) {
      if (set.contains(i) && !other.contains(i)) expected = i;
    }
    ASSERT_EQ(set.next_outside(from, other), expected);
  }
}

TEST(BlockSet, EqualsAPlainMapWhileMasksSuffice) {
  constexpr std::uint64_t kChunks = 5000;
  BlockSet set({.chunks = kChunks, .max_masks = kChunks});
  std::map<std::uint64_t, BlockMask> model;
  Random random(2);
  for (int step = 0; step < 30000; ++step) {
    const std::uint64_t chunk = random.below(random.one_in(2) ? 40 : kChunks);
    if (random.one_in(3)) {
      set.erase(chunk);
      model.erase(chunk);
    } else {
      const std::size_t first = random.below(256);
      const BlockMask blocks = BlockMask::range(first, first + 1 + random.below(256 - first));
      set.add(chunk, blocks);
      model[chunk] |= blocks;
    }
    if (random.one_in(2000)) {
      const std::uint64_t end = chunk + random.below(kChunks - chunk);
      set.add_range(chunk, end);
      for (std::uint64_t i = chunk; i < end; ++i) model[i] = BlockMask::all();
    }
    ASSERT_EQ(set.count(), model.size());
    ASSERT_EQ(set.blocks(chunk), model.contains(chunk) ? model.at(chunk) : BlockMask());
    if (step % 3000 != 0) continue;
    std::uint64_t blocks = 0;
    for (const auto& [each, mask] : model) {
      ASSERT_EQ(set.blocks(each), mask);
      if (mask != BlockMask::all()) blocks += mask.count();
    }
    ASSERT_EQ(set.masked_blocks(), blocks);
  }
}

TEST(BlockSet, TakesChunksWholeWhenMasksRunOut) {
  BlockSet set({.chunks = 10, .max_masks = 1});
  set.add(1, BlockMask::range(0, 1));
  set.add(2, BlockMask::range(0, 1));
  EXPECT_EQ(set.blocks(1), BlockMask::range(0, 1));
  EXPECT_EQ(set.blocks(2), BlockMask::all());
}

}  // namespace
}  // namespace drover::mirror
