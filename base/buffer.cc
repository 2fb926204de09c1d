// SPDX-License-Identifier: Apache-2.0
#include "base/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "base/check.h"

namespace drover {

namespace {
constexpr std::size_t kAlignment = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;  // x86-64's, arm64's with 4 KiB pages
constexpr std::size_t kSlab = 8 * kHugePage;
// Smaller ones are used rarely or for little, and take a page at a time.
constexpr std::size_t kWorthHugePages = std::size_t{1} << 20;
// Each by itself, so that the sanitizer sees who writes beyond his.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kApart = true;
#else
constexpr bool kApart = false;
#endif

// Disks' requests are made of pieces that lie together in physical memory, and a disk's queue holds
// so many pieces: 256 KiB of single pages are 64 of them, and what guests ask for waits while the
// queue is full. In a huge page it is one piece.
std::byte* allocate_slab(std::size_t size) {
  void* const memory = std::aligned_alloc(size < kHugePage ? kAlignment : kHugePage, size);
  CHECK(memory != nullptr, "out of memory");
  // Where there are no huge pages, others do.
  if (size >= kHugePage) (void)::madvise(memory, size, MADV_HUGEPAGE);
  return static_cast<std::byte*>(memory);
}
}  // namespace

void BufferPool::FreeSlab::operator()(std::byte* memory) const { std::free(memory); }

struct Buffer::Block {
  BufferPool* pool;
  std::byte* memory;  // in one of the pool's slabs
  std::size_t size;
  std::atomic<unsigned> references{0};
};

Buffer::Buffer(const Buffer& other) : block_(other.block_) {
  if (block_ != nullptr) block_->references.fetch_add(1, std::memory_order_relaxed);
}

std::span<std::byte> Buffer::bytes() const {
  CHECK(block_ != nullptr, "an empty Buffer has no bytes");
  return {block_->memory, block_->size};
}

void Buffer::reset() {
  Block* const block = std::exchange(block_, nullptr);
  if (block != nullptr && block->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    block->pool->give_back(block);
  }
}

BufferPool::BufferPool(Length buffer_size, std::size_t count)
    : buffer_size_(buffer_size), count_(count) {
  CHECK(buffer_size.bytes() > 0 && buffer_size.bytes() % kAlignment == 0,
        "buffers are whole pages");
  CHECK(count > 0, "a pool of nothing serves nobody");
}

BufferPool::~BufferPool() {
  const std::lock_guard lock(mutex_);
  CHECK(free_.size() == blocks_.size(), "the pool must outlive its buffers");
}

Buffer BufferPool::try_take() {
  const std::lock_guard lock(mutex_);
  Buffer::Block* block = nullptr;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else if (blocks_.size() < count_) {
    auto made = std::make_unique<Buffer::Block>();
    made->pool = this;
    made->size = buffer_size_.bytes();
    made->memory = next_memory();
    block = made.get();
    blocks_.push_back(std::move(made));
  } else {
    refused_ = true;
    return {};
  }
  block->references.store(1, std::memory_order_relaxed);
  return Buffer(block);
}

std::byte* BufferPool::next_memory() {
  const std::size_t size = buffer_size_.bytes();
  if (slab_left_ < size) {
    slab_left_ = size;
    if (size >= kWorthHugePages && !kApart) {
      slab_left_ = std::min(size * (count_ - blocks_.size()), std::max(size, kSlab));
      // A whole number of huge pages is more likely to be made of them.
      slab_left_ = (slab_left_ + kHugePage - 1) / kHugePage * kHugePage;
    }
    slabs_.emplace_back(allocate_slab(slab_left_));
    slab_next_ = slabs_.back().get();
  }
  slab_left_ -= size;
  return std::exchange(slab_next_, slab_next_ + size);
}

std::size_t BufferPool::available() const {
  const std::lock_guard lock(mutex_);
  return count_ - blocks_.size() + free_.size();
}

void BufferPool::give_back(Buffer::Block* block) {
  bool notify = false;
  {
    const std::lock_guard lock(mutex_);
    free_.push_back(block);
    notify = std::exchange(refused_, false);
  }
  if (notify && on_available_) on_available_();
}

}  // namespace drover
