// SPDX-License-Identifier: Apache-2.0
#include "mirror/apply.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace drover::mirror {

Applier::Applier(std::vector<Disk> disks, Answer answer)
    : Applier(std::move(disks), std::move(answer), Options()) {}

Applier::Applier(std::vector<Disk> disks, Answer answer, Options options)
    : disks_(std::move(disks)), answer_(std::move(answer)), options_(options) {
  for (const Disk& disk : disks_) {
    CHECK(disk.writer->alignment() <= kBlock, "the runs of one frame must not share a block");
  }
}

Applier::~Applier() { CHECK(frames_.empty(), "an applier is drained before it goes"); }

void Applier::apply(const FrameHeader& header, Buffer buffer, const std::vector<Run>& runs) {
  CHECK(header.disk < disks_.size(), "headers are checked before they get here");
  Frame& frame = frames_.emplace_back();
  frame.header = header;
  frame.buffer = std::move(buffer);
  frame.runs = runs;
  frame.blocks = widen(header.extent, disks_[header.disk].writer->alignment());
  for (auto earlier = frames_.begin(); &*earlier != &frame; ++earlier) {
    if (earlier->header.disk == header.disk && overlap(earlier->blocks, frame.blocks)) {
      ++frame.blocked_by;
    }
  }
  if (frame.blocked_by == 0 || options_.mutation_ignore_overlap) start(std::prev(frames_.end()));
}

void Applier::start(std::list<Frame>::iterator frame) {
  frame->started = true;
  if (frame->header.type == FrameType::Compare) return compare(frame);
  if (frame->header.type == FrameType::Offer) return gather(frame);
  write(frame);
}

void Applier::write(std::list<Frame>::iterator frame) {
  blockcopy::ImageWriter& writer = *disks_[frame->header.disk].writer;
  const bool fresh = (frame->header.flags & kFlagFresh) != 0;
  frame->outstanding = 1;  // held until all runs are issued
  for (const Run& run : frame->runs) {
    if (run.bytes.empty() && fresh) continue;
    ++frame->outstanding;
    auto done = [this, frame](Status status) {
      if (!status && frame->status) frame->status = std::move(status);
      if (--frame->outstanding == 0) finish(frame);
    };
    if (run.bytes.empty()) {
      writer.write_zeroes(run.extent, std::move(done));
    } else {
      writer.write(run.extent.offset, run.bytes, std::move(done));
    }
  }
  if (--frame->outstanding == 0) finish(frame);
}

void Applier::compare(std::list<Frame>::iterator frame) {
  const Extent extent = frame->header.extent;
  CHECK(frame->buffer.bytes().size() >= extent.length.bytes(), "there is room for what is read");
  // The content is read to where they are.
  frame->hashes.assign(frame->runs.front().bytes.begin(), frame->runs.front().bytes.end());
  frame->runs.clear();
  const std::span<std::byte> content = frame->buffer.bytes().first(extent.length.bytes());
  disks_[frame->header.disk].reader->read(extent.offset, content, [this, frame, content](Status status) {
    frame->status = std::move(status);
    if (frame->status) frame->differing = compare_blocks(content, frame->hashes);
    finish(frame);
  });
}

// Where an offer's extent is on a disk.
class Applier::Place final : public OfferedChunk::Place {
 public:
  Place(const Disk& disk, Offset offset) : disk_(disk), offset_(offset) {}
  blockcopy::Sharing share(int fd, Offset from, std::size_t at, Length length) override {
    return disk_.writer->share(fd, from, {offset_ + Length(at), length});
  }
  void read(std::size_t at, std::span<std::byte> buffer, blockcopy::Done done) override {
    disk_.reader->read(offset_ + Length(at), buffer, std::move(done));
  }

 private:
  const Disk& disk_;
  const Offset offset_;
};

void Applier::gather(std::list<Frame>::iterator frame) {
  const Extent extent = frame->header.extent;
  CHECK(frame->buffer.bytes().size() >= extent.length.bytes(), "there is room for what is read");
  Offer offer = decode_offer(frame->header, frame->runs.front().bytes);
  frame->runs.clear();
  frame->place = std::make_unique<Place>(disks_[frame->header.disk], extent.offset);
  frame->offered = std::make_unique<OfferedChunk>(
      std::move(offer), options_.known, *frame->place,
      frame->buffer.bytes().first(extent.length.bytes()), options_.offers);
  frame->offered->gather([this, frame] { use_what_was_found(frame); });
}

// As a Copy of the pieces that were found and of those that are zero, as thin as one; and of zeroes
// over what was tried and is missing.
void Applier::use_what_was_found(std::list<Frame>::iterator frame) {
  const std::unique_ptr<OfferedChunk> offered = std::move(frame->offered);
  const Offer& offer = offered->offer();
  const Extent extent = frame->header.extent;
  const BlockMask data = data_blocks(offer, extent);
  const std::size_t blocks = (extent.length + kBlock - Length(1)) / kBlock;
  const std::size_t in_a_piece = offer.piece / kBlock;
  const std::span<std::byte> content = frame->buffer.bytes().first(extent.length.bytes());
  for (std::size_t i = 0; i < blocks; ++i) {
    const std::size_t piece = i / in_a_piece;
    const bool missing = data.contains(i) && !offered->found(piece);
    if (missing) frame->differing.set(i);
    if (missing && !offered->spoiled(piece)) continue;
    const Offset start = extent.offset + kBlock * i;
    const Length length = std::min(kBlock, extent.end() - start);
    const auto bytes = content.subspan((start - extent.offset).bytes(), length.bytes());
    // Another guest's bytes never stay, not even until the source sends its own: it may not.
    if (missing) std::ranges::fill(bytes, std::byte{0});
    if (data.contains(i) && !missing) found_ += length;
    if (offered->shared(piece)) continue;
    const bool zero = !data.contains(i) || (all_zero(bytes) && !offered->spoiled(piece));
    if (!frame->runs.empty() && frame->runs.back().extent.end() == start &&
        frame->runs.back().bytes.empty() == zero) {
      Run& run = frame->runs.back();
      run.extent.length += length;
      if (!zero) run.bytes = {run.bytes.data(), run.bytes.size() + bytes.size()};
    } else {
      frame->runs.push_back({{start, length}, zero ? std::span<const std::byte>() : bytes});
    }
  }
  write(frame);
}

void Applier::finish(std::list<Frame>::iterator frame) {
  std::list<Frame> finished;
  const auto next = std::next(frame);
  finished.splice(finished.begin(), frames_, frame);
  for (auto later = next; later != frames_.end();) {
    const auto candidate = later++;
    if (candidate->header.disk != frame->header.disk ||
        !overlap(candidate->blocks, frame->blocks)) {
      continue;
    }
    --candidate->blocked_by;
    // A frame without anything to write finishes inside start(), and takes others with it: those
    // come after it in the list, so `later` may be gone. Start it last.
    if (candidate->blocked_by == 0 && !candidate->started) ready_.push_back(candidate);
  }
  Result<BlockMask> differing = frame->differing;
  if (!frame->status) differing = fail(std::move(frame->status).error());
  answer_(frame->header.sequence, frame->header.disk, std::move(differing));
  finished.clear();  // gives the buffer back
  while (!ready_.empty()) {
    const auto first = ready_.front();
    ready_.pop_front();
    start(first);
  }
  if (frames_.empty() && idle_) std::exchange(idle_, nullptr)();
}

void Applier::when_idle(std::function<void()> idle) {
  if (frames_.empty()) return idle();
  idle_ = std::move(idle);
}

}  // namespace drover::mirror
