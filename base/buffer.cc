// SPDX-License-Identifier: Apache-2.0
#include "base/buffer.h"

#include <cstdlib>

#include "base/check.h"

namespace drover {

namespace {
constexpr std::size_t kAlignment = 4096;
struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};
}  // namespace

struct Buffer::Block {
  BufferPool* pool;
  std::unique_ptr<std::byte, FreeDeleter> memory;
  std::size_t size;
  std::atomic<unsigned> references{0};
};

Buffer::Buffer(const Buffer& other) : block_(other.block_) {
  if (block_ != nullptr) block_->references.fetch_add(1, std::memory_order_relaxed);
}

std::span<std::byte> Buffer::bytes() const {
  CHECK(block_ != nullptr, "an empty Buffer has no bytes");
  return {block_->memory.get(), block_->size};
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
    made->memory.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, made->size)));
    CHECK(made->memory != nullptr, "out of memory");
    block = made.get();
    blocks_.push_back(std::move(made));
  } else {
    refused_ = true;
    return {};
  }
  block->references.store(1, std::memory_order_relaxed);
  return Buffer(block);
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
