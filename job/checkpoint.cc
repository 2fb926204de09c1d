// SPDX-License-Identifier: Apache-2.0
#include "job/checkpoint.h"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "mirror/session.h"

namespace drover::job {

using nlohmann::json;

std::string encode_targets(const std::vector<mirror::TargetDisk>& targets) {
  json list = json::array();
  for (const mirror::TargetDisk& one : targets) {
    list.push_back({{"path", one.path}, {"id", one.id}, {"instance", one.instance}});
  }
  return json{{"disks", list}}.dump();
}

Result<std::vector<mirror::TargetDisk>> decode_targets(std::string_view text) {
  DROVER_ASSIGN(const json object, mirror::parse_object(std::string(text), "what the journal says of the target"));
  const auto list = object.find("disks");
  if (list == object.end() || !list->is_array()) return fail(Code::Protocol, "\"disks\" is not a list");
  std::vector<mirror::TargetDisk> targets;
  for (const json& one : *list) {
    if (!one.is_object()) return fail(Code::Protocol, "a disk is not an object");
    mirror::TargetDisk target;
    DROVER_ASSIGN(target.path, mirror::get_string(one, "path"));
    DROVER_ASSIGN(target.id, mirror::get_string(one, "id"));
    DROVER_ASSIGN(target.instance, mirror::get_string(one, "instance"));
    targets.push_back(std::move(target));
  }
  return targets;
}

Status store_records(mirror::MirrorEngine& engine, RecordStore& store, std::size_t disks,
                     const std::optional<std::vector<mirror::TargetDisk>>& targets, Journal::Sync sync) {
  constexpr std::size_t kAtOnce = 4;  // the engine's thread is held up for each
  std::vector<RecordStore::One> changed;
  for (std::size_t disk = 0; disk < disks; ++disk) {
    std::optional<mirror::GroupIndex> next = 0;
    while (next) {
      mirror::Arbiter::Records records = engine.take_records(disk, *next, kAtOnce);
      for (mirror::GroupRecord& one : records.records) changed.push_back({disk, std::move(one)});
      next = records.next;
    }
  }
  Journal::Batch also;
  if (targets) also.put(kTargetsKey, encode_targets(*targets));
  return store.write(changed, std::move(also), sync);
}

FlushPlan plan_flushes(Length data) {
  // A flush costs a cache flush of the target's disk at least: not more often than this, however
  // small the disks are.
  constexpr Length kLeast = 8_MiB;
  constexpr Length kMost = 48_MiB;
  constexpr std::uint64_t kShare = 85;  // 1.2 %: 48 MiB of 4 GiB
  // While a flush is under way the copy goes on, so that it stands still only where the target's
  // disk is slower.
  constexpr std::uint64_t kGoesOn = 3;
  const Length share = data == Length() ? kMost : Length(data.bytes() / kShare);
  const Length every = std::clamp(share, kLeast, kMost);
  return {.every = every, .most = every * kGoesOn};
}

Checkpointer::Checkpointer(Platform& platform, Job job)
    : platform_(platform), job_(std::move(job)), generation_(job_.generation) {
  flushed_ = rotated_ = looked_ = platform_.now();
  thread_ = platform_.start_thread([this] { run(); });
}

void Checkpointer::note_targets(std::vector<mirror::TargetDisk> targets) {
  const std::lock_guard lock(mutex_);
  targets_ = std::move(targets);
}

void Checkpointer::stop() {
  stop_.store(true);
  thread_.reset();
}

void Checkpointer::run() {
  std::chrono::milliseconds pause = kLook;
  while (!stop_.load()) {
    platform_.sleep(pause);
    if (!stop_.load()) pause = look();
  }
}

// When the next flush will be due if what is to be flushed grows as it did in the last `span`: who comes late makes the
// copy stand still (FlushPlan::most).
std::chrono::milliseconds Checkpointer::pause_until_due(Length grown, Duration span) const {
  if (grown == Length()) return kLook;
  const Length left = job_.flush_every - std::min(unflushed_, job_.flush_every);
  const double share = static_cast<double>(left.bytes()) / static_cast<double>(grown.bytes());
  const std::chrono::duration<double, Duration::period> due = span * share;
  if (due >= kLook) return kLook;
  return std::max(std::chrono::duration_cast<std::chrono::milliseconds>(due), kLookSoon);
}

std::chrono::milliseconds Checkpointer::look() {
  const auto status = job_.engine.status();
  const Instant time = platform_.now();
  const Length grown = status.unflushed - std::min(status.unflushed, unflushed_);
  const Duration span = time - looked_;
  looked_ = time;
  unflushed_ = status.unflushed;
  Status done;
  if (!broken_ && !keep_bitmaps_.load() && !status.link_down && time >= rotated_ + kRotate) {
    done = rotate();
    rotated_ = platform_.now();
  } else {
    const bool much = status.unflushed >= job_.flush_every;
    const bool old = status.unflushed > Length() && time >= flushed_ + kFlushInterval;
    if (!status.link_down && (much || old)) done = flush();
    if (broken_) return kLook;
    if (const Status stored = store_records(Journal::Sync::No); !stored) done = stored;
  }
  if (!done) {
    log_warning("noting what the target has: {}", done.error().to_string());
    return kLook;
  }
  return pause_until_due(grown, span);
}

Status Checkpointer::flush() {
  const std::vector<mirror::FlushId> ids = job_.engine.flush_begin();
  const auto flushed = job_.engine.link().call({{"op", "flush"}}, kFlushTimeout);
  job_.engine.flush_ended(ids, flushed.has_value());
  flushed_ = looked_ = platform_.now();
  unflushed_ = job_.engine.status().unflushed;
  if (flushed) return {};
  const Error& error = flushed.error();
  const bool of_the_disk = error.code == Code::Io || error.code == Code::NoSpace;
  if (of_the_disk && job_.target_failed) job_.target_failed(error);
  return fail(error);
}

// A whole pass; then what the target is may be noted, too.
Status Checkpointer::store_records(Journal::Sync sync) {
  std::optional<std::vector<mirror::TargetDisk>> targets;
  {
    const std::lock_guard lock(mutex_);
    targets = targets_;
  }
  const Status written = job::store_records(job_.engine, job_.records, job_.disk_count, targets, sync);
  if (!written) {
    broken_ = true;
    return written;
  }
  const std::lock_guard lock(mutex_);
  if (targets_ == targets) targets_.reset();
  return {};
}

// Every disk's mirror runs, here and in QEMU.
Result<bool> Checkpointer::mirrored() {
  const auto status = job_.engine.status();
  DROVER_ASSIGN(const memmig::Attached attached, job_.source.attached(job_.guest));
  for (const memmig::BitmapSpec& disk : job_.disks) {
    const auto here = std::ranges::find(status.disks, disk.disk, &mirror::MirrorEngine::DiskStatus::name);
    const memmig::Attached::Mirror* const there = attached.mirror(disk.disk);
    if (here == status.disks.end() || !here->connected || there == nullptr || !there->alive()) return false;
  }
  return true;
}

// The next generation of bitmaps records (QEMU has drained what was under way: it has arrived here); then all is
// recorded and the older ones are not needed. Unless a mirror has ended: then the older ones are all that knows what
// was written after that. This process may have stood still for long, and not have heard of it yet; so it is asked
// for once the next generation records: what a mirror missed until then shows.
Status Checkpointer::rotate() {
  DROVER_ASSIGN(const bool before, mirrored());
  if (!before) return {};
  const std::uint64_t next = generation_.load() + 1;
  if (!job_.disks.empty()) DROVER_TRY(job_.source.begin_bitmaps(job_.guest, job_.disks, next));
  generation_.store(next);
  DROVER_ASSIGN(const bool after, mirrored());
  if (!after) return {};
  const Status flushed = flush();
  DROVER_TRY(store_records(Journal::Sync::Yes));
  std::vector<std::string> names;
  for (const memmig::BitmapSpec& disk : job_.disks) names.push_back(disk.disk);
  if (!names.empty()) DROVER_TRY(job_.source.end_bitmaps(job_.guest, names, next));
  return flushed;
}

}  // namespace drover::job
