// SPDX-License-Identifier: Apache-2.0
//
// What the engine decides, without a thread of its own: which disk copies next, when everything is
// copied, what becomes of strict mode when the link is lost, when nothing is on its way any more.
// Runs on any Loop, over any Link, readers and NBD servers, so the simulation runs this very class.
// mirror/engine.h is what a job uses; mirror/engine.cc puts a thread around this.
//
//   EngineCore core(loop, buffers, options, events);
//   core.use(std::move(link), lanes);          // made with core.answers()
//   DROVER_TRY(core.add_disk({...}, listen));
//   core.start();
//
// Threads: one, the loop's; no call blocks. Events may come from inside a call, except for those of
// enter_strict(), drain() and end(), which come from the loop. Destroy it before the loop and the
// buffers.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/loop.h"
#include "blockcopy/image.h"
#include "blockcopy/throttle.h"
#include "mirror/disk_mirror.h"
#include "mirror/engine.h"
#include "mirror/link.h"
#include "mirror/nbd_server.h"

namespace drover::mirror {

// Of a chunk each; writes may be given longer ones.
struct EngineBuffers {
  explicit EngineBuffers(Length chunk_size) : EngineBuffers(chunk_size, chunk_size) {}
  EngineBuffers(Length chunk_size, Length write_size)
      : copies(chunk_size, MirrorEngine::kCopyBuffers),
        writes(write_size, MirrorEngine::kWriteBuffers) {}
  BufferPool copies;
  BufferPool writes;
};

class EngineCore : private Answers {
 public:
  EngineCore(Loop& loop, EngineBuffers& buffers, const MirrorEngine::Options& options,
             MirrorEngine::Events events);
  ~EngineCore() override;

  // What the link reports to.
  [[nodiscard]] Answers& answers() { return *this; }
  // Before add_disk().
  void use(std::unique_ptr<Link> link, LaneIndex lanes);
  [[nodiscard]] Link& link();

  struct Disk {
    std::string name;  // "vda"
    Length size;       // as QEMU says
    std::unique_ptr<blockcopy::ImageReader> reader;
    bool target_initially_zero = true;
  };
  // Makes the server that QEMU's mirror connects to; its payloads lie in the pool.
  using Listen = std::function<Result<std::unique_ptr<NbdServer>>(BufferPool&, NbdServer::Events)>;
  // `listen` may be empty: nobody writes. Incompatible if the reader's size is not the disk's.
  Status add_disk(Disk disk, const Listen& listen);

  // As in MirrorEngine.
  void start();
  // What the target's images are. Another instance, or another image, than before: what was lost with the old one
  // is Pending again.
  void know_targets(const std::vector<TargetDisk>& target_disks);
  Status enter_strict();
  void leave_strict();
  [[nodiscard]] bool strict() const { return strict_; }
  void verify();
  void set_bandwidth(Length per_second);
  void set_read_rate(Length per_second);
  void stop_copying();
  [[nodiscard]] MirrorEngine::EngineStatus status() const;
  Status restore(std::size_t disk, const GroupRecord& record, bool unflushed_lost);
  void restore_nothing();
  void restore_holes(std::size_t disk, const std::vector<Extent>& holes);
  void mark_pending(std::size_t disk, const std::vector<Extent>& extents);
  Arbiter::Records take_records(std::size_t disk, GroupIndex first, std::size_t most);
  std::vector<FlushId> flush_begin();
  void flush_ended(const std::vector<FlushId>& ids, bool done);

  // Calls `done` once, when every write that QEMU sent has been applied on the target and no chunk
  // is left to copy, or with why that can't be reached any more; not after stop_draining().
  void drain(std::function<void(Status)> done);
  void stop_draining() { drained_ = nullptr; }
  // Ends copying and the NBD servers; calls `idle` once nothing is being read any more.
  void end(std::function<void()> idle);

 private:
  struct OneDisk {
    std::string name;
    std::unique_ptr<blockcopy::ImageReader> reader;
    std::unique_ptr<DiskMirror> mirror;
    std::unique_ptr<NbdServer> server;
    bool connected = false;
    Length data;  // to be copied when the holes were known
    bool data_known = false;
  };

  // Answers
  void applied(std::uint32_t lane, std::uint16_t disk, std::uint64_t token) override;
  void differs(std::uint32_t lane, std::uint16_t disk, std::uint64_t token,
               const BlockMask& blocks) override;
  void refused(std::uint32_t lane, std::uint16_t disk, std::uint64_t token,
               const Error& error) override;
  void link_down(const Error& error) override;
  void link_up(const std::vector<TargetDisk>& target_disks) override;
  void link_failed(const Error& error) override;

  [[nodiscard]] DiskMirror::Events mirror_events(OneDisk* disk);
  [[nodiscard]] NbdServer::Events server_events(OneDisk* disk);
  void give_up(const Error& error);
  void drain_ended(Status status);
  void pump();
  bool start_copies(OneDisk& disk);
  void settle();
  void arm_deadline();
  void deadline_passed();
  [[nodiscard]] Length left_of(const OneDisk& disk) const;
  [[nodiscard]] bool too_much_unflushed();
  [[nodiscard]] bool copied(Length rest) const;

  const MirrorEngine::Options options_;
  const MirrorEngine::Events events_;
  Loop& loop_;
  EngineBuffers& buffers_;
  std::unique_ptr<Link> link_;
  LaneIndex lanes_ = 1;
  std::vector<std::unique_ptr<OneDisk>> disks_;
  blockcopy::Throttle bandwidth_;
  std::optional<blockcopy::Throttle> read_rate_;  // none: bandwidth_ is charged what is read, too
  std::optional<Loop::Handle> throttle_timer_;
  Length begun_since_flush_;   // of copies
  Length begun_before_flush_;  // the one under way
  std::optional<Loop::Handle> deadline_timer_;
  Instant deadline_{};  // its time
  bool started_ = false;
  bool stopping_ = false;
  bool strict_ = false;
  bool told_copied_ = false;
  bool memory_passes_ = false;  // what the link was told last
  std::function<void(Status)> drained_;
  std::vector<TargetDisk> targets_;  // as the receiver named them last
  std::optional<MirrorEngine::LinkOutage> outage_;
  std::optional<Error> broken_;  // why the target can't become equal any more
  std::function<void()> idle_;
};

}  // namespace drover::mirror
