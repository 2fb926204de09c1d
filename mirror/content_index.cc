// SPDX-License-Identifier: Apache-2.0
#include "mirror/content_index.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <utility>

#include "base/buffer.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/unique_fd.h"

namespace drover::mirror {
namespace {

constexpr std::string_view kVersion = "1";
constexpr const char* kVersionKey = "v";
constexpr const char* kNextKey = "n";
constexpr const char* kFilterKey = "F";
constexpr const char* kUnfinishedKey = "u";
constexpr std::size_t kFilterPart = std::size_t{256} << 10;
constexpr std::size_t kBatch = 1024;  // pieces that are written at once
constexpr Length kReadAtOnce = Length(std::uint64_t{1} << 20);
// Of one lane at a time.
constexpr std::size_t kMaxOpenImages = 64;

rocksdb::Slice slice(std::string_view text) { return {text.data(), text.size()}; }
std::string_view view(const rocksdb::Slice& text) { return {text.data(), text.size()}; }

Error error_of(const rocksdb::Status& status, std::string_view doing) {
  Code code = Code::Internal;
  const std::string why = status.ToString();
  if (status.IsNoSpace()) {
    code = Code::NoSpace;
  } else if (status.IsIOError() && why.find("/LOCK: ") != std::string::npos) {
    return {Code::Busy, "another drover is writing the content index",
            "try again when it has ended", true};
  } else if (status.IsCorruption() || status.IsInvalidArgument() || status.IsNotFound() ||
             status.IsPathNotFound() || status.IsNotSupported()) {
    code = Code::Protocol;
  } else if (status.IsIOError()) {
    code = Code::Io;
  }
  return {code, fmt::format("{}: {}", doing, why), "", false};
}

std::string number_bytes(std::uint32_t number) {
  std::string bytes;  // the largest first, so that they sort
  for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(number >> shift & 0xff);
  return bytes;
}
std::uint32_t number_of(std::string_view bytes) {
  std::uint32_t number = 0;
  for (const char byte : bytes) number = number << 8 | static_cast<unsigned char>(byte);
  return number;
}
std::string image_key(std::uint32_t number) { return "i" + number_bytes(number); }
std::string filter_key(std::uint32_t part) { return "f" + number_bytes(part); }
std::string hash_prefix(const PieceHash& hash) {
  return "h" + std::string(reinterpret_cast<const char*>(hash.data()), hash.size());
}
constexpr std::size_t kNumberSize = 4;
constexpr std::size_t kPieceKey = 1 + kPieceHashSize + kNumberSize;

std::string offset_bytes(Offset offset) {
  const std::uint64_t value = offset.bytes();
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}
std::optional<Offset> offset_of(std::string_view bytes) {
  std::uint64_t value = 0;
  if (bytes.size() != sizeof value) return std::nullopt;
  std::memcpy(&value, bytes.data(), sizeof value);
  return Offset(value);
}

std::string image_json(const IndexedImage& image) {
  return nlohmann::json{{"path", image.path},
                        {"device", image.identity.device},
                        {"inode", image.identity.inode},
                        {"size", image.size.bytes()},
                        {"modified", image.modified},
                        {"changed", image.changed},
                        {"pieces", image.pieces}}
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}
std::optional<IndexedImage> image_of(std::uint32_t number, std::string_view text) {
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  const auto unsigned_at = [&](const char* name) -> std::optional<std::uint64_t> {
    const auto found = json.find(name);
    if (found == json.end() || !found->is_number_integer()) return std::nullopt;
    return found->get<std::uint64_t>();
  };
  if (!json.is_object()) return std::nullopt;
  const auto path = json.find("path");
  if (path == json.end() || !path->is_string()) return std::nullopt;
  for (const char* const name : {"device", "inode", "size", "modified", "changed", "pieces"}) {
    if (!unsigned_at(name)) return std::nullopt;
  }
  IndexedImage image;
  image.number = number;
  image.path = *path;
  image.identity = {*unsigned_at("device"), *unsigned_at("inode")};
  image.size = Length(*unsigned_at("size"));
  image.modified = json["modified"].get<std::int64_t>();
  image.changed = json["changed"].get<std::int64_t>();
  image.pieces = *unsigned_at("pieces");
  return image;
}

// Small whatever is in it, and with every file open: a writer may merge them away meanwhile.
rocksdb::Options database_options() {
  rocksdb::Options options;
  options.write_buffer_size = std::size_t{4} << 20;
  options.max_write_buffer_number = 2;
  options.target_file_size_base = std::uint64_t{64} << 20;
  options.max_open_files = -1;
  options.max_background_jobs = 1;
  options.keep_log_file_num = 1;
  options.info_log_level = rocksdb::WARN_LEVEL;
  options.compression = rocksdb::kNoCompression;  // hashes
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = rocksdb::NewLRUCache(std::size_t{8} << 20);
  table.block_size = std::size_t{8} << 10;
  table.cache_index_and_filter_blocks = true;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return options;
}

// Empty: a new database.
Status check_version(rocksdb::DB& db, bool may_be_new) {
  std::string version;
  const rocksdb::Status read = db.Get({}, kVersionKey, &version);
  if (read.ok() && version == kVersion) return {};
  if (read.ok()) {
    return fail(
        Code::Incompatible,
        fmt::format("the content index has version {}, this drover " DROVER_VERSION " knows {}",
                    version, kVersion),
        "use the drover that made it, or remove its directory");
  }
  if (!read.IsNotFound()) return fail(error_of(read, "reading the content index"));
  const std::unique_ptr<rocksdb::Iterator> any(db.NewIterator({}));
  any->SeekToFirst();
  if (any->Valid() || !may_be_new) {
    return fail(Code::Protocol, "the content index is damaged: it has no version");
  }
  return {};
}

Result<std::vector<IndexedImage>> read_images(rocksdb::DB& db) {
  std::vector<IndexedImage> images;
  const std::unique_ptr<rocksdb::Iterator> at(db.NewIterator({}));
  for (at->Seek("i"); at->Valid() && at->key().starts_with("i"); at->Next()) {
    const std::string_view key = view(at->key());
    auto image = key.size() == 1 + kNumberSize
                     ? image_of(number_of(key.substr(1)), view(at->value()))
                     : std::nullopt;
    if (!image || images.size() == IndexWriter::kMaxImages) {
      return fail(Code::Protocol, "the content index is damaged: it lists what is no image");
    }
    images.push_back(std::move(*image));
  }
  if (!at->status().ok()) return fail(error_of(at->status(), "reading the content index"));
  return images;
}

std::int64_t nanoseconds(const timespec& time) {
  return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}
blockcopy::ImageIdentity identity_of(const struct stat& info) {
  return {static_cast<std::uint64_t>(info.st_dev), static_cast<std::uint64_t>(info.st_ino)};
}

// A regular file, and no link, read-only; past the page cache if `direct` and that works.
Result<UniqueFd> open_regular(const std::string& path, struct stat& info, bool direct) {
  // O_NONBLOCK: a pipe in its place must not hold us up.
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOATIME;
  int fd = direct ? ::open(path.c_str(), kFlags | O_DIRECT) : -1;
  if (fd < 0) fd = ::open(path.c_str(), kFlags);
  if (fd < 0 && errno == EPERM) fd = ::open(path.c_str(), kFlags & ~O_NOATIME);
  UniqueFd file(fd);
  if (!file) return fail_errno(errno, "opening " + path);
  if (::fstat(file.get(), &info) != 0) return fail_errno(errno, "looking at " + path);
  if (!S_ISREG(info.st_mode)) {
    return fail(Code::InvalidArgument, path + " is no regular file: only image files are indexed");
  }
  return file;
}

// --- what a receiver reads ---

class IndexContent final : public KnownContent {
 public:
  IndexContent(rocksdb::DB& db, const std::vector<IndexedImage>& images, Loop& loop)
      : images_(images), loop_(loop), at_(db.NewIterator({})) {}

  std::vector<Place> find(const PieceHash& hash) override {
    std::vector<Place> places;
    const std::string prefix = hash_prefix(hash);
    for (at_->Seek(slice(prefix)); at_->Valid() && at_->key().starts_with(slice(prefix));
         at_->Next()) {
      if (at_->key().size() != kPieceKey) break;
      const std::uint32_t number = number_of(view(at_->key()).substr(1 + kPieceHashSize));
      const auto offset = offset_of(view(at_->value()));
      if (!offset || find_image(number) == nullptr) continue;
      places.push_back({number, *offset});
      if (places.size() == kMaxPlaces) break;
    }
    return places;
  }

  bool holds(const Place& place, Length length) override {
    const Open& image = open(place.image);
    return image.reader != nullptr && place.offset.bytes() <= image.reader->size().bytes() &&
           length.bytes() <= image.reader->size().bytes() - place.offset.bytes();
  }

  void read(const Place& place, std::span<std::byte> buffer, blockcopy::Done done) override {
    CHECK(holds(place, Length(buffer.size())), "it was asked before");
    open_.at(place.image).reader->read(place.offset, buffer, std::move(done));
  }

  int shareable(const Place& place) override {
    const Open& image = open(place.image);
    return image.reader == nullptr || written_by_qemu(image.fd.get()) ? -1 : image.fd.get();
  }

 private:
  struct Open {
    UniqueFd fd;
    std::unique_ptr<blockcopy::ImageReader> reader;  // null: it is not what it was
  };

  // QEMU says with a lock on byte 101 that it writes (block/file-posix.c, RAW_LOCK_PERM_BASE and
  // BLK_PERM_WRITE). Blocks that are shared would have to be copied when that guest writes to them.
  static bool written_by_qemu(int fd) {
    constexpr off_t kWritePermission = 101;
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = kWritePermission;
    lock.l_len = 1;
    return ::fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
  }

  [[nodiscard]] const IndexedImage* find_image(std::uint32_t number) const {
    const auto found = std::ranges::lower_bound(images_, number, {}, &IndexedImage::number);
    return found != images_.end() && found->number == number ? &*found : nullptr;
  }

  Open& open(std::uint32_t number) {
    static Open none;
    const auto [entry, is_new] = open_.try_emplace(number);
    if (!is_new) return entry->second;
    if (open_.size() > kMaxOpenImages) {
      open_.erase(entry);
      return none;
    }
    const IndexedImage* const image = find_image(number);
    if (image == nullptr) return entry->second;
    struct stat info {};
    auto fd = open_regular(image->path, info, false);
    if (!fd || identity_of(info) != image->identity || info.st_size == 0) {
      log_info("{} is not what the index says any more", image->path);
      return entry->second;
    }
    // The same file, whatever its name means by now.
    auto reader = blockcopy::open_raw_reader(
        loop_, {fmt::format("/proc/self/fd/{}", fd->get()), Length(), false});
    if (!reader) return entry->second;
    entry->second = {std::move(*fd), std::move(*reader)};
    return entry->second;
  }

  const std::vector<IndexedImage>& images_;
  Loop& loop_;
  const std::unique_ptr<rocksdb::Iterator> at_;
  std::map<std::uint32_t, Open> open_;
};

class RocksReader final : public IndexReader {
 public:
  RocksReader(std::unique_ptr<rocksdb::DB> db, std::vector<IndexedImage> images)
      : db_(std::move(db)), images_(std::move(images)) {}

  [[nodiscard]] const std::vector<IndexedImage>& images() const override { return images_; }

  Result<std::shared_ptr<const PieceFilter>> filter() override {
    if (filter_ || images_.empty()) return filter_;
    std::string head;
    const rocksdb::Status read = db_->Get({}, kFilterKey, &head);
    if (read.IsNotFound()) return filter_;  // nothing was finished yet
    const nlohmann::json json = nlohmann::json::parse(head, nullptr, false);
    if (!read.ok() || !json.is_object()) return damaged();
    const std::uint64_t size = json.value("size", std::uint64_t{0});
    if (size > PieceFilter::kMaxBytes) return damaged();
    std::vector<std::byte> bytes;
    for (std::uint32_t part = 0; bytes.size() < size; ++part) {
      std::string some;
      if (!db_->Get({}, filter_key(part), &some).ok() || some.empty()) return damaged();
      const auto view = std::as_bytes(std::span(some));
      bytes.insert(bytes.end(), view.begin(), view.end());
    }
    DROVER_ASSIGN(
        PieceFilter filter,
        PieceFilter::from_bytes(std::move(bytes), json.value("probes", std::uint64_t{0})));
    filter_ = std::make_shared<const PieceFilter>(std::move(filter));
    return filter_;
  }

  std::unique_ptr<KnownContent> open_content(Loop& loop) override {
    return std::make_unique<IndexContent>(*db_, images_, loop);
  }

 private:
  static tl::unexpected<Error> damaged() {
    return fail(Code::Protocol, "the content index is damaged: its filter can't be read");
  }
  const std::unique_ptr<rocksdb::DB> db_;
  const std::vector<IndexedImage> images_;
  std::shared_ptr<const PieceFilter> filter_;
};

// --- the writer ---

class RocksWriter final : public IndexWriter {
 public:
  RocksWriter(std::unique_ptr<rocksdb::DB> db, std::vector<IndexedImage> images)
      : db_(std::move(db)), images_(std::move(images)), buffers_(kReadAtOnce, 1) {}

  [[nodiscard]] const std::vector<IndexedImage>& images() const override { return images_; }

  Result<bool> add(const std::string& path, const AddOptions& options) override {
    std::error_code error;
    const std::string real = std::filesystem::canonical(path, error).string();
    if (error) return fail_errno(error.value(), "opening " + path);
    struct stat info {};
    DROVER_ASSIGN(const UniqueFd fd, open_regular(real, info, true));
    IndexedImage image;
    image.path = real;
    image.identity = identity_of(info);
    image.size = Length(static_cast<std::uint64_t>(info.st_size));
    image.modified = nanoseconds(info.st_mtim);
    image.changed = nanoseconds(info.st_ctim);
    const auto known = std::ranges::find(images_, real, &IndexedImage::path);
    if (known != images_.end() && known->identity == image.identity && known->size == image.size &&
        known->modified == image.modified && known->changed == image.changed) {
      return false;
    }
    if (known == images_.end() && images_.size() >= kMaxImages) return full();
    DROVER_ASSIGN(image.number, new_number());
    DROVER_ASSIGN(image.pieces, read_image(fd.get(), image, options));
    rocksdb::WriteBatch batch;
    if (known != images_.end()) batch.Delete(image_key(known->number));
    batch.Put(image_key(image.number), image_json(image));
    batch.Put(kUnfinishedKey, "");
    DROVER_TRY(write(batch, true));
    if (known != images_.end()) images_.erase(known);
    images_.push_back(std::move(image));
    return true;
  }

  Result<bool> remove(const std::string& path) override {
    std::error_code error;
    const std::string real = std::filesystem::weakly_canonical(path, error).string();
    const auto known = std::ranges::find_if(images_, [&](const IndexedImage& image) {
      return image.path == path || (!error && image.path == real);
    });
    if (known == images_.end()) return false;
    rocksdb::WriteBatch batch;
    batch.Delete(image_key(known->number));
    batch.Put(kUnfinishedKey, "");
    DROVER_TRY(write(batch, true));
    images_.erase(known);
    return true;
  }

  Result<std::vector<std::string>> remove_missing() override {
    std::vector<std::string> missing;
    for (const IndexedImage& image : images_) {
      struct stat info {};
      const bool there = ::lstat(image.path.c_str(), &info) == 0 && S_ISREG(info.st_mode) &&
                         identity_of(info) == image.identity;
      if (!there) missing.push_back(image.path);
    }
    for (const std::string& path : missing) DROVER_TRY(remove(path));
    return missing;
  }

  Status finish() override {
    std::string unfinished;
    const rocksdb::Status changed = db_->Get({}, kUnfinishedKey, &unfinished);
    if (changed.IsNotFound()) return {};
    if (!changed.ok()) return fail(error_of(changed, "reading the content index"));
    std::uint64_t pieces = 0;
    for (const IndexedImage& image : images_) pieces += image.pieces;
    PieceFilter filter = PieceFilter::for_pieces(pieces);
    DROVER_TRY(look_at_all_pieces(filter));
    rocksdb::WriteBatch batch;
    const auto bytes = filter.bytes();
    batch.Put(kFilterKey,
              nlohmann::json{{"size", bytes.size()}, {"probes", filter.probes()}}.dump());
    std::uint32_t part = 0;
    for (std::size_t at = 0; at < bytes.size(); at += kFilterPart, ++part) {
      const auto some = bytes.subspan(at, std::min(kFilterPart, bytes.size() - at));
      batch.Put(filter_key(part), {reinterpret_cast<const char*>(some.data()), some.size()});
    }
    for (; part < PieceFilter::kMaxBytes / kFilterPart; ++part) batch.Delete(filter_key(part));
    batch.Delete(kUnfinishedKey);
    DROVER_TRY(write(batch, true));
    // So that a reader need not go through a log.
    return flush();
  }

 private:
  static tl::unexpected<Error> full() {
    return fail(Code::NoSpace,
                fmt::format("the content index holds as much as it may: {} of data, {} images",
                            format_length(kPiece * kMaxPieces), kMaxImages),
                "drover index --remove PATH takes an image out");
  }

  Status write(rocksdb::WriteBatch& batch, bool durable) {
    rocksdb::WriteOptions options;
    options.sync = durable;
    options.disableWAL = !durable;
    const rocksdb::Status written = db_->Write(options, &batch);
    if (!written.ok()) return fail(error_of(written, "writing the content index"));
    return {};
  }
  Status flush() {
    const rocksdb::Status flushed = db_->Flush(rocksdb::FlushOptions());
    if (!flushed.ok()) return fail(error_of(flushed, "writing the content index"));
    return {};
  }

  Result<std::uint32_t> new_number() {
    std::string text;
    const rocksdb::Status read = db_->Get({}, kNextKey, &text);
    if (!read.ok() && !read.IsNotFound()) {
      return fail(error_of(read, "reading the content index"));
    }
    const std::uint32_t number = number_of(text);
    if (number == UINT32_MAX) return full();
    rocksdb::WriteBatch batch;
    batch.Put(kNextKey, number_bytes(number + 1));
    DROVER_TRY(write(batch, true));
    return number;
  }

  // Writes its pieces; how many.
  Result<std::uint64_t> read_image(int fd, const IndexedImage& image, const AddOptions& options) {
    std::uint64_t others = 0;
    for (const IndexedImage& one : images_) {
      if (one.path != image.path) others += one.pieces;
    }
    const Buffer buffer = buffers_.try_take();
    CHECK(static_cast<bool>(buffer), "one image is read at a time");
    std::uint64_t pieces = 0;
    rocksdb::WriteBatch batch;
    const std::uint64_t size = image.size.bytes();
    for (std::uint64_t at = 0; at < size;) {
      if (options.progress) options.progress({Length(at), image.size});
      DROVER_TRY(still_named(fd, image.path));
      at = next_data(fd, at);
      if (at >= size) break;
      const Instant start = now();
      DROVER_ASSIGN(const std::size_t count, read_at(fd, at, buffer.bytes(), image.path));
      if (count == 0) break;  // it became shorter
      // A guest may be at work on this disk: for half of the time it is the guest's alone (not every
      // scheduler knows idle priority).
      std::this_thread::sleep_for(now() - start);
      for (std::size_t from = 0; from < count; from += kPiece.bytes()) {
        const auto piece =
            buffer.bytes().subspan(from, std::min<std::size_t>(kPiece.bytes(), count - from));
        if (all_zero(piece)) continue;
        batch.Put(hash_prefix(piece_hash(piece)) + number_bytes(image.number),
                  offset_bytes(Offset(at + from)));
        ++pieces;
      }
      if (others + pieces > kMaxPieces) return full();
      if (static_cast<std::size_t>(batch.Count()) >= kBatch) {
        DROVER_TRY(write(batch, false));
        batch.Clear();
      }
      at += kReadAtOnce.bytes();
    }
    DROVER_TRY(write(batch, false));
    DROVER_TRY(flush());  // they are there before the image is listed
    return pieces;
  }

  // Who removes it waits for us with its blocks.
  static Status still_named(int fd, const std::string& path) {
    struct stat info {};
    if (::fstat(fd, &info) == 0 && info.st_nlink > 0) return {};
    return fail(Code::NotFound, path + " was removed while it was read");
  }

  // The next multiple of what is read at once that lies, or begins before, data.
  static std::uint64_t next_data(int fd, std::uint64_t at) {
    const off_t data = ::lseek(fd, static_cast<off_t>(at), SEEK_DATA);
    if (data < 0) return errno == ENXIO ? UINT64_MAX : at;
    return std::max(at,
                    static_cast<std::uint64_t>(data) / kReadAtOnce.bytes() * kReadAtOnce.bytes());
  }

  // As much as there is.
  static Result<std::size_t> read_at(int fd, std::uint64_t at, std::span<std::byte> to,
                                     const std::string& path) {
    std::size_t count = 0;
    while (count < kReadAtOnce.bytes()) {
      const ssize_t some = ::pread(fd, to.data() + count, kReadAtOnce.bytes() - count,
                                   static_cast<off_t>(at + count));
      if (some < 0 && errno == EINTR) continue;
      if (some < 0) return fail_errno(errno, "reading " + path);
      if (some == 0) break;
      count += static_cast<std::size_t>(some);
      // At the file's end a direct read is cut short, and can't be gone on with.
      if (count % kPiece.bytes() != 0) break;
    }
    return count;
  }

  Status look_at_all_pieces(PieceFilter& filter) {
    rocksdb::WriteBatch stale;
    rocksdb::ReadOptions once;
    once.fill_cache = false;
    const std::unique_ptr<rocksdb::Iterator> at(db_->NewIterator(once));
    std::vector<std::uint32_t> numbers;
    for (const IndexedImage& image : images_) numbers.push_back(image.number);
    std::ranges::sort(numbers);
    for (at->Seek("h"); at->Valid() && at->key().starts_with("h"); at->Next()) {
      const std::string_view key = view(at->key());
      if (key.size() == kPieceKey &&
          std::ranges::binary_search(numbers, number_of(key.substr(1 + kPieceHashSize)))) {
        PieceHash hash{};
        std::memcpy(hash.data(), key.data() + 1, hash.size());
        filter.add(hash);
        continue;
      }
      stale.Delete(at->key());
      if (static_cast<std::size_t>(stale.Count()) < kBatch) continue;
      DROVER_TRY(write(stale, false));
      stale.Clear();
    }
    if (!at->status().ok()) return fail(error_of(at->status(), "reading the content index"));
    return write(stale, false);
  }

  const std::unique_ptr<rocksdb::DB> db_;
  std::vector<IndexedImage> images_;
  BufferPool buffers_;
};

Result<std::unique_ptr<IndexWriter>> open_writer(const std::string& directory) {
  rocksdb::Options options = database_options();
  options.create_if_missing = true;
  rocksdb::DB* raw = nullptr;
  const rocksdb::Status opened = rocksdb::DB::Open(options, directory, &raw);
  if (!opened.ok()) return fail(error_of(opened, "opening the content index " + directory));
  std::unique_ptr<rocksdb::DB> db(raw);
  DROVER_TRY(check_version(*db, true));
  rocksdb::WriteOptions durable;
  durable.sync = true;
  const rocksdb::Status written = db->Put(durable, kVersionKey, slice(kVersion));
  if (!written.ok()) return fail(error_of(written, "writing the content index"));
  DROVER_ASSIGN(auto images, read_images(*db));
  return std::make_unique<RocksWriter>(std::move(db), std::move(images));
}

}  // namespace

Result<std::unique_ptr<IndexReader>> IndexReader::open(const std::string& directory) {
  // RocksDB would make the directory.
  if (::access((directory + "/CURRENT").c_str(), F_OK) != 0) {
    return fail(Code::NotFound, "there is no content index in " + directory);
  }
  rocksdb::DB* raw = nullptr;
  const rocksdb::Status opened = rocksdb::DB::OpenForReadOnly(database_options(), directory, &raw);
  if (!opened.ok()) return fail(error_of(opened, "opening the content index " + directory));
  std::unique_ptr<rocksdb::DB> db(raw);
  DROVER_TRY(check_version(*db, false));
  DROVER_ASSIGN(auto images, read_images(*db));
  return std::make_unique<RocksReader>(std::move(db), std::move(images));
}

Result<std::unique_ptr<IndexWriter>> IndexWriter::open(const std::string& directory) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(directory).parent_path(), error);
  if (!error) std::filesystem::create_directory(directory, error);
  if (error) return fail_errno(error.value(), "making the directory " + directory);
  // It says what is in the guests' images.
  if (::chmod(directory.c_str(), 0700) != 0) {
    return fail_errno(errno, "making the directory " + directory);
  }
  auto writer = open_writer(directory);
  if (writer || writer.error().code != Code::Protocol) return writer;
  const std::string aside = directory + ".damaged";
  log_warning("{}; it is put aside as {} and made anew", writer.error().message, aside);
  std::filesystem::remove_all(aside, error);
  std::filesystem::rename(directory, aside, error);
  if (error) return fail_errno(error.value(), "putting the damaged index aside");
  return open_writer(directory);
}

Status note_images(const std::string& directory, const std::vector<std::string>& paths,
                   std::chrono::milliseconds patience) {
  if (::access((directory + "/CURRENT").c_str(), F_OK) != 0) return {};
  constexpr std::chrono::seconds kBetween{2};
  const Instant deadline = now() + patience;
  auto index = IndexWriter::open(directory);
  while (!index && index.error().code == Code::Busy && now() < deadline) {
    std::this_thread::sleep_for(kBetween);
    index = IndexWriter::open(directory);
  }
  if (!index) return fail(index.error());
  DROVER_TRY((*index)->remove_missing());
  Status first;
  for (const std::string& path : paths) {
    if (const auto added = (*index)->add(path, {}); !added && first) first = fail(added.error());
  }
  DROVER_TRY((*index)->finish());
  return first;
}

}  // namespace drover::mirror
