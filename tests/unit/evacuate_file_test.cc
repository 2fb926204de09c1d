// SPDX-License-Identifier: Apache-2.0
//
// One CD-ROM image or NVRAM file is taken off: real files, made-up guests. Whatever happens
// meanwhile, nothing is lost that somebody names.
#include "job/evacuate_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "job/noted_copy.h"
#include "tests/fakes/fake_guest_files.h"
#include "tests/fakes/job_samples.h"

namespace drover::job {
namespace {

namespace fs = std::filesystem;
using memmig::FileUse;
using ::testing::HasSubstr;
using Kind = FileUse::Kind;

class Silent final : public Observer {
 public:
  void started(const std::string& /*id*/) override {}
  void planned(const Plan& /*plan*/) override {}
  void progress(const Progress& /*progress*/) override {}
  void note(const std::string& /*text*/) override {}
};

class EvacuateFile : public ::testing::Test {
 protected:
  EvacuateFile() {
    std::string name = (fs::current_path() / "evacuate-file-XXXXXX").string();
    directory_ = ::mkdtemp(name.data());
    old_ = directory_ + "/old/x";
    fresh_ = directory_ + "/new/x";
    fs::create_directory(directory_ + "/old");
    fs::create_directory(directory_ + "/new");
    write(old_, "content");
    step_.target = fresh_;
    step_.directories = {directory_ + "/new"};
    step_.item.path = old_;
    step_.item.bytes = Length(7);
  }
  ~EvacuateFile() override { fs::remove_all(directory_); }

  static void write(const std::string& path, const std::string& text) {
    std::ofstream(path) << text;
  }
  static std::string read(const std::string& path) {
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }
  static FileUse use(Kind kind, const std::string& guest, const std::string& path) {
    return {.kind = kind,
            .guest = guest,
            .uuid = guest == "web1" ? testing::sample_plan().uuid : "uuid-of-" + guest,
            .disk = kind == Kind::Nvram ? "NVRAM" : "sda",
            .path = path};
  }
  void two_drives() {
    step_.item.kind = EvacuateKind::Medium;
    files_.list = {use(Kind::Medium, "web1", old_), use(Kind::Medium, "web2", old_)};
    step_.item.users = {{"web1", files_.list.front().uuid, "sda"}};
  }
  void nvram() {
    step_.item.kind = EvacuateKind::Nvram;
    files_.list = {use(Kind::Nvram, "web1", old_)};
    step_.item.users = {{"web1", files_.list.front().uuid, ""}};
  }
  // By an earlier run, which was killed then.
  void copied_before() {
    ASSERT_TRUE(copy_noted(old_, fresh_, {}, cancel_).has_value());
    if (!noted_on(fresh_)) GTEST_SKIP() << "only root may write such a note";
    step_.item.copy = EvacuateItem::Copy{0, fresh_};
  }
  Status run() { return evacuate_file(files_, jobs_, step_, silent_, cancel_); }
  void busy(const std::string& why) {
    const Status done = run();
    ASSERT_FALSE(done.has_value());
    EXPECT_EQ(done.error().code, Code::Busy);
    EXPECT_THAT(done.error().message, HasSubstr(why));
    EXPECT_TRUE(fs::exists(old_));
  }
  void nothing_was_changed() {
    EXPECT_EQ(files_.changed, 0U);
    EXPECT_FALSE(fs::exists(fresh_));
  }

  std::string directory_, old_, fresh_;
  memmig::testing::FakeGuestFiles files_;
  testing::TemporaryPlaces temporary_;
  JobStore jobs_{temporary_.places()};
  FileStep step_;
  Silent silent_;
  Cancel cancel_;
};

TEST_F(EvacuateFile, IsCopiedNamedAnewAndDeleted) {
  for (const bool medium : {true, false}) {
    write(old_, "content");
    fs::remove(fresh_);
    medium ? two_drives() : nvram();
    const Status done = run();
    ASSERT_TRUE(done.has_value()) << done.error().to_string();
    EXPECT_EQ(read(fresh_), "content");
    EXPECT_FALSE(fs::exists(old_));
    EXPECT_FALSE(noted_on(fresh_).has_value());
    for (const FileUse& one : files_.list) EXPECT_EQ(one.path, fresh_);
  }
}

TEST_F(EvacuateFile, ACopyThatWasFoundIsTaken) {
  two_drives();
  copied_before();
  ASSERT_TRUE(run().has_value());
  EXPECT_FALSE(fs::exists(old_));
}

TEST_F(EvacuateFile, ACopyOfWhatWasChangedSinceIsNotTaken) {
  for (const bool medium : {true, false}) {
    write(old_, "content");
    fs::remove(fresh_);
    medium ? two_drives() : nvram();
    copied_before();
    if (IsSkipped()) return;
    write(old_, "content of a guest that ran since");
    busy("is no copy of");
    EXPECT_EQ(files_.changed, 0U);
    EXPECT_EQ(read(old_), "content of a guest that ran since");
  }
}

TEST_F(EvacuateFile, AFileIsDeletedOnlyWhenItsCopyIsUsed) {
  step_.item.kind = EvacuateKind::Medium;  // all guests had changed over
  copied_before();
  if (IsSkipped()) return;
  files_.list = {use(Kind::Medium, "web1", directory_ + "/another")};
  busy("no guest uses");
  ASSERT_FALSE(fs::exists(fresh_)) << "nobody's copy goes";
  copied_before();
  files_.list = {use(Kind::Medium, "web1", fresh_)};
  ASSERT_TRUE(run().has_value());
  EXPECT_FALSE(fs::exists(old_));
  EXPECT_TRUE(fs::exists(fresh_));
}

TEST_F(EvacuateFile, WhatIsWrittenWhileDrivesAreChangedIsNotDeleted) {
  two_drives();
  files_.changes = [&] { write(old_, "content, and more of it"); };
  busy("was changed meanwhile");
  EXPECT_EQ(read(old_), "content, and more of it");
}

TEST_F(EvacuateFile, ASnapshotThatWasMadeMeanwhileKeepsIt) {
  for (const bool medium : {true, false}) {
    medium ? two_drives() : nvram();
    files_.list.back().remembered = "snapshots";
    busy("has snapshots");
    nothing_was_changed();
    // Of a guest that does not name it any more.
    medium ? two_drives() : nvram();
    files_.list.push_back(use(Kind::Remembered, "web3", old_));
    files_.list.back().remembered = "a saved state";
    busy("web3 has a saved state");
    nothing_was_changed();
  }
}

TEST_F(EvacuateFile, NvramThatCannotGoIsNamedAgainAndItsCopyIsDropped) {
  nvram();
  files_.changes = [&] {
    if (files_.changed == 1) files_.list.push_back(use(Kind::Nvram, "web2", old_));
  };
  busy("is still in use");
  EXPECT_EQ(files_.list.front().path, old_);
  EXPECT_FALSE(fs::exists(fresh_));
  EXPECT_EQ(read(old_), "content");
}

TEST_F(EvacuateFile, AGuestWithAJobAtWorkIsLeftAlone) {
  two_drives();
  auto job = jobs_.create(testing::sample_record());
  ASSERT_TRUE(job.has_value());
  busy("is at work already");
  nothing_was_changed();

  // One that nobody works on does not begin to meanwhile.
  const std::string id = (*job)->id();
  job->reset();
  files_.changes = [&] { EXPECT_EQ(jobs_.open(id).error().code, Code::Busy); };
  ASSERT_TRUE(run().has_value());
  EXPECT_EQ(files_.changed, 2U);
  EXPECT_TRUE(jobs_.open(id).has_value());
}

TEST_F(EvacuateFile, DisksAreMovedOnlyIfTheyAreTheFilesThatWereMeant) {
  EvacuateProblem problem;
  problem.items = {{.path = old_, .users = {{"web1", testing::sample_plan().uuid, "vda"}}}};
  const EvacuateStep step{.files = {{0, 0, fresh_}}};
  FileUse disk = use(Kind::Disk, "web1", old_);
  disk.disk = "vda";
  files_.list = {disk};
  EXPECT_TRUE(disks_are_there(files_, problem, step).has_value());
  write(fresh_, "another");
  FileUse other = disk;
  other.live = true;
  other.path = fresh_;
  for (const std::vector<FileUse>& list :
       {std::vector{disk, other}, {other, disk}, {other}, std::vector<FileUse>()}) {
    files_.list = list;
    const Status there = disks_are_there(files_, problem, step);
    ASSERT_FALSE(there.has_value());
    EXPECT_EQ(there.error().code, Code::Busy);
  }
}

}  // namespace
}  // namespace drover::job
