// SPDX-License-Identifier: Apache-2.0
#include "memmig/image_lock.h"

#include <fcntl.h>

#include <cerrno>
#include <utility>

namespace drover::memmig {

namespace {
constexpr off_t kWriting = 101;    // RAW_LOCK_PERM_BASE + the bit of BLK_PERM_WRITE
constexpr off_t kNoWriters = 201;  // RAW_LOCK_SHARED_BASE + the same

struct flock byte_lock(short type, off_t byte) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = byte;
  lock.l_len = 1;
  return lock;
}
}  // namespace

Result<ImageLock> lock_image(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return fail_errno(errno, "opening " + path + " to guard it");
  struct flock guard = byte_lock(F_RDLCK, kNoWriters);
  if (::fcntl(fd.get(), F_OFD_SETLK, &guard) != 0) return fail_errno(errno, "guarding " + path);
  // As QEMU asks: could this byte be locked exclusively? If not, somebody writes to the image.
  struct flock writer = byte_lock(F_WRLCK, kWriting);
  if (::fcntl(fd.get(), F_OFD_GETLK, &writer) != 0) return fail_errno(errno, "guarding " + path);
  if (writer.l_type != F_UNLCK) {
    return fail(Error{Code::Busy, path + " is open for writing by a QEMU on this host", "", true});
  }
  return ImageLock(std::move(fd));
}

}  // namespace drover::memmig
