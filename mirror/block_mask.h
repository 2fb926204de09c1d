// SPDX-License-Identifier: Apache-2.0
//
// Which of the 4 KiB blocks of one chunk: 256 bits, as many as the largest chunk has blocks. A
// value.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace drover::mirror {

class BlockMask {
 public:
  static constexpr std::size_t kBits = 256;
  using Words = std::array<std::uint64_t, kBits / 64>;

  constexpr BlockMask() = default;
  constexpr explicit BlockMask(const Words& words) : words_(words) {}
  // Every block, however many the chunk has.
  static constexpr BlockMask all() { return range(0, kBits); }
  // [first, end)
  static constexpr BlockMask range(std::size_t first, std::size_t end) {
    BlockMask mask;
    for (std::size_t w = 0; w < mask.words_.size(); ++w) {
      mask.words_[w] = below(end, w) & ~below(first, w);
    }
    return mask;
  }

  [[nodiscard]] constexpr bool empty() const { return words_ == Words{}; }
  [[nodiscard]] constexpr bool contains(std::size_t block) const {
    return (words_[block / 64] >> (block % 64) & 1U) != 0;
  }
  [[nodiscard]] constexpr bool covers(const BlockMask& other) const {
    return other.without(*this).empty();
  }
  [[nodiscard]] constexpr std::size_t count() const {
    std::size_t count = 0;
    for (const std::uint64_t word : words_) count += static_cast<std::size_t>(std::popcount(word));
    return count;
  }
  // The first block, and one past the last. Not of an empty mask.
  [[nodiscard]] constexpr std::size_t first() const {
    std::size_t w = 0;
    while (words_[w] == 0) ++w;
    return w * 64 + static_cast<std::size_t>(std::countr_zero(words_[w]));
  }
  [[nodiscard]] constexpr std::size_t end() const {
    std::size_t w = words_.size() - 1;
    while (words_[w] == 0) --w;
    return w * 64 + static_cast<std::size_t>(std::bit_width(words_[w]));
  }

  constexpr void set(std::size_t block) { words_[block / 64] |= std::uint64_t{1} << (block % 64); }
  constexpr BlockMask& operator|=(const BlockMask& other) {
    for (std::size_t w = 0; w < words_.size(); ++w) words_[w] |= other.words_[w];
    return *this;
  }
  friend constexpr BlockMask operator|(BlockMask a, const BlockMask& b) { return a |= b; }
  friend constexpr BlockMask operator&(BlockMask a, const BlockMask& b) {
    for (std::size_t w = 0; w < a.words_.size(); ++w) a.words_[w] &= b.words_[w];
    return a;
  }
  [[nodiscard]] constexpr BlockMask without(const BlockMask& other) const {
    BlockMask rest = *this;
    for (std::size_t w = 0; w < words_.size(); ++w) rest.words_[w] &= ~other.words_[w];
    return rest;
  }
  // Block `by` becomes block 0; those before it go.
  [[nodiscard]] constexpr BlockMask shifted_down(std::size_t by) const {
    BlockMask shifted;
    for (std::size_t w = 0; w + by / 64 < words_.size(); ++w) {
      shifted.words_[w] = words_[w + by / 64] >> (by % 64);
      if (by % 64 != 0 && w + by / 64 + 1 < words_.size()) {
        shifted.words_[w] |= words_[w + by / 64 + 1] << (64 - by % 64);
      }
    }
    return shifted;
  }
  [[nodiscard]] constexpr const Words& words() const { return words_; }
  constexpr bool operator==(const BlockMask&) const = default;

 private:
  // The bits of word `w` that are below `end`.
  static constexpr std::uint64_t below(std::size_t end, std::size_t w) {
    if (end >= (w + 1) * 64) return ~std::uint64_t{0};
    return end <= w * 64 ? 0 : (std::uint64_t{1} << (end - w * 64)) - 1;
  }
  Words words_{};
};

}  // namespace drover::mirror
