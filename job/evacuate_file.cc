// SPDX-License-Identifier: Apache-2.0
#include "job/evacuate_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "base/log.h"
#include "blockcopy/image_file.h"
#include "job/evacuate_items.h"
#include "job/noted_copy.h"
#include "memmig/image_lock.h"

namespace drover::job {

namespace {

using memmig::FileUse;
using Kind = FileUse::Kind;

tl::unexpected<Error> changed_since(std::string message) {
  return fail(Code::Busy, std::move(message), "run the same command again");
}

class FileMove {
 public:
  FileMove(memmig::GuestFiles& files, const JobStore& jobs, const FileStep& step,
           Observer& observer, Cancel& cancel)
      : files_(files), jobs_(jobs), step_(step), observer_(observer), cancel_(cancel) {}

  Status run() {
    std::optional<memmig::ImageLock> lock;
    if (nvram()) {
      // As long as it is held no QEMU can open it, so the guest does not start meanwhile.
      DROVER_ASSIGN(lock, memmig::lock_image(item().path));
    }
    DROVER_TRY(copy());
    Status done = change_over();
    if (!done) undo();
    return done;
  }

 private:
  [[nodiscard]] const EvacuateItem& item() const { return step_.item; }
  [[nodiscard]] bool nvram() const { return item().kind == EvacuateKind::Nvram; }

  Status copy() {
    for (const std::string& directory : step_.directories) {
      DROVER_TRY(remove_unfinished_copy(item().path, directory));
    }
    if (item().copy) {
      DROVER_ASSIGN(note_, note_of(item().path));
      if (noted_on(step_.target) != note_) {
        return changed_since(
            fmt::format("{} is no copy of {} any more", step_.target, item().path));
      }
    } else {
      DROVER_ASSIGN(note_,
                    copy_noted(item().path, step_.target,
                               {.bandwidth = step_.bandwidth, .progress = progress()}, cancel_));
    }
    DROVER_ASSIGN(copy_, blockcopy::identify_file(step_.target));
    return {};
  }

  std::function<void(Length)> progress() {
    constexpr Length kWorthALine = 16_MiB;
    Progress progress;
    progress.phase = Phase::Copy;
    progress.data = item().bytes;
    progress.disks = {
        {.disk = item().users.front().disk, .size = item().bytes, .data = item().bytes}};
    return [this, progress, said = Length()](Length copied) mutable {
      if (copied < item().bytes && copied < said + kWorthALine) return;
      said = copied;
      progress.copied = std::min(copied, item().bytes);
      progress.disks.front().copied = progress.copied;
      observer_.progress(progress);
    };
  }

  // From here on it is quick, and finished.
  Status change_over() {
    if (nvram()) {
      // A guest that started with the copy would write what undo() throws away.
      DROVER_ASSIGN(copy_lock_, memmig::lock_image(step_.target));
    }
    DROVER_ASSIGN(pause_, jobs_.pause());
    DROVER_TRY(is_unchanged());
    DROVER_ASSIGN(const std::vector<FileUse> uses, uses_of(item().path));
    for (const FileUse& use : uses) {
      DROVER_TRY(may_change(use));
      DROVER_TRY(pause_->guest(use.uuid));
    }
    DROVER_ASSIGN(const std::vector<FileUse> already, uses_of(step_.target));
    if (uses.empty() && already.empty()) {
      return changed_since("no guest uses " + item().path + " any more, nor its copy");
    }
    DROVER_TRY(change(uses));
    DROVER_ASSIGN(const std::vector<FileUse> left, uses_of(item().path));
    if (!left.empty()) {
      return fail(Code::Busy,
                  fmt::format("{} is still in use: as {}", item().path, called(left.front())));
    }
    DROVER_TRY(is_unchanged());
    if (!nvram()) pause_.reset();  // a large file takes its time
    DROVER_ASSIGN(const auto identity, blockcopy::identify_file(item().path));
    DROVER_TRY(blockcopy::remove_file(item().path, identity));
    forget_note(step_.target);
    log_info("{} is now {}", item().path, step_.target);
    return {};
  }

  // Hours may have gone since the copy was found.
  [[nodiscard]] Status is_unchanged() const {
    if (note_of(item().path) != note_) return changed_since(item().path + " was changed meanwhile");
    if (blockcopy::identify_file(step_.target) != copy_) {
      return changed_since(step_.target + " is another file by now");
    }
    return {};
  }

  [[nodiscard]] Status may_change(const FileUse& use) const {
    if (!use.remembered.empty() || use.kind == Kind::Remembered) {
      return changed_since(fmt::format("guest {} has {}, which would go on to name {}", use.guest,
                                       use.remembered, item().path));
    }
    if (use.kind == Kind::Medium || (use.kind == Kind::Nvram && !use.running && nvram())) return {};
    return changed_since(fmt::format("{} is in use as {}", item().path, called(use)));
  }

  Status change(const std::vector<FileUse>& uses) {
    Status changed;
    for (const FileUse& use : uses) {
      Status one = use.kind == Kind::Nvram ? files_.change_nvram(use, step_.target)
                                           : files_.change_medium(use, step_.target);
      if (one) {
        changed_.push_back(use);
      } else if (changed) {
        changed = std::move(one);
      }
    }
    return changed;
  }

  // What a drive has stays; an NVRAM file goes back, if it is there.
  void undo() {
    for (const FileUse& use : changed_) {
      if (use.kind != Kind::Nvram || !blockcopy::identify_file(use.path)) continue;
      if (const Status back = files_.change_nvram(use, use.path); !back) {
        log_error("{}", back.error().to_string());
      }
    }
    const auto users = uses_of(step_.target);
    if (!users || !users->empty()) return;
    if (const auto removed = blockcopy::remove_file(step_.target, copy_); !removed) {
      log_warning("{}", removed.error().to_string());
    }
  }

  // What names this file, now.
  Result<std::vector<FileUse>> uses_of(const std::string& path) {
    DROVER_ASSIGN(std::vector<FileUse> uses, files_.uses());
    std::erase_if(uses, [&](const FileUse& use) { return !blockcopy::same_file(use.path, path); });
    return uses;
  }

  memmig::GuestFiles& files_;
  const JobStore& jobs_;
  const FileStep& step_;
  Observer& observer_;
  Cancel& cancel_;
  std::string note_;  // of what was copied
  blockcopy::ImageIdentity copy_;
  std::optional<memmig::ImageLock> copy_lock_;
  std::optional<JobPause> pause_;
  std::vector<FileUse> changed_;
};

}  // namespace

Status evacuate_file(memmig::GuestFiles& files, const JobStore& jobs, const FileStep& step,
                     Observer& observer, Cancel& cancel) {
  return FileMove(files, jobs, step, observer, cancel).run();
}

Status disks_are_there(memmig::GuestFiles& files, const EvacuateProblem& problem,
                       const EvacuateStep& step) {
  DROVER_ASSIGN(const std::vector<FileUse> uses, files.uses());
  for (const auto& file : step.files) {
    const EvacuateItem& item = problem.items[file.item];
    const EvacuateItem::User& user = item.users.front();
    bool there = false;
    for (const FileUse& use : uses) {
      if (use.kind != FileUse::Kind::Disk || use.uuid != user.uuid || use.disk != user.disk)
        continue;
      there = blockcopy::same_file(use.path, item.path);
      if (!there) break;
    }
    if (!there) {
      return changed_since(
          fmt::format("disk {} of guest {} is not {} any more", user.disk, user.guest, item.path));
    }
  }
  return {};
}

}  // namespace drover::job
