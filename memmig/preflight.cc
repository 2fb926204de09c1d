// SPDX-License-Identifier: Apache-2.0
#include "memmig/preflight.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "memmig/libvirt_hypervisor.h"

namespace drover::memmig {
namespace {

class Findings {
 public:
  void blocker(const char* rule, std::string what, std::string why, std::string to_do,
               std::string disk = {}) {
    list_.push_back({Severity::Blocker, rule, std::move(what), std::move(why), std::move(to_do),
                     std::move(disk)});
  }
  void warning(const char* rule, std::string what, std::string why, std::string to_do,
               std::string disk = {}) {
    list_.push_back({Severity::Warning, rule, std::move(what), std::move(why), std::move(to_do),
                     std::move(disk)});
  }
  std::vector<Finding> take() {
    std::stable_partition(list_.begin(), list_.end(), [](const Finding& finding) {
      return finding.severity == Severity::Blocker;
    });
    return std::move(list_);
  }

 private:
  std::vector<Finding> list_;
};

bool contains(const std::vector<std::string>& list, const std::string& value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

std::string version_text(std::uint64_t version) {
  return fmt::format("{}.{}.{}", version / 1000000, version / 1000 % 1000, version % 1000);
}

// Drives whose medium can be changed.
bool removable(const GuestDisk& disk) {
  return disk.device == DiskDevice::Cdrom || disk.device == DiskDevice::Floppy;
}

bool image_on_this_host(const GuestDisk& disk) {
  return disk.kind == DiskKind::File || disk.kind == DiskKind::Block;
}

// ---- the guest ----------------------------------------------------------------------------------

void examine_state(const GuestInfo& guest, Findings& out) {
  switch (guest.state) {
    case GuestState::Running: break;
    case GuestState::Paused:
      out.blocker("guest-paused", fmt::format("guest {} is paused", guest.name),
                  "only a running guest is moved live",
                  fmt::format("'virsh resume {}' first", guest.name));
      break;
    case GuestState::PmSuspended:
      out.blocker("guest-sleeping", fmt::format("guest {} sleeps", guest.name),
                  "only a running guest is moved live",
                  fmt::format("'virsh dompmwakeup {}' first", guest.name));
      break;
    case GuestState::ShuttingDown:
    case GuestState::ShutOff:
    case GuestState::Crashed:
    case GuestState::Unknown:
      out.blocker(
          "guest-not-running",
          fmt::format("guest {} is not running: it is {}", guest.name, state_name(guest.state)),
          "only a running guest is moved live", fmt::format("'virsh start {}' first", guest.name));
      break;
  }
  if (guest.other_job) {
    out.blocker("guest-job-running",
                fmt::format("libvirt has a job running on guest {}", guest.name),
                "a migration, save or dump is under way",
                fmt::format("wait for it; 'virsh domjobinfo {}' shows it", guest.name));
  }
  if (guest.backup_job) {
    out.blocker("backup-running", fmt::format("a backup of guest {} is running", guest.name),
                "it holds QEMU's block layer, and would be lost",
                fmt::format("wait for it; 'virsh domjobinfo {}' shows it", guest.name));
  }
  for (const std::string& job : guest.foreign_jobs) {
    out.blocker("block-job-running", fmt::format("guest {} has a {} running", guest.name, job),
                "a job that libvirt does not know of would be lost", "wait for it, or cancel it");
  }
  if (!guest.nbd_exports.empty()) {
    out.blocker("nbd-server-in-use",
                fmt::format("QEMU's NBD server of guest {} is in use: it exports {}", guest.name,
                            fmt::join(guest.nbd_exports, ", ")),
                "QEMU has only one, and drover reads disks through it",
                "wait for the backup that uses it, or end it");
  }
  for (const std::string& reason : guest.migration_blockers) {
    out.blocker("qemu-refuses", fmt::format("QEMU cannot migrate guest {}: {}", guest.name, reason),
                "", "");
  }
  if (guest.snapshots > 0) {
    out.blocker("snapshots",
                fmt::format("guest {} has {} snapshot(s)", guest.name, guest.snapshots),
                "libvirt does not migrate them, and the target's images would not have them",
                fmt::format("'virsh snapshot-list {0}', then 'virsh snapshot-delete {0} NAME'",
                            guest.name));
  }
  if (guest.checkpoints > 0) {
    out.blocker("checkpoints",
                fmt::format("guest {} has {} checkpoint(s)", guest.name, guest.checkpoints),
                "the bitmaps of its incremental backups would be lost",
                fmt::format("'virsh checkpoint-list {0}', then 'virsh checkpoint-delete {0} NAME'; "
                            "the next backup is a full one",
                            guest.name));
  }
}

void examine_devices(const GuestInfo& guest, Findings& out) {
  const auto each = [&](const std::vector<std::string>& devices, const char* rule, const char* what,
                        const char* why, const char* to_do) {
    for (const std::string& device : devices) {
      out.blocker(rule, fmt::format("guest {} has {}: {}", guest.name, what, device), why, to_do);
    }
  };
  each(guest.host_devices, "host-device", "a device of this host", "it stays on this host",
       "detach it first");
  each(guest.vdpa, "vdpa", "a vDPA device", "it is hardware of this host", "detach it first");
  each(guest.filesystems, "shared-directory", "a shared directory",
       "QEMU cannot migrate it, and its files are on this host", "unmount and detach it first");
  each(guest.shared_memory, "shared-memory", "memory that is shared with this host",
       "it stays on this host", "detach it first");
  each(guest.passthrough_tpm, "tpm-passthrough", "a TPM of this host", "it stays on this host",
       "use an emulated TPM");
  for (const std::string& device : guest.vhost_user) {
    if (device.starts_with("disk ")) continue;  // examine_disk() has it
    out.warning("vhost-user", fmt::format("guest {} has a vhost-user {}", guest.name, device),
                "a socket of the same path must be served on the target", "");
  }
  if (guest.cpu_mode == "host-passthrough" || guest.cpu_mode == "maximum") {
    out.warning(
        "cpu-passthrough",
        fmt::format("guest {} sees this host's CPU itself ({})", guest.name, guest.cpu_mode),
        "it may crash on a host whose CPU or microcode differs",
        "move it only between equal hosts, or use host-model");
  }
}

void examine_disk(const GuestInfo& guest, const GuestDisk& disk, const MovePlan& plan,
                  Findings& out) {
  if (disk.kind == DiskKind::None || contains(plan.eject, disk.target)) return;
  const std::string name = fmt::format("disk {} of guest {}", disk.target, guest.name);
  const auto blocker = [&](const char* rule, std::string what, const char* why, const char* to_do) {
    out.blocker(rule, std::move(what), why, to_do, disk.target);
  };
  const bool medium = removable(disk);
  switch (disk.kind) {
    case DiskKind::File:
    case DiskKind::Block: break;
    case DiskKind::Network:
      blocker("disk-network", name + " is on a network storage", "its data are not on this host",
              "'virsh migrate' moves guests whose disks are shared");
      return;
    case DiskKind::Directory:
      blocker("disk-directory", name + " is a directory", "QEMU cannot migrate it",
              "detach it first");
      return;
    case DiskKind::Nvme:
      blocker("disk-passthrough", name + " is an NVMe device of this host", "it stays on this host",
              "detach it first");
      return;
    case DiskKind::VhostUser:
      blocker("disk-vhost-user", name + " is served by vhost-user", "QEMU does not see its data",
              "detach it first");
      return;
    case DiskKind::VhostVdpa:
      blocker("disk-vhost-vdpa", name + " is a vDPA device", "QEMU does not see its data",
              "detach it first");
      return;
    case DiskKind::Volume:
      blocker("disk-pool",
              fmt::format("{} is volume {} of pool {}, which libvirt does not find", name,
                          disk.volume, disk.pool),
              "", "'virsh pool-start' or 'virsh pool-refresh' it");
      return;
    case DiskKind::None: return;
  }
  if (disk.device == DiskDevice::Lun) {
    blocker("disk-passthrough", name + " is a SCSI LUN that is passed through",
            "the guest's SCSI commands go to the device, past any mirror",
            "attach it as device='disk'");
  }
  if (disk.shareable) {
    blocker("disk-shareable", name + " is shareable",
            "another guest may write to it, which no mirror of this guest sees",
            "remove <shareable/> if this guest is its only user");
  }
  if (disk.transient) {
    blocker("disk-transient", name + " is transient", "its changes are in a hidden overlay",
            "remove <transient/>");
  }
  if (disk.encrypted) {
    blocker("disk-encrypted", name + " is encrypted by QEMU (LUKS)",
            "the copy would be made of the decrypted data", "");
  }
  if (!disk.block_job.empty()) {
    blocker("block-job-running", fmt::format("{} has a {} job running", name, disk.block_job),
            "it changes the disk's images while they are copied",
            "wait for it, or 'virsh blockjob --abort' it");
  }
  if (guest.id >= 0 && disk.node.empty()) {
    blocker("disk-not-found", name + " was not found in QEMU", "", "");
  }
  if (!medium && disk.backing_chain) {
    out.warning("disk-backing-chain", name + " has backing files",
                "on the target it is one image with the content of all",
                "the files below the top one stay here", disk.target);
  }
  if (!medium && disk.format != "raw" && disk.format != "qcow2") {
    out.warning("disk-format", fmt::format("{} has format {}", name, disk.format),
                "on the target it will be qcow2", "", disk.target);
  }
}

// ---- versions and hosts -------------------------------------------------------------------------

void examine_hosts(const Facts& facts, Findings& out) {
  const HostFacts& source = facts.source;
  const HostFacts& target = facts.target;
  const bool same_process_space = !facts.source_probe.host_id.empty() &&
                                  facts.source_probe.host_id == facts.target_probe.host_id;
  const bool same_uuid = !source.host_uuid.empty() && source.host_uuid == target.host_uuid;
  if (same_process_space || (same_uuid && source.hostname == target.hostname)) {
    out.blocker("same-host", fmt::format("{} is this host", target.hostname),
                "a guest is moved to another host", "name another host");
    return;  // everything else would say the same again
  }
  if (same_uuid) {
    out.blocker("same-host-uuid",
                fmt::format("{} and {} have the same host UUID {}", source.hostname,
                            target.hostname, source.host_uuid),
                "libvirt refuses to migrate between them",
                "set another host_uuid in /etc/libvirt/libvirtd.conf of one of them");
  }
  if (!facts.target_probe.drover_version.empty() &&
      facts.target_probe.drover_version != facts.source_probe.drover_version) {
    out.blocker("drover-version",
                fmt::format("{} has drover {}, this host has {}", target.hostname,
                            facts.target_probe.drover_version, facts.source_probe.drover_version),
                "both ends must be of the same version", "install the same version on both");
  }
  for (const HostFacts* host : {&source, &target}) {
    if (host->libvirt_version != 0 && host->libvirt_version < kOldestLibvirt) {
      out.blocker(
          "libvirt-too-old",
          fmt::format("{} has libvirt {}", host->hostname, version_text(host->libvirt_version)),
          fmt::format("drover needs {}", version_text(kOldestLibvirt)), "upgrade it");
    }
    if (host->hypervisor_version != 0 && host->hypervisor_version < kOldestQemu) {
      out.blocker(
          "qemu-too-old",
          fmt::format("{} has QEMU {}", host->hostname, version_text(host->hypervisor_version)),
          fmt::format("drover needs {}", version_text(kOldestQemu)), "upgrade it");
    }
  }
}

// QEMU before 8.2.1 ends with a failed assertion (nbd_blockdev_client_closed) when a client leaves its export of a disk
// that has an iothread, as a drover that is killed does. Seen with 7.2.22.
void examine_exports(const Facts& facts, Findings& out) {
  constexpr std::uint64_t kFixed = 8002001;
  if (facts.source.hypervisor_version == 0 || facts.source.hypervisor_version >= kFixed) return;
  for (const PlannedDisk& planned : facts.plan.disks) {
    const GuestDisk* const disk = facts.guest.disk(planned.disk);
    if (disk == nullptr || !disk->iothread || planned.source_plain) continue;
    out.blocker("export-with-iothread",
                fmt::format("disk {} is a {} image and has an iothread, and QEMU here is {}", planned.disk,
                            planned.source_format, version_text(facts.source.hypervisor_version)),
                "that QEMU dies, and the guest with it, if drover is killed while it reads such a disk",
                "take the iothread out of the disk's definition, or move the guest switched off", planned.disk);
  }
}

void examine_target(const Facts& facts, Findings& out) {
  const GuestInfo& guest = facts.guest;
  const HostFacts& target = facts.target;
  const std::string& host = target.hostname;
  if (target.name_of_uuid || target.uuid_of_name) {
    out.blocker("guest-exists",
                target.name_of_uuid
                    ? fmt::format("guest {} is on {} already (as {}, {})", guest.name, host,
                                  *target.name_of_uuid, state_name(target.existing_state))
                    : fmt::format("{} has another guest named {} ({}, UUID {})", host, guest.name,
                                  state_name(target.existing_state), *target.uuid_of_name),
                "libvirt keeps one guest of a name and UUID",
                fmt::format("if it is not needed: 'virsh -c {} undefine {}'", target.uri,
                            target.name_of_uuid ? *target.name_of_uuid : guest.name));
  }
  if (!target.machine_supported) {
    out.blocker(
        "machine-type",
        fmt::format("{} has no machine type {} ({})", host, guest.machine, guest.domain_type),
        target.machine_problem, "install a newer QEMU there");
  }
  switch (target.cpu) {
    case CpuAnswer::Compatible: break;
    case CpuAnswer::Incompatible:
      // A definition with check='none' (or 'partial') starts with what the host has: then the
      // model's list of features says nothing, here as there.
      if (facts.source.cpu == CpuAnswer::Incompatible) {
        out.warning("cpu-unknown",
                    fmt::format("neither host has all of the CPU model of guest {}", guest.name),
                    target.cpu_problem, "move it only between equal hosts");
        break;
      }
      out.blocker(
          "cpu", fmt::format("{} has not the CPU that guest {} sees", host, guest.name),
          target.cpu_problem,
          "give the guest a CPU model that both hosts have ('virsh hypervisor-cpu-baseline')");
      break;
    case CpuAnswer::Unknown:
      if (!guest.cpu_xml.empty() && guest.cpu_mode != "host-passthrough" &&
          guest.cpu_mode != "maximum") {
        out.warning(
            "cpu-unknown",
            fmt::format("whether {} has the CPU that guest {} sees is not known", host, guest.name),
            target.cpu_problem, "");
      }
      break;
  }
  const Length memory = guest.memory + kMemoryMargin;
  if (target.free_memory.bytes() != 0 && target.free_memory < memory) {
    out.blocker("memory",
                fmt::format("{} has {} of memory free; guest {} needs {}", host,
                            format_length(target.free_memory), guest.name, format_length(memory)),
                "", "stop or move other guests there");
  }
  if (target.cores != 0 && target.cores < guest.vcpus) {
    out.warning(
        "cores",
        fmt::format("{} has {} CPUs; guest {} has {}", host, target.cores, guest.name, guest.vcpus),
        "it will be slower there", "");
  }
  for (const std::string& network : target.networks_missing) {
    out.blocker("network-missing", fmt::format("{} has no libvirt network {}", host, network),
                "a card of the guest is on it",
                fmt::format("'virsh net-dumpxml {}' here, 'virsh net-define' there", network));
  }
  for (const std::string& network : target.networks_inactive) {
    out.blocker("network-inactive",
                fmt::format("libvirt network {} on {} is not active", network, host),
                "a card of the guest is on it",
                fmt::format("'virsh -c {} net-start {}'", target.uri, network));
  }
  for (const std::string& name : facts.target_probe.interfaces_missing) {
    const bool bridge = contains(guest.bridges, name);
    out.blocker(bridge ? "bridge-missing" : "interface-missing",
                fmt::format("{} has no {} {}", host, bridge ? "bridge" : "network interface", name),
                "a card of the guest is on it", "create it there");
  }
  for (const std::string& program : facts.target_probe.programs_missing) {
    out.blocker("program-missing", fmt::format("{} has no program {}", host, program),
                program == "swtpm" ? "the guest's TPM is emulated by it" : "", "install it there");
  }
}

// ---- files on the target ------------------------------------------------------------------------

void examine_needed_files(const Facts& facts, Findings& out) {
  const GuestInfo& guest = facts.guest;
  const std::string& host = facts.target.hostname;
  const auto missing = [&](const std::string& path) {
    const PathFacts* there = facts.target_probe.path(path);
    return there != nullptr && there->kind != PathFacts::Kind::File &&
           there->kind != PathFacts::Kind::Block;
  };
  for (const std::string& path : {guest.firmware_loader, guest.nvram_template}) {
    if (!path.empty() && missing(path)) {
      out.blocker("firmware-missing", fmt::format("{} has not the firmware {}", host, path),
                  "the guest is started with it", "install it there (ovmf)");
    }
  }
  for (const std::string& path : guest.boot_files) {
    if (missing(path)) {
      out.blocker("boot-file-missing", fmt::format("{} has no {}", host, path),
                  "the guest is started with it", "copy it there");
    }
  }
  if (!guest.firmware_nvram.empty()) {
    if (const PathFacts* there = facts.target_probe.path(guest.firmware_nvram);
        there != nullptr && there->exists) {
      out.blocker("nvram-exists",
                  fmt::format("{} is there already on {}", guest.firmware_nvram, host),
                  "the guest's firmware variables would overwrite it", "remove it there");
    }
  }
  for (const std::string& name : facts.plan.staying) {
    const GuestDisk* disk = guest.disk(name);
    if (disk == nullptr || !image_on_this_host(*disk)) continue;
    const std::string what =
        fmt::format("the medium in drive {} of guest {}, {},", name, guest.name, disk->path);
    const std::string to_do = fmt::format(
        "copy it there, have drover copy it (--disk {0}={1}), or take it out (--eject {0})", name,
        disk->path);
    const PathFacts* there = facts.target_probe.path(disk->path);
    if (there == nullptr) continue;
    if (missing(disk->path)) {
      out.blocker("medium-missing", fmt::format("{} is not on {}", what, host), "", to_do, name);
      continue;
    }
    // QEMU counts a file in sectors.
    const Length sectors = widen({Offset(0), there->size}, Length(512)).length;
    if (disk->format == "raw" && disk->virtual_size.bytes() != 0 && sectors != disk->virtual_size) {
      out.blocker("medium-differs",
                  fmt::format("{} is another one on {}: {} here, {} there", what, host,
                              format_length(disk->virtual_size), format_length(there->size)),
                  "", to_do, name);
    }
  }
}

struct Need {
  Length data;
  Length whole;
  Length free;
  std::string path;
};

void examine_target_disk(const Facts& facts, const PlannedDisk& disk,
                         std::map<std::uint64_t, Need>& needs, Findings& out) {
  const std::string& host = facts.target.hostname;
  const std::string& path = disk.target_path;
  const auto blocker = [&](const char* rule, std::string what, std::string why, std::string to_do) {
    out.blocker(rule, fmt::format("disk {}: {}", disk.disk, what), std::move(why), std::move(to_do),
                disk.disk);
  };
  const std::string elsewhere = fmt::format("choose another path with --disk {}=PATH", disk.disk);
  if (!path.starts_with('/') || path.ends_with('/')) {
    blocker("target-path", fmt::format("'{}' is not the absolute path of a file", path), "",
            elsewhere);
    return;
  }
  const PathFacts* there = facts.target_probe.path(path);
  if (there == nullptr) return;
  if (!there->problem.empty()) {
    blocker("target-path", fmt::format("{} on {}: {}", path, host, there->problem), "", elsewhere);
    return;
  }
  const GuestDisk* guest_disk = facts.guest.disk(disk.disk);
  const bool direct =
      guest_disk != nullptr && (guest_disk->cache == "none" || guest_disk->cache == "directsync");

  if (there->kind == PathFacts::Kind::Block) {
    if (!disk.named) {
      blocker("target-device-not-named", fmt::format("{} is a block device on {}", path, host),
              "its content would be overwritten",
              fmt::format("if that is meant: --disk {}={}", disk.disk, path));
    }
    if (there->in_use) {
      blocker("target-device-in-use", fmt::format("{} on {} is in use", path, host),
              "it is mounted, or part of an array or volume group", elsewhere);
    }
    if (disk.target_format != "raw") {
      blocker("target-device-format",
              fmt::format("a {} image cannot be put on device {}", disk.target_format, path),
              "drover writes only raw disks to block devices", elsewhere);
    } else if (there->size < disk.virtual_size) {
      blocker("target-device-too-small",
              fmt::format("{} on {} has {}, the disk has {}", path, host,
                          format_length(there->size), format_length(disk.virtual_size)),
              "", elsewhere);
    }
    return;
  }
  if (there->exists) {
    const bool shared = there->kind == PathFacts::Kind::File && path == disk.source_path;
    blocker("target-file-exists", fmt::format("{} is there already on {}", path, host),
            "drover never overwrites a file",
            shared ? fmt::format("{}, or remove it there; if both hosts see the same storage, "
                                 "'virsh migrate' needs to copy nothing",
                                 elsewhere)
                   : fmt::format("remove it there, or {}", elsewhere));
    return;
  }
  if (!there->directory_exists) {
    const std::string directory = path.substr(0, std::max<std::size_t>(path.rfind('/'), 1));
    if (disk.source_block_device && path == disk.source_path) {
      blocker("target-device-missing", fmt::format("{} has no device {}", host, path), "",
              "create a volume there, or " + elsewhere);
    } else {
      blocker("target-directory-missing", fmt::format("{} has no directory {}", host, directory),
              "", fmt::format("'ssh {} mkdir -p {}', or {}", host, directory, elsewhere));
    }
    return;
  }
  if (path.starts_with("/dev/") && disk.source_block_device) {
    blocker("target-device-missing", fmt::format("{} has no device {}", host, path), "",
            "create a volume there, or " + elsewhere);
    return;
  }
  if (there->read_only_filesystem || !there->directory_writable) {
    blocker("target-directory-not-writable",
            fmt::format("{} on {} cannot be written to", path, host),
            there->read_only_filesystem ? "the filesystem is mounted read-only" : "", elsewhere);
    return;
  }
  if (!there->unreachable_for_qemu.empty()) {
    blocker(
        "target-unreachable-for-qemu",
        fmt::format("QEMU on {} may not enter {}", host, there->unreachable_for_qemu),
        fmt::format("it runs as user {}", facts.target_probe.qemu_user),
        fmt::format("'ssh {} chmod o+x {}', or {}", host, there->unreachable_for_qemu, elsewhere));
  }
  if (direct && !there->direct_io) {
    blocker("target-no-direct-io",
            fmt::format("the filesystem of {} on {} takes no O_DIRECT", path, host),
            "the guest's disk is set to cache='none', so QEMU could not open it", elsewhere);
  }
  Need& need = needs[there->filesystem];
  need.data += disk.allocation;
  need.whole += disk.virtual_size;
  need.free = there->free;
  if (need.path.empty()) need.path = path;
}

void examine_target_disks(const Facts& facts, Findings& out) {
  const std::string& host = facts.target.hostname;
  std::map<std::uint64_t, Need> needs;  // by filesystem
  std::map<std::string, std::string> paths;
  std::map<std::uint64_t, std::string> devices;
  for (const PlannedDisk& disk : facts.plan.disks) {
    const auto [other, fresh] = paths.emplace(disk.target_path, disk.disk);
    bool twice = !fresh;
    std::string first = other->second;
    if (const PathFacts* there = facts.target_probe.path(disk.target_path);
        there != nullptr && there->device != 0) {
      const auto [same, new_device] = devices.emplace(there->device, disk.disk);
      if (!new_device) {
        twice = true;
        first = same->second;
      }
    }
    if (twice) {
      out.blocker(
          "target-path-twice",
          fmt::format("disks {} and {} would both be {}", first, disk.disk, disk.target_path), "",
          "give them different paths with --disk", disk.disk);
      continue;
    }
    examine_target_disk(facts, disk, needs, out);
  }
  for (const auto& [filesystem, need] : needs) {
    if (need.free < need.data + kSpaceMargin) {
      out.blocker(
          "target-space",
          fmt::format("{} has {} free where {} goes; the data there need {} and {} to spare", host,
                      format_length(need.free), need.path, format_length(need.data),
                      format_length(kSpaceMargin)),
          "", "make room there, or choose other paths with --disk");
    } else if (need.free < need.whole) {
      out.warning("target-space-thin",
                  fmt::format("{} has {} free where {} goes; the disks there may grow to {}", host,
                              format_length(need.free), need.path, format_length(need.whole)),
                  "the filesystem can get full later", "");
    }
  }
}

}  // namespace

// ---- the plan -----------------------------------------------------------------------------------

MovePlan plan_move(const GuestInfo& guest, const PlanOptions& options) {
  MovePlan plan;
  std::map<std::string, std::string> places;
  for (const PlanOptions::Place& place : options.places) {
    if (!places.emplace(place.disk, place.path).second) plan.repeated_disks.push_back(place.disk);
    if (guest.disk(place.disk) == nullptr) plan.unknown_disks.push_back(place.disk);
  }
  for (const std::string& name : options.eject) {
    const GuestDisk* disk = guest.disk(name);
    if (disk == nullptr || !removable(*disk)) {
      plan.unknown_disks.push_back(name);
    } else {
      plan.eject.push_back(name);
    }
  }
  for (const GuestDisk& disk : guest.disks) {
    if (!image_on_this_host(disk) || contains(plan.eject, disk.target)) continue;
    const auto place = places.find(disk.target);
    const bool named = place != places.end();
    if (removable(disk) && !named) {
      plan.staying.push_back(disk.target);
      continue;
    }
    PlannedDisk planned;
    planned.disk = disk.target;
    planned.named = named;
    planned.source_path = disk.path;
    planned.source_format = disk.format;
    planned.source_node = disk.node;
    planned.source_block_device = disk.kind == DiskKind::Block;
    planned.source_plain =
        disk.format == "raw" && !disk.slice && !disk.encrypted && !disk.backing_chain;
    planned.target_path = named ? place->second : disk.path;
    planned.target_format = disk.format == "raw" ? "raw" : "qcow2";
    planned.mirror = !disk.readonly;
    planned.delete_source = disk.kind == DiskKind::File && !disk.readonly;
    planned.virtual_size = disk.virtual_size;
    planned.allocation = disk.allocation.bytes() == 0 && disk.kind == DiskKind::Block
                             ? disk.virtual_size
                             : std::min(disk.allocation, disk.virtual_size);
    planned.cluster_size = disk.cluster_size;
    plan.disks.push_back(std::move(planned));
  }
  return plan;
}

void settle_plan(MovePlan& plan, const ProbeAnswer& probe) {
  for (PlannedDisk& disk : plan.disks) {
    const PathFacts* there = probe.path(disk.target_path);
    disk.target_block_device = there != nullptr && there->kind == PathFacts::Kind::Block;
  }
}

Rewrite rewrite_of(const MovePlan& plan, bool live) {
  Rewrite rewrite;
  rewrite.live = live;
  rewrite.eject = plan.eject;
  for (const PlannedDisk& disk : plan.disks) {
    rewrite.disks.push_back(
        {disk.disk, disk.target_path, disk.target_format, disk.target_block_device});
  }
  return rewrite;
}

HostQuestion host_question(const GuestInfo& guest) {
  HostQuestion question;
  question.guest_name = guest.name;
  question.guest_uuid = guest.uuid;
  question.arch = guest.arch;
  question.domain_type = guest.domain_type;
  question.machine = guest.machine;
  question.emulator = guest.emulator;
  // What the host's own CPU is cannot be compared as a model.
  if (guest.cpu_mode != "host-passthrough" && guest.cpu_mode != "maximum") {
    question.cpu_xml = guest.cpu_xml;
  }
  question.networks = guest.networks;
  return question;
}

ProbeRequest probe_request(const GuestInfo& guest, const MovePlan& plan) {
  ProbeRequest request;
  const auto want = [&](const std::string& path) {
    if (!path.empty() && !contains(request.paths, path)) request.paths.push_back(path);
  };
  for (const PlannedDisk& disk : plan.disks) want(disk.target_path);
  for (const std::string& name : plan.staying) {
    if (const GuestDisk* disk = guest.disk(name)) want(disk->path);
  }
  want(guest.firmware_loader);
  want(guest.nvram_template);
  want(guest.firmware_nvram);
  for (const std::string& path : guest.boot_files) want(path);
  request.interfaces = guest.bridges;
  request.interfaces.insert(request.interfaces.end(), guest.interfaces.begin(),
                            guest.interfaces.end());
  if (guest.emulated_tpm) request.programs.emplace_back("swtpm");
  return request;
}

// ---- all of it ----------------------------------------------------------------------------------

namespace {
void examine_guest(const GuestInfo& guest, const MovePlan& plan, Findings& out) {
  examine_state(guest, out);
  for (const std::string& name : plan.unknown_disks) {
    std::vector<std::string> names;
    for (const GuestDisk& disk : guest.disks) names.push_back(disk.target);
    out.blocker(
        "disk-unknown", fmt::format("guest {} has no such disk: {}", guest.name, name),
        names.empty() ? "it has no disks" : fmt::format("it has {}", fmt::join(names, ", ")),
        fmt::format("'virsh domblklist {}' shows them", guest.name), name);
  }
  for (const std::string& name : plan.repeated_disks) {
    out.blocker("disk-named-twice", fmt::format("--disk names {} more than once", name), "", "",
                name);
  }
  for (const GuestDisk& disk : guest.disks) examine_disk(guest, disk, plan, out);
  for (const std::string& name : guest.inactive_only_disks) {
    out.blocker(
        "disk-not-attached",
        fmt::format("disk {} is in the definition of guest {} but not attached", name, guest.name),
        "it would be in the target's definition, and its image here",
        fmt::format("attach it, or 'virsh detach-disk --config {} {}'", guest.name, name), name);
  }
  examine_devices(guest, out);
}
}  // namespace

std::vector<Finding> examine_source(const GuestInfo& guest, const MovePlan& plan) {
  Findings out;
  examine_guest(guest, plan, out);
  return out.take();
}

std::vector<Finding> examine(const Facts& facts) {
  Findings out;
  examine_guest(facts.guest, facts.plan, out);
  examine_hosts(facts, out);
  examine_exports(facts, out);
  examine_target(facts, out);
  examine_needed_files(facts, out);
  examine_target_disks(facts, out);
  std::vector<Finding> all = out.take();
  // On one host everything is there already; only this matters.
  const auto same = std::find_if(
      all.begin(), all.end(), [](const Finding& finding) { return finding.rule == "same-host"; });
  if (same != all.end()) return {*same};
  return all;
}

bool blocked(const std::vector<Finding>& findings) {
  return std::any_of(findings.begin(), findings.end(),
                     [](const Finding& finding) { return finding.severity == Severity::Blocker; });
}

Error blocked_error(const std::vector<Finding>& findings) {
  Error error{Code::Blocked, {}, {}, false};
  std::size_t more = 0;
  for (const Finding& finding : findings) {
    if (finding.severity != Severity::Blocker) continue;
    if (!error.message.empty()) {
      ++more;
      continue;
    }
    error.message =
        finding.why.empty() ? finding.what : fmt::format("{}: {}", finding.what, finding.why);
    error.hint = finding.to_do;
  }
  if (more > 0) error.message += fmt::format(" (and {} more)", more);
  return error;
}

}  // namespace drover::memmig
