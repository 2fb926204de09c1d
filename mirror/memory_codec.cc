// SPDX-License-Identifier: Apache-2.0
#include "mirror/memory_codec.h"

#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace drover::mirror {

namespace {

// Below this rate the wire leaves zstd the time that it needs (level 1: some 300 MB/s and core).
constexpr double kZstdRate = 64e6;
constexpr double kWorthIt = 1.1;
// A thread that waits for a CPU for more than this part of the time (a fifth) would take it from
// the guests.
constexpr int kStarvedShare = 5;

double seconds(Duration time) { return std::chrono::duration<double>(time).count(); }

}  // namespace

// --- the choice ---

bool CompressionChoice::compressing() const {
  return asked_.automatic ? trying_ : asked_.encoding != Encoding::Plain;
}

EncodeOptions CompressionChoice::next() const {
  if (!compressing()) return {};
  if (!asked_.automatic) return {asked_.encoding, asked_.level};
  return {plain_rate_ < kZstdRate ? Encoding::Zstd : Encoding::Lz4, 0};
}

void CompressionChoice::sent(Instant now, std::size_t raw, const Waits& waits) {
  if (began_ == Instant()) {
    began_ = now;
    return;
  }
  raw_ += raw;
  waits_.blocked += waits.blocked;
  waits_.worked += waits.worked;
  waits_.starved += waits.starved;
  if (now - began_ < kWindow) return;
  window_ended(now - began_);
  began_ = now;
  raw_ = 0;
  waits_ = {};
}

void CompressionChoice::window_ended(Duration elapsed) {
  const double rate = static_cast<double>(raw_) / seconds(elapsed);
  const bool cpu_is_short = waits_.starved * kStarvedShare > elapsed;
  if (!trying_) {
    if (waits_.blocked * 2 < elapsed || cpu_is_short) return;
    plain_rate_ = rate;
    if (wait_ > 0) {
      --wait_;
    } else {
      trying_ = true;
      held_ = 0;
    }
    return;
  }
  if (cpu_is_short) return pause();
  if (rate > plain_rate_ * kWorthIt) {
    pause_ = 1;
    if (++held_ < kLookAgain) return;
    trying_ = false;
    wait_ = 0;
    return;
  }
  // QEMU had little to send: that says nothing.
  if ((waits_.blocked + waits_.worked) * 2 < elapsed) {
    trying_ = false;
    return;
  }
  pause();
}

void CompressionChoice::pause() {
  trying_ = false;
  wait_ = pause_;
  pause_ = std::min(pause_ * 2, kLongestPause);
}

// --- the format ---

void encode_memory_header(const MemoryBlockHeader& header,
                          std::span<std::byte, kMemoryHeader> out) {
  const std::uint32_t first = header.raw | static_cast<std::uint32_t>(header.encoding) << 24;
  std::memcpy(out.data(), &first, sizeof first);
  std::memcpy(out.data() + sizeof first, &header.stored, sizeof header.stored);
}

Result<MemoryBlockHeader> decode_memory_header(std::span<const std::byte, kMemoryHeader> bytes) {
  std::uint32_t first = 0;
  MemoryBlockHeader header;
  std::memcpy(&first, bytes.data(), sizeof first);
  std::memcpy(&header.stored, bytes.data() + sizeof first, sizeof header.stored);
  header.raw = first & 0xFFFFFF;
  const std::uint32_t encoding = first >> 24;
  if (encoding > static_cast<std::uint32_t>(Encoding::Zstd)) {
    return fail(Code::Protocol, "a block of memory in an unknown encoding");
  }
  header.encoding = static_cast<Encoding>(encoding);
  if (header.raw == 0 || header.raw > kMemoryBlock) {
    return fail(Code::Protocol, "a block of memory of a size that there is not");
  }
  const bool plain = header.encoding == Encoding::Plain;
  if (header.stored == 0 || (plain ? header.stored != header.raw : header.stored >= header.raw)) {
    return fail(Code::Protocol, "a block of memory whose lengths do not fit");
  }
  return header;
}

// --- the encoder ---

struct MemoryEncoder::Contexts {
  ZSTD_CCtx* zstd = nullptr;
  ~Contexts() { ZSTD_freeCCtx(zstd); }
};

MemoryEncoder::MemoryEncoder()
    : contexts_(std::make_unique<Contexts>()),
      out_(std::make_unique_for_overwrite<std::byte[]>(kMemoryHeader + kMemoryBlock)) {}
MemoryEncoder::~MemoryEncoder() = default;

std::span<const std::byte> MemoryEncoder::encode(std::span<const std::byte> memory,
                                                 const EncodeOptions& options) {
  CHECK(!memory.empty() && memory.size() <= kMemoryBlock, "a block has a size");
  std::byte* const body = out_.get() + kMemoryHeader;
  const std::size_t room = memory.size() - 1;
  std::size_t stored = 0;
  if (options.encoding == Encoding::Lz4 && room > 0) {
    const int size = LZ4_compress_fast(
        reinterpret_cast<const char*>(memory.data()), reinterpret_cast<char*>(body),
        static_cast<int>(memory.size()), static_cast<int>(room), std::max(1, -options.level));
    stored = size > 0 ? static_cast<std::size_t>(size) : 0;
  } else if (options.encoding == Encoding::Zstd && room > 0) {
    if (contexts_->zstd == nullptr) contexts_->zstd = ZSTD_createCCtx();
    const std::size_t size =
        ZSTD_compressCCtx(contexts_->zstd, body, room, memory.data(), memory.size(),
                          options.level == 0 ? 1 : options.level);
    stored = ZSTD_isError(size) != 0 ? 0 : size;
  }
  MemoryBlockHeader header{options.encoding, static_cast<std::uint32_t>(memory.size()),
                           static_cast<std::uint32_t>(stored)};
  if (stored == 0) {
    header.encoding = Encoding::Plain;
    header.stored = header.raw;
    std::memcpy(body, memory.data(), memory.size());
  }
  encode_memory_header(header, std::span<std::byte, kMemoryHeader>(out_.get(), kMemoryHeader));
  return {out_.get(), kMemoryHeader + header.stored};
}

// --- the decoder ---

struct MemoryDecoder::Contexts {
  ZSTD_DCtx* zstd = nullptr;
  ~Contexts() { ZSTD_freeDCtx(zstd); }
};

MemoryDecoder::MemoryDecoder()
    : contexts_(std::make_unique<Contexts>()),
      stored_(std::make_unique_for_overwrite<std::byte[]>(kMemoryBlock)),
      raw_(std::make_unique_for_overwrite<std::byte[]>(kMemoryBlock)) {}
MemoryDecoder::~MemoryDecoder() = default;

std::span<std::byte> MemoryDecoder::space() {
  if (!decoded_.empty()) return {};
  if (!in_block_) return std::span(head_).subspan(have_);
  return std::span(stored_.get(), header_.stored).subspan(have_);
}

Status MemoryDecoder::received(std::size_t count) {
  CHECK(count <= space().size(), "no more was received than there was space");
  have_ += count;
  if (!in_block_) {
    if (have_ < head_.size()) return {};
    DROVER_ASSIGN(header_, decode_memory_header(head_));
    in_block_ = true;
    have_ = 0;
    return {};
  }
  if (have_ < header_.stored) return {};
  in_block_ = false;
  have_ = 0;
  return decode();
}

Status MemoryDecoder::decode() {
  std::size_t size = header_.raw;
  if (header_.encoding == Encoding::Lz4) {
    const int got = LZ4_decompress_safe(
        reinterpret_cast<const char*>(stored_.get()), reinterpret_cast<char*>(raw_.get()),
        static_cast<int>(header_.stored), static_cast<int>(header_.raw));
    size = got > 0 ? static_cast<std::size_t>(got) : 0;
  } else if (header_.encoding == Encoding::Zstd) {
    if (contexts_->zstd == nullptr) contexts_->zstd = ZSTD_createDCtx();
    const std::size_t got = ZSTD_decompressDCtx(contexts_->zstd, raw_.get(), header_.raw,
                                                stored_.get(), header_.stored);
    size = ZSTD_isError(got) != 0 ? 0 : got;
  }
  if (size != header_.raw) {
    return fail(Code::Protocol, "a block of memory that does not decompress to its length");
  }
  decoded_ = {header_.encoding == Encoding::Plain ? stored_.get() : raw_.get(), size};
  return {};
}

}  // namespace drover::mirror
