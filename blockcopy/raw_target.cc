// SPDX-License-Identifier: Apache-2.0
//
// Raw files and block devices as a target. A write goes directly where offset, length and memory
// are aligned, through a bounce buffer where only the memory is not, and block by block as
// read-modify-write otherwise; the caller keeps two writes of the same block apart (image.h).
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <list>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "blockcopy/raw_file.h"
#include "blockcopy/storage_reader.h"
#include "blockcopy/target_file.h"
#include "blockcopy/targets.h"

namespace drover::blockcopy {
namespace {

// How zeroes can be had without writing them, best first; a step down when the file won't.
enum class ZeroBy { PunchHole, ZeroRange, Writing };

int fallocate_mode(ZeroBy how) {
  return how == ZeroBy::PunchHole ? FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                                  : FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
}

constexpr std::size_t kZeroesSize = Bounces::kSize;
alignas(4096) constexpr std::array<std::byte, kZeroesSize> kZeroes{};

// What an image and its writers share.
struct RawState {
  explicit RawState(RawFile opened) : file(std::move(opened)) {}
  RawFile file;
  std::atomic<unsigned> writers{0};
};

class RawWriter final : public ImageWriter {
 public:
  RawWriter(Loop& loop, std::shared_ptr<RawState> state)
      : loop_(loop), state_(std::move(state)), file_(state_->file) {
    ++state_->writers;
  }
  ~RawWriter() override {
    CHECK(ops_.empty(), "a writer goes when its requests are done");
    --state_->writers;
  }

  [[nodiscard]] Length size() const override { return file_.size; }
  [[nodiscard]] Length alignment() const override { return file_.alignment; }

  void write(Offset offset, std::span<const std::byte> buffer, Done done) override {
    begin({.whole = Extent{offset, Length(buffer.size())},
           .position = offset,
           .left = Length(buffer.size()),
           .data = buffer.data(),
           .done = std::move(done)});
  }

  void write_zeroes(Extent extent, Done done) override {
    begin({.whole = extent,
           .position = extent.offset,
           .left = extent.length,
           .data = nullptr,
           .done = std::move(done)});
  }

  Sharing share(int fd, Offset from, Extent extent) override {
    if (file_.block_device) return Sharing::Refused;
    struct file_clone_range range {};
    range.src_fd = fd;
    range.src_offset = from.bytes();
    range.src_length = extent.length.bytes();
    range.dest_offset = extent.offset.bytes();
    const int to = file_.is_direct() ? file_.direct.get() : file_.buffered.get();
    if (::ioctl(to, FICLONERANGE, &range) == 0) return Sharing::Shared;
    // What ioctl_ficlonerange(2) says before it begins.
    const bool refused = errno == EOPNOTSUPP || errno == ENOTTY || errno == EXDEV ||
                         errno == EINVAL || errno == EPERM || errno == ETXTBSY;
    return refused ? Sharing::Refused : Sharing::Failed;
  }

 private:
  struct Op {
    Extent whole;  // for messages
    Offset position;
    Length left;
    const std::byte* data = nullptr;  // of `position`; null: zeroes
    Done done;
    Buffer bounce;
    int attempts = 0;
    std::list<Op>::iterator self = {};
  };
  // What to do about the next bytes of an operation.
  struct Piece {
    int fd = -1;
    Extent transfer;         // what is transferred
    std::uint64_t skip = 0;  // bytes of it in front of the operation's
    std::uint64_t take = 0;  // bytes of the operation that it covers
    enum class Kind { Straight, Bounce, ReadModifyWrite } kind = Kind::Straight;
  };

  void begin(Op operation) {
    CHECK(operation.whole.end().bytes() <= file_.size.bytes() &&
              operation.whole.end() >= operation.whole.offset,
          "a write stays inside the disk");
    Op* const op = &ops_.emplace_back(std::move(operation));
    op->self = std::prev(ops_.end());
    if (op->left == Length()) {
      loop_.post([this, op] { finish(op, {}); });
      return;
    }
    next_piece(op);
  }

  [[nodiscard]] Piece choose_piece(const Op& op) const {
    Piece piece;
    piece.transfer = Extent{op.position, op.left};
    if (op.position >= file_.direct_end) {
      piece.fd = file_.buffered.get();
      const std::uint64_t limit = op.data == nullptr ? kZeroesSize : kMaxTransfer;
      piece.transfer.length = std::min(op.left, Length(limit));
      piece.take = piece.transfer.length.bytes();
      return piece;
    }
    piece.fd = file_.direct.get();
    const std::uint64_t alignment = file_.alignment.bytes();
    const std::uint64_t into_block = op.position.bytes() % alignment;
    const std::uint64_t left = std::min(op.left.bytes(), (file_.direct_end - op.position).bytes());
    if (into_block != 0 || left < alignment) {
      piece.kind = Piece::Kind::ReadModifyWrite;
      piece.transfer = Extent{Offset(op.position.bytes() - into_block), file_.alignment};
      piece.skip = into_block;
      piece.take = std::min(left, alignment - into_block);
      return piece;
    }
    const bool memory_aligned =
        reinterpret_cast<std::uintptr_t>(op.data) % file_.memory_alignment == 0;
    std::uint64_t limit = kMaxTransfer;
    if (op.data == nullptr) limit = kZeroesSize;
    if (!memory_aligned) limit = Bounces::kSize;
    piece.kind = memory_aligned ? Piece::Kind::Straight : Piece::Kind::Bounce;
    piece.take = round_down(std::min(left, limit), file_.alignment);
    piece.transfer.length = Length(piece.take);
    return piece;
  }

  void next_piece(Op* op) {
    if (op->data == nullptr && zero_by_ != ZeroBy::Writing && zero_at_once(op)) return;
    const Piece piece = choose_piece(*op);
    if (piece.kind == Piece::Kind::Straight) {
      const std::byte* const bytes = op->data != nullptr ? op->data : kZeroes.data();
      write_piece(op, piece, {bytes, piece.take});
      return;
    }
    op->bounce = bounces_.take([this, op] { next_piece(op); });
    if (!op->bounce) return;
    const std::span<std::byte> block = op->bounce.bytes().first(piece.transfer.length.bytes());
    if (piece.kind == Piece::Kind::Bounce) {
      std::memcpy(block.data(), op->data, block.size());
      write_piece(op, piece, block);
      return;
    }
    loop_.read(piece.fd, block, piece.transfer.offset, [this, op](int result) {
      const Piece again = choose_piece(*op);
      const std::span<std::byte> read_block =
          op->bounce.bytes().first(again.transfer.length.bytes());
      if (result >= 0 && static_cast<std::size_t>(result) != read_block.size()) result = -EIO;
      if (result < 0) {
        failed(op, result);
        return;
      }
      std::byte* const changed = read_block.data() + again.skip;
      if (op->data != nullptr) {
        std::memcpy(changed, op->data, again.take);
      } else {
        std::memset(changed, 0, again.take);
      }
      write_piece(op, again, read_block);
    });
  }

  void write_piece(Op* op, const Piece& piece, std::span<const std::byte> bytes) {
    loop_.write(piece.fd, bytes, piece.transfer.offset,
                [this, op](int result) { piece_written(op, result); });
  }

  void piece_written(Op* op, int result) {
    // The same choice as before: it depends on the operation's position only.
    const Piece piece = choose_piece(*op);
    if (result == 0) result = -ENOSPC;  // a disk that takes nothing
    if (result < 0) {
      failed(op, result);
      return;
    }
    auto taken = std::min(static_cast<std::uint64_t>(result), piece.transfer.length.bytes());
    if (piece.fd == file_.direct.get()) taken = round_down(taken, file_.alignment);
    if (taken == 0) {
      failed(op, -EAGAIN);
      return;
    }
    op->attempts = 0;
    bounces_.give_back(op->bounce);
    advance(op, std::min(taken, piece.take));
  }

  // Starts to give zeroes without writing them; false if this part must be written.
  bool zero_at_once(Op* op) {
    Extent extent{op->position, op->left};
    if (file_.block_device) {
      // Whole blocks only; a file gets its hole to the byte.
      if (extent.offset.bytes() % file_.alignment.bytes() != 0) return false;
      extent.length = Length(round_down(extent.length.bytes(), file_.alignment));
      if (extent.length == Length()) return false;
    }
    const int fd = file_.is_direct() ? file_.direct.get() : file_.buffered.get();
    loop_.fallocate(fd, fallocate_mode(zero_by_), extent,
                    [this, op, extent, how = zero_by_](int result) {
                      if (result == -EOPNOTSUPP || result == -ENOSYS || result == -EINVAL) {
                        // Another operation may have stepped down already.
                        if (zero_by_ == how) {
                          zero_by_ = how == ZeroBy::PunchHole ? ZeroBy::ZeroRange : ZeroBy::Writing;
                        }
                        next_piece(op);
                        return;
                      }
                      if (result < 0) {
                        failed(op, result);
                        return;
                      }
                      op->attempts = 0;
                      advance(op, extent.length.bytes());
                    });
    return true;
  }

  void advance(Op* op, std::uint64_t count) {
    op->position += Length(count);
    op->left -= Length(count);
    if (op->data != nullptr) op->data += count;
    if (op->left == Length()) {
      finish(op, {});
    } else {
      next_piece(op);
    }
  }

  void failed(Op* op, int result) {
    bounces_.give_back(op->bounce);
    if (worth_another_attempt(result) && ++op->attempts < kMaxAttempts) {
      next_piece(op);
      return;
    }
    const char* const doing = op->data != nullptr ? "writing" : "zeroing";
    finish(op, tl::unexpected(transfer_error(-result, {doing, file_.path, op->whole})));
  }

  void finish(Op* op, Status status) {
    const Done done = std::move(op->done);
    ops_.erase(op->self);
    done(std::move(status));  // may destroy this
  }

  Loop& loop_;
  const std::shared_ptr<RawState> state_;
  const RawFile& file_;
  ZeroBy zero_by_ = ZeroBy::PunchHole;
  Bounces bounces_;
  std::list<Op> ops_;
};

// Raw files; `made` is empty for a block device.
class RawTarget final : public TargetImage {
 public:
  RawTarget(TargetSpec spec, std::optional<TargetFile> made, RawFile file, ImageIdentity identity)
      : spec_(std::move(spec)),
        identity_(identity),
        made_(std::move(made)),
        state_(std::make_shared<RawState>(std::move(file))),
        reads_storage_(can_read_storage(
            (state_->file.is_direct() ? state_->file.direct : state_->file.buffered).get(),
            state_->file.is_direct())) {}
  ~RawTarget() override {
    if (const Status status = release(); !status) log_warning("{}", status.error().to_string());
  }

  [[nodiscard]] const TargetSpec& spec() const override { return spec_; }
  [[nodiscard]] bool initially_zero() const override { return made_.has_value(); }
  [[nodiscard]] ImageIdentity identity() const override { return identity_; }
  [[nodiscard]] bool alive() override { return state_ != nullptr && flushed_; }

  Result<std::unique_ptr<ImageWriter>> open_writer(Loop& loop) override {
    CHECK(state_ != nullptr, "a released image has no writers");
    if (state_->writers >= kMaxWriters) {
      return fail(Code::Internal, "too many writers for " + spec_.path);
    }
    clean_ = false;
    return std::make_unique<RawWriter>(loop, state_);
  }

  Result<std::unique_ptr<ImageReader>> open_reader(Loop& loop) override {
    CHECK(state_ != nullptr, "a released image has no readers");
    const RawFile& file = state_->file;
    const int fd = file.is_direct() ? file.direct.get() : file.buffered.get();
    // The same file, whatever its name means by now.
    DROVER_ASSIGN(auto reader, open_raw_reader(loop, {fmt::format("/proc/self/fd/{}", fd),
                                                      spec_.size, spec_.cached}));
    if (file.is_direct()) return reader;
    UniqueFd again(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!again) return fail_errno(errno, "opening " + spec_.path);
    return read_storage(std::move(reader), std::move(again), CacheScope::Read);
  }
  [[nodiscard]] bool reads_storage() const override { return reads_storage_; }

  std::vector<MappedExtent> map(Extent range) override {
    CHECK(state_ != nullptr, "a released image is not looked at");
    return find_extents(state_->file, range);
  }

  Status flush() override {
    if (!flushed_ || state_ == nullptr) return flushed_;  // release() has flushed it
    if (made_) {
      flushed_ = made_->flush();
    } else if (::fdatasync(state_->file.buffered.get()) != 0) {
      flushed_ = fail_errno(errno, "flushing " + spec_.path);
    }
    clean_ = state_->writers == 0;
    return flushed_;
  }

  Status release() override {
    if (state_ == nullptr) return {};
    Status flushed = clean_ ? flushed_ : flush();
    let_go();
    return flushed;
  }

  Status remove() override {
    let_go();
    if (!made_) return {};
    return made_->remove();
  }

 private:
  void let_go() {
    if (state_ == nullptr) return;
    CHECK(state_->writers == 0, "every writer goes before its image");
    state_.reset();
    if (made_) made_->close();
  }

  const TargetSpec spec_;
  const ImageIdentity identity_;
  std::optional<TargetFile> made_;
  std::shared_ptr<RawState> state_;  // null: released
  const bool reads_storage_;
  Status flushed_;
  bool clean_ = false;  // nobody has written, nor could, since the last flush
};

// QEMU holds an image by locks on the bytes from 100 (what it does) and 200 on (what others may
// not); block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE.
bool held_by_qemu(int fd) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = 100;
  lock.l_len = 200;
  return ::fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

Result<UniqueFd> open_device(const TargetSpec& spec) {
  struct stat info {};
  if (::stat(spec.path.c_str(), &info) != 0) {
    return fail_errno(errno, "looking at the target device " + spec.path);
  }
  if (!S_ISBLK(info.st_mode)) {
    return fail(Code::InvalidArgument, "the target " + spec.path + " is not a block device");
  }
  // On a block device O_EXCL means: fails while a filesystem, a volume manager or another O_EXCL
  // has it.
  UniqueFd fd(::open(spec.path.c_str(), O_RDWR | O_EXCL | O_CLOEXEC));
  if (!fd && errno == EBUSY) {
    return fail(Code::Busy, "the target device " + spec.path + " is in use",
                "is it mounted, used for swap, or part of a volume group or an array?");
  }
  if (!fd) return fail_errno(errno, "opening the target device " + spec.path);
  if (held_by_qemu(fd.get())) {
    return fail(Code::Busy, "the target device " + spec.path + " is in use by QEMU");
  }
  return fd;
}

Result<std::unique_ptr<TargetImage>> use_device(const TargetSpec& spec,
                                                const ImageIdentity* expected) {
  DROVER_ASSIGN(UniqueFd fd, open_device(spec));
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return fail_errno(errno, "looking at " + spec.path);
  const ImageIdentity identity{info.st_rdev, 0};
  if (expected != nullptr && identity != *expected) {
    return fail(Code::Busy, spec.path + " is another device now than the one drover wrote to");
  }
  DROVER_ASSIGN(RawFile file, make_raw_file(std::move(fd), {spec.path, spec.size, spec.cached}));
  return std::make_unique<RawTarget>(spec, std::nullopt, std::move(file), identity);
}

Result<RawFile> use_file(const TargetSpec& spec, const TargetFile& made) {
  UniqueFd fd(::fcntl(made.fd(), F_DUPFD_CLOEXEC, 0));
  if (!fd) return fail_errno(errno, "opening " + spec.path);
  return make_raw_file(std::move(fd), {spec.path, spec.size, spec.cached});
}

}  // namespace

Result<std::unique_ptr<TargetImage>> open_raw_target(const TargetSpec& spec,
                                                     const ImageIdentity& identity) {
  if (spec.block_device) return use_device(spec, &identity);
  DROVER_ASSIGN(TargetFile made, TargetFile::open(spec.path, identity));
  if (held_by_qemu(made.fd())) {
    return fail(Code::Busy, "the target image " + spec.path + " is in use by QEMU");
  }
  DROVER_ASSIGN(const Length size, size_of(made.fd(), spec.path));
  if (size != spec.size) {
    return fail(Code::Incompatible, fmt::format("the target image {} has {} bytes instead of {}",
                                                spec.path, size.bytes(), spec.size.bytes()));
  }
  DROVER_ASSIGN(RawFile file, use_file(spec, made));
  return std::make_unique<RawTarget>(spec, std::move(made), std::move(file), identity);
}

Result<std::unique_ptr<TargetImage>> create_raw_target(const TargetSpec& spec) {
  if (spec.block_device) return use_device(spec, nullptr);
  DROVER_ASSIGN(TargetFile made, TargetFile::create(spec.path));
  const auto open_it = [&]() -> Result<RawFile> {
    if (::ftruncate(made.fd(), static_cast<off_t>(spec.size.bytes())) != 0) {
      return fail_errno(errno, fmt::format("giving the target image {} its size of {}", spec.path,
                                           format_length(spec.size)));
    }
    return use_file(spec, made);
  };
  auto file = open_it();
  if (!file) {
    (void)made.remove();  // the first error is the one to tell
    return fail(std::move(file.error()));
  }
  const ImageIdentity identity = made.identity();
  return std::make_unique<RawTarget>(spec, std::move(made), std::move(*file), identity);
}

}  // namespace drover::blockcopy
