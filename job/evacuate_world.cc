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
#include "job/evacuate_file.h"
#include "job/evacuate_items.h"
#include "job/job_store.h"
#include "job/noted_copy.h"
#include "job/relocate.h"
#include "memmig/guest_files.h"
#include "memmig/image_chain.h"
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

bool is_link(const std::string& path) {
  std::error_code error;
  return fs::is_symlink(path, error);
}

// ---- who uses what ------------------------------------------------------------------------------

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

// ---- the world ----------------------------------------------------------------------------------

class RealWorld final : public EvacuateWorld {
 public:
  explicit RealWorld(std::string uri) : uri_(std::move(uri)) {}

  Status claim(const EvacuateSurvey& survey) override;
  Result<EvacuateSurvey> look(const EvacuateOptions& options) override;
  Status check(const EvacuateProblem& problem, const EvacuateStep& step, Cancel& cancel) override;
  Status carry_out(const EvacuateProblem& problem, const EvacuateStep& step,
                   const EvacuateShare& share, Observer& observer, Cancel& cancel) override;
  Status resume(const std::string& job, Observer& observer, Cancel& cancel) override {
    DROVER_TRY(job::resume(job, observer, cancel));
    return {};
  }

 private:
  RelocateOptions relocation_of(const EvacuateProblem& problem, const EvacuateStep& step) const;

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
      if (use.kind != Kind::Remembered && scope.has_name(use.path) &&
          missing.insert(use.path).second) {
        notes.push_back(fmt::format("{}: {}", called(use), place.error().message));
      }
      continue;
    }
    const bool directory = place->kind == FilePlace::Kind::Directory && use.kind == Kind::Other;
    if (place->kind != FilePlace::Kind::File && !directory) continue;
    add_use(out, scope, *place, std::move(use));
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
    const auto disks = static_cast<unsigned>(view.record->plan.disks.size());
    out.push_back({view.id, view.record->plan.guest, view.record->plan.uuid, view.alive,
                   std::min(disks, view.record->relocation->parallel)});
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
  for (fs::directory_iterator at(storage.directory, error), end; !error && at != end;
       at.increment(error)) {
    target.names.insert(at->path().filename().string());
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
  for (const auto& [key, file] : used) {
    if (!scope.has(file.place)) continue;
    auto item = evacuate_item(file, used, scope, is_link, survey.notes);
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
    const auto user = used.find({status.st_dev, status.st_ino});
    if (user != used.end() && !scope.has(user->second.place)) {
      survey.problem.items.push_back(named_elsewhere(user->second, path.string()));
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

Status RealWorld::carry_out(const EvacuateProblem& problem, const EvacuateStep& step,
                            const EvacuateShare& share, Observer& observer, Cancel& cancel) {
  DROVER_ASSIGN(const auto files, memmig::connect_guest_files(uri_));
  if (step.kind == EvacuateKind::Disk) {
    DROVER_TRY(disks_are_there(*files, problem, step));
    RelocateOptions options = relocation_of(problem, step);
    options.bandwidth = share.bandwidth;
    options.parallel = share.files;
    DROVER_TRY(relocate(options, observer, cancel));
    return {};
  }
  FileStep one{.item = problem.items[step.files.front().item],
               .target = step.files.front().path,
               .bandwidth = share.bandwidth};
  for (const auto& target : problem.targets) one.directories.push_back(target.directory);
  DROVER_TRY(evacuate_file(*files, JobStore(), one, observer, cancel));
  if (const auto host = memmig::connect_disk_host({.uri = uri_})) {
    (*host)->refresh_pools({one.item.path, one.target});
  }
  return {};
}

}  // namespace

std::unique_ptr<EvacuateWorld> real_evacuate_world(const std::string& uri) {
  return std::make_unique<RealWorld>(uri);
}

}  // namespace drover::job
