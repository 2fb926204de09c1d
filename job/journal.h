// SPDX-License-Identifier: Apache-2.0
//
// A job's journal: what it has decided, on stable storage before it acts on it, and what the target
// has, so that a resumed job need not send it again. RocksDB in the job's directory.
//
//   DROVER_ASSIGN(auto journal, Journal::open("/var/lib/drover/jobs/web1-1f3a/journal"));
//   DROVER_TRY(journal->put("state", "resuming"));                    // on stable storage
//   Journal::Batch batch;
//   batch.put("durable/vda/0001", bits).put("durable/vda/0002", bits).remove("durable/vda/0003");
//   DROVER_TRY(journal->write(batch, Journal::Sync::No));             // all of it or nothing
//   DROVER_TRY(journal->scan("durable/vda/", [&](auto key, auto value) -> Status { ... }));
//
// Written with Sync::No, a record survives this process's death at once, and the host's when a
// later record was synced: the order is kept.
//
// Threads: any, but not another call from within a scan's visitor; calls block, synced ones for a
// disk's flush. Memory: a few MiB, whatever is in it.
//
// Errors: Busy: another process has it open (RocksDB's own lock). NoSpace. Incompatible: a newer
// drover made it. Io: the disk failed. Protocol: it is damaged, and what it said must not be
// believed: whoever resumes then finds out otherwise, by comparing hashes. Every block is checked
// by its checksum when it is read; open() reads all of the log and fails if a record in its middle
// is missing. A log whose end is torn is what a crash of the host leaves, and no damage: what is
// missing was not synced.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace drover::job {

class Journal {
 public:
  static constexpr std::string_view kVersion = "1";  // the format of what is in it

  // IfMissing: for a new job. Never: for one that is resumed; a journal that is not there is
  // damaged.
  enum class Make { IfMissing, Never };
  static Result<std::unique_ptr<Journal>> open(const std::string& directory,
                                               Make make = Make::IfMissing);
  virtual ~Journal() = default;

  enum class Sync { Yes, No };
  class Batch {
   public:
    Batch& put(std::string_view key, std::string_view value);
    Batch& remove(std::string_view key);

    struct Change {
      std::string key;
      std::optional<std::string> value;  // absent: it is removed
    };
    [[nodiscard]] const std::vector<Change>& changes() const { return changes_; }

   private:
    std::vector<Change> changes_;
  };

  virtual Status write(const Batch& batch, Sync sync) = 0;
  Status put(std::string_view key, std::string_view value);
  Status put_unsynced(std::string_view key, std::string_view value);
  virtual Result<std::optional<std::string>> get(std::string_view key) = 0;
  // All records whose keys begin with `prefix`, by their keys' order; what the visitor returns ends
  // it if it is an error. The views are valid during the call.
  using Visitor = std::function<Status(std::string_view key, std::string_view value)>;
  virtual Status scan(std::string_view prefix, const Visitor& visitor) = 0;
};

}  // namespace drover::job
