// SPDX-License-Identifier: Apache-2.0
//
// What an image on this host is made of, by asking qemu-img: of guests that are off libvirt does
// not know it.
//
//   DROVER_ASSIGN(ImageLayout layout, look_at_image("/srv/web1.qcow2", "qcow2"));
//
// Threads: any; it blocks. Errors: NotFound; Io with qemu-img's words.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"
#include "memmig/disk_host.h"

namespace drover::memmig {

struct ImageLayout {
  Length virtual_size;
  Length allocation;                 // with all its backing files
  Length cluster_size;               // qcow2; else zero
  std::vector<std::string> backing;  // its backing files, from the image's own one down
  bool encrypted = false;
};
// The format is never guessed: a raw image may hold what looks like the header of another format.
Result<ImageLayout> look_at_image(const std::string& path, const std::string& format);

// Adds the backing files of what guests that are off name. Of an image that can't be read nothing
// is known to be below it.
void complete_chains(std::vector<ImageUse>& uses);

}  // namespace drover::memmig
