// SPDX-License-Identifier: Apache-2.0
#include "blockcopy/image_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <optional>
#include <string_view>
#include <thread>

#include "base/log.h"
#include "base/priority.h"
#include "base/subprocess.h"
#include "base/unique_fd.h"

namespace drover::blockcopy {
namespace {

constexpr mode_t kPermissions = 07777;

std::string directory_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == 0 ? "/" : path.substr(0, slash);
}

Status sync_directory(const std::string& directory) {
  const UniqueFd fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // EINVAL: this filesystem has nothing to synchronise in a directory.
  if (!fd || (::fsync(fd.get()) != 0 && errno != EINVAL)) {
    return fail_errno(errno, "flushing the directory " + directory);
  }
  return {};
}

Status in_the_way(const std::string& path) {
  return fail(Code::AlreadyExists, path + " already exists",
              "drover never overwrites a file: move it away or choose another path");
}

bool has_no_name(int fd) {
  struct stat status {};
  return ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_nlink == 0;
}

// Nobody can reach the file but by this descriptor. (A lease is granted to whoever has it open
// alone.)
bool is_ours_alone(int fd) {
  if (!has_no_name(fd)) return false;
  if (::fcntl(fd, F_SETLEASE, F_WRLCK) != 0) return false;
  return ::fcntl(fd, F_SETLEASE, F_UNLCK) == 0;
}

// Frees its blocks for two thirds of the time. What it can't free goes when the file is closed. (ext4, a
// piece: 2 MiB 0.7 ms, 4 MiB 1.1, 8 MiB 2.0. So long others wait.)
void free_in_pieces(int fd) {
  constexpr off_t kPiece = off_t{4} << 20;
  for (off_t at = ::lseek(fd, 0, SEEK_DATA); at >= 0; at = ::lseek(fd, at + kPiece, SEEK_DATA)) {
    const auto start = std::chrono::steady_clock::now();
    if (::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, kPiece) != 0) return;
    std::this_thread::sleep_for((std::chrono::steady_clock::now() - start) / 2);
  }
}

struct Owner {
  uid_t user = 0;
  gid_t group = 0;
};

// libvirt's note of a file's owner from before it was QEMU's: "+UID:+GID".
std::optional<Owner> owner_before_libvirt(int fd) {
  std::array<char, 64> text{};
  const ssize_t length = ::fgetxattr(fd, "trusted.libvirt.security.dac", text.data(), text.size());
  if (length <= 0) return std::nullopt;
  const std::string_view value(text.data(), static_cast<std::size_t>(length));
  const std::size_t colon = value.find(':');
  if (colon == std::string_view::npos) return std::nullopt;
  const auto number = [](std::string_view part) -> std::optional<unsigned> {
    if (!part.starts_with('+')) return std::nullopt;
    part.remove_prefix(1);
    while (!part.empty() && part.back() == '\0') part.remove_suffix(1);
    unsigned out = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), out);
    if (error != std::errc() || end != part.data() + part.size()) return std::nullopt;
    return out;
  };
  const auto user = number(value.substr(0, colon));
  const auto group = number(value.substr(colon + 1));
  if (!user || !group) return std::nullopt;
  return Owner{*user, *group};
}

}  // namespace

std::string staged_path(const std::string& path, const std::string& tag) {
  const std::string directory = directory_of(path);
  return (directory == "/" ? "" : directory) + "/.drover-" + tag;
}

Result<ImageIdentity> identify_file(const std::string& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) return fail_errno(errno, "looking at " + path);
  if (S_ISBLK(status.st_mode)) return ImageIdentity{status.st_rdev, 0};
  return ImageIdentity{status.st_dev, status.st_ino};
}

bool same_file(const std::string& a, const std::string& b) {
  struct stat one {};
  struct stat other {};
  if (::stat(a.c_str(), &one) != 0 || ::stat(b.c_str(), &other) != 0) return false;
  if (S_ISBLK(one.st_mode) && S_ISBLK(other.st_mode)) return one.st_rdev == other.st_rdev;
  return one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

Result<Length> allocated(const std::string& path) {
  constexpr std::uint64_t kUnit = 512;  // stat(2)
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return fail_errno(errno, "looking at " + path);
  return Length(static_cast<std::uint64_t>(status.st_blocks) * kUnit);
}

Status take_after(const std::string& example, const std::string& path) {
  const UniqueFd to(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!to) return fail_errno(errno, "setting the owner and mode of " + path);
  return take_after(example, to.get(), path);
}

Status take_after(const std::string& example, int fd, const std::string& path) {
  const UniqueFd from(::open(example.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status {};
  if (!from || ::fstat(from.get(), &status) != 0) return fail_errno(errno, "looking at " + example);
  // A device's owner and mode are not a file's.
  if (!S_ISREG(status.st_mode)) return {};
  const Owner owner =
      owner_before_libvirt(from.get()).value_or(Owner{status.st_uid, status.st_gid});
  if (::fchown(fd, owner.user, owner.group) != 0 ||
      ::fchmod(fd, status.st_mode & kPermissions) != 0) {
    return fail_errno(errno, "setting the owner and mode of " + path);
  }
  return {};
}

Status publish(const std::string& staged, const std::string& path) {
  const std::string doing = "renaming " + staged + " to " + path;
  if (::renameat2(AT_FDCWD, staged.c_str(), AT_FDCWD, path.c_str(), RENAME_NOREPLACE) != 0) {
    if (errno == EEXIST) return in_the_way(path);
    if (errno != EINVAL && errno != ENOSYS) return fail_errno(errno, doing);
    // This filesystem (NFS) can't; a link is exclusive on every one that has links.
    if (::link(staged.c_str(), path.c_str()) != 0) {
      if (errno == EEXIST) return in_the_way(path);
      return fail_errno(errno, doing);
    }
    if (::unlink(staged.c_str()) != 0) return fail_errno(errno, doing);
  }
  return sync_directory(directory_of(path));
}

Status link_file(const std::string& path, const std::string& second) {
  if (::link(path.c_str(), second.c_str()) != 0) {
    if (errno == EEXIST) return in_the_way(second);
    Error error = error_from_errno(errno, "giving " + path + " the name " + second);
    if (errno == EXDEV || errno == EPERM || errno == EMLINK || errno == EOPNOTSUPP) {
      error.code = Code::Incompatible;
    }
    return fail(std::move(error));
  }
  return sync_directory(directory_of(second));
}

Status clone_file(const std::string& path, const std::string& copy) {
  const std::string doing = "cloning " + path + " as " + copy;
  const UniqueFd from(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!from) return fail_errno(errno, doing);
  const UniqueFd to(::open(copy.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!to) return errno == EEXIST ? in_the_way(copy) : Status(fail_errno(errno, doing));
  if (::ioctl(to.get(), FICLONE, from.get()) == 0 && ::fsync(to.get()) == 0) return {};
  Error error = error_from_errno(errno, doing);
  if (errno == EOPNOTSUPP || errno == ENOTTY || errno == EXDEV || errno == EINVAL) {
    error.code = Code::Incompatible;
  }
  ::unlink(copy.c_str());
  return fail(std::move(error));
}

Status sync_file(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd || ::fsync(fd.get()) != 0) return fail_errno(errno, "flushing " + path);
  return sync_directory(directory_of(path));
}

Result<UnlinkedFile> unlink_open(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  // Another program can have it under this number.
  if (fd && fd.get() <= STDERR_FILENO) fd = UniqueFd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, STDERR_FILENO + 1));
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    return fail_errno(errno, "deleting " + path);
  }
  return UnlinkedFile(std::move(fd));
}

Status unlink_file(const std::string& path) {
  const Result<UnlinkedFile> gone = unlink_open(path);
  return gone ? Status() : fail(gone.error());
}

namespace {

// 0: nothing that could be freed by somebody else.
std::uint64_t freeable(int fd) {
  constexpr std::uint64_t kUnit = 512;  // stat(2)
  struct stat status {};
  if (fd < 0 || ::fstat(fd, &status) != 0 || !is_ours_alone(fd)) return 0;
  return static_cast<std::uint64_t>(status.st_blocks) * kUnit;
}

// A file's descriptor, whose name is gone; else none.
std::optional<int> unlinked_descriptor(const std::string& word) {
  int fd = -1;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), fd);
  if (error != std::errc() || end != word.data() + word.size()) return std::nullopt;
  return fd > STDERR_FILENO && has_no_name(fd) ? std::optional(fd) : std::nullopt;
}

}  // namespace

void free_in_background(std::vector<NamedFile> files, const std::vector<std::string>& program) {
  std::uint64_t bytes = 0;
  std::vector<std::string> argv = program;
  std::vector<int> descriptors;
  for (const NamedFile& one : files) {
    const std::uint64_t its = freeable(one.file.fd());
    if (its == 0) continue;
    bytes += its;
    argv.insert(argv.end(), {std::to_string(one.file.fd()), one.path});
    descriptors.push_back(one.file.fd());
  }
  if (bytes <= kFreedAtOnce) return;
  const auto started = run_process(argv, {.descriptors = descriptors});
  if (started && started->exit_code == 0) {
    for (NamedFile& one : files) one.file.leave();
  } else {
    log_warning("deleted files are freed in the foreground: {}", started ? started->err : started.error().to_string());
  }
}

int run_free_command(const std::vector<std::string>& words) {
  std::vector<int> files;
  for (std::size_t i = 0; i < words.size(); i += 2) {
    const std::optional<int> fd = unlinked_descriptor(words[i]);
    if (!fd) return 2;
    files.push_back(*fd);
  }
  if (files.empty() || words.size() % 2 != 0) return 2;
  const pid_t child = ::fork();
  if (child != 0) return child > 0 ? 0 : 2;
  ::setsid();  // neither Ctrl-C nor the terminal's end is meant for it
  if (::chdir("/") != 0) return 2;
  for (const int standard : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::close(standard);  // somebody may read until then
  give_way();
  for (const int fd : files) {
    free_in_pieces(fd);
    ::close(fd);
  }
  return 0;
}

UnlinkedFile::~UnlinkedFile() {
  if (fd_ && is_ours_alone(fd_.get())) free_in_pieces(fd_.get());
}

Result<UnlinkedFile> remove_file(const std::string& path, const ImageIdentity& identity) {
  const auto present = identify_file(path);
  if (!present && present.error().code == Code::NotFound) return UnlinkedFile();
  if (!present) return fail(present.error());
  if (*present != identity) {
    return fail(Code::Busy, path + " is another file by now; it was left alone");
  }
  DROVER_ASSIGN(UnlinkedFile gone, unlink_open(path));
  DROVER_TRY(sync_directory(directory_of(path)));
  return gone;
}

namespace {

Result<std::string> word_of(const std::string& path, int which) {
  std::ifstream file(path);
  std::string word;
  for (int i = 0; i < which; ++i) file >> word;
  if (!file || word.empty()) return fail(Code::Io, "reading " + path);
  return word;
}

// Documentation/ABI/stable/sysfs-block: the seventh of `stat` is the sectors written; a device that is
// made anew gets another sequence number; its queue tells whether it counts, a partition's is its disk's.
Result<std::string> device_stamp(const std::string& path, dev_t device) {
  const std::string folder = fmt::format("/sys/dev/block/{}:{}/", major(device), minor(device));
  auto counts = word_of(folder + "queue/iostats", 1);
  if (!counts) counts = word_of(folder + "../queue/iostats", 1);
  if (!counts || *counts == "0") return fail(Code::Incompatible, path + " does not count what is written to it");
  DROVER_ASSIGN(const std::string written, word_of(folder + "stat", 7));
  return fmt::format("device {} {}", word_of(folder + "diskseq", 1).value_or("0"), written);
}

}  // namespace

Result<std::string> image_stamp(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return fail_errno(errno, "looking at " + path);
  DROVER_ASSIGN(const std::string boot, word_of("/proc/sys/kernel/random/boot_id", 1));
  if (S_ISREG(status.st_mode)) {
    return fmt::format("{} file {}.{:09}", boot, status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
  }
  if (!S_ISBLK(status.st_mode)) return fail(Code::InvalidArgument, path + " is no image");
  DROVER_ASSIGN(const std::string device, device_stamp(path, status.st_rdev));
  return fmt::format("{} {}", boot, device);
}

}  // namespace drover::blockcopy
