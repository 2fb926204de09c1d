// SPDX-License-Identifier: Apache-2.0
//
// TargetFile: the file that create_target() makes for an image of any format: made exclusively (or
// found again),
// made durable with its directory entry, and deleted only while it is still the same file. Internal
// to blockcopy.
//
// Threads: as TargetImage.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "base/result.h"
#include "base/unique_fd.h"
#include "blockcopy/image.h"

namespace drover::blockcopy {

class TargetFile {
 public:
  // AlreadyExists if there is anything of that name. Mode 0600, empty. The parent directory must
  // exist.
  static Result<TargetFile> create(const std::string& path);
  // One that create() made before. NotFound if it is gone, Busy if it is not that file.
  static Result<TargetFile> open(const std::string& path, const ImageIdentity& expected);

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] ImageIdentity identity() const { return {identity_.device, identity_.inode}; }
  // Open for reading and writing until close().
  [[nodiscard]] int fd() const { return fd_.get(); }
  void close() { fd_.reset(); }

  // fdatasync, and the directory's fsync the first time. Needs the open file. Sticky: see
  // TargetImage.
  Status flush();
  // Deletes the file if it is still the one that was made; Busy if another has taken its name.
  // Nothing to do, and no error, if it is gone.
  Status remove();

 private:
  struct Identity {
    dev_t device = 0;
    ino_t inode = 0;
    std::int64_t birth_seconds = 0;  // inode numbers are used again
    std::uint32_t birth_nanoseconds = 0;
    bool operator==(const Identity&) const = default;
  };
  static Result<Identity> identify(int directory, const std::string& path, int flags);

  std::string path_;
  UniqueFd fd_;
  Identity identity_;
  bool directory_synced_ = false;
  Status flushed_;
};

}  // namespace drover::blockcopy
