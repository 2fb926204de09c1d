// SPDX-License-Identifier: Apache-2.0
#include "job/copy_lead.h"

#include <gtest/gtest.h>

#include <cstdint>

namespace drover::job {
namespace {

using std::chrono::milliseconds;

constexpr std::uint64_t kMiB = 1 << 20;
// MiB that are left when it begins, at a rate.
constexpr std::uint64_t lead_at(std::uint64_t rate) { return rate * (CopyLead::kLead / milliseconds(1)) / 1000; }

// A copy at a rate that may change.
struct World {
  std::uint64_t left = 0;  // MiB
  std::uint64_t copied = 0;
  Instant now{};
  CopyLead lead;

  bool step(std::uint64_t rate) {  // MiB per second
    now += milliseconds(100);
    const std::uint64_t part = std::min(left, rate / 10);
    left -= part;
    copied += part;
    return lead.look(now, Length(left * kMiB), Length(copied * kMiB));
  }
};

TEST(CopyLead, SaysSoAtTheLeadBeforeTheEnd) {
  World world{.left = 10000};
  while (!world.step(1000)) ASSERT_GT(world.left, 0);
  EXPECT_EQ(world.left, lead_at(1000));
}

TEST(CopyLead, SaysNothingAtOnce) {
  World world{.left = 100};
  EXPECT_FALSE(world.lead.look(world.now, Length(100 * kMiB), Length()));
  EXPECT_FALSE(world.step(200));
  EXPECT_TRUE(world.step(200)) << "60 MiB at 200 MiB/s";
}

TEST(CopyLead, GoesByTheLatestRate) {
  World world{.left = 10000};
  for (int i = 0; i < 50; ++i) EXPECT_FALSE(world.step(1000));
  // 5000 left: at this rate 50 s.
  while (world.left > lead_at(100) + 300) EXPECT_FALSE(world.step(100)) << world.left;
  while (world.left > lead_at(100)) (void)world.step(100);
  EXPECT_TRUE(world.step(100));
}

TEST(CopyLead, ACopyThatStandsStillHasNoEnd) {
  World world{.left = 10000};
  while (world.left > lead_at(1000)) (void)world.step(1000);
  for (int i = 0; i < 25; ++i) (void)world.step(0);
  EXPECT_FALSE(world.step(0));
}

TEST(CopyLead, WhatIsComparedAndFoundToDifferIsStillLeft) {
  World world{.left = lead_at(1000)};
  // 700 MiB/s are read, and nothing of it gets less.
  for (int i = 0; i < 30; ++i) {
    world.now += milliseconds(100);
    world.copied += 70;
    EXPECT_FALSE(world.lead.look(world.now, Length(world.left * kMiB), Length(world.copied * kMiB)));
  }
}

TEST(CopyLead, HolesThatAreFoundAreNoRate) {
  World world{.left = 1 << 20};
  for (int i = 0; i < 5; ++i) (void)world.step(100);
  world.left = lead_at(1000);  // the other terabyte is empty
  for (int i = 0; i < 5; ++i) EXPECT_FALSE(world.step(100));
}

TEST(CopyLead, CountersThatBeganAnewAreNoRate) {
  World world{.left = 10000};
  for (int i = 0; i < 20; ++i) (void)world.step(1000);
  world.copied = 0;
  EXPECT_FALSE(world.step(1000));
  while (!world.step(1000)) ASSERT_GT(world.left, 0);
  EXPECT_EQ(world.left, lead_at(1000));
}

}  // namespace
}  // namespace drover::job
