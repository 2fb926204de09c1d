// SPDX-License-Identifier: Apache-2.0
#include "blockcopy/raw_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "base/check.h"

namespace drover::blockcopy {
namespace {

// Enough for every disk there is, when nobody says how much is needed.
constexpr std::size_t kUsualAlignment = 4096;
// A page: the unit in which the page cache and direct transfers could get into each other's way.
constexpr Length kPage = Length(4096);
constexpr std::size_t kMaxAlignment = std::size_t{64} << 10;

struct Alignment {
  std::size_t offset = 0;  // 0: no direct transfers
  std::size_t memory = 0;
};

Alignment ask_alignment(int fd, bool block_device) {
  struct statx info {};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) != 0) {
    // Linux 6.1 and later, for some filesystems and all block devices.
    return {info.stx_dio_offset_align, info.stx_dio_mem_align};
  }
  int sector = 0;
  if (block_device && ::ioctl(fd, BLKSSZGET, &sector) == 0 && sector > 0) {
    return {static_cast<std::size_t>(sector), static_cast<std::size_t>(sector)};
  }
  return {kUsualAlignment, kUsualAlignment};
}

// Whether a direct read with this alignment works: some filesystems accept O_DIRECT in open(2)
// only.
bool direct_read_works(int fd, std::size_t alignment) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  const std::unique_ptr<void, Free> memory(std::aligned_alloc(kMaxAlignment, kMaxAlignment));
  CHECK(memory != nullptr, "out of memory");
  ssize_t got = 0;
  do {
    got = ::pread(fd, memory.get(), alignment, 0);
  } while (got < 0 && errno == EINTR);
  return got >= 0 || errno != EINVAL;
}

}  // namespace

Result<Length> size_of(int fd, const std::string& path) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return fail_errno(errno, "looking at " + path);
  if (S_ISREG(info.st_mode)) return Length(static_cast<std::uint64_t>(info.st_size));
  if (!S_ISBLK(info.st_mode)) {
    return fail(Code::InvalidArgument, path + " is neither a regular file nor a block device");
  }
  std::uint64_t bytes = 0;
  if (::ioctl(fd, BLKGETSIZE64, &bytes) != 0) {
    return fail_errno(errno, "asking for the size of " + path);
  }
  return Length(bytes);
}

Result<RawFile> make_raw_file(UniqueFd fd, const RawFileOptions& options) {
  DROVER_ASSIGN(const Length present, size_of(fd.get(), options.path));
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return fail_errno(errno, "looking at " + options.path);
  RawFile file;
  file.path = options.path;
  file.block_device = S_ISBLK(info.st_mode);
  file.size = options.size == Length() ? present : options.size;
  if (file.size == Length()) {
    return fail(Code::InvalidArgument, options.path + " is empty: a disk has at least one sector");
  }
  if (file.block_device && file.size > present) {
    return fail(Code::NoSpace, fmt::format("{} has {}, the disk {}", options.path,
                                           format_length(present), format_length(file.size)));
  }

  if (!options.cached) {
    // The same file again, whatever its name stands for by now.
    const int access = ::fcntl(fd.get(), F_GETFL) & O_ACCMODE;
    const std::string self = "/proc/self/fd/" + std::to_string(fd.get());
    UniqueFd direct(::open(self.c_str(), access | O_DIRECT | O_CLOEXEC));
    Alignment alignment;
    if (direct) alignment = ask_alignment(direct.get(), file.block_device);
    if (alignment.offset != 0 && !direct_read_works(direct.get(), alignment.offset)) {
      alignment = {kUsualAlignment, kUsualAlignment};
      if (!direct_read_works(direct.get(), kUsualAlignment)) alignment = {};
    }
    if (alignment.offset != 0 && alignment.offset <= kMaxAlignment &&
        std::has_single_bit(alignment.offset)) {
      file.alignment = Length(alignment.offset);
      file.memory_alignment = std::clamp<std::size_t>(alignment.memory, 1, kUsualAlignment);
      const std::uint64_t bytes = file.size.bytes();
      file.direct_end = bytes % alignment.offset == 0
                            ? Offset(bytes)
                            : Offset(round_down(bytes, std::max(file.alignment, kPage)));
      file.direct = std::move(direct);
    }
  }
  const bool all_direct = file.is_direct() && file.direct_end == Offset(file.size.bytes());
  // A block device's exclusive claim hangs on the first descriptor.
  if (!all_direct || file.block_device) file.buffered = std::move(fd);
  return file;
}

std::vector<MappedExtent> find_extents(const RawFile& file, Extent range) {
  const int fd = file.is_direct() ? file.direct.get() : file.buffered.get();
  std::vector<MappedExtent> found;
  if (file.block_device) return std::vector{MappedExtent{range, true}};
  Offset position = range.offset;
  const auto add = [&](std::uint64_t end, bool data) {
    const Offset stop(std::min(end, range.end().bytes()));
    if (stop <= position) return;
    found.push_back({Extent{position, stop - position}, data});
    position = stop;
  };
  while (position < range.end() && found.size() < kMaxExtents) {
    const auto here = static_cast<off_t>(position.bytes());
    const off_t data = ::lseek(fd, here, SEEK_DATA);
    if (data < 0 && errno == ENXIO) {  // no more data up to the file's end
      add(range.end().bytes(), false);
      continue;
    }
    if (data < 0) {  // this filesystem doesn't know
      add(range.end().bytes(), true);
      continue;
    }
    add(static_cast<std::uint64_t>(data), false);
    if (position >= range.end()) break;
    const off_t hole = ::lseek(fd, data, SEEK_HOLE);
    // ENXIO: somebody cut the file off in the meantime; the next round sees where.
    if (hole < 0 && errno != ENXIO) add(range.end().bytes(), true);
    if (hole >= 0) add(static_cast<std::uint64_t>(hole), true);
  }
  return found;
}

Error transfer_error(int errno_value, const Transfer& transfer) {
  Error error =
      error_from_errno(errno_value, fmt::format("{} {}, {} at {}", transfer.doing, transfer.image,
                                                format_length(transfer.extent.length),
                                                transfer.extent.offset.bytes()));
  if (errno_value == ESHUTDOWN || errno_value == ENOTCONN) error.code = Code::Unreachable;
  if (errno_value == ENOMEM || (error.code != Code::NoSpace && error.code != Code::Unreachable)) {
    error.code = Code::Io;
  }
  error.retryable = false;
  return error;
}

bool worth_another_attempt(int result) { return result == -EINTR || result == -EAGAIN; }

Buffer Bounces::take(std::function<void()> retry) {
  Buffer buffer = pool_.try_take();
  if (!buffer) waiting_.push_back(std::move(retry));
  return buffer;
}

void Bounces::give_back(Buffer& buffer) {
  if (!buffer) return;
  buffer.reset();
  if (waiting_.empty()) return;
  auto first = std::move(waiting_.front());
  waiting_.pop_front();
  first();
}

}  // namespace drover::blockcopy
