// SPDX-License-Identifier: Apache-2.0
//
// The seam between an applier and the content of a host's other images: where a piece with a
// certain hash may be, and what is there. What it says are hints: images change and go without a
// word, so whoever uses the bytes compares their hash first.
//
// Threads: one, the lane's; callbacks never run from inside the call that issued them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/units.h"
#include "blockcopy/image.h"
#include "mirror/piece.h"

namespace drover::mirror {

class KnownContent {
 public:
  static constexpr std::size_t kMaxPlaces = 3;
  struct Place {
    std::uint32_t image = 0;
    Offset offset;
    bool operator==(const Place&) const = default;
  };

  virtual ~KnownContent() = default;
  // At most kMaxPlaces. May read a database on disk.
  virtual std::vector<Place> find(const PieceHash& hash) = 0;
  // The image is there and holds that many bytes from the place on.
  virtual bool holds(const Place& place, Length length) = 0;
  // Fills the buffer; only where holds() said yes, and read or not, the image stays readable as
  // long as this lives.
  virtual void read(const Place& place, std::span<std::byte> buffer, blockcopy::Done done) = 0;
  // The image as a file from which another may share blocks (FICLONERANGE); -1: not this one.
  virtual int shareable(const Place& place) = 0;
};

}  // namespace drover::mirror
