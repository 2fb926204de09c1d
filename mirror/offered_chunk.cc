// SPDX-License-Identifier: Apache-2.0
#include "mirror/offered_chunk.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace drover::mirror {

OfferedChunk::OfferedChunk(Offer offer, KnownContent* known, Place& target,
                           std::span<std::byte> room, Options options)
    : offer_(std::move(offer)),
      known_(known),
      target_(target),
      room_(room),
      options_(options),
      pieces_(offer_.pieces.size()) {
  CHECK((room_.size() + offer_.piece.bytes() - 1) / offer_.piece.bytes() == pieces_.size(),
        "there is room for each piece");
}

std::span<std::byte> OfferedChunk::bytes(std::size_t piece) const {
  const std::size_t at = piece * offer_.piece.bytes();
  return room_.subspan(at, std::min<std::size_t>(offer_.piece.bytes(), room_.size() - at));
}

void OfferedChunk::gather(std::function<void()> done) {
  done_ = std::move(done);
  if (known_ == nullptr) return std::exchange(done_, nullptr)();
  reading_ = 1;  // held until all reads are issued
  expect_beside_the_first();
  round_is_over();
}

void OfferedChunk::look_up(std::size_t piece) {
  if (std::exchange(pieces_[piece].looked_up, true)) return;
  pieces_[piece].places = known_->find(*offer_.pieces[piece]);
}

// The first piece that is known anywhere says where the others may be: what lies side by side there
// is read at once.
bool OfferedChunk::expect_beside_the_first() {
  for (std::size_t first = 0; first < pieces_.size(); ++first) {
    if (!is_missing(first)) continue;
    look_up(first);
    const auto usable = std::ranges::find_if(pieces_[first].places, [&](const auto& place) {
      return known_->holds(place, Length(bytes(first).size()));
    });
    if (usable == pieces_[first].places.end()) continue;
    const KnownContent::Place base = *usable;
    const auto place_of = [&](std::size_t piece) {
      return KnownContent::Place{base.image, base.offset + offer_.piece * (piece - first)};
    };
    const auto is_there = [&](std::size_t piece) {
      return is_missing(piece) && known_->holds(place_of(piece), Length(bytes(piece).size()));
    };
    for (std::size_t at = first; at < pieces_.size();) {
      std::size_t end = at;
      while (end < pieces_.size() && is_there(end)) ++end;
      if (end > at) read(at, end - at, place_of(at));
      at = std::max(end, at + 1);
    }
    return true;
  }
  return false;
}

// Each that is still missing at the next place that the index knows.
bool OfferedChunk::try_others() {
  bool any = false;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    if (!is_missing(i)) continue;
    look_up(i);
    Piece& piece = pieces_[i];
    while (!piece.places.empty()) {
      const KnownContent::Place place = piece.places.front();
      piece.places.erase(piece.places.begin());
      if (std::ranges::count(piece.tried, place) > 0 ||
          !known_->holds(place, Length(bytes(i).size()))) {
        continue;
      }
      read(i, 1, place);
      any = true;
      break;
    }
  }
  return any;
}

void OfferedChunk::read(std::size_t piece, std::size_t count, const KnownContent::Place& place) {
  for (std::size_t i = 0; i < count; ++i) {
    pieces_[piece + i].tried.push_back({place.image, place.offset + offer_.piece * i});
  }
  const std::span<std::byte> first = bytes(piece);
  const std::span<std::byte> last = bytes(piece + count - 1);
  const std::span<std::byte> all(first.data(), last.data() + last.size());
  ++reading_;
  const std::size_t at = piece * offer_.piece.bytes();
  const int fd = known_->shareable(place);
  const auto shared = fd < 0 ? blockcopy::Sharing::Refused
                             : target_.share(fd, place.offset, at, Length(all.size()));
  if (shared != blockcopy::Sharing::Refused) {
    for (std::size_t i = piece; i < piece + count; ++i) pieces_[i].spoiled = true;
  }
  if (shared == blockcopy::Sharing::Shared) {
    target_.read(at, all, [this, piece, count](const Status& status) {
      if (status) verify(piece, count, true);
      round_is_over();
    });
    return;
  }
  known_->read(place, all, [this, piece, count](const Status& status) {
    if (status) verify(piece, count, false);
    round_is_over();
  });
}

void OfferedChunk::verify(std::size_t piece, std::size_t count, bool shared) {
  for (std::size_t i = piece; i < piece + count; ++i) {
    pieces_[i].found = options_.mutation_unverified || piece_hash(bytes(i)) == *offer_.pieces[i];
    pieces_[i].shared = pieces_[i].found && shared;
  }
}

// Each round tries another place of each missing piece, of which there are few.
void OfferedChunk::round_is_over() {
  if (--reading_ > 0) return;
  reading_ = 1;
  if (!try_others()) {
    reading_ = 0;
    return std::exchange(done_, nullptr)();
  }
  --reading_;  // callbacks never run inside read(): some are outstanding still
}

}  // namespace drover::mirror
