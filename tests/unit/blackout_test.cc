// SPDX-License-Identifier: Apache-2.0
//
// Where the blackout's time went (job/blackout.h).
#include "job/blackout.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace drover::job {
namespace {

using std::chrono::microseconds;

Instant at(int us) { return Instant() + std::chrono::seconds(100) + microseconds(us); }

BlackoutMarks seen() {
  return {.stopped = at(0),
          .quiesced = at(3000),
          .drain_began = at(3100),
          .drained = at(4000),
          .barrier_passed = at(9000),
          .memory_there = at(44'000),
          .guard_began = at(44'200),
          .guarded = at(44'300),
          .running = at(60'000),
          .barrier = {microseconds(100), microseconds(3000), microseconds(1000)}};
}

TEST(Blackout, ItsPartsOneAfterTheOtherAreTheWhole) {
  const auto parts = blackout_parts(seen());
  ASSERT_TRUE(parts);
  EXPECT_EQ(parts->drain, microseconds(900));
  EXPECT_EQ(parts->barrier, microseconds(5000));
  EXPECT_EQ(parts->flush, microseconds(3000));
  EXPECT_EQ(parts->disks, microseconds(6000));
  EXPECT_EQ(parts->memory, microseconds(41'000));
  EXPECT_EQ(parts->quiesce + std::max(parts->disks, parts->memory) + parts->wait + parts->guard +
                parts->resume,
            microseconds(60'000));
}

TEST(Blackout, ADiskThatTakesLongerThanTheMemoryIsTheLongerPart) {
  BlackoutMarks marks = seen();
  marks.barrier_passed = at(50'000);
  marks.guard_began = at(50'100);
  marks.guarded = at(50'200);
  const auto parts = blackout_parts(marks);
  ASSERT_TRUE(parts);
  EXPECT_EQ(parts->disks, microseconds(47'000));
  EXPECT_EQ(parts->wait, microseconds(100));
}

TEST(Blackout, WithAMomentThatNobodySawThereAreNoParts) {
  for (Instant BlackoutMarks::*mark :
       {&BlackoutMarks::stopped, &BlackoutMarks::quiesced, &BlackoutMarks::drain_began,
        &BlackoutMarks::drained, &BlackoutMarks::barrier_passed, &BlackoutMarks::memory_there,
        &BlackoutMarks::guard_began, &BlackoutMarks::guarded, &BlackoutMarks::running}) {
    BlackoutMarks marks = seen();
    marks.*mark = Instant();
    EXPECT_FALSE(blackout_parts(marks));
  }
}

TEST(Blackout, EventsInAnotherOrderGiveNoNegativeTimes) {
  BlackoutMarks marks = seen();
  marks.running = at(44'000);  // its event came before the command's answer
  marks.memory_there = at(1000);
  const auto parts = blackout_parts(marks);
  ASSERT_TRUE(parts);
  EXPECT_EQ(parts->resume, microseconds(0));
  EXPECT_EQ(parts->memory, microseconds(0));
}

TEST(Blackout, ATargetThatSaysMoreThanItTookIsNotBelieved) {
  BlackoutMarks marks = seen();
  marks.barrier = {microseconds(4000), microseconds(4000), microseconds(1)};
  const auto parts = blackout_parts(marks);
  ASSERT_TRUE(parts);
  EXPECT_EQ(parts->compare, microseconds(4000));
  EXPECT_EQ(parts->flush, microseconds(1000));
  EXPECT_EQ(parts->release, microseconds(0));
}

}  // namespace
}  // namespace drover::job
