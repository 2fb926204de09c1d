// SPDX-License-Identifier: Apache-2.0
//
// A plain copy of a file that nobody writes to, and a note on it of what it is a copy of. The note
// is an extended attribute that the copy has from the moment it has its name, so that whoever is
// killed after that finds it again, and knows it from a file of somebody else's:
//
//   DROVER_ASSIGN(std::string note, note_of("/mnt/a/debian.iso"));
//   DROVER_ASSIGN(note, copy_noted("/mnt/a/debian.iso", "/mnt/b/debian.iso", {}, cancel));
//   ... killed ...
//   noted_copies("/mnt/b")[note]     // "/mnt/b/debian.iso"
//   forget_note("/mnt/b/debian.iso");
//
// Threads: any; all of it blocks on the disk.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "base/result.h"
#include "base/units.h"
#include "job/move.h"

namespace drover::job {

// Which file this is, and in which state: its path, inode, size and time of change of its data.
Result<std::string> note_of(const std::string& path);

// By their notes. A directory that can't be read has none.
std::map<std::string, std::string> noted_copies(const std::string& directory);

struct NotedCopyOptions {
  Length bandwidth;                             // per second; zero: no limit
  std::function<void(Length copied)> progress;  // may be empty
};
// Under a hidden name first, which is this source's alone; owner and mode as the source's; durable
// when it returns. Returns the note. Afterwards nothing is left if it failed. AlreadyExists;
// Cancelled; Busy if the source was changed meanwhile, or if another process copies it there;
// NoSpace and others of the system's.
Result<std::string> copy_noted(const std::string& source, const std::string& target,
                               const NotedCopyOptions& options, Cancel& cancel);

// What a copy_noted() of this source that was killed has left in the directory. Busy: it lives.
Status remove_unfinished_copy(const std::string& source, const std::string& directory);

// The note on a copy; NotFound if it has none.
Result<std::string> noted_on(const std::string& copy);

void forget_note(const std::string& path);

}  // namespace drover::job
