// SPDX-License-Identifier: Apache-2.0
#include "mirror/frame.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>

#include <fmt/format.h>
#include <lz4.h>
#include <xxhash.h>
#include <zstd.h>

#include "base/check.h"

namespace drover::mirror {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

namespace {

constexpr std::uint32_t kMagic = 0x46565244;  // "DRVF"

template <class T>
void put(std::span<std::byte, kHeaderSize> out, std::size_t at, T value) {
  std::memcpy(out.data() + at, &value, sizeof value);
}
template <class T>
T get(std::span<const std::byte, kHeaderSize> in, std::size_t at) {
  T value;
  std::memcpy(&value, in.data() + at, sizeof value);
  return value;
}

auto broken(std::string why) {
  return fail(Code::Protocol, "the peer sent a frame that breaks the protocol: " + std::move(why));
}

std::size_t block_count(const Extent& extent) {
  return (extent.length.bytes() + kBlock.bytes() - 1) / kBlock.bytes();
}
std::size_t bitmap_size(const Extent& extent) { return (block_count(extent) + 7) / 8; }

std::uint64_t checksum_of(std::span<const std::byte> bytes) {
  return bytes.empty() ? 0 : XXH3_64bits(bytes.data(), bytes.size());
}

Status check_target_bound(const FrameHeader& header, const FrameLimits& limits) {
  if (header.disk >= limits.disk_sizes.size()) {
    return broken(fmt::format("there is no disk {}", header.disk));
  }
  const std::uint64_t size = limits.disk_sizes[header.disk].bytes();
  const std::uint64_t offset = header.extent.offset.bytes();
  const std::uint64_t length = header.extent.length.bytes();
  if (length == 0 || offset >= size || length > size - offset) {
    return broken(fmt::format("bytes {}+{} are not on disk {} of {} bytes", offset, length,
                              header.disk, size));
  }
  const std::uint64_t chunk = limits.chunk_size.bytes();
  if (offset / chunk != (offset + length - 1) / chunk) {
    return broken(fmt::format("bytes {}+{} cross a chunk's end", offset, length));
  }
  return {};
}

Status check_encoding(const FrameHeader& header) {
  const bool plain = header.encoding == Encoding::Plain;
  if (plain ? header.payload_length != header.decoded_length
            : header.payload_length == 0 || header.payload_length >= header.decoded_length) {
    return broken("a payload does not fit its encoding");
  }
  return {};
}

Status check_copy(const FrameHeader& header) {
  const std::uint64_t length = header.extent.length.bytes();
  if ((header.flags & ~(kFlagSparse | kFlagFresh | kFlagPartial)) != 0) {
    return broken("unknown flags");
  }
  if (header.extent.offset.bytes() % kBlock.bytes() != 0) return broken("a copy starts in a block");
  const std::size_t bitmap = bitmap_bytes(header);
  if ((header.flags & kFlagPartial) != 0) {
    if ((header.flags & kFlagSparse) != 0) return broken("a copy that is sparse twice");
    if (header.decoded_length < bitmap || header.decoded_length >= bitmap + length) {
      return broken("a partial copy's length does not fit its extent");
    }
  } else if ((header.flags & kFlagSparse) != 0) {
    if (header.decoded_length <= bitmap || header.decoded_length >= bitmap + length) {
      return broken("a sparse copy's length does not fit its extent");
    }
  } else if (header.decoded_length != length) {
    return broken("a copy's length does not fit its extent");
  }
  return check_encoding(header);
}

Status check_plain(const FrameHeader& header, std::uint64_t length) {
  if (header.encoding != Encoding::Plain || header.payload_length != length ||
      header.decoded_length != length) {
    return broken("a payload's length does not fit its frame");
  }
  return {};
}

std::byte* put_bitmap(const BlockMask& mask, std::size_t size, std::byte* to) {
  std::memcpy(to, mask.words().data(), size);
  return to + size;
}

BlockMask get_bitmap(std::span<const std::byte> bytes) {
  BlockMask::Words words{};
  std::memcpy(words.data(), bytes.data(), bytes.size());
  return BlockMask(words);
}

// An offer's payload: a byte that says how large the pieces are (4 KiB times two to its power), a
// bitmap of those that are not zero, and their hashes.
constexpr unsigned kMaxPieceShift = 8;
std::size_t piece_count(const Extent& extent, Length piece) {
  return (extent.length + piece - Length(1)) / piece;
}
std::size_t offer_head(std::size_t pieces) { return 1 + (pieces + 7) / 8; }

Status check_offer(const FrameHeader& header) {
  if ((header.flags & ~kFlagFresh) != 0) return broken("unknown flags");
  if (header.extent.offset.bytes() % kBlock.bytes() != 0) return broken("an offer starts in a block");
  constexpr std::size_t kLeast = 1 + 1 + kPieceHashSize;
  constexpr std::size_t kMost = 1 + kMaxBitmap + kMaxBitmap * 8 * kPieceHashSize;
  if (header.payload_length < kLeast || header.payload_length > kMost) {
    return broken("an offer's length makes no sense");
  }
  return check_plain(header, header.payload_length);
}

Result<Offer> take_offer(const FrameHeader& header, std::span<const std::byte> payload) {
  const auto shift = std::to_integer<unsigned>(payload[0]);
  if (shift > kMaxPieceShift) return broken("an offer's pieces are too large");
  Offer offer;
  offer.piece = kBlock * (std::uint64_t{1} << shift);
  offer.pieces.resize(piece_count(header.extent, offer.piece));
  std::size_t used = offer_head(offer.pieces.size());
  if (payload.size() < used) return broken("an offer is cut short");
  const BlockMask data = get_bitmap(payload.subspan(1, used - 1));
  if (data.empty() || data.end() > offer.pieces.size()) {
    return broken("an offer of nothing, or of what is beyond its extent");
  }
  if (payload.size() != used + kPieceHashSize * data.count()) {
    return broken("an offer with too many hashes, or too few");
  }
  for (std::size_t i = 0; i < offer.pieces.size(); ++i) {
    if (!data.contains(i)) continue;
    std::ranges::copy(payload.subspan(used, kPieceHashSize), offer.pieces[i].emplace().begin());
    used += kPieceHashSize;
  }
  return offer;
}

Status check_answer(const FrameHeader& header) {
  if (header.disk != 0 || header.extent != Extent{}) return broken("an answer names an extent");
  if (header.type == FrameType::Differs) {
    if (header.flags != 0 || header.checksum != 0) return broken("a difference that says more");
    return check_plain(header, kDiffersPayload);
  }
  if (header.type == FrameType::Ack) {
    if (header.flags != 0 || header.checksum != 0) return broken("an acknowledgement says more");
    return check_plain(header, 0);
  }
  if (header.payload_length > kMaxReason) return broken("a reason that is too long");
  if (header.flags > static_cast<std::uint8_t>(Code::Internal)) return broken("an unknown error");
  return check_plain(header, header.payload_length);
}

Status check(const FrameHeader& header, const FrameLimits& limits) {
  if (header.sequence == 0) return broken("sequences begin at 1");
  switch (header.type) {
    case FrameType::Copy:
      DROVER_TRY(check_target_bound(header, limits));
      return check_copy(header);
    case FrameType::Write:
      DROVER_TRY(check_target_bound(header, limits));
      if (header.flags != 0) return broken("unknown flags");
      if (header.decoded_length != header.extent.length.bytes()) {
        return broken("a write's length does not fit its extent");
      }
      return check_encoding(header);
    case FrameType::Zero:
      DROVER_TRY(check_target_bound(header, limits));
      if ((header.flags & ~kFlagFresh) != 0 || header.checksum != 0) return broken("unknown flags");
      return check_plain(header, 0);
    case FrameType::Compare:
      DROVER_TRY(check_target_bound(header, limits));
      if (header.flags != 0) return broken("unknown flags");
      if (header.extent.offset.bytes() % kBlock.bytes() != 0) return broken("a comparison starts in a block");
      return check_plain(header, kHashSize * block_count(header.extent));
    case FrameType::Offer:
      DROVER_TRY(check_target_bound(header, limits));
      return check_offer(header);
    case FrameType::Ack:
    case FrameType::Differs:
    case FrameType::Failed: return check_answer(header);
  }
  return broken("an unknown type");
}

// A thread's own, for its life: making one for each chunk costs as much as compressing it fast.
ZSTD_CCtx* compressor() {
  struct Free {
    void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
  };
  thread_local const std::unique_ptr<ZSTD_CCtx, Free> context(ZSTD_createCCtx());
  return context.get();
}
ZSTD_DCtx* decompressor() {
  struct Free {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };
  thread_local const std::unique_ptr<ZSTD_DCtx, Free> context(ZSTD_createDCtx());
  return context.get();
}

// Compresses `in` to `out`; 0 if that does not make it smaller.
std::size_t compress(std::span<const std::byte> in, std::span<std::byte> out,
                     const EncodeOptions& options) {
  const std::size_t room = std::min(out.size(), in.size() - 1);
  if (options.encoding == Encoding::Lz4) {
    const int size = LZ4_compress_fast(
        reinterpret_cast<const char*>(in.data()), reinterpret_cast<char*>(out.data()),
        static_cast<int>(in.size()), static_cast<int>(room), std::max(1, -options.level));
    return size > 0 ? static_cast<std::size_t>(size) : 0;
  }
  const std::size_t size =
      ZSTD_compressCCtx(compressor(), out.data(), room, in.data(), in.size(), options.level == 0 ? 1 : options.level);
  return ZSTD_isError(size) != 0 ? 0 : size;
}

Status decompress(const FrameHeader& header, std::span<const std::byte> payload,
                  std::span<std::byte> out) {
  bool whole = false;
  if (header.encoding == Encoding::Lz4) {
    const int size = LZ4_decompress_safe(reinterpret_cast<const char*>(payload.data()),
                                         reinterpret_cast<char*>(out.data()),
                                         static_cast<int>(payload.size()),
                                         static_cast<int>(out.size()));
    whole = size >= 0 && static_cast<std::size_t>(size) == out.size();
  } else {
    whole = ZSTD_decompressDCtx(decompressor(), out.data(), out.size(), payload.data(), payload.size()) == out.size();
  }
  if (!whole) return broken("a payload that does not decompress to its length");
  return {};
}

// The rest of a header whose decoded_length is set: the payload, in `out` if it is smaller compressed.
std::span<const std::byte> encode_payload(FrameHeader& header, std::span<const std::byte> decoded,
                                          const EncodeOptions& options, std::span<std::byte> out) {
  header.encoding = Encoding::Plain;
  header.payload_length = header.decoded_length;
  if (options.encoding == Encoding::Plain) return decoded;
  const std::size_t size = compress(decoded, out, options);
  if (size == 0) return decoded;
  header.encoding = options.encoding;
  header.payload_length = static_cast<std::uint32_t>(size);
  return out.first(size);
}

std::span<const std::byte> block_at(std::span<const std::byte> content, std::size_t block) {
  const std::size_t at = block * kBlock.bytes();
  return content.subspan(at, std::min<std::size_t>(kBlock.bytes(), content.size() - at));
}

// The runs of a payload that begins with bitmaps.
Status take_apart(const FrameHeader& header, std::span<const std::byte> decoded,
                  std::vector<Run>& runs) {
  const std::size_t blocks = block_count(header.extent);
  const std::size_t bitmap = bitmap_size(header.extent);
  const BlockMask every = BlockMask::range(0, blocks);
  const bool partial = (header.flags & kFlagPartial) != 0;
  const BlockMask data = get_bitmap(decoded.subspan(partial ? bitmap : 0, bitmap));
  const BlockMask here = partial ? get_bitmap(decoded.first(bitmap)) : every;
  if (!every.covers(here | data)) return broken("a bitmap marks blocks beyond its extent");
  if (!here.covers(data)) return broken("a bitmap marks blocks that were left out");
  if (partial && (here == every || !here.contains(0) || !here.contains(blocks - 1))) {
    return broken("a partial copy that does not leave out what it may");
  }
  std::size_t used = bitmap_bytes(header);
  for (std::size_t i = 0; i < blocks; ++i) {
    if (!here.contains(i)) continue;
    const bool is_data = data.contains(i);
    const Offset start = header.extent.offset + kBlock * i;
    const Length length = std::min(kBlock, header.extent.end() - start);
    if (is_data && decoded.size() - used < length.bytes()) return broken("a bitmap marks too much");
    const auto bytes =
        is_data ? decoded.subspan(used, length.bytes()) : std::span<const std::byte>();
    used += bytes.size();
    if (!runs.empty() && runs.back().extent.end() == start &&
        runs.back().bytes.empty() == !is_data) {
      Run& run = runs.back();
      run.extent.length += length;
      if (is_data) run.bytes = {run.bytes.data(), run.bytes.size() + bytes.size()};
    } else {
      runs.push_back({Extent{start, length}, bytes});
    }
  }
  if (used != decoded.size()) return broken("a bitmap marks too little");
  return {};
}

}  // namespace

std::size_t bitmap_bytes(const FrameHeader& header) {
  if ((header.flags & kFlagPartial) != 0) return 2 * bitmap_size(header.extent);
  return (header.flags & kFlagSparse) != 0 ? bitmap_size(header.extent) : 0;
}

void encode_header(const FrameHeader& header, std::span<std::byte, kHeaderSize> out) {
  put(out, 0, kMagic);
  put(out, 4, header.type);
  put(out, 5, header.encoding);
  put(out, 6, header.flags);
  put(out, 7, std::uint8_t{0});
  put(out, 8, header.disk);
  put(out, 10, std::uint16_t{0});
  put(out, 12, header.payload_length);
  put(out, 16, header.decoded_length);
  put(out, 20, static_cast<std::uint32_t>(header.extent.length.bytes()));
  put(out, 24, header.extent.offset.bytes());
  put(out, 32, header.sequence);
  put(out, 40, header.checksum);
}

Result<FrameHeader> decode_header(std::span<const std::byte, kHeaderSize> bytes,
                                  const FrameLimits& limits) {
  if (get<std::uint32_t>(bytes, 0) != kMagic) return broken("no frame begins like this");
  if (get<std::uint8_t>(bytes, 7) != 0 || get<std::uint16_t>(bytes, 10) != 0) {
    return broken("reserved bits are set");
  }
  const auto type = get<std::uint8_t>(bytes, 4);
  if (type < static_cast<std::uint8_t>(FrameType::Copy) ||
      type > static_cast<std::uint8_t>(FrameType::Offer)) {
    return broken(fmt::format("type {} does not exist", type));
  }
  const auto encoding = get<std::uint8_t>(bytes, 5);
  if (encoding > static_cast<std::uint8_t>(Encoding::Zstd)) {
    return broken(fmt::format("encoding {} does not exist", encoding));
  }
  FrameHeader header;
  header.type = static_cast<FrameType>(type);
  header.encoding = static_cast<Encoding>(encoding);
  header.flags = get<std::uint8_t>(bytes, 6);
  header.disk = get<std::uint16_t>(bytes, 8);
  header.payload_length = get<std::uint32_t>(bytes, 12);
  header.decoded_length = get<std::uint32_t>(bytes, 16);
  header.extent.length = Length(get<std::uint32_t>(bytes, 20));
  header.extent.offset = Offset(get<std::uint64_t>(bytes, 24));
  header.sequence = get<std::uint64_t>(bytes, 32);
  header.checksum = get<std::uint64_t>(bytes, 40);
  DROVER_TRY(check(header, limits));
  return header;
}

std::span<const std::byte> encode_copy(FrameHeader& header, std::span<const std::byte> content,
                                       const BlockMask& wanted, const EncodeOptions& options,
                                       std::span<std::byte> out) {
  CHECK(header.type == FrameType::Copy && content.size() == header.extent.length.bytes(),
        "a copy's content is its extent");
  CHECK(content.size() <= kMaxChunk.bytes() && out.size() >= kEncodeScratch, "room for the payload");
  const std::size_t blocks = block_count(header.extent);
  const BlockMask here = wanted & BlockMask::range(0, blocks);
  CHECK(here.contains(0) && here.contains(blocks - 1), "a copy's extent is as small as can be");
  const bool partial = !here.covers(BlockMask::range(0, blocks));
  BlockMask data;
  for (std::size_t i = 0; i < blocks; ++i) {
    if (here.contains(i) && !all_zero(block_at(content, i))) data.set(i);
  }
  if (data.empty() && !partial) {
    header.type = FrameType::Zero;
    header.payload_length = header.decoded_length = 0;
    header.checksum = 0;
    return {};
  }
  std::span<const std::byte> decoded = content;
  if (partial || data != here) {
    header.flags |= partial ? kFlagPartial : kFlagSparse;
    const std::size_t bitmap = bitmap_size(header.extent);
    std::byte* to = out.data();
    if (partial) to = put_bitmap(here, bitmap, to);
    to = put_bitmap(data, bitmap, to);
    for (std::size_t i = 0; i < blocks; ++i) {
      if (data.contains(i)) to = std::ranges::copy(block_at(content, i), to).out;
    }
    decoded = {out.data(), to};
  }
  header.decoded_length = static_cast<std::uint32_t>(decoded.size());
  header.checksum = checksum_of(decoded);
  return encode_payload(header, decoded, options, out.subspan(kMaxPayload));
}

std::span<const std::byte> encode_write(FrameHeader& header, std::span<const std::byte> content,
                                        const EncodeOptions& options, std::span<std::byte> out) {
  CHECK(header.type == FrameType::Write && content.size() == header.extent.length.bytes(),
        "a write's content is its extent");
  header.decoded_length = static_cast<std::uint32_t>(content.size());
  header.checksum = checksum_of(content);
  return encode_payload(header, content, options, out);
}

BlockHash block_hash(std::span<const std::byte> block) {
  const XXH128_hash_t hash = XXH3_128bits(block.data(), block.size());
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  return std::bit_cast<BlockHash>(canonical);
}

std::span<const std::byte> encode_compare(FrameHeader& header, std::span<const std::byte> content,
                                          std::span<std::byte> out) {
  CHECK(header.type == FrameType::Compare && content.size() == header.extent.length.bytes(),
        "what is compared is the extent's content");
  const std::size_t blocks = block_count(header.extent);
  const std::span<std::byte> hashes = out.first(kHashSize * blocks);
  for (std::size_t i = 0; i < blocks; ++i) {
    std::ranges::copy(block_hash(block_at(content, i)), hashes.subspan(i * kHashSize).begin());
  }
  header.encoding = Encoding::Plain;
  header.payload_length = header.decoded_length = static_cast<std::uint32_t>(hashes.size());
  header.checksum = checksum_of(hashes);
  return hashes;
}

BlockMask compare_blocks(std::span<const std::byte> content, std::span<const std::byte> hashes) {
  BlockMask differing;
  for (std::size_t i = 0; i * kHashSize < hashes.size(); ++i) {
    const auto expected = hashes.subspan(i * kHashSize, kHashSize);
    if (!std::ranges::equal(block_hash(block_at(content, i)), expected)) differing.set(i);
  }
  return differing;
}

void encode_differs(FrameHeader& header, const BlockMask& blocks,
                    std::span<std::byte, kDiffersPayload> out) {
  header.type = FrameType::Differs;
  header.payload_length = header.decoded_length = kDiffersPayload;
  put_bitmap(blocks, kDiffersPayload, out.data());
}

Result<BlockMask> decode_differs(std::span<const std::byte> payload) {
  const BlockMask blocks = get_bitmap(payload);
  if (blocks.empty()) return broken("a difference in no block");
  return blocks;
}

BlockMask data_blocks(const Offer& offer, const Extent& extent) {
  const std::size_t blocks = offer.piece / kBlock;
  BlockMask data;
  for (std::size_t i = 0; i < offer.pieces.size(); ++i) {
    if (offer.pieces[i]) data |= BlockMask::range(i * blocks, (i + 1) * blocks);
  }
  return data & BlockMask::range(0, block_count(extent));
}

std::span<const std::byte> encode_offer(FrameHeader& header, const Offer& offer,
                                        std::span<std::byte> out) {
  CHECK(header.type == FrameType::Offer && std::has_single_bit(offer.piece / kBlock) &&
            offer.pieces.size() == piece_count(header.extent, offer.piece),
        "an offer is of its extent's pieces");
  out[0] = static_cast<std::byte>(std::countr_zero(offer.piece / kBlock));
  std::size_t used = offer_head(offer.pieces.size());
  BlockMask data;
  for (std::size_t i = 0; i < offer.pieces.size(); ++i) {
    if (!offer.pieces[i]) continue;
    data.set(i);
    std::ranges::copy(*offer.pieces[i], out.subspan(used).begin());
    used += kPieceHashSize;
  }
  put_bitmap(data, offer_head(offer.pieces.size()) - 1, &out[1]);
  const std::span<const std::byte> payload = out.first(used);
  header.encoding = Encoding::Plain;
  header.payload_length = header.decoded_length = static_cast<std::uint32_t>(used);
  header.checksum = checksum_of(payload);
  return payload;
}

Offer decode_offer(const FrameHeader& header, std::span<const std::byte> payload) {
  auto offer = take_offer(header, payload);
  CHECK(offer.has_value(), "an offer's payload was checked");
  return std::move(*offer);
}

Status decode_payload(const FrameHeader& header, std::span<const std::byte> payload,
                      std::span<std::byte> scratch, std::vector<Run>& runs) {
  CHECK(payload.size() == header.payload_length, "the whole payload is here");
  runs.clear();
  if (header.type == FrameType::Zero) {
    runs.push_back({header.extent, {}});
    return {};
  }
  std::span<const std::byte> decoded = payload;
  if (header.encoding != Encoding::Plain) {
    CHECK(scratch.size() >= header.decoded_length, "room for the decoded payload");
    const std::span<std::byte> out = scratch.first(header.decoded_length);
    DROVER_TRY(decompress(header, payload, out));
    decoded = out;
  }
  if (checksum_of(decoded) != header.checksum) {
    return broken("a payload's checksum is wrong: it was damaged on its way");
  }
  if (header.type == FrameType::Offer) DROVER_TRY(take_offer(header, decoded));
  if (header.type == FrameType::Offer || (header.flags & (kFlagSparse | kFlagPartial)) == 0) {
    runs.push_back({header.extent, decoded});
    return {};
  }
  return take_apart(header, decoded, runs);
}

}  // namespace drover::mirror
