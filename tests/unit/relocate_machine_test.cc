// SPDX-License-Identifier: Apache-2.0
//
// The relocation's state machine: what it does when, and what it never does.
#include "job/relocate_machine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>

namespace drover::job::relocation {
namespace {

using Copy = DiskSeen::Copy;

DiskSeen none() { return {}; }
DiskSeen running() { return {.copy = Copy::Running}; }
DiskSeen ready() { return {.copy = Copy::Ready}; }
DiskSeen switched() { return {.switched = true}; }
DiskSeen failed(Code code) { return {.failure = Error{code, "failed", "", false}}; }

Seen live(std::vector<DiskSeen> disks) { return {.runs = true, .disks = std::move(disks)}; }
Seen off(std::vector<DiskSeen> disks) { return {.runs = false, .disks = std::move(disks)}; }
Seen gone() { return {.exists = false}; }

const Error kDown{Code::Unreachable, "libvirt is away", "", true};
const Error kBroken{Code::Io, "it broke", "", false};

class RelocateMachine : public ::testing::Test {
 protected:
  std::vector<Action> tell(const Event& event) {
    Step next = step(std::move(state_), event, limits_);
    state_ = std::move(next.state);
    return next.actions;
  }
  template <class State>
  const State& in() {
    EXPECT_TRUE(std::holds_alternative<State>(state_)) << state_name(state_);
    return std::get<State>(state_);
  }
  // Both disks are being copied.
  void copy_both() {
    tell(Begin{});
    tell(Made{});
    tell(live({none(), none()}));
    tell(live({running(), running()}));
    in<Copying>();
  }
  void go_cold() {
    state_ = CopyingCold{};
    tell(Begin{});
  }
  using Actions = std::vector<Action>;

  Limits limits_{.disks = 2, .parallel = 4};
  State state_ = Making{};
};

TEST_F(RelocateMachine, CopiesAllThenSwitchesOneAfterTheOtherThenCommits) {
  EXPECT_EQ(tell(Begin{}), (Actions{{Do::Make}}));
  EXPECT_EQ(tell(Made{}), Actions{});
  EXPECT_EQ(tell(live({none(), none()})), (Actions{{Do::StartCopy, 0}, {Do::StartCopy, 1}}));
  EXPECT_EQ(tell(live({ready(), running()})), Actions{});
  EXPECT_EQ(tell(live({ready(), ready()})), (Actions{{Do::Pivot, 0}}));
  EXPECT_EQ(tell(live({ready(), ready()})), Actions{}) << "it is under way";
  EXPECT_EQ(tell(live({switched(), ready()})), (Actions{{Do::Pivot, 1}}));
  EXPECT_EQ(tell(live({switched(), switched()})), (Actions{{Do::Commit}}));
  tell(Committed{});
  EXPECT_FALSE(in<Finished>().partly);
}

TEST_F(RelocateMachine, CopiesNoMoreAtOnceThanAllowedAndDoesNotCountTheReady) {
  limits_ = {.disks = 3, .parallel = 1};
  tell(Begin{});
  tell(Made{});
  EXPECT_EQ(tell(live({none(), none(), none()})), (Actions{{Do::StartCopy, 0}}));
  EXPECT_EQ(tell(live({running(), none(), none()})), Actions{});
  EXPECT_EQ(tell(live({ready(), none(), none()})), (Actions{{Do::StartCopy, 1}}));
}

TEST_F(RelocateMachine, UndoesEverythingWhenACopyFails) {
  copy_both();
  EXPECT_EQ(tell(live({running(), failed(Code::NoSpace)})), (Actions{{Do::Drop}}));
  EXPECT_EQ(in<Undoing>().reason.code, Code::NoSpace);
  tell(Dropped{});
  EXPECT_TRUE(in<Undone>().complete);
}

TEST_F(RelocateMachine, ACopyThatSomebodyEndedIsUndone) {
  copy_both();
  EXPECT_EQ(tell(live({ready(), none()})), (Actions{{Do::Drop}}));
  EXPECT_EQ(in<Undoing>().reason.code, Code::Io);
}

TEST_F(RelocateMachine, IsCancelledUntilTheFirstDiskGoesOver) {
  copy_both();
  EXPECT_EQ(tell(CancelWished{}), (Actions{{Do::Drop}}));
  EXPECT_EQ(in<Undoing>().reason.code, Code::Cancelled);

  state_ = Making{};
  copy_both();
  tell(live({ready(), ready()}));
  in<Switching>();
  EXPECT_EQ(tell(CancelWished{}), Actions{}) << "too late";
  in<Switching>();
}

TEST_F(RelocateMachine, ACallThatLibvirtMayHaveCarriedOutIsNotRepeatedBlindly) {
  tell(Begin{});
  tell(Made{});
  tell(live({none(), none()}));
  tell(ActionFailed{{Do::StartCopy, 0}, kDown});
  in<Copying>();
  EXPECT_EQ(tell(live({running(), running()})), Actions{}) << "it was carried out";
  tell(live({ready(), ready()}));
  tell(ActionFailed{{Do::Pivot, 0}, kDown});
  EXPECT_EQ(tell(live({switched(), ready()})), (Actions{{Do::Pivot, 1}})) << "and so was that";
}

TEST_F(RelocateMachine, ACallThatWasNotCarriedOutIsRepeated) {
  tell(Begin{});
  tell(Made{});
  tell(live({none(), none()}));
  tell(ActionFailed{{Do::StartCopy, 1}, kDown});
  EXPECT_EQ(tell(live({running(), none()})), (Actions{{Do::StartCopy, 1}}));
  tell(live({ready(), ready()}));
  tell(ActionFailed{{Do::Pivot, 0}, kDown});
  EXPECT_EQ(tell(live({ready(), ready()})), (Actions{{Do::Pivot, 0}}));
}

TEST_F(RelocateMachine, FinishesTheDisksThatWentWhenAnotherFails) {
  copy_both();
  tell(live({ready(), ready()}));
  tell(live({switched(), ready()}));
  EXPECT_EQ(tell(live({switched(), failed(Code::Io)})), (Actions{{Do::Drop}, {Do::Commit}}));
  tell(Dropped{});
  tell(Committed{});
  ASSERT_TRUE(in<Finished>().partly);
  EXPECT_EQ(in<Finished>().partly->code, Code::Io);
}

TEST_F(RelocateMachine, CopiesColdWhenTheGuestWasShutOff) {
  copy_both();
  EXPECT_EQ(tell(off({none(), none()})), (Actions{{Do::CopyCold}}));
  EXPECT_EQ(tell(Copied{}), (Actions{{Do::Point}}));
  EXPECT_EQ(tell(Pointed{}), (Actions{{Do::Commit}}));
}

TEST_F(RelocateMachine, AGuestThatIsGoneForGoodEndsIt) {
  copy_both();
  EXPECT_EQ(tell(gone()), (Actions{{Do::Drop}}));
  EXPECT_EQ(in<Undoing>().reason.code, Code::NotFound);
}

TEST_F(RelocateMachine, ColdIsCancelledAndWhatItsCopySaysThenDoesNotMatter) {
  go_cold();
  EXPECT_EQ(tell(CancelWished{}), (Actions{{Do::Drop}}));
  tell(ActionFailed{{Do::CopyCold}, Error{Code::Cancelled, "stopped", "", false}});
  tell(Dropped{});
  EXPECT_TRUE(in<Undone>().complete);
  EXPECT_EQ(in<Undone>().reason.code, Code::Cancelled);
}

TEST_F(RelocateMachine, ADefinitionOfWhichNobodyKnowsWhetherItWasChangedHolds) {
  go_cold();
  tell(Copied{});
  tell(ActionFailed{{Do::Point}, kDown});
  in<Held>();

  go_cold();
  tell(Copied{});
  EXPECT_EQ(tell(ActionFailed{{Do::Point}, kBroken}), (Actions{{Do::Drop}})) << "refused: undone";
}

TEST_F(RelocateMachine, WhereTheNewestImageIsNotKnownNothingIsDecided) {
  copy_both();
  tell(live({ready(), ready()}));
  EXPECT_EQ(tell(Doubtful{kBroken}), Actions{});
  in<Held>();
  state_ = Settling{};
  EXPECT_EQ(tell(Doubtful{kBroken}), Actions{});
  in<Held>();
  state_ = Settling{kBroken};
  EXPECT_EQ(tell(Doubtful{kBroken}), (Actions{{Do::Drop}})) << "which keeps both";
}

TEST_F(RelocateMachine, AnUndoThatCouldNotClearUpSaysSo) {
  copy_both();
  tell(CancelWished{});
  tell(ActionFailed{{Do::Drop}, kDown});
  EXPECT_FALSE(in<Undone>().complete);
}

TEST_F(RelocateMachine, ADiskThatWentOverBeforeItsCopyCouldBeEndedIsFinished) {
  copy_both();
  tell(CancelWished{});
  EXPECT_EQ(tell(Dropped{true}), (Actions{{Do::Commit}}));
  tell(Committed{});
  EXPECT_EQ(in<Finished>().partly->code, Code::Cancelled);
}

TEST_F(RelocateMachine, AResumedJobGoesOnWithCopiesThatLive) {
  state_ = Settling{};
  EXPECT_EQ(tell(Begin{}), Actions{});
  EXPECT_EQ(tell(live({running(), none()})), (Actions{{Do::Make}})) << "for the one that is gone";
  tell(Made{});
  EXPECT_EQ(tell(live({running(), none()})), (Actions{{Do::StartCopy, 1}}));
}

TEST_F(RelocateMachine, AResumedJobWhoseDisksHaveAllGoneCommits) {
  state_ = Settling{};
  EXPECT_EQ(tell(live({switched(), switched()})), (Actions{{Do::Commit}}));
}

TEST_F(RelocateMachine, AResumedJobSwitchesTheRest) {
  state_ = Settling{};
  tell(live({switched(), ready()}));
  tell(Made{});
  EXPECT_EQ(tell(live({switched(), ready()})), (Actions{{Do::Pivot, 1}}));
}

TEST_F(RelocateMachine, AResumedJobOfAGuestThatIsOffCopiesCold) {
  state_ = Settling{};
  EXPECT_EQ(tell(off({none(), none()})), (Actions{{Do::CopyCold}}));
}

TEST_F(RelocateMachine, AJobIsUndoneWithoutAProcessUnlessAllHasGone) {
  const Error wish{Code::Cancelled, "cancelled", "", false};
  state_ = Settling{wish};
  EXPECT_EQ(tell(live({running(), ready()})), (Actions{{Do::Drop}}));
  in<Undoing>();
  state_ = Settling{wish};
  EXPECT_EQ(tell(live({switched(), switched()})), (Actions{{Do::Commit}})) << "too late";
  state_ = Settling{wish};
  tell(live({switched(), ready()}));
  tell(Made{});
  EXPECT_EQ(tell(live({switched(), ready()})), (Actions{{Do::Pivot, 1}})) << "all or none";
}

// Whatever comes in whatever order: nothing is committed unless a disk has gone over, nothing that
// has gone over is undone, and after its end it does nothing.
TEST_F(RelocateMachine, KeepsItsPromisesWhateverComes) {
  for (unsigned seed = 0; seed < 20000; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](unsigned n) { return static_cast<std::size_t>(random() % n); };
    switch (pick(3)) {
      case 0: state_ = Making{}; break;
      case 1: state_ = CopyingCold{}; break;
      default: state_ = Settling{}; break;
    }
    std::vector<bool> over(2, false);
    bool pointed = false;
    for (int i = 0; i < 40; ++i) {
      Event event = Begin{};
      switch (pick(10)) {
        case 0: event = Begin{}; break;
        case 1: event = Made{}; break;
        case 2: event = CancelWished{}; break;
        case 3: event = Dropped{over[0] || over[1]}; break;
        case 4: event = Committed{}; break;
        case 5: {
          const Do what = static_cast<Do>(pick(7));
          event = ActionFailed{{what, pick(2)}, pick(2) != 0U ? kDown : kBroken};
          break;
        }
        case 6: event = Copied{}; break;
        case 7:
          event = Pointed{};
          pointed = pointed || std::holds_alternative<Pointing>(state_);
          break;
        default: {
          Seen seen = pick(5) == 0 ? off({}) : live({});
          for (std::size_t disk = 0; disk < 2; ++disk) {
            if (std::holds_alternative<Switching>(state_) && pick(2) == 0) over[disk] = true;
            const auto copy = static_cast<Copy>(pick(3));
            seen.disks.push_back({.switched = over[disk], .copy = over[disk] ? Copy::None : copy});
          }
          event = seen;
          break;
        }
      }
      const bool was_over = ended(state_);
      const std::vector<Action> actions = tell(event);
      const bool commits = std::ranges::find(actions, Action{Do::Commit}) != actions.end();
      const bool drops = std::ranges::find(actions, Action{Do::Drop}) != actions.end();
      ASSERT_TRUE(!was_over || actions.empty()) << seed;
      ASSERT_TRUE(!commits || over[0] || over[1] || pointed) << seed;
      if (drops && (over[0] || over[1]) && std::holds_alternative<Seen>(event)) {
        ASSERT_TRUE(commits) << seed << ": what has gone over must be finished";
      }
    }
  }
}

TEST_F(RelocateMachine, EachEventActionAndStateHasAName) {
  EXPECT_EQ(event_name(Begin{}), "begin");
  EXPECT_EQ(event_name(ActionFailed{}), "action-failed");
  EXPECT_EQ(action_name(Do::Commit), "commit");
  EXPECT_EQ(state_name(Settling{}), "settling");
  EXPECT_EQ(state_name(Held{}), "held");
  EXPECT_EQ(phase_of(Switching{}), Phase::Switch);
  EXPECT_EQ(phase_of(CopyingCold{}), Phase::Copy);
}

}  // namespace
}  // namespace drover::job::relocation
