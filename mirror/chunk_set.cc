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
    : size_(size), pages_((size + kPage - 1) / kPage), summary_(pages_.size()) {
  if (full) insert_range(0, size);
}

void ChunkSet::set_word(std::uint64_t index, std::uint64_t value) {
  const std::uint64_t old = word(index);
  if (old == value) return;
  std::unique_ptr<Page>& page = pages_[index / kWords];
  std::uint64_t& summary = summary_[index / kWords];
  if (page == nullptr) {
    page = std::make_unique<Page>();
    page->fill(old);
  }
  count_ += static_cast<std::uint64_t>(std::popcount(value));
  count_ -= static_cast<std::uint64_t>(std::popcount(old));
  (*page)[index % kWords] = value;
  const std::uint64_t bit = std::uint64_t{1} << (index % kWords);
  if (value != 0) {
    summary |= bit;
  } else {
    summary &= ~bit;
  }
  // A page whose chunks are all alike is not kept.
  const auto whole = [](std::uint64_t one) { return one == ~std::uint64_t{0}; };
  if (summary == 0 || (whole(value) && std::ranges::all_of(*page, whole))) page.reset();
}

void ChunkSet::set_page(std::uint64_t index, bool full) {
  const std::unique_ptr<Page>& page = pages_[index];
  if (page == nullptr) {
    if (summary_[index] != 0) count_ -= kPage;
  } else {
    for (const std::uint64_t one : *page) count_ -= static_cast<std::uint64_t>(std::popcount(one));
  }
  pages_[index].reset();
  summary_[index] = full ? ~std::uint64_t{0} : 0;
  if (full) count_ += kPage;
}

void ChunkSet::change_range(std::uint64_t first, std::uint64_t end, bool insert) {
  CHECK(first <= end && end <= size_, "chunks lie within the disk");
  while (first < end) {
    if (first % kPage == 0 && end - first >= kPage) {
      set_page(first / kPage, insert);
      first += kPage;
      continue;
    }
    const std::uint64_t index = first / 64;
    const std::uint64_t stop = std::min(end, (index + 1) * 64);
    const std::uint64_t changed = bits(first % 64, stop - index * 64);
    set_word(index, insert ? word(index) | changed : word(index) & ~changed);
    first = stop;
  }
}

void ChunkSet::insert(std::uint64_t chunk) { change_range(chunk, chunk + 1, true); }
void ChunkSet::erase(std::uint64_t chunk) { change_range(chunk, chunk + 1, false); }
void ChunkSet::insert_range(std::uint64_t first, std::uint64_t end) {
  change_range(first, end, true);
}
void ChunkSet::erase_range(std::uint64_t first, std::uint64_t end) {
  change_range(first, end, false);
}

std::optional<std::uint64_t> ChunkSet::next(std::uint64_t first, std::uint64_t end) const {
  end = std::min(end, size_);
  if (first >= end) return std::nullopt;
  const auto if_before_end = [end](std::uint64_t found) {
    return found < end ? std::optional(found) : std::nullopt;
  };
  const std::uint64_t here = word(first / 64) & ~((std::uint64_t{1} << (first % 64)) - 1);
  if (here != 0) {
    return if_before_end(first / 64 * 64 + static_cast<std::uint64_t>(std::countr_zero(here)));
  }
  const std::uint64_t after = first / 64 + 1;
  for (std::uint64_t page = after / kWords; page * kPage < end; ++page) {
    std::uint64_t members = summary_[page];
    if (page == after / kWords) members &= ~((std::uint64_t{1} << (after % kWords)) - 1);
    if (members == 0) continue;
    const std::uint64_t found =
        page * kWords + static_cast<std::uint64_t>(std::countr_zero(members));
    return if_before_end(found * 64 + static_cast<std::uint64_t>(std::countr_zero(word(found))));
  }
  return std::nullopt;
}

std::optional<std::uint64_t> ChunkSet::next_outside(std::uint64_t first,
                                                    const ChunkSet& other) const {
  CHECK(other.size_ == size_, "both sets are of one disk");
  for (auto at = next(first); at; at = next((*at / 64 + 1) * 64)) {
    const std::uint64_t here =
        word(*at / 64) & ~other.word(*at / 64) & ~((std::uint64_t{1} << (*at % 64)) - 1);
    if (here != 0) return *at / 64 * 64 + static_cast<std::uint64_t>(std::countr_zero(here));
  }
  return std::nullopt;
}

}  // namespace drover::mirror
