// SPDX-License-Identifier: Apache-2.0
#include "mirror/offers.h"

#include <algorithm>
#include <array>
#include <vector>

namespace drover::mirror {

unsigned OfferPolicy::look() {
  if (ended()) return 0;
  if (misses_ < kMissesUntilRare) return kSamples;
  if (++skipped_ < kRarely) return 0;
  skipped_ = 0;
  return 1;
}

void OfferPolicy::looked(bool likely) {
  if (likely) {
    misses_ = 0;
  } else if (misses_ < kMissesUntilRare) {
    ++misses_;
  }
}

void OfferPolicy::answered(std::size_t found, std::size_t offered) {
  if (ended()) return;
  regrets_ = found * 2 < offered ? regrets_ + 1 : std::max(0, regrets_ - 1);
}

std::optional<Offer> LaneOffers::consider(const OutFrame& frame, Length chunk_size) {
  // Only what was never sent before: then nothing is offered twice.
  if (frame.type != FrameType::Copy || !frame.fresh || frame.blocks != BlockMask::all() ||
      frame.extent.offset.bytes() % chunk_size.bytes() != 0 || piece_ > chunk_size) {
    return std::nullopt;
  }
  const std::shared_ptr<const PieceFilter> filter = known_.get();
  if (!filter) return std::nullopt;
  const unsigned samples = policy_.look();
  if (samples == 0) return std::nullopt;
  Offer offer;
  offer.piece = piece_;
  std::vector<std::span<const std::byte>> pieces;
  std::vector<std::size_t> data;
  for (std::size_t at = 0; at < frame.content.size(); at += piece_.bytes()) {
    pieces.push_back(frame.content.subspan(
        at, std::min<std::size_t>(piece_.bytes(), frame.content.size() - at)));
    if (!all_zero(pieces.back())) data.push_back(pieces.size() - 1);
  }
  if (data.empty()) return std::nullopt;
  offer.pieces.resize(pieces.size());
  std::size_t likely = 0;
  const auto look_up = [&](std::size_t piece) {
    if (offer.pieces[piece]) return;
    offer.pieces[piece] = piece_hash(pieces[piece]);
    if (filter->may_contain(*offer.pieces[piece])) ++likely;
  };
  const std::array<std::size_t, OfferPolicy::kSamples> sampled = {data[data.size() / 2],
                                                                  data.front(), data.back()};
  for (unsigned i = 0; i < samples && likely == 0; ++i) look_up(sampled.at(i));
  policy_.looked(likely > 0);
  if (likely == 0) return std::nullopt;
  for (const std::size_t piece : data) look_up(piece);
  if (!OfferPolicy::worth_it(likely, data.size())) return std::nullopt;
  return offer;
}

Length LaneOffers::answered(const BlockMask& offered, const BlockMask& missing) {
  const std::size_t found = offered.without(missing).count();
  policy_.answered(found, offered.count());
  return kBlock * found;
}

}  // namespace drover::mirror
