// SPDX-License-Identifier: Apache-2.0
//
// What a chunk's way through the frame codec costs: zero search, checksum, compression, headers.
// bytes_per_second counts the content, not what travels; `ratio` is what travels of it.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "mirror/frame.h"

namespace drover::mirror {
namespace {

constexpr std::size_t kChunk = std::size_t{1} << 20;

std::vector<std::byte> noise(std::size_t size) {
  std::vector<std::byte> bytes(size);
  Random random(6);
  for (std::size_t at = 0; at < size; at += 8) {
    const std::uint64_t word = random.next();
    std::memcpy(bytes.data() + at, &word, std::min<std::size_t>(8, size - at));
  }
  return bytes;
}

// Words of a small vocabulary, the first ones far more often, now and then a number: compresses
// about as well as an operating system's files do.
std::vector<std::byte> text(std::size_t size) {
  Random random(7);
  std::vector<std::string> words(2000);
  for (std::string& word : words) {
    for (std::uint64_t left = 2 + random.below(9); left > 0; --left) {
      word += static_cast<char>('a' + random.below(26));
    }
  }
  std::string made;
  while (made.size() < size) {
    made += words[random.below(1 + random.below(words.size()))];
    made += random.one_in(12) ? std::to_string(random.next()) : " ";
  }
  std::vector<std::byte> bytes(size);
  std::memcpy(bytes.data(), made.data(), size);
  return bytes;
}

// Every other of its 4 KiB blocks is zero.
std::vector<std::byte> half_empty(std::size_t size) {
  std::vector<std::byte> bytes = noise(size);
  for (std::size_t at = 0; at + 4096 <= size; at += 8192) {
    std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), 4096, std::byte{0});
  }
  return bytes;
}

FrameHeader copy_header() {
  return {.type = FrameType::Copy, .extent = {Offset(0), Length(kChunk)}, .sequence = 1};
}

void encode(benchmark::State& state, const std::vector<std::byte>& content,
            const EncodeOptions& options) {
  std::vector<std::byte> scratch(kEncodeScratch);
  std::size_t payload = 0;
  for (auto _ : state) {
    FrameHeader header = copy_header();
    payload = encode_copy(header, content, BlockMask::all(), options, scratch).size();
    benchmark::DoNotOptimize(scratch.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(content.size()) * state.iterations());
  state.counters["ratio"] = static_cast<double>(payload) / static_cast<double>(content.size());
}

void decode(benchmark::State& state, const std::vector<std::byte>& content,
            const EncodeOptions& options) {
  std::vector<std::byte> scratch(kEncodeScratch);
  FrameHeader header = copy_header();
  const auto payload = encode_copy(header, content, BlockMask::all(), options, scratch);
  std::vector<std::byte> decoded(kMaxPayload);
  std::vector<Run> runs;
  for (auto _ : state) {
    const Status status = decode_payload(header, payload, decoded, runs);
    CHECK(status.has_value(), "what was encoded can be decoded");
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(content.size()) * state.iterations());
}

// A chunk of zeroes becomes a Zero frame: this is the search alone.
void BM_ZeroCheck(benchmark::State& state) { encode(state, std::vector<std::byte>(kChunk), {}); }
BENCHMARK(BM_ZeroCheck)->Name("zero_check/1_MiB_of_zeroes");

void BM_EncodePlain(benchmark::State& state) { encode(state, noise(kChunk), {}); }
BENCHMARK(BM_EncodePlain)->Name("encode/noise/plain");
void BM_DecodePlain(benchmark::State& state) { decode(state, noise(kChunk), {}); }
BENCHMARK(BM_DecodePlain)->Name("decode/noise/plain");
void BM_EncodeSparse(benchmark::State& state) { encode(state, half_empty(kChunk), {}); }
BENCHMARK(BM_EncodeSparse)->Name("encode/half_empty/plain");
void BM_DecodeSparse(benchmark::State& state) { decode(state, half_empty(kChunk), {}); }
BENCHMARK(BM_DecodeSparse)->Name("decode/half_empty/plain");

void BM_EncodeLz4(benchmark::State& state) {
  encode(state, text(kChunk), {Encoding::Lz4, static_cast<int>(state.range(0))});
}
BENCHMARK(BM_EncodeLz4)->Name("encode/text/lz4")->Arg(1);
void BM_EncodeNoiseLz4(benchmark::State& state) {
  encode(state, noise(kChunk), {Encoding::Lz4, 1});
}
BENCHMARK(BM_EncodeNoiseLz4)->Name("encode/noise/lz4");
void BM_DecodeLz4(benchmark::State& state) { decode(state, text(kChunk), {Encoding::Lz4, 1}); }
BENCHMARK(BM_DecodeLz4)->Name("decode/text/lz4");
void BM_EncodeZstd(benchmark::State& state) {
  encode(state, text(kChunk), {Encoding::Zstd, static_cast<int>(state.range(0))});
}
BENCHMARK(BM_EncodeZstd)->Name("encode/text/zstd")->Arg(1)->Arg(3)->Arg(6)->Arg(9);
void BM_EncodeNoiseZstd(benchmark::State& state) {
  encode(state, noise(kChunk), {Encoding::Zstd, 1});
}
BENCHMARK(BM_EncodeNoiseZstd)->Name("encode/noise/zstd");
void BM_DecodeZstd(benchmark::State& state) { decode(state, text(kChunk), {Encoding::Zstd, 3}); }
BENCHMARK(BM_DecodeZstd)->Name("decode/text/zstd");

// A guest's mirrored write of 4 KiB: its checksum and its header.
void BM_EncodeWrite(benchmark::State& state) {
  const std::vector<std::byte> content = noise(4096);
  std::array<std::byte, kHeaderSize> out{};
  for (auto _ : state) {
    FrameHeader header{.type = FrameType::Write, .extent = {Offset(0), 4_KiB}, .sequence = 1};
    encode_write(header, content);
    encode_header(header, out);
    benchmark::DoNotOptimize(out);
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(BM_EncodeWrite)->Name("encode/write_4_KiB");

void BM_DecodeHeader(benchmark::State& state) {
  FrameHeader header{.type = FrameType::Write, .extent = {Offset(0), 4_KiB}, .sequence = 1};
  encode_write(header, noise(4096));
  std::array<std::byte, kHeaderSize> bytes{};
  encode_header(header, bytes);
  const FrameLimits limits{.disk_sizes = {64_GiB}};
  for (auto _ : state) {
    benchmark::DoNotOptimize(bytes);
    benchmark::DoNotOptimize(decode_header(bytes, limits));
  }
  state.SetItemsProcessed(state.iterations());
}
BENCHMARK(BM_DecodeHeader)->Name("decode/header");

// What a comparison costs either side: 16 bytes of hash for each 4 KiB.
void BM_EncodeCompare(benchmark::State& state) {
  const std::vector<std::byte> content = noise(kChunk);
  std::vector<std::byte> scratch(kEncodeScratch);
  for (auto _ : state) {
    FrameHeader header{
        .type = FrameType::Compare, .extent = {Offset(0), Length(kChunk)}, .sequence = 1};
    benchmark::DoNotOptimize(encode_compare(header, content, scratch));
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(kChunk) * state.iterations());
}
BENCHMARK(BM_EncodeCompare)->Name("encode/compare_1_MiB");

}  // namespace
}  // namespace drover::mirror
