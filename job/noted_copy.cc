// SPDX-License-Identifier: Apache-2.0
#include "job/noted_copy.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "blockcopy/image_file.h"

namespace drover::job {

namespace {

// "trusted": only root may write it. A filesystem that has no such attributes (NFS) gets no note.
constexpr const char* kNote = "trusted.drover.copy-of";

// The same for the same source, so that the next run finds what a killed one has left; no other
// source's, whatever they are called.
Result<std::string> staged(const std::string& source, const std::string& directory) {
  struct stat status {};
  if (::stat(source.c_str(), &status) != 0) return fail_errno(errno, "looking at " + source);
  return blockcopy::staged_path(directory + "/",
                                fmt::format("evacuate-{:x}-{}", status.st_dev, status.st_ino));
}

Error copied_by_another(const std::string& source) {
  return {Code::Busy, "another drover copies " + source + " now",
          "'drover jobs' shows what it does", false};
}

// Whoever makes a copy has it locked. False: another has. (A filesystem may have no locks.)
bool lock_copy(int fd) { return ::flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK; }

bool is_called(int fd, const std::string& path) {
  struct stat ours {};
  struct stat there {};
  return ::fstat(fd, &ours) == 0 && ::lstat(path.c_str(), &there) == 0 &&
         ours.st_dev == there.st_dev && ours.st_ino == there.st_ino;
}

// Waits until so much may have been copied; false when cancelled.
bool keep_pace(Instant begin, Length copied, Length bandwidth, Cancel& cancel) {
  while (bandwidth != Length()) {
    const double due = static_cast<double>(copied.bytes()) / static_cast<double>(bandwidth.bytes());
    const double left = due - std::chrono::duration<double>(now() - begin).count();
    if (left <= 0) break;
    pollfd stop{cancel.fd(), POLLIN, 0};
    ::poll(&stop, 1, static_cast<int>(left * 1000) + 1);
    if (cancel.requested()) break;
  }
  return !cancel.requested();
}

Status write_all(int fd, const char* data, std::size_t size, const std::string& doing) {
  while (size > 0) {
    const ssize_t written = ::write(fd, data, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return fail_errno(errno, doing);
    data += written;
    size -= static_cast<std::size_t>(written);
  }
  return {};
}

Status copy_data(const std::string& source, int to, const std::string& hidden,
                 const NotedCopyOptions& options, Cancel& cancel) {
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  const std::string reading = "reading " + source;
  const UniqueFd from(::open(source.c_str(), O_RDONLY | O_CLOEXEC));
  if (!from) return fail_errno(errno, reading);
  const Instant begin = now();
  Length copied;
  std::vector<char> buffer(kPiece);
  for (;;) {
    if (!keep_pace(begin, copied, options.bandwidth, cancel)) {
      return fail(Code::Cancelled, "copying " + source + " was cancelled");
    }
    const ssize_t got = ::read(from.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno(errno, reading);
    if (got == 0) return {};
    DROVER_TRY(write_all(to, buffer.data(), static_cast<std::size_t>(got), "writing " + hidden));
    copied += Length(static_cast<std::uint64_t>(got));
    if (options.progress) options.progress(copied);
  }
}

// By its descriptor throughout: the name may be another's by then.
Result<std::string> copy_staged(const std::string& source, int to, const std::string& hidden,
                                const std::string& target, const NotedCopyOptions& options,
                                Cancel& cancel) {
  DROVER_ASSIGN(const std::string note, note_of(source));
  DROVER_TRY(copy_data(source, to, hidden, options, cancel));
  DROVER_ASSIGN(const std::string after, note_of(source));
  if (after != note) return fail(Code::Busy, source + " was changed while it was copied");
  DROVER_TRY(blockcopy::take_after(source, to, hidden));
  if (::fsetxattr(to, kNote, note.data(), note.size(), 0) != 0) {
    log_warning("{}", error_from_errno(errno, "setting an attribute of " + hidden).message);
  }
  if (::fsync(to) != 0) return fail_errno(errno, "flushing " + hidden);
  if (!is_called(to, hidden)) return fail(copied_by_another(source));
  DROVER_TRY(blockcopy::publish(hidden, target));
  return note;
}

std::string directory_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

}  // namespace

Result<std::string> note_of(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return fail_errno(errno, "looking at " + path);
  return fmt::format("{} {} {}.{:09} {}", status.st_ino, status.st_size, status.st_mtim.tv_sec,
                     status.st_mtim.tv_nsec, path);
}

Result<std::string> noted_on(const std::string& copy) {
  std::array<char, 8192> note{};
  const ssize_t size = ::lgetxattr(copy.c_str(), kNote, note.data(), note.size());
  if (size <= 0) return fail(Code::NotFound, copy + " is no copy of drover's");
  return std::string(note.data(), static_cast<std::size_t>(size));
}

std::map<std::string, std::string> noted_copies(const std::string& directory) {
  std::map<std::string, std::string> out;
  std::error_code error;
  for (std::filesystem::directory_iterator at(directory, error), end; !error && at != end;
       at.increment(error)) {
    const std::string path = at->path().string();
    if (auto note = noted_on(path)) out.emplace(std::move(*note), path);
  }
  // Hidden: not complete.
  std::erase_if(out,
                [](const auto& one) { return one.second.find("/.drover-") != std::string::npos; });
  return out;
}

Result<std::string> copy_noted(const std::string& source, const std::string& target,
                               const NotedCopyOptions& options, Cancel& cancel) {
  DROVER_TRY(remove_unfinished_copy(source, directory_of(target)));
  DROVER_ASSIGN(const std::string hidden, staged(source, directory_of(target)));
  const UniqueFd to(::open(hidden.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!to && errno == EEXIST) return fail(copied_by_another(source));
  if (!to) return fail_errno(errno, "making " + hidden);
  if (!lock_copy(to.get()) || !is_called(to.get(), hidden)) return fail(copied_by_another(source));
  auto copied = copy_staged(source, to.get(), hidden, target, options, cancel);
  if (!copied && is_called(to.get(), hidden)) ::unlink(hidden.c_str());
  return copied;
}

Status remove_unfinished_copy(const std::string& source, const std::string& directory) {
  DROVER_ASSIGN(const std::string hidden, staged(source, directory));
  const UniqueFd there(::open(hidden.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!there && errno == ENOENT) return {};
  if (!there) return fail_errno(errno, "opening " + hidden);
  if (!lock_copy(there.get())) return fail(copied_by_another(source));
  if (is_called(there.get(), hidden)) ::unlink(hidden.c_str());
  return {};
}

void forget_note(const std::string& path) { ::removexattr(path.c_str(), kNote); }

}  // namespace drover::job
