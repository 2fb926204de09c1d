// SPDX-License-Identifier: Apache-2.0
//
// Partial Copy frames: what was left out stays out, and every malformed combination is refused.
#include "mirror/frame.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <functional>
#include <vector>

#include "base/random.h"

namespace drover::mirror {
namespace {

using Bytes = std::vector<std::byte>;
using Runs = std::vector<Run>;  // Run alone is also the name of a function of gtest's
const FrameLimits kLimits{{Length(8U << 20)}, kMaxChunk};

struct Encoded {
  FrameHeader header;
  Bytes payload;
};

Encoded encode(const Bytes& content, const BlockMask& blocks, Encoding encoding) {
  Encoded frame;
  frame.header.type = FrameType::Copy;
  frame.header.extent = {Offset(1U << 20), Length(content.size())};
  frame.header.sequence = 1;
  Bytes scratch(kEncodeScratch);
  const auto payload = encode_copy(frame.header, content, blocks, {encoding, 0}, scratch);
  frame.payload.assign(payload.begin(), payload.end());
  return frame;
}

Status decode(const Encoded& frame, Runs& runs, Bytes& scratch) {
  std::array<std::byte, kHeaderSize> head{};
  encode_header(frame.header, head);
  DROVER_ASSIGN(const FrameHeader header, decode_header(head, kLimits));
  scratch.resize(kMaxPayload);
  return decode_payload(header, frame.payload, scratch, runs);
}

TEST(PartialCopy, ChangesTheBlocksThatItHoldsAndNoOther) {
  Random random(1);
  for (int round = 0; round < 60; ++round) {
    const std::size_t count = 1 + random.below(256);
    Bytes content(count * 4096 - (random.one_in(2) ? random.below(4096) : 0));
    for (std::size_t at = 0; at < content.size(); at += 4096) {
      if (random.one_in(3)) continue;
      for (std::size_t i = at; i < std::min(content.size(), at + 4096); i += 64) {
        content[i] = static_cast<std::byte>(random.below(256));
      }
    }
    BlockMask blocks;
    for (std::size_t i = 0; i < count; ++i) {
      if (i == 0 || i == count - 1 || random.one_in(2)) blocks.set(i);
    }
    const Encoded frame = encode(content, blocks, static_cast<Encoding>(round % 3));
    EXPECT_LE(frame.payload.size(), kMaxPayload);
    Bytes target(content.size(), std::byte{0xee});
    Runs runs;
    Bytes scratch;
    ASSERT_TRUE(decode(frame, runs, scratch));
    for (const auto& run : runs) {
      const std::size_t at = run.extent.offset.bytes() - (1U << 20);
      for (std::size_t i = 0; i < run.extent.length.bytes(); ++i) {
        ASSERT_EQ(target[at + i], std::byte{0xee}) << "runs don't overlap";
        target[at + i] = run.bytes.empty() ? std::byte{0} : run.bytes[i];
      }
    }
    for (std::size_t i = 0; i < content.size(); ++i) {
      if (blocks.contains(i / 4096)) {
        ASSERT_EQ(target[i], content[i]);
      } else {
        ASSERT_EQ(target[i], std::byte{0xee});
      }
    }
  }
}

TEST(PartialCopy, ThatLeavesNothingOutIsAnOrdinaryOne) {
  const Bytes content(3 * 4096, std::byte{7});
  EXPECT_EQ(encode(content, BlockMask::range(0, 3), Encoding::Plain).header.flags, 0);
  const Bytes zeroes(3 * 4096);
  EXPECT_EQ(encode(zeroes, BlockMask::all(), Encoding::Plain).header.type, FrameType::Zero);
  EXPECT_EQ(encode(zeroes, BlockMask(BlockMask::Words{5}), Encoding::Plain).header.type,
            FrameType::Copy)
      << "zeroes can't leave out blocks";
}

// Three blocks, with the bitmaps as given and as many data blocks as said.
Status decode_bitmaps(unsigned here, unsigned data, std::size_t data_blocks,
                      std::uint8_t flags = kFlagPartial) {
  Encoded frame;
  frame.header.type = FrameType::Copy;
  frame.header.flags = flags;
  frame.header.extent = {Offset(0), kBlock * 3};
  frame.header.sequence = 1;
  frame.payload = {static_cast<std::byte>(here), static_cast<std::byte>(data)};
  frame.payload.resize(2 + data_blocks * 4096, std::byte{9});
  frame.header.payload_length = frame.header.decoded_length =
      static_cast<std::uint32_t>(frame.payload.size());
  frame.header.checksum = XXH3_64bits(frame.payload.data(), frame.payload.size());
  Runs runs;
  Bytes scratch;
  return decode(frame, runs, scratch);
}

TEST(PartialCopy, IsRefusedWhenMalformed) {
  EXPECT_TRUE(decode_bitmaps(0b101, 0b101, 2));
  EXPECT_TRUE(decode_bitmaps(0b101, 0, 0));
  EXPECT_FALSE(decode_bitmaps(0b111, 0b101, 2)) << "leaves nothing out";
  EXPECT_FALSE(decode_bitmaps(0b110, 0b100, 1)) << "without its first block";
  EXPECT_FALSE(decode_bitmaps(0b011, 0b001, 1)) << "without its last block";
  EXPECT_FALSE(decode_bitmaps(0, 0, 0)) << "holds nothing";
  EXPECT_FALSE(decode_bitmaps(0b101, 0b010, 1)) << "data that was left out";
  EXPECT_FALSE(decode_bitmaps(0b1101, 0b101, 2)) << "blocks beyond the extent";
  EXPECT_FALSE(decode_bitmaps(0b101, 0b1101, 2)) << "data beyond the extent";
  EXPECT_FALSE(decode_bitmaps(0b101, 0b101, 1)) << "less than marked";
  EXPECT_FALSE(decode_bitmaps(0b101, 0b001, 2)) << "more than marked";
  EXPECT_FALSE(decode_bitmaps(0b101, 0b101, 3)) << "as long as the extent";
  EXPECT_FALSE(decode_bitmaps(0b101, 0b101, 2, kFlagPartial | kFlagSparse));
  EXPECT_FALSE(decode_bitmaps(0b101, 0b101, 2, 8)) << "an unknown flag";
}

Status decode_compare(const std::function<void(FrameHeader&)>& change = [](FrameHeader&) {}) {
  const Bytes content(3 * 4096, std::byte{7});
  Encoded frame;
  frame.header.type = FrameType::Compare;
  frame.header.extent = {Offset(4096), Length(content.size())};
  frame.header.sequence = 1;
  Bytes scratch(kEncodeScratch);
  const auto payload = encode_compare(frame.header, content, scratch);
  frame.payload.assign(payload.begin(), payload.end());
  change(frame.header);
  Runs runs;
  DROVER_TRY(decode(frame, runs, scratch));
  EXPECT_EQ(runs.size(), 1U);
  EXPECT_EQ(runs[0].bytes.size(), 3 * kHashSize);
  EXPECT_TRUE(compare_blocks(content, runs[0].bytes).empty());
  Bytes other = content;
  other[2 * 4096] ^= std::byte{1};
  EXPECT_EQ(compare_blocks(other, runs[0].bytes), BlockMask::range(2, 3));
  return {};
}

Encoded encode_one_write(const Bytes& content, const EncodeOptions& options) {
  Encoded frame;
  frame.header.type = FrameType::Write;
  frame.header.extent = {Offset(512), Length(content.size())};
  frame.header.sequence = 1;
  Bytes scratch(content.size());
  const auto payload = encode_write(frame.header, content, options, scratch);
  frame.payload.assign(payload.begin(), payload.end());
  return frame;
}

TEST(Write, MayBeCompressed) {
  Random random(2);
  Bytes content(70000);
  for (std::size_t i = 0; i < content.size(); ++i) {
    content[i] = static_cast<std::byte>(i % 7 == 0 ? random.below(256) : i % 31);
  }
  for (const EncodeOptions& options :
       {EncodeOptions{}, EncodeOptions{Encoding::Lz4, 0}, EncodeOptions{Encoding::Zstd, 1}, EncodeOptions{Encoding::Zstd, 6}}) {
    const Encoded frame = encode_one_write(content, options);
    EXPECT_EQ(frame.header.encoding, options.encoding);
    EXPECT_EQ(frame.payload.size() < content.size(), options.encoding != Encoding::Plain);
    Runs runs;
    Bytes scratch;
    ASSERT_TRUE(decode(frame, runs, scratch));
    ASSERT_EQ(runs.size(), 1U);
    EXPECT_TRUE(std::ranges::equal(runs[0].bytes, content));
  }
  for (std::byte& one : content) one = static_cast<std::byte>(random.below(256));
  const Encoded plain = encode_one_write(content, {Encoding::Zstd, 1});
  EXPECT_EQ(plain.header.encoding, Encoding::Plain) << "nothing is won";
}

TEST(Write, ThatIsCompressedIsRefusedWhenMalformed) {
  const Bytes content(8192, std::byte{3});
  const auto refused = [&](const std::function<void(Encoded&)>& change) {
    Encoded frame = encode_one_write(content, {Encoding::Zstd, 1});
    change(frame);
    frame.header.payload_length = static_cast<std::uint32_t>(frame.payload.size());
    Runs runs;
    Bytes scratch;
    return !decode(frame, runs, scratch);
  };
  EXPECT_FALSE(refused([](Encoded&) {}));
  EXPECT_TRUE(refused([](Encoded& one) { one.header.encoding = Encoding::Plain; }));
  EXPECT_TRUE(refused([](Encoded& one) { one.header.encoding = Encoding::Lz4; }));
  EXPECT_TRUE(refused([](Encoded& one) { one.header.decoded_length -= 1; })) << "not its extent";
  EXPECT_TRUE(refused([](Encoded& one) { one.header.decoded_length += 1; }));
  EXPECT_TRUE(refused([](Encoded& one) { one.header.extent.length = Length(4096); }));
  EXPECT_TRUE(refused([](Encoded& one) { one.header.checksum ^= 1; }));
  EXPECT_TRUE(refused([](Encoded& one) { one.payload.pop_back(); })) << "cut off";
  EXPECT_TRUE(refused([](Encoded& one) { one.payload.push_back(std::byte{0}); }));
  EXPECT_TRUE(refused([](Encoded& one) { one.payload.clear(); }));
  EXPECT_TRUE(refused([](Encoded& one) { one.payload.resize(8192); })) << "not smaller";
  for (std::size_t i = 0; i < 12; ++i) {
    EXPECT_TRUE(refused([i](Encoded& one) { one.payload.at(i % one.payload.size()) ^= std::byte{0x55}; })) << i;
  }
}

TEST(Compare, CarriesAHashAndIsRefusedWhenMalformed) {
  EXPECT_TRUE(decode_compare());
  EXPECT_FALSE(decode_compare([](FrameHeader& h) { h.flags = kFlagFresh; }));
  EXPECT_FALSE(decode_compare([](FrameHeader& h) { h.extent.offset = Offset(4000); }));
  EXPECT_FALSE(decode_compare([](FrameHeader& h) { h.extent.length = 2_MiB; }));
  EXPECT_FALSE(decode_compare([](FrameHeader& h) { h.disk = 1; }));
  EXPECT_FALSE(decode_compare([](FrameHeader& h) { h.encoding = Encoding::Lz4; }));
  EXPECT_FALSE(decode_compare([](FrameHeader& h) { h.payload_length = h.decoded_length = 47; }));
  EXPECT_FALSE(decode_compare([](FrameHeader& h) { h.checksum ^= 1; }));
}

Encoded offered(const std::function<void(Encoded&)>& change = [](Encoded&) {}) {
  Offer offer;
  offer.pieces.resize(9);  // of an extent whose last one is shorter
  offer.pieces[0] = PieceHash{std::byte{1}};
  offer.pieces[8] = PieceHash{std::byte{2}};
  Encoded frame;
  frame.header.type = FrameType::Offer;
  frame.header.flags = kFlagFresh;
  frame.header.extent = {Offset(1U << 20), Length(8 * kPiece.bytes() + 5000)};
  frame.header.sequence = 1;
  Bytes scratch(kEncodeScratch);
  const auto payload = encode_offer(frame.header, offer, scratch);
  frame.payload.assign(payload.begin(), payload.end());
  change(frame);
  frame.header.payload_length = frame.header.decoded_length =
      static_cast<std::uint32_t>(frame.payload.size());
  frame.header.checksum = XXH3_64bits(frame.payload.data(), frame.payload.size());
  return frame;
}
bool is_taken(const Encoded& frame) {
  Runs runs;
  Bytes scratch;
  return decode(frame, runs, scratch).has_value();
}

TEST(Offered, CarriesAHashOfEachPieceThatIsNotZero) {
  const Encoded frame = offered();
  EXPECT_EQ(frame.payload.size(), 1 + 2 + 2 * kPieceHashSize);
  ASSERT_TRUE(is_taken(frame));
  const Offer offer = decode_offer(frame.header, frame.payload);
  EXPECT_EQ(offer.piece, kPiece);
  ASSERT_EQ(offer.pieces.size(), 9U);
  for (std::size_t i = 0; i < 9; ++i) EXPECT_EQ(offer.pieces[i].has_value(), i == 0 || i == 8);
  EXPECT_EQ(offer.pieces[8]->front(), std::byte{2});
  EXPECT_EQ(data_blocks(offer, frame.header.extent),
            BlockMask::range(0, 16) | BlockMask::range(128, 130));
}

TEST(Offered, IsRefusedWhenMalformed) {
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.header.flags = kFlagSparse; })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.header.encoding = Encoding::Lz4; })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.header.extent.offset = Offset(1000); })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.header.disk = 1; })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.header.extent.length = 2_MiB; })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.payload.clear(); })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.payload[0] = std::byte{9}; }))) << "too large";
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.payload[0] = std::byte{3}; }))) << "other pieces";
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.payload[1] = std::byte{0}; })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.payload[2] = std::byte{2}; }))) << "beyond the end";
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.payload.pop_back(); })));
  EXPECT_FALSE(is_taken(offered([](Encoded& f) { f.payload.resize(200); })));
  Encoded damaged = offered();
  damaged.payload.back() ^= std::byte{1};
  EXPECT_FALSE(is_taken(damaged));
}

TEST(Compare, TheAnswerNamesTheBlocksAndNothingElse) {
  const auto header_holds = [](const std::function<void(FrameHeader&)>& change) {
    FrameHeader header;
    header.sequence = 3;
    std::array<std::byte, kDiffersPayload> payload{};
    encode_differs(header, BlockMask::range(2, 5), payload);
    EXPECT_EQ(decode_differs(payload).value(), BlockMask::range(2, 5));
    change(header);
    std::array<std::byte, kHeaderSize> head{};
    encode_header(header, head);
    return decode_header(head, kLimits).has_value();
  };
  EXPECT_TRUE(header_holds([](FrameHeader&) {}));
  EXPECT_FALSE(header_holds([](FrameHeader& h) { h.flags = 1; }));
  EXPECT_FALSE(header_holds([](FrameHeader& h) { h.checksum = 1; }));
  EXPECT_FALSE(header_holds([](FrameHeader& h) { h.extent.length = 4_KiB; }));
  EXPECT_FALSE(header_holds([](FrameHeader& h) { h.payload_length = h.decoded_length = 1; }));
  EXPECT_FALSE(decode_differs(Bytes(kDiffersPayload))) << "no block differs";
}

}  // namespace
}  // namespace drover::mirror
