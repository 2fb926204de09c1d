// SPDX-License-Identifier: Apache-2.0
//
// The target's end of one lane, without sockets: takes decoded frames in the order they arrived,
// writes them to the disks' images so that of two frames that touch the same blocks the later one
// wins, and answers each when it is applied.
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

namespace drover::mirror {

class Applier {
 public:
  // sequence and disk of the frame; error: the frame could not be applied.
  using Answer = std::function<void(std::uint64_t sequence, std::uint16_t disk, Status status)>;
  struct Options {
    // Test switch: apply overlapping frames in any order (the simulation must notice).
    bool mutation_ignore_overlap = false;
  };

  Applier(std::vector<blockcopy::ImageWriter*> writers, Answer answer);
  Applier(std::vector<blockcopy::ImageWriter*> writers, Answer answer, Options options);
  ~Applier();  // nothing may be in flight (checked)
  Applier(const Applier&) = delete;
  Applier& operator=(const Applier&) = delete;

  // Takes one frame: Copy, Write or Zero, its header checked by decode_header(). `buffer` holds the
  // bytes that `runs` refers to and is kept until they are written.
  void apply(const FrameHeader& header, Buffer buffer, const std::vector<Run>& runs);

  [[nodiscard]] std::size_t in_flight() const { return frames_.size(); }
  // Calls back (once) when nothing is in flight any more; at once if nothing is.
  void when_idle(std::function<void()> idle);

 private:
  struct Frame {
    FrameHeader header;
    Buffer buffer;
    std::vector<Run> runs;
    Extent blocks;           // widened to the image's alignment
    unsigned blocked_by = 0; // earlier frames in flight that overlap
    unsigned outstanding = 0;
    bool started = false;
    Status status;
  };
  void start(std::list<Frame>::iterator frame);
  void finish(std::list<Frame>::iterator frame);

  std::vector<blockcopy::ImageWriter*> writers_;
  Answer answer_;
  Options options_;
  std::list<Frame> frames_;  // in the order they arrived
  std::deque<std::list<Frame>::iterator> ready_;  // no longer blocked, to be started
  std::function<void()> idle_;
};

}  // namespace drover::mirror
