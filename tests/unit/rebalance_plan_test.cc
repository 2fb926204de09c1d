// SPDX-License-Identifier: Apache-2.0
//
// The rules that a rebalancing plan keeps, one by one and over many random worlds. How near plans
// are to the fewest bytes: rebalance_optimum_test.cc.
#include "job/rebalance_plan.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fakes/rebalance_worlds.h"

namespace drover::job {
namespace {

using By = RebalanceProblem::By;
using ::testing::ElementsAre;
using testing::expect_sound;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::random_world;

RebalanceProblem::Storage storage(const std::string& name, Length capacity, Length other = {}) {
  return {name, capacity, other, {}};
}

RebalanceProblem::Disk disk(const std::string& guest, std::size_t storage, Length allocated,
                            std::uint64_t load = 0) {
  return {guest, "vda", storage, allocated, load, {}};
}

RebalancePlan planned(const RebalanceProblem& problem) {
  Result<RebalancePlan> plan = plan_rebalance(problem);
  EXPECT_TRUE(plan.has_value()) << plan.error().message;
  if (!plan) return {};
  expect_sound(problem, *plan);
  return *plan;
}

std::vector<std::string> moves(const RebalanceProblem& problem, const RebalancePlan& plan) {
  std::vector<std::string> out;
  for (const RebalanceStep& step : plan.steps) {
    out.push_back(fmt::format("{}: {} > {}", problem.disks[step.disk].guest,
                              problem.storages[step.source].name,
                              problem.storages[step.target].name));
  }
  return out;
}

// One storage at 90 %, two at 30 %: the mean is 50 %.
RebalanceProblem one_full() {
  RebalanceProblem problem;
  problem.storages = {storage("a", 100_GiB), storage("b", 100_GiB), storage("c", 100_GiB)};
  problem.disks = {disk("web1", 0, 50_GiB), disk("web2", 0, 20_GiB), disk("web3", 0, 20_GiB),
                   disk("db1", 1, 30_GiB), disk("db2", 2, 30_GiB)};
  return problem;
}

TEST(RebalancePlan, EvensAFullStorageAndSaysWhy) {
  const RebalanceProblem problem = one_full();
  const RebalancePlan plan = planned(problem);
  EXPECT_THAT(moves(problem, plan), ElementsAre("web2: a > b", "web3: a > c"));
  EXPECT_TRUE(plan.needed);
  EXPECT_TRUE(plan.reached);
  EXPECT_TRUE(plan.proven);
  EXPECT_EQ(plan.bytes, 40_GiB);
  EXPECT_DOUBLE_EQ(plan.mean, 0.5);
  EXPECT_THAT(plan.before, ElementsAre(0.9, 0.3, 0.3));
  EXPECT_THAT(plan.after, ElementsAre(0.5, 0.5, 0.5));
  EXPECT_EQ(plan.steps[0].reason, "a is filled to 90.0 %, 40.0 points above the mean of 50.0 %");
  EXPECT_DOUBLE_EQ(plan.steps[1].source_before, 0.7);
  EXPECT_DOUBLE_EQ(plan.steps[1].source_after, 0.5);
  EXPECT_DOUBLE_EQ(plan.steps[1].target_after, 0.5);
  EXPECT_EQ(plan.steps[0].target_free, 50_GiB);
}

TEST(RebalancePlan, OfWhatIsEvenAlreadyIsEmpty) {
  RebalanceProblem problem = one_full();
  problem.tolerance = 0.41;
  const RebalancePlan plan = planned(problem);
  EXPECT_FALSE(plan.needed);
  EXPECT_TRUE(plan.reached);
  EXPECT_THAT(plan.steps, IsEmpty());
}

TEST(RebalancePlan, MovesNoPinnedDisk) {
  RebalanceProblem problem = one_full();
  problem.disks[1].fixed = "it is pinned";
  problem.tolerance = 0.2;
  // Else it would have been the one.
  const RebalancePlan plan = planned(problem);
  for (const RebalanceStep& step : plan.steps) EXPECT_NE(step.disk, 1U);
}

TEST(RebalancePlan, PutsNoDiskBesideOneItIsToBeApartFrom) {
  RebalanceProblem problem = one_full();
  problem.apart = {{"web2", "db1"}, {"web3", "db1"}};
  problem.tolerance = 0.2;
  const RebalancePlan plan = planned(problem);
  EXPECT_TRUE(plan.reached);
  EXPECT_THAT(moves(problem, plan), ElementsAre("web2: a > c"));
}

TEST(RebalancePlan, PartsThoseThatAreTogetherThoughTheyAreToBeApart) {
  RebalanceProblem problem = one_full();
  problem.tolerance = 0.41;
  problem.apart = {{"web1", "web2"}};
  const RebalancePlan plan = planned(problem);
  EXPECT_TRUE(plan.reached);
  EXPECT_EQ(plan.bytes, 20_GiB);
  ASSERT_EQ(plan.steps.size(), 1U);
  EXPECT_EQ(plan.steps[0].disk, 1U);
  EXPECT_EQ(plan.steps[0].reason, "web2 and web1, which are to be kept apart, are both on a");
}

TEST(RebalancePlan, SaysWhichGuestsItCannotPart) {
  RebalanceProblem problem = one_full();
  problem.tolerance = 0.41;
  problem.apart = {{"web1", "web2"}};
  problem.disks[0].fixed = problem.disks[1].fixed = "it is pinned";
  const RebalancePlan plan = planned(problem);
  EXPECT_FALSE(plan.reached);
  EXPECT_TRUE(plan.proven);
  EXPECT_THAT(
      plan.obstacles,
      ElementsAre("web1 and web2, which are to be kept apart, stay together on a: each has a "
                  "disk there that can't move",
                  HasSubstr("no arrangement")));
}

TEST(RebalancePlan, MakesNoMoreMovesThanAllowedAndSaysSo) {
  RebalanceProblem problem = one_full();
  problem.most_moves = 1;
  const RebalancePlan plan = planned(problem);
  EXPECT_EQ(plan.steps.size(), 1U);
  EXPECT_FALSE(plan.reached);
  ASSERT_FALSE(plan.obstacles.empty());
  EXPECT_EQ(plan.obstacles[0], "it takes more than the 1 move that are allowed");
}

// x helps most, but does not fit beside y, which has to leave b first.
TEST(RebalancePlan, CountsBothCopiesWhileADiskIsCopied) {
  RebalanceProblem problem;
  problem.by = By::Io;
  problem.tolerance = 0.01;
  problem.storages = {storage("a", 100_GiB), storage("b", 100_GiB), storage("c", 55_GiB)};
  problem.disks = {disk("w", 0, 10_GiB, 100), disk("x", 0, 60_GiB, 100), disk("y", 1, 50_GiB, 100)};
  problem.disks[0].fixed = "it is pinned";
  const RebalancePlan plan = planned(problem);
  EXPECT_THAT(moves(problem, plan), ElementsAre("y: b > c", "x: a > b"));
  EXPECT_EQ(plan.steps[1].target_free, 40_GiB);
}

// x and y can only change places by way of c, which may not keep either.
TEST(RebalancePlan, GoesByWayOfAThirdStorageWhenThereIsNoOtherRoom) {
  RebalanceProblem problem;
  problem.by = By::Io;
  problem.tolerance = 0.01;
  problem.storages = {storage("a", 100_GiB), storage("b", 100_GiB), storage("c", 100_GiB, 30_GiB)};
  problem.disks = {disk("x", 0, 60_GiB, 50), disk("x2", 0, 20_GiB, 70), disk("y", 1, 60_GiB, 30),
                   disk("y2", 1, 20_GiB, 50), disk("z", 2, 1_GiB, 100)};
  problem.disks[1].fixed = problem.disks[3].fixed = problem.disks[4].fixed = "it is pinned";
  const RebalancePlan plan = planned(problem);
  EXPECT_TRUE(plan.reached);
  ASSERT_EQ(plan.steps.size(), 3U);
  EXPECT_THAT(plan.steps[0].reason, HasSubstr("makes room only for a while: it goes on to"));
  EXPECT_EQ(plan.bytes, 180_GiB);
}

TEST(RebalancePlan, LeavesAloneWhatItCanOnlyMakeWorse) {
  RebalanceProblem problem;
  problem.storages = {storage("a", 100_GiB), storage("b", 100_GiB)};
  problem.disks = {disk("big", 0, 90_GiB)};
  const RebalancePlan plan = planned(problem);
  EXPECT_TRUE(plan.needed);
  EXPECT_FALSE(plan.reached);
  EXPECT_TRUE(plan.proven);
  EXPECT_THAT(plan.steps, IsEmpty());
  EXPECT_THAT(plan.obstacles[0], HasSubstr("a is filled to 90.0 %, 45.0 points above"));
}

TEST(RebalancePlan, ComesAsNearAsItCanWhenTheToleranceCannotBeReached) {
  RebalanceProblem problem = one_full();
  problem.disks[0].fixed = "it is pinned";
  problem.storages[0].other = 9_GiB;  // with web1 that is 59 % of a, which can't go below
  problem.tolerance = 0.01;
  const RebalancePlan plan = planned(problem);
  EXPECT_FALSE(plan.reached);
  EXPECT_EQ(plan.steps.size(), 2U);
  EXPECT_THAT(plan.obstacles[0],
              HasSubstr("its disks that can't move, and what is not a disk, take "
                        "more than that alone"));
}

TEST(RebalancePlan, BlamesWhatIsNoDisk) {
  RebalanceProblem problem;
  problem.storages = {storage("a", 100_GiB, 80_GiB), storage("b", 100_GiB)};
  const RebalancePlan plan = planned(problem);
  EXPECT_THAT(plan.obstacles[0],
              HasSubstr("what is not a disk of a guest takes more than that alone"));
}

TEST(RebalancePlan, ByIoMovesLoadAndCountsBytes) {
  RebalanceProblem problem;
  problem.by = By::Io;
  problem.storages = {storage("a", 100_GiB), storage("b", 100_GiB)};
  problem.disks = {disk("heavy", 0, 50_GiB, 500), disk("light", 0, 10_GiB, 500),
                   disk("idle", 1, 10_GiB, 0)};
  const RebalancePlan plan = planned(problem);
  EXPECT_THAT(moves(problem, plan), ElementsAre("light: a > b"));
  EXPECT_EQ(plan.steps[0].reason, "a carries 100.0 %, 50.0 points above the mean of 50.0 %");
}

TEST(RebalancePlan, ByIoOfIdleDisksIsEmpty) {
  RebalanceProblem problem = one_full();
  problem.by = By::Io;
  const RebalancePlan plan = planned(problem);
  EXPECT_THAT(plan.steps, IsEmpty());
}

TEST(RebalancePlan, FillsNoStorageBeyondWhatItMayHold) {
  RebalanceProblem problem = one_full();
  problem.tolerance = 0.2;
  problem.storages[1].fullest = 40_GiB;
  const RebalancePlan plan = planned(problem);
  EXPECT_THAT(moves(problem, plan), ElementsAre("web2: a > c"));
}

TEST(RebalancePlan, RefusesWhatMakesNoSense) {
  const auto refused = [](const auto& spoil) {
    RebalanceProblem problem = one_full();
    spoil(problem);
    const Result<RebalancePlan> plan = plan_rebalance(problem);
    return !plan && plan.error().code == Code::InvalidArgument;
  };
  EXPECT_TRUE(refused([](RebalanceProblem& p) { p.storages.resize(1); }));
  EXPECT_TRUE(refused([](RebalanceProblem& p) { p.disks[0].storage = 3; }));
  EXPECT_TRUE(refused([](RebalanceProblem& p) { p.storages[0].capacity = Length(); }));
  EXPECT_TRUE(refused([](RebalanceProblem& p) { p.storages[0].fullest = 101_GiB; }));
  EXPECT_TRUE(refused([](RebalanceProblem& p) { p.tolerance = -0.1; }));
  EXPECT_TRUE(refused([](RebalanceProblem& p) { p.disks[0].allocated = Length(~0ULL); }));
}

// ---- over many worlds ---------------------------------------------------------------------------

bool same(const RebalancePlan& a, const RebalancePlan& b) {
  return a.obstacles == b.obstacles && a.after == b.after &&
         std::equal(a.steps.begin(), a.steps.end(), b.steps.begin(), b.steps.end(),
                    [](const RebalanceStep& one, const RebalanceStep& other) {
                      return one.disk == other.disk && one.source == other.source &&
                             one.target == other.target && one.reason == other.reason;
                    });
}

void check_worlds(std::uint64_t count, const testing::WorldSize& size, bool exact) {
  for (std::uint64_t seed = 1; seed <= count; ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    RebalanceProblem problem = random_world(seed, size);
    if (!exact) problem.effort.exact = 0;
    const RebalancePlan plan = planned(problem);
    const Result<RebalancePlan> again = plan_rebalance(problem);
    ASSERT_TRUE(again.has_value());
    EXPECT_TRUE(same(plan, *again)) << "not deterministic";
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(RebalancePlanProperties, HoldInSmallWorlds) { check_worlds(10'000, {}, true); }

TEST(RebalancePlanProperties, HoldWithoutTheExactSearch) {
  check_worlds(3000, {.least_disks = 10, .most_disks = 25}, false);
}

TEST(RebalancePlanProperties, HoldInLargerWorlds) {
  check_worlds(
      200, {.least_storages = 3, .most_storages = 12, .least_disks = 20, .most_disks = 150}, true);
}

}  // namespace
}  // namespace drover::job
