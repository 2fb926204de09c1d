// SPDX-License-Identifier: Apache-2.0
//
// A hundred thousand seeds of the mirror's simulation, and the proof that it notices each rule that is
// switched off.
#include "tests/sim/mirror_sim.h"

#include <functional>
#include <ostream>
#include <string>

#include <gtest/gtest.h>

namespace drover::sim {
namespace {

// Split in parts so that ctest can spread them over the cores.
class MirrorSimulation : public testing::TestWithParam<std::uint64_t> {};

TEST_P(MirrorSimulation, TargetEqualsSourceAndNoWriteIsHeldUp) {
  constexpr std::uint64_t kSeedsPerPart = 12500;
  const std::uint64_t first = 1 + GetParam() * kSeedsPerPart;
  MirrorSimStats stats;
  for (std::uint64_t seed = first; seed < first + kSeedsPerPart; ++seed) {
    const auto violation = run_mirror_sim(seed, {}, &stats);
    ASSERT_FALSE(violation) << *violation << "\nreplay: mirror_sim --seed " << seed << " --trace";
  }
  // The simulation is worth something only if it gets everywhere.
  EXPECT_GT(stats.forwarded, kSeedsPerPart);
  EXPECT_GT(stats.expired, kSeedsPerPart / 10);
  EXPECT_GT(stats.lanes_lost, kSeedsPerPart / 10);
  EXPECT_GT(stats.copies, kSeedsPerPart);
  EXPECT_GT(stats.crashes, kSeedsPerPart / 10);
  EXPECT_GT(stats.restarts, kSeedsPerPart / 10);
  EXPECT_GT(stats.rotations, kSeedsPerPart / 10);
  EXPECT_GT(stats.damaged, kSeedsPerPart / 20);
  EXPECT_GT(stats.offers, kSeedsPerPart / 10);
  EXPECT_GT(stats.not_found, kSeedsPerPart / 20);
}

INSTANTIATE_TEST_SUITE_P(Seeds, MirrorSimulation, testing::Range<std::uint64_t>(0, 8));

struct Rule {
  std::string name;
  std::function<void(MirrorSimOptions&)> switch_off;
};

// The test's name for ctest.
void PrintTo(const Rule& rule, std::ostream* out) { *out << rule.name; }

class SwitchedOffRule : public testing::TestWithParam<Rule> {};

TEST_P(SwitchedOffRule, IsNoticed) {
  MirrorSimOptions options;
  GetParam().switch_off(options);
  constexpr std::uint64_t kEnough = 50000;
  for (std::uint64_t seed = 1; seed <= kEnough; ++seed) {
    if (run_mirror_sim(seed, options)) {
      RecordProperty("noticed_at_seed", static_cast<int>(seed));
      return;
    }
  }
  FAIL() << "no seed up to " << kEnough << " noticed it";
}

INSTANTIATE_TEST_SUITE_P(
    Mirror, SwitchedOffRule,
    testing::Values(
        Rule{"AWriteWaitsForTheReadOfItsChunk",
             [](MirrorSimOptions& o) { o.mutation.forward_during_read = true; }},
        Rule{"AWriteNotForwardedDuringACopyIsCopiedAgain",
             [](MirrorSimOptions& o) { o.mutation.forget_redo = true; }},
        Rule{"AHoleIsNoHoleOnceItWasWritten",
             [](MirrorSimOptions& o) { o.mutation.ignore_write_during_scan = true; }},
        Rule{"ADiscardIsNotRepeated",
             [](MirrorSimOptions& o) { o.mutation.repeat_discard = true; }},
        Rule{"TheBarrierWaitsForWhatIsOnItsWay",
             [](MirrorSimOptions& o) { o.mutation.forget_on_the_way = true; }},
        Rule{"AWriteThatIsGivenUpIsCopiedAgain",
             [](MirrorSimOptions& o) { o.mutation.drop_expired = true; }},
        Rule{"WhatALostLaneCarriedIsCopiedAgain",
             [](MirrorSimOptions& o) { o.mutation.keep_copied_on_loss = true; }},
        Rule{"AWriteWaitsForTheTargetInStrictModeOnly",
             [](MirrorSimOptions& o) { o.mutation.wait_outside_strict = true; }},
        Rule{"AChunkThatDiffersIsSent",
             [](MirrorSimOptions& o) { o.mutation.same_though_different = true; }},
        Rule{"WhatAnOfferDidNotFindIsSent",
             [](MirrorSimOptions& o) { o.mutation.forget_not_found = true; }},
        Rule{"WhatAnOfferFindsIsVerified",
             [](MirrorSimOptions& o) { o.applier.offers.mutation_unverified = true; }},
        Rule{"AChunkIsDamagedOnlyIfItDiffersTwice",
             [](MirrorSimOptions& o) { o.mutation.damaged_at_once = true; }},
        Rule{"WhatVerifyingNeverSawIsSentAgain",
             [](MirrorSimOptions& o) { o.mutation.forget_unseen = true; }},
        Rule{"AComparisonBringsNothingOfAWriteThatWasGivenUp",
             [](MirrorSimOptions& o) { o.mutation.compare_trusted = true; }},
        Rule{"AChunkAlwaysTravelsOnTheSameLane",
             [](MirrorSimOptions& o) { o.mutation.wrong_lane = true; }},
        Rule{"AMaskIsJoinedNotReplaced",
             [](MirrorSimOptions& o) { o.mutation.forget_joined_mask = true; }},
        Rule{"AllThatWasWrittenDuringACopyIsCopiedAgain",
             [](MirrorSimOptions& o) { o.mutation.forget_redo_mask = true; }},
        Rule{"ALostCopyOwesItsBlocksAgain",
             [](MirrorSimOptions& o) { o.mutation.forget_ticket_mask = true; }},
        Rule{"WhatWaitedForALostReadIsCopied",
             [](MirrorSimOptions& o) { o.mutation.forget_waiting_mask = true; }},
        Rule{"ACopySawOnlyTheBlocksThatItRead",
             [](MirrorSimOptions& o) { o.mutation.trust_partial_read = true; }},
        Rule{"WhatTheTargetDidNotFlushIsLostWithIt",
             [](MirrorSimOptions& o) { o.mutation.forget_unflushed = true; }},
        Rule{"AFlushCoversOnlyWhatWasAcknowledgedBefore",
             [](MirrorSimOptions& o) { o.mutation.flush_covers_all = true; }},
        Rule{"ARecordTakesWhatIsInFlightForPending",
             [](MirrorSimOptions& o) { o.mutation.record_in_flight_as_copied = true; }},
        Rule{"ARecordTellsUnflushedFromDurable",
             [](MirrorSimOptions& o) { o.mutation.record_unflushed_as_durable = true; }},
        Rule{"RestoredChunksAreNotFresh",
             [](MirrorSimOptions& o) { o.mutation.restore_as_fresh = true; }},
        Rule{"AGroupHasARecordBeforeAnythingIsSent",
             [](MirrorSimOptions& o) { o.mutation.touch_late = true; }},
        Rule{"AFenceWaits", [](MirrorSimOptions& o) { o.mutation.ignore_fence = true; }},
        Rule{"OverlappingFramesAreAppliedInOrder",
             [](MirrorSimOptions& o) { o.applier.mutation_ignore_overlap = true; }}),
    [](const auto& rule) { return rule.param.name; });

}  // namespace
}  // namespace drover::sim
