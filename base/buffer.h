// SPDX-License-Identifier: Apache-2.0
//
// Buffers for the data path: page-aligned (so that O_DIRECT takes them), in huge pages where there
// are any, reference-counted, of one size, from a pool that bounds an agent's memory (invariant 9).
//
//   BufferPool pool(1_MiB, 64);
//   if (Buffer buffer = pool.try_take()) { ... buffer.bytes() ... }   // returns itself
//
// Threads: a pool and its buffers may be used and released on any thread; the bytes are the
// business of whoever holds the buffer. The pool must outlive its buffers (checked).
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "base/units.h"

namespace drover {

class BufferPool;

// A shared handle to one buffer, like a shared_ptr. Copies name the same bytes.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer& other);
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, nullptr)) {}
  Buffer& operator=(Buffer other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() { reset(); }

  explicit operator bool() const { return block_ != nullptr; }
  // All bytes of the buffer (the pool's buffer size). Must not be empty-handed.
  [[nodiscard]] std::span<std::byte> bytes() const;
  void reset();

 private:
  friend class BufferPool;
  struct Block;
  explicit Buffer(Block* block) : block_(block) {}
  Block* block_ = nullptr;
};

class BufferPool {
 public:
  // Memory is taken as buffers are first used, a huge page at a time: an unused pool costs nothing.
  BufferPool(Length buffer_size, std::size_t count);
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  // An empty Buffer when all are out.
  Buffer try_take();
  // Called (on whichever thread released it) each time a buffer comes back after try_take() had to
  // refuse one. Set it before the first use. It must not call into the pool.
  void on_available(std::function<void()> callback) { on_available_ = std::move(callback); }

  [[nodiscard]] Length buffer_size() const { return buffer_size_; }
  [[nodiscard]] std::size_t available() const;

 private:
  friend class Buffer;
  struct FreeSlab {
    void operator()(std::byte* memory) const;
  };
  void give_back(Buffer::Block* block);
  std::byte* next_memory();

  const Length buffer_size_;
  const std::size_t count_;
  std::function<void()> on_available_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<std::byte, FreeSlab>> slabs_;
  std::byte* slab_next_ = nullptr;  // in the last of them
  std::size_t slab_left_ = 0;       // bytes from there on
  std::vector<std::unique_ptr<Buffer::Block>> blocks_;
  std::vector<Buffer::Block*> free_;
  bool refused_ = false;
};

}  // namespace drover
