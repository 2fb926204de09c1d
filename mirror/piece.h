// SPDX-License-Identifier: Apache-2.0
//
// Pieces: how the source and a target's content index (mirror/content_index.h) name what an image
// may have in common with others. A piece is 64 KiB at a multiple of 64 KiB (the last one of an
// image may be shorter); its name is its SHA-256. SHA-256, and not a faster hash, because two
// guests' content must not be mistaken for each other even where one of them wishes it.
//
// A PieceFilter says of a hash that it is certainly not in a set, or probably is: the whole of an
// index in two bytes per piece, so that the source knows what is worth an offer before it sends
// one.
//
//   auto filter = PieceFilter::for_pieces(count);
//   filter.add(piece_hash(bytes));
//   ... filter.may_contain(piece_hash(other)) ...
//
// Threads: values; hashing on any.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace drover::mirror {

inline constexpr Length kPiece = Length(std::uint64_t{64} << 10);
inline constexpr std::size_t kPieceHashSize = 32;
using PieceHash = std::array<std::byte, kPieceHashSize>;

PieceHash piece_hash(std::span<const std::byte> piece);

bool all_zero(std::span<const std::byte> bytes);

// A Bloom filter: a power of two of bits, of which each hash sets some that its own bits choose.
class PieceFilter {
 public:
  static constexpr std::size_t kMaxBytes = std::size_t{16} << 20;
  static constexpr std::size_t kMinBytes = 64;
  static constexpr unsigned kMaxProbes = 8;

  // Takes no hash for one of its own yet. At least 16 bits per piece, up to kMaxBytes: beyond 8 Mi
  // pieces it errs more often.
  static PieceFilter for_pieces(std::uint64_t count);
  // Protocol: of another size than one that for_pieces() makes, or with other probes.
  static Result<PieceFilter> from_bytes(std::vector<std::byte> bytes, std::uint64_t probes);

  void add(const PieceHash& hash);
  [[nodiscard]] bool may_contain(const PieceHash& hash) const;
  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }
  [[nodiscard]] unsigned probes() const { return probes_; }

 private:
  PieceFilter(std::vector<std::byte> bytes, unsigned probes)
      : bytes_(std::move(bytes)), probes_(probes) {}
  std::vector<std::byte> bytes_;
  unsigned probes_ = 1;
};

}  // namespace drover::mirror
