// SPDX-License-Identifier: Apache-2.0
//
// A target's other images and their index in the simulations: images that have some of a disk's
// pieces, at their places or elsewhere, and that change after they were indexed, also while they
// are read; an index with entries that are wrong; reads that are torn, or fail.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/random.h"
#include "mirror/known_content.h"
#include "mirror/piece.h"

namespace drover::sim {

class SimContent {
 public:
  // Some of what `disk` holds is in the images, some is not.
  SimContent(Random& random, std::span<const std::byte> disk, Length piece);

  [[nodiscard]] std::shared_ptr<const mirror::PieceFilter> filter() const { return filter_; }
  [[nodiscard]] Length piece() const { return piece_; }
  // For one applier. `later` runs a task at some later time, or never.
  class Reader;
  using Later = std::function<void(std::function<void()>)>;
  [[nodiscard]] std::unique_ptr<Reader> open(Later later);
  // What ImageWriter::share() does with an image; `to`: its extent. Only whole blocks. One that fails
  // in the middle has shared the first half.
  blockcopy::Sharing share(int image, Offset from, std::span<std::byte> to) const;
  // A guest writes to one of the images.
  void change();

 private:
  using Bytes = std::vector<std::byte>;
  Random& random_;
  const Length piece_;
  const bool shares_;
  std::vector<Bytes> images_;
  std::multimap<mirror::PieceHash, mirror::KnownContent::Place> index_;
  std::shared_ptr<const mirror::PieceFilter> filter_;
};

class SimContent::Reader final : public mirror::KnownContent {
 public:
  Reader(SimContent& content, Later later) : content_(content), later_(std::move(later)) {}
  ~Reader() override { drop(); }
  std::vector<Place> find(const mirror::PieceHash& hash) override;
  bool holds(const Place& place, Length length) override;
  void read(const Place& place, std::span<std::byte> buffer, blockcopy::Done done) override;
  int shareable(const Place& place) override {
    return content_.shares_ ? static_cast<int>(place.image) : -1;
  }
  // What is under way ends without effect.
  void drop();

 private:
  struct Request {
    Place place;
    std::span<std::byte> buffer;
    blockcopy::Done done;  // empty: it has ended
  };
  void take(const Request& request, std::size_t first, std::size_t end) const;
  SimContent& content_;
  const Later later_;
  std::vector<std::weak_ptr<Request>> requests_;
};

}  // namespace drover::sim
