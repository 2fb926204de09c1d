// SPDX-License-Identifier: Apache-2.0
//
// Reads back a part of a target image and hashes it chunk by chunk, for a source that compares.
//
// Threads: any one, which is blocked meanwhile; the image's writers may go on on theirs.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "blockcopy/image.h"

namespace drover::mirror {

// Of one request, so that it neither lasts nor answers too long.
inline constexpr Length kMaxHashRange = Length(std::uint64_t{256} << 20);
inline constexpr std::size_t kMaxHashes = 8192;

// chunk_hash() (mirror/session.h) of each `chunk` of `range`, the last of which may be shorter.
// Chunks that the image knows to be holes are not read. The range is not empty and within the
// image, the chunk at most kMaxChunk (checked). What was flushed before the call is seen.
Result<std::vector<std::string>> hash_image(blockcopy::TargetImage& image, Extent range,
                                            Length chunk);

}  // namespace drover::mirror
