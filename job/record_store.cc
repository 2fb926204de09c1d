// SPDX-License-Identifier: Apache-2.0
#include "job/record_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

namespace drover::job {

std::string record_key(std::size_t disk, mirror::GroupIndex group) {
  return fmt::format("{}{}/{:012x}", kRecordPrefix, disk, group);
}

Result<std::pair<std::size_t, mirror::GroupIndex>> parse_record_key(std::string_view key) {
  const auto broken = [&] {
    return fail(Code::Protocol, fmt::format("the journal has a record \"{}\"", key));
  };
  if (!key.starts_with(kRecordPrefix)) return broken();
  key.remove_prefix(kRecordPrefix.size());
  const std::size_t slash = key.find('/');
  if (slash == std::string_view::npos) return broken();
  std::size_t disk = 0;
  mirror::GroupIndex group = 0;
  const auto parsed = std::from_chars(key.data(), key.data() + slash, disk);
  const auto rest = std::from_chars(key.data() + slash + 1, key.data() + key.size(), group, 16);
  if (parsed.ec != std::errc() || rest.ec != std::errc() || parsed.ptr != key.data() + slash ||
      rest.ptr != key.data() + key.size()) {
    return broken();
  }
  return std::pair(disk, group);
}

Status RecordStore::put(std::size_t disk, const mirror::GroupRecord& record) {
  const One one{disk, record};
  return write_newer(std::span(&one, 1), {});
}

Status RecordStore::write(std::span<const One> records, Journal::Batch also, Journal::Sync sync) {
  // In parts: put() waits for one of them at most. `also` may only be there once all of them are.
  constexpr std::size_t kAtOnce = 128U << 10;
  while (!records.empty()) {
    std::size_t count = 0;
    for (std::size_t bytes = 0; count < records.size() && bytes < kAtOnce; ++count) {
      bytes += records[count].record.bytes.size();
    }
    DROVER_TRY(write_newer(records.first(count), {}));
    records = records.subspan(count);
  }
  DROVER_TRY(write_newer({}, std::move(also)));
  // What was left out is in the journal in a newer form, and is synced with the rest.
  return sync == Journal::Sync::Yes ? journal_.write({}, sync) : Status();
}

Status RecordStore::write_newer(std::span<const One> records, Journal::Batch also) {
  const std::lock_guard lock(mutex_);
  DROVER_TRY(failed_);
  Journal::Batch batch = std::move(also);
  for (const auto& [disk, record] : records) {
    const auto stored = taken_.find({disk, record.group});
    if (stored != taken_.end() && stored->second > record.taken) continue;
    batch.put(record_key(disk, record.group), record.bytes);
  }
  if (batch.changes().empty()) return {};
  failed_ = journal_.write(batch, Journal::Sync::No);
  DROVER_TRY(failed_);
  for (const auto& [disk, record] : records) {
    std::uint64_t& stored = taken_[{disk, record.group}];
    stored = std::max(stored, record.taken);
  }
  return {};
}

}  // namespace drover::job
