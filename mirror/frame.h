// SPDX-License-Identifier: Apache-2.0
//
// The link's frames: what travels on a data connection, in both directions. A frame is a header of
// 48 bytes, little-endian, and a payload. docs/protocol.md has the layout and the rules.
//
//   source -> target: Copy, Write, Zero, Compare, Offer   target -> source: Ack, Differs, Failed
//
// decode_header() takes nothing on trust: types, flags, reserved bits, lengths and ranges are checked
// against the limits of the session before anything is allocated or believed. Pure functions, any
// thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "mirror/block_mask.h"
#include "mirror/piece.h"

namespace drover::mirror {

inline constexpr std::size_t kHeaderSize = 48;
inline constexpr Length kMaxChunk = Length(std::uint64_t{1} << 20);
// Copy payloads are told apart into zero and data in blocks of this size.
inline constexpr Length kBlock = Length(4096);
inline constexpr std::size_t kMaxBitmap = (std::uint64_t{1} << 20) / 4096 / 8;
inline constexpr std::size_t kMaxPayload = (std::size_t{1} << 20) + kMaxBitmap;
inline constexpr std::size_t kEncodeScratch = 2 * kMaxPayload;
inline constexpr std::size_t kMaxReason = 1024;
inline constexpr std::size_t kHashSize = 16;
inline constexpr std::uint16_t kMaxDisks = 64;

enum class FrameType : std::uint8_t {
  Copy = 1,    // a chunk's content as the copier read it
  Write = 2,   // a guest's write, mirrored
  Zero = 3,    // a range that now reads as zeroes; no payload
  Ack = 4,     // the frame with this sequence is applied (not yet on stable storage)
  Failed = 5,  // the frame with this sequence could not be applied; payload: why, as text (at most
               // kMaxReason bytes); flags: its drover::Code
  Compare = 6,  // does the extent hold this content? payload: a block_hash() for each of its blocks. Ack: yes.
  Differs = 7,  // no, of the Compare with this sequence some blocks differ; nothing was changed. Payload: which,
                // as a bitmap of the extent's blocks. Of an Offer: these could not be found there; the others
                // were written
  Offer = 8,    // write what has these hashes, of whatever other image it is
};

enum class Encoding : std::uint8_t { Plain = 0, Lz4 = 1, Zstd = 2 };

// Copy only: the decoded payload begins with a bitmap (a bit per kBlock of the range, least
// significant first; 1: data), then the data blocks alone follow.
inline constexpr std::uint8_t kFlagSparse = 1;
// Copy, Zero and Offer: nothing was ever sent for this chunk to an image that was created empty, so its zero
// blocks already read as zeroes.
inline constexpr std::uint8_t kFlagFresh = 2;
// Copy only, not with kFlagSparse: some blocks of the extent, not its first and not its last one,
// are left out and stay as they are on the target. The decoded payload begins with two bitmaps of
// the extent's blocks: those that are here, and which of them are data; then those alone follow.
inline constexpr std::uint8_t kFlagPartial = 4;

struct FrameHeader {
  FrameType type = FrameType::Ack;
  Encoding encoding = Encoding::Plain;
  std::uint8_t flags = 0;
  std::uint16_t disk = 0;
  Extent extent;                      // what is changed on the disk; never crosses a chunk's end
  std::uint32_t payload_length = 0;   // bytes that follow the header
  std::uint32_t decoded_length = 0;   // the same before compression
  std::uint64_t sequence = 0;         // counts up by one per connection, from 1, source to target
  std::uint64_t checksum = 0;         // XXH3 (64 bits) of the decoded payload; 0 for none
  bool operator==(const FrameHeader&) const = default;
};

void encode_header(const FrameHeader& header, std::span<std::byte, kHeaderSize> out);

// What the session agreed on.
struct FrameLimits {
  std::vector<Length> disk_sizes;
  Length chunk_size = kMaxChunk;
};
// Protocol, with what was wrong, if a peer that keeps the rules can't have sent it.
Result<FrameHeader> decode_header(std::span<const std::byte, kHeaderSize> bytes,
                                  const FrameLimits& limits);

// A run of a decoded frame: `bytes` empty means that the extent reads as zeroes.
struct Run {
  Extent extent;
  std::span<const std::byte> bytes;
};

// Bytes of bitmaps with which the decoded payload of a checked header begins.
std::size_t bitmap_bytes(const FrameHeader& header);

// Source: for a header whose type (Copy), disk, extent, flags (fresh) and sequence are set, fills
// in encoding, flags, lengths and checksum of a Copy frame for `content` (its extent's bytes) and
// writes the payload to `out` (at least kEncodeScratch bytes). Only `blocks` of the extent are
// sent, the first and the last of it among them; the content of others is not looked at. All zero
// and nothing left out: becomes a Zero frame without payload. `level` 0: no compression; lz4 and
// zstd keep the plain form where they would not shrink it.
struct EncodeOptions {
  Encoding encoding = Encoding::Plain;
  int level = 0;
};
// Returns where the payload lies: `content` itself when it can be sent as it is, else in `out`.
std::span<const std::byte> encode_copy(FrameHeader& header, std::span<const std::byte> content,
                                       const BlockMask& blocks, const EncodeOptions& options,
                                       std::span<std::byte> out);
// The same for a mirrored Write; with compression `out` has room for its content.
std::span<const std::byte> encode_write(FrameHeader& header, std::span<const std::byte> content,
                                        const EncodeOptions& options = {}, std::span<std::byte> out = {});

// XXH3, 128 bits: what a Compare carries of each block. (It tells apart what differs by chance or damage;
// a guest that makes two blocks of one hash harms its own disk only.)
using BlockHash = std::array<std::byte, kHashSize>;
BlockHash block_hash(std::span<const std::byte> block);
// The same for a Compare with `content`; returns the payload, which is put to `out` (at least kEncodeScratch).
std::span<const std::byte> encode_compare(FrameHeader& header, std::span<const std::byte> content,
                                          std::span<std::byte> out);
// Target: the blocks of `content` whose hashes are not those of a Compare's payload.
BlockMask compare_blocks(std::span<const std::byte> content, std::span<const std::byte> hashes);
// Target: the same for a Differs; puts its payload to `out`.
inline constexpr std::size_t kDiffersPayload = kMaxBitmap;
void encode_differs(FrameHeader& header, const BlockMask& blocks,
                    std::span<std::byte, kDiffersPayload> out);
// Source. Protocol: none is marked.
Result<BlockMask> decode_differs(std::span<const std::byte> payload);

// What an Offer carries: of each piece of its extent (the last one may be shorter) the hash; none:
// it reads as zeroes.
struct Offer {
  Length piece = kPiece;  // a power of two of blocks, at most kMaxChunk
  std::vector<std::optional<PieceHash>> pieces;
};
// The extent's blocks that are in pieces which are not zero.
BlockMask data_blocks(const Offer& offer, const Extent& extent);
// Source: the same for an Offer, of which not all is zero; returns the payload, put to `out` (at
// least kEncodeScratch).
std::span<const std::byte> encode_offer(FrameHeader& header, const Offer& offer,
                                        std::span<std::byte> out);
// Target: of a payload that decode_payload() accepted (CHECKed).
Offer decode_offer(const FrameHeader& header, std::span<const std::byte> payload);

// Target: decompresses into `scratch` (at least kMaxPayload bytes) if need be, verifies the
// checksum and takes the payload apart. `runs` (cleared first) refers to `payload` or `scratch`.
// Protocol if the payload does not fit its header. Zero frames give one zero run; partial ones runs
// of the blocks that they hold; a Compare or an Offer one run whose bytes are the payload.
Status decode_payload(const FrameHeader& header, std::span<const std::byte> payload,
                      std::span<std::byte> scratch, std::vector<Run>& runs);

}  // namespace drover::mirror
