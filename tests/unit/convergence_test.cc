// SPDX-License-Identifier: Apache-2.0
#include "memmig/convergence.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>

namespace drover::memmig {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::ElementsAre;
using testing::IsEmpty;

ConvergenceLimits limits() {
  ConvergenceLimits limits;
  limits.initial_downtime = milliseconds(100);
  limits.max_downtime = milliseconds(300);
  limits.auto_converge = true;
  limits.max_throttle_percent = 50;
  return limits;
}

class ConvergenceTest : public testing::Test {
 protected:
  // One iteration that begins with `rest` and is looked at `looks` times while it shrinks.
  std::vector<ConvergenceAction> iteration(Convergence& convergence, Length rest, int looks = 3) {
    ++iteration_;
    std::vector<ConvergenceAction> all;
    for (int i = 0; i < looks; ++i) {
      MigrationProgress progress;
      progress.iteration = iteration_;
      progress.memory_remaining = Length(rest.bytes() / static_cast<unsigned>(i + 1));
      when_ += milliseconds(200);
      for (auto& action : convergence.step(when_, progress)) all.push_back(std::move(action));
    }
    return all;
  }
  std::uint64_t iteration_ = 0;
  Instant when_{};
};

TEST_F(ConvergenceTest, NothingIsDoneWhileIterationsGetSmaller) {
  Convergence convergence(limits());
  for (Length rest = 1_GiB; rest > 1_MiB; rest = Length(rest.bytes() * 8 / 10)) {
    EXPECT_THAT(iteration(convergence, rest), IsEmpty());
  }
  EXPECT_EQ(convergence.downtime(), milliseconds(100));
}

TEST_F(ConvergenceTest, InitialDowntimeIsWithinTheLimit) {
  ConvergenceLimits tight = limits();
  tight.max_downtime = milliseconds(40);
  EXPECT_EQ(Convergence(tight).downtime(), milliseconds(40));
}

TEST_F(ConvergenceTest, ShortInitialDowntimeIsRaisedTo100MsAtOnce) {
  ConvergenceLimits shorter = limits();
  shorter.initial_downtime = milliseconds(30);
  Convergence convergence(shorter);
  for (int i = 0; i < 6 && convergence.downtime() == milliseconds(30); ++i) {
    iteration(convergence, 100_MiB);
  }
  EXPECT_EQ(convergence.downtime(), milliseconds(100));
}

TEST_F(ConvergenceTest, FirstIterationSaysNothing) {
  // It sends all memory; the second one is smaller than it whatever the guest does.
  Convergence convergence(limits());
  iteration(convergence, 8_GiB);
  EXPECT_THAT(iteration(convergence, 100_MiB), IsEmpty());
  EXPECT_THAT(iteration(convergence, 100_MiB), IsEmpty());
  EXPECT_THAT(iteration(convergence, 100_MiB), IsEmpty());
  EXPECT_FALSE(iteration(convergence, 100_MiB).empty());
}

TEST_F(ConvergenceTest, DowntimeIsRaisedStepByStepThenTheGuestIsThrottled) {
  Convergence convergence(limits());
  std::vector<ConvergenceAction> all;
  for (int i = 0; i < 40; ++i) {
    for (auto& action : iteration(convergence, 200_MiB)) all.push_back(std::move(action));
  }
  EXPECT_THAT(all,
              ElementsAre(ConvergenceAction(SetDowntime{milliseconds(151)}),
                          ConvergenceAction(SetDowntime{milliseconds(227)}),
                          ConvergenceAction(SetDowntime{milliseconds(300)}),
                          ConvergenceAction(SetThrottle{20}), ConvergenceAction(SetThrottle{40}),
                          ConvergenceAction(SetThrottle{50})));
  EXPECT_TRUE(convergence.exhausted());
  EXPECT_EQ(convergence.throttle(), 50U);
}

TEST_F(ConvergenceTest, LooksWithinOneIterationCountOnce) {
  Convergence convergence(limits());
  iteration(convergence, 1_GiB);
  iteration(convergence, 100_MiB);
  EXPECT_THAT(iteration(convergence, 100_MiB, 1000), IsEmpty());
}

TEST_F(ConvergenceTest, ProgressUnderNewLimitsStopsTheRaising) {
  Convergence convergence(limits());
  iteration(convergence, 1_GiB);
  for (int i = 0; i < 3; ++i) iteration(convergence, 200_MiB);
  EXPECT_EQ(iteration(convergence, 200_MiB).size(), 1U);
  for (Length rest = 200_MiB; rest > 1_MiB; rest = Length(rest.bytes() / 2)) {
    EXPECT_THAT(iteration(convergence, rest), IsEmpty());
  }
}

TEST_F(ConvergenceTest, NoThrottlingUnlessAllowed) {
  ConvergenceLimits gentle = limits();
  gentle.auto_converge = false;
  Convergence convergence(gentle);
  for (int i = 0; i < 60; ++i) {
    for (const auto& action : iteration(convergence, 200_MiB)) {
      EXPECT_TRUE(std::holds_alternative<SetDowntime>(action));
    }
  }
  EXPECT_TRUE(convergence.exhausted());
}

TEST_F(ConvergenceTest, GivesUpOnceWhenItsTimeIsOver) {
  ConvergenceLimits impatient = limits();
  impatient.give_up_after = seconds(10);
  Convergence convergence(impatient);
  int gave_up = 0;
  for (int i = 0; i < 100; ++i) {
    for (const auto& action : iteration(convergence, 200_MiB)) {
      if (const auto* give_up = std::get_if<GiveUp>(&action)) {
        ++gave_up;
        EXPECT_GE(when_, Instant{} + seconds(10));
        EXPECT_THAT(give_up->why, testing::HasSubstr("200.0 MiB left after 10 s"));
      }
    }
  }
  EXPECT_EQ(gave_up, 1);
}

// The second iteration goes on, while the target has `loaded` of what was `given`.
class WaitingConvergenceTest : public ConvergenceTest {
 protected:
  std::vector<ConvergenceAction> look(std::optional<MemoryTransit> transit,
                                      std::uint64_t iteration = 2, Length rest = Length()) {
    MigrationProgress progress;
    progress.memory_remaining = rest;
    progress.iteration = iteration;
    progress.transit = transit;
    when_ += milliseconds(50);
    return convergence_.step(when_, progress);
  }
  Convergence convergence_{limits(), true};
};

TEST_F(WaitingConvergenceTest, HardlyAnyDowntimeUntilTheTargetHasWhatWasSentAtFirst) {
  EXPECT_EQ(convergence_.downtime(), Convergence::kWhileBehind);
  EXPECT_THAT(look(MemoryTransit{50_MiB, 50_MiB}, 1), IsEmpty()) << "not all has been sent";
  EXPECT_THAT(look(MemoryTransit{100_MiB, 90_MiB}), IsEmpty());
  EXPECT_THAT(look(MemoryTransit{200_MiB, 99_MiB}, 3), IsEmpty());
  EXPECT_TRUE(convergence_.waiting());
  EXPECT_THAT(look(MemoryTransit{200_MiB, 100_MiB}, 3),
              ElementsAre(ConvergenceAction(SetDowntime{milliseconds(100)})));
  EXPECT_FALSE(convergence_.waiting());
  EXPECT_THAT(look(MemoryTransit{300_MiB, 100_MiB}, 4), IsEmpty()) << "waits no second time";
  EXPECT_EQ(convergence_.downtime(), milliseconds(100));
}

TEST_F(WaitingConvergenceTest, WaitsOnWhenTheTargetIsNotHeardOf) {
  EXPECT_THAT(look(std::nullopt), IsEmpty());
  EXPECT_THAT(look(MemoryTransit{100_MiB, 90_MiB}), IsEmpty());
  EXPECT_THAT(look(std::nullopt), IsEmpty());
  EXPECT_EQ(look(MemoryTransit{200_MiB, 100_MiB}).size(), 1U);
}

TEST_F(WaitingConvergenceTest, DoesNotWaitForEver) {
  for (const auto transit :
       {std::optional(MemoryTransit{100_MiB, 90_MiB}), std::optional<MemoryTransit>()}) {
    convergence_ = Convergence(limits(), true);
    const Instant begin = when_;
    while (look(transit).empty()) ASSERT_LT(when_, begin + seconds(31));
    EXPECT_GE(when_, begin + Convergence::kTargetPatience);
  }
}

// Their sizes are those of hardly any downtime: the ones that follow would never be smaller.
TEST_F(WaitingConvergenceTest, IterationsMeanwhileAreNotJudged) {
  const MemoryTransit behind{100_MiB, 90_MiB};
  std::uint64_t at = 1;
  while (at < 100) EXPECT_THAT(look(behind, at++, 1_MiB), IsEmpty());
  EXPECT_EQ(look(MemoryTransit{100_MiB, 100_MiB}, at++, 1_MiB).size(), 1U);
  EXPECT_THAT(look(behind, at++, 100_MiB), IsEmpty());
  EXPECT_THAT(look(behind, at++, 80_MiB), IsEmpty());
  EXPECT_THAT(look(behind, at++, 60_MiB), IsEmpty());
  EXPECT_THAT(look(behind, at++, 40_MiB), IsEmpty());
}

TEST_F(ConvergenceTest, NeverGivesUpWithoutALimit) {
  Convergence convergence(limits());
  for (int i = 0; i < 1000; ++i) {
    for (const auto& action : iteration(convergence, 200_MiB)) {
      EXPECT_FALSE(std::holds_alternative<GiveUp>(action));
    }
  }
}

}  // namespace
}  // namespace drover::memmig
