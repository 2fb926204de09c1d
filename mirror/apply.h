// SPDX-License-Identifier: Apache-2.0
//
// The target's end of one lane, without sockets: takes decoded frames in the order they arrived,
// writes them to the disks' images so that of two frames that touch the same blocks the later one
// wins, and answers each when it is applied. A Compare reads in its turn what the frames before it
// wrote; an Offer writes what it finds in the host's other images.
//
// Threads: one per lane (the loop of its writers); lanes share nothing, because a chunk always
// travels on the same lane.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <vector>

#include "base/buffer.h"
#include "blockcopy/image.h"
#include "mirror/frame.h"
#include "mirror/known_content.h"
#include "mirror/offered_chunk.h"

namespace drover::mirror {

class Applier {
 public:
  struct Disk {
    blockcopy::ImageWriter* writer = nullptr;
    blockcopy::ImageReader* reader = nullptr;
  };
  // sequence and disk of the frame. The blocks of a Compare's extent that hold something else, or of
  // an Offer's that could not be found; none: applied.
  // Error: the frame could not be applied.
  using Answer =
      std::function<void(std::uint64_t sequence, std::uint16_t disk, Result<BlockMask> differing)>;
  struct Options {
    // Test switch: apply overlapping frames in any order (the simulation must notice).
    bool mutation_ignore_overlap = false;
    OfferedChunk::Options offers;
    KnownContent* known = nullptr;  // null: the host has nothing else
  };

  Applier(std::vector<Disk> disks, Answer answer);
  Applier(std::vector<Disk> disks, Answer answer, Options options);
  ~Applier();  // nothing may be in flight (checked)
  Applier(const Applier&) = delete;
  Applier& operator=(const Applier&) = delete;

  // Takes one frame: Copy, Write, Zero, Compare or Offer, its header checked by decode_header().
  // `buffer` holds the bytes that `runs` refers to and is kept until they are written; a Compare's
  // and an Offer's holds its extent's length, too, which is read to it.
  void apply(const FrameHeader& header, Buffer buffer, const std::vector<Run>& runs);

  // Bytes that were found in other images.
  [[nodiscard]] Length found() const { return found_; }
  [[nodiscard]] std::size_t in_flight() const { return frames_.size(); }
  // Calls back (once) when nothing is in flight any more; at once if nothing is.
  void when_idle(std::function<void()> idle);

 private:
  class Place;
  struct Frame {
    FrameHeader header;
    Buffer buffer;
    std::vector<Run> runs;
    Extent blocks;           // widened to the image's alignment
    unsigned blocked_by = 0; // earlier frames in flight that overlap
    unsigned outstanding = 0;
    bool started = false;
    Status status;
    std::vector<std::byte> hashes;  // Compare
    std::unique_ptr<OfferedChunk::Place> place;
    std::unique_ptr<OfferedChunk> offered;
    BlockMask differing;
  };
  void start(std::list<Frame>::iterator frame);
  void write(std::list<Frame>::iterator frame);
  void gather(std::list<Frame>::iterator frame);
  void use_what_was_found(std::list<Frame>::iterator frame);
  void compare(std::list<Frame>::iterator frame);
  void finish(std::list<Frame>::iterator frame);

  std::vector<Disk> disks_;
  Answer answer_;
  Options options_;
  std::list<Frame> frames_;  // in the order they arrived
  std::deque<std::list<Frame>::iterator> ready_;  // no longer blocked, to be started
  std::function<void()> idle_;
  Length found_;
};

}  // namespace drover::mirror
