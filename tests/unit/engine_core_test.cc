// SPDX-License-Identifier: Apache-2.0
//
// What EngineCore decides by itself: what copies and comparisons are charged, how many are under way, when too much is
// not flushed, and when the guest's memory may pass. Time is virtual. The rest of it is the simulation's business
// (tests/sim/move_sim.h).
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
    if (holds_) return held_.push_back(std::move(done));
    loop_.post([done = std::move(done)] { done({}); });
  }
  // From now on reads take until release().
  void hold() { holds_ = true; }
  [[nodiscard]] std::size_t held() const { return held_.size(); }
  void release() {
    holds_ = false;
    for (blockcopy::Done& done : std::exchange(held_, {})) loop_.post([done = std::move(done)] { done({}); });
  }
  void extents(Extent range, blockcopy::ExtentsDone done) override {
    loop_.post([range, done = std::move(done)] {
      done(std::vector{blockcopy::MappedExtent{range, true}});
    });
  }

 private:
  Loop& loop_;
  Length size_;
  bool holds_ = false;
  std::vector<blockcopy::Done> held_;
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
  void let_memory_pass(bool pass) override { memory_passes_ = pass; }
  [[nodiscard]] bool memory_passes() const { return memory_passes_; }
  void stop_relay() override {}
  void set_compression(const Compression&) override {}
  [[nodiscard]] LinkCounters counters() const override { return {}; }

 private:
  Loop& loop_;
  Answers& answers_;
  bool memory_passes_ = false;
};

class EngineCoreTest : public testing::Test {
 protected:
  static constexpr Length kSize = 100_MiB;

  void start(const MirrorEngine::Options& options) {
    MirrorEngine::Events events;
    events.all_copied = [](bool) {};
    core_ = std::make_unique<EngineCore>(loop_, buffers_, options, std::move(events));
    auto link = std::make_unique<PerfectLink>(loop_, core_->answers());
    link_ = link.get();
    core_->use(std::move(link), 1);
    EngineCore::Disk disk;
    disk.name = "vda";
    disk.size = kSize;
    auto reader = std::make_unique<Zeroes>(loop_, kSize);
    reader_ = reader.get();
    disk.reader = std::move(reader);
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
  PerfectLink* link_ = nullptr;  // core_'s
  Zeroes* reader_ = nullptr;     // likewise
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

TEST_F(EngineCoreTest, MoreChunksAreUnderWayWhereTheGuestNeedsNoRoom) {
  ASSERT_NO_FATAL_FAILURE(start({}));
  reader_->hold();
  core_->start();
  loop_.run_for(10ms);
  EXPECT_EQ(reader_->held(), MirrorEngine::kMaxCopies) << "nobody has said how the guest fares";
  core_->set_read_rate(Length());
  loop_.run_for(10ms);
  EXPECT_EQ(reader_->held(), MirrorEngine::kMaxCopiesUnlimited);
  reader_->release();
  loop_.run_for(10ms);
  EXPECT_EQ(left(), Length());
}

TEST_F(EngineCoreTest, AsManyAsEverAreUnderWayWhereTheCopyIsLimited) {
  ASSERT_NO_FATAL_FAILURE(start({}));
  reader_->hold();
  core_->set_read_rate(Length());
  core_->set_bandwidth(1_GiB);
  core_->start();
  loop_.run_for(1s);
  EXPECT_EQ(reader_->held(), MirrorEngine::kMaxCopies);
  core_->set_bandwidth(Length());
  loop_.run_for(1s);
  EXPECT_EQ(reader_->held(), MirrorEngine::kMaxCopiesUnlimited);
  reader_->release();
  loop_.run_for(1s);
  EXPECT_EQ(left(), Length());
}

TEST_F(EngineCoreTest, AsManyAsEverAreUnderWayWhereTheGuestIsGivenWay) {
  ASSERT_NO_FATAL_FAILURE(start({}));
  reader_->hold();
  core_->set_read_rate(1_GiB);
  core_->start();
  loop_.run_for(1s);
  EXPECT_EQ(reader_->held(), MirrorEngine::kMaxCopies);
  reader_->release();
  loop_.run_for(1s);
  EXPECT_EQ(left(), Length());
}

TEST_F(EngineCoreTest, MemoryPassesOnlyInStrictModeWhenNothingIsLeft) {
  ASSERT_NO_FATAL_FAILURE(start({}));
  core_->start();
  loop_.run_for(10ms);
  ASSERT_EQ(left(), Length());
  EXPECT_FALSE(link_->memory_passes()) << "the next write need not be forwarded";
  reader_->hold();
  core_->mark_pending(0, {{Offset(), 1_MiB}});
  ASSERT_TRUE(core_->enter_strict());
  loop_.run_for(10ms);
  EXPECT_FALSE(link_->memory_passes()) << "a chunk is left";
  reader_->release();
  loop_.run_for(10ms);
  EXPECT_TRUE(link_->memory_passes());
  core_->leave_strict();
  loop_.run_for(10ms);
  EXPECT_FALSE(link_->memory_passes());
}

}  // namespace
}  // namespace drover::mirror
