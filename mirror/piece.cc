// SPDX-License-Identifier: Apache-2.0
#include "mirror/piece.h"

#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace drover::mirror {
namespace {

constexpr std::uint64_t kBitsPerPiece = 16;
constexpr unsigned kProbes = 6;  // of 16 bits per piece: one in a thousand is taken for another

// Two numbers of a hash from which its places follow (Kirsch and Mitzenmacher, "Less hashing, same
// performance"). The second is odd, so that the places differ.
std::pair<std::uint64_t, std::uint64_t> seeds_of(const PieceHash& hash) {
  std::array<std::uint64_t, 2> words{};
  std::memcpy(words.data(), hash.data(), sizeof words);
  return {words[0], words[1] | 1};
}

}  // namespace

PieceHash piece_hash(std::span<const std::byte> piece) {
  PieceHash hash{};
  const int failed = gnutls_hash_fast(GNUTLS_DIG_SHA256, piece.data(), piece.size(), hash.data());
  CHECK(failed == 0, "GnuTLS knows SHA-256");
  return hash;
}

bool all_zero(std::span<const std::byte> bytes) {
  // A word first: most blocks of data end here. Then the block against itself, one word on:
  // all equal to the first, which is zero.
  std::uint64_t first = 0;
  if (bytes.size() < sizeof first) {
    return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; });
  }
  std::memcpy(&first, bytes.data(), sizeof first);
  return first == 0 &&
         std::memcmp(bytes.data(), bytes.data() + sizeof first, bytes.size() - sizeof first) == 0;
}

PieceFilter PieceFilter::for_pieces(std::uint64_t count) {
  constexpr std::uint64_t kMost = kMaxBytes * 8 / kBitsPerPiece;
  const std::uint64_t bits = std::bit_ceil(std::min(count, kMost) * kBitsPerPiece);
  const std::size_t size = std::clamp<std::size_t>(bits / 8, kMinBytes, kMaxBytes);
  return {std::vector<std::byte>(size), kProbes};
}

Result<PieceFilter> PieceFilter::from_bytes(std::vector<std::byte> bytes, std::uint64_t probes) {
  if (!std::has_single_bit(bytes.size()) || bytes.size() < kMinBytes || bytes.size() > kMaxBytes ||
      probes == 0 || probes > kMaxProbes) {
    return fail(Code::Protocol, "a filter of pieces has no such size");
  }
  return PieceFilter(std::move(bytes), static_cast<unsigned>(probes));
}

void PieceFilter::add(const PieceHash& hash) {
  auto [at, step] = seeds_of(hash);
  const std::uint64_t mask = std::uint64_t{bytes_.size()} * 8 - 1;
  for (unsigned i = 0; i < probes_; ++i, at += step) {
    const std::uint64_t bit = at & mask;
    bytes_[bit / 8] |= static_cast<std::byte>(1U << (bit % 8));
  }
}

bool PieceFilter::may_contain(const PieceHash& hash) const {
  auto [at, step] = seeds_of(hash);
  const std::uint64_t mask = std::uint64_t{bytes_.size()} * 8 - 1;
  for (unsigned i = 0; i < probes_; ++i, at += step) {
    const std::uint64_t bit = at & mask;
    if ((bytes_[bit / 8] & static_cast<std::byte>(1U << (bit % 8))) == std::byte{0}) return false;
  }
  return true;
}

}  // namespace drover::mirror
