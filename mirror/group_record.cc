// SPDX-License-Identifier: Apache-2.0
#include "mirror/group_record.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "base/check.h"
#include "mirror/frame.h"

namespace drover::mirror {

namespace {

constexpr std::uint8_t kVersion = 1;
// A mask of more blocks than this is kept as a bitmap, of fewer as their numbers.
constexpr std::size_t kMaxListed = 31;

// How much of a chunk a mask takes: a run's kind is made of two.
enum class Part : std::uint8_t { None = 0, Some = 1, All = 2 };
constexpr std::uint8_t kParts = 3;
constexpr std::uint8_t kUntouched = kParts * kParts;

Part part_of(const BlockMask& mask) {
  if (mask.empty()) return Part::None;
  return mask == BlockMask::all() ? Part::All : Part::Some;
}
std::uint8_t kind_of(const ChunkRecord& chunk) {
  if (!chunk.touched) return kUntouched;
  return static_cast<std::uint8_t>(static_cast<std::uint8_t>(part_of(chunk.pending)) * kParts +
                                   static_cast<std::uint8_t>(part_of(chunk.unflushed)));
}

std::uint64_t chunks_in(const GroupPlace& place) {
  const std::uint64_t size = place.chunk_size.bytes();
  const std::uint64_t chunks = (place.disk_size.bytes() + size - 1) / size;
  const std::uint64_t first = place.group * kGroupChunks;
  return first < chunks ? std::min(kGroupChunks, chunks - first) : 0;
}

// Blocks of the group's chunk `index`.
std::size_t blocks_in(const GroupPlace& place, std::uint64_t index) {
  const std::uint64_t start = (place.group * kGroupChunks + index) * place.chunk_size.bytes();
  const std::uint64_t bytes = std::min(place.chunk_size.bytes(), place.disk_size.bytes() - start);
  return (bytes + kBlock.bytes() - 1) / kBlock.bytes();
}

class Writer {
 public:
  template <class T>
  void put(T value) {
    const std::size_t at = bytes_.size();
    bytes_.resize(at + sizeof value);
    std::memcpy(bytes_.data() + at, &value, sizeof value);
  }
  void put_mask(const BlockMask& mask) {
    if (mask.count() > kMaxListed) {
      put(std::uint8_t{0});
      for (const std::uint64_t word : mask.words()) put(word);
      return;
    }
    put(static_cast<std::uint8_t>(mask.count()));
    for (std::size_t block = mask.first(); block < mask.end(); ++block) {
      if (mask.contains(block)) put(static_cast<std::uint8_t>(block));
    }
  }
  std::string finish() {
    put(std::uint64_t{XXH3_64bits(bytes_.data(), bytes_.size())});
    return std::move(bytes_);
  }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}
  [[nodiscard]] bool at_end() const { return rest_.empty(); }
  template <class T>
  bool get(T& value) {
    if (rest_.size() < sizeof value) return false;
    std::memcpy(&value, rest_.data(), sizeof value);
    rest_.remove_prefix(sizeof value);
    return true;
  }
  // A mask of some of a chunk's `blocks`.
  bool get_mask(std::size_t blocks, BlockMask& mask) {
    std::uint8_t count = 0;
    if (!get(count) || count > kMaxListed) return false;
    if (count == 0) {
      BlockMask::Words words{};
      for (std::uint64_t& word : words) {
        if (!get(word)) return false;
      }
      mask = BlockMask(words);
    }
    for (std::uint8_t i = 0; i < count; ++i) {
      std::uint8_t block = 0;
      if (!get(block) || (i > 0 && block < mask.end())) return false;
      mask.set(block);
    }
    return !mask.empty() && mask != BlockMask::all() && BlockMask::range(0, blocks).covers(mask);
  }

 private:
  std::string_view rest_;
};

bool get_part(Reader& in, Part part, std::size_t blocks, BlockMask& mask) {
  if (part == Part::All) mask = BlockMask::all();
  return part != Part::Some || in.get_mask(blocks, mask);
}

auto damaged(std::string why) {
  return fail(Code::Protocol, "a record of the disk's chunks can't be used: " + std::move(why));
}

// What comes before the runs; a record that does not begin like this is another group's.
std::string head_of(const GroupPlace& place) {
  std::string head(1, static_cast<char>(kVersion));
  for (const std::uint64_t value :
       {place.group, place.disk_size.bytes(), place.chunk_size.bytes()}) {
    head.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  return head;
}

}  // namespace

std::string encode_group(const GroupPlace& place, std::span<const ChunkRecord> chunks) {
  CHECK(chunks.size() == chunks_in(place), "a record holds its whole group");
  Writer out;
  for (const char byte : head_of(place)) out.put(byte);
  for (std::size_t first = 0; first < chunks.size();) {
    const std::uint8_t kind = kind_of(chunks[first]);
    std::size_t end = first + 1;
    while (end < chunks.size() && kind_of(chunks[end]) == kind) ++end;
    out.put(kind);
    out.put(static_cast<std::uint16_t>(end - first));
    for (; first < end; ++first) {
      if (kind == kUntouched) continue;
      if (part_of(chunks[first].pending) == Part::Some) out.put_mask(chunks[first].pending);
      if (part_of(chunks[first].unflushed) == Part::Some) out.put_mask(chunks[first].unflushed);
    }
  }
  return out.finish();
}

Result<std::vector<ChunkRecord>> decode_group(const GroupPlace& place, std::string_view bytes) {
  std::uint64_t checksum = 0;
  if (bytes.size() < sizeof checksum || bytes.size() > kMaxGroupRecord) {
    return damaged("its length is wrong");
  }
  const std::string_view body = bytes.substr(0, bytes.size() - sizeof checksum);
  std::memcpy(&checksum, bytes.data() + body.size(), sizeof checksum);
  if (XXH3_64bits(body.data(), body.size()) != checksum) return damaged("its checksum is wrong");
  const std::string head = head_of(place);
  if (!body.starts_with(head)) return damaged("it is of another version, disk or group");

  const std::uint64_t count = chunks_in(place);
  std::vector<ChunkRecord> chunks;
  chunks.reserve(count);
  Reader in(body.substr(head.size()));
  while (!in.at_end()) {
    std::uint8_t kind = 0;
    std::uint16_t length = 0;
    if (!in.get(kind) || !in.get(length) || kind > kUntouched) return damaged("an unknown state");
    if (length == 0 || length > count - chunks.size()) return damaged("its runs don't fit");
    for (; length > 0; --length) {
      ChunkRecord& chunk = chunks.emplace_back();
      if (kind == kUntouched) continue;
      chunk.touched = true;
      const std::size_t blocks = blocks_in(place, chunks.size() - 1);
      if (!get_part(in, static_cast<Part>(kind / kParts), blocks, chunk.pending) ||
          !get_part(in, static_cast<Part>(kind % kParts), blocks, chunk.unflushed)) {
        return damaged("a mask that is none");
      }
    }
  }
  if (chunks.size() != count) return damaged("chunks are missing");
  return chunks;
}

}  // namespace drover::mirror
