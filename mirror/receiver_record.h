// SPDX-License-Identifier: Apache-2.0
//
// What a receiver leaves on disk while it works, so that a person (or `drover receive --cleanup`)
// can clear up after it was killed: JOBS/ID/receiver/ with
//
//   lock          held (flock) as long as the receiver lives; its process id
//   record.json   which image files it created, by path, device and inode; whether they are to be
//                 kept
//   log
//   work/         sockets of qemu-storage-daemon
//
// The record is on stable storage before an image is written to, and says "keep" before the guest's
// memory moves: after that nothing may be removed (invariant 7).
//
// Threads: one at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/unique_fd.h"

namespace drover::mirror {

class ReceiverRecord {
 public:
  struct Image {
    std::string path;
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
  };

  // Makes the directory. AlreadyExists if another receiver of this job is alive or has left debris.
  static Result<std::unique_ptr<ReceiverRecord>> create(const std::string& jobs_directory,
                                                        const std::string& id);
  // Releases the lock; leaves the files.
  ~ReceiverRecord() = default;
  ReceiverRecord(const ReceiverRecord&) = delete;
  ReceiverRecord& operator=(const ReceiverRecord&) = delete;

  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] std::string work_directory() const { return directory_ + "/work"; }

  // The file at `path`, just created, is ours.
  Status add_image(const std::string& path);
  Status keep_images();
  Status images_removed();

  // Everything goes: the end of an orderly session. JOBS/ID too, if nothing else is in it.
  void remove();

 private:
  ReceiverRecord(std::string directory, std::string id, UniqueFd lock)
      : directory_(std::move(directory)), id_(std::move(id)), lock_(std::move(lock)) {}
  Status save();

  std::string directory_;
  std::string id_;
  UniqueFd lock_;
  std::vector<Image> images_;
  bool keep_ = false;
};

// What cleanup_receiver() did, in sentences.
struct CleanupReport {
  std::vector<std::string> removed;  // paths
  std::vector<std::string> kept;     // "path: why"
};
// What becomes of the images whose handover had begun, which may be all there is.
enum class KeptImages {
  Refuse,  // Denied, nothing is removed
  Remove,  // for a source that knows that its guest runs; a receiver that is alive is told to end
  Leave,   // they stay, all else goes: for a source that knows that the guest runs on the target
};
// Removes what a receiver that no longer runs left behind. One that is just ending is waited for, at
// most `patience`. NotFound if there is nothing of that job, Busy if its receiver is alive.
Result<CleanupReport> cleanup_receiver(
    const std::string& jobs_directory, const std::string& id, KeptImages kept = KeptImages::Refuse,
    std::chrono::milliseconds patience = std::chrono::seconds(15));

// QEMU leaves its end of the memory's path behind when an incoming guest is killed.
void remove_memory_socket(const std::string& id);

}  // namespace drover::mirror
