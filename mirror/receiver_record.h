// SPDX-License-Identifier: Apache-2.0
//
// What a receiver leaves on disk while it works, so that a person (or `drover receive --cleanup`)
// can clear up after it was killed: JOBS/ID/receiver/ with
//
//   lock          held (flock) as long as the receiver lives; its process id and port
//   record.json   which images it writes: how they were asked for, by device and inode which files
//   they
//                 are; whether they are to be kept; whether another receiver may go on with them
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
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/unique_fd.h"
#include "blockcopy/image.h"

namespace drover::mirror {

class ReceiverRecord {
 public:
  struct Image {
    blockcopy::TargetSpec spec;  // without its work_directory
    blockcopy::ImageIdentity identity;
    std::string id;            // another one whenever it was made anew
    std::uint64_t losses = 0;  // how often flushing it failed: what was not flushed may be gone
  };

  // Makes the directory. AlreadyExists if another receiver of this job is alive or has left debris.
  static Result<std::unique_ptr<ReceiverRecord>> create(const std::string& jobs_directory,
                                                        const std::string& id,
                                                        bool resumable = false);
  // That of a receiver that has ended or was killed. NotFound if it left none, Busy if it is alive
  // (see running_receiver()), Incompatible if this version can't read the record, Denied if it is
  // not resumable or its barrier was passed: then nobody may write to its images.
  static Result<std::unique_ptr<ReceiverRecord>> resume(const std::string& jobs_directory,
                                                        const std::string& id);
  // Releases the lock; leaves the files.
  ~ReceiverRecord() = default;
  ReceiverRecord(const ReceiverRecord&) = delete;
  ReceiverRecord& operator=(const ReceiverRecord&) = delete;

  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] std::string work_directory() const { return directory_ + "/work"; }

  [[nodiscard]] const std::vector<Image>& images() const { return images_; }
  [[nodiscard]] bool keep() const { return keep_; }
  // Says in the lock where we listen.
  Status announce(std::uint16_t port);
  // The image, just created, is ours.
  Status add_image(const blockcopy::TargetImage& image);
  // It was made anew.
  Status replace_image(std::size_t index, const blockcopy::TargetImage& image);
  Status note_loss(std::size_t index);
  // Deletes an image's file, if it is still the one that was recorded (Busy otherwise).
  Status discard(std::size_t index);
  Status keep_images();
  Status barrier_passed();
  Status images_removed();

  // Everything goes: the end of an orderly session. JOBS/ID too, if nothing else is in it.
  void remove();

 private:
  ReceiverRecord(std::string directory, std::string id, UniqueFd lock)
      : directory_(std::move(directory)), id_(std::move(id)), lock_(std::move(lock)) {}
  static Result<Image> describe(const blockcopy::TargetImage& made);
  Status load_from(const nlohmann::json& record);
  Status save();

  std::string directory_;
  std::string id_;
  UniqueFd lock_;
  std::vector<Image> images_;
  bool keep_ = false;
  bool resumable_ = false;
  bool proved_ = false;  // its barrier was passed
};

// The receiver of this job that is alive: NotFound if there is none.
struct RunningReceiver {
  std::int64_t pid = 0;
  std::uint16_t port = 0;  // 0: it does not listen yet
};
Result<RunningReceiver> running_receiver(const std::string& jobs_directory, const std::string& id);
// Has it end in order, as on SIGTERM: a resumable one flushes its images and keeps them with its
// record. Ok also if none is alive; Busy if it has not ended after `patience`.
Status stop_receiver(const std::string& jobs_directory, const std::string& id,
                     std::chrono::milliseconds patience = std::chrono::seconds(60));

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
// Removes what a receiver that no longer runs left behind. One that is just ending is waited for,
// at most `patience`. NotFound if there is nothing of that job, Busy if its receiver is alive.
Result<CleanupReport> cleanup_receiver(
    const std::string& jobs_directory, const std::string& id, KeptImages kept = KeptImages::Refuse,
    std::chrono::milliseconds patience = std::chrono::seconds(15));

// QEMU leaves its end of the memory's path behind when an incoming guest is killed.
void remove_memory_socket(const std::string& id);

}  // namespace drover::mirror
