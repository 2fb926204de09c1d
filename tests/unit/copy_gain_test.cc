// SPDX-License-Identifier: Apache-2.0
#include "job/copy_gain.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

namespace drover::job {
namespace {

using Verdict = CopyGain::Verdict;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::int64_t kMiB = 1 << 20;

// A link, a copy, and a guest that makes blocks Pending again.
struct World {
  std::int64_t left = 0;
  std::int64_t link = 25 * kMiB;  // per second
  std::int64_t guest = 0;         // made Pending per second
  std::int64_t most = 0;          // so much the guest writes to at all
  std::int64_t copied = 0;
  Instant now{};
  CopyGain gain;

  Verdict step() {
    now += milliseconds(100);
    const std::int64_t part = std::min(left, link / 10);
    copied += part;
    left -= part;
    left += std::clamp<std::int64_t>(most - left, 0, guest / 10);
    return gain.look(now, Length(static_cast<std::uint64_t>(left)),
                     Length(static_cast<std::uint64_t>(copied)));
  }
  // The first other verdict within `time`.
  Verdict run(seconds time) {
    for (int i = 0; i < time.count() * 10; ++i) {
      if (const Verdict verdict = step(); verdict != Verdict::Gaining) return verdict;
    }
    return Verdict::Gaining;
  }
};

TEST(CopyGainTest, ACopyThatGetsOnIsLeftAlone) {
  World world{.left = 100'000 * kMiB, .guest = 20 * kMiB, .most = 500'000 * kMiB};
  EXPECT_EQ(world.run(seconds(3600)), Verdict::Gaining);
}

TEST(CopyGainTest, AGuestFasterThanTheLinkIsHandedOverWhenThatTakesSeconds) {
  World world{.left = 500 * kMiB, .guest = 100 * kMiB, .most = 600 * kMiB};
  EXPECT_EQ(world.run(seconds(30)), Verdict::HandOver);
  EXPECT_LT(world.now, Instant{} + seconds(25));
}

TEST(CopyGainTest, WhatWouldTakeLongIsRefusedInTheEnd) {
  World world{.left = 50'000 * kMiB, .guest = 100 * kMiB, .most = 50'000 * kMiB};
  EXPECT_EQ(world.run(seconds(30)), Verdict::Waiting);
  Verdict last = Verdict::Waiting;
  while (last == Verdict::Waiting && world.now < Instant{} + CopyGain::kPatience + seconds(30)) {
    last = world.step();
  }
  EXPECT_EQ(last, Verdict::Refuse);
}

TEST(CopyGainTest, AGuestThatCalmsDownIsForgiven) {
  World world{.left = 50'000 * kMiB, .guest = 100 * kMiB, .most = 50'000 * kMiB};
  EXPECT_EQ(world.run(seconds(30)), Verdict::Waiting);
  world.guest = 0;
  for (int i = 0; i < 300; ++i) world.step();
  EXPECT_EQ(world.run(seconds(600)), Verdict::Gaining);
}

TEST(CopyGainTest, AGuestThatRestsNowAndThenIsNotFollowedForEver) {
  World world{.left = 50'000 * kMiB, .most = 50'000 * kMiB};
  Verdict last = Verdict::Gaining;
  for (int i = 0; i < 2 * 600 * 10 && last != Verdict::Refuse; ++i) {
    world.guest = i / 150 % 2 == 0 ? 100 * kMiB : 0;  // 15 s each
    last = world.step();
  }
  EXPECT_EQ(last, Verdict::Refuse);
}

TEST(CopyGainTest, NothingSentSaysNothing) {
  World world{.left = 500 * kMiB, .link = 0, .guest = kMiB, .most = 100'000 * kMiB};
  EXPECT_EQ(world.run(seconds(3600)), Verdict::Gaining) << "the link is down, or so slow";
}

TEST(CopyGainTest, AnOutageBeginsAnew) {
  World world{.left = 500 * kMiB, .guest = 100 * kMiB, .most = 600 * kMiB};
  for (int i = 0; i < 90; ++i) EXPECT_EQ(world.step(), Verdict::Gaining);
  world.gain.reset();
  for (int i = 0; i < 90; ++i) EXPECT_EQ(world.step(), Verdict::Gaining);
}

}  // namespace
}  // namespace drover::job
