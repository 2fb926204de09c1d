// SPDX-License-Identifier: Apache-2.0
#include "blockcopy/storage_reader.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <utility>

namespace drover::blockcopy {
namespace {

// A length of 0: to the file's end.
void drop_cache(int fd, off_t offset, off_t length) {
  // Dirty pages are not dropped. What fails here, a later flush tells.
  (void)::sync_file_range(
      fd, offset, length,
      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  (void)::posix_fadvise(fd, offset, length, POSIX_FADV_DONTNEED);
}

class StorageReader final : public ImageReader {
 public:
  StorageReader(std::unique_ptr<ImageReader> reader, UniqueFd file, CacheScope scope)
      : reader_(std::move(reader)), file_(std::move(file)), scope_(scope) {}

  [[nodiscard]] Length size() const override { return reader_->size(); }
  [[nodiscard]] Length alignment() const override { return reader_->alignment(); }
  void read(Offset offset, std::span<std::byte> buffer, Done done) override {
    const bool whole = scope_ == CacheScope::File;
    drop_cache(file_.get(), whole ? 0 : static_cast<off_t>(offset.bytes()),
               whole ? 0 : static_cast<off_t>(buffer.size()));
    reader_->read(offset, buffer, std::move(done));
  }
  void extents(Extent range, ExtentsDone done) override {
    reader_->extents(range, std::move(done));
  }

 private:
  const std::unique_ptr<ImageReader> reader_;
  const UniqueFd file_;
  const CacheScope scope_;
};

}  // namespace

std::unique_ptr<ImageReader> read_storage(std::unique_ptr<ImageReader> reader, UniqueFd file,
                                          CacheScope scope) {
  return std::make_unique<StorageReader>(std::move(reader), std::move(file), scope);
}

bool can_read_storage(int fd, bool direct) {
  struct statfs filesystem {};
  if (::fstatfs(fd, &filesystem) != 0) return false;
  if (filesystem.f_type == TMPFS_MAGIC || filesystem.f_type == RAMFS_MAGIC) return false;
  if (direct) return true;
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  char byte = 0;
  if (::pread(fd, &byte, 1, 0) < 0) return false;
  drop_cache(fd, 0, static_cast<off_t>(page));
  void* const mapped = ::mmap(nullptr, page, PROT_READ, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) return false;
  unsigned char resident = 1;
  const bool known = ::mincore(mapped, page, &resident) == 0;
  ::munmap(mapped, page);
  return known && (resident & 1U) == 0;
}

}  // namespace drover::blockcopy
