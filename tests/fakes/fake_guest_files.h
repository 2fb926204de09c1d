// SPDX-License-Identifier: Apache-2.0
//
// Guests that are only a list of the files that they name, for tests of what changes those names.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "memmig/guest_files.h"

namespace drover::memmig::testing {

class FakeGuestFiles final : public GuestFiles {
 public:
  std::vector<FileUse> list;
  std::function<void()> changes;  // called after a change
  std::size_t changed = 0;

  Result<std::vector<FileUse>> uses() override { return list; }
  Status change_medium(const FileUse& use, const std::string& path) override {
    return change(use, path);
  }
  Status change_nvram(const FileUse& use, const std::string& path) override {
    return change(use, path);
  }

 private:
  Status change(const FileUse& use, const std::string& path) {
    for (FileUse& one : list) {
      const bool same = one.kind == use.kind && one.uuid == use.uuid && one.disk == use.disk &&
                        one.live == use.live;
      if (same) one.path = path;
    }
    ++changed;
    if (changes) changes();
    return {};
  }
};

}  // namespace drover::memmig::testing
