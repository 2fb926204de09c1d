// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_content.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace drover::sim {

using mirror::KnownContent;

std::vector<KnownContent::Place> SimContent::Reader::find(const mirror::PieceHash& hash) {
  std::vector<Place> places;
  const auto [begin, end] = content_.index_.equal_range(hash);
  for (auto at = begin; at != end && places.size() < kMaxPlaces; ++at) places.push_back(at->second);
  return places;
}

bool SimContent::Reader::holds(const Place& place, Length length) {
  if (place.image >= content_.images_.size()) return false;
  const std::size_t size = content_.images_[place.image].size();
  return place.offset.bytes() <= size && length.bytes() <= size - place.offset.bytes();
}

void SimContent::Reader::take(const Request& request, std::size_t first, std::size_t end) const {
  const Bytes& image = content_.images_[request.place.image];
  std::memcpy(request.buffer.data() + first, image.data() + request.place.offset.bytes() + first,
              end - first);
}

void SimContent::Reader::read(const Place& place, std::span<std::byte> buffer,
                              blockcopy::Done done) {
  std::erase_if(requests_, [](const auto& request) { return request.expired(); });
  const auto request = std::make_shared<Request>(Request{place, buffer, std::move(done)});
  requests_.push_back(request);
  const std::size_t cut = content_.random_.below(buffer.size() + 1);
  later_([this, request, cut] {
    if (!request->done) return;
    take(*request, 0, cut);
    later_([this, request, cut] {
      if (!request->done) return;
      take(*request, cut, request->buffer.size());
      const auto ended = std::exchange(request->done, nullptr);
      if (content_.random_.one_in(20)) return ended(fail(Code::Io, "reading: I/O error"));
      ended({});
    });
  });
}

void SimContent::Reader::drop() {
  for (const auto& weak : std::exchange(requests_, {})) {
    const auto request = weak.lock();
    if (!request || !request->done) continue;
    std::exchange(request->done, nullptr)(fail(Code::Cancelled, "its process is gone"));
  }
}

SimContent::SimContent(Random& random, std::span<const std::byte> disk, Length its_piece)
    : random_(random), piece_(its_piece), shares_(random.one_in(2)) {
  const std::size_t piece = piece_.bytes();
  const std::uint64_t count = 1 + random_.below(3);
  for (std::uint32_t number = 0; number < count; ++number) {
    Bytes& image = images_.emplace_back(disk.begin(), disk.end());
    // Of another size, or moved by a piece.
    if (random_.one_in(3)) image.insert(image.begin(), piece, std::byte{0x5a});
    if (random_.one_in(3)) image.resize(1 + random_.below(image.size()));
    for (std::size_t at = 0; at < image.size(); at += piece) {
      if (random_.one_in(4)) image[at] ^= std::byte{0x11};
    }
    for (std::size_t at = 0; at < image.size(); at += piece) {
      const auto bytes =
          std::span(image).subspan(at, std::min<std::size_t>(piece, image.size() - at));
      KnownContent::Place place{number, Offset(at)};
      if (random_.one_in(16)) place.image = static_cast<std::uint32_t>(random_.below(4));
      if (random_.one_in(16)) place.offset = Offset(random_.below(image.size() + piece));
      index_.emplace(mirror::piece_hash(bytes), place);
    }
  }
  auto filter = mirror::PieceFilter::for_pieces(index_.size());
  for (const auto& [hash, place] : index_) filter.add(hash);
  filter_ = std::make_shared<const mirror::PieceFilter>(std::move(filter));
}

std::unique_ptr<SimContent::Reader> SimContent::open(Later later) {
  return std::make_unique<Reader>(*this, std::move(later));
}

blockcopy::Sharing SimContent::share(int image, Offset from, std::span<std::byte> to) const {
  constexpr std::size_t kBlock = 4096;
  const Bytes& bytes = images_.at(static_cast<std::size_t>(image));
  if (from.bytes() % kBlock != 0 || to.size() % kBlock != 0) return blockcopy::Sharing::Refused;
  const bool fails = random_.one_in(4);
  if (fails && from.bytes() / kBlock % 2 == 0) return blockcopy::Sharing::Refused;
  const std::size_t size = fails ? to.size() / 2 : to.size();
  std::memcpy(to.data(), bytes.data() + from.bytes(), size);
  return fails ? blockcopy::Sharing::Failed : blockcopy::Sharing::Shared;
}

void SimContent::change() {
  Bytes& image = images_[random_.below(images_.size())];
  image[random_.below(image.size())] ^= static_cast<std::byte>(1 + random_.below(255));
}

}  // namespace drover::sim
