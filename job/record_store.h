// SPDX-License-Identifier: Apache-2.0
//
// Puts the arbiters' records into the journal, so that an older one never takes the place of a
// newer one. Two threads bring them: the engine's, just before something is sent to chunks for the
// first time, and the one that stores all that changed. A record is taken on the engine's thread
// and stored a little later; in between the other may have taken and stored a newer one of the same
// group.
//
// No guest waits for a disk's flush here: put() is called on the engine's thread, and write() does
// not hold it up while it syncs.
//
// Once something could not be stored nothing is any more: the arbiter does not give again what it has given, so that a
// later pass would be no whole one, and bitmaps would go that are needed.
//
// Lives as long as one engine: its arbiters count what they take from 0. Threads: any.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/result.h"
#include "job/journal.h"
#include "mirror/arbiter.h"

namespace drover::job {

// The key of a group's record, and back: its disk and group. Protocol if it is no such key.
std::string record_key(std::size_t disk, mirror::GroupIndex group);
inline constexpr std::string_view kRecordPrefix = "chunks/";
Result<std::pair<std::size_t, mirror::GroupIndex>> parse_record_key(std::string_view key);

class RecordStore {
 public:
  explicit RecordStore(Journal& journal) : journal_(journal) {}

  struct One {
    std::size_t disk;
    mirror::GroupRecord record;
  };
  // In the journal when it returns; not synced.
  Status put(std::size_t disk, const mirror::GroupRecord& record);
  // All of them, then `also`; a failure may leave some of them stored, but not `also`.
  Status write(std::span<const One> records, Journal::Batch also, Journal::Sync sync);

 private:
  Status write_newer(std::span<const One> records, Journal::Batch also);

  Journal& journal_;
  std::mutex mutex_;  // guards the next two, and the order of what is written
  std::map<std::pair<std::size_t, mirror::GroupIndex>, std::uint64_t> taken_;  // of what is stored
  Status failed_;
};

}  // namespace drover::job
