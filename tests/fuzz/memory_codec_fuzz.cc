// SPDX-License-Identifier: Apache-2.0
//
// What a memory connection may receive. Input: one byte (how large the pieces are in which it
// comes), then the stream. Each block that decodes has the length that it says, within the bounds;
// after an error nothing more is read.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/check.h"
#include "mirror/memory_codec.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace drover::mirror;
  if (size < 1) return 0;
  const std::size_t piece = std::size_t{1} + data[0] * std::size_t{7};
  auto left = std::as_bytes(std::span(data, size)).subspan(1);
  MemoryDecoder decoder;
  while (!left.empty()) {
    const auto space = decoder.space();
    CHECK(!space.empty() && space.size() <= kMemoryBlock,
          "there is room, and no more than for a block");
    const std::size_t count = std::min({space.size(), piece, left.size()});
    std::memcpy(space.data(), left.data(), count);
    left = left.subspan(count);
    if (!decoder.received(count)) return 0;
    CHECK(decoder.decoded().size() <= kMemoryBlock, "a block is no larger");
    decoder.drop(decoder.decoded().size());
  }
  return 0;
}
