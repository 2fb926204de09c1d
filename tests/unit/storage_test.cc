// SPDX-License-Identifier: Apache-2.0
#include "memmig/storage.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace drover::memmig {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class FakeHost final : public StorageHost {
 public:
  std::vector<HostGuest> all;
  std::map<std::string, PoolFacts> pools;

  Result<std::vector<HostGuest>> guests() override { return all; }
  Result<PoolFacts> pool(const std::string& name) override {
    if (!pools.contains(name)) return fail(Code::NotFound, "Storage pool not found");
    return pools[name];
  }
  Result<std::vector<DiskIo>> disk_io() override { return std::vector<DiskIo>{}; }
};

// Files on two filesystems, /a and /b; /a/link leads to /b.
class StorageReportTest : public ::testing::Test {
 protected:
  StorageReportTest() {
    for (const char* directory : {"/a", "/a/images", "/b"}) {
      place(directory).kind = FilePlace::Kind::Directory;
    }
    places_["/a/link"] = places_["/b"];
  }

  FilePlace& place(const std::string& path, Length allocated = {}) {
    FilePlace place;
    place.kind = FilePlace::Kind::File;
    place.path = path;
    place.mount_point = path.substr(0, 2);
    place.filesystem = "device of " + place.mount_point;
    place.capacity = 100_GiB;
    place.free = 40_GiB;
    place.inode = places_.size();
    place.allocated = allocated;
    return places_[path] = place;
  }

  GuestDisk& add_disk(const std::string& guest, const std::string& target,
                      const std::string& path) {
    if (host_.all.empty() || host_.all.back().name != guest) {
      host_.all.push_back({guest, "uuid of " + guest, true, {}});
    }
    GuestDisk disk;
    disk.target = target;
    disk.path = path;
    disk.format = "qcow2";
    host_.all.back().disks.push_back(disk);
    return host_.all.back().disks.back();
  }

  Result<StorageReport> look(const std::vector<std::string>& names) {
    return look_at_storages(host_, names, [&](const std::string& asked) -> Result<FilePlace> {
      const std::string path =
          asked.size() > 1 && asked.ends_with('/') ? asked.substr(0, asked.size() - 1) : asked;
      const auto found = places_.find(path);
      if (found == places_.end()) return fail(Code::NotFound, "looking at " + path + ": not there");
      return found->second;
    });
  }

  Error refusal(const std::vector<std::string>& names) {
    const auto report = look(names);
    EXPECT_FALSE(report.has_value());
    return report ? Error{} : report.error();
  }

  std::string why_it_stays(const std::function<void(GuestDisk&)>& change) {
    place("/a/x.img", 1_GiB);
    host_.all.clear();
    change(add_disk("web1", "vda", "/a/x.img"));
    const auto report = look({"/a", "/b"});
    return report && report->disks.size() == 1 ? report->disks[0].stays : "no disk";
  }

  FakeHost host_;
  std::map<std::string, FilePlace> places_;
};

TEST_F(StorageReportTest, NamesTheStoragesAndTheDisksOnThem) {
  place("/a/images/web1.qcow2", 3_GiB);
  place("/b/db1.img", 5_GiB);
  place("/c/other.img");
  add_disk("db1", "vda", "/b/db1.img").format = "raw";
  add_disk("web1", "vda", "/a/images/web1.qcow2");
  add_disk("web1", "vdb", "/c/other.img");
  const auto report = look({"/a/images", "/b"});
  ASSERT_TRUE(report.has_value()) << report.error().message;
  ASSERT_EQ(report->storages.size(), 2U);
  EXPECT_EQ(report->storages[0].name, "/a/images");
  EXPECT_EQ(report->storages[0].mount_point, "/a");
  EXPECT_EQ(report->storages[0].capacity, 100_GiB);
  EXPECT_EQ(report->storages[0].used, 60_GiB);
  ASSERT_EQ(report->disks.size(), 2U);
  EXPECT_EQ(report->disks[0].guest, "db1");
  EXPECT_EQ(report->disks[0].uuid, "uuid of db1");
  EXPECT_EQ(report->disks[0].storage, 1U);
  EXPECT_EQ(report->disks[0].allocated, 5_GiB);
  EXPECT_EQ(report->disks[1].disk, "vda");
  EXPECT_EQ(report->disks[1].storage, 0U);
  EXPECT_TRUE(report->disks[1].running);
  EXPECT_EQ(report->disks[1].stays, "");
  EXPECT_THAT(report->notes, IsEmpty());
}

TEST_F(StorageReportTest, TwoDirectoriesOfOneFilesystemAreOneStorage) {
  const Error error = refusal({"/a", "/b", "/a/images"});
  EXPECT_EQ(error.code, Code::InvalidArgument);
  EXPECT_EQ(error.message, "/a and /a/images are one storage: both are on the filesystem at /a");
  EXPECT_EQ(refusal({"/b", "/a/link"}).message,
            "/b and /a/link are one storage: both are on the filesystem at /b");
}

TEST_F(StorageReportTest, APoolIsItsDirectory) {
  host_.pools["fast"] = {"dir", true, "/a/images"};
  const auto report = look({"fast", "/b"});
  ASSERT_TRUE(report.has_value()) << report.error().message;
  EXPECT_EQ(report->storages[0].pool, "fast");
  EXPECT_EQ(report->storages[0].directory, "/a/images");
  EXPECT_EQ(refusal({"/a", "fast"}).code, Code::InvalidArgument);
}

TEST_F(StorageReportTest, RefusesWhatIsNoStorage) {
  host_.pools["asleep"] = {"fs", false, "/a"};
  host_.pools["vg0"] = {"logical", true, "/dev/vg0"};
  place("/a/file");
  place("/ro").read_only = true;
  places_["/ro"].kind = FilePlace::Kind::Directory;
  EXPECT_EQ(refusal({"asleep", "/b"}).code, Code::Busy);
  EXPECT_THAT(refusal({"asleep", "/b"}).hint, HasSubstr("pool-start asleep"));
  EXPECT_EQ(refusal({"vg0", "/b"}).code, Code::Incompatible);
  EXPECT_EQ(refusal({"vg0", "/b"}).message,
            "storage pool vg0 is of type logical, not a directory of files");
  EXPECT_EQ(refusal({"nothing", "/b"}).code, Code::NotFound);
  EXPECT_EQ(refusal({"nothing", "/b"}).message, "there is no storage pool nothing");
  EXPECT_EQ(refusal({"/nothing", "/b"}).code, Code::NotFound);
  EXPECT_EQ(refusal({"/a/file", "/b"}).message, "/a/file is neither a directory nor a pool");
  EXPECT_THAT(refusal({"/ro", "/b"}).message, HasSubstr("mounted read-only"));
}

TEST_F(StorageReportTest, SaysWhyADiskStays) {
  EXPECT_EQ(why_it_stays([](GuestDisk&) {}), "");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.readonly = true; }), "it is read-only");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.shareable = true; }), "it is shareable");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.transient = true; }), "it is transient");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.slice = true; }),
            "only a part of its file is the disk");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.device = DiskDevice::Lun; }),
            "it is passed through");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.format = "vmdk"; }), "its format is vmdk");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.backing_chain = true; }),
            "it has a backing file");
  // Of a guest that is off only the image itself says so; a raw image may say anything.
  EXPECT_EQ(why_it_stays([&](GuestDisk&) { places_["/a/x.img"].names_backing = true; }),
            "it has a backing file");
  EXPECT_EQ(why_it_stays([&](GuestDisk& disk) {
              places_["/a/x.img"].names_backing = true;
              disk.format = "raw";
            }),
            "");
  // Media and what is no file are no disks to move.
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.device = DiskDevice::Cdrom; }), "no disk");
  EXPECT_EQ(why_it_stays([](GuestDisk& disk) { disk.kind = DiskKind::Block; }), "no disk");
}

TEST_F(StorageReportTest, AFileOfTwoDisksCountsOnceAndStays) {
  place("/a/x.img", 4_GiB);
  add_disk("db1", "vda", "/a/x.img");
  add_disk("web1", "vdb", "/a/x.img");
  const auto report = look({"/a", "/b"});
  ASSERT_TRUE(report.has_value());
  ASSERT_EQ(report->disks.size(), 2U);
  EXPECT_EQ(report->disks[0].stays, "web1:vdb is the same file");
  EXPECT_EQ(report->disks[1].stays, "db1:vda is the same file");
  EXPECT_EQ(report->disks[0].allocated + report->disks[1].allocated, 4_GiB);
}

TEST_F(StorageReportTest, NotesADiskThatIsMissing) {
  add_disk("web1", "vda", "/a/gone.img");
  add_disk("web1", "vdb", "/elsewhere/gone.img");
  const auto report = look({"/a", "/b"});
  ASSERT_TRUE(report.has_value());
  EXPECT_THAT(report->notes,
              ElementsAre("disk vda of guest web1: looking at /a/gone.img: not there"));
}

// ---- loads --------------------------------------------------------------------------------------

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(DiskLoads, AreWhatWasDoneInTheWindow) {
  const auto loads = loads_between({{"u", "vda", 100, 1000, seconds(1)}},
                                   {{"u", "vda", 300, 5000, seconds(2)}}, seconds(10));
  ASSERT_EQ(loads.size(), 1U);
  EXPECT_DOUBLE_EQ(loads[0].requests, 20);
  EXPECT_DOUBLE_EQ(loads[0].bytes, 400);
  EXPECT_EQ(loads[0].latency, milliseconds(5));
  EXPECT_EQ(loads[0].busy, milliseconds(100));
}

TEST(DiskLoads, OfAGuestThatStartedInBetweenCountFromItsStart) {
  const auto loads = loads_between(
      {{"old", "vda", 100, 0, seconds(1)}, {"u", "vda", 50, 0, seconds(1)}},
      {{"new", "vda", 10, 0, seconds(1)}, {"u", "vda", 5, 0, seconds(2)}}, seconds(10));
  ASSERT_EQ(loads.size(), 2U);
  EXPECT_DOUBLE_EQ(loads[0].requests, 1);
  EXPECT_DOUBLE_EQ(loads[1].requests, 0.5);
}

TEST(DiskLoads, OfAnIdleDiskAreZero) {
  const auto loads = loads_between({{"u", "vda", 5, 5, seconds(1)}},
                                   {{"u", "vda", 5, 5, seconds(1)}}, seconds(10));
  EXPECT_EQ(loads[0].latency, Duration{});
  EXPECT_EQ(loads[0].busy, Duration{});
}

// ---- filesystems --------------------------------------------------------------------------------

constexpr const char* kMounts =
    "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    "36 21 0:33 /sub /mnt/with\\040space rw - btrfs /dev/sdb rw,subvol=/sub\n"
    "37 21 0:40 / /tank/vm rw shared:5 master:2 - zfs tank/vm rw\n";

TEST(Mounts, AreFoundByTheirNumber) {
  EXPECT_EQ(find_mount(kMounts, 21).mount_point, "/");
  EXPECT_EQ(find_mount(kMounts, 36).mount_point, "/mnt/with space");
  EXPECT_EQ(find_mount(kMounts, 37).type, "zfs");
  EXPECT_EQ(find_mount(kMounts, 99).mount_point, "");
}

TEST(Mounts, OfOneFilesystemHaveOneKey) {
  EXPECT_EQ(filesystem_key(find_mount(kMounts, 21), 0x801), "device 8:1");
  // Each subvolume or dataset has a device number of its own; their space is the same.
  EXPECT_EQ(filesystem_key(find_mount(kMounts, 36), 1), filesystem_key(find_mount(kMounts, 36), 2));
  EXPECT_EQ(filesystem_key(find_mount(kMounts, 37), 1), "zfs tank");
}

TEST(Mounts, OfAPartAreNotWhole) {
  EXPECT_TRUE(is_whole({.root = "/", .type = "ext4", .source = "/dev/sdb1"}));
  EXPECT_TRUE(is_whole({.root = "/", .type = "zfs", .source = "tank"}));
  EXPECT_FALSE(is_whole({.root = "/sub", .type = "ext4", .source = "/dev/sdb1"}));
  EXPECT_FALSE(is_whole({.root = "/", .type = "zfs", .source = "tank/vm"}));
  EXPECT_FALSE(is_whole(find_mount("36 21 8:1 /@home /home rw - btrfs /dev/sdb1 rw\n", 36)));
}

class RealPlaces : public ::testing::Test {
 protected:
  RealPlaces() {
    std::string name = std::filesystem::temp_directory_path() / "drover-storage-XXXXXX";
    directory_ = ::mkdtemp(name.data());
  }
  ~RealPlaces() override { std::filesystem::remove_all(directory_); }

  std::string write(const std::string& name, const std::string& bytes) {
    std::ofstream(directory_ / name, std::ios::binary) << bytes;
    return directory_ / name;
  }
  std::filesystem::path directory_;
};

TEST_F(RealPlaces, AreDescribedByTheKernel) {
  const std::string path = write("disk.img", "x");
  std::filesystem::resize_file(path, (1_GiB).bytes());
  std::filesystem::create_symlink(path, directory_ / "link");
  const auto file = look_at_place(directory_ / "link");
  const auto directory = look_at_place(directory_);
  ASSERT_TRUE(file.has_value() && directory.has_value());
  EXPECT_EQ(file->kind, FilePlace::Kind::File);
  EXPECT_EQ(directory->kind, FilePlace::Kind::Directory);
  EXPECT_EQ(file->path, std::filesystem::canonical(path));
  EXPECT_EQ(file->filesystem, directory->filesystem);
  EXPECT_LT(file->allocated, 1_MiB) << "a hole takes no space";
  EXPECT_GT(file->capacity, Length());
  EXPECT_LE(file->free, file->capacity);
  EXPECT_NE(file->mount_point, "");
}

TEST_F(RealPlaces, KnowWhetherAQcow2ImageNamesABackingFile) {
  const std::string magic("QFI\xfb\0\0\0\3", 8);
  EXPECT_TRUE(
      look_at_place(write("over", magic + std::string("\0\0\0\0\0\0\1\0", 8)))->names_backing);
  EXPECT_FALSE(look_at_place(write("flat", magic + std::string(8, '\0')))->names_backing);
  EXPECT_FALSE(look_at_place(write("raw", std::string(16, 'x')))->names_backing);
  EXPECT_FALSE(look_at_place(write("short", "QFI"))->names_backing);
}

TEST_F(RealPlaces, ThatAreNotThereAreAnError) {
  const auto place = look_at_place(directory_ / "nothing");
  ASSERT_FALSE(place.has_value());
  EXPECT_EQ(place.error().code, Code::NotFound);
}

TEST(Pools, AreReadFromTheirDefinition) {
  const auto pool = parse_pool(
      "<pool type='dir'><name>fast</name><target><path>/srv/fast</path></target></pool>");
  ASSERT_TRUE(pool.has_value());
  EXPECT_EQ(pool->type, "dir");
  EXPECT_EQ(pool->path, "/srv/fast");
  EXPECT_FALSE(parse_pool("<domain/>").has_value());
  EXPECT_FALSE(parse_pool("").has_value());
}

TEST(StorageHosts, AreOnThisHost) {
  EXPECT_EQ(connect_storage_host("qemu+ssh://hostb/system").error().code, Code::InvalidArgument);
  EXPECT_EQ(connect_storage_host("qemu://hostb/system").error().code, Code::InvalidArgument);
}

}  // namespace
}  // namespace drover::memmig
