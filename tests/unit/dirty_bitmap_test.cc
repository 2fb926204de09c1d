// SPDX-License-Identifier: Apache-2.0
#include "memmig/dirty_bitmap.h"

#include <gtest/gtest.h>

namespace drover::memmig {
namespace {

Extent extent(std::uint64_t offset, std::uint64_t length) {
  return {Offset(offset), Length(length)};
}

TEST(BitmapName, SaysDiskAndGeneration) {
  EXPECT_EQ(bitmap_name("vda", 7), "drover-vda-7");
  const auto parsed = parse_bitmap_name("drover-vda-7");
  ASSERT_TRUE(parsed);
  EXPECT_EQ(parsed->disk, "vda");
  EXPECT_EQ(parsed->generation, 7U);
}

TEST(BitmapName, OthersAreLeftAlone) {
  for (const char* name : {"", "vda-7", "drover-", "drover-vda", "drover-vda-", "drover-vda-x7",
                           "drover--7", "backup-drover-vda-7", "drover-vda-99999999999999999999"}) {
    EXPECT_FALSE(parse_bitmap_name(name)) << name;
  }
}

TEST(BitmapGranularity, IsFineForUsualDisksAndBoundedForHugeOnes) {
  EXPECT_EQ(bitmap_granularity(Length(0)), 4_KiB);
  EXPECT_EQ(bitmap_granularity(4_GiB), 4_KiB);
  EXPECT_EQ(bitmap_granularity(256_GiB), 4_KiB);
  EXPECT_EQ(bitmap_granularity(257_GiB), 64_KiB);
  EXPECT_EQ(bitmap_granularity(1024_GiB * 32), 64_KiB);
  EXPECT_EQ(bitmap_granularity(1024_GiB * 64), 128_KiB);
  EXPECT_EQ(bitmap_granularity(1024_GiB * 1024), 2_MiB);
}

TEST(ExtentUnion, JoinsWhatTouches) {
  ExtentUnion all;
  all.add(extent(0, 4096));
  all.add(extent(4096, 8192));
  all.add(extent(65536, 4096));
  EXPECT_EQ(all.take(), (std::vector{extent(0, 12288), extent(65536, 4096)}));
}

TEST(ExtentUnion, ManyExtentsBecomeFewerAndCoverTheSame) {
  constexpr std::size_t kMax = 64;
  ExtentUnion all(kMax);
  std::vector<Extent> added;
  std::uint64_t position = 0;
  for (std::uint64_t i = 0; i < 10000; ++i) {
    // Mostly near each other, some far apart.
    position += i % 500 == 499 ? 64 << 20 : 8192;
    added.push_back(extent(position, 4096));
    position += 4096;
    all.add(added.back());
  }
  const std::vector<Extent> joined = all.take();
  EXPECT_LE(joined.size(), kMax);
  EXPECT_GT(joined.size(), 1U);
  std::size_t at = 0;
  for (const Extent& each : added) {
    while (at < joined.size() && joined[at].end() <= each.offset) ++at;
    ASSERT_LT(at, joined.size());
    EXPECT_LE(joined[at].offset, each.offset);
    EXPECT_GE(joined[at].end(), each.end());
  }
  for (std::size_t i = 1; i < joined.size(); ++i) EXPECT_GT(joined[i].offset, joined[i - 1].end());
}

TEST(ExtentUnion, TheNearestAreJoinedFirst) {
  constexpr std::uint64_t kFar = std::uint64_t{1} << 30;
  ExtentUnion all(8);
  all.add(extent(0, 4096));
  for (std::uint64_t i = 0; i < 6; ++i) all.add(extent(kFar + i * 8192, 4096));
  all.add(extent(2 * kFar, 4096));
  all.add(extent(3 * kFar, 4096));  // one too many
  EXPECT_EQ(all.take(), (std::vector{extent(0, 4096), extent(kFar, 5 * 8192 + 4096),
                                     extent(2 * kFar, 4096), extent(3 * kFar, 4096)}));
}

TEST(ReadBitmapExport, NobodyThereIsUnreachable) {
  const auto read = read_bitmap_export("/nonexistent/socket", "x", "drover-vda-1");
  ASSERT_FALSE(read);
}

}  // namespace
}  // namespace drover::memmig
