// SPDX-License-Identifier: Apache-2.0
#include "mirror/chunk_set.h"

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace drover::mirror {

namespace {
// Bits [first, end) of one word.
std::uint64_t bits(std::uint64_t first, std::uint64_t end) {
  const std::uint64_t below_end = end == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << end) - 1;
  return below_end & ~((std::uint64_t{1} << first) - 1);
}
}  // namespace

ChunkSet::ChunkSet(std::uint64_t size, bool full)
    : size_(size), words_((size + 63) / 64), summary_((words_.size() + 63) / 64) {
  if (full) insert_range(0, size);
}

void ChunkSet::set_word(std::uint64_t word, std::uint64_t value) {
  count_ += static_cast<std::uint64_t>(std::popcount(value));
  count_ -= static_cast<std::uint64_t>(std::popcount(words_[word]));
  words_[word] = value;
  const std::uint64_t bit = std::uint64_t{1} << (word % 64);
  if (value != 0) {
    summary_[word / 64] |= bit;
  } else {
    summary_[word / 64] &= ~bit;
  }
}

void ChunkSet::insert(std::uint64_t chunk) { insert_range(chunk, chunk + 1); }
void ChunkSet::erase(std::uint64_t chunk) { erase_range(chunk, chunk + 1); }

void ChunkSet::insert_range(std::uint64_t first, std::uint64_t end) {
  CHECK(first <= end && end <= size_, "chunks lie within the disk");
  while (first < end) {
    const std::uint64_t word = first / 64;
    const std::uint64_t stop = std::min(end, (word + 1) * 64);
    set_word(word, words_[word] | bits(first % 64, stop - word * 64));
    first = stop;
  }
}

void ChunkSet::erase_range(std::uint64_t first, std::uint64_t end) {
  CHECK(first <= end && end <= size_, "chunks lie within the disk");
  while (first < end) {
    const std::uint64_t word = first / 64;
    const std::uint64_t stop = std::min(end, (word + 1) * 64);
    set_word(word, words_[word] & ~bits(first % 64, stop - word * 64));
    first = stop;
  }
}

std::optional<std::uint64_t> ChunkSet::next(std::uint64_t first) const {
  if (first >= size_) return std::nullopt;
  std::uint64_t word = first / 64;
  const std::uint64_t here = words_[word] & ~((std::uint64_t{1} << (first % 64)) - 1);
  if (here != 0) return word * 64 + static_cast<std::uint64_t>(std::countr_zero(here));
  ++word;
  for (std::uint64_t s = word / 64; s < summary_.size(); ++s) {
    std::uint64_t members = summary_[s];
    if (s == word / 64) members &= ~((std::uint64_t{1} << (word % 64)) - 1);
    if (members != 0) {
      const std::uint64_t found = s * 64 + static_cast<std::uint64_t>(std::countr_zero(members));
      return found * 64 + static_cast<std::uint64_t>(std::countr_zero(words_[found]));
    }
  }
  return std::nullopt;
}

}  // namespace drover::mirror
