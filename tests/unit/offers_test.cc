// SPDX-License-Identifier: Apache-2.0
//
// What is offered, what a target without anything costs, and when a filter is no longer believed.
#include "mirror/offers.h"

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "base/random.h"

namespace drover::mirror {
namespace {

using Bytes = std::vector<std::byte>;
constexpr std::size_t kPieces = 16;

Bytes chunk_of(std::uint64_t seed) {
  Random random(seed);
  Bytes bytes(kPieces * kPiece.bytes());
  for (std::size_t i = 0; i < bytes.size(); i += 512) {
    bytes[i] = static_cast<std::byte>(1 + random.below(255));
  }
  return bytes;
}
std::span<const std::byte> piece_of(const Bytes& chunk, std::size_t i) {
  return std::span(chunk).subspan(i * kPiece.bytes(), kPiece.bytes());
}

OutFrame frame_of(const Bytes& chunk) {
  OutFrame frame;
  frame.type = FrameType::Copy;
  frame.fresh = true;
  frame.extent = {Offset(3 * kMaxChunk.bytes()), Length(chunk.size())};
  frame.content = chunk;
  return frame;
}

// A lane whose target has these pieces of the chunk.
struct Lane {
  explicit Lane(const Bytes& chunk, std::size_t first, std::size_t end) {
    auto filter = PieceFilter::for_pieces(kPieces);
    for (std::size_t i = first; i < end; ++i) filter.add(piece_hash(piece_of(chunk, i)));
    known.set(std::make_shared<const PieceFilter>(std::move(filter)));
  }
  KnownPieces known;
  LaneOffers offers{known};
};

TEST(Offers, AChunkThatIsLikelyThereIsOfferedWithItsZeroesAsSuch) {
  Bytes chunk = chunk_of(1);
  std::fill_n(chunk.begin() + 2 * kPiece.bytes(), kPiece.bytes(), std::byte{0});
  Lane lane(chunk, 0, kPieces);
  const auto offer = lane.offers.consider(frame_of(chunk), kMaxChunk);
  ASSERT_TRUE(offer.has_value());
  ASSERT_EQ(offer->pieces.size(), kPieces);
  for (std::size_t i = 0; i < kPieces; ++i) {
    ASSERT_EQ(offer->pieces[i].has_value(), i != 2);
    if (i != 2) {
      EXPECT_EQ(*offer->pieces[i], piece_hash(piece_of(chunk, i)));
    }
  }
  const BlockMask data = data_blocks(*offer, frame_of(chunk).extent);
  EXPECT_EQ(data.count(), 15 * 16U);
  EXPECT_EQ(lane.offers.answered(data, BlockMask::range(0, 16)), kPiece * 14);
}

TEST(Offers, HalfOfItIsEnoughAndLessIsNot) {
  const Bytes chunk = chunk_of(2);
  EXPECT_TRUE(Lane(chunk, 0, 8).offers.consider(frame_of(chunk), kMaxChunk).has_value());
  EXPECT_FALSE(Lane(chunk, 0, 7).offers.consider(frame_of(chunk), kMaxChunk).has_value());
  EXPECT_FALSE(Lane(chunk, 0, 0).offers.consider(frame_of(chunk), kMaxChunk).has_value());
}

TEST(Offers, OnlyWholeChunksThatWereNeverSentAreOffered) {
  const Bytes chunk = chunk_of(3);
  Lane lane(chunk, 0, kPieces);
  const auto offered = [&](const std::function<void(OutFrame&)>& change) {
    OutFrame frame = frame_of(chunk);
    change(frame);
    return lane.offers.consider(frame, kMaxChunk).has_value();
  };
  EXPECT_TRUE(offered([](OutFrame&) {}));
  EXPECT_FALSE(offered([](OutFrame& frame) { frame.fresh = false; }));
  EXPECT_FALSE(offered([](OutFrame& frame) { frame.type = FrameType::Write; }));
  EXPECT_FALSE(offered([](OutFrame& frame) { frame.type = FrameType::Compare; }));
  EXPECT_FALSE(offered([](OutFrame& frame) { frame.blocks = BlockMask::range(0, 3); }));
  EXPECT_FALSE(offered([](OutFrame& frame) { frame.extent.offset += kPiece; }));
  EXPECT_FALSE(lane.offers.consider(frame_of(Bytes(chunk.size())), kMaxChunk).has_value());
  EXPECT_FALSE(LaneOffers(KnownPieces()).consider(frame_of(chunk), kMaxChunk).has_value());
}

TEST(OfferPolicy, LooksRarelyWhereNothingIsFound) {
  OfferPolicy policy;
  unsigned samples = 0;
  constexpr unsigned kChunks = 100'000;
  for (unsigned i = 0; i < kChunks; ++i) {
    const unsigned asked = policy.look();
    samples += asked;
    if (asked > 0) policy.looked(false);
  }
  // Of 16 pieces per chunk: half a percent of hashing it.
  EXPECT_LE(samples,
            kChunks / OfferPolicy::kRarely + OfferPolicy::kMissesUntilRare * OfferPolicy::kSamples);
  // And comes back at the first that is found.
  while (policy.look() == 0) {
  }
  policy.looked(true);
  EXPECT_EQ(policy.look(), OfferPolicy::kSamples);
}

TEST(OfferPolicy, EndsWhereTheTargetDoesNotHaveWhatItPromised) {
  OfferPolicy policy;
  for (int i = 0; i < OfferPolicy::kMostRegrets; ++i) {
    EXPECT_FALSE(policy.ended());
    EXPECT_GT(policy.look(), 0U);
    policy.answered(100, 256);
  }
  EXPECT_TRUE(policy.ended());
  EXPECT_EQ(policy.look(), 0U);
  policy.answered(256, 256);
  EXPECT_TRUE(policy.ended());
}

TEST(OfferPolicy, BearsAMissNowAndThen) {
  OfferPolicy policy;
  for (int i = 0; i < 1000; ++i) {
    policy.answered(256, 256);
    policy.answered(i % 3 == 0 ? 0 : 200, 256);
  }
  EXPECT_FALSE(policy.ended());
}

}  // namespace
}  // namespace drover::mirror
