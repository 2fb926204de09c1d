// SPDX-License-Identifier: Apache-2.0
//
// A set of chunk numbers as a bitmap with a count and a fast "next member from here": a bit per chunk
// and a summary bit per 64 of them (a 64 TiB disk of 1 MiB chunks: 8 MiB).
//
// Threads: none of its own; use from one.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace drover::mirror {

class ChunkSet {
 public:
  explicit ChunkSet(std::uint64_t size, bool full = false);

  [[nodiscard]] bool contains(std::uint64_t chunk) const {
    return (words_[chunk / 64] >> (chunk % 64) & 1U) != 0;
  }
  void insert(std::uint64_t chunk);
  void erase(std::uint64_t chunk);
  // [first, end)
  void insert_range(std::uint64_t first, std::uint64_t end);
  void erase_range(std::uint64_t first, std::uint64_t end);

  // The smallest member >= first.
  [[nodiscard]] std::optional<std::uint64_t> next(std::uint64_t first) const;
  [[nodiscard]] std::uint64_t count() const { return count_; }
  [[nodiscard]] std::uint64_t size() const { return size_; }

 private:
  void set_word(std::uint64_t word, std::uint64_t value);
  std::uint64_t size_;
  std::uint64_t count_ = 0;
  std::vector<std::uint64_t> words_;
  std::vector<std::uint64_t> summary_;
};

}  // namespace drover::mirror
