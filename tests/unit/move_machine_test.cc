// SPDX-License-Identifier: Apache-2.0
#include "job/move_machine.h"

#include <algorithm>
#include <set>

#include <gtest/gtest.h>

#include "base/random.h"

namespace drover::job {
namespace {

const Error kError{Code::Unreachable, "the link broke", "", true};
const Error kFatal{Code::Protocol, "the digests differ", "", false};
MigrateEnded migrated() { return MigrateEnded{}; }
MigrateEnded migrate_failed() { return MigrateEnded{tl::unexpected<Error>(kError)}; }
const Settled kOnSource{Whereabouts::Source};
const Settled kOnTarget{Whereabouts::Target};

// Feeds events one after the other; keeps what was to be done.
struct Walk {
  State state = Reserving{};
  std::vector<Do> done;
  void feed(const Event& event) {
    Step next = step(std::move(state), event);
    state = std::move(next.state);
    done.insert(done.end(), next.actions.begin(), next.actions.end());
  }
  void feed_all(std::initializer_list<Event> events) {
    for (const Event& event : events) feed(event);
  }
  [[nodiscard]] bool did(Do action) const { return std::ranges::count(done, action) > 0; }
};

const std::initializer_list<Event> kToMemory = {Begin{}, Reserved{}, Attached{}, AllCopied{false},
                                                StrictEntered{}, AllCopied{true}};

TEST(MoveMachine, AMoveWithoutTroubleDoesEachThingOnceInOrder) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, BarrierPassed{}, TargetSuspended{}, TargetRuns{}, migrated(),
                Committed{}});
  EXPECT_TRUE(std::holds_alternative<Finished>(run.state));
  EXPECT_EQ(run.done, (std::vector<Do>{Do::Reserve, Do::Attach, Do::EnterStrict, Do::StartMemory,
                                       Do::PassBarrier, Do::ResumeTarget, Do::Commit}));
}

const std::initializer_list<Event> kToLead = {Begin{}, Reserved{}, Attached{}, NearlyCopied{}};

TEST(MoveMachine, TheMemoryIsStartedBeforeTheCopyEndsAndStrictModeFollows) {
  Walk run;
  run.feed_all(kToLead);
  EXPECT_EQ(run.done.back(), Do::StartMemory);
  EXPECT_EQ(phase_of(run.state), Phase::Copy);
  run.feed_all({NearlyCopied{}, AllCopied{false}});
  EXPECT_EQ(run.done.back(), Do::EnterStrict);
  EXPECT_EQ(phase_of(run.state), Phase::Synchronised);
  run.feed_all({StrictEntered{}, AllCopied{true}});
  EXPECT_EQ(phase_of(run.state), Phase::Memory);
  run.feed_all({SourceStopped{}, BarrierPassed{}, TargetSuspended{}, TargetRuns{}, migrated(), Committed{}});
  EXPECT_TRUE(std::holds_alternative<Finished>(run.state)) << state_name(run.state);
  EXPECT_EQ(run.done, (std::vector<Do>{Do::Reserve, Do::Attach, Do::StartMemory, Do::EnterStrict, Do::PassBarrier,
                                       Do::ResumeTarget, Do::Commit}));
}

TEST(MoveMachine, WhatFailsBetweenTheMemorysStartAndStrictModeTakesTheMemoryBack) {
  for (const Event& trouble : {Event(LinkDown{}), Event(HandoverFailed{kError}), Event(Trouble{kFatal}),
                               Event(CancelWished{}), Event(ActionFailed{kFatal}), Event(migrate_failed())}) {
    Walk run;
    run.feed_all(kToLead);
    run.feed(trouble);
    const bool ended = std::holds_alternative<MigrateEnded>(trouble);
    EXPECT_EQ(run.did(Do::AbortMemory), !ended) << event_name(trouble);
    if (!ended) run.feed(migrate_failed());
    run.feed_all({kOnSource, LinkUp{}, Rejoined{}, Undone_{}});
    const bool again = ended || std::holds_alternative<LinkDown>(trouble) || std::holds_alternative<HandoverFailed>(trouble);
    EXPECT_EQ(std::holds_alternative<Copying>(run.state), again) << event_name(trouble) << ": " << state_name(run.state);
    EXPECT_EQ(std::holds_alternative<Undone>(run.state), !again) << event_name(trouble) << ": " << state_name(run.state);
    EXPECT_FALSE(run.did(Do::EnterStrict));
  }
}

TEST(MoveMachine, TheOrderOfLibvirtsNewsDoesNotMatter) {
  std::vector<Event> news = {SourceStopped{}, TargetSuspended{}, migrated()};
  std::vector<std::size_t> order = {0, 1, 2};
  do {
    Walk run;
    run.feed_all(kToMemory);
    bool passing = false;
    for (const std::size_t i : order) {
      run.feed(news[i]);
      if (!passing && run.did(Do::PassBarrier)) {
        passing = true;
        run.feed(BarrierPassed{});
      }
    }
    run.feed_all({TargetRuns{}, Committed{}});
    EXPECT_TRUE(std::holds_alternative<Finished>(run.state)) << state_name(run.state);
    EXPECT_EQ(std::ranges::count(run.done, Do::PassBarrier), 1);
    EXPECT_EQ(std::ranges::count(run.done, Do::ResumeTarget), 1);
  } while (std::ranges::next_permutation(order).found);
}

TEST(MoveMachine, TroubleBeforeTheMemoryIsUndone) {
  const std::size_t before_memory = kToMemory.size() - 1;  // it begins when strict mode is entered
  for (std::size_t steps = 1; steps < before_memory; ++steps) {
    for (const Event& trouble : {Event(Trouble{kError}), Event(CancelWished{})}) {
      Walk run;
      for (std::size_t i = 0; i < steps; ++i) run.feed(std::data(kToMemory)[i]);
      run.feed(trouble);
      EXPECT_TRUE(run.did(Do::Undo)) << steps;
      run.feed(Undone_{});
      EXPECT_TRUE(std::holds_alternative<Undone>(run.state));
    }
  }
}

TEST(MoveMachine, TroubleInMemoryAbortsAndUndoesWhenTheSourceRunsAgain) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({Trouble{kError}, migrate_failed(), kOnSource, Undone_{}});
  EXPECT_TRUE(run.did(Do::AbortMemory));
  EXPECT_TRUE(run.did(Do::Settle));
  ASSERT_TRUE(std::holds_alternative<Undone>(run.state));
  EXPECT_EQ(std::get<Undone>(run.state).reason.message, kError.message);
}

TEST(MoveMachine, ACancelThatComesTooLateForLibvirtFinishesTheMove) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({CancelWished{}, SourceStopped{}, TargetSuspended{}, migrated(), BarrierPassed{},
                TargetRuns{}, Committed{}});
  EXPECT_TRUE(run.did(Do::AbortMemory));
  EXPECT_TRUE(std::holds_alternative<Finished>(run.state));
}

TEST(MoveMachine, ABarrierThatCannotBePassedAfterTheSourceIsGoneHoldsTheJobAndDeletesNothing) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, ActionFailed{kFatal}, migrated(), ActionFailed{kFatal}});
  EXPECT_TRUE(std::holds_alternative<Held>(run.state));
  EXPECT_FALSE(run.did(Do::Undo));
  EXPECT_FALSE(run.did(Do::Commit));
  EXPECT_FALSE(run.did(Do::ResumeTarget));
}

TEST(MoveMachine, AMigrationThatFailedAfterHavingBeenDoneGoesForward) {
  for (const bool passed : {false, true}) {
    Walk run;
    run.feed_all(kToMemory);
    run.feed(SourceStopped{});
    if (passed) run.feed(BarrierPassed{});
    run.feed_all({migrate_failed(), kOnTarget});
    if (!passed) run.feed(BarrierPassed{});
    run.feed_all({TargetRuns{}, Committed{}});
    EXPECT_TRUE(std::holds_alternative<Finished>(run.state)) << passed;
    EXPECT_FALSE(run.did(Do::Undo));
  }
}

TEST(MoveMachine, ABarrierInVainIsUndoneWhenTheSourceRunsAgain) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, MigrateEnded{tl::unexpected<Error>(kFatal)}, BarrierPassed{}, kOnSource, Undone_{}});
  EXPECT_TRUE(std::holds_alternative<Undone>(run.state));
  EXPECT_FALSE(run.did(Do::ResumeTarget));
}

TEST(MoveMachine, AnOutageBeforeTheSourceHasStoppedLeadsBackToCopying) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({LinkDown{}, migrate_failed(), kOnSource, LinkUp{}, Rejoined{}});
  EXPECT_TRUE(std::holds_alternative<Copying>(run.state)) << state_name(run.state);
  EXPECT_TRUE(run.did(Do::AbortMemory));
  EXPECT_TRUE(run.did(Do::Rejoin));
  EXPECT_FALSE(run.did(Do::Undo));
  run.feed_all({AllCopied{false}, StrictEntered{}, AllCopied{true}, SourceStopped{}, BarrierPassed{}, TargetSuspended{},
                TargetRuns{}, migrated(), Committed{}});
  EXPECT_TRUE(std::holds_alternative<Finished>(run.state)) << state_name(run.state);
}

TEST(MoveMachine, ABarrierThatTheOutageBrokeIsPassedWhenTheLinkIsUpAgain) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, migrated(), LinkDown{}, ActionFailed{kError}});
  EXPECT_TRUE(std::holds_alternative<MovingMemory>(run.state)) << state_name(run.state);
  EXPECT_FALSE(run.did(Do::AbortMemory));
  run.feed_all({LinkUp{}, BarrierPassed{}, TargetRuns{}, Committed{}});
  EXPECT_TRUE(std::holds_alternative<Finished>(run.state)) << state_name(run.state);
  EXPECT_EQ(std::ranges::count(run.done, Do::PassBarrier), 2);
}

TEST(MoveMachine, AGuestThatStopsBeforeItsDisksAreEqualGoesOnHere) {
  for (const bool strict : {false, true}) {
    Walk run;
    run.feed_all(kToLead);
    if (strict) run.feed_all({AllCopied{false}});
    run.feed_all({SourceStopped{}, SourceStopped{}});
    EXPECT_FALSE(run.did(Do::PassBarrier));
    EXPECT_EQ(std::ranges::count(run.done, Do::AbortMemory), 1);
    run.feed_all({AllCopied{true}, migrate_failed(), kOnSource, Rejoined{}});
    EXPECT_TRUE(std::holds_alternative<Copying>(run.state)) << state_name(run.state);
    EXPECT_FALSE(run.did(Do::Undo));
  }
  Walk too_late;
  too_late.feed_all(kToLead);
  too_late.feed_all({AllCopied{false}, SourceStopped{}, migrated()});
  EXPECT_TRUE(std::holds_alternative<MovingMemory>(too_late.state)) << state_name(too_late.state);
  EXPECT_TRUE(too_late.did(Do::PassBarrier)) << "the guest's memory is there: the way is forward";
}

TEST(MoveMachine, AnOutageInStrictModeLeadsBackToCopying) {
  Walk run;
  run.feed_all({Begin{}, Reserved{}, Attached{}, AllCopied{false}, LinkDown{}});
  EXPECT_TRUE(std::holds_alternative<Copying>(run.state));
  run.feed_all({StrictEntered{}});  // of the attempt that the outage ended
  EXPECT_FALSE(run.did(Do::StartMemory));
}

TEST(MoveMachine, AMirrorThatIsLostIsAttachedAgain) {
  for (const bool twice : {false, true}) {
    Walk run;
    run.feed_all({Begin{}, Reserved{}, Attached{}, HandoverFailed{kError}});
    EXPECT_TRUE(run.did(Do::Rejoin));
    if (twice) run.feed_all({HandoverFailed{kError}, Rejoined{}});
    // The driver says when the next handover may begin: not at once.
    run.feed_all({AllCopied{false}, Rejoined{}});
    EXPECT_EQ(std::ranges::count(run.done, Do::Rejoin), twice ? 2 : 1);
    EXPECT_TRUE(std::holds_alternative<Copying>(run.state)) << state_name(run.state);
  }
}

TEST(MoveMachine, ACancelWhileTheMemoryIsTakenBackUndoesTheMove) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({LinkDown{}, CancelWished{}, migrate_failed(), kOnSource, Undone_{}});
  ASSERT_TRUE(std::holds_alternative<Undone>(run.state));
  EXPECT_EQ(std::get<Undone>(run.state).reason.code, Code::Cancelled);
}

TEST(MoveMachine, AResumedJobGoesOnFromWhereTheGuestIs) {
  const auto resumed = [](bool barrier_passed, Whereabouts where) {
    Walk run;
    run.state = Settling{{}, barrier_passed, true};
    run.feed_all({Begin{}, Settled{where}});
    EXPECT_EQ(run.done.front(), Do::Settle);
    return run;
  };
  EXPECT_EQ(resumed(false, Whereabouts::Source).done.back(), Do::Rejoin);
  EXPECT_EQ(resumed(true, Whereabouts::Target).done.back(), Do::ResumeTarget);
  EXPECT_EQ(resumed(false, Whereabouts::Target).done.back(), Do::PassBarrier);
  EXPECT_EQ(resumed(true, Whereabouts::TargetRuns).done.back(), Do::Commit);
}

TEST(MoveMachine, AResumedJobThatIsToBeUndoneIsNotWhenTheGuestRunsOnTheTarget) {
  Walk run;
  run.state = Settling{kFatal, true, false};
  run.feed_all({Begin{}, Settled{Whereabouts::TargetRuns}});
  EXPECT_TRUE(std::holds_alternative<Held>(run.state));
  EXPECT_FALSE(run.did(Do::Undo));
  EXPECT_FALSE(run.did(Do::Commit));
}

TEST(MoveMachine, TroubleThatComesWhileTheBarrierIsBeingPassedDoesNotHoldTheJob) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, Trouble{kError}, BarrierPassed{}, migrated(), TargetRuns{}, Committed{}});
  EXPECT_TRUE(std::holds_alternative<Finished>(run.state)) << state_name(run.state);
}

TEST(MoveMachine, ASourceThatCannotBeGuardedIsLookedAt) {
  for (const bool runs : {false, true}) {
    Walk run;
    run.feed_all(kToMemory);
    run.feed_all({SourceStopped{}, BarrierPassed{}, TargetSuspended{}, SourceNotGuarded{kError}});
    if (runs) {
      // The target has let go of its images: they can't be written to again.
      run.feed_all({migrate_failed(), kOnSource, Undone_{}});
      EXPECT_TRUE(std::holds_alternative<Undone>(run.state)) << state_name(run.state);
    } else {
      run.feed_all({kOnTarget, TargetRuns{}, migrated(), Committed{}});
      EXPECT_TRUE(std::holds_alternative<Finished>(run.state)) << state_name(run.state);
    }
  }
}

TEST(MoveMachine, WhenNobodyKnowsWhereTheGuestIsTheJobIsHeld) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, migrate_failed(), ActionFailed{kError}});
  ASSERT_TRUE(std::holds_alternative<Held>(run.state));
  EXPECT_FALSE(run.did(Do::Undo));
}

TEST(MoveMachine, AnUndoThatIsNotCompleteSaysSo) {
  Walk run;
  run.feed_all({Begin{}, Trouble{kError}, ActionFailed{kError}});
  ASSERT_TRUE(std::holds_alternative<Undone>(run.state));
  EXPECT_FALSE(std::get<Undone>(run.state).complete);
}

TEST(MoveMachine, CancelAfterTheSourceStoppedFinishesTheMove) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, CancelWished{}, BarrierPassed{}, TargetSuspended{}, migrated(),
                TargetRuns{}, Committed{}});
  EXPECT_TRUE(std::holds_alternative<Finished>(run.state));
}

TEST(MoveMachine, ATargetThatDoesNotResumeHoldsTheJob) {
  Walk run;
  run.feed_all(kToMemory);
  run.feed_all({SourceStopped{}, BarrierPassed{}, TargetSuspended{}, ActionFailed{kError}, migrated()});
  EXPECT_TRUE(std::holds_alternative<Held>(run.state));
  EXPECT_FALSE(run.did(Do::Commit));
  EXPECT_FALSE(run.did(Do::Undo));
}

// Whatever comes in whatever order, doubled or late: the rules hold.
TEST(MoveMachine, NoOrderOfEventsBreaksTheInvariants) {
  for (std::uint64_t seed = 1; seed <= 200000; ++seed) {
    Random random(seed);
    Walk run;
    bool barrier = false;
    bool target_runs = false;
    for (int i = 0; i < 40; ++i) {
      const std::vector<Event> all = {Begin{},          Reserved{},      Attached{},
                                      AllCopied{false}, AllCopied{true}, StrictEntered{}, NearlyCopied{},
                                      SourceStopped{},  TargetSuspended{}, migrated(),
                                      migrate_failed(), BarrierPassed{},
                                      TargetRuns{},     Committed{},     Undone_{},
                                      random.one_in(2) ? kOnSource : kOnTarget,
                                      Rejoined{},       LinkDown{},      LinkUp{},
                                      HandoverFailed{kError}};
      Event event = all[random.below(all.size())];
      if (random.one_in(60)) event = Trouble{kError};
      if (random.one_in(60)) event = ActionFailed{kError};
      if (random.one_in(60)) event = CancelWished{};
      if (random.one_in(60) && !target_runs) event = SourceNotGuarded{kError};
      // What a driver can't report before it was told to do it.
      if (std::holds_alternative<BarrierPassed>(event) && !run.did(Do::PassBarrier)) continue;
      if (std::holds_alternative<TargetRuns>(event) && !std::holds_alternative<Resuming>(run.state)) continue;
      if (std::holds_alternative<Settled>(event) && !run.did(Do::Settle)) continue;
      const bool over = ended(run.state);
      const std::size_t before = run.done.size();
      barrier = barrier || std::holds_alternative<BarrierPassed>(event);
      target_runs = target_runs || std::holds_alternative<TargetRuns>(event);
      run.feed(event);
      for (std::size_t k = before; k < run.done.size(); ++k) {
        ASSERT_FALSE(over) << "seed " << seed << ": something is done after the end";
        if (run.done[k] == Do::StartMemory) barrier = false;  // each handover has its own
        if (run.done[k] == Do::ResumeTarget) {
          ASSERT_TRUE(barrier) << "seed " << seed << ": invariant 5";
        }
        if (run.done[k] == Do::Commit) {
          ASSERT_TRUE(target_runs) << "seed " << seed << ": invariant 4";
        }
        if (run.done[k] == Do::Undo) {
          ASSERT_FALSE(target_runs) << "seed " << seed << ": undone after the resume";
        }
      }
    }
    for (const Do action : std::set<Do>(run.done.begin(), run.done.end())) {
      // Only what can't be taken back is done once.
      if (action != Do::Reserve && action != Do::Attach && action != Do::Undo && action != Do::Commit) continue;
      ASSERT_EQ(std::ranges::count(run.done, action), 1)
          << "seed " << seed << ": " << action_name(action) << " twice";
    }
  }
}

}  // namespace
}  // namespace drover::job
