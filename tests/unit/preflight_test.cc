// SPDX-License-Identifier: Apache-2.0
//
// Each rule of pre-flight: a move that would work is changed in one place, and exactly that is
// found.
#include "memmig/preflight.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

namespace drover::memmig {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

class Preflight : public testing::Test {
 protected:
  Preflight() {
    guest.name = "web1";
    guest.uuid = "00000000-0000-4000-8000-000000000001";
    guest.id = 3;
    guest.state = GuestState::Running;
    guest.persistent = true;
    guest.memory = 1_GiB;
    guest.vcpus = 2;
    guest.arch = "x86_64";
    guest.domain_type = "kvm";
    guest.machine = "pc-q35-7.2";
    guest.cpu_mode = "custom";
    guest.cpu_xml = "<cpu/>";
    GuestDisk raw;
    raw.target = "vda";
    raw.path = "/srv/web1-vda.raw";
    raw.format = "raw";
    raw.cache = "none";
    raw.node = "libvirt-2-format";
    raw.virtual_size = 10_GiB;
    raw.allocation = 2_GiB;
    GuestDisk qcow2 = raw;
    qcow2.target = "vdb";
    qcow2.path = "/srv/web1-vdb.qcow2";
    qcow2.format = "qcow2";
    qcow2.node = "libvirt-1-format";
    qcow2.cluster_size = 64_KiB;
    GuestDisk cdrom;
    cdrom.target = "sda";
    cdrom.kind = DiskKind::None;
    cdrom.device = DiskDevice::Cdrom;
    cdrom.readonly = true;
    guest.disks = {raw, qcow2, cdrom};

    source.uri = "qemu:///system";
    source.hostname = "hosta";
    source.host_uuid = "aaaa";
    source.libvirt_version = kNewLibvirt;
    source.hypervisor_version = kNewQemu;
    target = source;
    target.uri = "qemu+ssh://hostb/system";
    target.hostname = "hostb";
    target.host_uuid = "bbbb";
    target.free_memory = 8_GiB;
    target.cores = 4;
    target.cpu = CpuAnswer::Compatible;
    here.drover_version = there.drover_version = "1.0";
    here.host_id = "boot-a/1";
    there.host_id = "boot-b/1";
    there.qemu_user = "libvirt-qemu";
  }

  // The target answers for each path that is asked for: room for it, nothing there.
  void fill_probe() {
    for (const std::string& path : probe_request(guest, plan()).paths) {
      if (there.path(path) != nullptr) continue;
      PathFacts facts;
      facts.path = path;
      facts.directory_exists = facts.directory_writable = true;
      facts.free = 100_GiB;
      facts.filesystem = 1;
      there.paths.push_back(facts);
    }
  }
  PathFacts& at(const std::string& path) {
    fill_probe();
    for (PathFacts& facts : there.paths) {
      if (facts.path == path) return facts;
    }
    ADD_FAILURE() << path << " is not asked for";
    return there.paths.front();
  }
  MovePlan plan() const { return plan_move(guest, options); }
  GuestDisk& disk(std::size_t index) { return guest.disks.at(index); }

  std::vector<Finding> findings() {
    fill_probe();
    MovePlan settled = plan();
    settle_plan(settled, there);
    return examine({guest, source, here, target, there, settled});
  }
  void expect_only(const std::string& rule, Severity severity, const std::string& text,
                   const std::string& disk_name = "") {
    const std::vector<Finding> found = findings();
    ASSERT_EQ(found.size(), 1U) << [&] {
      std::string all;
      for (const Finding& finding : found) all += finding.rule + ": " + finding.what + "\n";
      return all;
    }();
    EXPECT_EQ(found[0].rule, rule);
    EXPECT_EQ(found[0].severity, severity);
    EXPECT_THAT(found[0].what, HasSubstr(text));
    EXPECT_EQ(found[0].disk, disk_name);
    EXPECT_EQ(blocked(found), severity == Severity::Blocker);
  }
  void expect_blocker(const std::string& rule, const std::string& text,
                      const std::string& disk_name = "") {
    expect_only(rule, Severity::Blocker, text, disk_name);
  }
  void expect_warning(const std::string& rule, const std::string& text,
                      const std::string& disk_name = "") {
    expect_only(rule, Severity::Warning, text, disk_name);
  }

  static constexpr std::uint64_t kNewLibvirt = 9000000;
  static constexpr std::uint64_t kNewQemu = 7002000;
  GuestInfo guest;
  HostFacts source;
  HostFacts target;
  ProbeAnswer here;
  ProbeAnswer there;
  PlanOptions options;
};

// ---- the plan -----------------------------------------------------------------------------------

TEST_F(Preflight, AMoveThatWorksHasNoFindings) { EXPECT_THAT(findings(), IsEmpty()); }

TEST_F(Preflight, PlanKeepsPathsAndFormats) {
  options.places = {{"vdb", "/fast/b.qcow2"}};
  const MovePlan made = plan();
  ASSERT_EQ(made.disks.size(), 2U);
  EXPECT_EQ(made.disks[0].target_path, "/srv/web1-vda.raw");
  EXPECT_FALSE(made.disks[0].named);
  EXPECT_TRUE(made.disks[0].source_plain);
  EXPECT_TRUE(made.disks[0].mirror && made.disks[0].delete_source);
  EXPECT_EQ(made.disks[1].target_path, "/fast/b.qcow2");
  EXPECT_TRUE(made.disks[1].named);
  EXPECT_FALSE(made.disks[1].source_plain);
  EXPECT_EQ(made.disks[1].target_format, "qcow2");
  EXPECT_EQ(made.disks[1].source_node, "libvirt-1-format");
  EXPECT_EQ(made.disks[1].cluster_size, 64_KiB);
  EXPECT_THAT(made.staying, IsEmpty());
}

TEST_F(Preflight, ReadOnlyDiskIsCopiedWithoutAMirrorAndItsSourceStays) {
  disk(0).readonly = true;
  const MovePlan made = plan();
  EXPECT_FALSE(made.disks[0].mirror);
  EXPECT_FALSE(made.disks[0].delete_source);
  EXPECT_THAT(findings(), IsEmpty());
}

TEST_F(Preflight, RawFileIsReadDirectlyOnlyIfItIsTheDisk) {
  for (bool GuestDisk::*what :
       {&GuestDisk::slice, &GuestDisk::backing_chain, &GuestDisk::encrypted}) {
    disk(0).*what = true;
    EXPECT_FALSE(plan().disks[0].source_plain);
    disk(0).*what = false;
  }
  EXPECT_TRUE(plan().disks[0].source_plain);
}

TEST_F(Preflight, UnknownAllocationOfADeviceCountsInFull) {
  disk(0).kind = DiskKind::Block;
  disk(0).allocation = Length(0);
  EXPECT_EQ(plan().disks[0].allocation, 10_GiB);
  EXPECT_FALSE(plan().disks[0].delete_source);
}

TEST_F(Preflight, RewriteFollowsThePlan) {
  options.places = {{"vda", "/dev/vg0/web1"}};
  PathFacts& device = at("/dev/vg0/web1");
  device.exists = true;
  device.kind = PathFacts::Kind::Block;
  device.size = 10_GiB;
  MovePlan settled = plan();
  settle_plan(settled, there);
  const Rewrite rewrite = rewrite_of(settled, true);
  ASSERT_EQ(rewrite.disks.size(), 2U);
  EXPECT_TRUE(rewrite.live && rewrite.disks[0].block_device && !rewrite.disks[1].block_device);
  EXPECT_EQ(rewrite.disks[0].path, "/dev/vg0/web1");
  EXPECT_THAT(findings(), IsEmpty());
}

TEST_F(Preflight, GuestWithoutDisksMoves) {
  guest.disks.clear();
  EXPECT_THAT(findings(), IsEmpty());
}

// ---- the guest ----------------------------------------------------------------------------------

TEST_F(Preflight, GuestThatIsNotRunning) {
  for (const GuestState state :
       {GuestState::ShutOff, GuestState::Crashed, GuestState::ShuttingDown, GuestState::Unknown}) {
    guest.state = state;
    expect_blocker("guest-not-running", std::string(state_name(state)));
  }
}
TEST_F(Preflight, GuestThatIsPaused) {
  guest.state = GuestState::Paused;
  expect_blocker("guest-paused", "web1");
}
TEST_F(Preflight, GuestThatSleeps) {
  guest.state = GuestState::PmSuspended;
  expect_blocker("guest-sleeping", "web1");
}
TEST_F(Preflight, JobRunning) {
  guest.other_job = true;
  expect_blocker("guest-job-running", "web1");
}
TEST_F(Preflight, BackupRunning) {
  guest.backup_job = true;
  expect_blocker("backup-running", "web1");
}
TEST_F(Preflight, BlockJobRunning) {
  disk(1).block_job = "commit";
  expect_blocker("block-job-running", "disk vdb of guest web1 has a commit job", "vdb");
}
TEST_F(Preflight, ForeignBlockJobRunning) {
  guest.foreign_jobs = {"stream job x"};
  expect_blocker("block-job-running", "stream job x");
}
TEST_F(Preflight, NbdServerInUse) {
  guest.nbd_exports = {"backup-vda"};
  expect_blocker("nbd-server-in-use", "backup-vda");
}
TEST_F(Preflight, QemuRefuses) {
  guest.migration_blockers = {"9p is mounted"};
  expect_blocker("qemu-refuses", "9p is mounted");
}
TEST_F(Preflight, Snapshots) {
  guest.snapshots = 2;
  expect_blocker("snapshots", "2 snapshot(s)");
}
TEST_F(Preflight, Checkpoints) {
  guest.checkpoints = 1;
  expect_blocker("checkpoints", "1 checkpoint(s)");
}
TEST_F(Preflight, Passthrough) {
  guest.host_devices = {"PCI 0000:3b:00.1"};
  expect_blocker("host-device", "3b:00.1");
}
TEST_F(Preflight, Vdpa) {
  guest.vdpa = {"network card 52:54:00:00:00:01"};
  expect_blocker("vdpa", "52:54:00:00:00:01");
}
TEST_F(Preflight, SharedDirectory) {
  guest.filesystems = {"share"};
  expect_blocker("shared-directory", "share");
}
TEST_F(Preflight, SharedMemory) {
  guest.shared_memory = {"ivsh"};
  expect_blocker("shared-memory", "ivsh");
}
TEST_F(Preflight, TpmOfTheHost) {
  guest.passthrough_tpm = {"/dev/tpm0"};
  expect_blocker("tpm-passthrough", "/dev/tpm0");
}
TEST_F(Preflight, EmulatedTpmNeedsItsProgram) {
  guest.emulated_tpm = true;
  EXPECT_THAT(probe_request(guest, plan()).programs, ElementsAre("swtpm"));
  EXPECT_THAT(findings(), IsEmpty());
  there.programs_missing = {"swtpm"};
  expect_blocker("program-missing", "swtpm");
}
TEST_F(Preflight, VhostUserCardIsWarnedOf) {
  guest.vhost_user = {"network card 52:54:00:00:00:01"};
  expect_warning("vhost-user", "52:54:00:00:00:01");
}
TEST_F(Preflight, CpuPassthroughIsWarnedOf) {
  guest.cpu_mode = "host-passthrough";
  target.cpu = CpuAnswer::Unknown;
  EXPECT_EQ(host_question(guest).cpu_xml, "");
  expect_warning("cpu-passthrough", "web1");
}

// ---- its disks ----------------------------------------------------------------------------------

TEST_F(Preflight, DiskThatDoesNotExist) {
  options.places = {{"vdz", "/x"}};
  expect_blocker("disk-unknown", "vdz", "vdz");
  EXPECT_THAT(findings()[0].why, HasSubstr("vda, vdb, sda"));
}
TEST_F(Preflight, DiskNamedTwice) {
  options.places = {{"vda", "/x"}, {"vda", "/y"}};
  expect_blocker("disk-named-twice", "vda", "vda");
}
TEST_F(Preflight, DisksThatAreNotHere) {
  struct Case {
    DiskKind kind;
    const char* rule;
  };
  for (const Case& c :
       {Case{DiskKind::Network, "disk-network"}, Case{DiskKind::Nvme, "disk-passthrough"},
        Case{DiskKind::Directory, "disk-directory"}, Case{DiskKind::VhostUser, "disk-vhost-user"},
        Case{DiskKind::VhostVdpa, "disk-vhost-vdpa"}, Case{DiskKind::Volume, "disk-pool"}}) {
    disk(0).kind = c.kind;
    expect_blocker(c.rule, "disk vda", "vda");
  }
}
TEST_F(Preflight, Lun) {
  disk(0).device = DiskDevice::Lun;
  expect_blocker("disk-passthrough", "SCSI LUN", "vda");
}
TEST_F(Preflight, ShareableDisk) {
  disk(0).shareable = true;
  expect_blocker("disk-shareable", "disk vda", "vda");
}
TEST_F(Preflight, TransientDisk) {
  disk(0).transient = true;
  expect_blocker("disk-transient", "disk vda", "vda");
}
TEST_F(Preflight, EncryptedDisk) {
  disk(1).encrypted = true;
  expect_blocker("disk-encrypted", "disk vdb", "vdb");
}
TEST_F(Preflight, DiskThatQemuDoesNotHave) {
  disk(1).node.clear();
  expect_blocker("disk-not-found", "disk vdb", "vdb");
}
TEST_F(Preflight, DiskThatIsOnlyInTheDefinition) {
  guest.inactive_only_disks = {"vdx"};
  expect_blocker("disk-not-attached", "vdx", "vdx");
}
TEST_F(Preflight, BackingChainIsWarnedOf) {
  disk(1).backing_chain = true;
  expect_warning("disk-backing-chain", "disk vdb", "vdb");
}
TEST_F(Preflight, OtherFormatsBecomeQcow2) {
  disk(1).format = "vmdk";
  EXPECT_EQ(plan().disks[1].target_format, "qcow2");
  expect_warning("disk-format", "vmdk", "vdb");
}

// ---- media --------------------------------------------------------------------------------------

class PreflightMedium : public Preflight {
 protected:
  PreflightMedium() {
    disk(2).kind = DiskKind::File;
    disk(2).path = "/iso/debian.iso";
    disk(2).format = "raw";
    disk(2).node = "libvirt-3-format";
    disk(2).virtual_size = 1_MiB;
  }
};

TEST_F(PreflightMedium, StaysIfTheTargetHasIt) {
  PathFacts& there_too = at("/iso/debian.iso");
  there_too.exists = true;
  there_too.kind = PathFacts::Kind::File;
  there_too.size = Length((1 << 20) - 100);  // QEMU counts in sectors
  EXPECT_THAT(plan().staying, ElementsAre("sda"));
  EXPECT_THAT(findings(), IsEmpty());
}
TEST_F(PreflightMedium, Missing) {
  expect_blocker("medium-missing", "/iso/debian.iso", "sda");
  EXPECT_THAT(findings()[0].to_do, HasSubstr("--eject sda"));
}
TEST_F(PreflightMedium, Another) {
  PathFacts& other = at("/iso/debian.iso");
  other.exists = true;
  other.kind = PathFacts::Kind::File;
  other.size = 2_MiB;
  expect_blocker("medium-differs", "2.0 MiB there", "sda");
}
TEST_F(PreflightMedium, Ejected) {
  options.eject = {"sda"};
  EXPECT_THAT(findings(), IsEmpty());
  EXPECT_THAT(rewrite_of(plan(), true).eject, ElementsAre("sda"));
}
TEST_F(PreflightMedium, CopiedIfNamed) {
  options.places = {{"sda", "/iso/debian.iso"}};
  const MovePlan made = plan();
  ASSERT_EQ(made.disks.size(), 3U);
  EXPECT_FALSE(made.disks[2].mirror);
  EXPECT_FALSE(made.disks[2].delete_source);  // others may use it
  EXPECT_THAT(findings(), IsEmpty());
}
TEST_F(PreflightMedium, OnlyDrivesCanBeEjected) {
  options.eject = {"vda"};
  fill_probe();
  at("/iso/debian.iso").exists = true;
  at("/iso/debian.iso").kind = PathFacts::Kind::File;
  at("/iso/debian.iso").size = 1_MiB;
  expect_blocker("disk-unknown", "vda", "vda");
}

// ---- hosts --------------------------------------------------------------------------------------

TEST_F(Preflight, SameHostByLibvirt) {
  target.hostname = "hosta";
  target.host_uuid = "aaaa";
  target.name_of_uuid = "web1";  // of course
  expect_blocker("same-host", "hosta");
}
TEST_F(Preflight, SameHostByTheProbe) {
  there.host_id = here.host_id;
  expect_blocker("same-host", "hostb");
}
TEST_F(Preflight, TwoHostsOfOneUuid) {
  target.host_uuid = "aaaa";
  expect_blocker("same-host-uuid", "aaaa");
}
TEST_F(Preflight, AnotherVersionOfDrover) {
  there.drover_version = "0.9";
  expect_blocker("drover-version", "hostb has drover 0.9, this host has 1.0");
}
TEST_F(Preflight, ImageThatOnlyQemuReadsWithAnIothread) {
  disk(1).iothread = true;
  source.hypervisor_version = 7002022;
  expect_blocker("export-with-iothread", "QEMU here is 7.2.22", "vdb");
}
TEST_F(Preflight, OldLibvirt) {
  target.libvirt_version = 7000000;
  expect_blocker("libvirt-too-old", "hostb has libvirt 7.0.0");
}
TEST_F(Preflight, OldQemu) {
  source.hypervisor_version = 5002000;
  expect_blocker("qemu-too-old", "hosta has QEMU 5.2.0");
}
TEST_F(Preflight, GuestIsThereAlready) {
  target.name_of_uuid = "web1";
  target.uuid_of_name = guest.uuid;
  target.existing_state = GuestState::ShutOff;
  expect_blocker("guest-exists", "web1 is on hostb already (as web1, shut off)");
}
TEST_F(Preflight, AnotherGuestOfThatName) {
  target.uuid_of_name = "other";
  expect_blocker("guest-exists", "another guest named web1");
}
TEST_F(Preflight, CpuIsMissing) {
  target.cpu = CpuAnswer::Incompatible;
  target.cpu_problem = "the CPU is incompatible with host CPU: missing features: avx512f";
  expect_blocker("cpu", "hostb");
  EXPECT_THAT(findings()[0].why, HasSubstr("avx512f"));
}
TEST_F(Preflight, CpuModelThatTheSourceHasNotEitherProvesNothing) {
  source.cpu = target.cpu = CpuAnswer::Incompatible;
  target.cpu_problem = "missing features: tsc-deadline";
  expect_warning("cpu-unknown", "neither host");
}
TEST_F(Preflight, CpuIsNotKnown) {
  target.cpu = CpuAnswer::Unknown;
  expect_warning("cpu-unknown", "hostb");
}
TEST_F(Preflight, MachineTypeIsMissing) {
  target.machine_supported = false;
  expect_blocker("machine-type", "pc-q35-7.2");
}
TEST_F(Preflight, NotEnoughMemory) {
  target.free_memory = 1_GiB + 127_MiB;
  expect_blocker("memory", "1.1 GiB");
  target.free_memory = 1_GiB + 128_MiB;
  EXPECT_THAT(findings(), IsEmpty());
}
TEST_F(Preflight, FewCores) {
  target.cores = 1;
  expect_warning("cores", "hostb has 1 CPUs");
}
TEST_F(Preflight, NetworkMissing) {
  target.networks_missing = {"lan"};
  expect_blocker("network-missing", "lan");
}
TEST_F(Preflight, NetworkInactive) {
  target.networks_inactive = {"lan"};
  expect_blocker("network-inactive", "lan");
}
TEST_F(Preflight, BridgeMissing) {
  guest.bridges = {"br0"};
  there.interfaces_missing = {"br0"};
  expect_blocker("bridge-missing", "br0");
}
TEST_F(Preflight, InterfaceMissing) {
  guest.interfaces = {"eno1"};
  EXPECT_THAT(probe_request(guest, plan()).interfaces, ElementsAre("eno1"));
  there.interfaces_missing = {"eno1"};
  expect_blocker("interface-missing", "eno1");
}

// ---- files on the target ------------------------------------------------------------------------

TEST_F(Preflight, FirmwareAndBootFilesMustBeThere) {
  guest.firmware_loader = "/usr/share/OVMF/CODE.fd";
  guest.boot_files = {"/boot/vmlinuz"};
  PathFacts& loader = at("/usr/share/OVMF/CODE.fd");
  loader.exists = true;
  loader.kind = PathFacts::Kind::File;
  expect_blocker("boot-file-missing", "/boot/vmlinuz");
  PathFacts& kernel = at("/boot/vmlinuz");
  kernel.exists = true;
  kernel.kind = PathFacts::Kind::File;
  EXPECT_THAT(findings(), IsEmpty());
  at("/usr/share/OVMF/CODE.fd").kind = PathFacts::Kind::Nothing;
  expect_blocker("firmware-missing", "CODE.fd");
}
TEST_F(Preflight, NvramMustNotBeThere) {
  guest.firmware_nvram = "/var/lib/libvirt/qemu/nvram/web1_VARS.fd";
  EXPECT_THAT(findings(), IsEmpty());
  at(guest.firmware_nvram).exists = true;
  expect_blocker("nvram-exists", "web1_VARS.fd");
}
TEST_F(Preflight, TargetFileExists) {
  at("/srv/web1-vda.raw").exists = true;
  at("/srv/web1-vda.raw").kind = PathFacts::Kind::File;
  expect_blocker("target-file-exists", "/srv/web1-vda.raw is there already on hostb", "vda");
  EXPECT_THAT(findings()[0].to_do, HasSubstr("--disk vda=PATH"));
}
TEST_F(Preflight, DirectoryMissing) {
  at("/srv/web1-vda.raw").directory_exists = false;
  expect_blocker("target-directory-missing", "no directory /srv", "vda");
}
TEST_F(Preflight, DirectoryNotWritable) {
  at("/srv/web1-vda.raw").directory_writable = false;
  expect_blocker("target-directory-not-writable", "/srv/web1-vda.raw", "vda");
}
TEST_F(Preflight, FilesystemReadOnly) {
  at("/srv/web1-vda.raw").read_only_filesystem = true;
  expect_blocker("target-directory-not-writable", "/srv/web1-vda.raw", "vda");
}
TEST_F(Preflight, DirectoryThatQemuMayNotEnter) {
  at("/srv/web1-vda.raw").unreachable_for_qemu = "/srv";
  expect_blocker("target-unreachable-for-qemu", "may not enter /srv", "vda");
}
TEST_F(Preflight, DirectIoIsNeededForCacheNone) {
  at("/srv/web1-vda.raw").direct_io = false;
  expect_blocker("target-no-direct-io", "/srv/web1-vda.raw", "vda");
  disk(0).cache = "writeback";
  EXPECT_THAT(findings(), IsEmpty());
}
TEST_F(Preflight, PathThatMakesNoSense) {
  for (const char* path : {"relative.raw", "", "/srv/"}) {
    options.places = {{"vda", path}};
    expect_blocker("target-path", "absolute path", "vda");
  }
}
TEST_F(Preflight, PathThatCannotBeLookedAt) {
  at("/srv/web1-vda.raw").problem = "Input/output error";
  expect_blocker("target-path", "Input/output error", "vda");
}
TEST_F(Preflight, SamePathTwice) {
  options.places = {{"vdb", "/srv/web1-vda.raw"}};
  expect_blocker("target-path-twice", "disks vda and vdb would both be /srv/web1-vda.raw", "vdb");
}
TEST_F(Preflight, SpaceIsCountedPerFilesystem) {
  at("/srv/web1-vda.raw").free = at("/srv/web1-vdb.qcow2").free = 4_GiB + 63_MiB;
  expect_blocker("target-space", "hostb has 4.1 GiB free");
  at("/srv/web1-vdb.qcow2").filesystem = 2;  // each fits where it goes
  for (const Finding& finding : findings()) EXPECT_EQ(finding.rule, "target-space-thin");
  EXPECT_EQ(findings().size(), 2U);
}
TEST_F(Preflight, ThinDisksThatMayOutgrowTheTargetAreWarnedOf) {
  at("/srv/web1-vda.raw").free = at("/srv/web1-vdb.qcow2").free = 19_GiB;
  expect_warning("target-space-thin", "may grow to 20.0 GiB");
}

class PreflightDevice : public Preflight {
 protected:
  PreflightDevice() { options.places = {{"vda", "/dev/vg0/web1"}}; }
  PathFacts& device() {
    PathFacts& facts = at("/dev/vg0/web1");
    facts.exists = true;
    facts.kind = PathFacts::Kind::Block;
    facts.size = 10_GiB;
    facts.device = 0xfd01;
    return facts;
  }
};

TEST_F(PreflightDevice, Works) {
  device();
  EXPECT_THAT(findings(), IsEmpty());
}
TEST_F(PreflightDevice, TooSmall) {
  device().size = 10_GiB - 1_MiB;
  expect_blocker("target-device-too-small", "the disk has 10.0 GiB", "vda");
}
TEST_F(PreflightDevice, InUse) {
  device().in_use = true;
  expect_blocker("target-device-in-use", "/dev/vg0/web1", "vda");
}
TEST_F(PreflightDevice, IsOverwrittenOnlyIfNamed) {
  disk(0).path = "/dev/vg0/web1";
  disk(0).kind = DiskKind::Block;
  options.places.clear();
  device();
  expect_blocker("target-device-not-named", "/dev/vg0/web1", "vda");
}
TEST_F(PreflightDevice, TakesOnlyRaw) {
  disk(0).format = "qcow2";
  device();
  expect_blocker("target-device-format", "qcow2", "vda");
}
TEST_F(PreflightDevice, Missing) {
  disk(0).path = "/dev/vg0/web1";
  disk(0).kind = DiskKind::Block;
  options.places.clear();
  at("/dev/vg0/web1").directory_exists = false;
  expect_blocker("target-device-missing", "/dev/vg0/web1", "vda");
  at("/dev/vg0/web1").directory_exists = true;
  expect_blocker("target-device-missing", "/dev/vg0/web1", "vda");
}
TEST_F(PreflightDevice, UnderTwoNames) {
  disk(1).format = "raw";
  options.places.push_back({"vdb", "/dev/dm-1"});
  device();
  PathFacts& same = at("/dev/dm-1");
  same.exists = true;
  same.kind = PathFacts::Kind::Block;
  same.size = 10_GiB;
  same.device = 0xfd01;
  expect_blocker("target-path-twice", "disks vda and vdb", "vdb");
}

// ---- together -----------------------------------------------------------------------------------

TEST_F(Preflight, BlockersComeFirst) {
  guest.snapshots = 1;
  guest.cpu_mode = "host-passthrough";
  target.networks_missing = {"lan"};
  target.cores = 1;
  const std::vector<Finding> found = findings();
  ASSERT_EQ(found.size(), 4U);
  EXPECT_EQ(found[0].rule, "snapshots");
  EXPECT_EQ(found[1].rule, "network-missing");
  EXPECT_EQ(found[2].severity, Severity::Warning);
  EXPECT_EQ(found[3].severity, Severity::Warning);
  const Error error = blocked_error(found);
  EXPECT_EQ(error.code, Code::Blocked);
  EXPECT_THAT(error.message, HasSubstr("1 snapshot(s)"));
  EXPECT_THAT(error.message, HasSubstr("(and 1 more)"));
  EXPECT_THAT(error.hint, HasSubstr("snapshot-delete"));
}

TEST_F(Preflight, SourceAloneAnswersEarly) {
  guest.state = GuestState::ShutOff;
  const std::vector<Finding> found = examine_source(guest, plan());
  ASSERT_EQ(found.size(), 1U);
  EXPECT_EQ(found[0].rule, "guest-not-running");
}

TEST_F(Preflight, EveryBlockerOfADiskSaysWhatToDo) {
  disk(0).shareable = disk(0).transient = true;
  disk(1).block_job = "backup";
  for (const Finding& finding : findings()) {
    EXPECT_FALSE(finding.what.empty());
    EXPECT_FALSE(finding.to_do.empty()) << finding.rule;
  }
}

}  // namespace
}  // namespace drover::memmig
