// SPDX-License-Identifier: Apache-2.0
//
// What a journal keeps of a disk's chunks: one record per group of 4096 chunks, as bytes. The
// arbiter makes and reads them (Arbiter::take_record(), restore()); here is only their form.
//
// A record: version, the disk's and the group's numbers that it must fit, runs of chunks that are
// alike, and an XXH3 checksum of all that. A group whose chunks are alike takes 40 bytes; one whose
// chunks all have two full masks kMaxGroupRecord. Pure functions, any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "mirror/block_mask.h"
#include "mirror/chunk_set.h"

namespace drover::mirror {

using GroupIndex = std::uint64_t;
inline constexpr std::uint64_t kGroupChunks = ChunkSet::kPage;
inline constexpr std::size_t kMaxGroupRecord = 64 + kGroupChunks * (3 + 2 * 33);

// What is known of one chunk. BlockMask::all(): the whole chunk.
struct ChunkRecord {
  bool touched = false;  // something may have been sent for it; if not, the rest says nothing
  BlockMask pending;     // what the target does not have
  BlockMask unflushed;   // what it has acknowledged, but may not have on stable storage
  bool operator==(const ChunkRecord&) const = default;
};

// What a record must fit.
struct GroupPlace {
  GroupIndex group = 0;
  Length disk_size;
  Length chunk_size;
};

// `chunks`: the group's, kGroupChunks or, of the last group, fewer. Masks name blocks of a chunk,
// or are all().
std::string encode_group(const GroupPlace& place, std::span<const ChunkRecord> chunks);
// Protocol if the bytes are damaged, of another version, or another group's.
Result<std::vector<ChunkRecord>> decode_group(const GroupPlace& place, std::string_view bytes);

}  // namespace drover::mirror
