// SPDX-License-Identifier: Apache-2.0
//
// One disk's mirror on the source: carries out what its arbiter decides. Takes QEMU's mirrored writes,
// reads chunks from the source image, hands both to the link's lanes in the arbiter's order, and answers
// QEMU.
//
//   DiskMirror mirror({.disk = 0, .arbiter = {...}}, reader, lanes, copy_buffers, events);
//   mirror.start();                       // finds the holes, then copies when pumped
//   while (mirror.start_copy()) {}        // as much as buffers and window allow
//
// Works on interfaces only (ImageReader, Lanes, Events), so the simulation runs this very class with
// fakes. Threads: one, the engine's; no call blocks. Destroy it when its reader has no request
// outstanding (idle()).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/buffer.h"
#include "blockcopy/image.h"
#include "mirror/arbiter.h"
#include "mirror/lanes.h"
#include "mirror/nbd_server.h"

namespace drover::mirror {

class DiskMirror {
 public:
  struct Options {
    std::uint16_t disk = 0;
    Arbiter::Options arbiter;
    // The target reads as zeroes where nothing was written: holes need not be sent.
    bool target_initially_zero = true;
    // Copies that may be on their way (read or unacknowledged) at once.
    std::size_t max_copies = 32;
  };
  struct Events {
    std::function<void(std::uint64_t id)> acknowledge;  // answer QEMU's request: done
    std::function<void(const Error&)> failed;           // the disk can't be copied: read or write error
    // The holes are known: start_copy() may succeed now. After stop(): it may be idle() now.
    std::function<void()> changed;
    std::function<Instant()> now;
    // Something is about to be sent to chunks of the group to which nothing was sent before:
    // take_record() it and store that before returning. May be empty: without a journal. (Called
    // once per 64 chunks.) False: it can't be stored. Then nothing is sent any more, so that what
    // the journal says stays right; the driver ends the move.
    std::function<bool(GroupIndex group)> touching;
    // verify() found that the target's content was not the source's; it is sent again.
    std::function<void(Extent extent)> damaged;
  };

  DiskMirror(const Options& options, blockcopy::ImageReader& reader, Lanes& lanes,
             BufferPool& copy_buffers, Events events);
  ~DiskMirror();
  DiskMirror(const DiskMirror&) = delete;
  DiskMirror& operator=(const DiskMirror&) = delete;

  // Asks the source for its holes; copying can begin when that is done.
  void start();
  // Starts the copy of one more chunk, and says what it costs. Nothing: there is nothing to copy,
  // the window is full, no buffer is free, or the holes are not known yet.
  struct Cost {
    Length sent;  // over the wire, at most: what is compressed or zeroes is less
    Length read;  // from the source
    bool compares = false;
  };
  std::optional<Cost> start_copy();
  // No new copies or scans from now on; what is in flight ends.
  void stop() { stopped_ = true; }
  [[nodiscard]] bool idle() const { return reads_ == 0 && !scanning_; }

  void guest(NbdRequest request, bool scarce = false);
  void applied(std::uint64_t token);
  void differs(std::uint64_t token, const BlockMask& blocks);
  void refused(std::uint64_t token, const Error& error);
  void lane_lost(LaneIndex lane);
  void lane_up(LaneIndex lane) { arbiter_.lane_up(lane); }
  void tick();
  void shed();  // buffers run short: give up what is on its way
  [[nodiscard]] std::optional<Instant> next_deadline() const { return arbiter_.next_deadline(); }
  void verify() { arbiter_.verify(); }
  [[nodiscard]] bool enter_strict() { return arbiter_.enter_strict(); }
  void leave_strict();

  // What mirror/arbiter.h says of them.
  void mark_pending(Extent range) { arbiter_.mark_pending(range); }
  FlushId flush_begin() { return arbiter_.flush_begin(); }
  void flush_done(FlushId id) { arbiter_.flush_done(id); }
  void flush_failed(FlushId id) { arbiter_.flush_failed(id); }
  void target_lost_unflushed() { arbiter_.target_lost_unflushed(); }
  GroupRecord take_record(GroupIndex group) { return arbiter_.take_record(group); }
  Arbiter::Records take_records(GroupIndex first, std::size_t most) {
    return arbiter_.take_records(first, most);
  }
  Status restore(GroupIndex group, std::string_view bytes, bool unflushed_lost) {  // before start()
    return arbiter_.restore(group, bytes, unflushed_lost);
  }
  void restore_nothing() { arbiter_.restore_nothing(); }
  void restore_hole(Extent hole) { arbiter_.restore_hole(hole); }

  struct Counters {
    std::uint64_t guest_writes = 0;     // requests that QEMU mirrored
    Length guest_bytes;                 // theirs
    std::uint64_t forwarded_writes = 0; // pieces sent on to the target
    Length forwarded_bytes;
    Length read_bytes;                  // read from the source by the copier
    std::uint64_t copies = 0;           // chunks sent, whole or in part, each time counted
    // In strict mode, where a guest's write may wait for the target.
    std::uint64_t strict_writes = 0;
    Duration strict_wait{};        // of all of them together
    Duration longest_wait{};       // of one
    Length compared;    // of chunks of which a hash was sent
    Length sent_again;  // bytes of copies of chunks for which something had been sent
  };
  [[nodiscard]] const Counters& counters() const { return counters_; }
  [[nodiscard]] const Arbiter& arbiter() const { return arbiter_; }
  // The holes are known (or need not be).
  [[nodiscard]] bool scanned() const { return started_ && !scanning_; }
  // Holes are known and nothing is left to copy.
  [[nodiscard]] bool all_copied() const;

 private:
  void scan_from(Offset at);
  void on_extents(Offset at, Result<std::vector<blockcopy::MappedExtent>> result);
  struct Read {
    CopyTicket ticket;
    Buffer buffer;
    std::size_t outstanding = 0;
    Status status;
  };
  Length read(const CopyTicket& ticket, Buffer buffer);
  void on_read(Read& read);
  void carry_out();
  void acknowledge(WriteId id);
  void touch(GroupIndex group);
  void forward(const Action& action);

  Options options_;
  blockcopy::ImageReader& reader_;
  Lanes& lanes_;
  BufferPool& copy_buffers_;
  Events events_;
  Arbiter arbiter_;
  Actions actions_;
  std::unordered_map<WriteId, NbdRequest> writes_;  // payloads still needed; look-ups only
  std::unordered_map<WriteId, Instant> strict_since_;  // look-ups only
  bool carrying_out_ = false;
  bool started_ = false;
  bool scanning_ = false;
  bool stopped_ = false;
  bool mute_ = false;  // the journal can't be written
  std::size_t reads_ = 0;
  Counters counters_;
};

}  // namespace drover::mirror
