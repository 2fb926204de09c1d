// SPDX-License-Identifier: Apache-2.0
//
// What EngineCore decides by itself: what copies and comparisons are charged, and when too much is
// not flushed. Time is virtual. The rest of it is the simulation's business (tests/sim/move_sim.h).
#include "mirror/engine_core.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/fakes/loop_without_io.h"

namespace drover::mirror {
namespace {

using namespace std::chrono_literals;

// Timers and posted tasks only.
class VirtualLoop final : public fakes::LoopWithoutIo {
 public:
  void post(Task task) override { (void)at(now_, std::move(task)); }
  Handle at(Instant when, Task task) override {
    due_.emplace(std::pair(when, ++last_), std::move(task));
    return last_;
  }
  void cancel(Handle handle) override {
    std::erase_if(due_, [&](const auto& one) { return one.first.second == handle; });
  }
  [[nodiscard]] Instant now() const override { return now_; }
  void run_for(Duration time) {
    const Instant end = now_ + time;
    while (!due_.empty() && due_.begin()->first.first <= end) {
      now_ = std::max(now_, due_.begin()->first.first);
      const Task task = std::move(due_.begin()->second);
      due_.erase(due_.begin());
      task();
    }
    now_ = end;
  }

 private:
  Instant now_{1000s};
  Handle last_ = 0;
  std::map<std::pair<Instant, Handle>, Task> due_;
};

class Zeroes final : public blockcopy::ImageReader {
 public:
  Zeroes(Loop& loop, Length size) : loop_(loop), size_(size) {}
  [[nodiscard]] Length size() const override { return size_; }
  [[nodiscard]] Length alignment() const override { return Length(512); }
  void read(Offset, std::span<std::byte>, blockcopy::Done done) override {
    loop_.post([done = std::move(done)] { done({}); });
  }
  void extents(Extent range, blockcopy::ExtentsDone done) override {
    loop_.post([range, done = std::move(done)] {
      done(std::vector{blockcopy::MappedExtent{range, true}});
    });
  }

 private:
  Loop& loop_;
  Length size_;
};

// Each frame is applied, and each comparison finds what it expects, at once.
class PerfectLink final : public Link {
 public:
  PerfectLink(Loop& loop, Answers& answers) : loop_(loop), answers_(answers) {}
  [[nodiscard]] std::uint32_t count() const override { return 1; }
  void send(std::uint32_t lane, OutFrame frame) override {
    loop_.post([this, lane, disk = frame.disk, token = frame.token] {
      answers_.applied(lane, disk, token);
    });
  }
  bool abandon(std::uint32_t, std::uint16_t, std::uint64_t) override { return false; }
  Result<nlohmann::json> call(const nlohmann::json&, std::chrono::milliseconds) override {
    return nlohmann::json();
  }
  void use_filter(std::shared_ptr<const PieceFilter>) override {}
  Result<BarrierTimes> barrier(std::chrono::milliseconds) override { return {}; }
  Status start_relay(const RelayOptions&) override { return {}; }
  void let_memory_pass(bool) override {}
  void stop_relay() override {}
  void set_compression(const Compression&) override {}
  [[nodiscard]] LinkCounters counters() const override { return {}; }

 private:
  Loop& loop_;
  Answers& answers_;
};

class EngineCoreTest : public testing::Test {
 protected:
  static constexpr Length kSize = 100_MiB;

  void start(const MirrorEngine::Options& options) {
    MirrorEngine::Events events;
    events.all_copied = [](bool) {};
    core_ = std::make_unique<EngineCore>(loop_, buffers_, options, std::move(events));
    core_->use(std::make_unique<PerfectLink>(loop_, core_->answers()), 1);
    EngineCore::Disk disk;
    disk.name = "vda";
    disk.size = kSize;
    disk.reader = std::make_unique<Zeroes>(loop_, kSize);
    ASSERT_TRUE(core_->add_disk(std::move(disk), nullptr));
  }
  void TearDown() override {
    core_->end([] {});
    loop_.run_for(1s);
  }
  [[nodiscard]] Length left() const { return core_->status().disks.at(0).left; }
  [[nodiscard]] Length to_verify() const { return core_->status().disks.at(0).to_verify; }
  void flush() { core_->flush_ended(core_->flush_begin(), true); }

  VirtualLoop loop_;
  EngineBuffers buffers_{1_MiB};
  std::unique_ptr<EngineCore> core_;
};

TEST_F(EngineCoreTest, AComparisonIsChargedItsHashes) {
  MirrorEngine::Options options;
  options.bandwidth = 10_MiB;
  ASSERT_NO_FATAL_FAILURE(start(options));
  core_->set_read_rate(Length());
  core_->start();
  loop_.run_for(5s);
  EXPECT_GT(left(), 40_MiB) << "copying is as slow as was asked for";
  loop_.run_for(6s);
  EXPECT_EQ(left(), Length());
  flush();
  core_->verify();
  loop_.run_for(200ms);
  EXPECT_EQ(to_verify(), Length()) << "0.4 MiB of hashes take 40 ms at 10 MiB/s";
}

TEST_F(EngineCoreTest, WhatIsReadToBeComparedKeepsToTheReadRate) {
  ASSERT_NO_FATAL_FAILURE(start({}));
  core_->start();
  loop_.run_for(1s);
  ASSERT_EQ(left(), Length());
  flush();
  core_->set_read_rate(10_MiB);
  core_->verify();
  loop_.run_for(5s);
  EXPECT_GT(to_verify(), 40_MiB);
  loop_.run_for(6s);
  EXPECT_EQ(to_verify(), Length());
}

TEST_F(EngineCoreTest, WhereNobodySetsAReadRateAComparisonIsChargedWhatItReads) {
  ASSERT_NO_FATAL_FAILURE(start({}));
  core_->start();
  loop_.run_for(1s);
  flush();
  core_->set_bandwidth(10_MiB);
  core_->verify();
  loop_.run_for(5s);
  EXPECT_GT(to_verify(), 40_MiB);
}

TEST_F(EngineCoreTest, TheCopyWaitsForAFlushWhenTooMuchIsNotFlushed) {
  MirrorEngine::Options options;
  options.max_unflushed = 24_MiB;
  ASSERT_NO_FATAL_FAILURE(start(options));
  core_->start();
  loop_.run_for(10s);
  EXPECT_EQ(left(), kSize - 24_MiB);
  const auto ids = core_->flush_begin();
  loop_.run_for(10s);
  EXPECT_EQ(left(), kSize - 24_MiB) << "it is under way";
  core_->flush_ended(ids, false);
  loop_.run_for(10s);
  EXPECT_EQ(left(), kSize - 24_MiB) << "and failed";
  flush();
  loop_.run_for(10s);
  EXPECT_EQ(left(), kSize - 48_MiB);
  // In the handover nothing waits for a flush but the barrier.
  ASSERT_TRUE(core_->enter_strict());
  loop_.run_for(1s);
  EXPECT_EQ(left(), Length());
}

}  // namespace
}  // namespace drover::mirror
