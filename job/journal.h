// SPDX-License-Identifier: Apache-2.0
//
// A job's journal: what it has decided, on stable storage before it acts on it. RocksDB in the job's
// directory; every put() is synced.
//
//   DROVER_ASSIGN(auto journal, Journal::open("/var/lib/drover/jobs/web1-1f3a/journal"));
//   DROVER_TRY(journal->put("state", "resuming"));
//
// Threads: any; calls block for a disk's flush. Errors: Io (damaged, no space), Busy (another process has
// it open: RocksDB's own lock).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace drover::job {

class Journal {
 public:
  static Result<std::unique_ptr<Journal>> open(const std::string& directory);
  virtual ~Journal() = default;
  virtual Status put(std::string_view key, std::string_view value) = 0;
  virtual Result<std::optional<std::string>> get(std::string_view key) = 0;
};

}  // namespace drover::job
