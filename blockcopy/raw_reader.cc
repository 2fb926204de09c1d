// SPDX-License-Identifier: Apache-2.0
//
// Raw images as a source. One request becomes one direct transfer where offset, length and memory
// are aligned; what isn't is read block by block through a bounce buffer, piece after piece.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <list>
#include <utility>

#include "base/check.h"
#include "base/unique_fd.h"
#include "blockcopy/image.h"
#include "blockcopy/raw_file.h"

namespace drover::blockcopy {
namespace {

class RawReader final : public ImageReader {
 public:
  RawReader(Loop& loop, RawFile file) : loop_(loop), file_(std::move(file)) {
    fd_ = file_.is_direct() ? file_.direct.get() : file_.buffered.get();
  }
  ~RawReader() override {
    CHECK(ops_.empty() && asked_ == 0, "a reader goes when its requests are done");
  }

  [[nodiscard]] Length size() const override { return file_.size; }
  [[nodiscard]] Length alignment() const override { return file_.alignment; }

  void read(Offset offset, std::span<std::byte> buffer, Done done) override {
    CHECK(offset.bytes() <= file_.size.bytes() &&
              buffer.size() <= file_.size.bytes() - offset.bytes(),
          "a read stays inside the disk");
    Op* const op = &ops_.emplace_back();
    op->self = std::prev(ops_.end());
    op->whole = Extent{offset, Length(buffer.size())};
    op->position = offset;
    op->left = buffer;
    op->done = std::move(done);
    if (buffer.empty()) {
      loop_.post([this, op] { finish(op, {}); });
      return;
    }
    next_piece(op);
  }

  void extents(Extent range, ExtentsDone done) override {
    CHECK(range.length > Length() && range.end().bytes() <= file_.size.bytes(),
          "extents are asked for inside the disk");
    ++asked_;
    loop_.post([this, range, done = std::move(done)] {
      auto found = find_extents(file_, range);
      --asked_;
      done(std::move(found));
    });
  }

 private:
  struct Op {
    Extent whole;  // for messages
    Offset position;
    std::span<std::byte> left;
    Done done;
    Buffer bounce;
    int attempts = 0;
    std::list<Op>::iterator self;
  };

  void next_piece(Op* op) {
    if (!file_.is_direct()) {
      loop_.read(fd_, op->left.first(std::min<std::uint64_t>(op->left.size(), kMaxTransfer)),
                 op->position, [this, op](int result) { read_direct(op, result); });
      return;
    }
    const std::uint64_t alignment = file_.alignment.bytes();
    const bool aligned =
        op->position.bytes() % alignment == 0 && op->left.size() >= alignment &&
        reinterpret_cast<std::uintptr_t>(op->left.data()) % file_.memory_alignment == 0;
    if (aligned) {
      const std::uint64_t length =
          round_down(std::min<std::uint64_t>(op->left.size(), kMaxTransfer), file_.alignment);
      loop_.read(fd_, op->left.first(length), op->position,
                 [this, op](int result) { read_direct(op, result); });
      return;
    }
    op->bounce = bounces_.take([this, op] { next_piece(op); });
    if (!op->bounce) return;
    const Extent blocks = bounced_blocks(*op);
    loop_.read(fd_, op->bounce.bytes().first(blocks.length.bytes()), blocks.offset,
               [this, op](int result) { read_bounced(op, result); });
  }

  // The blocks around what is left, as far as a bounce buffer goes.
  [[nodiscard]] Extent bounced_blocks(const Op& op) const {
    Extent blocks = widen(Extent{op.position, Length(op.left.size())}, file_.alignment);
    blocks.length = std::min(blocks.length, Length(Bounces::kSize));
    return blocks;
  }

  // True when the piece has to be done again, or the operation has failed.
  bool again_or_failed(Op* op, int result) {
    if (result >= 0) {
      op->attempts = 0;
      return false;
    }
    bounces_.give_back(op->bounce);
    if (worth_another_attempt(result) && ++op->attempts < kMaxAttempts) {
      next_piece(op);
    } else {
      finish(op, tl::unexpected(transfer_error(-result, {"reading", file_.path, op->whole})));
    }
    return true;
  }

  void read_direct(Op* op, int result) {
    if (again_or_failed(op, result)) return;
    const auto count = static_cast<std::uint64_t>(result);
    // A direct read stops inside a block only where the file ends; to continue there it must begin
    // at the block's start again.
    const std::uint64_t whole = round_down(count, file_.alignment);
    if (whole == 0) {
      end_of_file(op, count);
      return;
    }
    advance(op, whole);
  }

  void read_bounced(Op* op, int result) {
    if (again_or_failed(op, result)) return;
    const Extent blocks = bounced_blocks(*op);
    const std::uint64_t skip = (op->position - blocks.offset).bytes();
    const auto count = static_cast<std::uint64_t>(result);
    const std::uint64_t wanted = std::min(blocks.length.bytes() - skip, op->left.size());
    const std::uint64_t got = count > skip ? std::min(count - skip, wanted) : 0;
    std::memcpy(op->left.data(), op->bounce.bytes().data() + skip, got);
    bounces_.give_back(op->bounce);
    const bool ended =
        count < blocks.length.bytes() && (count == 0 || count % file_.alignment.bytes() != 0);
    if (got < wanted && ended) {
      end_of_file(op, got);
      return;
    }
    CHECK(got > 0, "a read that does not end moves on");
    advance(op, got);
  }

  // The file ends `valid` bytes from here: the disk reads as zeroes beyond.
  void end_of_file(Op* op, std::uint64_t valid) {
    const std::span<std::byte> rest = op->left.subspan(valid);
    std::memset(rest.data(), 0, rest.size());
    finish(op, {});
  }

  void advance(Op* op, std::uint64_t count) {
    op->position += Length(count);
    op->left = op->left.subspan(count);
    if (op->left.empty()) {
      finish(op, {});
    } else {
      next_piece(op);
    }
  }

  void finish(Op* op, Status status) {
    const Done done = std::move(op->done);
    ops_.erase(op->self);
    done(std::move(status));  // may destroy this
  }

  Loop& loop_;
  RawFile file_;
  int fd_ = -1;
  Bounces bounces_;
  std::list<Op> ops_;      // reads under way
  std::size_t asked_ = 0;  // extents() under way
};

}  // namespace

Result<std::unique_ptr<ImageReader>> open_raw_reader(Loop& loop, const RawSource& source) {
  // O_NONBLOCK: a FIFO of that name must not hold us up. It means nothing to a file or a disk, but
  // io_uring would take it as "fail rather than wait", so it goes again.
  UniqueFd fd(::open(source.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!fd) return fail_errno(errno, "opening the source image " + source.path);
  if (::fcntl(fd.get(), F_SETFL, 0) != 0) return fail_errno(errno, "opening " + source.path);
  DROVER_ASSIGN(RawFile file,
                make_raw_file(std::move(fd), {source.path, source.size, source.cached}));
  return std::make_unique<RawReader>(loop, std::move(file));
}

}  // namespace drover::blockcopy
