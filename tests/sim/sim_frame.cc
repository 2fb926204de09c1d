// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_frame.h"

#include <algorithm>
#include <cstring>

namespace drover::sim {

using mirror::FrameType;
using mirror::kHeaderSize;
using Bytes = std::vector<std::byte>;

Bytes encode_frame(const mirror::OutFrame& frame, std::uint64_t sequence,
                   const mirror::EncodeOptions& encode, const mirror::Offer* offer) {
  mirror::FrameHeader header;
  header.type = offer != nullptr ? FrameType::Offer : frame.type;
  header.disk = frame.disk;
  header.extent = frame.extent;
  header.flags = frame.fresh ? mirror::kFlagFresh : 0;
  header.sequence = sequence;
  std::span<const std::byte> payload;
  static thread_local Bytes scratch(mirror::kEncodeScratch);
  if (offer != nullptr) {
    payload = encode_offer(header, *offer, scratch);
  } else if (frame.type == FrameType::Copy) {
    payload = encode_copy(header, frame.content, frame.blocks, encode, scratch);
  } else if (frame.type == FrameType::Write) {
    payload = encode_write(header, frame.content, encode, scratch);
  } else if (frame.type == FrameType::Compare) {
    payload = encode_compare(header, frame.content, scratch);
  }
  Bytes bytes(kHeaderSize + payload.size());
  encode_header(header, std::span(bytes).first<kHeaderSize>());
  std::ranges::copy(payload, bytes.begin() + kHeaderSize);
  return bytes;
}

Result<InFrame> decode_frame(std::span<const std::byte> bytes, const mirror::FrameLimits& limits,
                             BufferPool& pool) {
  InFrame in;
  DROVER_ASSIGN(in.header, decode_header(bytes.first<kHeaderSize>(), limits));
  static thread_local Bytes scratch(mirror::kMaxPayload);
  DROVER_TRY(decode_payload(in.header, bytes.subspan(kHeaderSize), scratch, in.runs));
  if (in.header.payload_length == 0) return in;
  // The runs refer to bytes that go away: keep them, as the receiver's Buffer does.
  in.buffer = pool.try_take();
  if (!in.buffer) return fail(Code::Busy, "the receiver holds more frames than it may");
  std::size_t used = 0;
  for (mirror::Run& run : in.runs) {
    if (run.bytes.empty()) continue;
    const auto kept = in.buffer.bytes().subspan(used, run.bytes.size());
    std::ranges::copy(run.bytes, kept.begin());
    run.bytes = kept;
    used += kept.size();
  }
  return in;
}

}  // namespace drover::sim
