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

#include "base/clock.h"
#include "mirror/session.h"

namespace drover::mirror {

namespace {

constexpr std::size_t kMaxRecord = std::size_t{1} << 20;
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
  return parse_object(text, path);
}

// Tells the receiver that holds the lock to end: nobody may have reached it.
void end_holder(const std::string& directory) {
  std::ifstream in(directory + "/lock");
  pid_t pid = 0;
  if (in >> pid && pid > 1) ::kill(pid, SIGTERM);
}

// Removes the file if it is still the one that was recorded.
void remove_image(const ReceiverRecord::Image& image, CleanupReport& report) {
  struct stat found {};
  if (::lstat(image.path.c_str(), &found) != 0) {
    if (errno != ENOENT) report.kept.push_back(image.path + ": " + std::strerror(errno));
    return;
  }
  if (!S_ISREG(found.st_mode) || found.st_dev != image.device || found.st_ino != image.inode) {
    report.kept.push_back(image.path + ": it is not the file that this job created");
    return;
  }
  if (::unlink(image.path.c_str()) != 0) {
    report.kept.push_back(image.path + ": " + std::strerror(errno));
    return;
  }
  report.removed.push_back(image.path);
}

}  // namespace

void remove_memory_socket(const std::string& id) {
  const std::string path = memory_socket(id);
  struct stat found {};
  if (::lstat(path.c_str(), &found) == 0 && S_ISSOCK(found.st_mode)) ::unlink(path.c_str());
}

Result<std::unique_ptr<ReceiverRecord>> ReceiverRecord::create(const std::string& jobs_directory,
                                                               const std::string& id) {
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
  // Whose lock it is, for who must end it.
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::write(lock.get(), pid.data(), pid.size()) != static_cast<ssize_t>(pid.size())) {
    return fail_errno(errno, "writing " + directory + "/lock");
  }
  std::unique_ptr<ReceiverRecord> record(new ReceiverRecord(directory, id, std::move(lock)));
  DROVER_TRY(make_directory(record->work_directory()));
  DROVER_TRY(record->save());
  return record;
}

Status ReceiverRecord::add_image(const std::string& path) {
  struct stat made {};
  if (::lstat(path.c_str(), &made) != 0)
    return fail_errno(errno, "looking at the new image " + path);
  images_.push_back({path, made.st_dev, made.st_ino});
  return save();
}

Status ReceiverRecord::keep_images() {
  keep_ = true;
  return save();
}

Status ReceiverRecord::images_removed() {
  images_.clear();
  keep_ = false;
  return save();
}

Status ReceiverRecord::save() {
  nlohmann::json images = nlohmann::json::array();
  for (const Image& image : images_) {
    images.push_back({{"path", image.path}, {"device", image.device}, {"inode", image.inode}});
  }
  const nlohmann::json json = {
      {"version", 1}, {"job", id_}, {"keep", keep_}, {"images", std::move(images)}};
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
      return fail(Code::Denied,
                  fmt::format("the handover of job {} had begun: its images on this host may be the "
                              "guest's only disks, they are kept",
                              id),
                  "see " + directory +
                      "/record.json; make sure where the guest runs before you "
                      "remove anything by hand");
    }
    const auto images = record->find("images");
    const bool leave = keep && kept == KeptImages::Leave;
    if (!leave && images != record->end() && images->is_array()) {
      for (const nlohmann::json& json : *images) {
        if (!json.is_object()) continue;
        ReceiverRecord::Image image;
        DROVER_ASSIGN(image.path, get_string(json, "path"));
        DROVER_ASSIGN(image.device, get_unsigned(json, "device"));
        DROVER_ASSIGN(image.inode, get_unsigned(json, "inode"));
        remove_image(image, report);
      }
    }
  } else if (record.error().code != Code::NotFound) {
    return fail(std::move(record).error());
  }
  remove_tree(directory);
  return report;
}

}  // namespace drover::mirror
