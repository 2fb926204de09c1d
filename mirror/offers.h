// SPDX-License-Identifier: Apache-2.0
//
// What the source offers instead of sending: a lane that is about to send a chunk for the first
// time looks up its pieces' hashes in a filter of what the target has (mirror/piece.h), and where
// most of it is likely there sends the hashes (an Offer frame) in place of the content. The target
// takes the pieces from its other images, and says which blocks it could not find; those are sent
// as any others. A chunk is offered once at most, so that comes to an end.
//
//   if (auto offer = offers.consider(frame)) { ... encode_offer(header, *offer, out) ... }
//   ... the answer: offers.answered(data_blocks(*offer), differing) ...
//
// A target that has nothing of the disk must not cost much: of a chunk up to three pieces are
// hashed first, and the others only when one of them is likely there; after 32 chunks in a row of
// which none was, only one piece of one chunk in 16 is looked at. Where the filter promises what
// the target then does not have (its images have changed or are gone), offering ends.
//
// Threads: a LaneOffers belongs to its lane's. The filter that lanes share may be set on any.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "base/units.h"
#include "mirror/block_mask.h"
#include "mirror/frame.h"
#include "mirror/lanes.h"
#include "mirror/piece.h"

namespace drover::mirror {

// When a lane looks and when it offers: pure.
class OfferPolicy {
 public:
  static constexpr unsigned kMissesUntilRare = 32;  // chunks in a row
  static constexpr unsigned kRarely = 16;           // one chunk in so many is looked at then
  static constexpr unsigned kSamples = 3;
  static constexpr int kMostRegrets = 8;

  // Another chunk: how many of its pieces are to be hashed and looked up, until one is likely
  // there.
  [[nodiscard]] unsigned look();
  // What came of them.
  void looked(bool likely);
  // Of `data` pieces that are not zero so many are likely there: half of them must be, for what is
  // offered and is not there has to be read again.
  [[nodiscard]] static bool worth_it(std::size_t likely, std::size_t data) {
    return likely > 0 && likely * 2 >= data;
  }
  // Of `offered` blocks the target had so many. Eight times more often less than half than not: no
  // more is offered.
  void answered(std::size_t found, std::size_t offered);
  [[nodiscard]] bool ended() const { return regrets_ >= kMostRegrets; }

 private:
  unsigned misses_ = 0;   // in a row
  unsigned skipped_ = 0;  // chunks, since one was looked at
  int regrets_ = 0;
};

// What all lanes of a link share.
class KnownPieces {
 public:
  void set(std::shared_ptr<const PieceFilter> filter) {
    const std::lock_guard lock(mutex_);
    filter_ = std::move(filter);
  }
  [[nodiscard]] std::shared_ptr<const PieceFilter> get() const {
    const std::lock_guard lock(mutex_);
    return filter_;
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const PieceFilter> filter_;
};

class LaneOffers {
 public:
  // `known` outlives it. `piece`: another size than kPiece for simulations with small chunks.
  explicit LaneOffers(const KnownPieces& known, Length piece = kPiece)
      : known_(known), piece_(piece) {}

  // The frame is about to be encoded, and is a Copy of a whole chunk: offer it?
  [[nodiscard]] std::optional<Offer> consider(const OutFrame& frame, Length chunk_size);
  // The bytes of those blocks that the target had.
  Length answered(const BlockMask& offered, const BlockMask& missing);

 private:
  const KnownPieces& known_;
  const Length piece_;
  OfferPolicy policy_;
};

}  // namespace drover::mirror
