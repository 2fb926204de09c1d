// SPDX-License-Identifier: Apache-2.0
#include "job/rebalance.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/fakes/fake_rebalance_world.h"

namespace drover::job {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using testing::FakeRebalanceWorld;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class Recorder final : public RebalanceObserver, public Observer {
 public:
  std::vector<std::string> log;

  void proposed(const RebalanceProposal& proposal, const std::string& why) override {
    log.push_back(
        fmt::format("plan of {}{}{}", proposal.moves.size(), why.empty() ? "" : ": ", why));
  }
  void begins(std::size_t number, const RebalanceMove& move) override {
    log.push_back(
        fmt::format("{} {}:{} {} > {}", number, move.guest, move.disk, move.source, move.target));
  }
  void ended(std::size_t number, const RebalanceMove& /*move*/, const Status& status) override {
    log.push_back(fmt::format("{} {}", number, status ? "done" : status.error().message));
  }
  Observer& of_move() override { return *this; }

  void started(const std::string& /*id*/) override {}
  void planned(const Plan& /*plan*/) override {}
  void progress(const Progress& /*progress*/) override {}
  void note(const std::string& /*text*/) override { ++notes; }
  int notes = 0;
};

class Rebalance : public ::testing::Test {
 protected:
  Rebalance() {
    FakeRebalanceWorld::fill_one(world_);
    options_.storages = {"/mnt/a", "/mnt/b", "/mnt/c"};
  }

  RebalanceProposal proposed() {
    Result<RebalanceProposal> proposal = propose_rebalance(options_, world_, cancel_);
    EXPECT_TRUE(proposal.has_value()) << proposal.error().message;
    return proposal ? *proposal : RebalanceProposal{};
  }
  Error refusal() {
    const Result<RebalanceProposal> proposal = propose_rebalance(options_, world_, cancel_);
    EXPECT_FALSE(proposal.has_value());
    return proposal ? Error{} : proposal.error();
  }
  RebalanceSummary carried_out() {
    Result<RebalanceSummary> summary = rebalance(options_, world_, recorder_, cancel_);
    EXPECT_TRUE(summary.has_value()) << summary.error().message;
    return summary ? *summary : RebalanceSummary{};
  }
  static std::vector<std::string> texts(const RebalanceProposal& proposal) {
    std::vector<std::string> out;
    for (const RebalanceMove& move : proposal.moves) {
      out.push_back(move.guest + ":" + move.disk + " > " + move.target);
    }
    return out;
  }

  FakeRebalanceWorld world_;
  RebalanceOptions options_;
  Recorder recorder_;
  Cancel cancel_;
};

// ---- proposing ----------------------------------------------------------------------------------

TEST_F(Rebalance, ProposesAndChangesNothing) {
  const RebalanceProposal proposal = proposed();
  EXPECT_THAT(texts(proposal), ElementsAre("web2:vda > /mnt/b", "web3:vda > /mnt/c"));
  EXPECT_EQ(proposal.moves[0].source, "/mnt/a");
  EXPECT_EQ(proposal.moves[0].directory, "/mnt/b");
  EXPECT_EQ(proposal.moves[0].uuid, "uuid-of-web2");
  EXPECT_EQ(proposal.moves[0].bytes, 20_GiB);
  EXPECT_TRUE(proposal.plan.reached);
  EXPECT_THAT(world_.log, IsEmpty());
}

TEST_F(Rebalance, WhatIsNoDiskOfAGuestCountsAsUsed) {
  world_.stores[1].other = 40_GiB;
  const RebalanceProposal proposal = proposed();
  EXPECT_EQ(proposal.problem.storages[1].other, 40_GiB);
  EXPECT_DOUBLE_EQ(proposal.plan.before[1], 0.7);
}

TEST_F(Rebalance, PinsAndKeepsApartByNameOrUuid) {
  options_.pins = {{"web2", "vda"}};
  options_.apart = {{"uuid-of-web3", "db1"}, {"web1", "web3"}};
  options_.tolerance = 0.3;
  const RebalanceProposal proposal = proposed();
  EXPECT_THAT(proposal.problem.apart,
              ElementsAre(ElementsAre("web3", "db1"), ElementsAre("web1", "web3")));
  EXPECT_EQ(proposal.problem.disks[3].fixed, "it is pinned");
  EXPECT_THAT(texts(proposal), ElementsAre("web3:vda > /mnt/c"));
}

TEST_F(Rebalance, RefusesWhoAndWhatIsNotThere) {
  options_.pins = {{"nobody", "vda"}};
  EXPECT_EQ(refusal().message, "no guest is named nobody");
  options_.pins = {{"web1", "vdz"}};
  EXPECT_EQ(refusal().message, "guest web1 has no disk vdz");
  EXPECT_EQ(refusal().code, Code::NotFound);
  options_.pins.clear();
  options_.apart = {{"web1", "nobody"}};
  EXPECT_EQ(refusal().message, "no guest is named nobody");
}

TEST_F(Rebalance, RefusesStoragesWithoutAnyDisk) {
  world_.disks.clear();
  EXPECT_EQ(refusal().code, Code::NotFound);
  EXPECT_EQ(refusal().message, "no disk of a guest is on any of these storages");
}

TEST_F(Rebalance, LeavesWhatCanNotBeMovedWhereItIs) {
  world_.disks[3].stays = "it has a backing file";
  options_.tolerance = 0.3;
  EXPECT_THAT(texts(proposed()), Not(Contains(HasSubstr("web2"))));
}

TEST_F(Rebalance, PlansAroundMovesThatCannotBegin) {
  world_.blocked["web2:vda"] = {Code::Blocked, "a backup runs on it", {}, false};
  options_.tolerance = 0.3;
  const RebalanceProposal proposal = proposed();
  EXPECT_THAT(texts(proposal), ElementsAre("web3:vda > /mnt/b"));
  EXPECT_THAT(proposal.report.notes,
              ElementsAre("disk vda of guest web2 stays where it is: a backup runs on it"));
}

TEST_F(Rebalance, ByIoGoesByTheTimeThatRequestsTake) {
  options_.by = RebalanceProblem::By::Io;
  options_.tolerance = 0.2;
  world_.disks[3].busy = 500;
  world_.disks[4].busy = 500;
  world_.disks[0].busy = 500;
  const RebalanceProposal proposal = proposed();
  EXPECT_THAT(texts(proposal), ElementsAre("web2:vda > /mnt/c"));
  EXPECT_EQ(proposal.loads.size(), world_.disks.size());
  EXPECT_EQ(proposal.problem.disks[3].load, 500U);
}

TEST_F(Rebalance, LeavesTheSpaceThatARelocationAsksFor) {
  world_.stores[1].capacity = 50_GiB;
  world_.disks[3].allocated = 20_GiB;  // just what is free on b, without the margin
  EXPECT_THAT(texts(proposed()), Not(Contains("web2:vda > /mnt/b")));
}

// ---- carrying out -------------------------------------------------------------------------------

TEST_F(Rebalance, CarriesOutWhatItProposed) {
  const std::vector<std::string> planned = texts(proposed());
  const RebalanceSummary summary = carried_out();
  EXPECT_EQ(world_.log, planned);
  EXPECT_THAT(recorder_.log, ElementsAre("plan of 2", "1 web2:vda /mnt/a > /mnt/b", "1 done",
                                         "2 web3:vda /mnt/a > /mnt/c", "2 done"));
  EXPECT_EQ(recorder_.notes, 2);
  EXPECT_TRUE(summary.reached);
  EXPECT_EQ(summary.moves, 2U);
  EXPECT_EQ(summary.bytes, 40_GiB);
  EXPECT_THAT(summary.last.plan.after, ElementsAre(0.5, 0.5, 0.5));
}

TEST_F(Rebalance, DoesNothingWhenAllIsEven) {
  options_.tolerance = 0.5;
  const RebalanceSummary summary = carried_out();
  EXPECT_TRUE(summary.reached);
  EXPECT_THAT(recorder_.log, ElementsAre("plan of 0"));
}

TEST_F(Rebalance, PlansAgainWhenTheRestWouldMakeThingsWorse) {
  bool first = true;
  world_.after_move = [&] {  // somebody else fills c
    if (first) world_.stores[2].other = 40_GiB;
    first = false;
  };
  options_.tolerance = 0.15;
  const RebalanceSummary summary = carried_out();
  EXPECT_THAT(world_.log, ElementsAre("web2:vda > /mnt/b"));
  EXPECT_EQ(recorder_.log.back(), "plan of 0: /mnt/c would be worse off than it is");
  EXPECT_TRUE(summary.reached);
}

TEST_F(Rebalance, PlansAgainWhenTheRestWouldNotBeEnough) {
  bool first = true;
  world_.after_move = [&] {  // and now a
    if (first) world_.stores[0].other = 25_GiB;
    first = false;
  };
  const RebalanceSummary summary = carried_out();
  EXPECT_THAT(recorder_.log, Contains(HasSubstr("the moves that are left would not be enough: ")));
  EXPECT_FALSE(summary.last.plan.obstacles.empty());
}

TEST_F(Rebalance, PlansAgainWhenADiskHasGone) {
  bool first = true;
  world_.after_move = [&] {
    if (first) world_.disks.pop_back();  // web3, the next to move
    first = false;
  };
  const RebalanceSummary summary = carried_out();
  EXPECT_THAT(recorder_.log, Contains(HasSubstr("web3:vda is on none of the storages any more")));
  EXPECT_EQ(summary.failed, 0U);
}

TEST_F(Rebalance, PlansAgainWhenSomebodyElseMovedADisk) {
  bool first = true;
  world_.after_move = [&] {
    if (first) world_.disks[4].storage = 1;
    first = false;
  };
  (void)carried_out();
  EXPECT_THAT(recorder_.log, Contains(HasSubstr("web3:vda is not on /mnt/a any more")));
}

TEST_F(Rebalance, GoesOnWithoutADiskThatCouldNotBeMoved) {
  world_.broken["web2:vda"] = {Code::Io, "read error", {}, false};
  options_.tolerance = 0.3;
  const RebalanceSummary summary = carried_out();
  EXPECT_THAT(world_.log, ElementsAre("web2:vda > /mnt/b", "web3:vda > /mnt/b"));
  EXPECT_THAT(recorder_.log, Contains(HasSubstr("web2:vda could not be moved")));
  EXPECT_EQ(summary.failed, 1U);
  EXPECT_EQ(summary.moves, 1U);
  EXPECT_TRUE(summary.reached);
}

TEST_F(Rebalance, EndsWithAnErrorThatNothingCanFollow) {
  for (const Code code : {Code::Cancelled, Code::Unreachable, Code::Denied, Code::Held}) {
    FakeRebalanceWorld::fill_one(world_);
    world_.log.clear();
    world_.broken["web2:vda"] = {code, "it", {}, false};
    const Result<RebalanceSummary> summary = rebalance(options_, world_, recorder_, cancel_);
    ASSERT_FALSE(summary.has_value());
    EXPECT_EQ(summary.error().code, code);
    EXPECT_EQ(world_.log.size(), 1U);
  }
}

TEST_F(Rebalance, StopsBetweenMovesWhenCancelled) {
  world_.after_move = [&] { cancel_.request(); };
  const Result<RebalanceSummary> summary = rebalance(options_, world_, recorder_, cancel_);
  ASSERT_FALSE(summary.has_value());
  EXPECT_EQ(summary.error().code, Code::Cancelled);
  EXPECT_EQ(world_.log.size(), 1U);
}

TEST_F(Rebalance, MakesNoMoreMovesThanAllowedAlsoOverSeveralPlans) {
  options_.most_moves = 1;
  const RebalanceSummary summary = carried_out();
  EXPECT_EQ(world_.log.size(), 1U);
  EXPECT_FALSE(summary.reached);
  EXPECT_FALSE(summary.last.plan.obstacles.empty());
}

TEST_F(Rebalance, DoesNotFollowARestlessWorldForEver) {
  world_.after_move = [&] {  // everything is thrown back each time
    for (auto& disk : world_.disks) disk.storage = 0;
    for (auto& store : world_.stores) store.capacity = 500_GiB;
  };
  (void)carried_out();
  EXPECT_LE(world_.log.size(), 2U * 2 + 8);
}

}  // namespace
}  // namespace drover::job
