// SPDX-License-Identifier: Apache-2.0
//
// Which disks a relocation takes where, and each rule of its pre-flight: one that would work is
// changed in one place, and exactly that is found.
#include "memmig/relocation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace drover::memmig {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class RelocationTest : public testing::Test {
 protected:
  RelocationTest() {
    guest.name = "web1";
    guest.id = 3;
    guest.state = GuestState::Running;
    GuestDisk raw;
    raw.target = "vda";
    raw.path = "/mnt/a/web1.raw";
    raw.format = "raw";
    raw.virtual_size = 10_GiB;
    raw.allocation = 2_GiB;
    GuestDisk qcow2 = raw;
    qcow2.target = "vdb";
    qcow2.path = "/mnt/a/web1.qcow2";
    qcow2.format = "qcow2";
    guest.disks = {raw, qcow2};
    wish.directory = "/mnt/b";
  }

  GuestDisk& vda() { return guest.disks[0]; }

  // Both filesystems have room; nothing is there.
  RelocationFacts facts(const RelocationPlan& plan) {
    places = {.runs = guest.id >= 0, .persistent = true};
    for (const GuestDisk& disk : guest.disks) {
      const bool differs = disk.target == defined_elsewhere;
      places.disks.push_back({.disk = disk.target,
                              .path = disk.path,
                              .persistent_path = differs ? "/mnt/z/other" : disk.path});
    }
    probe = {};
    for (const std::string& path : probe_request(plan).paths) {
      PathFacts one;
      one.path = path;
      one.directory_exists = one.directory_writable = true;
      one.free = free;
      one.filesystem = path.starts_with("/mnt/a/") ? 1 : 2;
      if (path.starts_with("/mnt/a/")) {
        one.exists = true;
        one.kind = PathFacts::Kind::File;
      }
      if (path == changed.path) {
        changed.filesystem = one.filesystem;
        one = changed;
      }
      probe.paths.push_back(one);
    }
    return {guest, places, probe, uses, same_file, linked};
  }

  // The rules, and then the warnings' with a tilde.
  std::vector<std::string> rules() {
    RelocationPlan plan = plan_relocation(guest, wish);
    const RelocationFacts found = facts(plan);
    settle_relocation(plan, found, wish.keep_source);
    last = plan;
    findings = examine_relocation(found, plan);
    std::vector<std::string> out;
    for (const Finding& finding : findings) {
      out.push_back((finding.severity == Severity::Warning ? "~" : "") + finding.rule);
    }
    return out;
  }

  // The path where vda goes, as the probe then sees it.
  PathFacts& target() {
    changed.path = "/mnt/b/web1.raw";
    changed.directory_exists = changed.directory_writable = true;
    changed.free = 100_GiB;
    return changed;
  }

  GuestInfo guest;
  RelocationWish wish;
  GuestPlaces places;
  ProbeAnswer probe;
  std::vector<ImageUse> uses;
  PathFacts changed;
  Length free = 100_GiB;
  std::string defined_elsewhere;
  std::set<std::string> same_file;
  std::set<std::string> linked;
  RelocationPlan last;
  std::vector<Finding> findings;
};

TEST_F(RelocationTest, TakesAllDisksToTheDirectoryUnderTheirNames) {
  EXPECT_THAT(rules(), IsEmpty());
  ASSERT_EQ(last.disks.size(), 2U);
  EXPECT_EQ(last.disks[0].target_path, "/mnt/b/web1.raw");
  EXPECT_EQ(last.disks[1].target_path, "/mnt/b/web1.qcow2");
  EXPECT_EQ(last.disks[1].target_format, "qcow2");
  EXPECT_TRUE(last.disks[0].delete_source);
  EXPECT_TRUE(last.renamed.empty()) << "it runs";
}

TEST_F(RelocationTest, AFilesNameFollowsItsFormat) {
  wish.format = "qcow2";
  vda().path = "/mnt/a/web1.img";
  EXPECT_THAT(rules(), ElementsAre("~disk-format"));
  EXPECT_EQ(last.disks[0].target_path, "/mnt/b/web1.qcow2");
  EXPECT_EQ(last.disks[1].target_path, "/mnt/b/web1-vdb.qcow2") << "each has its own";
}

TEST_F(RelocationTest, ADeviceGetsTheNameOfGuestAndDisk) {
  vda().kind = DiskKind::Block;
  vda().path = "/dev/vg0/web1";
  wish.disks = {"vda"};
  EXPECT_THAT(rules(), IsEmpty());
  EXPECT_EQ(last.disks[0].target_path, "/mnt/b/web1-vda.raw");
  EXPECT_FALSE(last.disks[0].delete_source) << "a device is never deleted";
}

TEST_F(RelocationTest, PlacesNameFilesOrDirectories) {
  wish.directory.clear();
  wish.places = {{"vda", {"/mnt/b/first.raw", false}}, {"vdb", {"/mnt/b/sub/", true}}};
  EXPECT_THAT(rules(), IsEmpty());
  EXPECT_EQ(last.disks[0].target_path, "/mnt/b/first.raw");
  EXPECT_EQ(last.disks[1].target_path, "/mnt/b/sub/web1.qcow2");
  wish.places.erase("vda");
  EXPECT_THAT(rules(), IsEmpty());
  EXPECT_EQ(last.disks.size(), 1U) << "only what has a place";
}

TEST_F(RelocationTest, WhatIsOffAndStaysOnItsFilesystemIsRenamed) {
  guest.id = -1;
  guest.state = GuestState::ShutOff;
  wish.directory = "/mnt/a/sub";
  changed.path = "/mnt/a/sub/web1.raw";
  changed.directory_exists = changed.directory_writable = true;
  rules();
  EXPECT_TRUE(last.renamed.contains("vda"));
  wish.keep_source = true;
  rules();
  EXPECT_TRUE(last.renamed.empty());
  wish.keep_source = false;
  vda().backing_chain = true;
  rules();
  EXPECT_FALSE(last.renamed.contains("vda")) << "its backing file may be named relative to it";
}

TEST_F(RelocationTest, WhatCannotGoStaysUnlessItIsNamed) {
  const auto with = [&](auto change) {
    GuestDisk before = vda();
    change(vda());
    const std::vector<std::string> all = rules();
    wish.disks = {"vda"};
    const std::vector<std::string> named = rules();
    wish.disks.clear();
    vda() = std::move(before);
    EXPECT_EQ(all.size(), 1U);
    EXPECT_EQ(named.size(), 1U);
    EXPECT_EQ("~" + named.at(0), all.at(0));
    return named.at(0);
  };
  EXPECT_EQ(with([](GuestDisk& disk) { disk.kind = DiskKind::Network; }), "disk-network");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.kind = DiskKind::Directory; }), "disk-directory");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.kind = DiskKind::Nvme; }), "disk-passthrough");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.kind = DiskKind::VhostUser; }), "disk-vhost-user");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.kind = DiskKind::VhostVdpa; }), "disk-vhost-vdpa");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.kind = DiskKind::Volume; }), "disk-pool");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.device = DiskDevice::Cdrom; }), "disk-cdrom");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.device = DiskDevice::Floppy; }), "disk-floppy");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.device = DiskDevice::Lun; }), "disk-passthrough");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.shareable = true; }), "disk-shareable");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.readonly = true; }), "disk-readonly");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.transient = true; }), "disk-transient");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.encrypted = true; }), "disk-encrypted");
  EXPECT_EQ(with([](GuestDisk& disk) { disk.slice = true; }), "disk-slice");
}

TEST_F(RelocationTest, NothingToDoIsSaid) {
  guest.disks.clear();
  EXPECT_THAT(rules(), ElementsAre("no-disks"));
}

TEST_F(RelocationTest, AnUnknownDiskIsNamedWithThoseThatThereAre) {
  wish.disks = {"vdz"};
  EXPECT_THAT(rules(), ElementsAre("disk-unknown"));
  EXPECT_THAT(findings[0].why, HasSubstr("vda, vdb"));
  guest.inactive_only_disks = {"vdz"};
  EXPECT_THAT(rules(), ElementsAre("disk-not-attached"));
}

TEST_F(RelocationTest, WhatIsThereAlreadyStays) {
  same_file = {"vda"};
  EXPECT_THAT(rules(), ElementsAre("~same-place"));
  EXPECT_EQ(last.disks.size(), 1U);
  same_file = {"vda", "vdb"};
  EXPECT_THAT(rules(), ElementsAre("same-place", "same-place"));
  same_file = {"vda"};
  wish.disks = {"vda"};
  EXPECT_THAT(rules(), ElementsAre("same-place"));
}

TEST_F(RelocationTest, TheGuestsStateAndJobs) {
  const auto with = [&](auto change) {
    const GuestInfo before = guest;
    change(guest);
    const std::vector<std::string> found = rules();
    guest = before;
    EXPECT_EQ(found.size(), 1U);
    return found.at(0);
  };
  EXPECT_EQ(with([](GuestInfo& g) { g.state = GuestState::ShuttingDown; }), "guest-state");
  EXPECT_EQ(with([](GuestInfo& g) { g.other_job = true; }), "guest-job-running");
  EXPECT_EQ(with([](GuestInfo& g) { g.backup_job = true; }), "backup-running");
  EXPECT_EQ(with([](GuestInfo& g) { g.foreign_jobs = {"mirror job x"}; }), "block-job-running");
  EXPECT_EQ(with([](GuestInfo& g) { g.disks[0].block_job = "commit"; }), "block-job-running");
  EXPECT_EQ(with([](GuestInfo& g) { g.snapshots = 1; }), "snapshots");
  EXPECT_EQ(with([](GuestInfo& g) { g.checkpoints = 1; }), "checkpoints");
  EXPECT_EQ(with([](GuestInfo& g) { g.managed_save = true; }), "managed-save");
  EXPECT_EQ(with([](GuestInfo& g) { g.disks[0].virtual_size = Length(); }), "disk-unreadable");
  EXPECT_EQ(with([](GuestInfo& g) { g.disks[0].backing_chain = true; }), "~disk-backing-chain");
}

TEST_F(RelocationTest, DefinitionsThatDifferCannotBothBeChanged) {
  defined_elsewhere = "vdb";
  EXPECT_THAT(rules(), ElementsAre("definitions-differ"));
}

TEST_F(RelocationTest, TheTarget) {
  const auto with = [&](auto change) {
    target() = {};
    change(target());
    const std::vector<std::string> found = rules();
    EXPECT_FALSE(found.empty());
    return found.empty() ? "" : found.at(0);
  };
  EXPECT_EQ(with([](PathFacts& path) { path.exists = true; }), "target-file-exists");
  EXPECT_EQ(with([](PathFacts& path) { path.directory_exists = false; }),
            "target-directory-missing");
  EXPECT_EQ(with([](PathFacts& path) { path.directory_writable = false; }),
            "target-directory-not-writable");
  EXPECT_EQ(with([](PathFacts& path) { path.read_only_filesystem = true; }),
            "target-directory-not-writable");
  EXPECT_EQ(with([](PathFacts& path) { path.unreachable_for_qemu = "/mnt/b"; }),
            "target-unreachable-for-qemu");
  EXPECT_EQ(with([](PathFacts& path) { path.problem = "too many links"; }), "target-path");
  vda().cache = "none";
  EXPECT_EQ(with([](PathFacts& path) { path.direct_io = false; }), "target-no-direct-io");
}

TEST_F(RelocationTest, SpaceIsCountedByFilesystemAndNotForWhatIsRenamed) {
  free = 4_GiB;  // two disks with 2 GiB each
  EXPECT_THAT(rules(), ElementsAre("target-space"));
  free = 5_GiB;
  EXPECT_THAT(rules(), ElementsAre("~target-space-thin"));
}

TEST_F(RelocationTest, ADeviceAsTarget) {
  wish.directory.clear();
  wish.places = {{"vda", {"/dev/vg0/new", false}}};
  changed.path = "/dev/vg0/new";
  changed.exists = changed.directory_exists = changed.directory_writable = true;
  changed.kind = PathFacts::Kind::Block;
  changed.size = 10_GiB;
  EXPECT_THAT(rules(), IsEmpty());
  EXPECT_TRUE(last.disks[0].target_block_device);
  changed.size = 9_GiB;
  EXPECT_THAT(rules(), ElementsAre("target-device-too-small"));
  changed.size = 11_GiB;
  EXPECT_THAT(rules(), ElementsAre("~target-device-larger"));
  changed.size = 10_GiB;
  changed.in_use = true;
  EXPECT_THAT(rules(), ElementsAre("target-device-in-use"));
  changed.in_use = false;
  wish.format = "qcow2";
  EXPECT_THAT(rules(), ElementsAre("target-device-format", "~disk-format"));
}

TEST_F(RelocationTest, NoTwoDisksInOnePlaceAndNoneInAnothersPlace) {
  wish.directory.clear();
  wish.places = {{"vda", {"/mnt/b/x", false}}, {"vdb", {"/mnt/b/x", false}}};
  EXPECT_THAT(rules(), ElementsAre("target-path-twice"));
  wish.places.erase("vdb");
  uses = {{.path = "/mnt/b/x", .guest = "web2", .disk = "vda"}};
  EXPECT_THAT(rules(), ElementsAre("target-in-use"));
  EXPECT_THAT(findings[0].what, HasSubstr("disk vda of guest web2"));
}

TEST_F(RelocationTest, WhatALinkPointsToIsNotDeleted) {
  linked = {"vda"};
  EXPECT_THAT(rules(), ElementsAre("~source-link"));
  EXPECT_FALSE(last.disks[0].delete_source);
}

TEST_F(RelocationTest, AnotherUserOfAnImageIsFoundUnderAnyName) {
  const auto same = [](const std::string& a, const std::string& b) {
    return a == b || (a == "/alias" && b == "/mnt/a/web1.raw");
  };
  const auto user = [&](const ImageUse& use) {
    return other_user({use}, "/mnt/a/web1.raw", "web1", "vda", same);
  };
  EXPECT_EQ(user({.path = "/mnt/a/web1.raw", .guest = "web1", .disk = "vda"}), "");
  EXPECT_EQ(user({.path = "/mnt/a/other.raw", .guest = "web2", .disk = "vda"}), "");
  EXPECT_EQ(user({.path = "/alias", .guest = "web2", .disk = "vda"}), "disk vda of guest web2");
  EXPECT_EQ(user({.path = "/mnt/a/web1.raw", .guest = "web1", .disk = "vdb", .backing = true}),
            "disk vdb of guest web1");
  EXPECT_EQ(user({.path = "/mnt/a/web1.raw", .volume = "clone of pool p", .backing = true}),
            "volume clone of pool p");
}

}  // namespace
}  // namespace drover::memmig
