// SPDX-License-Identifier: Apache-2.0
#include "job/copy_pace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

namespace drover::job {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// A guest and a disk: the guest's latency follows from how fast the copy reads.
class World {
 public:
  using Latency = std::function<Duration(double mib_per_second)>;
  World(double operations_per_second, Latency latency)
      : operations_per_second_(operations_per_second), latency_(std::move(latency)) {}

  // A tenth of a second passes. `fastest`: what the disks can do, in MiB/s.
  void step(bool copying, double fastest = 2000) {
    const double limit = static_cast<double>(rate_.bytes()) / kMiB;
    const double rate = !copying ? 0 : rate_ == Length() ? fastest : std::min(limit, fastest);
    last_ = rate;
    now_ += milliseconds(100);
    owed_ += operations_per_second_ / 10;
    const auto done = static_cast<std::uint64_t>(owed_);
    owed_ -= static_cast<double>(done);
    io_.operations += done;
    io_.time += static_cast<Duration::rep>(done) * latency_(rate);
    read_ += Length(static_cast<std::uint64_t>(rate / 10 * kMiB));
    rate_ = pace_.look(now_, io_, read_);
  }
  void steps(int count, bool copying) {
    for (int i = 0; i < count; ++i) step(copying);
  }
  // Mean over the next seconds.
  double mean_rate(int count) {
    double sum = 0;
    for (int i = 0; i < count; ++i) {
      step(true);
      sum += last_;
    }
    return sum / count;
  }
  [[nodiscard]] Length rate() const { return rate_; }
  [[nodiscard]] const CopyPace& pace() const { return pace_; }
  void set(Latency latency) { latency_ = std::move(latency); }

 private:
  static constexpr double kMiB = 1 << 20;
  double operations_per_second_;
  Latency latency_;
  CopyPace pace_;
  Instant now_{};
  memmig::GuestIo io_;
  Length read_;
  Length rate_;
  double owed_ = 0;
  double last_ = 0;
};

// 0.5 ms alone, twice that at `knee` MiB/s.
World::Latency rising(double knee) {
  return [knee](double rate) { return microseconds(500 + static_cast<int>(500 * rate / knee)); };
}

TEST(CopyPaceTest, GuestWhoseLatencyRisesIsGivenWay) {
  World world(1000, rising(200));
  world.steps(5, false);
  world.steps(30, true);
  // Tolerated: 1.5 * 500 us + 300 us, which is what the guest feels at 220 MiB/s.
  EXPECT_NEAR(world.mean_rate(50), 220, 15);
}

TEST(CopyPaceTest, RateDoesNotSwingWhereTheDiskIsAtItsLimit) {
  World world(1000, [](double rate) { return microseconds(rate < 300 ? 500 : 5000); });
  world.steps(5, false);
  world.steps(30, true);
  double slowest = 1e9;
  double fastest = 0;
  for (int i = 0; i < 100; ++i) {
    const double rate = world.mean_rate(1);
    slowest = std::min(slowest, rate);
    fastest = std::max(fastest, rate);
  }
  EXPECT_GT(slowest, 100);
  EXPECT_LT(fastest, 400);
}

TEST(CopyPaceTest, GuestThatAsksRarelyDoesNotHoldTheCopyUp) {
  World world(50, [](double) { return microseconds(500); });
  world.steps(5, false);
  world.steps(40, true);
  EXPECT_GT(world.mean_rate(10), 1000);
}

TEST(CopyPaceTest, GuestThatIsNotDisturbedLetsTheCopyRun) {
  World world(1000, [](double) { return microseconds(500); });
  world.steps(5, false);
  world.steps(40, true);
  EXPECT_GT(world.mean_rate(10), 1500);
}

TEST(CopyPaceTest, DiskThatHangsNowAndThenIsNoReasonToSlowDown) {
  World world(1000, [](double) { return microseconds(500); });
  world.steps(5, false);
  world.steps(40, true);
  double slowest = 1e9;
  for (int i = 0; i < 40; ++i) {
    const int hang = i % 8 == 0 ? 20 : 1;
    world.set([hang](double) { return hang * microseconds(500); });
    slowest = std::min(slowest, world.mean_rate(1));
  }
  EXPECT_GT(slowest, 1500);
}

TEST(CopyPaceTest, HandoverGoesOnAsTheCopyDidButNotSlowly) {
  World idle(0, rising(200));
  idle.steps(20, true);
  EXPECT_EQ(idle.pace().handover(), Length());
  World slow(1000, [](double rate) { return rate > 0 ? milliseconds(100) : microseconds(100); });
  slow.steps(5, false);
  slow.steps(15, true);
  EXPECT_LT(slow.rate(), CopyPace::kLeastInHandover);
  EXPECT_EQ(slow.pace().handover(), CopyPace::kLeastInHandover);
  World fast(1000, rising(200));
  fast.steps(5, false);
  fast.steps(60, true);
  EXPECT_GT(fast.rate(), CopyPace::kLeastInHandover);
  EXPECT_EQ(fast.pace().handover(), fast.rate());
}

TEST(CopyPaceTest, IdleGuestIsNoReasonToWait) {
  World world(2, rising(50));
  world.steps(5, false);
  world.steps(15, true);
  EXPECT_EQ(world.rate(), Length());
}

TEST(CopyPaceTest, GuestThatWakesUpIsGivenWay) {
  World idle(0, rising(200));
  idle.steps(20, true);
  EXPECT_EQ(idle.rate(), Length());
  World world(1000, rising(200));  // never seen alone
  world.steps(60, true);
  EXPECT_LT(world.mean_rate(20), 700);
}

TEST(CopyPaceTest, CopyNeverStopsAltogether) {
  World world(1000, [](double rate) { return rate > 0 ? milliseconds(100) : microseconds(100); });
  world.steps(5, false);
  world.steps(15, true);
  EXPECT_GE(world.rate(), CopyPace::kLeast);
}

TEST(CopyPaceTest, WhatIsNotTheCopysDoingBecomesTheMeasure) {
  World world(1000, rising(200));
  world.steps(5, false);
  world.steps(20, true);
  // The guest begins something heavy: ten times the latency, whatever the copy does.
  world.set([](double rate) { return microseconds(5000 + static_cast<int>(5000 * rate / 200)); });
  world.steps(50, true);
  EXPECT_GE(world.pace().baseline(), microseconds(4000));
  EXPECT_GT(world.mean_rate(30), 50);
}

}  // namespace
}  // namespace drover::job
