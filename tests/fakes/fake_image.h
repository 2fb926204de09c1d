// SPDX-License-Identifier: Apache-2.0
//
// FakeImage: a disk in memory that misbehaves as real ones do, for simulations and contract tests.
// Seeded: same seed, same order of calls, same behaviour. No Loop: everything that takes time is a
// step that it hands to `schedule`; whoever owns the queue decides when, and in which order, steps
// run.
//
//   FakeQueue queue(seed);
//   FakeImage image(1_MiB, seed, queue.schedule());
//   auto writer = image.open_writer();
//   writer->write(offset, bytes, [&](Status status) { ... });
//   queue.run_all();
//
// The fault model
// - Requests are not atomic. A write is applied in up to four pieces, a read taken in up to four,
// each at
//   a step of its own between the issue and the callback: a read may be torn by a write that runs
//   beside it. The caller's buffer is used at those steps, not at the issue: giving it back early
//   shows.
// - A write that does not start or end at `alignment` reads the block around its ends at its first
//   step and writes the whole block back at a later one, as an O_DIRECT writer does: a write to the
//   same block in between is lost. overlaps() counts the pairs of writes that could do that to each
//   other.
// - Callbacks come when the queue says so: in any order, never from inside the call that issued
// them.
// - A request may fail (options, fail_next_...): of a failed write any pieces may have been
// applied.
// - Written is not synced. flush() makes everything applied durable; crash() loses what is not:
// each
//   block of 512 bytes written since the last flush is, at random, old or new. Requests under way
//   when it crashes never call back.
// - Space: blocks of 4 KiB are allocated by writing and freed by write_zeroes; above `space` a
// write
//   fails with NoSpace and changes nothing.
//
// Threads: one. The queue must be empty or cleared before the image goes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "blockcopy/image.h"

namespace drover::fakes {

// Steps that wait to be run, in order or (with `reorder`) in any.
class FakeQueue {
 public:
  using Step = std::function<void()>;
  explicit FakeQueue(std::uint64_t seed, bool reorder = true) : random_(seed), reorder_(reorder) {}

  void add(Step step) { steps_.push_back(std::move(step)); }
  [[nodiscard]] std::function<void(Step)> schedule() {
    return [this](Step step) { add(std::move(step)); };
  }
  [[nodiscard]] std::size_t size() const { return steps_.size(); }
  // False: there was nothing to run.
  bool run_one() {
    if (steps_.empty()) return false;
    const std::size_t chosen = reorder_ ? random_.below(steps_.size()) : 0;
    Step step = std::move(steps_[chosen]);
    steps_.erase(steps_.begin() + static_cast<std::ptrdiff_t>(chosen));
    step();
    return true;
  }
  void run_all() {
    constexpr std::size_t kLimit = 100'000'000;
    std::size_t steps = 0;
    while (run_one()) CHECK(++steps < kLimit, "the queue never gets empty");
  }
  // Forgets all of them, as a crash does.
  void clear() { steps_.clear(); }

 private:
  Random random_;
  bool reorder_;
  std::vector<Step> steps_;
};

struct FakeImageOptions {
  Length alignment = Length(512);  // a power of two
  bool initially_zero = true;
  // One in so many requests fails with Io; 0: none.
  std::uint64_t read_errors = 0;
  std::uint64_t write_errors = 0;
  Length space;  // zero: no limit
};

class FakeImage {
 public:
  using Schedule = std::function<void(FakeQueue::Step)>;

  FakeImage(Length size, std::uint64_t seed, Schedule schedule, FakeImageOptions options = {})
      : options_(options),
        random_(seed),
        schedule_(std::move(schedule)),
        written_(size.bytes()),
        synced_(size.bytes()),
        allocated_((size.bytes() + kSpaceBlock - 1) / kSpaceBlock) {
    CHECK(size > Length(), "a disk has at least one byte");
  }
  FakeImage(const FakeImage&) = delete;
  FakeImage& operator=(const FakeImage&) = delete;

  // The disk as its reader would find it now, and as it would come back if all that is not synced
  // got lost.
  [[nodiscard]] std::span<const std::byte> content() const { return written_; }
  [[nodiscard]] std::span<const std::byte> synced() const { return synced_; }
  [[nodiscard]] Length size() const { return Length(written_.size()); }
  // What its file would take.
  [[nodiscard]] Length allocated() const { return Length(allocated_blocks_ * kSpaceBlock); }

  // Changes the disk at once, written and synced: how it was before the test begins.
  void preset(Offset offset, std::span<const std::byte> bytes) {
    std::memcpy(written_.data() + offset.bytes(), bytes.data(), bytes.size());
    std::memcpy(synced_.data() + offset.bytes(), bytes.data(), bytes.size());
    for (std::uint64_t block = 0; block < allocated_.size(); ++block) {
      const auto begin = written_.begin() + static_cast<std::ptrdiff_t>(block * kSpaceBlock);
      const auto end = written_.begin() + static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(
                                              written_.size(), (block + 1) * kSpaceBlock));
      if (std::any_of(begin, end, [](std::byte b) { return b != std::byte{0}; })) allocate(block);
    }
  }
  // Changes the disk at once, as a guest's write that the source disk has completed.
  void change(Offset offset, std::span<const std::byte> bytes) {
    apply(offset.bytes(), bytes.data(), bytes.size());
  }

  void flush() {
    for (const std::uint64_t block : unsynced_) {
      copy_block(block, written_, synced_);
    }
    unsynced_.clear();
  }
  // Power off: see the fault model. The image may be used again at once.
  void crash() {
    for (const std::uint64_t block : unsynced_) {
      if (random_.one_in(2)) copy_block(block, written_, synced_);
    }
    unsynced_.clear();
    written_ = synced_;
    writing_.clear();
    in_flight_ = 0;
    ++epoch_;
  }

  void fail_next_reads(unsigned count) { failing_reads_ = count; }
  void fail_next_writes(unsigned count, Code code = Code::Io) {
    failing_writes_ = count;
    failing_code_ = code;
  }

  [[nodiscard]] std::size_t in_flight() const { return in_flight_; }
  // How often a write was issued that overlapped another in flight after widening to `alignment`.
  [[nodiscard]] std::uint64_t overlaps() const { return overlaps_; }
  [[nodiscard]] const FakeImageOptions& options() const { return options_; }

  // They must not outlive the image. After crash() open new ones.
  std::unique_ptr<blockcopy::ImageReader> open_reader() { return std::make_unique<Reader>(*this); }
  std::unique_ptr<blockcopy::ImageWriter> open_writer() { return std::make_unique<Writer>(*this); }

 private:
  static constexpr std::uint64_t kSpaceBlock = 4096;
  static constexpr std::uint64_t kSector = 512;
  static constexpr std::size_t kMaxPieces = 4;
  static constexpr std::size_t kMaxRuns = 8;  // in one answer of extents()

  // One of a request's pieces: the bytes [begin, end).
  struct Piece {
    std::uint64_t begin;
    std::uint64_t end;
  };

  struct Write {
    Extent extent;
    const std::byte* data;  // null: zeroes
    blockcopy::Done done;
    std::size_t* outstanding;
    Extent blocks;                 // what is really written
    std::vector<std::byte> first;  // the blocks at its ends, as they were found
    std::vector<std::byte> last;
    std::size_t pieces = 0;
    Status status;
    std::list<Extent>::iterator in_writing;
  };

  struct Read {
    Offset offset;
    std::span<std::byte> buffer;
    blockcopy::Done done;
    std::size_t* outstanding;
    std::size_t pieces = 0;
    Status status;
  };

  // A step of a request: forgotten if the image crashes before.
  void step(std::function<void()> what) {
    schedule_([this, epoch = epoch_, what = std::move(what)] {
      if (epoch == epoch_) what();
    });
  }

  std::vector<Piece> cut(const Extent& extent, std::uint64_t unit) {
    const std::uint64_t begin = extent.offset.bytes();
    const std::uint64_t end = extent.end().bytes();
    std::set<std::uint64_t> cuts = {begin};
    const std::uint64_t units = (end - begin) / unit;
    for (std::size_t i = 1; i < kMaxPieces && units > 1; ++i) {
      cuts.insert(begin / unit * unit + (1 + random_.below(units)) * unit);
    }
    std::vector<Piece> pieces;
    for (auto cut = cuts.begin(); cut != cuts.end() && *cut < end; ++cut) {
      const auto next = std::next(cut);
      pieces.push_back({*cut, next == cuts.end() ? end : std::min(*next, end)});
    }
    return pieces;
  }

  Error injected(const char* doing, const Extent& extent, Code code) const {
    return Error{code,
                 std::string(doing) + " the fake image, " + std::to_string(extent.length.bytes()) +
                     " at " + std::to_string(extent.offset.bytes()) + ": injected",
                 {},
                 false};
  }

  void read(Read request) {
    ++in_flight_;
    auto op = std::make_shared<Read>(std::move(request));
    const Extent extent{op->offset, Length(op->buffer.size())};
    const bool fails =
        failing_reads_ > 0 || (options_.read_errors != 0 && random_.one_in(options_.read_errors));
    if (fails) {
      if (failing_reads_ > 0) --failing_reads_;
      op->status = tl::unexpected(injected("reading", extent, Code::Io));
    }
    const std::vector<Piece> pieces = cut(extent, kSector);
    op->pieces = std::max<std::size_t>(1, pieces.size());
    if (pieces.empty()) step([this, op] { piece_read(op, {0, 0}); });
    for (const Piece piece : pieces) step([this, op, piece] { piece_read(op, piece); });
  }

  void piece_read(const std::shared_ptr<Read>& op, Piece piece) {
    if (op->status && piece.end > piece.begin) {
      std::memcpy(op->buffer.data() + (piece.begin - op->offset.bytes()),
                  written_.data() + piece.begin, piece.end - piece.begin);
    }
    if (--op->pieces != 0) return;
    step([this, op] { finish(*op); });
  }

  void write(Write request) {
    ++in_flight_;
    auto op = std::make_shared<Write>(std::move(request));
    op->blocks = op->extent;
    if (op->extent.length > Length()) {
      op->blocks = widen(op->extent, options_.alignment);
      op->blocks.length = std::min(op->blocks.end(), Offset(written_.size())) - op->blocks.offset;
    }
    for (const Extent& other : writing_) overlaps_ += overlap(other, op->blocks) ? 1U : 0U;
    op->in_writing = writing_.insert(writing_.end(), op->blocks);
    if (failing_writes_ > 0) {
      --failing_writes_;
      op->status = tl::unexpected(injected("writing", op->extent, failing_code_));
    } else if (options_.write_errors != 0 && random_.one_in(options_.write_errors)) {
      op->status = tl::unexpected(injected("writing", op->extent, Code::Io));
    }
    step([this, op] { begin_write(op); });
  }

  void begin_write(const std::shared_ptr<Write>& op) {
    if (op->data != nullptr && !fits(op->extent)) {
      op->status = tl::unexpected(injected("writing", op->extent, Code::NoSpace));
      op->blocks.length = Length();
    }
    const std::uint64_t unit = options_.alignment.bytes();
    if (op->blocks.length > Length()) {
      op->first = block_at(op->blocks.offset.bytes());
      op->last = block_at((op->blocks.end().bytes() - 1) / unit * unit);
    }
    const std::vector<Piece> pieces = cut(op->blocks, unit);
    op->pieces = std::max<std::size_t>(1, pieces.size());
    if (pieces.empty()) step([this, op] { piece_written(op, {0, 0}); });
    for (const Piece piece : pieces) step([this, op, piece] { piece_written(op, piece); });
  }

  [[nodiscard]] std::vector<std::byte> block_at(std::uint64_t offset) const {
    const std::uint64_t end =
        std::min<std::uint64_t>(offset + options_.alignment.bytes(), written_.size());
    return {written_.begin() + static_cast<std::ptrdiff_t>(offset),
            written_.begin() + static_cast<std::ptrdiff_t>(end)};
  }

  void piece_written(const std::shared_ptr<Write>& op, Piece piece) {
    const bool skipped = !op->status && random_.one_in(2);
    if (!skipped && piece.end > piece.begin) {
      // What was found at the ends goes back with the new bytes.
      const std::uint64_t unit = options_.alignment.bytes();
      const std::uint64_t begin = op->extent.offset.bytes();
      const std::uint64_t end = op->extent.end().bytes();
      const std::uint64_t last_block = (op->blocks.end().bytes() - 1) / unit * unit;
      if (piece.begin < begin) {
        apply(piece.begin, op->first.data() + (piece.begin - op->blocks.offset.bytes()),
              std::min(begin, piece.end) - piece.begin);
      }
      if (piece.end > end) {
        const std::uint64_t from = std::max(end, piece.begin);
        apply(from, op->last.data() + (from - last_block), piece.end - from);
      }
      const std::uint64_t from = std::max(begin, piece.begin);
      const std::uint64_t to = std::min(end, piece.end);
      if (from < to) {
        if (op->data != nullptr) {
          apply(from, op->data + (from - begin), to - from);
        } else {
          const std::vector<std::byte> zeroes(to - from);
          apply(from, zeroes.data(), zeroes.size(), false);
        }
      }
    }
    if (--op->pieces != 0) return;
    step([this, op] {
      if (op->status && op->data == nullptr) free_space(op->extent);
      writing_.erase(op->in_writing);
      finish(*op);
    });
  }

  template <class Op>
  void finish(Op& op) {
    --in_flight_;
    --*op.outstanding;
    const blockcopy::Done done = std::move(op.done);
    done(std::move(op.status));
  }

  void apply(std::uint64_t offset, const std::byte* bytes, std::uint64_t count,
             bool allocating = true) {
    if (count == 0) return;
    std::memcpy(written_.data() + offset, bytes, count);
    for (std::uint64_t s = offset / kSector; s <= (offset + count - 1) / kSector; ++s) {
      unsynced_.insert(s);
    }
    if (!allocating) return;
    for (std::uint64_t b = offset / kSpaceBlock; b <= (offset + count - 1) / kSpaceBlock; ++b) {
      allocate(b);
    }
  }

  void copy_block(std::uint64_t sector, const std::vector<std::byte>& source,
                  std::vector<std::byte>& target) {
    const std::uint64_t begin = sector * kSector;
    const std::uint64_t count = std::min<std::uint64_t>(kSector, source.size() - begin);
    std::memcpy(target.data() + begin, source.data() + begin, count);
  }

  void allocate(std::uint64_t block) {
    if (!allocated_[block]) ++allocated_blocks_;
    allocated_[block] = true;
  }
  [[nodiscard]] bool fits(const Extent& extent) const {
    if (options_.space == Length() || extent.length == Length()) return true;
    std::uint64_t needed = allocated_blocks_;
    const std::uint64_t last = (extent.end().bytes() - 1) / kSpaceBlock;
    for (std::uint64_t b = extent.offset.bytes() / kSpaceBlock; b <= last; ++b) {
      needed += allocated_[b] ? 0U : 1U;
    }
    return needed * kSpaceBlock <= options_.space.bytes();
  }
  void free_space(const Extent& extent) {
    const std::uint64_t first = (extent.offset.bytes() + kSpaceBlock - 1) / kSpaceBlock;
    const std::uint64_t end = extent.end() == Offset(written_.size())
                                  ? allocated_.size()
                                  : extent.end().bytes() / kSpaceBlock;
    for (std::uint64_t b = first; b < end; ++b) {
      if (allocated_[b]) --allocated_blocks_;
      allocated_[b] = false;
    }
  }

  // How [range] is mapped when the step runs.
  std::vector<blockcopy::MappedExtent> mapped(const Extent& range) {
    std::vector<blockcopy::MappedExtent> runs;
    const std::size_t limit = 1 + random_.below(kMaxRuns);
    std::uint64_t position = range.offset.bytes();
    while (position < range.end().bytes() && runs.size() <= limit) {
      const std::uint64_t block = position / kSpaceBlock;
      const std::uint64_t end = std::min((block + 1) * kSpaceBlock, range.end().bytes());
      const bool data = allocated_[block];
      if (!runs.empty() && runs.back().data == data) {
        runs.back().extent.length += Length(end - position);
      } else if (runs.size() < limit) {
        runs.push_back({Extent{Offset(position), Length(end - position)}, data});
      } else {
        break;
      }
      position = end;
    }
    return runs;
  }

  class Reader final : public blockcopy::ImageReader {
   public:
    explicit Reader(FakeImage& image) : image_(image), epoch_(image.epoch_) {}
    ~Reader() override {
      CHECK(outstanding_ == 0 || epoch_ != image_.epoch_,
            "a reader goes when its requests are done");
    }
    [[nodiscard]] Length size() const override { return image_.size(); }
    [[nodiscard]] Length alignment() const override { return image_.options_.alignment; }
    void read(Offset offset, std::span<std::byte> buffer, blockcopy::Done done) override {
      CHECK(offset.bytes() + buffer.size() <= size().bytes(), "a read stays inside the disk");
      CHECK(epoch_ == image_.epoch_, "a reader does not outlive a crash");
      ++outstanding_;
      image_.read({offset, buffer, std::move(done), &outstanding_});
    }
    void extents(Extent range, blockcopy::ExtentsDone done) override {
      CHECK(range.length > Length() && range.end().bytes() <= size().bytes(),
            "extents are asked for inside the disk");
      ++outstanding_;
      image_.step([this, range, done = std::move(done)]() mutable {
        image_.step([this, found = image_.mapped(range), done = std::move(done)] {
          --outstanding_;
          done(found);
        });
      });
    }

   private:
    FakeImage& image_;
    std::uint64_t epoch_;
    std::size_t outstanding_ = 0;
  };

  class Writer final : public blockcopy::ImageWriter {
   public:
    explicit Writer(FakeImage& image) : image_(image), epoch_(image.epoch_) {}
    ~Writer() override {
      CHECK(outstanding_ == 0 || epoch_ != image_.epoch_,
            "a writer goes when its requests are done");
    }
    [[nodiscard]] Length size() const override { return image_.size(); }
    [[nodiscard]] Length alignment() const override { return image_.options_.alignment; }
    void write(Offset offset, std::span<const std::byte> buffer, blockcopy::Done done) override {
      issue(Extent{offset, Length(buffer.size())}, buffer.data(), std::move(done));
    }
    void write_zeroes(Extent extent, blockcopy::Done done) override {
      issue(extent, nullptr, std::move(done));
    }

   private:
    void issue(const Extent& extent, const std::byte* data, blockcopy::Done done) {
      CHECK(extent.end().bytes() <= size().bytes(), "a write stays inside the disk");
      CHECK(epoch_ == image_.epoch_, "a writer does not outlive a crash");
      ++outstanding_;
      Write request{};
      request.extent = extent;
      request.data = data;
      request.done = std::move(done);
      request.outstanding = &outstanding_;
      image_.write(std::move(request));
    }
    FakeImage& image_;
    std::uint64_t epoch_;
    std::size_t outstanding_ = 0;
  };

  const FakeImageOptions options_;
  Random random_;
  const Schedule schedule_;
  std::vector<std::byte> written_;
  std::vector<std::byte> synced_;
  std::vector<bool> allocated_;
  std::uint64_t allocated_blocks_ = 0;
  std::set<std::uint64_t> unsynced_;  // sectors
  std::list<Extent> writing_;         // widened, in flight
  std::size_t in_flight_ = 0;
  std::uint64_t overlaps_ = 0;
  std::uint64_t epoch_ = 0;
  unsigned failing_reads_ = 0;
  unsigned failing_writes_ = 0;
  Code failing_code_ = Code::Io;
};

// The life of a target around a FakeImage, which must outlive it. Takes any Loop and does not use
// it.
class FakeTarget final : public blockcopy::TargetImage {
 public:
  FakeTarget(FakeImage& image, blockcopy::TargetSpec spec)
      : image_(image), spec_(std::move(spec)) {}
  ~FakeTarget() override = default;

  [[nodiscard]] const blockcopy::TargetSpec& spec() const override { return spec_; }
  [[nodiscard]] bool initially_zero() const override { return image_.options().initially_zero; }
  [[nodiscard]] blockcopy::ImageIdentity identity() const override { return {}; }
  Result<std::unique_ptr<blockcopy::ImageReader>> open_reader(Loop& /*loop*/) override {
    CHECK(!released_, "a released image has no readers");
    return image_.open_reader();
  }
  Result<std::unique_ptr<blockcopy::ImageWriter>> open_writer(Loop& /*loop*/) override {
    return open_writer();
  }
  Result<std::unique_ptr<blockcopy::ImageWriter>> open_writer() {
    CHECK(!released_, "a released image has no writers");
    return image_.open_writer();
  }
  // The next flush fails, and so do all after it.
  void fail_flush() { fail_flush_ = true; }
  Status flush() override {
    CHECK(!released_, "a released image is not flushed");
    if (fail_flush_) return fail(Code::Io, "flushing the fake image: injected");
    image_.flush();
    return {};
  }
  Status release() override {
    if (released_) return {};
    const Status flushed = flush();
    released_ = true;
    return flushed;
  }
  Status remove() override {
    released_ = true;
    removed_ = true;
    return {};
  }
  [[nodiscard]] bool released() const { return released_; }
  [[nodiscard]] bool removed() const { return removed_; }

 private:
  FakeImage& image_;
  const blockcopy::TargetSpec spec_;
  bool fail_flush_ = false;
  bool released_ = false;
  bool removed_ = false;
};

}  // namespace drover::fakes
