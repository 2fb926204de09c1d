// SPDX-License-Identifier: Apache-2.0
//
// The source's data path of one job: the event loop with its thread, the link to the receiver, and for
// each disk its NBD server, its image reader and its mirror.
//
//   DROVER_ASSIGN(auto engine, MirrorEngine::create(options, events));
//   DROVER_TRY(engine->connect(link_options));        // the receiver is there
//   ... engine->link().call(reserve) ...
//   DROVER_TRY(engine->add_disk(...));                // from here on QEMU may connect
//   engine->start();                                  // copying begins
//   ... events.all_copied ... engine->enter_strict() ... events.all_copied ...
//   DROVER_TRY(engine->drain(5s));                    // the guest has stopped: nothing is on its way
//   engine->stop();
//
// Threads: the calls block and belong to one thread, the job's; status() may be called from any.
// Events come on the engine's thread: hand them on and return, call nothing of the engine's.
//
// Memory: bounded by the two buffer pools (kCopyBuffers, kWriteBuffers of a chunk each) whatever the
// disks' sizes, plus what the arbiters keep of the chunks (mirror/chunk_set.h: by what is in them).
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "base/units.h"
#include "blockcopy/image.h"
#include "mirror/disk_mirror.h"
#include "mirror/link.h"

namespace drover::mirror {

class MirrorEngine {
 public:
  static constexpr std::size_t kCopyBuffers = 32;
  static constexpr std::size_t kWriteBuffers = 96;
  // Chunks of one disk being read or on their way at once: more only lengthens the queues in which the
  // guest's own reads and writes stand, on the disk and on the wire.
  static constexpr std::size_t kMaxCopies = 8;
  // The same outside strict mode while neither set_bandwidth() nor set_read_rate() limits anything, for the guest asks next
  // to nothing: what a flush of the target holds up is then no reason to read nothing. (What is on its way when the link
  // goes down is sent again.)
  static constexpr std::size_t kMaxCopiesUnlimited = 32;
  // With fewer write buffers left than this, what is on its way to the target is given up (and copied
  // again), so that QEMU's requests can always be received: the guest waits for no buffer.
  static constexpr std::size_t kSpareWriteBuffers = 24;
  // A guest that writes all the time may keep making a few chunks Pending again for ever; in strict mode
  // it no longer can, and so much is copied in a moment.
  static constexpr Length kHandoverRest = 32_MiB;

  struct Options {
    Length chunk_size = kMaxChunk;
    Length bandwidth;  // of the copy, per second; zero: no limit
    // What may be copied and not flushed before no more is begun, outside strict mode: a target
    // that takes more than it can write would have to write it when the guest stands still, or lose
    // it with its host. Zero: no limit, for those who never flush.
    Length max_unflushed;
    Length handover_rest = kHandoverRest;
    Arbiter::Options arbiter;  // bounds and mutations; disk, chunks and lanes are filled in
    // Starts the watchdog (endpoint_watchdog.h) that keeps the guest from waiting for a process that
    // stands still; empty: none.
    std::vector<std::string> watchdog_command;
  };
  struct Disk {
    std::string name;  // "vda"
    Length size;
    std::variant<blockcopy::RawSource, blockcopy::NbdSource> source;
    std::optional<NbdServerOptions> server;  // where QEMU's mirror connects; none: nobody writes
    bool target_initially_zero = true;
  };
  struct Events {
    // Not strict: at most handover_rest is left to copy, the handover may begin. Strict: nothing is left
    // on any disk. Again each time that becomes true.
    std::function<void(bool strict)> all_copied;
    // verify() found other bytes on the target than were sent; they are sent again. May be empty.
    std::function<void(const std::string& disk, Extent extent)> damaged;
    // Strict mode ended because the target does not take what the guest waits for.
    std::function<void(const Error&)> strict_ended;
    // The link is down (strict mode has ended) and tries to come up again; it is up again, with the
    // target's images as the receiver names them.
    std::function<void(const Error&)> link_down;
    std::function<void(const std::vector<TargetDisk>&)> link_up;
    // The link stays down.
    std::function<void(const Error&)> link_lost;
    // A disk could not be read here or written there: the job can't succeed.
    std::function<void(const std::string& disk, const Error&)> disk_failed;
    // QEMU's mirror job let go of the disk. Another may connect.
    std::function<void(const std::string& disk, const Error&)> mirror_gone;
    // The group's record (mirror/arbiter.h), to be stored before this returns: something is about to be sent to
    // chunks of it for the first time. False: it can't be stored; then nothing is sent any more. May be empty: nothing
    // is resumed later.
    std::function<bool(std::size_t disk, GroupRecord record)> touching;
  };

  static Result<std::unique_ptr<MirrorEngine>> create(const Options& options, Events events);
  virtual ~MirrorEngine() = default;  // stop()s

  virtual Status connect(LinkOptions options) = 0;
  [[nodiscard]] virtual Link& link() = 0;  // connect() was successful
  // In the order of LinkOptions::disk_sizes. Opens the source image and listens for QEMU.
  virtual Status add_disk(const Disk& disk) = 0;
  virtual void start() = 0;
  // Every disk must have been copied once; Busy while the link is down.
  virtual Status enter_strict() = 0;
  virtual void leave_strict() = 0;
  // Has what is on the target's stable storage compared with the source, chunk by chunk, in turns
  // with what is left to copy, from the end of a flush on that was begun after this call
  // (flush_begin()); mirror/arbiter.h says what that proves.
  virtual void verify() = 0;
  // Of what the copy sends, at most: its blocks before they are compressed, of a comparison the
  // hashes. Zero: no limit. Until set_read_rate() is called for the first time a comparison is
  // charged what it reads.
  virtual void set_bandwidth(Length per_second) = 0;
  // Of what is read of the source's disks to be sent or compared. Zero: no limit.
  virtual void set_read_rate(Length per_second) = 0;
  // No new reads of the source from now on; the mirrors still answer QEMU.
  virtual void stop_copying() = 0;

  // --- to survive crashes; mirror/arbiter.h says in which order; disks by their place ---
  // Before start(), for every record that was stored.
  virtual Status restore(std::size_t disk, const GroupRecord& record, bool unflushed_lost) = 0;
  // Instead, where the records can't be trusted: the target may have anything, all of it is to be copied.
  virtual void restore_nothing() = 0;
  // After it, and before QEMU's mirrors connect: where the target reads as zeroes, as {"op":"map"}
  // says.
  virtual void restore_holes(std::size_t disk, const std::vector<Extent>& holes) = 0;
  // What the target's images are, when the link did not say it with link_up. Another instance or image than
  // before: what was lost with it is to be copied again.
  virtual void know_targets(const std::vector<TargetDisk>& target_disks) = 0;
  // To be copied (again).
  virtual void mark_pending(std::size_t disk, const std::vector<Extent>& extents) = 0;
  // Groups from `first` on that have changed since their record was taken.
  virtual Arbiter::Records take_records(std::size_t disk, GroupIndex first, std::size_t most) = 0;
  // Around {"op":"flush"}: what was acknowledged before is on the target's stable storage once it is done.
  virtual std::vector<FlushId> flush_begin() = 0;
  virtual void flush_ended(const std::vector<FlushId>& ids, bool done) = 0;

  // Waits until every write that QEMU sent has been applied on the target and no chunk is left to copy.
  // Unreachable at once when the link is or goes down.
  virtual Status drain(std::chrono::milliseconds timeout) = 0;
  // Ends copying, the NBD servers (QEMU drops its mirror jobs) and the link. Idempotent.
  virtual void stop() = 0;

  struct DiskStatus {
    std::string name;
    Length size;
    Length data;    // what had to be copied when copying began (holes are not); 0: not known yet
    Length left;    // to be copied or on its way, now
    DiskMirror::Counters counters;
    Length to_verify;  // what verify() has not seen yet
    std::uint64_t damaged = 0;     // chunks that verify() found so, and had sent again
    std::uint64_t unverified = 0;  // chunks that it can't vouch for: the guest writes there all the time
    std::uint64_t expired = 0;  // writes that were not forwarded, or given up: copied again
    bool connected = false;     // QEMU's mirror; what ended before this was asked is seen
  };
  struct LinkOutage {
    Instant since;
    Error why;  // the connection's end, not the latest attempt's
    bool final = false;  // nothing is tried any more
  };
  struct EngineStatus {
    std::vector<DiskStatus> disks;
    bool strict = false;
    bool copied = false;  // the link is up and at most handover_rest is left
    Length unflushed;     // acknowledged by the target since its last flush
    LinkCounters link;
    std::optional<LinkOutage> link_down;
  };
  [[nodiscard]] virtual EngineStatus status() const = 0;
};

}  // namespace drover::mirror
