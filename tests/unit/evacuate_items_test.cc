// SPDX-License-Identifier: Apache-2.0
//
// Which files are on a storage, and which of them may go.
#include "job/evacuate_items.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

namespace drover::job {
namespace {

using memmig::FilePlace;
using memmig::FileUse;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Kind = FileUse::Kind;

FilePlace place(const std::string& path, std::uint64_t inode) {
  return {.kind = FilePlace::Kind::File,
          .path = path,
          .filesystem = path.starts_with("/mnt/a") ? "a" : "b",
          .device = 1,
          .inode = inode,
          .allocated = 1_GiB};
}

class EvacuateItems : public ::testing::Test {
 protected:
  static memmig::Storage storage(const std::string& directory) {
    memmig::Storage out;
    out.directory = directory;
    out.mount_point = "/mnt/a";
    out.filesystem = "a";
    return out;
  }
  FileUse& add(Kind kind, const std::string& guest, const std::string& disk,
               const std::string& path, std::uint64_t inode = 1) {
    FileUse use{
        .kind = kind, .guest = guest, .uuid = "uuid-of-" + guest, .disk = disk, .path = path};
    add_use(used_, scope_, place(path, inode), std::move(use));
    return used_.at({1, inode}).uses.back();
  }
  std::optional<EvacuateItem> item(std::uint64_t inode = 1) {
    return evacuate_item(
        used_.at({1, inode}), used_, scope_,
        [&](const std::string& path) { return links_.contains(path); }, notes_);
  }
  std::string stays(std::uint64_t inode = 1) { return item(inode).value().stays; }

  Scope scope_{storage("/mnt/a")};
  UsedFiles used_;
  std::set<std::string> links_;
  std::vector<std::string> notes_;
};

TEST_F(EvacuateItems, AStorageIsAFilesystemOrADirectoryOfIt) {
  EXPECT_TRUE(scope_.has(place("/mnt/a/x", 1)));
  EXPECT_TRUE(scope_.has(place("/mnt/a/sub/x", 1)));
  EXPECT_FALSE(scope_.has(place("/mnt/b/x", 1)));
  const Scope part(storage("/mnt/a/sub"));
  EXPECT_TRUE(part.has(place("/mnt/a/sub/x", 1)));
  EXPECT_TRUE(part.has(place("/mnt/a/sub", 1)));
  EXPECT_FALSE(part.has(place("/mnt/a/subway/x", 1)));
  EXPECT_FALSE(part.has(place("/mnt/a/x", 1)));
}

TEST_F(EvacuateItems, AMountOfAPartIsADirectory) {
  memmig::Storage bound = storage("/mnt/a");
  bound.whole_mount = false;
  EXPECT_TRUE(Scope(bound).has(place("/mnt/a/x", 1)));
  FilePlace elsewhere = place("/whole/other/x", 1);
  elsewhere.filesystem = "a";
  EXPECT_TRUE(scope_.has(elsewhere));
  EXPECT_FALSE(Scope(bound).has(elsewhere));
}

TEST_F(EvacuateItems, AFileThatIsNamedByAnotherMountStays) {
  add(Kind::Disk, "web1", "vda", "/whole/sub/x");
  const EvacuateItem item = named_elsewhere(used_.begin()->second, "/mnt/a/x");
  EXPECT_EQ(item.path, "/mnt/a/x");
  EXPECT_EQ(item.stays, "it is disk vda of guest web1, which names it as /whole/sub/x");
}

TEST_F(EvacuateItems, ANameThatIsGoneIsWhereItsDirectoryIs) {
  const Scope part(storage("/mnt/a/sub"), [](const std::string& path) -> Result<FilePlace> {
    if (path == "/link/") return place("/mnt/a/sub", 9);
    if (path == "/mnt/a/") return place("/mnt/a", 8);
    return fail(Code::NotFound, "no");
  });
  EXPECT_TRUE(part.has_name("/link/x"));
  EXPECT_FALSE(part.has_name("/mnt/a/x"));
  EXPECT_FALSE(part.has_name("/nowhere/x"));
}

TEST_F(EvacuateItems, OfTwoNamesThatOnTheStorageCounts) {
  const Scope part(storage("/mnt/a/sub"));
  for (const bool first : {true, false}) {
    UsedFiles used;
    for (const bool in : {first, !first}) {
      add_use(used, part, place(in ? "/mnt/a/sub/x" : "/mnt/a/x", 1), {});
    }
    EXPECT_EQ(used.begin()->second.place.path, "/mnt/a/sub/x");
    EXPECT_EQ(used.begin()->second.uses.size(), 2U);
  }
}

TEST_F(EvacuateItems, DisksMediaAndNvramMayGo) {
  add(Kind::Disk, "web1", "vda", "/mnt/a/web1.raw");
  add(Kind::Medium, "web1", "sda", "/mnt/a/x.iso", 2);
  add(Kind::Medium, "web2", "sda", "/mnt/a/x.iso", 2);
  add(Kind::Nvram, "web1", "NVRAM", "/mnt/a/v.fd", 3);
  EXPECT_EQ(stays(1), "");
  EXPECT_EQ(stays(2), "");
  EXPECT_EQ(item(2)->users.size(), 2U);
  EXPECT_EQ(stays(3), "");
  EXPECT_EQ(item(3)->users.front().disk, "");
}

TEST_F(EvacuateItems, WhatIsUsedInTwoWaysStays) {
  add(Kind::Disk, "web1", "vda", "/mnt/a/x");
  add(Kind::Medium, "web2", "sda", "/mnt/a/x");
  EXPECT_EQ(stays(), "it is used as disk vda of guest web1 and as drive sda of guest web2");
}

TEST_F(EvacuateItems, ASharedDiskStays) {
  add(Kind::Disk, "web1", "vda", "/mnt/a/x");
  add(Kind::Disk, "web2", "vdb", "/mnt/a/x");
  EXPECT_THAT(stays(), HasSubstr("are the same file"));
}

TEST_F(EvacuateItems, ADiskThatIsOnlyInTheDefinitionOfARunningGuestStays) {
  add(Kind::Disk, "web1", "vda", "/mnt/a/x").running = true;
  EXPECT_THAT(stays(), HasSubstr("but not attached"));
  FileUse& live = add(Kind::Disk, "web1", "vda", "/mnt/a/x");
  live.running = live.live = true;
  EXPECT_EQ(stays(), "");
}

TEST_F(EvacuateItems, WhatIsNamedByALinkStays) {
  links_ = {"/mnt/a/link"};
  for (const Kind kind : {Kind::Disk, Kind::Medium, Kind::Nvram}) {
    used_.clear();
    add(kind, "web1", "x", "/mnt/a/link");
    EXPECT_EQ(stays(), "guest web1 names it by a symbolic link, /mnt/a/link");
  }
}

TEST_F(EvacuateItems, WhatARememberedStateNamesStays) {
  add(Kind::Medium, "web1", "sda", "/mnt/a/x").remembered = "snapshots";
  EXPECT_THAT(stays(), HasSubstr("has snapshots"));
  // That of a guest whose definition does not name it any more.
  for (const Kind kind : {Kind::Disk, Kind::Medium, Kind::Nvram}) {
    used_.clear();
    add(kind, "web1", "x", "/mnt/a/x");
    add(Kind::Remembered, "web2", "snapshot s1", "/mnt/a/x");
    EXPECT_EQ(stays(), "the snapshot s1 of guest web2 names it");
  }
  used_.clear();
  add(Kind::Remembered, "web2", "snapshot s1", "/mnt/a/x");
  EXPECT_EQ(stays(), "the snapshot s1 of guest web2 names it");
  used_.clear();
  add(Kind::Disk, "web1", "vda", "/mnt/a/x");
  add(Kind::Remembered, "web1", "snapshot s1", "/mnt/a/x");
  EXPECT_EQ(stays(), "") << "relocation says what there is to do";
}

TEST_F(EvacuateItems, NvramThatIsInUseOrSharedStays) {
  add(Kind::Nvram, "web1", "NVRAM", "/mnt/a/v").running = true;
  EXPECT_THAT(stays(), HasSubstr("runs with it"));
  used_.clear();
  add(Kind::Nvram, "web1", "NVRAM", "/mnt/a/v");
  add(Kind::Nvram, "web2", "NVRAM", "/mnt/a/v");
  EXPECT_THAT(stays(), HasSubstr("both have it"));
}

TEST_F(EvacuateItems, AFloppyAndAllElseStay) {
  add(Kind::Floppy, "web1", "fda", "/mnt/a/f");
  EXPECT_THAT(stays(), HasSubstr("is a floppy"));
  add(Kind::Other, "web1", "kernel", "/mnt/a/k", 2);
  EXPECT_EQ(stays(2), "it is the kernel of guest web1: drover does not move that");
}

TEST_F(EvacuateItems, WhatIsBelowADiskIsLeftAloneIfTheDiskGoes) {
  add(Kind::Backing, "web1", "vda", "/mnt/a/base", 2);
  EXPECT_THAT(stays(2), HasSubstr("which is on another storage"));
  add(Kind::Disk, "web1", "vda", "/mnt/a/top");
  EXPECT_FALSE(item(2).has_value());
  EXPECT_THAT(notes_, ElementsAre(HasSubstr("it is left alone")));
  EXPECT_EQ(item(1)->bytes, 2_GiB) << "its copy has the content of both";
}

}  // namespace
}  // namespace drover::job
