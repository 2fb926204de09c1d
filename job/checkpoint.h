// SPDX-License-Identifier: Apache-2.0
//
// Keeps a job resumable while it copies: a thread that has the target flush now and then, writes
// what the target has to the journal, and changes QEMU's dirty bitmaps so that they hold little.
// mirror/arbiter.h says why its order is safe.
//
//   Checkpointer checkpointer(platform, {engine, hypervisor, records, guest, disks, generation});
//   ...                                   // copying goes on
//   checkpointer.stop();                  // for the handover; another may be started after it
//
// What is sent again after a crash is at most what was acknowledged since the last record (kLook)
// and, when the target's host was restarted, since the last flush (FlushPlan, kFlushInterval), and
// what the guest wrote since the bitmaps were changed (kRotate).
//
// Threads: stop() blocks until what is under way is done, up to kFlushTimeout when the target does
// not answer; everything else may be called from any thread. Errors are logged: a job that can't be
// resumed goes on. But where the target's storage has failed a flush none will succeed any more
// (blockcopy/image.h): Job::target_failed is told.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "job/journal.h"
#include "job/platform.h"
#include "job/record_store.h"
#include "memmig/hypervisor.h"
#include "mirror/engine.h"

namespace drover::job {

// What is in the journal besides the job's state.
inline constexpr std::string_view kTargetsKey = "targets";  // the target's images when the records were right
std::string encode_targets(const std::vector<mirror::TargetDisk>& targets);
Result<std::vector<mirror::TargetDisk>> decode_targets(std::string_view text);

// Stores what has changed of all records, and with it `targets`, if there are any.
Status store_records(mirror::MirrorEngine& engine, RecordStore& store, std::size_t disks,
                     const std::optional<std::vector<mirror::TargetDisk>>& targets, Journal::Sync sync);

// A power cut of the target may cost 5 % of a disk of 4 GiB at most, and what the guest wrote
// meanwhile.
struct FlushPlan {
  Length every;  // flushed when so much was acknowledged since the last time
  Length most;   // of the copy, not flushed: MirrorEngine::Options::max_unflushed
  bool operator==(const FlushPlan&) const = default;
};
// `data`: what is to be copied of all disks, about; zero: not known.
FlushPlan plan_flushes(Length data);

class Checkpointer {
 public:
  static constexpr std::chrono::milliseconds kLook{100};     // at what was acknowledged
  static constexpr std::chrono::milliseconds kLookSoon{10};  // where the next flush is due before that
  static constexpr std::chrono::milliseconds kFlushInterval{2000};
  static constexpr std::chrono::milliseconds kRotate{5000};
  static constexpr std::chrono::seconds kFlushTimeout{30};

  struct Job {
    mirror::MirrorEngine& engine;
    memmig::Hypervisor& source;
    RecordStore& records;
    std::string guest;                      // UUID
    std::vector<memmig::BitmapSpec> disks;  // those with bitmaps
    std::size_t disk_count = 0;             // of the engine
    std::uint64_t generation = 1;           // of the bitmaps that record now
    Length flush_every;
    std::function<void(const Error&)> target_failed;  // from the checkpointer's thread
  };
  Checkpointer(Platform& platform, Job job);
  ~Checkpointer() { stop(); }
  Checkpointer(const Checkpointer&) = delete;
  Checkpointer& operator=(const Checkpointer&) = delete;

  // The target's images are these now: noted once the records tell what that means.
  void note_targets(std::vector<mirror::TargetDisk> targets);
  // From now on QEMU's bitmaps stay as they are: libvirt is not kept from a migration.
  void keep_bitmaps() { keep_bitmaps_.store(true); }
  // Nothing more is begun; stop() waits for what is under way.
  void end() { stop_.store(true); }
  void stop();
  [[nodiscard]] std::uint64_t generation() const { return generation_.load(); }

 private:
  void run();
  std::chrono::milliseconds look();
  [[nodiscard]] std::chrono::milliseconds pause_until_due(Length grown, Duration span) const;
  Status flush();
  Status store_records(Journal::Sync sync);
  [[nodiscard]] Result<bool> mirrored();
  Status rotate();

  Platform& platform_;
  const Job job_;
  std::atomic<std::uint64_t> generation_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> keep_bitmaps_{false};
  std::mutex mutex_;  // guards the next
  std::optional<std::vector<mirror::TargetDisk>> targets_;
  Instant flushed_{};
  Instant rotated_{};
  Instant looked_{};
  Length unflushed_;  // then
  // A journal that could not be written is not written again: what it says stays right together with the bitmaps that
  // are kept from then on.
  bool broken_ = false;
  std::unique_ptr<Thread> thread_;  // last: it uses the others
};

}  // namespace drover::job
