// SPDX-License-Identifier: Apache-2.0
#include "blockcopy/target_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

namespace drover::blockcopy {
namespace {

std::string directory_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

Result<TargetFile::Identity> TargetFile::identify(int directory, const std::string& path,
                                                  int flags) {
  struct statx info {};
  if (::statx(directory, path.c_str(), flags, STATX_BASIC_STATS | STATX_BTIME, &info) != 0) {
    return fail_errno(errno, "looking at " + path);
  }
  Identity identity;
  identity.device = makedev(info.stx_dev_major, info.stx_dev_minor);
  identity.inode = info.stx_ino;
  if ((info.stx_mask & STATX_BTIME) != 0) {
    identity.birth_seconds = info.stx_btime.tv_sec;
    identity.birth_nanoseconds = info.stx_btime.tv_nsec;
  }
  return identity;
}

Result<TargetFile> TargetFile::create(const std::string& path) {
  TargetFile file;
  file.path_ = path;
  // O_EXCL: nothing is followed or overwritten, not even a dangling symbolic link.
  file.fd_ = UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!file.fd_) {
    Error error = error_from_errno(errno, "creating the target image " + path);
    if (error.code == Code::AlreadyExists) {
      error.message = "the target image " + path + " already exists";
      error.hint = "drover never overwrites a file: move it away or choose another path";
    }
    return fail(std::move(error));
  }
  Status made;
  if (::fchmod(file.fd_.get(), 0600) != 0) {  // whatever the umask
    made = fail_errno(errno, "setting the mode of " + path);
  }
  if (made) {
    auto identity = identify(file.fd_.get(), "", AT_EMPTY_PATH);
    if (identity) {
      file.identity_ = *identity;
      return file;
    }
    made = fail(std::move(identity.error()));
  }
  ::unlink(path.c_str());
  return fail(std::move(made.error()));
}

Result<TargetFile> TargetFile::open(const std::string& path, const ImageIdentity& expected) {
  const std::string doing = "opening the target image " + path;
  TargetFile file;
  file.path_ = path;
  // Without waiting for what is no regular file.
  file.fd_ = UniqueFd(::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat info {};
  if (!file.fd_ && errno != ELOOP) return fail_errno(errno, doing);
  if (!file.fd_ || ::fstat(file.fd_.get(), &info) != 0 || !S_ISREG(info.st_mode) ||
      ImageIdentity{info.st_dev, info.st_ino} != expected) {
    return fail(Code::Busy, path + " is another file now than the one drover made",
                "something has replaced it: drover does not write to it");
  }
  DROVER_ASSIGN(file.identity_, identify(file.fd_.get(), "", AT_EMPTY_PATH));
  return file;
}

Status TargetFile::flush() {
  if (!flushed_) return flushed_;
  if (::fdatasync(fd_.get()) != 0) {
    flushed_ = fail_errno(errno, "flushing the target image " + path_);
    return flushed_;
  }
  if (directory_synced_) return {};
  const std::string directory = directory_of(path_);
  const UniqueFd fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // EINVAL: this filesystem has nothing to synchronise in a directory.
  if (!fd || (::fsync(fd.get()) != 0 && errno != EINVAL)) {
    flushed_ = fail_errno(errno, "flushing the directory " + directory);
    return flushed_;
  }
  directory_synced_ = true;
  return {};
}

Status TargetFile::remove() {
  close();
  const auto present = identify(AT_FDCWD, path_, AT_SYMLINK_NOFOLLOW);
  if (!present) {
    if (present.error().code == Code::NotFound) return {};
    return fail(present.error());
  }
  if (*present != identity_) {
    return fail(Code::Busy,
                path_ + " is another file now than the one drover made; it was left alone");
  }
  if (::unlink(path_.c_str()) != 0 && errno != ENOENT) {
    return fail_errno(errno, "deleting " + path_);
  }
  return {};
}

}  // namespace drover::blockcopy
