// SPDX-License-Identifier: Apache-2.0
//
// The driver of emptying a storage, in a world that only exists as a list of files.
#include "job/evacuate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/fakes/fake_evacuate_world.h"

namespace drover::job {
namespace {

using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using testing::FakeEvacuateWorld;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

class Recorder final : public EvacuateObserver {
 public:
  void resumes(const EvacuateSurvey::Job& job) override { said.push_back("resumes " + job.id); }
  void resumed(const EvacuateSurvey::Job& job, const Status& status) override {
    said.push_back((status ? "resumed " : "not resumed ") + job.id);
  }
  void planned(const EvacuateProposal& proposal) override {
    said.push_back("planned");
    plan = proposal.plan;
  }
  void begins(const EvacuateProposal& /*proposal*/, std::size_t step) override {
    begun.push_back(step);
  }
  void ended(const EvacuateProposal& /*proposal*/, std::size_t step,
             const Status& status) override {
    if (!status) failed.push_back(step);
  }
  void progress(const Progress& progress) override { progresses.push_back(progress); }
  void note(const std::string& text) override { said.push_back(text); }

  std::vector<std::string> said;
  EvacuatePlan plan;
  std::vector<std::size_t> begun;
  std::vector<std::size_t> failed;
  std::vector<Progress> progresses;
};

class Evacuate : public ::testing::Test {
 protected:
  Evacuate() { FakeEvacuateWorld::fill(world_); }
  Result<EvacuateSummary> run() { return evacuate(options_, world_, observer_, cancel_); }
  // The reasons why files stay, by path.
  static std::map<std::string, std::string> left(const EvacuateSummary& summary) {
    std::map<std::string, std::string> out;
    for (const auto& one : summary.left) out[one.item.path] = one.why;
    return out;
  }

  EvacuateOptions options_{.from = "/mnt/a", .to = {"/mnt/b", "/mnt/c"}};
  FakeEvacuateWorld world_;
  Recorder observer_;
  Cancel cancel_;
};

TEST_F(Evacuate, EmptiesTheStorage) {
  const auto summary = run();
  ASSERT_TRUE(summary.has_value()) << summary.error().to_string();
  EXPECT_TRUE(summary->empty());
  EXPECT_EQ(summary->steps, 6U);
  EXPECT_EQ(summary->failed, 0U);
  EXPECT_EQ(summary->bytes, 101_GiB + 1_MiB);
  EXPECT_THAT(summary->others, ElementsAre("/mnt/a/notes.txt"));
  EXPECT_THAT(world_.log, UnorderedElementsAre("db1.raw > /mnt/b", "web1.raw > /mnt/b",
                                               "web2.raw > /mnt/c", "web3.raw > /mnt/b",
                                               "debian.iso > /mnt/c", "web3_VARS.fd > /mnt/c"));
  EXPECT_EQ(observer_.begun.front(), 0U) << "the largest first";
}

TEST_F(Evacuate, RunsNoMoreAtOnceThanItMayAndNoGuestTwice) {
  for (unsigned parallel = 1; parallel <= 4; ++parallel) {
    FakeEvacuateWorld world;
    FakeEvacuateWorld::fill(world);
    options_.parallel = parallel;
    const auto summary = evacuate(options_, world, observer_, cancel_);
    ASSERT_TRUE(summary.has_value());
    EXPECT_LE(world.most_at_once, parallel);
    EXPECT_FALSE(world.guest_twice);
  }
}

TEST_F(Evacuate, FillsAllPlacesAndWaitsForTheGuestsOfASharedImage) {
  options_.parallel = 5;
  world_.stuck = {"/mnt/a/db1.raw", "/mnt/a/web1.raw", "/mnt/a/web2.raw"};
  std::thread user([&] {
    // Those three, the fourth disk, and then its guest's NVRAM: of the ISO's guests two are busy.
    world_.wait_for_begun(5);
    cancel_.request();
  });
  const auto summary = run();
  user.join();
  ASSERT_FALSE(summary.has_value());
  EXPECT_THAT(observer_.begun, ElementsAre(0, 1, 2, 3, 5));
  EXPECT_FALSE(world_.guest_twice);
}

TEST_F(Evacuate, TheLimitIsOnFilesWhicheverGuestsTheyAreOf) {
  for (const char* disk : {"vdb", "vdc", "vdd"}) {
    EvacuateItem item =
        FakeEvacuateWorld::file(EvacuateKind::Disk, std::string("db1-") + disk, 1_GiB, {"db1"});
    item.users.front().disk = disk;
    world_.items.push_back(item);
  }
  options_.parallel = 3;
  options_.bandwidth = Length(300);
  ASSERT_TRUE(run().has_value());
  EXPECT_EQ(world_.most_files, 3U);
  EXPECT_THAT(world_.bandwidths, Contains(Length(300))) << "one with four disks gets all";
  EXPECT_THAT(world_.bandwidths, Contains(Length(100)));
}

TEST_F(Evacuate, TheBandwidthIsSharedByThoseThatRunAtOnce) {
  options_.bandwidth = Length(100);
  options_.parallel = 4;
  ASSERT_TRUE(run().has_value());
  EXPECT_THAT(world_.bandwidths, Each(Length(25)));
}

TEST_F(Evacuate, ACancelUndoesWhatRunsAndBeginsNothingMore) {
  world_.stuck = {"/mnt/a/db1.raw", "/mnt/a/web1.raw"};
  std::thread user([&] {
    world_.wait_for_running(2);
    cancel_.request();
  });
  const auto summary = run();
  user.join();
  ASSERT_FALSE(summary.has_value());
  EXPECT_EQ(summary.error().code, Code::Cancelled);
  EXPECT_THAT(summary.error().hint, HasSubstr("the same command again"));
  EXPECT_THAT(world_.log, IsEmpty());
  EXPECT_THAT(observer_.failed, UnorderedElementsAre(0, 1));

  // And then that.
  world_.stuck.clear();
  Cancel again;
  const auto rest = evacuate(options_, world_, observer_, again);
  ASSERT_TRUE(rest.has_value());
  EXPECT_TRUE(rest->empty());
  EXPECT_THAT(world_.log, SizeIs(6));
}

TEST_F(Evacuate, OneThatFailsStaysAndTheRestGoesOn) {
  world_.broken["/mnt/a/web1.raw"] = {Code::Io, "the disk is broken", "buy another", false};
  const auto summary = run();
  ASSERT_TRUE(summary.has_value());
  EXPECT_EQ(summary->steps, 5U);
  EXPECT_EQ(summary->failed, 1U);
  EXPECT_THAT(left(*summary),
              ElementsAre(std::pair("/mnt/a/web1.raw", "the disk is broken (buy another)")));
}

TEST_F(Evacuate, WhatCannotBeginIsAnObstacleBeforeAnythingIsDone) {
  world_.blocked["/mnt/a/web2.raw"] = {Code::Blocked, "guest web2 has 1 snapshot(s)", "", false};
  world_.items.back().stays = "guest web3 runs with it";
  const auto summary = run();
  ASSERT_TRUE(summary.has_value());
  EXPECT_EQ(observer_.plan.obstacles.size(), 2U);
  EXPECT_EQ(summary->failed, 0U);
  EXPECT_THAT(left(*summary),
              ElementsAre(std::pair("/mnt/a/web2.raw", "guest web2 has 1 snapshot(s)"),
                          std::pair("/mnt/a/web3_VARS.fd", "guest web3 runs with it")));
}

TEST_F(Evacuate, WhenThereIsNotRoomForAllNothingIsBegun) {
  world_.targets[0].free = 60_GiB;
  const auto summary = run();
  ASSERT_FALSE(summary.has_value());
  EXPECT_EQ(summary.error().code, Code::NoSpace);
  EXPECT_EQ(summary.error().message,
            "there is not room for all that is on /mnt/a; nothing was changed");
  EXPECT_THAT(observer_.begun, IsEmpty());
  EXPECT_FALSE(observer_.plan.obstacles.empty());
}

TEST_F(Evacuate, InterruptedRelocationsComeFirst) {
  world_.jobs = {{"web1-1", "web1", "uuid-of-web1", false},
                 {"web2-1", "web2", "uuid-of-web2", false}};
  world_.broken["web2-1"] = {Code::Io, "no", "", false};
  const auto summary = run();
  ASSERT_TRUE(summary.has_value());
  EXPECT_EQ(summary->resumed, 1U);
  EXPECT_EQ(summary->failed, 1U);
  EXPECT_THAT(world_.log, Contains("resume web1-1"));
  EXPECT_EQ(observer_.said.back(), "planned") << "only then";
  EXPECT_THAT(world_.log, ::testing::Not(Contains(HasSubstr("web1.raw"))));
}

TEST_F(Evacuate, AJobThatIsAtWorkIsLeftAlone) {
  world_.jobs = {{"web1-1", "web1", "uuid-of-web1", true}};
  const auto summary = run();
  ASSERT_TRUE(summary.has_value());
  EXPECT_THAT(
      left(*summary),
      ElementsAre(std::pair("/mnt/a/debian.iso",
                            "job web1-1 is at work on guest web1: "
                            "'drover watch web1-1' follows it"),
                  std::pair("/mnt/a/web1.raw",
                            "job web1-1 is at work on it: 'drover watch web1-1' follows it")));
}

TEST_F(Evacuate, TwoDoNotEmptyOneStorage) {
  world_.claimed = true;
  EXPECT_EQ(run().error().code, Code::Busy);
  EXPECT_THAT(world_.log, IsEmpty());
  EXPECT_TRUE(propose_evacuation(options_, world_, cancel_).has_value()) << "a dry run may look";
}

TEST_F(Evacuate, ADryRunChangesNothing) {
  const auto proposal = propose_evacuation(options_, world_, cancel_);
  ASSERT_TRUE(proposal.has_value());
  EXPECT_EQ(proposal->plan.steps.size(), 6U);
  EXPECT_THAT(world_.log, IsEmpty());
}

TEST_F(Evacuate, ProgressIsOfAllTogetherAndNeverMoreThanAll) {
  ASSERT_TRUE(run().has_value());
  ASSERT_FALSE(observer_.progresses.empty());
  for (const Progress& progress : observer_.progresses) {
    EXPECT_EQ(progress.data, observer_.plan.bytes);
    EXPECT_LE(progress.copied, progress.data);
    EXPECT_FALSE(progress.disks.empty());
  }
  EXPECT_THAT(observer_.progresses.front().disks.front().disk, HasSubstr(":vda"));
}

}  // namespace
}  // namespace drover::job
