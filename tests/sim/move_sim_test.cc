// SPDX-License-Identifier: Apache-2.0
//
// A hundred thousand seeds of the simulation of a whole move, and the proof that it notices each
// rule that is switched off.
#include "tests/sim/move_sim.h"

#include <gtest/gtest.h>

#include <functional>
#include <ostream>
#include <string>

namespace drover::sim {
namespace {

// Split in parts so that ctest can spread them over the cores.
class MoveSimulation : public testing::TestWithParam<std::uint64_t> {};

TEST_P(MoveSimulation, KeepsEveryInvariantAndComesToAnEnd) {
  constexpr std::uint64_t kSeedsPerPart = 12500;
  const std::uint64_t first = 1 + GetParam() * kSeedsPerPart;
  MoveSimStats stats;
  for (std::uint64_t seed = first; seed < first + kSeedsPerPart; ++seed) {
    const auto violation = run_move_sim(seed, {}, &stats);
    ASSERT_FALSE(violation) << *violation << "\nreplay: build/tests/move_sim --seed " << seed
                            << " --trace";
  }
  // The simulation is worth something only if it gets everywhere.
  EXPECT_GT(stats.moved, kSeedsPerPart / 4);
  EXPECT_GT(stats.undone, kSeedsPerPart / 10);
  EXPECT_GT(stats.held, 10U);
  EXPECT_GT(stats.resumed, kSeedsPerPart / 40);
  EXPECT_GT(stats.kept, kSeedsPerPart / 200);
  EXPECT_GT(stats.faults, kSeedsPerPart / 2);
  EXPECT_GT(stats.guest_writes, kSeedsPerPart * 10);
}

INSTANTIATE_TEST_SUITE_P(Seeds, MoveSimulation, testing::Range<std::uint64_t>(0, 8));

TEST(MoveSimulation, ASeedRunsTheSameEachTime) {
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    MoveSimStats first;
    MoveSimStats second;
    (void)run_move_sim(seed, {}, &first);
    (void)run_move_sim(seed, {}, &second);
    ASSERT_EQ(first.steps, second.steps) << seed;
    ASSERT_EQ(first.guest_writes, second.guest_writes) << seed;
  }
}

struct Rule {
  std::string name;
  std::function<void(MoveSimOptions&)> switch_off;
  std::uint64_t first = 1;  // the search begins there, for what few seeds notice
};

// The test's name for ctest.
void PrintTo(const Rule& rule, std::ostream* out) { *out << rule.name; }

class SwitchedOffMoveRule : public testing::TestWithParam<Rule> {};

TEST_P(SwitchedOffMoveRule, IsNoticed) {
  MoveSimOptions options;
  GetParam().switch_off(options);
  constexpr std::uint64_t kEnough = 50000;
  const std::uint64_t first = GetParam().first;
  for (std::uint64_t seed = first; seed < first + kEnough; ++seed) {
    if (run_move_sim(seed, options) && !run_move_sim(seed, {})) {
      RecordProperty("noticed_at_seed", static_cast<int>(seed));
      return;
    }
  }
  FAIL() << "none of " << kEnough << " seeds noticed it";
}

INSTANTIATE_TEST_SUITE_P(
    Move, SwitchedOffMoveRule,
    testing::Values(Rule{"TheBarrierWaitsForWhatIsOnItsWay",
                         [](MoveSimOptions& o) { o.job.skip_drain = true; }},
                    Rule{"TheTargetRunsOnlyAfterTheBarrier",
                         [](MoveSimOptions& o) { o.job.skip_barrier = true; }},
                    Rule{"AMirrorThatEndedEarlyEndsTheHandover",
                         [](MoveSimOptions& o) { o.job.forget_lost_mirror = true; }},
                    Rule{"TheSourceIsGuardedBeforeTheTargetRuns",
                         [](MoveSimOptions& o) { o.job.no_guard = true; }},
                    Rule{"AfterAFailedMigrationBothHostsAreAsked",
                         [](MoveSimOptions& o) { o.job.blind_settle = true; }},
                    Rule{"WhatRanOnTheTargetIsNeverUndone",
                         [](MoveSimOptions& o) { o.job.forget_target_ran = true; }, 42'801},
                    Rule{"AnUndoneMoveLeavesTheGuestsAutostart",
                         [](MoveSimOptions& o) { o.job.forget_autostart = true; }},
                    Rule{"WhatTheSourceWroteWhileNobodyWatchedIsNotForgotten",
                         [](MoveSimOptions& o) { o.job.ignore_stamps = true; }},
                    Rule{"AResumeThatGotNoAnswerMayHaveHappened",
                         [](MoveSimOptions& o) { o.job.resume_once = true; }},
                    Rule{"TheTargetIsSeenRunningAndTheSourceGoneBeforeAnythingIsDeleted",
                         [](MoveSimOptions& o) { o.job.commit_unseen = true; }},
                    Rule{"CommittedIsJournaledBeforeAnythingIsDeleted",
                         [](MoveSimOptions& o) { o.job.delete_before_journal = true; }},
                    Rule{"WhatWasWrittenWithoutAMirrorIsCopied",
                         [](MoveSimOptions& o) { o.job.forget_missed = true; }},
                    Rule{"AfterARestartOfQemuTheJournalIsNotBelieved",
                         [](MoveSimOptions& o) { o.job.trust_records = true; }},
                    Rule{"NothingIsSentThatTheJournalDoesNotKnowOf",
                         [](MoveSimOptions& o) { o.job.send_unrecorded = true; }, 203'901},
                    Rule{"ATargetDoesNotRunWhenItsSourceWentOnAndEnded",
                         [](MoveSimOptions& o) { o.job.forget_went_on = true; }, 899'335},
                    Rule{"BesideADamagedJournalNothingIsKnown",
                         [](MoveSimOptions& o) { o.job.believe_empty_journal = true; }},
                    Rule{"WhatIsNotEmptyOnTheTargetIsCompared",
                         [](MoveSimOptions& o) { o.target.empty_map = true; }},
                    Rule{"WhatAnotherImageHasIsCompared",
                         [](MoveSimOptions& o) { o.target.unverified = true; }},
                    Rule{"WhatAnOfferDidNotFindIsSent",
                         [](MoveSimOptions& o) { o.arbiter.forget_not_found = true; }},
                    Rule{"WhatDiffersIsSent",
                         [](MoveSimOptions& o) { o.arbiter.same_though_different = true; }},
                    Rule{"WhatIsToBeVerifiedIsReadBackBeforeTheHandover",
                         [](MoveSimOptions& o) { o.job.skip_verify = true; }},
                    Rule{"WhatVerifyingNeverSawIsSentAgain",
                         [](MoveSimOptions& o) { o.arbiter.forget_unseen = true; }},
                    Rule{"AWriteWaitsInTheHandoverForAsLongAsTheUserSays",
                         [](MoveSimOptions& o) { o.job.forget_max_slowdown = true; }},
                    Rule{"AWriteDoesNotWaitForEver",
                         [](MoveSimOptions& o) { o.arbiter.wait_past_limit = true; }},
                    Rule{"AnUndoTakesTheMirrorsAway",
                         [](MoveSimOptions& o) { o.job.undo_keeps_mirrors = true; }},
                    Rule{"TheBarrierFlushes",
                         [](MoveSimOptions& o) { o.target.skip_flush = true; }},
                    Rule{"TheReceiverKeepsWhatIsToBeKept",
                         [](MoveSimOptions& o) { o.target.forget_keep = true; }},
                    Rule{"AFileOfSomebodyElsesIsNotOverwritten",
                         [](MoveSimOptions& o) { o.target.overwrite = true; }},
                    Rule{"AWriteWaitsForTheTargetInStrictModeOnly",
                         [](MoveSimOptions& o) { o.arbiter.wait_outside_strict = true; }},
                    Rule{"AWriteWaitsForTheReadOfItsChunk",
                         [](MoveSimOptions& o) { o.arbiter.forward_during_read = true; }}),
    [](const auto& rule) { return rule.param.name; });

}  // namespace
}  // namespace drover::sim
