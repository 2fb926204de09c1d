// SPDX-License-Identifier: Apache-2.0
//
// RawFile: an open regular file or block device and how it wants to be read and written: directly
// (O_DIRECT) or through the page cache, and with which alignment. Internal to blockcopy.
//
// Threads: immutable once made; may be shared between the writers of several threads.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/buffer.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "base/units.h"
#include "blockcopy/image.h"

namespace drover::blockcopy {

struct RawFile {
  std::string path;  // for messages
  Length size;       // of the disk
  bool block_device = false;
  // Offsets and lengths of direct transfers are multiples of this; 1: nothing is direct.
  Length alignment = Length(1);
  // What the memory of a direct transfer is aligned to.
  std::size_t memory_alignment = 1;
  // Up to here transfers are direct; the rest (a disk's last, odd page) goes through the page
  // cache.
  Offset direct_end;
  UniqueFd direct;    // -1 when nothing is direct
  UniqueFd buffered;  // -1 when everything is direct

  [[nodiscard]] bool is_direct() const { return static_cast<bool>(direct); }
};

// `fd`: the image, opened without O_DIRECT, with the access (O_RDONLY, O_RDWR) that it shall have.
// `size` of the disk; zero: what is there. Tries O_DIRECT unless `cached`.
struct RawFileOptions {
  std::string path;
  Length size;
  bool cached = false;
};
Result<RawFile> make_raw_file(UniqueFd fd, const RawFileOptions& options);

// How the disk is mapped from the start of `range` on, as ImageReader::extents() says it; at most
// kMaxExtents runs, so that a fragmented file holds nobody up for long. Of a block device all is
// data.
inline constexpr std::size_t kMaxExtents = 256;
std::vector<MappedExtent> find_extents(const RawFile& file, Extent range);

// The size of the regular file or block device behind `fd`; InvalidArgument if it is neither.
Result<Length> size_of(int fd, const std::string& path);

// "reading /srv/web1.raw, 1 MiB at 4096: Input/output error". NoSpace for what says so; Unreachable
// for a broken connection; otherwise Io, whatever the number.
struct Transfer {
  std::string_view doing;
  std::string_view image;
  Extent extent;
};
Error transfer_error(int errno_value, const Transfer& transfer);

constexpr std::uint64_t round_down(std::uint64_t value, Length alignment) {
  return value & ~(alignment.bytes() - 1);
}
constexpr std::uint64_t round_up(std::uint64_t value, Length alignment) {
  return round_down(value + alignment.bytes() - 1, alignment);
}

// The kernel may say that it was interrupted or out of something for now: worth a few more
// attempts.
inline constexpr int kMaxAttempts = 16;
bool worth_another_attempt(int result);

// One io_uring transfer moves at most this much: a guest's write stands behind less in the disk's
// queue (a 4 KiB write beside a copy at full speed: 0.9 ms with transfers of 1 MiB, 0.25 with
// these, at the same rate). A multiple of any alignment.
inline constexpr std::uint64_t kMaxTransfer = std::uint64_t{256} << 10;

// Aligned memory for what can't be transferred directly from or to the caller's: bounded, and those
// who get none wait in line.
class Bounces {
 public:
  static constexpr std::uint64_t kSize = std::uint64_t{256} << 10;

  Bounces() : pool_(Length(kSize), kCount) {}
  // An empty Buffer: none is free now; `retry` is called once when one may be.
  Buffer take(std::function<void()> retry);
  // Hands one back, and calls the first in line.
  void give_back(Buffer& buffer);

 private:
  static constexpr std::size_t kCount = 16;
  BufferPool pool_;
  std::deque<std::function<void()>> waiting_;
};

}  // namespace drover::blockcopy
