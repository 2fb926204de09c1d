// SPDX-License-Identifier: Apache-2.0
#include "mirror/engine_core.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace drover::mirror {

EngineCore::EngineCore(Loop& loop, EngineBuffers& buffers, const MirrorEngine::Options& options,
                       MirrorEngine::Events events)
    : options_(options),
      events_(std::move(events)),
      loop_(loop),
      buffers_(buffers),
      bandwidth_(options.bandwidth) {
  buffers_.copies.on_available([this] { loop_.post([this] { pump(); }); });
  buffers_.writes.on_available([this] {
    loop_.post([this] {
      for (const auto& disk : disks_) {
        if (disk->server) disk->server->buffers_available();
      }
    });
  });
}

EngineCore::~EngineCore() {
  link_.reset();
  disks_.clear();
  // The loop gives back the buffers it was receiving into; nobody waits for them any more.
  buffers_.copies.on_available(nullptr);
  buffers_.writes.on_available(nullptr);
}

void EngineCore::use(std::unique_ptr<Link> link, LaneIndex lanes) {
  link_ = std::move(link);
  lanes_ = lanes;
}

Link& EngineCore::link() {
  CHECK(link_ != nullptr, "connect() comes first");
  return *link_;
}

Status EngineCore::add_disk(Disk disk, const Listen& listen) {
  CHECK(!started_, "disks are added before copying begins");
  const auto index = static_cast<std::uint16_t>(disks_.size());
  auto one = std::make_unique<OneDisk>();
  one->name = disk.name;
  one->reader = std::move(disk.reader);
  if (one->reader->size() != disk.size) {
    return fail(Code::Incompatible,
                "disk " + disk.name + " is " + std::to_string(one->reader->size().bytes()) +
                    " bytes long, but QEMU says " + std::to_string(disk.size.bytes()),
                "was it resized just now? try again");
  }
  DiskMirror::Options options;
  options.disk = index;
  options.arbiter = options_.arbiter;
  options.arbiter.disk_size = disk.size;
  options.arbiter.chunk_size = options_.chunk_size;
  options.arbiter.lanes = lanes_;
  options.arbiter.first_lane = index % lanes_;  // small disks don't all use the first lane
  options.target_initially_zero = disk.target_initially_zero;
  options.max_copies = MirrorEngine::kMaxCopiesUnlimited;
  one->mirror = std::make_unique<DiskMirror>(options, *one->reader, link(), buffers_.copies,
                                             mirror_events(one.get()));
  if (listen) {
    DROVER_ASSIGN(one->server, listen(buffers_.writes, server_events(one.get())));
  }
  disks_.push_back(std::move(one));
  return {};
}

DiskMirror::Events EngineCore::mirror_events(OneDisk* disk) {
  DiskMirror::Events events;
  events.acknowledge = [disk](std::uint64_t id) {
    if (disk->server) disk->server->complete(id, 0);
  };
  events.failed = [this, disk](const Error& error) {
    if (stopping_) return;
    give_up(error);
    events_.disk_failed(disk->name, error);
  };
  events.changed = [this] { loop_.post([this] { pump(); }); };
  events.now = [this] { return loop_.now(); };
  events.damaged = [this, disk](Extent extent) {
    if (events_.damaged) events_.damaged(disk->name, extent);
  };
  if (events_.touching) {
    events.touching = [this, disk, index = disks_.size()](GroupIndex group) {
      return events_.touching(index, disk->mirror->take_record(group));
    };
  }
  return events;
}

NbdServer::Events EngineCore::server_events(OneDisk* disk) {
  NbdServer::Events events;
  events.request = [this, disk](NbdRequest request) {
    const auto scarce = [this] {
      return buffers_.writes.available() < MirrorEngine::kSpareWriteBuffers;
    };
    disk->mirror->guest(std::move(request), scarce());
    if (scarce()) {
      for (const auto& each : disks_) each->mirror->shed();
    }
    pump();
  };
  events.connected = [disk] { disk->connected = true; };
  events.disconnected = [this, disk](const Error& error) {
    disk->connected = false;
    if (!stopping_) events_.mirror_gone(disk->name, error);
  };
  return events;
}

void EngineCore::start() {
  for (const auto& disk : disks_) disk->mirror->start();
  started_ = true;
  pump();
}

Status EngineCore::enter_strict() {
  for (const auto& disk : disks_) {
    if (!disk->mirror->enter_strict()) {
      leave_strict();
      return fail(Code::Busy, "the handover can't begin: the link is down");
    }
  }
  strict_ = true;
  told_copied_ = false;
  // The caller is told from the loop, not from inside its own call. What held up copies until now
  // does so no longer.
  loop_.post([this] { pump(); });
  return {};
}

void EngineCore::leave_strict() {
  for (const auto& disk : disks_) disk->mirror->leave_strict();
  strict_ = false;
  told_copied_ = false;
  settle();
}

void EngineCore::verify() {
  for (const auto& disk : disks_) disk->mirror->verify();
  pump();
}

void EngineCore::set_bandwidth(Length per_second) {
  bandwidth_.set_rate(per_second);
  pump();
}

void EngineCore::set_read_rate(Length per_second) {
  if (!read_rate_) read_rate_.emplace();
  read_rate_->set_rate(per_second);
  pump();
}

void EngineCore::stop_copying() {
  for (const auto& disk : disks_) disk->mirror->stop();
}

void EngineCore::drain(std::function<void(Status)> done) {
  drained_ = std::move(done);
  loop_.post([this] {
    if (broken_) return drain_ended(fail(*broken_));
    if (outage_) return drain_ended(fail(outage_->why));
    settle();
  });
}

void EngineCore::end(std::function<void()> idle) {
  stopping_ = true;
  for (const auto& disk : disks_) {
    disk->mirror->stop();
    disk->server.reset();
  }
  idle_ = std::move(idle);
  loop_.post([this] { settle(); });
}

void EngineCore::applied(std::uint32_t /*lane*/, std::uint16_t disk, std::uint64_t token) {
  disks_[disk]->mirror->applied(token);
  pump();
}

void EngineCore::differs(std::uint32_t /*lane*/, std::uint16_t disk, std::uint64_t token,
                         const BlockMask& blocks) {
  disks_[disk]->mirror->differs(token, blocks);
  pump();
}

void EngineCore::refused(std::uint32_t /*lane*/, std::uint16_t disk, std::uint64_t token,
                         const Error& error) {
  // The target can't take what strict mode makes the guest wait for.
  leave_strict();
  Error told = error;
  told.message = "on the target: " + told.message;
  if (told.code == Code::NoSpace) {
    told.hint = "make room there, or choose another place with --disk";
  }
  disks_[disk]->mirror->refused(token, told);
}

void EngineCore::link_down(const Error& error) {
  for (const auto& disk : disks_) {
    for (LaneIndex lane = 0; lane < lanes_; ++lane) disk->mirror->lane_lost(lane);
  }
  strict_ = false;
  told_copied_ = false;
  outage_ = MirrorEngine::LinkOutage{.since = loop_.now(), .why = error};
  drain_ended(fail(error));
  if (!stopping_) events_.link_down(error);
  settle();
}

void EngineCore::link_up(const std::vector<TargetDisk>& target_disks) {
  outage_.reset();
  know_targets(target_disks);
  for (const auto& disk : disks_) {
    for (LaneIndex lane = 0; lane < lanes_; ++lane) disk->mirror->lane_up(lane);
  }
  if (!stopping_) events_.link_up(target_disks);
  pump();
}

void EngineCore::link_failed(const Error& error) {
  if (!outage_) outage_ = MirrorEngine::LinkOutage{.since = loop_.now(), .why = error};
  outage_->final = true;
  give_up(error);
  if (!stopping_) events_.link_lost(error);
}

// What the target had not flushed is lost with its instance; an image that was made anew holds nothing.
void EngineCore::know_targets(const std::vector<TargetDisk>& target_disks) {
  for (std::size_t i = 0; i < std::min(targets_.size(), target_disks.size()) && i < disks_.size(); ++i) {
    DiskMirror& mirror = *disks_[i]->mirror;
    if (targets_[i].id != target_disks[i].id) {
      mirror.mark_pending({Offset(0), mirror.arbiter().options().disk_size});
    } else if (targets_[i].instance != target_disks[i].instance) {
      mirror.target_lost_unflushed();
    }
  }
  targets_ = target_disks;
}

// Nobody need wait for the target any longer.
void EngineCore::give_up(const Error& error) {
  if (!broken_) broken_ = error;
  drain_ended(fail(error));
}

void EngineCore::drain_ended(Status status) {
  if (const auto done = std::exchange(drained_, nullptr)) done(std::move(status));
}

// Starts as many copies as buffers, windows and the bandwidth limit allow.
void EngineCore::pump() {
  if (started_ && !stopping_) {
    // One disk after the other: a spinning disk is not made to seek between images.
    for (const auto& disk : disks_) {
      if (!start_copies(*disk)) break;
    }
  }
  settle();
}

// False: no more may be started now, on any disk.
bool EngineCore::start_copies(OneDisk& disk) {
  // Without a read rate nobody has said how the guest fares.
  const bool limited = strict_ || bandwidth_.rate() != Length() || !read_rate_ || read_rate_->rate() != Length();
  const std::size_t most = limited ? MirrorEngine::kMaxCopies : MirrorEngine::kMaxCopiesUnlimited;
  while (true) {
    const Instant time = loop_.now();
    if (too_much_unflushed()) return false;
    if (disk.mirror->arbiter().copying() >= most) return true;
    Instant ready;
    if (!bandwidth_.may_start(time)) ready = bandwidth_.ready();
    if (read_rate_ && !read_rate_->may_start(time)) ready = std::max(ready, read_rate_->ready());
    if (ready > time) {
      if (!throttle_timer_) {
        throttle_timer_ = loop_.at(ready, [this] {
          throttle_timer_.reset();
          pump();
        });
      }
      return false;
    }
    const std::optional<DiskMirror::Cost> cost = disk.mirror->start_copy();
    if (!cost) return true;
    bandwidth_.take(time, read_rate_ ? cost->sent : std::max(cost->sent, cost->read));
    if (read_rate_) read_rate_->take(time, cost->read);
    if (!cost->compares) begun_since_flush_ += cost->sent;
  }
}

// What the guest writes does not count: the copy goes on with each flush, however much that is.
bool EngineCore::too_much_unflushed() {
  if (options_.max_unflushed == Length() || strict_) return false;
  if (begun_since_flush_ + begun_before_flush_ < options_.max_unflushed) return false;
  const bool comes_to_a_flush = std::ranges::any_of(disks_, [](const auto& disk) {
    return disk->mirror->arbiter().copying() > 0 ||
           disk->mirror->arbiter().not_durable() > Length();
  });
  // Else it was lost on the way: nobody will flush for it.
  if (!comes_to_a_flush) begun_since_flush_ = begun_before_flush_ = Length();
  return comes_to_a_flush;
}

// After anything has happened: timers, and what others wait for.
void EngineCore::settle() {
  arm_deadline();
  Length left;
  bool synchronised = true;
  bool idle = true;
  for (const auto& disk : disks_) {
    if (!disk->data_known && started_ && disk->mirror->scanned()) {
      disk->data_known = true;
      disk->data = left_of(*disk);
    }
    left += left_of(*disk);
    synchronised = synchronised && disk->mirror->arbiter().synchronised();
    idle = idle && disk->mirror->idle();
  }
  if (synchronised) drain_ended({});
  if (idle) {
    if (const auto told = std::exchange(idle_, nullptr)) told();
  }
  // A guest that discards makes chunks Pending again in strict mode; its memory waits for them, or
  // it could stop with more to copy than QEMU's export lives for.
  if (const bool passes = strict_ && left.bytes() == 0; link_ && !stopping_ && passes != memory_passes_) {
    memory_passes_ = passes;
    link_->let_memory_pass(passes);
  }
  const bool done = copied(strict_ ? Length() : options_.handover_rest);
  if (done && !std::exchange(told_copied_, true) && !stopping_) events_.all_copied(strict_);
  if (!done) told_copied_ = false;
}

// The link is up, the holes are known and at most `rest` is left.
bool EngineCore::copied(Length rest) const {
  Length left;
  for (const auto& disk : disks_) {
    if (!disk->mirror->scanned()) return false;
    left += left_of(*disk);
  }
  return started_ && !outage_ && left <= rest;
}

Status EngineCore::restore(std::size_t disk, const GroupRecord& record, bool unflushed_lost) {
  CHECK(!started_, "records are restored before copying begins");
  return disks_.at(disk)->mirror->restore(record.group, record.bytes, unflushed_lost);
}

void EngineCore::restore_nothing() {
  CHECK(!started_, "records are restored before copying begins");
  for (const auto& disk : disks_) disk->mirror->restore_nothing();
}

void EngineCore::restore_holes(std::size_t disk, const std::vector<Extent>& holes) {
  CHECK(!started_, "records are restored before copying begins");
  DiskMirror& mirror = *disks_.at(disk)->mirror;
  const Offset size(mirror.arbiter().options().disk_size.bytes());
  for (const Extent& hole : holes) {
    if (hole.offset < size && hole.end() <= size && hole.end() > hole.offset)
      mirror.restore_hole(hole);
  }
}

void EngineCore::mark_pending(std::size_t disk, const std::vector<Extent>& extents) {
  for (const Extent& extent : extents) disks_.at(disk)->mirror->mark_pending(extent);
  pump();
}

Arbiter::Records EngineCore::take_records(std::size_t disk, GroupIndex first, std::size_t most) {
  return disks_.at(disk)->mirror->take_records(first, most);
}

std::vector<FlushId> EngineCore::flush_begin() {
  std::vector<FlushId> ids;
  for (const auto& disk : disks_) ids.push_back(disk->mirror->flush_begin());
  begun_before_flush_ += std::exchange(begun_since_flush_, Length());
  return ids;
}

void EngineCore::flush_ended(const std::vector<FlushId>& ids, bool done) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (done) {
      disks_.at(i)->mirror->flush_done(ids[i]);
    } else {
      disks_.at(i)->mirror->flush_failed(ids[i]);
    }
  }
  if (!done) begun_since_flush_ += begun_before_flush_;
  begun_before_flush_ = Length();
  pump();
}

void EngineCore::arm_deadline() {
  std::optional<Instant> first;
  for (const auto& disk : disks_) {
    const auto deadline = disk->mirror->next_deadline();
    if (deadline && (!first || *deadline < *first)) first = deadline;
  }
  if (!first || (deadline_timer_ && deadline_ <= *first)) return;
  if (deadline_timer_) loop_.cancel(*deadline_timer_);
  deadline_ = *first;
  deadline_timer_ = loop_.at(*first, [this] { deadline_passed(); });
}

void EngineCore::deadline_passed() {
  deadline_timer_.reset();
  for (const auto& disk : disks_) disk->mirror->tick();
  if (strict_ && std::ranges::any_of(
                     disks_, [](const auto& disk) { return !disk->mirror->arbiter().strict(); })) {
    leave_strict();
    if (!stopping_) {
      events_.strict_ended({Code::Unreachable,
                            "the target did not take the guest's writes in time during the handover",
                            "is the link or the target's disk overloaded?", true});
    }
  }
  pump();
}

Length EngineCore::left_of(const OneDisk& disk) const {
  return disk.mirror->arbiter().options().disk_size - disk.mirror->arbiter().summary().copied;
}

MirrorEngine::EngineStatus EngineCore::status() const {
  MirrorEngine::EngineStatus status;
  status.strict = strict_;
  if (link_) status.link = link_->counters();
  status.link_down = outage_;
  status.copied = copied(options_.handover_rest);
  for (const auto& disk : disks_) status.unflushed += disk->mirror->arbiter().unflushed();
  for (const auto& disk : disks_) {
    MirrorEngine::DiskStatus one;
    one.name = disk->name;
    one.size = disk->mirror->arbiter().options().disk_size;
    one.data = disk->data;
    one.left = left_of(*disk);
    one.counters = disk->mirror->counters();
    const Arbiter::Summary summary = disk->mirror->arbiter().summary();
    one.expired = summary.expired;
    one.to_verify = options_.chunk_size * summary.to_verify;
    one.damaged = summary.damaged;
    one.unverified = summary.unverified;
    one.connected = disk->connected && disk->server && disk->server->client_is_there();
    status.disks.push_back(std::move(one));
  }
  return status;
}

}  // namespace drover::mirror
