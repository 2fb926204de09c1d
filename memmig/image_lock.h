// SPDX-License-Identifier: Apache-2.0
//
// The guard of invariant 6 (the guest never runs on two hosts): while it is held, no QEMU on this
// host can open the image for writing, so a stopped source guest can't be resumed: `cont` fails
// with "Failed to get "write" lock", whoever asks for it.
//
//   DROVER_ASSIGN(ImageLock guard, lock_image("/srv/web1.raw"));   // before the target is resumed
//
// It uses QEMU's own image locks (block/file-posix.c, raw_apply_lock_bytes): open file description
// locks on single bytes; byte 100 + n says "I use permission n", byte 200 + n "nobody else may",
// and writing is permission 1. Nothing is written to the image (invariant 3). The lock goes with
// the object, and with the process.
//
// When: after the target's Suspended event (before it QEMU still has its own lock: Busy), before
// the target is resumed, on every image that the source writes to. Busy then means that libvirt has
// resumed the source: the target must not run. docs/handover.md has the cases;
// tests/contract/image_lock_test.cc and test_source_is_not_resumed_while_the_target_may_run (lab)
// show them.
//
// Threads: any. Errors: Busy if a QEMU has the image open for writing now; the system's otherwise.
#pragma once

#include <string>
#include <utility>

#include "base/result.h"
#include "base/unique_fd.h"

namespace drover::memmig {

class ImageLock {
 public:
  ImageLock(ImageLock&&) = default;
  ImageLock& operator=(ImageLock&&) = default;

 private:
  friend Result<ImageLock> lock_image(const std::string& path);
  explicit ImageLock(UniqueFd fd) : fd_(std::move(fd)) {}
  UniqueFd fd_;
};

Result<ImageLock> lock_image(const std::string& path);

}  // namespace drover::memmig
