// SPDX-License-Identifier: Apache-2.0
#include "job/noted_copy.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
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

// The same for the same copy, so that the next run finds what a killed one has left.
std::string staged(const std::string& target) {
  return blockcopy::staged_path(target, "evacuate-" + target.substr(target.rfind('/') + 1));
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

Status copy_data(const std::string& source, const std::string& target,
                 const NotedCopyOptions& options, Cancel& cancel) {
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  const std::string reading = "reading " + source;
  const UniqueFd from(::open(source.c_str(), O_RDONLY | O_CLOEXEC));
  if (!from) return fail_errno(errno, reading);
  const UniqueFd to(::open(target.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!to) return fail_errno(errno, "making " + target);
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
    DROVER_TRY(
        write_all(to.get(), buffer.data(), static_cast<std::size_t>(got), "writing " + target));
    copied += Length(static_cast<std::uint64_t>(got));
    if (options.progress) options.progress(copied);
  }
}

Status copy_staged(const std::string& source, const std::string& hidden, const std::string& target,
                   const NotedCopyOptions& options, Cancel& cancel) {
  DROVER_ASSIGN(const std::string note, note_of(source));
  DROVER_TRY(copy_data(source, hidden, options, cancel));
  DROVER_ASSIGN(const std::string after, note_of(source));
  if (after != note) return fail(Code::Busy, source + " was changed while it was copied");
  DROVER_TRY(blockcopy::take_after(source, hidden));
  if (::setxattr(hidden.c_str(), kNote, note.data(), note.size(), 0) != 0) {
    log_warning("{}", error_from_errno(errno, "setting an attribute of " + hidden).message);
  }
  DROVER_TRY(blockcopy::sync_file(hidden));
  return blockcopy::publish(hidden, target);
}

}  // namespace

Result<std::string> note_of(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return fail_errno(errno, "looking at " + path);
  return fmt::format("{} {} {}.{:09} {}", status.st_ino, status.st_size, status.st_mtim.tv_sec,
                     status.st_mtim.tv_nsec, path);
}

std::map<std::string, std::string> noted_copies(const std::string& directory) {
  std::map<std::string, std::string> out;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    std::array<char, 8192> note{};
    const std::string path = entry.path().string();
    const ssize_t size = ::lgetxattr(path.c_str(), kNote, note.data(), note.size());
    if (size > 0) out.emplace(std::string(note.data(), static_cast<std::size_t>(size)), path);
  }
  // Hidden: not complete.
  std::erase_if(out,
                [](const auto& one) { return one.second.find("/.drover-") != std::string::npos; });
  return out;
}

Status copy_noted(const std::string& source, const std::string& target,
                  const NotedCopyOptions& options, Cancel& cancel) {
  remove_unfinished_copy(target);
  const std::string hidden = staged(target);
  Status copied = copy_staged(source, hidden, target, options, cancel);
  if (!copied) remove_unfinished_copy(target);
  return copied;
}

void remove_unfinished_copy(const std::string& target) { ::unlink(staged(target).c_str()); }

void forget_note(const std::string& path) { ::removexattr(path.c_str(), kNote); }

}  // namespace drover::job
