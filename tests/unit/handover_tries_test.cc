// SPDX-License-Identifier: Apache-2.0
//
// When a handover that failed is tried again, and how often the target is flushed.
#include "job/handover_tries.h"

#include <gtest/gtest.h>

#include "job/checkpoint.h"

namespace drover::job {
namespace {

using namespace std::chrono_literals;
using Verdict = HandoverTries::Verdict;

TEST(HandoverTries, PausesGetLonger) {
  HandoverTries tries;
  EXPECT_EQ(tries.pause(), 1s);
  EXPECT_EQ(tries.pause(), 2s);
  for (int i = 0; i < 10; ++i) (void)tries.pause();
  EXPECT_EQ(tries.pause(), 60s);
}

TEST(HandoverTries, TenSlowOnesInARowAreEnough) {
  HandoverTries tries;
  for (int i = 1; i < HandoverTries::kMost; ++i) EXPECT_EQ(tries.failed(true), Verdict::Again) << i;
  EXPECT_EQ(tries.failed(true), Verdict::TooSlow);
}

TEST(HandoverTries, OneThatGotToItsMemoryWasNotSlow) {
  HandoverTries tries;
  for (int i = 1; i < HandoverTries::kMost; ++i) EXPECT_EQ(tries.failed(true), Verdict::Again);
  tries.memory_moves();
  EXPECT_EQ(tries.failed(true), Verdict::Again);
  EXPECT_EQ(tries.failed(false), Verdict::Again);
}

TEST(HandoverTries, ALinkThatWasDownExplainsSlowOnes) {
  HandoverTries tries;
  for (int i = 1; i < HandoverTries::kMost; ++i) EXPECT_EQ(tries.failed(true), Verdict::Again);
  tries.link_was_down();
  for (int i = 1; i < HandoverTries::kMost; ++i) EXPECT_EQ(tries.failed(true), Verdict::Again);
  EXPECT_EQ(tries.failed(true), Verdict::TooSlow);
}

TEST(HandoverTries, TenSlowOnesAreToldAsSuchHoweverFarTheyGot) {
  HandoverTries tries;
  for (int i = 1; i < HandoverTries::kMost; ++i) {
    tries.memory_starts();
    EXPECT_EQ(tries.failed(true), Verdict::Again) << i;
  }
  tries.memory_starts();
  EXPECT_EQ(tries.failed(true), Verdict::TooSlow);
}

TEST(HandoverTries, TenWhoseMemoryWasStartedAreEnough) {
  HandoverTries tries;
  for (int i = 1; i < HandoverTries::kMost; ++i) {
    tries.memory_starts();
    EXPECT_EQ(tries.failed(false), Verdict::Again) << i;
    EXPECT_EQ(tries.failed(false), Verdict::Again) << "a mirror that broke before";
  }
  tries.memory_starts();
  EXPECT_EQ(tries.failed(false), Verdict::TooOften);
}

// What is not on stable storage at the worst moment: what may be copied, and not flushed, and
// chunks on their way.
TEST(FlushPlan, APowerCutCostsAtMost5PerCentOf4GiB) {
  const FlushPlan plan = plan_flushes(4_GiB);
  EXPECT_LE((plan.most + 16_MiB).bytes(), (4_GiB).bytes() / 20);
  EXPECT_LE((plan.every).bytes(), (4_GiB).bytes() / 50);
}

TEST(FlushPlan, IsBoundedForLargeAndForSmallDisks) {
  EXPECT_EQ(plan_flushes(65536_GiB), plan_flushes(Length()));
  EXPECT_EQ(plan_flushes(65536_GiB).every, 48_MiB);
  EXPECT_EQ(plan_flushes(1_MiB).every, 8_MiB);
  for (const Length data : {1_MiB, 200_MiB, 4_GiB, 1024_GiB}) {
    EXPECT_GT(plan_flushes(data).most, plan_flushes(data).every)
        << "the copy goes on while it is flushed";
  }
}

}  // namespace
}  // namespace drover::job
