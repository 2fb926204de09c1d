// SPDX-License-Identifier: Apache-2.0
//
// What a lane may receive: a header, then its payload. Input: one byte (bit 0: put the right magic,
// bit 1: put the right checksum, so that mutations get behind both), then the bytes. What decodes
// must fit: the runs cover the extent in order (without gaps if the frame is not partial) and lie
// within the payload or the scratch; and a header that decodes encodes to the same bytes.
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "mirror/frame.h"
#include "mirror/session.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using namespace drover;
using namespace drover::mirror;

bool within(std::span<const std::byte> inner, std::span<const std::byte> outer) {
  return inner.data() >= outer.data() && inner.data() + inner.size() <= outer.data() + outer.size();
}

void check_runs(const FrameHeader& header, const std::vector<Run>& runs,
                std::span<const std::byte> payload, std::span<const std::byte> scratch) {
  const bool partial = (header.flags & kFlagPartial) != 0;
  Offset at = header.extent.offset;
  Length left_out;
  for (const Run& run : runs) {
    CHECK(run.extent.length > Length() && run.extent.offset >= at, "runs come in order");
    CHECK(run.extent.offset == at || (partial && &run != runs.data()), "runs leave no gap");
    left_out += run.extent.offset - at;
    at = run.extent.end();
    if (run.bytes.empty()) continue;
    CHECK(run.bytes.size() == run.extent.length.bytes(), "a run has the bytes of its extent");
    CHECK(within(run.bytes, payload) || within(run.bytes, scratch), "a run's bytes are ours");
  }
  CHECK(at == header.extent.end(), "the runs end with the extent");
  CHECK(partial == (left_out > Length()) && left_out.bytes() % kBlock.bytes() == 0,
        "a partial frame leaves out blocks, others nothing");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 1 + kHeaderSize) return 0;
  const unsigned choice = data[0];
  const auto bytes = std::as_bytes(std::span(data, size)).subspan(1);
  std::array<std::byte, kHeaderSize> head{};
  std::copy_n(bytes.begin(), kHeaderSize, head.begin());
  const auto rest = bytes.subspan(kHeaderSize);
  if ((choice & 1) != 0) std::memcpy(head.data(), "DRVF", 4);
  (void)is_beat(head);
  const FrameLimits limits{{Length(3U << 20), Length(100000)}, kMaxChunk};
  auto header = decode_header(head, limits);
  if (!header) return 0;
  std::array<std::byte, kHeaderSize> again{};
  encode_header(*header, again);
  CHECK(again == head, "a header that decodes encodes to the same bytes");
  CHECK(header->payload_length <= kMaxPayload && header->decoded_length <= kMaxPayload,
        "no header asks for more than a buffer");
  if (header->type == FrameType::Ack || header->type == FrameType::Differs ||
      header->type == FrameType::Failed) {
    return 0;
  }
  std::vector<std::byte> payload(rest.begin(), rest.end());
  payload.resize(header->payload_length);
  if ((choice & 2) != 0 && header->encoding == Encoding::Plain && !payload.empty()) {
    header->checksum = XXH3_64bits(payload.data(), payload.size());
  }
  std::vector<std::byte> scratch(kMaxPayload);
  std::vector<Run> runs;
  if (!decode_payload(*header, payload, scratch, runs)) return 0;
  if (header->type == FrameType::Offer) {
    CHECK(runs.size() == 1 && runs[0].bytes.size() == payload.size(), "an offer is kept whole");
    const Offer offer = decode_offer(*header, payload);
    const BlockMask offered = data_blocks(offer, header->extent);
    CHECK(!offered.empty() && offer.piece <= kMaxChunk, "something is offered");
    FrameHeader same = *header;
    std::vector<std::byte> room(kEncodeScratch);
    const auto encoded = encode_offer(same, offer, room);
    CHECK(std::ranges::equal(encoded, payload), "an offer that decodes encodes to the same bytes");
  } else if (header->type == FrameType::Compare) {
    CHECK(runs.size() == 1 && runs[0].bytes.size() % kHashSize == 0, "a comparison carries hashes");
  } else {
    check_runs(*header, runs, payload, scratch);
  }
  return 0;
}
