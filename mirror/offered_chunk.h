// SPDX-License-Identifier: Apache-2.0
//
// Finds the content of one Offer frame in a host's other images and verifies it, for the applier:
//
//   OfferedChunk chunk(offer, known, room);        // room: as many bytes as the offer's extent
//   chunk.gather([&] { ... chunk.found() ... });   // room holds those pieces' bytes then
//
// Images of one template have their pieces at the same places, one after the other. So the first
// piece is looked up, and the others are expected beside it; only those that are not there are
// looked up themselves. No byte is reported as found whose piece's SHA-256, computed of what lies
// in `room`, is not the offered one.
//
// Where the target's file can share blocks with the other image, it does so first, and what is
// verified is what it reads back itself: so a guest that writes to the other image meanwhile does
// no harm. What turns out to be something else is there then, and is to be overwritten (spoiled()):
// nobody may get another guest's content by offering hashes.
//
// Threads: one. Destroy it when gather() has called back.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "base/units.h"
#include "mirror/frame.h"
#include "mirror/known_content.h"

namespace drover::mirror {

class OfferedChunk {
 public:
  // The target's image, where the offer's extent is.
  class Place {
   public:
    virtual ~Place() = default;
    // As ImageWriter::share(), `at` bytes into the extent.
    virtual blockcopy::Sharing share(int fd, Offset from, std::size_t at, Length length) = 0;
    virtual void read(std::size_t at, std::span<std::byte> buffer, blockcopy::Done done) = 0;
  };
  struct Options {
    // Test switch: takes what is at the expected place for what was offered (the simulation must
    // notice).
    bool mutation_unverified = false;
  };
  // `known` may be null: nothing is found. All outlive this.
  OfferedChunk(Offer offer, KnownContent* known, Place& target, std::span<std::byte> room,
               Options options);
  OfferedChunk(const OfferedChunk&) = delete;
  OfferedChunk& operator=(const OfferedChunk&) = delete;

  // Calls back once, from inside the call if there is nothing to read.
  void gather(std::function<void()> done);
  [[nodiscard]] const Offer& offer() const { return offer_; }
  // Of the offer's pieces.
  [[nodiscard]] bool found(std::size_t piece) const { return pieces_[piece].found; }
  // It is in its place already.
  [[nodiscard]] bool shared(std::size_t piece) const { return pieces_[piece].shared; }
  // Something else may be in its place: it has to be written, even if it is zero or missing.
  [[nodiscard]] bool spoiled(std::size_t piece) const { return pieces_[piece].spoiled; }
  [[nodiscard]] std::span<std::byte> bytes(std::size_t piece) const;

 private:
  struct Piece {
    bool found = false;
    bool shared = false;
    bool spoiled = false;
    bool looked_up = false;
    std::vector<KnownContent::Place> places;  // left to be tried
    std::vector<KnownContent::Place> tried;
  };
  [[nodiscard]] bool is_missing(std::size_t piece) const {
    return offer_.pieces[piece].has_value() && !pieces_[piece].found;
  }
  void look_up(std::size_t piece);
  bool expect_beside_the_first();
  bool try_others();
  void read(std::size_t piece, std::size_t count, const KnownContent::Place& place);
  void verify(std::size_t piece, std::size_t count, bool shared);
  void round_is_over();

  const Offer offer_;
  KnownContent* const known_;
  Place& target_;
  const std::span<std::byte> room_;
  const Options options_;
  std::vector<Piece> pieces_;
  std::size_t reading_ = 0;
  std::function<void()> done_;
};

}  // namespace drover::mirror
