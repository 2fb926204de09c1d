// SPDX-License-Identifier: Apache-2.0
//
// Frames between the simulations' two ends, by the real codec: what the link's sender and the
// target's lane do with it, without sockets and TLS.
#pragma once

#include <span>
#include <vector>

#include "base/buffer.h"
#include "base/result.h"
#include "mirror/frame.h"
#include "mirror/lanes.h"

namespace drover::sim {

// Header and payload; of a Copy that is offered instead (null: it is not) the offer's.
std::vector<std::byte> encode_frame(const mirror::OutFrame& frame, std::uint64_t sequence,
                                    const mirror::EncodeOptions& encode,
                                    const mirror::Offer* offer = nullptr);

struct InFrame {
  mirror::FrameHeader header;
  Buffer buffer;  // what the runs refer to; empty without a payload
  std::vector<mirror::Run> runs;
};
// Protocol: the codec refuses what it encoded itself. Busy: the pool is empty, which a receiver's
// must not become.
Result<InFrame> decode_frame(std::span<const std::byte> bytes, const mirror::FrameLimits& limits,
                             BufferPool& pool);

}  // namespace drover::sim
