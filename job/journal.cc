// SPDX-License-Identifier: Apache-2.0
#include "job/journal.h"

#include <rocksdb/db.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>

namespace drover::job {
namespace {

constexpr std::string_view kVersionKey = "drover-journal-version";

Code code_of(const rocksdb::Status& status) {
  if (status.IsNoSpace()) return Code::NoSpace;
  // RocksDB has no class of its own for a lock that another holds: an IOError about the file LOCK.
  if (status.IsIOError() && status.ToString().find("/LOCK: ") != std::string::npos) {
    return Code::Busy;
  }
  // What can't be made sense of, and what is gone: files that the database names.
  if (status.IsCorruption() || status.IsInvalidArgument() || status.IsNotFound() ||
      status.IsPathNotFound() || status.IsNotSupported()) {
    return Code::Protocol;
  }
  return status.IsIOError() ? Code::Io : Code::Internal;
}

Error error_of(const rocksdb::Status& status, const std::string& doing) {
  const Code code = code_of(status);
  return Error{code,
               doing + ": " + (code == Code::Protocol ? "it is damaged: " : "") + status.ToString(),
               "", false};
}

rocksdb::Slice slice(std::string_view text) { return {text.data(), text.size()}; }

class RocksJournal final : public Journal {
 public:
  explicit RocksJournal(std::unique_ptr<rocksdb::DB> db) : db_(std::move(db)) {}

  Status write(const Batch& batch, Sync sync) override {
    rocksdb::WriteBatch changes;
    for (const Batch::Change& change : batch.changes()) {
      const rocksdb::Status added = change.value
                                        ? changes.Put(slice(change.key), slice(*change.value))
                                        : changes.Delete(slice(change.key));
      if (!added.ok()) return fail(error_of(added, "writing the job's journal"));
    }
    // Not a synced Write(): others' unsynced ones would wait for its disk, and one of them is on the
    // guest's write path (job/record_store.h). SyncWAL() lets them go on.
    rocksdb::Status written;
    if (!batch.changes().empty()) written = db_->Write(rocksdb::WriteOptions(), &changes);
    if (written.ok() && sync == Sync::Yes) written = db_->SyncWAL();
    if (!written.ok()) return fail(error_of(written, "writing the job's journal"));
    return {};
  }

  Result<std::optional<std::string>> get(std::string_view key) override {
    std::string value;
    const rocksdb::Status read = db_->Get(rocksdb::ReadOptions(), slice(key), &value);
    if (read.IsNotFound()) return std::nullopt;
    if (!read.ok()) return fail(error_of(read, "reading the job's journal"));
    return std::optional<std::string>(std::move(value));
  }

  Status scan(std::string_view prefix, const Visitor& visitor) override {
    const std::unique_ptr<rocksdb::Iterator> at(db_->NewIterator(rocksdb::ReadOptions()));
    for (at->Seek(slice(prefix)); at->Valid() && at->key().starts_with(slice(prefix)); at->Next()) {
      DROVER_TRY(
          visitor({at->key().data(), at->key().size()}, {at->value().data(), at->value().size()}));
    }
    if (!at->status().ok()) return fail(error_of(at->status(), "reading the job's journal"));
    return {};
  }

 private:
  std::unique_ptr<rocksdb::DB> db_;
};

// Small, whatever is in it (invariant 9), and careful.
rocksdb::Options careful_options() {
  rocksdb::Options options;
  // Large enough that writers need not wait for one to be stored: a guest may be among them.
  options.write_buffer_size = std::size_t{4} << 20;
  options.max_write_buffer_number = 4;
  options.target_file_size_base = std::uint64_t{4} << 20;
  options.max_open_files = 16;
  options.max_background_jobs = 1;
  options.keep_log_file_num = 1;
  options.info_log_level = rocksdb::WARN_LEVEL;
  options.paranoid_checks = true;
  options.paranoid_file_checks = true;
  // The end of the log may be torn, as a crash leaves it; its middle may not.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = rocksdb::NewLRUCache(std::size_t{1} << 20);
  table.cache_index_and_filter_blocks = true;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return options;
}

// An empty database is a new one: the version is the first thing in it.
Status check_version(Journal& journal, Journal::Make make) {
  DROVER_ASSIGN(const std::optional<std::string> version, journal.get(kVersionKey));
  if (version == Journal::kVersion) return {};
  if (version) {
    return fail(Code::Incompatible,
                "the job's journal has version " + *version +
                    ", this drover " DROVER_VERSION " knows " + std::string(Journal::kVersion),
                "use the drover that began the job");
  }
  bool empty = true;
  DROVER_TRY(journal.scan("", [&](std::string_view, std::string_view) -> Status {
    empty = false;
    return {};
  }));
  if (!empty || make == Journal::Make::Never) {
    return fail(Code::Protocol, "the job's journal is damaged: it has no version");
  }
  return journal.put(kVersionKey, Journal::kVersion);
}

}  // namespace

Journal::Batch& Journal::Batch::put(std::string_view key, std::string_view value) {
  changes_.push_back({std::string(key), std::string(value)});
  return *this;
}

Journal::Batch& Journal::Batch::remove(std::string_view key) {
  changes_.push_back({std::string(key), std::nullopt});
  return *this;
}

Status Journal::put(std::string_view key, std::string_view value) {
  return write(Batch().put(key, value), Sync::Yes);
}

Status Journal::put_unsynced(std::string_view key, std::string_view value) {
  return write(Batch().put(key, value), Sync::No);
}

Result<std::unique_ptr<Journal>> Journal::open(const std::string& directory, Make make) {
  rocksdb::Options options = careful_options();
  options.create_if_missing = make == Make::IfMissing;
  rocksdb::DB* db = nullptr;
  const rocksdb::Status opened = rocksdb::DB::Open(options, directory, &db);
  if (!opened.ok()) return fail(error_of(opened, "opening the job's journal " + directory));
  auto journal = std::make_unique<RocksJournal>(std::unique_ptr<rocksdb::DB>(db));
  DROVER_TRY(check_version(*journal, make));
  return journal;
}

}  // namespace drover::job
