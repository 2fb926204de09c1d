// SPDX-License-Identifier: Apache-2.0
//
// Reading back what is on stable storage where O_DIRECT does not work: what the page cache has of
// it is written back and dropped before each read. Internal to blockcopy.
//
// What is read then comes from the file system: of a local one, from its device; of one over the
// network or in user space, from its server, whose own caches nobody here knows. Where the file's
// content is memory (tmpfs), or the page cache does not let go of it, can_read_storage() says so.
//
// Threads: as the reader that is wrapped. A read blocks while dirty pages of it are written back;
// after a flush those are few.
#pragma once

#include <memory>

#include "base/unique_fd.h"
#include "blockcopy/image.h"

namespace drover::blockcopy {

enum class CacheScope {
  Read,  // where the read is in the image, there it is in the file
  File,  // it may be anywhere in the file
};
// `file`: the image's, however the reader reads it.
std::unique_ptr<ImageReader> read_storage(std::unique_ptr<ImageReader> reader, UniqueFd file,
                                          CacheScope scope);

// Whether there is anything but memory to be read: directly, or with the cache dropped, which is
// tried on the file's first page. (A tmpfs takes O_DIRECT, since Linux 6.6, and has nothing else to
// offer.)
bool can_read_storage(int fd, bool direct);

}  // namespace drover::blockcopy
