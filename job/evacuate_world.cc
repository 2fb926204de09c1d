// SPDX-License-Identifier: Apache-2.0
//
// What evacuating asks of this host, as it really is: libvirt, filesystems, relocations.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "base/log.h"
#include "base/unique_fd.h"
#include "blockcopy/image_file.h"
#include "job/evacuate.h"
#include "job/job_store.h"
#include "job/noted_copy.h"
#include "job/relocate.h"
#include "memmig/guest_files.h"
#include "memmig/image_chain.h"
#include "memmig/image_lock.h"
#include "memmig/libvirt_hypervisor.h"
#include "memmig/preflight.h"
#include "memmig/probe.h"
#include "memmig/storage_host.h"

namespace drover::job {

namespace {

namespace fs = std::filesystem;
using memmig::FilePlace;
using memmig::FileUse;
using Kind = FileUse::Kind;
using FileKey = std::pair<std::uint64_t, std::uint64_t>;  // device, inode

bool is_link(const std::string& path) {
  std::error_code error;
  return fs::is_symlink(path, error);
}

// What `drover relocate` would say of the guest's disk.
std::string called(const FileUse& use) {
  switch (use.kind) {
    case Kind::Disk:
    case Kind::Backing: return fmt::format("disk {} of guest {}", use.disk, use.guest);
    case Kind::Medium:
    case Kind::Floppy: return fmt::format("drive {} of guest {}", use.disk, use.guest);
    case Kind::Nvram:
    case Kind::Other: return fmt::format("the {} of guest {}", use.disk, use.guest);
  }
  return use.guest;
}

// ---- where the storage ends ---------------------------------------------------------------------

// The whole filesystem, or a directory of it.
class Scope {
 public:
  explicit Scope(const memmig::Storage& storage)
      : storage_(storage), whole_(storage.directory == storage.mount_point) {}

  [[nodiscard]] bool has(const FilePlace& place) const {
    return place.filesystem == storage_.filesystem && (whole_ || below(place.path));
  }
  // Of a file that may be gone.
  [[nodiscard]] bool has_name(const std::string& path) const {
    const auto parent = memmig::look_at_place(path.substr(0, path.rfind('/') + 1));
    return parent && parent->filesystem == storage_.filesystem &&
           (whole_ || parent->path == storage_.directory || below(parent->path));
  }

 private:
  [[nodiscard]] bool below(const std::string& path) const {
    return path.starts_with(storage_.directory + "/");
  }
  const memmig::Storage& storage_;
  const bool whole_;
};

// ---- who uses what ------------------------------------------------------------------------------

struct UsedFile {
  FilePlace place;
  std::vector<FileUse> uses;
};
using UsedFiles = std::map<FileKey, UsedFile>;

// What the definitions of guests that are off do not say: what is below their images.
void add_backing_files(std::vector<FileUse>& uses) {
  std::vector<memmig::ImageUse> images;
  for (const FileUse& use : uses) {
    if (use.kind != Kind::Disk || use.running) continue;
    images.push_back(
        {.path = use.path, .format = use.format, .guest = use.guest, .disk = use.disk});
  }
  memmig::complete_chains(images);
  for (const memmig::ImageUse& image : images) {
    if (!image.backing) continue;
    const auto top = std::ranges::find_if(uses, [&](const FileUse& use) {
      return use.kind == Kind::Disk && use.guest == image.guest && use.disk == image.disk;
    });
    FileUse below = *top;
    below.kind = Kind::Backing;
    below.path = image.path;
    uses.push_back(std::move(below));
  }
}

// One file that guests use, on its way to be an item of the plan.
class Classifier {
 public:
  Classifier(const UsedFiles& used, const Scope& scope) : used_(used), scope_(scope) {}

  // None: it is left alone for what the note says, or is no guest's at all soon.
  std::optional<EvacuateItem> item(const UsedFile& file, std::vector<std::string>& notes) {
    EvacuateItem out;
    out.path = file.place.path;
    out.bytes = file.place.allocated;
    std::set<Kind> kinds;
    for (const FileUse& use : file.uses) {
      kinds.insert(use.kind);
      const EvacuateItem::User user{
          use.guest, use.uuid, use.kind == Kind::Nvram ? std::string() : use.disk, use.running};
      if (std::ranges::find(out.users, user) == out.users.end()) out.users.push_back(user);
    }
    if (kinds.size() > 1) {
      out.stays = fmt::format("it is used as {} and as {}", called(file.uses.front()),
                              called(*std::ranges::find_if(file.uses, [&](const FileUse& use) {
                                return use.kind != file.uses.front().kind;
                              })));
      return out;
    }
    switch (*kinds.begin()) {
      case Kind::Disk: disk(file, out); break;
      case Kind::Backing: return backing(file, std::move(out), notes);
      case Kind::Medium: medium(file, out); break;
      case Kind::Nvram: nvram(file, out); break;
      case Kind::Floppy:
        out.kind = EvacuateKind::Medium;
        out.stays = called(file.uses.front()) + " is a floppy: take it out or move it by hand";
        break;
      case Kind::Other:
        out.stays = fmt::format("it is {}: drover does not move that", called(file.uses.front()));
        break;
    }
    return out;
  }

 private:
  void disk(const UsedFile& file, EvacuateItem& out) const {
    const FileUse& first = file.uses.front();
    if (out.users.size() > 1) {
      const auto& other = out.users.back();
      out.stays = fmt::format("{} and disk {} of guest {} are the same file", called(first),
                              other.disk, other.guest);
      return;
    }
    for (const FileUse& use : file.uses) {
      if (!use.stays.empty()) out.stays = fmt::format("{} {}", called(use), use.stays);
    }
    const bool attached = !first.running || std::ranges::any_of(file.uses, [](const FileUse& use) {
      return use.live;
    });
    if (!attached) {
      out.stays = fmt::format(
          "{} is in its definition, but not attached: shut the guest down and run the same command "
          "again",
          called(first));
    }
    // Its copy is one image with the content of all.
    std::set<FileKey> counted;
    for (const auto& [key, below] : used_) {
      for (const FileUse& use : below.uses) {
        const bool its = use.kind == Kind::Backing && use.uuid == first.uuid &&
                         use.disk == first.disk && counted.insert(key).second;
        if (its) out.bytes += below.place.allocated;
      }
    }
  }

  // Relocation gives the disk above an image of its own; then nobody needs this one.
  std::optional<EvacuateItem> backing(const UsedFile& file, EvacuateItem out,
                                      std::vector<std::string>& notes) const {
    for (const FileUse& use : file.uses) {
      const bool leaves = std::ranges::any_of(used_, [&](const auto& one) {
        return scope_.has(one.second.place) &&
               std::ranges::any_of(one.second.uses, [&](const FileUse& top) {
                 return top.kind == Kind::Disk && top.uuid == use.uuid && top.disk == use.disk;
               });
      });
      if (leaves) continue;
      out.stays = fmt::format(
          "it is below {}, which is on another storage: 'drover relocate' makes that one image",
          called(use));
      return out;
    }
    notes.push_back(
        fmt::format("{} is below {}, which becomes one image with the content of all: it is left "
                    "alone",
                    out.path, called(file.uses.front())));
    return std::nullopt;
  }

  static void remembered(const UsedFile& file, EvacuateItem& out) {
    for (const FileUse& use : file.uses) {
      if (!use.remembered.empty()) {
        out.stays =
            fmt::format("guest {} has {}, which would go on to name it", use.guest, use.remembered);
      } else if (is_link(use.path)) {
        out.stays = fmt::format("guest {} names it by a symbolic link, {}", use.guest, use.path);
      }
    }
  }

  static void medium(const UsedFile& file, EvacuateItem& out) {
    out.kind = EvacuateKind::Medium;
    remembered(file, out);
  }

  static void nvram(const UsedFile& file, EvacuateItem& out) {
    out.kind = EvacuateKind::Nvram;
    remembered(file, out);
    const FileUse& first = file.uses.front();
    if (out.users.size() > 1) {
      out.stays = fmt::format("guests {} and {} both have it as their NVRAM", first.guest,
                              out.users.back().guest);
    } else if (first.running) {
      out.stays = fmt::format(
          "guest {} runs with it: shut the guest down and run the same command again", first.guest);
    }
  }

  const UsedFiles& used_;
  const Scope& scope_;
};

// ---- the world ----------------------------------------------------------------------------------

class RealWorld final : public EvacuateWorld {
 public:
  explicit RealWorld(std::string uri) : uri_(std::move(uri)) {}

  Status claim(const EvacuateSurvey& survey) override;
  Result<EvacuateSurvey> look(const EvacuateOptions& options) override;
  Status check(const EvacuateProblem& problem, const EvacuateStep& step, Cancel& cancel) override;
  Status carry_out(const EvacuateProblem& problem, const EvacuateStep& step, Length bandwidth,
                   Observer& observer, Cancel& cancel) override;
  Status resume(const std::string& job, Observer& observer, Cancel& cancel) override {
    DROVER_TRY(job::resume(job, observer, cancel));
    return {};
  }

 private:
  RelocateOptions relocation_of(const EvacuateProblem& problem, const EvacuateStep& step) const;
  Status copy(const EvacuateProblem& problem, const EvacuateStep& step, Length bandwidth,
              Observer& observer, Cancel& cancel);
  // The definitions that name this file, now.
  Result<std::vector<FileUse>> uses_of(memmig::GuestFiles& files, const std::string& path);
  Status let_go(memmig::GuestFiles& files, const EvacuateItem& item, const std::string& copy);

  const std::string uri_;
  UniqueFd claim_;
};

Result<UsedFiles> used_files(memmig::GuestFiles& files, const Scope& scope,
                             std::vector<std::string>& notes) {
  DROVER_ASSIGN(std::vector<FileUse> uses, files.uses());
  add_backing_files(uses);
  UsedFiles out;
  std::set<std::string> missing;
  for (FileUse& use : uses) {
    const auto place = memmig::look_at_place(use.path);
    if (!place) {
      if (scope.has_name(use.path) && missing.insert(use.path).second) {
        notes.push_back(fmt::format("{}: {}", called(use), place.error().message));
      }
      continue;
    }
    if (place->kind != FilePlace::Kind::File) continue;
    UsedFile& file = out[{place->device, place->inode}];
    file.place = *place;
    file.uses.push_back(std::move(use));
  }
  return out;
}

// All files below it on its filesystem. Directories are not listed.
std::vector<fs::path> files_below(const memmig::Storage& storage, std::vector<std::string>& notes) {
  std::vector<fs::path> out;
  std::error_code error;
  fs::recursive_directory_iterator at(storage.directory, error);
  for (; !error && at != fs::recursive_directory_iterator(); at.increment(error)) {
    std::error_code ignored;
    if (!at->is_directory(ignored) || at->is_symlink(ignored)) {
      out.push_back(at->path());
      continue;
    }
    const auto place = memmig::look_at_place(at->path().string());
    const bool lost_and_found = at.depth() == 0 && at->path().filename() == "lost+found";
    if (!place || place->filesystem != storage.filesystem || lost_and_found) {
      at.disable_recursion_pending();
    }
  }
  if (error) notes.push_back("listing " + storage.directory + ": " + error.message());
  std::ranges::sort(out);
  return out;
}

Result<std::vector<EvacuateSurvey::Job>> jobs_of(const Scope& scope,
                                                 std::set<std::string>& their_files) {
  DROVER_ASSIGN(const std::vector<JobView> views, JobStore().list());
  std::vector<EvacuateSurvey::Job> out;
  for (const JobView& view : views) {
    if (!view.record || !view.record->relocation) continue;
    bool here = false;
    for (const DiskPlan& disk : view.record->plan.disks) {
      for (const std::string& path : {disk.source_path, disk.target_path}) {
        their_files.insert(path);
        here = here || scope.has_name(path);
      }
      their_files.insert(blockcopy::staged_path(disk.target_path, view.id + "-" + disk.disk));
    }
    if (!here) continue;
    out.push_back({view.id, view.record->plan.guest, view.record->plan.uuid, view.alive});
  }
  return out;
}

Result<EvacuateProblem::Target> target_of(const memmig::Storage& storage) {
  const std::string some = storage.directory + "/.drover-evacuate";
  DROVER_ASSIGN(const memmig::ProbeAnswer probe, memmig::probe_here({.paths = {some}}));
  const memmig::PathFacts* facts = probe.path(some);
  if (facts != nullptr && !facts->unreachable_for_qemu.empty()) {
    return fail(
        Code::InvalidArgument,
        fmt::format("QEMU, which runs as user {}, may not enter {}", probe.qemu_user,
                    facts->unreachable_for_qemu),
        fmt::format("'chmod o+x {}', or name another storage", facts->unreachable_for_qemu));
  }
  EvacuateProblem::Target target;
  target.name = storage.name;
  target.directory = storage.directory;
  target.free = storage.capacity - storage.used;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(storage.directory, error)) {
    target.names.insert(entry.path().filename().string());
  }
  if (error) return fail(Code::Io, "listing " + storage.directory + ": " + error.message());
  return target;
}

using Copies = std::vector<std::map<std::string, std::string>>;  // by target, then note

std::optional<EvacuateItem::Copy> copy_of(const std::string& path, const Copies& copies) {
  const auto note = note_of(path);
  for (std::size_t i = 0; note && i < copies.size(); ++i) {
    const auto found = copies[i].find(*note);
    if (found != copies[i].end()) return EvacuateItem::Copy{i, found->second};
  }
  return std::nullopt;
}

Status RealWorld::claim(const EvacuateSurvey& survey) {
  const std::string& directory = survey.source.directory;
  claim_ = UniqueFd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!claim_) return fail_errno(errno, "opening " + directory);
  if (::flock(claim_.get(), LOCK_EX | LOCK_NB) == 0) return {};
  if (errno == EWOULDBLOCK) {
    return fail(Code::Busy, "another drover empties " + survey.source.name + " now",
                "'drover jobs' shows what it does");
  }
  log_warning("{}", error_from_errno(errno, "locking " + directory).message);  // NFS can't
  return {};
}

Result<EvacuateSurvey> RealWorld::look(const EvacuateOptions& options) {
  if (::geteuid() != 0) {
    return fail(Code::Denied, "drover needs root: it reads the guests' disks and drives libvirt",
                "run it with sudo");
  }
  EvacuateSurvey survey;
  // New connections each time: this takes hours, and libvirtd may be restarted meanwhile.
  DROVER_ASSIGN(const auto host, memmig::connect_storage_host(uri_));
  std::vector<std::string> names = {options.from};
  names.insert(names.end(), options.to.begin(), options.to.end());
  DROVER_ASSIGN(memmig::StorageReport report, memmig::look_at_storages(*host, names));
  survey.source = report.storages.front();
  survey.targets.assign(report.storages.begin() + 1, report.storages.end());
  Copies copies;
  for (const memmig::Storage& storage : survey.targets) {
    DROVER_ASSIGN(EvacuateProblem::Target target, target_of(storage));
    survey.problem.targets.push_back(std::move(target));
    copies.push_back(noted_copies(storage.directory));
  }
  const Scope scope(survey.source);
  DROVER_ASSIGN(const auto files, memmig::connect_guest_files(uri_));
  DROVER_ASSIGN(const UsedFiles used, used_files(*files, scope, survey.notes));
  std::set<FileKey> theirs;
  Classifier classifier(used, scope);
  for (const auto& [key, file] : used) {
    if (!scope.has(file.place)) continue;
    auto item = classifier.item(file, survey.notes);
    if (!item) continue;
    theirs.insert(key);
    if (item->kind != EvacuateKind::Disk) {
      struct stat status {};
      if (::stat(item->path.c_str(), &status) == 0) {
        item->bytes = std::max(item->bytes, Length(static_cast<std::uint64_t>(status.st_size)));
      }
      item->copy = copy_of(item->path, copies);
    }
    survey.problem.items.push_back(std::move(*item));
  }
  std::set<std::string> of_jobs;
  DROVER_ASSIGN(survey.jobs, jobs_of(scope, of_jobs));
  for (const fs::path& path : files_below(survey.source, survey.notes)) {
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0) continue;
    if (theirs.contains({status.st_dev, status.st_ino}) || of_jobs.contains(path.string())) {
      continue;
    }
    // All guests use its copy already, and whoever was to delete it was killed.
    const auto copy = copy_of(path.string(), copies);
    struct stat of_copy {};
    if (copy && ::stat(copy->path.c_str(), &of_copy) == 0 &&
        used.contains({of_copy.st_dev, of_copy.st_ino})) {
      survey.problem.items.push_back(
          {.kind = EvacuateKind::Medium, .path = path.string(), .copy = copy});
      continue;
    }
    survey.others.push_back(path.string());
  }
  std::ranges::sort(survey.problem.items, {}, &EvacuateItem::path);
  return survey;
}

// ---- disks --------------------------------------------------------------------------------------

RelocateOptions RealWorld::relocation_of(const EvacuateProblem& problem,
                                         const EvacuateStep& step) const {
  RelocateOptions options;
  options.uri = uri_;
  for (const auto& file : step.files) {
    const EvacuateItem::User& user = problem.items[file.item].users.front();
    options.guest = user.uuid;
    options.places[user.disk] = file.path;
  }
  return options;
}

Status RealWorld::check(const EvacuateProblem& problem, const EvacuateStep& step, Cancel& cancel) {
  if (step.kind != EvacuateKind::Disk) return {};
  DROVER_ASSIGN(const Plan plan, plan_relocation(relocation_of(problem, step), cancel));
  if (plan.blocked()) return fail(memmig::blocked_error(plan.findings));
  return {};
}

// ---- media and NVRAM ----------------------------------------------------------------------------

Result<std::vector<FileUse>> RealWorld::uses_of(memmig::GuestFiles& files,
                                                const std::string& path) {
  DROVER_ASSIGN(std::vector<FileUse> uses, files.uses());
  std::erase_if(uses, [&](const FileUse& use) { return !blockcopy::same_file(use.path, path); });
  return uses;
}

Status RealWorld::copy(const EvacuateProblem& problem, const EvacuateStep& step, Length bandwidth,
                       Observer& observer, Cancel& cancel) {
  const EvacuateItem& item = problem.items[step.files.front().item];
  for (const auto& target : problem.targets) {
    DROVER_TRY(remove_unfinished_copy(item.path, target.directory));
  }
  if (item.copy) return {};
  Progress progress;
  progress.phase = Phase::Copy;
  progress.data = item.bytes;
  progress.disks = {{.disk = item.users.front().disk, .size = item.bytes, .data = item.bytes}};
  Length said;
  const auto say = [&](Length copied) {
    constexpr Length kWorthALine = 16_MiB;
    if (copied < item.bytes && copied < said + kWorthALine) return;
    said = copied;
    progress.copied = std::min(copied, item.bytes);
    progress.disks.front().copied = progress.copied;
    observer.progress(progress);
  };
  DROVER_TRY(copy_noted(item.path, step.files.front().path,
                        {.bandwidth = bandwidth, .progress = say}, cancel));
  return {};
}

// The old file goes if nobody names it any more.
Status RealWorld::let_go(memmig::GuestFiles& files, const EvacuateItem& item,
                         const std::string& copy) {
  DROVER_ASSIGN(const std::vector<FileUse> uses, uses_of(files, item.path));
  if (!uses.empty()) {
    return fail(Code::Busy,
                fmt::format("{} is still in use: as {}", item.path, called(uses.front())));
  }
  DROVER_ASSIGN(const blockcopy::ImageIdentity identity, blockcopy::identify_file(item.path));
  DROVER_TRY(blockcopy::remove_file(item.path, identity));
  forget_note(copy);
  if (const auto host = memmig::connect_disk_host({.uri = uri_})) {
    (*host)->refresh_pools({item.path, copy});
  }
  log_info("{} is now {}", item.path, copy);
  return {};
}

Status RealWorld::carry_out(const EvacuateProblem& problem, const EvacuateStep& step,
                            Length bandwidth, Observer& observer, Cancel& cancel) {
  if (step.kind == EvacuateKind::Disk) {
    RelocateOptions options = relocation_of(problem, step);
    options.bandwidth = bandwidth;
    DROVER_TRY(relocate(options, observer, cancel));
    return {};
  }
  const EvacuateItem& item = problem.items[step.files.front().item];
  const std::string& target = step.files.front().path;
  DROVER_ASSIGN(const auto files, memmig::connect_guest_files(uri_));
  std::optional<memmig::ImageLock> lock;
  if (step.kind == EvacuateKind::Nvram) {
    // As long as it is held no QEMU can open it, so the guest does not start meanwhile.
    DROVER_ASSIGN(lock, memmig::lock_image(item.path));
  }
  DROVER_TRY(copy(problem, step, bandwidth, observer, cancel));
  // From here on it is quick, and finished.
  Status changed;
  DROVER_ASSIGN(const std::vector<FileUse> uses, uses_of(*files, item.path));
  for (const FileUse& use : uses) {
    Status one;
    if (use.kind == Kind::Medium) {
      one = files->change_medium(use, target);
    } else if (use.kind == Kind::Nvram && !use.running) {
      one = files->change_nvram(use, target);
    } else {
      one = fail(Code::Busy, fmt::format("{} is in use as {}", item.path, called(use)));
    }
    if (!one && changed) changed = one;
  }
  if (changed) return let_go(*files, item, target);
  DROVER_ASSIGN(const std::vector<FileUse> already, uses_of(*files, target));
  if (already.empty()) ::unlink(target.c_str());
  return changed;
}

}  // namespace

std::unique_ptr<EvacuateWorld> real_evacuate_world(const std::string& uri) {
  return std::make_unique<RealWorld>(uri);
}

}  // namespace drover::job
