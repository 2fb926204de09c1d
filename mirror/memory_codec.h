// SPDX-License-Identifier: Apache-2.0
//
// The guest's memory on its way to the target, in blocks that are compressed where that is faster:
// the format of docs/protocol.md, 4, and the choice, which is made anew all the time from what the
// wire and the CPU do.
//
// Threads: none of its own; use each object from one.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/clock.h"
#include "base/result.h"
#include "mirror/compression.h"
#include "mirror/frame.h"

namespace drover::mirror {

inline constexpr std::size_t kMemoryBlock = std::size_t{256} << 10;
inline constexpr std::size_t kMemoryHeader = 8;

struct MemoryBlockHeader {
  Encoding encoding = Encoding::Plain;
  std::uint32_t raw = 0;     // bytes of memory, 1 to kMemoryBlock
  std::uint32_t stored = 0;  // bytes that follow; fewer unless it is plain
};
void encode_memory_header(const MemoryBlockHeader& header, std::span<std::byte, kMemoryHeader> out);
// Protocol: no peer that keeps the rules has sent that.
Result<MemoryBlockHeader> decode_memory_header(std::span<const std::byte, kMemoryHeader> bytes);

// How the next block goes. It begins plain. When the connection has waited for the wire for more
// than half of a window, compression is tried; it stays as long as more memory passes than the wire
// took of it plain. Where it does not (the CPU is slower than the wire, or the memory does not
// shrink), or where threads wait for a CPU, the next try comes after a pause that doubles. Now and
// then a plain window tells what the wire takes by now. A method that was asked for by name is
// always used.
class CompressionChoice {
 public:
  static constexpr Duration kWindow = std::chrono::milliseconds(200);
  static constexpr unsigned kLongestPause = 64;  // windows in which the wire was the limit
  static constexpr unsigned kLookAgain = 50;     // windows until the wire is measured anew

  explicit CompressionChoice(const Compression& asked) : asked_(asked) {}
  [[nodiscard]] EncodeOptions next() const;
  // Of the time since the last call.
  struct Waits {
    Duration blocked{};  // with bytes at hand that the wire did not take; the target would have
    Duration worked{};   // compressing
    Duration starved{};  // ready to run, without a CPU
  };
  // `raw` bytes of memory have gone to the wire.
  void sent(Instant now, std::size_t raw, const Waits& waits);
  [[nodiscard]] bool compressing() const;

 private:
  void window_ended(Duration elapsed);
  void pause();

  Compression asked_;
  bool trying_ = false;
  double plain_rate_ = 0;  // bytes per second that the wire took
  unsigned pause_ = 1;
  unsigned wait_ = 0;  // windows until the next try
  unsigned held_ = 0;  // windows that compression has paid
  Instant began_{};
  std::uint64_t raw_ = 0;
  Waits waits_;
};

// Source. Puts memory into blocks.
class MemoryEncoder {
 public:
  MemoryEncoder();
  ~MemoryEncoder();
  MemoryEncoder(const MemoryEncoder&) = delete;
  MemoryEncoder& operator=(const MemoryEncoder&) = delete;

  // 1 to kMemoryBlock bytes; what it returns is valid until the next call.
  std::span<const std::byte> encode(std::span<const std::byte> memory,
                                    const EncodeOptions& options);

 private:
  struct Contexts;
  std::unique_ptr<Contexts> contexts_;
  std::unique_ptr<std::byte[]> out_;
};

// Target. Takes them apart again, from pieces of any size. Holds one block.
class MemoryDecoder {
 public:
  MemoryDecoder();
  ~MemoryDecoder();
  MemoryDecoder(const MemoryDecoder&) = delete;
  MemoryDecoder& operator=(const MemoryDecoder&) = delete;

  // Where the stream's next bytes go; empty as long as decoded() is not.
  [[nodiscard]] std::span<std::byte> space();
  // Protocol: a header or a block that makes no sense.
  Status received(std::size_t count);
  [[nodiscard]] std::span<const std::byte> decoded() const { return decoded_; }
  void drop(std::size_t count) { decoded_ = decoded_.subspan(count); }
  // The stream may end here.
  [[nodiscard]] bool between_blocks() const { return !in_block_ && have_ == 0 && decoded_.empty(); }

 private:
  struct Contexts;
  Status decode();

  std::unique_ptr<Contexts> contexts_;
  std::array<std::byte, kMemoryHeader> head_{};
  std::unique_ptr<std::byte[]> stored_;
  std::unique_ptr<std::byte[]> raw_;
  MemoryBlockHeader header_;
  bool in_block_ = false;
  std::size_t have_ = 0;  // of the head or the block
  std::span<const std::byte> decoded_;
};

}  // namespace drover::mirror
