// SPDX-License-Identifier: Apache-2.0
//
// The seam between the disks' mirrors (one thread, pure decisions) and the link (threads, sockets,
// TLS): what the source hands to a data connection, and what comes back. The link implements Lanes;
// the simulation has an implementation of its own.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "mirror/frame.h"

namespace drover::mirror {

// One frame to send. The link fills in encoding, checksum, payload length and sequence.
struct OutFrame {
  FrameType type = FrameType::Write;  // Copy, Write, Zero or Compare
  std::uint16_t disk = 0;
  Extent extent;
  bool fresh = false;                    // Copy: see kFlagFresh
  BlockMask blocks = BlockMask::all();   // Copy: which of the extent; see encode_copy()
  Buffer buffer;                         // keeps `content` alive; released once it is sent
  std::span<const std::byte> content;    // the extent's bytes; empty for Zero; Compare: what to compare with
  std::uint64_t token = 0;               // the sender's name for this frame; comes back in the answer
};

// Threads: used on the engine's thread only; answers come on it too (Answers, below).
class Lanes {
 public:
  virtual ~Lanes() = default;
  [[nodiscard]] virtual std::uint32_t count() const = 0;
  // Queues behind everything queued on this lane before. Never blocks; the sender bounds what it
  // queues (buffers, Arbiter::Options::max_forwarded). Frames are dropped while the link is down.
  virtual void send(std::uint32_t lane, OutFrame frame) = 0;
  // Drops a queued frame that was not begun yet; no answer will come for it. False: too late.
  // Tokens are names of one disk's.
  virtual bool abandon(std::uint32_t lane, std::uint16_t disk, std::uint64_t token) = 0;
};

// An image on the target, as its receiver names it.
struct TargetDisk {
  std::string path;
  // Another one: the image was made anew, and holds nothing.
  std::string id;
  // Another one: what the target had acknowledged but not flushed may be lost.
  std::string instance;
  bool operator==(const TargetDisk&) const = default;
};

class Answers {
 public:
  virtual ~Answers() = default;
  // The target applied the frame (its page cache or device has it; stable only after a flush).
  virtual void applied(std::uint32_t lane, std::uint16_t disk, std::uint64_t token) = 0;
  // A Compare found other content there, in these blocks of its extent; of a Copy that the lane
  // offered (mirror/offers.h) these could not be found there.
  virtual void differs(std::uint32_t lane, std::uint16_t disk, std::uint64_t token,
                       const BlockMask& blocks) = 0;
  // The target could not: disk error, no space. The frame's extent is undefined there.
  virtual void refused(std::uint32_t lane, std::uint16_t disk, std::uint64_t token,
                       const Error& error) = 0;
  // All connections are gone; no answer comes for anything sent before, and what is sent is
  // dropped.
  virtual void link_down(const Error& error) = 0;
  // They are up again. `disks`: the target's images, in the session's order; none if there are
  // none.
  virtual void link_up(const std::vector<TargetDisk>& disks) = 0;
  // They stay down: nothing more will be tried.
  virtual void link_failed(const Error& error) = 0;
};

}  // namespace drover::mirror
