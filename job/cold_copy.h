// SPDX-License-Identifier: Apache-2.0
//
// The copy of the disks of a guest that is off, on a thread of its own. While it runs, and until it
// is destroyed, no QEMU on this host can open the source images for writing: a guest that somebody
// starts meanwhile does not start.
//
//   ColdCopy copy(images, disks, {.work_directory = directory, ...});      // begins
//   ... copy.progress() ...; copy.stop();
//
// Threads: made and destroyed on one; progress() and stop() on any; `done` is called on its own.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "job/move.h"
#include "job/new_images.h"
#include "memmig/image_lock.h"

namespace drover::job {

class ColdCopy {
 public:
  struct Disk {
    DiskPlan plan;
    Length cluster_size;
    bool plain = false;  // the file has the disk's bytes as the guest sees them: raw, nothing below
    bool clone = false;  // try to share the file's blocks first: it stays, in the same format
  };
  struct Options {
    std::string work_directory;  // for sockets
    std::function<Length()> bandwidth;
    // All images are complete, under their hidden names; Cancelled after stop(); Busy: a QEMU has
    // one open.
    std::function<void(Status)> done;
  };
  ColdCopy(NewImages& images, std::vector<Disk> disks, Options options);
  ~ColdCopy();  // stops, and waits
  ColdCopy(const ColdCopy&) = delete;
  ColdCopy& operator=(const ColdCopy&) = delete;

  void stop() { stopped_.store(true); }
  [[nodiscard]] std::vector<DiskProgress> progress() const;

 private:
  Status run();
  Status copy(std::size_t index);
  Status copy_data(std::size_t index);

  NewImages& images_;
  const std::vector<Disk> disks_;
  const Options options_;
  std::vector<memmig::ImageLock> locks_;
  std::atomic<bool> stopped_{false};
  mutable std::mutex mutex_;  // guards the next
  std::vector<DiskProgress> progress_;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace drover::job
