// SPDX-License-Identifier: Apache-2.0
//
// What is done with image files besides reading and writing them: an image is made under a hidden
// name and gets its own when it may be seen, exclusively; it is removed only while it is the same
// file; it gets another one's owner.
//
//   const std::string staged = staged_path("/mnt/b/web1.raw", "web1-1f3a5c77-vda");
//   ... create_target({.path = staged, ...}), release() ...
//   DROVER_TRY(take_after("/mnt/a/web1.raw", staged));
//   DROVER_TRY(publish(staged, "/mnt/b/web1.raw"));
//
// So whoever is killed in between leaves only a hidden file whose name says whose it is.
//
// Threads: any; all of it blocks on the disk.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/result.h"
#include "base/unique_fd.h"
#include "base/units.h"
#include "blockcopy/image.h"

namespace drover::blockcopy {

// In the same directory, so that a rename is enough.
std::string staged_path(const std::string& path, const std::string& tag);

// NotFound if there is nothing; links are not followed.
Result<ImageIdentity> identify_file(const std::string& path);
// Both name the same file or device; links are followed. False if one of them is not there.
bool same_file(const std::string& a, const std::string& b);
// The bytes that it takes on its filesystem.
Result<Length> allocated(const std::string& path);

// The same as an earlier one only if the image was not written to since: of a file the time of its
// last change of content, of a block device the sectors written; and for either this boot of the
// host, since a crash may take such a time back, and counts begin anew. Incompatible for a device
// that does not count.
Result<std::string> image_stamp(const std::string& path);

// Owner, group and mode as the other file has them, or had them before libvirt gave it to QEMU
// (which it notes in an extended attribute while a guest uses it).
Status take_after(const std::string& example, const std::string& path);
// The same of an open file; `path` is for messages.
Status take_after(const std::string& example, int fd, const std::string& path);

// The other name instead of the first, durably; AlreadyExists if anything has that name.
Status publish(const std::string& staged, const std::string& path);
// The file has a second name, durably; AlreadyExists as above; Incompatible if it can't have
// (another filesystem, or one without hard links).
Status link_file(const std::string& path, const std::string& second);
// A copy that shares the first one's blocks, under a new name; Incompatible where the filesystem
// can't do that.
Status clone_file(const std::string& path, const std::string& copy);

// Its data, and its directory's entry, are on stable storage.
Status sync_file(const std::string& path);
// The name is gone at once, its blocks over time: a filesystem that frees gigabytes at once makes
// everybody else's writes wait for it (1.5 GiB of an ext4 that discards: 0.4 s, in which each write
// of another program took 23 ms; freed in pieces, with pauses, 0.5 ms). Takes about twice as long
// as unlink() does, then. A file that has other names, or that somebody has open, stays theirs; on
// filesystems other than ext4, XFS and Btrfs it is plain unlink().
// Gone already: fine.
Status unlink_file(const std::string& path);
// A file whose name is gone; its blocks are freed as above when this goes, which is after whatever
// else here holds it open (a lock). XFS counts them as used for a moment where they are left to the
// last close.
class UnlinkedFile {
 public:
  explicit UnlinkedFile(UniqueFd fd = {}) : fd_(std::move(fd)) {}
  ~UnlinkedFile();
  UnlinkedFile(UnlinkedFile&&) = default;
  UnlinkedFile& operator=(UnlinkedFile&&) = delete;

  [[nodiscard]] int fd() const { return fd_.get(); }
  // Somebody else has it, too, and frees it.
  void leave() { fd_.reset(); }

 private:
  UniqueFd fd_;
};
// unlink_file(), and the blocks stay until the result goes.
Result<UnlinkedFile> unlink_open(const std::string& path);

// For files that nobody shall wait for: where they have more than kFreedAtOnce together a process of its own frees them,
// one after the other, and ends by itself. (Where that is killed the kernel frees what is left, at once.) Until then the
// space is not free and the filesystem is in use. `program`: the words that run run_free_command().
struct NamedFile {
  UnlinkedFile file;
  std::string path;  // that it had, for ps
};
void free_in_background(std::vector<NamedFile> files, const std::vector<std::string>& program);
inline constexpr std::uint64_t kFreedAtOnce = std::uint64_t{64} << 20;  // bytes
inline constexpr std::string_view kFreeCommand = "free-blocks";
// main() of that process: for each file a descriptor, and the path. Returns at once, and goes on in a child that belongs
// to nobody. The exit code: 0, or 2 for anything else than such words.
int run_free_command(const std::vector<std::string>& words);
// unlink_file(), durably, if it is still that file: Busy if another has taken its name. Gone
// already: fine.
Result<UnlinkedFile> remove_file(const std::string& path, const ImageIdentity& identity);

}  // namespace drover::blockcopy
