// SPDX-License-Identifier: Apache-2.0
#include "job/journal.h"

#include <rocksdb/db.h>

namespace drover::job {
namespace {

Error error_of(const rocksdb::Status& status, const std::string& doing) {
  const Code code = status.IsBusy() || status.IsIOError() ? Code::Io : Code::Internal;
  return Error{code, doing + ": " + status.ToString(), "", false};
}

class RocksJournal final : public Journal {
 public:
  explicit RocksJournal(std::unique_ptr<rocksdb::DB> db) : db_(std::move(db)) {}

  Status put(std::string_view key, std::string_view value) override {
    rocksdb::WriteOptions options;
    options.sync = true;
    const auto status = db_->Put(options, rocksdb::Slice(key.data(), key.size()),
                                 rocksdb::Slice(value.data(), value.size()));
    if (!status.ok()) return fail(error_of(status, "writing the job's journal"));
    return {};
  }

  Result<std::optional<std::string>> get(std::string_view key) override {
    std::string value;
    const auto status =
        db_->Get(rocksdb::ReadOptions(), rocksdb::Slice(key.data(), key.size()), &value);
    if (status.IsNotFound()) return std::nullopt;
    if (!status.ok()) return fail(error_of(status, "reading the job's journal"));
    return std::optional<std::string>(std::move(value));
  }

 private:
  std::unique_ptr<rocksdb::DB> db_;
};

}  // namespace

Result<std::unique_ptr<Journal>> Journal::open(const std::string& directory) {
  rocksdb::Options options;
  options.create_if_missing = true;
  // A few small records: keep what RocksDB sets aside small too (invariant 9).
  options.write_buffer_size = std::size_t{1} << 20;
  options.max_open_files = 16;
  options.max_background_jobs = 1;
  options.keep_log_file_num = 1;
  options.info_log_level = rocksdb::WARN_LEVEL;
  rocksdb::DB* db = nullptr;
  const auto status = rocksdb::DB::Open(options, directory, &db);
  if (!status.ok()) return fail(error_of(status, "opening the job's journal " + directory));
  return std::make_unique<RocksJournal>(std::unique_ptr<rocksdb::DB>(db));
}

}  // namespace drover::job
