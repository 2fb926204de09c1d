// SPDX-License-Identifier: Apache-2.0
//
// How an offer's pieces are found: beside the first, elsewhere, not at all; and never unverified.
#include "mirror/offered_chunk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace drover::mirror {
namespace {

using Bytes = std::vector<std::byte>;
constexpr Length kSmall = Length(4096);

Bytes piece(int value) { return Bytes(kSmall.bytes(), static_cast<std::byte>(value)); }
Bytes join(const std::vector<int>& values) {
  Bytes all;
  for (const int value : values) {
    const Bytes one = piece(value);
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

class FakeContent final : public KnownContent {
 public:
  void add(const Bytes& image) {
    const auto number = static_cast<std::uint32_t>(images.size());
    images.push_back(image);
    for (std::size_t at = 0; at + kSmall.bytes() <= image.size(); at += kSmall.bytes()) {
      places[piece_hash(std::span(image).subspan(at, kSmall.bytes()))].push_back(
          {number, Offset(at)});
    }
  }
  std::vector<Place> find(const PieceHash& hash) override {
    ++lookups;
    std::vector<Place> found = places[hash];
    if (found.size() > kMaxPlaces) found.resize(kMaxPlaces);
    return found;
  }
  bool holds(const Place& place, Length length) override {
    return place.image < images.size() &&
           place.offset.bytes() + length.bytes() <= images[place.image].size();
  }
  void read(const Place& place, std::span<std::byte> buffer, blockcopy::Done done) override {
    ++reads;
    std::memcpy(buffer.data(), images[place.image].data() + place.offset.bytes(), buffer.size());
    waiting.push_back([done = std::move(done), fails = broken.contains(place.image)] {
      done(fails ? Status(fail(Code::Io, "reading: I/O error")) : Status());
    });
  }
  int shareable(const Place& place) override { return shares ? static_cast<int>(place.image) : -1; }
  void run() {
    while (!waiting.empty()) {
      const auto task = std::move(waiting.back());
      waiting.pop_back();
      task();
    }
  }
  std::vector<Bytes> images;
  std::map<PieceHash, std::vector<Place>> places;
  std::map<std::uint32_t, bool> broken;
  std::vector<std::function<void()>> waiting;
  unsigned lookups = 0;
  unsigned reads = 0;
  unsigned spoiled = 0;  // pieces
  bool shares = false;
  blockcopy::Sharing sharing = blockcopy::Sharing::Shared;
};

// A target that shares blocks if it may, and what is in it.
class FakeTarget final : public OfferedChunk::Place {
 public:
  explicit FakeTarget(FakeContent* content, std::size_t size) : bytes(size), content_(content) {}
  blockcopy::Sharing share(int fd, Offset from, std::size_t at, Length length) override {
    if (content_->sharing == blockcopy::Sharing::Refused) return content_->sharing;
    const bool fails = content_->sharing == blockcopy::Sharing::Failed;
    const std::size_t size = fails ? length.bytes() / 2 : length.bytes();
    const Bytes& image = content_->images[static_cast<std::size_t>(fd)];
    std::memcpy(bytes.data() + at, image.data() + from.bytes(), size);
    return content_->sharing;
  }
  void read(std::size_t at, std::span<std::byte> buffer, blockcopy::Done done) override {
    content_->waiting.push_back([this, at, buffer, done = std::move(done)] {
      std::memcpy(buffer.data(), bytes.data() + at, buffer.size());
      done({});
    });
  }
  Bytes bytes;

 private:
  FakeContent* content_;
};

// Which of the values' pieces were found; 0 is a zero piece.
std::vector<bool> gather(FakeContent* content, const std::vector<int>& values) {
  Offer offer;
  offer.piece = kSmall;
  for (const int value : values) {
    offer.pieces.emplace_back();
    if (value != 0) offer.pieces.back() = piece_hash(piece(value));
  }
  Bytes room(values.size() * kSmall.bytes());
  FakeTarget target(content, room.size());
  OfferedChunk chunk(offer, content, target, room, {});
  unsigned ended = 0;
  chunk.gather([&] { ++ended; });
  if (content != nullptr) content->run();
  EXPECT_EQ(ended, 1U);
  std::vector<bool> found;
  for (std::size_t i = 0; i < values.size(); ++i) {
    found.push_back(chunk.found(i));
    if (chunk.found(i)) {
      EXPECT_TRUE(std::ranges::equal(chunk.bytes(i), piece(values[i])));
    }
    const auto in_place = std::span(target.bytes).subspan(i * kSmall.bytes(), kSmall.bytes());
    if (chunk.shared(i)) {
      EXPECT_TRUE(chunk.found(i) && std::ranges::equal(in_place, piece(values[i])));
    }
    if (content != nullptr && chunk.spoiled(i)) ++content->spoiled;
    if (!chunk.shared(i) && !chunk.spoiled(i)) {
      EXPECT_TRUE(std::ranges::equal(in_place, piece(0))) << "nothing was done to it";
    }
  }
  return found;
}

TEST(OfferedChunk, WhatLiesSideBySideIsReadAtOnceAfterOneLookUp) {
  FakeContent content;
  content.add(join({9, 1, 2, 3, 4, 9}));
  EXPECT_EQ(gather(&content, {1, 2, 3, 4}), std::vector<bool>({true, true, true, true}));
  EXPECT_EQ(content.lookups, 1U);
  EXPECT_EQ(content.reads, 1U);
}

TEST(OfferedChunk, ZeroPiecesAreNotLookedFor) {
  FakeContent content;
  content.add(join({1, 0, 3}));
  EXPECT_EQ(gather(&content, {1, 0, 3}), std::vector<bool>({true, false, true}));
  EXPECT_EQ(content.reads, 2U);
}

TEST(OfferedChunk, WhatIsElsewhereIsLookedUp) {
  FakeContent content;
  content.add(join({1, 8, 3, 7}));
  content.add(join({5, 5, 5, 2, 5, 4}));
  EXPECT_EQ(gather(&content, {1, 2, 3, 4}), std::vector<bool>({true, true, true, true}));
}

TEST(OfferedChunk, WhatHasChangedIsNotFound) {
  FakeContent content;
  content.add(join({1, 2, 3}));
  content.images[0][kSmall.bytes() + 7] ^= std::byte{1};
  EXPECT_EQ(gather(&content, {1, 2, 3}), std::vector<bool>({true, false, true}));
}

TEST(OfferedChunk, AnotherPlaceHelps) {
  FakeContent content;
  content.add(join({1, 2}));
  content.add(join({2, 1}));
  content.images[0] = join({6, 6});
  EXPECT_EQ(gather(&content, {1, 2}), std::vector<bool>({true, true}));
}

TEST(OfferedChunk, AnImageThatCanNotBeReadIsAMiss) {
  FakeContent content;
  content.add(join({1, 2}));
  content.broken[0] = true;
  EXPECT_EQ(gather(&content, {1, 2}), std::vector<bool>({false, false}));
  content.add(join({1, 2}));
  EXPECT_EQ(gather(&content, {1, 2}), std::vector<bool>({true, true}));
}

TEST(OfferedChunk, ImagesThatAreGoneOrShorterAreNotRead) {
  FakeContent content;
  content.add(join({1, 2, 3}));
  content.images[0].resize(kSmall.bytes());
  EXPECT_EQ(gather(&content, {1, 2, 3}), std::vector<bool>({true, false, false}));
  content.images[0].clear();
  EXPECT_EQ(gather(&content, {1, 2, 3}), std::vector<bool>({false, false, false}));
}

TEST(OfferedChunk, WhatIsSharedIsReadBackAndNotTaken) {
  FakeContent content;
  content.shares = true;
  content.add(join({1, 2, 3, 4}));
  EXPECT_EQ(gather(&content, {1, 2, 0, 4}), std::vector<bool>({true, true, false, true}));
  EXPECT_EQ(content.reads, 0U);
  content.images[0][5] ^= std::byte{1};
  EXPECT_EQ(gather(&content, {1, 2}), std::vector<bool>({false, true}));
  content.add(join({7, 1}));  // what was spoiled is found elsewhere
  EXPECT_EQ(gather(&content, {1, 2}), std::vector<bool>({true, true}));
}

TEST(OfferedChunk, WhatCanNotBeSharedIsReadAndNothingIsSpoiled) {
  FakeContent content;
  content.shares = true;
  content.sharing = blockcopy::Sharing::Refused;
  content.add(join({1, 2}));
  EXPECT_EQ(gather(&content, {1, 2}), std::vector<bool>({true, true}));
  EXPECT_EQ(content.reads, 1U);
  EXPECT_EQ(content.spoiled, 0U);
  content.sharing = blockcopy::Sharing::Failed;
  EXPECT_EQ(gather(&content, {1, 2}), std::vector<bool>({true, true}));
  EXPECT_EQ(content.spoiled, 2U);
}

TEST(OfferedChunk, WithoutAnIndexNothingIsFound) {
  EXPECT_EQ(gather(nullptr, {1, 0}), std::vector<bool>({false, false}));
}

}  // namespace
}  // namespace drover::mirror
