// SPDX-License-Identifier: Apache-2.0
#include "mirror/receiver_record.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "mirror/session.h"

namespace drover::mirror {

namespace {

constexpr std::size_t kMaxRecord = std::size_t{1} << 20;
constexpr std::uint64_t kRecordVersion = 2;
constexpr std::chrono::milliseconds kLockRetry{50};

Status make_directory(const std::string& path) {
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return fail_errno(errno, "making the directory " + path);
  }
  return {};
}

Status sync_directory(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd || ::fsync(fd.get()) != 0) return fail_errno(errno, "writing to the directory " + path);
  return {};
}

// Locked: the descriptor. Busy: somebody alive holds it.
Result<UniqueFd> take_lock(const std::string& directory, int flags) {
  const std::string path = directory + "/lock";
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0600));
  if (!fd) return fail_errno(errno, "opening " + path);
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return fail(Code::Busy, "the job's receiver is still running");
    return fail_errno(errno, "locking " + path);
  }
  return fd;
}

void remove_tree(const std::string& directory) {
  std::error_code ignored;
  std::filesystem::remove_all(directory, ignored);
  // The job's own directory may hold the source's journal, when both hosts share a file system.
  ::rmdir(std::filesystem::path(directory).parent_path().c_str());
}

Result<nlohmann::json> load(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return fail(Code::NotFound, "there is no " + path);
  std::string text(kMaxRecord, '\0');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<std::size_t>(in.gcount()));
  DROVER_ASSIGN(nlohmann::json record, parse_object(text, path));
  DROVER_ASSIGN(const std::uint64_t version, get_unsigned(record, "version"));
  if (version != kRecordVersion) {
    return fail(Code::Incompatible,
                fmt::format("{} is of version {}, drover {} here knows version {}", path, version,
                            DROVER_VERSION, kRecordVersion),
                "use the version of drover that wrote it");
  }
  return record;
}

RunningReceiver read_lock(const std::string& directory) {
  std::ifstream in(directory + "/lock");
  RunningReceiver found;
  if (!(in >> found.pid)) found.pid = 0;
  if (!(in >> found.port)) found.port = 0;
  return found;
}

nlohmann::json image_to_json(const ReceiverRecord::Image& image) {
  return {{"path", image.spec.path},
          {"format", image.spec.format == blockcopy::Format::Raw ? "raw" : "qcow2"},
          {"block_device", image.spec.block_device},
          {"size", image.spec.size.bytes()},
          {"cluster_size", image.spec.cluster_size.bytes()},
          {"cached", image.spec.cached},
          {"device", image.identity.device},
          {"inode", image.identity.inode},
          {"id", image.id},
          {"losses", image.losses}};
}

Result<ReceiverRecord::Image> image_from_json(const nlohmann::json& json) {
  if (!json.is_object())
    return fail(Code::Protocol, "an image in a receiver's record is no object");
  ReceiverRecord::Image image;
  DROVER_ASSIGN(image.spec.path, get_string(json, "path"));
  DROVER_ASSIGN(const std::string format, get_string(json, "format", 16));
  if (format != "raw" && format != "qcow2") {
    return fail(Code::Protocol, "a receiver's record names the format " + format);
  }
  image.spec.format = format == "raw" ? blockcopy::Format::Raw : blockcopy::Format::Qcow2;
  DROVER_ASSIGN(image.spec.block_device, get_bool(json, "block_device", false));
  DROVER_ASSIGN(image.spec.cached, get_bool(json, "cached", false));
  DROVER_ASSIGN(const std::uint64_t size, get_unsigned(json, "size", kMaxDiskSize.bytes()));
  image.spec.size = Length(size);
  DROVER_ASSIGN(const std::uint64_t cluster, get_unsigned(json, "cluster_size"));
  image.spec.cluster_size = Length(cluster);
  DROVER_ASSIGN(image.identity.device, get_unsigned(json, "device"));
  DROVER_ASSIGN(image.identity.inode, get_unsigned(json, "inode"));
  DROVER_ASSIGN(image.id, get_string(json, "id", 64));
  DROVER_ASSIGN(image.losses, get_unsigned(json, "losses"));
  return image;
}

Result<std::vector<ReceiverRecord::Image>> images_from_json(const nlohmann::json& record) {
  const auto list = record.find("images");
  if (list == record.end() || !list->is_array()) {
    return fail(Code::Protocol, "a receiver's record lists no images");
  }
  std::vector<ReceiverRecord::Image> images;
  for (const nlohmann::json& json : *list) {
    DROVER_ASSIGN(ReceiverRecord::Image image, image_from_json(json));
    images.push_back(std::move(image));
  }
  return images;
}

// Tells the receiver that holds the lock to end: nobody may have reached it.
void end_holder(const std::string& directory) {
  const std::int64_t pid = read_lock(directory).pid;
  if (pid > 1) ::kill(static_cast<pid_t>(pid), SIGTERM);
}

// Removes the file if it is still the one that was recorded.
void remove_image(const ReceiverRecord::Image& image, CleanupReport& report) {
  if (image.spec.block_device) return;  // never removed
  struct stat found {};
  if (::lstat(image.spec.path.c_str(), &found) != 0) {
    if (errno != ENOENT) report.kept.push_back(image.spec.path + ": " + std::strerror(errno));
    return;
  }
  if (!S_ISREG(found.st_mode) || found.st_dev != image.identity.device ||
      found.st_ino != image.identity.inode) {
    report.kept.push_back(image.spec.path + ": it is not the file that this job created");
    return;
  }
  if (::unlink(image.spec.path.c_str()) != 0) {
    report.kept.push_back(image.spec.path + ": " + std::strerror(errno));
    return;
  }
  report.removed.push_back(image.spec.path);
}

}  // namespace

void remove_memory_socket(const std::string& id) {
  const std::string path = memory_socket(id);
  struct stat found {};
  if (::lstat(path.c_str(), &found) == 0 && S_ISSOCK(found.st_mode)) ::unlink(path.c_str());
}

Result<std::unique_ptr<ReceiverRecord>> ReceiverRecord::create(const std::string& jobs_directory,
                                                               const std::string& id,
                                                               bool resumable) {
  DROVER_TRY(check_session_id(id));
  std::error_code error;
  std::filesystem::create_directories(jobs_directory, error);
  if (error) return fail_errno(error.value(), "making the directory " + jobs_directory);
  const std::string job = jobs_directory + "/" + id;
  const std::string directory = job + "/receiver";
  DROVER_TRY(make_directory(job));
  if (::mkdir(directory.c_str(), 0700) != 0) {
    if (errno != EEXIST) return fail_errno(errno, "making the directory " + directory);
    return fail(Code::AlreadyExists,
                fmt::format("the target has something of job {} already, in {}", id, directory),
                fmt::format("if no receiver of it runs: drover receive --cleanup {}", id));
  }
  DROVER_ASSIGN(UniqueFd lock, take_lock(directory, O_CREAT | O_EXCL));
  std::unique_ptr<ReceiverRecord> record(new ReceiverRecord(directory, id, std::move(lock)));
  record->resumable_ = resumable;
  DROVER_TRY(record->announce(0));
  DROVER_TRY(make_directory(record->work_directory()));
  DROVER_TRY(record->save());
  return record;
}

Result<std::unique_ptr<ReceiverRecord>> ReceiverRecord::resume(const std::string& jobs_directory,
                                                               const std::string& id) {
  DROVER_TRY(check_session_id(id));
  const std::string directory = jobs_directory + "/" + id + "/receiver";
  struct stat found {};
  if (::lstat(directory.c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) {
    return fail(Code::NotFound, fmt::format("no receiver has left anything of job {}", id));
  }
  DROVER_ASSIGN(UniqueFd lock, take_lock(directory, O_CREAT));
  std::unique_ptr<ReceiverRecord> record(new ReceiverRecord(directory, id, std::move(lock)));
  DROVER_ASSIGN(const nlohmann::json json, load(directory + "/record.json"));
  DROVER_TRY(record->load_from(json));
  if (!record->resumable_ || record->proved_) {
    return fail(Code::Denied,
                fmt::format("the receiver of job {} can't be resumed: {}", id,
                            record->proved_ ? "its images were handed over"
                                            : "it was not started as one that can"),
                "see " + directory + "/record.json");
  }
  // What a killed one has left there.
  std::error_code ignored;
  std::filesystem::remove_all(record->work_directory(), ignored);
  DROVER_TRY(make_directory(record->work_directory()));
  DROVER_TRY(record->announce(0));
  return record;
}

Status ReceiverRecord::announce(std::uint16_t port) {
  const std::string text = fmt::format("{} {}\n", ::getpid(), port);
  if (::ftruncate(lock_.get(), 0) != 0 ||
      ::pwrite(lock_.get(), text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
    return fail_errno(errno, "writing " + directory_ + "/lock");
  }
  return {};
}

Result<ReceiverRecord::Image> ReceiverRecord::describe(const blockcopy::TargetImage& made) {
  Image image;
  image.spec = made.spec();
  image.identity = made.identity();
  DROVER_ASSIGN(const LinkKey random, random_key());
  constexpr std::size_t kIdSize = 16;
  image.id = key_to_hex(random).substr(0, kIdSize);
  return image;
}

Status ReceiverRecord::add_image(const blockcopy::TargetImage& image) {
  DROVER_ASSIGN(Image described, describe(image));
  images_.push_back(std::move(described));
  return save();
}

Status ReceiverRecord::replace_image(std::size_t index, const blockcopy::TargetImage& image) {
  DROVER_ASSIGN(images_.at(index), describe(image));
  return save();
}

Status ReceiverRecord::note_loss(std::size_t index) {
  ++images_.at(index).losses;
  return save();
}

Status ReceiverRecord::discard(std::size_t index) {
  CleanupReport report;
  remove_image(images_.at(index), report);
  if (!report.kept.empty()) return fail(Code::Busy, report.kept.front());
  return {};
}

Status ReceiverRecord::barrier_passed() {
  proved_ = true;
  return save();
}

Status ReceiverRecord::keep_images() {
  keep_ = true;
  return save();
}

Status ReceiverRecord::images_removed() {
  images_.clear();
  keep_ = proved_ = false;
  return save();
}

Status ReceiverRecord::load_from(const nlohmann::json& record) {
  DROVER_ASSIGN(const std::string job, get_string(record, "job", 64));
  if (job != id_) return fail(Code::Protocol, directory_ + "/record.json is that of job " + job);
  DROVER_ASSIGN(keep_, get_bool(record, "keep", false));
  DROVER_ASSIGN(resumable_, get_bool(record, "resumable", false));
  DROVER_ASSIGN(proved_, get_bool(record, "proved", false));
  DROVER_ASSIGN(images_, images_from_json(record));
  return {};
}

Status ReceiverRecord::save() {
  nlohmann::json images = nlohmann::json::array();
  for (const Image& image : images_) images.push_back(image_to_json(image));
  const nlohmann::json json = {
      {"version", kRecordVersion}, {"job", id_},        {"keep", keep_},
      {"resumable", resumable_},   {"proved", proved_}, {"images", std::move(images)}};
  const std::string text =
      json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  const std::string path = directory_ + "/record.json";
  const std::string fresh = path + ".new";
  {
    const UniqueFd fd(
        ::open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) return fail_errno(errno, "writing " + fresh);
    std::string_view left = text;
    while (!left.empty()) {
      const ssize_t count = ::write(fd.get(), left.data(), left.size());
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return fail_errno(errno, "writing " + fresh);
      left.remove_prefix(static_cast<std::size_t>(count));
    }
    if (::fsync(fd.get()) != 0) return fail_errno(errno, "writing " + fresh);
  }
  if (::rename(fresh.c_str(), path.c_str()) != 0) return fail_errno(errno, "writing " + path);
  return sync_directory(directory_);
}

void ReceiverRecord::remove() { remove_tree(directory_); }

Result<RunningReceiver> running_receiver(const std::string& jobs_directory, const std::string& id) {
  DROVER_TRY(check_session_id(id));
  const std::string directory = jobs_directory + "/" + id + "/receiver";
  const auto lock = take_lock(directory, 0);
  if (!lock && lock.error().code == Code::Busy) return read_lock(directory);
  return fail(Code::NotFound, fmt::format("no receiver of job {} is alive", id));
}

Status stop_receiver(const std::string& jobs_directory, const std::string& id,
                     std::chrono::milliseconds patience) {
  DROVER_TRY(check_session_id(id));
  const std::string directory = jobs_directory + "/" + id + "/receiver";
  const Instant deadline = now() + patience;
  bool told = false;
  while (true) {
    const auto lock = take_lock(directory, 0);
    if (lock || lock.error().code == Code::NotFound) return {};
    if (lock.error().code != Code::Busy || now() >= deadline) return fail(lock.error());
    if (!std::exchange(told, true)) end_holder(directory);
    std::this_thread::sleep_for(kLockRetry);
  }
}

Result<CleanupReport> cleanup_receiver(const std::string& jobs_directory, const std::string& id,
                                       KeptImages kept, std::chrono::milliseconds patience) {
  DROVER_TRY(check_session_id(id));
  remove_memory_socket(id);
  const std::string directory = jobs_directory + "/" + id + "/receiver";
  struct stat found {};
  if (::lstat(directory.c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) {
    return fail(Code::NotFound, fmt::format("no receiver has left anything of job {}", id));
  }
  CleanupReport report;
  const Instant deadline = now() + patience;
  auto lock = take_lock(directory, O_CREAT);
  if (!lock && lock.error().code == Code::Busy && kept == KeptImages::Remove) end_holder(directory);
  while (!lock && lock.error().code == Code::Busy && now() < deadline) {
    std::this_thread::sleep_for(kLockRetry);
    lock = take_lock(directory, O_CREAT);
  }
  if (!lock && lock.error().code == Code::NotFound) return report;  // it has cleared up itself
  if (!lock) return fail(std::move(lock).error());
  if (::lstat(directory.c_str(), &found) != 0) return report;
  auto record = load(directory + "/record.json");
  if (record) {
    DROVER_ASSIGN(const bool keep, get_bool(*record, "keep", false));
    if (keep && kept == KeptImages::Refuse) {
      return fail(
          Code::Denied,
          fmt::format("the handover of job {} had begun: its images on this host may be the "
                      "guest's only disks, they are kept",
                      id),
          "see " + directory +
              "/record.json; make sure where the guest runs before you "
              "remove anything by hand");
    }
    DROVER_ASSIGN(const auto images, images_from_json(*record));
    if (!keep || kept != KeptImages::Leave) {
      for (const ReceiverRecord::Image& image : images) remove_image(image, report);
    }
  } else if (record.error().code != Code::NotFound) {
    return fail(std::move(record).error());
  }
  remove_tree(directory);
  return report;
}

}  // namespace drover::mirror
