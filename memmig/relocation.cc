// SPDX-License-Identifier: Apache-2.0
#include "memmig/relocation.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

namespace drover::memmig {
namespace {

class Findings {
 public:
  struct Text {
    std::string what;
    std::string why;
    std::string to_do;
    std::string disk;
  };
  void blocker(const char* rule, Text text) { add(Severity::Blocker, rule, std::move(text)); }
  void warning(const char* rule, Text text) { add(Severity::Warning, rule, std::move(text)); }
  std::vector<Finding> take() {
    std::stable_partition(list_.begin(), list_.end(), [](const Finding& finding) {
      return finding.severity == Severity::Blocker;
    });
    return std::move(list_);
  }

 private:
  void add(Severity severity, const char* rule, Text text) {
    list_.push_back({severity, rule, std::move(text.what), std::move(text.why),
                     std::move(text.to_do), std::move(text.disk)});
  }
  std::vector<Finding> list_;
};

bool contains(const std::vector<std::string>& list, const std::string& value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

// Why a disk cannot be relocated, whatever the target; an empty rule: it can.
struct Reason {
  const char* rule = "";
  const char* why = "";
};
Reason cannot_go(const GuestDisk& disk) {
  switch (disk.kind) {
    case DiskKind::File:
    case DiskKind::Block: break;
    case DiskKind::Network: return {"disk-network", "is on a network storage"};
    case DiskKind::Directory: return {"disk-directory", "is a directory"};
    case DiskKind::Nvme: return {"disk-passthrough", "is an NVMe device of this host"};
    case DiskKind::VhostUser: return {"disk-vhost-user", "is served by vhost-user"};
    case DiskKind::VhostVdpa: return {"disk-vhost-vdpa", "is a vDPA device"};
    case DiskKind::Volume:
      return {"disk-pool", "is a volume of a storage pool that libvirt does not find"};
    case DiskKind::None: return {"disk-empty", "is an empty drive"};
  }
  switch (disk.device) {
    case DiskDevice::Disk: break;
    case DiskDevice::Cdrom: return {"disk-cdrom", "is a CD-ROM"};
    case DiskDevice::Floppy: return {"disk-floppy", "is a floppy"};
    case DiskDevice::Lun: return {"disk-passthrough", "is a SCSI LUN that is passed through"};
  }
  if (disk.shareable) return {"disk-shareable", "is shareable: another guest may write to it"};
  if (disk.readonly) return {"disk-readonly", "is read-only"};
  if (disk.transient) return {"disk-transient", "is transient"};
  if (disk.encrypted) return {"disk-encrypted", "is encrypted by QEMU (LUKS)"};
  if (disk.slice) return {"disk-slice", "is only a part of its file"};
  return {};
}

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string directory_of(const std::string& path) {
  return path.substr(0, std::max<std::size_t>(path.rfind('/'), 1));
}

// A file's name says what it is: it follows the format.
std::string target_name(const GuestInfo& guest, const GuestDisk& disk, const std::string& format) {
  if (disk.kind == DiskKind::Block) {
    return fmt::format("{}-{}.{}", guest.name, disk.target, format);
  }
  std::string name = file_name(disk.path);
  if (format == disk.format) return name;
  for (const std::string& ending : {"." + disk.format, std::string(".img")}) {
    if (name.size() > ending.size() && name.ends_with(ending)) {
      name.resize(name.size() - ending.size());
      break;
    }
  }
  return name + "." + format;
}

// A name that no other disk of the plan gets there.
std::string in_directory(std::string directory, const std::string& name, const std::string& disk,
                         const RelocationPlan& plan) {
  while (directory.ends_with('/')) directory.pop_back();
  const std::string path = directory + "/" + name;
  const bool taken =
      std::ranges::find(plan.disks, path, &PlannedDisk::target_path) != plan.disks.end();
  if (!taken) return path;
  const std::size_t dot = name.rfind('.');
  if (dot == std::string::npos || dot == 0) return path + "-" + disk;
  return directory + "/" + name.substr(0, dot) + "-" + disk + name.substr(dot);
}

void examine_guest(const GuestInfo& guest, Findings& out) {
  const std::string& name = guest.name;
  if (guest.state == GuestState::ShuttingDown || guest.state == GuestState::Unknown) {
    out.blocker("guest-state", {fmt::format("guest {} is {}", name, state_name(guest.state)), "",
                                "wait until it is running or off"});
  }
  if (guest.other_job) {
    out.blocker("guest-job-running",
                {fmt::format("libvirt has a job running on guest {}", name),
                 "a migration, save or dump is under way",
                 fmt::format("wait for it; 'virsh domjobinfo {}' shows it", name)});
  }
  if (guest.backup_job) {
    out.blocker("backup-running", {fmt::format("a backup of guest {} is running", name),
                                   "it holds the disks' images", "wait for it"});
  }
  for (const std::string& job : guest.foreign_jobs) {
    out.blocker("block-job-running",
                {fmt::format("guest {} has a {} running", name, job),
                 "libvirt does not know of it, and would lose it", "wait for it, or cancel it"});
  }
  if (guest.snapshots > 0) {
    out.blocker(
        "snapshots",
        {fmt::format("guest {} has {} snapshot(s)", name, guest.snapshots),
         "they are in the disks' images, or name them, and would be lost",
         fmt::format("'virsh snapshot-list {0}', then 'virsh snapshot-delete {0} NAME'", name)});
  }
  if (guest.checkpoints > 0) {
    out.blocker("checkpoints",
                {fmt::format("guest {} has {} checkpoint(s)", name, guest.checkpoints),
                 "the bitmaps of its incremental backups would be lost",
                 fmt::format("'virsh checkpoint-list {0}', then 'virsh checkpoint-delete {0} NAME'",
                             name)});
  }
  if (guest.managed_save) {
    out.blocker(
        "managed-save",
        {fmt::format("guest {} has a saved state", name),
         "it names the disks where they are now, and the guest would continue with those",
         fmt::format("'virsh start {0}' it first, or 'virsh managedsave-remove {0}'", name)});
  }
}

void examine_selection(const RelocationFacts& facts, const RelocationPlan& plan, Findings& out) {
  const GuestInfo& guest = facts.guest;
  for (const std::string& disk : plan.unknown_disks) {
    std::vector<std::string> names;
    for (const GuestDisk& one : guest.disks) names.push_back(one.target);
    const bool inactive = contains(guest.inactive_only_disks, disk);
    out.blocker(
        inactive ? "disk-not-attached" : "disk-unknown",
        {inactive ? fmt::format("disk {} is in the definition of guest {} but not attached", disk,
                                guest.name)
                  : fmt::format("guest {} has no such disk: {}", guest.name, disk),
         names.empty() ? "it has no disks" : fmt::format("it has {}", fmt::join(names, ", ")),
         fmt::format("'virsh domblklist {}' shows them", guest.name), disk});
  }
  for (const RelocationPlan::Stays& stays : plan.staying) {
    const std::string what =
        fmt::format("disk {} of guest {} {}", stays.disk, guest.name, stays.why);
    if (stays.named) {
      out.blocker(stays.rule.c_str(), {what, "", "leave it out", stays.disk});
    } else if (stays.rule != "disk-empty") {
      out.warning(stays.rule.c_str(), {what + ": it stays where it is", "", "", stays.disk});
    }
  }
  const bool named = std::ranges::any_of(plan.staying, &RelocationPlan::Stays::named);
  if (plan.disks.empty() && plan.unknown_disks.empty() && !named) {
    out.blocker("no-disks",
                {fmt::format("guest {} has no disk that could be relocated", guest.name), "", ""});
  }
}

void examine_source(const RelocationFacts& facts, const PlannedDisk& disk, Findings& out) {
  const GuestInfo& guest = facts.guest;
  const GuestDisk* info = guest.disk(disk.disk);
  if (info == nullptr) return;
  const std::string name = fmt::format("disk {} of guest {}", disk.disk, guest.name);
  if (!info->block_job.empty()) {
    out.blocker(
        "block-job-running",
        {fmt::format("{} has a {} job running", name, info->block_job), "",
         fmt::format("wait for it, or 'virsh blockjob {} {} --abort'", guest.name, disk.disk),
         disk.disk});
  }
  const DiskPlace* place = facts.places.disk(disk.disk);
  if (place != nullptr && !place->persistent_path.empty() &&
      place->persistent_path != place->path) {
    out.blocker("definitions-differ",
                {fmt::format("{} is {} now, and {} in the persistent definition", name, place->path,
                             place->persistent_path),
                 "which of them is to be changed cannot be told",
                 fmt::format("'virsh edit {}' so that both are the same", guest.name), disk.disk});
  }
  if (disk.virtual_size == Length()) {
    out.blocker("disk-unreadable",
                {fmt::format("{}: the size of {} is not known", name, disk.source_path), "",
                 "does the file exist, and is its format right?", disk.disk});
  }
  if (info->backing_chain) {
    out.warning("disk-backing-chain",
                {name + " has backing files",
                 "its copy is one image with the content of all; the files below the top one stay",
                 "", disk.disk});
  }
  if (info->format != disk.target_format) {
    out.warning("disk-format",
                {fmt::format("{} is {} and becomes {}", name, info->format, disk.target_format), "",
                 "", disk.disk});
  }
}

struct Need {
  Length data;
  Length whole;
  Length free;
  std::string path;
};
using Needs = std::map<std::uint64_t, Need>;  // by filesystem

void examine_target_device(const PlannedDisk& disk, const PathFacts& there, Findings& out) {
  const std::string begin = fmt::format("disk {}: ", disk.disk);
  if (there.in_use) {
    out.blocker("target-device-in-use",
                {fmt::format("{}{} is in use", begin, disk.target_path),
                 "it is mounted, or part of an array or volume group", "", disk.disk});
  }
  if (disk.target_format != "raw") {
    out.blocker("target-device-format",
                {fmt::format("{}a {} image cannot be put on device {}", begin, disk.target_format,
                             disk.target_path),
                 "drover writes only raw disks to block devices", "--format raw", disk.disk});
  }
  if (there.size < disk.virtual_size) {
    out.blocker("target-device-too-small",
                {fmt::format("{}{} has {}, the disk has {}", begin, disk.target_path,
                             format_length(there.size), format_length(disk.virtual_size)),
                 "", "", disk.disk});
  } else if (there.size > disk.virtual_size) {
    out.warning("target-device-larger",
                {fmt::format("{}{} has {}, the disk has {}", begin, disk.target_path,
                             format_length(there.size), format_length(disk.virtual_size)),
                 "the guest will see the device's size", "", disk.disk});
  }
}

void examine_target(const RelocationFacts& facts, const RelocationPlan& plan,
                    const PlannedDisk& disk, Needs& needs, Findings& out) {
  const std::string& path = disk.target_path;
  const auto blocker = [&](const char* rule, const std::string& what, std::string why,
                           std::string to_do) {
    out.blocker(rule, {fmt::format("disk {}: {}", disk.disk, what), std::move(why),
                       std::move(to_do), disk.disk});
  };
  const std::string elsewhere = fmt::format("choose another path: {}=PATH", disk.disk);
  if (facts.same_file.contains(disk.disk)) {
    blocker("same-place", fmt::format("{} is where it is already", path), "", "");
    return;
  }
  if (!path.starts_with('/') || path.ends_with('/')) {
    blocker("target-path", fmt::format("'{}' is not the absolute path of a file", path), "",
            elsewhere);
    return;
  }
  const PathFacts* there = facts.probe.path(path);
  if (there == nullptr) return;
  if (!there->problem.empty()) {
    blocker("target-path", fmt::format("{}: {}", path, there->problem), "", elsewhere);
    return;
  }
  for (const ImageUse& use : facts.uses) {
    if (use.path != path) continue;
    blocker("target-in-use", fmt::format("{} is {}", path, use.user()), "", elsewhere);
    return;
  }
  if (there->kind == PathFacts::Kind::Block) {
    examine_target_device(disk, *there, out);
    return;
  }
  if (there->exists) {
    blocker("target-file-exists", fmt::format("{} is there already", path),
            "drover never overwrites a file", "remove it, or " + elsewhere);
    return;
  }
  if (!there->directory_exists) {
    blocker("target-directory-missing", fmt::format("there is no directory {}", directory_of(path)),
            "", fmt::format("'mkdir -p {}', or {}", directory_of(path), elsewhere));
    return;
  }
  if (path.starts_with("/dev/")) {
    blocker("target-device-missing", fmt::format("there is no device {}", path), "",
            "create the volume, or " + elsewhere);
    return;
  }
  if (there->read_only_filesystem || !there->directory_writable) {
    blocker("target-directory-not-writable",
            fmt::format("{} cannot be written to", directory_of(path)),
            there->read_only_filesystem ? "the filesystem is mounted read-only" : "", elsewhere);
    return;
  }
  if (!there->unreachable_for_qemu.empty()) {
    blocker("target-unreachable-for-qemu",
            fmt::format("QEMU may not enter {}", there->unreachable_for_qemu),
            fmt::format("it runs as user {}", facts.probe.qemu_user),
            fmt::format("'chmod o+x {}', or {}", there->unreachable_for_qemu, elsewhere));
  }
  const GuestDisk* info = facts.guest.disk(disk.disk);
  const bool direct = info != nullptr && (info->cache == "none" || info->cache == "directsync");
  if (direct && !there->direct_io) {
    blocker("target-no-direct-io",
            fmt::format("the filesystem of {} takes no O_DIRECT", directory_of(path)),
            "the guest's disk is set to cache='none', so QEMU could not open it", elsewhere);
  }
  if (plan.renamed.contains(disk.disk)) return;
  Need& need = needs[there->filesystem];
  need.data += disk.allocation;
  need.whole += disk.virtual_size;
  need.free = there->free;
  if (need.path.empty()) need.path = directory_of(path);
}

void examine_space(const Needs& needs, Findings& out) {
  for (const auto& [filesystem, need] : needs) {
    if (need.free < need.data + kSpaceMargin) {
      out.blocker("target-space",
                  {fmt::format("{} has {} free; the disks' data need {} and {} to spare", need.path,
                               format_length(need.free), format_length(need.data),
                               format_length(kSpaceMargin)),
                   "", "make room there, or choose another place"});
    } else if (need.free < need.whole) {
      out.warning("target-space-thin",
                  {fmt::format("{} has {} free; the disks may grow to {}", need.path,
                               format_length(need.free), format_length(need.whole)),
                   "the filesystem can get full later", ""});
    }
  }
}

}  // namespace

bool copied_live(const GuestInfo& guest) { return guest.id >= 0; }

RelocationPlan plan_relocation(const GuestInfo& guest, const RelocationWish& wish) {
  RelocationPlan plan;
  for (const std::string& name : wish.disks) {
    if (guest.disk(name) == nullptr) plan.unknown_disks.push_back(name);
  }
  for (const auto& [name, place] : wish.places) {
    if (guest.disk(name) == nullptr && !contains(plan.unknown_disks, name)) {
      plan.unknown_disks.push_back(name);
    }
  }
  for (const GuestDisk& disk : guest.disks) {
    const auto place = wish.places.find(disk.target);
    const bool has_place = place != wish.places.end();
    const bool named = has_place || contains(wish.disks, disk.target);
    const bool all = wish.disks.empty() && !wish.directory.empty();
    if (!named && !all) continue;
    if (const Reason reason = cannot_go(disk); *reason.rule != '\0') {
      plan.staying.push_back({disk.target, reason.rule, reason.why, named});
      continue;
    }
    PlannedDisk planned;
    planned.disk = disk.target;
    planned.named = named;
    planned.source_path = disk.path;
    planned.source_format = disk.format;
    planned.source_block_device = disk.kind == DiskKind::Block;
    planned.target_format = !wish.format.empty()                             ? wish.format
                            : disk.format == "raw" || disk.format == "qcow2" ? disk.format
                                                                             : "qcow2";
    const std::string name = target_name(guest, disk, planned.target_format);
    if (!has_place) {
      planned.target_path = in_directory(wish.directory, name, disk.target, plan);
    } else if (place->second.directory) {
      planned.target_path = in_directory(place->second.path, name, disk.target, plan);
    } else {
      planned.target_path = place->second.path;
    }
    planned.delete_source = disk.kind == DiskKind::File && !wish.keep_source;
    planned.virtual_size = disk.virtual_size;
    planned.allocation = disk.allocation == Length() && disk.kind == DiskKind::Block
                             ? disk.virtual_size
                             : std::min(disk.allocation, disk.virtual_size);
    planned.cluster_size = disk.cluster_size;
    plan.disks.push_back(std::move(planned));
  }
  return plan;
}

ProbeRequest probe_request(const RelocationPlan& plan) {
  ProbeRequest request;
  for (const PlannedDisk& disk : plan.disks) {
    request.paths.push_back(disk.source_path);
    request.paths.push_back(disk.target_path);
  }
  return request;
}

void settle_relocation(RelocationPlan& plan, const RelocationFacts& facts, bool keep_source) {
  // Of several disks those that are there already stay; of one, or if it was named, that is an
  // error.
  if (facts.same_file.size() < plan.disks.size()) {
    std::erase_if(plan.disks, [&](const PlannedDisk& disk) {
      if (disk.named || !facts.same_file.contains(disk.disk)) return false;
      plan.staying.push_back({disk.disk, "same-place", "is there already", false});
      return true;
    });
  }
  for (PlannedDisk& disk : plan.disks) {
    const PathFacts* source = facts.probe.path(disk.source_path);
    const PathFacts* target = facts.probe.path(disk.target_path);
    if (target != nullptr) disk.target_block_device = target->kind == PathFacts::Kind::Block;
    const GuestDisk* info = facts.guest.disk(disk.disk);
    // A backing file may be named relative to where the image is.
    if (source != nullptr && target != nullptr && info != nullptr && !keep_source &&
        !copied_live(facts.guest) && !info->backing_chain && !disk.source_block_device &&
        !disk.target_block_device && !facts.linked.contains(disk.disk) &&
        source->filesystem == target->filesystem && disk.source_format == disk.target_format) {
      plan.renamed.insert(disk.disk);
    }
    if (facts.linked.contains(disk.disk)) disk.delete_source = false;
  }
}

std::string other_user(const std::vector<ImageUse>& uses, const std::string& path,
                       const std::string& guest, const std::string& disk, const SameFile& same) {
  for (const ImageUse& use : uses) {
    const bool itself = use.guest == guest && use.disk == disk && !use.backing;
    if (!itself && same(use.path, path)) return use.user();
  }
  return {};
}

std::vector<Finding> examine_relocation(const RelocationFacts& facts, const RelocationPlan& plan) {
  Findings out;
  examine_guest(facts.guest, out);
  examine_selection(facts, plan, out);
  Needs needs;
  std::map<std::string, std::string> targets;  // to the disk that goes there
  for (const PlannedDisk& disk : plan.disks) {
    const auto [other, fresh] = targets.emplace(disk.target_path, disk.disk);
    if (!fresh) {
      out.blocker("target-path-twice",
                  {fmt::format("disks {} and {} would both be {}", other->second, disk.disk,
                               disk.target_path),
                   "", "give them places of their own: TARGET=PATH", disk.disk});
      continue;
    }
    examine_source(facts, disk, out);
    examine_target(facts, plan, disk, needs, out);
    if (facts.linked.contains(disk.disk)) {
      out.warning("source-link",
                  {fmt::format("disk {}: {} is a symbolic link", disk.disk, disk.source_path),
                   "what it points to is not deleted", "", disk.disk});
    }
  }
  examine_space(needs, out);
  return out.take();
}

}  // namespace drover::memmig
