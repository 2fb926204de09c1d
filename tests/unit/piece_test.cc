// SPDX-License-Identifier: Apache-2.0
//
// A filter forgets nothing, errs rarely, and is checked when it comes from a peer.
#include "mirror/piece.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string_view>

namespace drover::mirror {
namespace {

PieceHash hash_of(std::uint64_t number) { return piece_hash(std::as_bytes(std::span(&number, 1))); }

TEST(PieceHash, IsSha256) {
  const std::string_view text = "abc";
  const PieceHash hash = piece_hash(std::as_bytes(std::span(text)));
  // FIPS 180-4's example.
  EXPECT_EQ(std::to_integer<int>(hash.front()), 0xba);
  EXPECT_EQ(std::to_integer<int>(hash.back()), 0xad);
}

TEST(PieceFilter, ForgetsNothingAndErrsRarely) {
  for (const std::uint64_t count : {0U, 1U, 100U, 20000U}) {
    PieceFilter filter = PieceFilter::for_pieces(count);
    for (std::uint64_t i = 0; i < count; ++i) filter.add(hash_of(i));
    for (std::uint64_t i = 0; i < count; ++i) ASSERT_TRUE(filter.may_contain(hash_of(i)));
    unsigned wrong = 0;
    for (std::uint64_t i = 0; i < 10000; ++i)
      wrong += filter.may_contain(hash_of(count + i)) ? 1 : 0;
    EXPECT_LT(wrong, 50U) << count;
  }
}

TEST(PieceFilter, IsBounded) {
  EXPECT_EQ(PieceFilter::for_pieces(UINT64_MAX).bytes().size(), PieceFilter::kMaxBytes);
  EXPECT_EQ(PieceFilter::for_pieces(0).bytes().size(), PieceFilter::kMinBytes);
}

TEST(PieceFilter, OfAPeerIsChecked) {
  const auto made = [](std::size_t size, std::uint64_t probes) {
    return PieceFilter::from_bytes(std::vector<std::byte>(size), probes).has_value();
  };
  EXPECT_TRUE(made(PieceFilter::kMinBytes, 1));
  EXPECT_TRUE(made(1U << 20, PieceFilter::kMaxProbes));
  EXPECT_FALSE(made(0, 1));
  EXPECT_FALSE(made(PieceFilter::kMinBytes / 2, 1));
  EXPECT_FALSE(made(100, 1));
  EXPECT_FALSE(made(2 * PieceFilter::kMaxBytes, 1));
  EXPECT_FALSE(made(1U << 20, 0));
  EXPECT_FALSE(made(1U << 20, PieceFilter::kMaxProbes + 1));
}

}  // namespace
}  // namespace drover::mirror
