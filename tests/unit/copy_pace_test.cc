// SPDX-License-Identifier: Apache-2.0
#include "job/copy_pace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <vector>

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
    // Requests that take longer than the time between them come as fast as they are answered.
    const double most = 1e9 / static_cast<double>(latency_(rate).count()) * at_once_;
    owed_ += std::min(operations_per_second_, most) / 10;
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
  void ask(double operations_per_second) { operations_per_second_ = operations_per_second; }
  void one_request_at_a_time() { at_once_ = 1; }
  void begin() { pace_.begin(now_, io_); }

 private:
  static constexpr double kMiB = 1 << 20;
  double operations_per_second_;
  double at_once_ = 1e9;
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

// A guest of which the copy goes on for 2 s, and then it begins something heavy for 12 s: ten times the
// latency, whatever the copy does.
World with_a_burst() {
  World world(1000, rising(200));
  world.steps(5, false);
  world.steps(20, true);
  world.set([](double rate) { return microseconds(5000 + static_cast<int>(5000 * rate / 200)); });
  world.steps(120, true);
  return world;
}

TEST(CopyPaceTest, GuestWhoseLatencyRisesIsGivenWay) {
  World world(1000, rising(200));
  world.steps(5, false);
  world.steps(30, true);
  // Tolerated: 1.5 * 500 us + 300 us, which is what the guest feels at 220 MiB/s.
  EXPECT_NEAR(world.mean_rate(50), 220, 15);
}

TEST(CopyPaceTest, RateDoesNotSwingWhereTheDiskIsAtItsLimit) {
  for (const double operations : {1000.0, 200.0, 50.0}) {
    World world(operations, [](double rate) { return microseconds(rate < 300 ? 500 : 5000); });
    world.steps(5, false);
    world.steps(100, true);
    std::vector<double> rates;
    for (int i = 0; i < 1000; ++i) rates.push_back(world.mean_rate(1));
    std::ranges::sort(rates);
    EXPECT_GT(rates[30], 70) << operations;  // those that are spent looking at the guest alone
    EXPECT_LT(rates.back(), 600) << operations;
  }
}

// A disk that reads 180 MiB/s, and a guest that waits for each of its requests.
TEST(CopyPaceTest, GuestThatAsksLittleBecauseItWaitsIsNotTakenForIdle) {
  World world(60, [](double rate) {
    return rate < 90 ? milliseconds(12) : rate < 150 ? milliseconds(20) : milliseconds(40);
  });
  world.one_request_at_a_time();
  world.steps(20, false);
  for (int i = 0; i < 100; ++i) world.step(true, 180);
  EXPECT_GT(world.rate(), Length());
  EXPECT_LT(world.mean_rate(50), 150);
}

TEST(CopyPaceTest, AfterABurstTheGuestIsGivenWayAgain) {
  World world = with_a_burst();
  world.set(rising(200));
  world.steps(100, true);
  EXPECT_NEAR(world.mean_rate(50), 220, 30);
}

TEST(CopyPaceTest, GuestThatAsksRarelyDoesNotHoldTheCopyUp) {
  World world(50, [](double) { return microseconds(500); });
  world.steps(5, false);
  world.steps(40, true);
  EXPECT_GT(world.mean_rate(10), 1000);
}

// 50 requests a second: 1 ms more for each makes it wait for a twentieth of its time.
TEST(CopyPaceTest, GuestThatAsksRarelyMayWaitLonger) {
  World seen(50, rising(1000));  // 1.5 ms at 2000 MiB/s; it may have 1.75
  seen.steps(20, false);
  int limited = 0;
  for (int i = 0; i < 600; ++i) {
    seen.step(true);
    if (seen.rate() != Length()) ++limited;
  }
  EXPECT_LE(limited, 12) << "those that are spent looking at the guest alone";
  World slower(50, rising(400));  // 1.75 ms at 1000 MiB/s
  slower.steps(20, false);
  slower.steps(100, true);
  EXPECT_NEAR(slower.mean_rate(50), 1000, 100);
}

// Alone it keeps its disks busy for 8 % of the time, which is next to nothing, and beside the copy for 12.
TEST(CopyPaceTest, GuestThatIsQuietOnlyWithoutTheCopyIsLookedAtOnce) {
  World world(20, [](double rate) { return milliseconds(rate < 100 ? 4 : 6); });
  world.steps(20, false);
  world.steps(50, true);
  EXPECT_GT(world.mean_rate(600), 1500);
}

// Every 5 s 50 requests within a moment, so that a look at it alone shows nothing.
TEST(CopyPaceTest, GuestOfBurstsIsNotLookedAtAloneAgainAndAgain) {
  World world(0, [](double) { return milliseconds(2); });
  world.steps(20, true);
  double sum = 0;
  for (int burst = 0; burst < 40; ++burst) {
    world.ask(500);
    sum += world.mean_rate(1);
    world.ask(0);
    sum += world.mean_rate(49) * 49;
  }
  EXPECT_GT(sum / 2000, 1350) << "given way to for a moment, not looked at for two of five seconds";
}

// 50 requests a second, and the copy begins after 0.6 s: too few for a window.
TEST(CopyPaceTest, WhatAGuestThatAsksLittleDidBeforeTheCopyIsItsMeasure) {
  for (const bool told : {true, false}) {
    World world(50, [](double rate) { return milliseconds(rate > 0 ? 3 : 2); });
    world.steps(6, false);
    if (told) world.begin();
    bool looked = false;
    for (int i = 0; i < 50; ++i) {
      world.step(true);
      looked |= world.rate() == CopyPace::kLeast;
    }
    EXPECT_EQ(looked, !told) << "at the guest alone";
  }
}

TEST(CopyPaceTest, AHandfulOfRequestsBeforeTheCopyIsNoMeasure) {
  World world(50, [](double rate) { return milliseconds(rate > 0 ? 3 : 2); });
  world.steps(2, false);
  world.begin();
  EXPECT_EQ(world.pace().baseline(), Duration::zero());
}

TEST(CopyPaceTest, GuestThatBeginsToAskMuchIsGivenWay) {
  World world(50, rising(200));
  world.steps(20, false);
  world.steps(50, true);
  EXPECT_GT(world.mean_rate(50), 300);
  world.ask(1000);
  world.steps(50, true);
  EXPECT_NEAR(world.mean_rate(50), 220, 30);
}

TEST(CopyPaceTest, GuestThatHardlyWaitsIsNotLookedAtAlone) {
  World world(50, [](double rate) { return microseconds(rate > 0 ? 900 : 300); });  // never seen alone
  for (int i = 0; i < 600; ++i) {
    world.step(true);
    ASSERT_EQ(world.rate(), Length()) << i;
  }
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
  int slow = 0;
  for (int i = 0; i < 400; ++i) {
    const int hang = i % 8 == 0 ? 20 : 1;
    world.set([hang](double) { return hang * microseconds(500); });
    if (world.mean_rate(1) < 1500) ++slow;
  }
  EXPECT_LE(slow, 8) << "those that are spent looking at the guest alone";
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
  EXPECT_NEAR(world.mean_rate(20), 220, 80);
}

TEST(CopyPaceTest, CopyNeverStopsAltogether) {
  World world(1000, [](double rate) { return rate > 0 ? milliseconds(100) : microseconds(100); });
  world.steps(5, false);
  world.steps(15, true);
  EXPECT_GE(world.rate(), CopyPace::kLeast);
}

TEST(CopyPaceTest, WhatIsNotTheCopysDoingBecomesTheMeasure) {
  World world = with_a_burst();
  EXPECT_GE(world.pace().baseline(), microseconds(4000));
  EXPECT_GT(world.mean_rate(30), 50);
}

}  // namespace
}  // namespace drover::job
