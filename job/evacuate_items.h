// SPDX-License-Identifier: Apache-2.0
//
// Which of the files that guests use are on a storage, and which of those may go.
//
//   UsedFiles used;
//   for (FileUse& use : uses) add_use(used, scope, place, std::move(use));
//   for (const auto& [key, file] : used)
//     if (scope.has(file.place)) auto item = evacuate_item(file, used, scope, is_link, notes);
//
// Threads: any. Nothing is read from a disk but by what is passed in.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "job/evacuate_plan.h"
#include "memmig/guest_files.h"
#include "memmig/storage.h"

namespace drover::job {

using FileKey = std::pair<std::uint64_t, std::uint64_t>;  // device, inode

// "disk vda of guest web1"
std::string called(const memmig::FileUse& use);

// Where the storage ends: the whole filesystem, or a directory of it.
class Scope {
 public:
  explicit Scope(const memmig::Storage& storage, memmig::LookAtPlace look = memmig::look_at_place);
  [[nodiscard]] bool has(const memmig::FilePlace& place) const;
  // Of a file that may be gone.
  [[nodiscard]] bool has_name(const std::string& path) const;

 private:
  [[nodiscard]] bool within(const std::string& path) const;
  const memmig::Storage storage_;
  const memmig::LookAtPlace look_;
  const bool whole_;
};

struct UsedFile {
  memmig::FilePlace place;  // by the name that is on the storage, if one is
  std::vector<memmig::FileUse> uses;
};
using UsedFiles = std::map<FileKey, UsedFile>;

void add_use(UsedFiles& used, const Scope& scope, const memmig::FilePlace& place,
             memmig::FileUse use);

// A file that is on the storage by this path, while guests name it by one that is not (another
// mount of the filesystem, a hard link).
EvacuateItem named_elsewhere(const UsedFile& file, const std::string& path);

// None: it is left alone for what the note says, or is no guest's at all soon.
std::optional<EvacuateItem> evacuate_item(const UsedFile& file, const UsedFiles& used,
                                          const Scope& scope,
                                          const std::function<bool(const std::string&)>& is_link,
                                          std::vector<std::string>& notes);

}  // namespace drover::job
