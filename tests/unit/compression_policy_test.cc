// SPDX-License-Identifier: Apache-2.0
//
// What a lane compresses with, against a model of its thread: encoding and handling cost time, the
// kernel holds some bytes for a wire of a given rate, a source and a target have rates of their
// own.
#include "mirror/compression_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <optional>

#include "base/random.h"
#include "mirror/compression.h"

namespace drover::mirror {
namespace {

using testing::HasSubstr;

constexpr double kChunk = 1 << 20;
constexpr double kKernel = 512 << 10;  // bytes that the kernel takes
constexpr double kPiece = 64 << 10;

// Seconds.
struct World {
  std::array<double, 4> ratio{1, 0.5, 0.4, 0.33};
  std::array<double, 4> encode{0.1e-3, 2e-3, 3e-3, 6e-3};  // a chunk
  double handle = 0.3e-3;  // encryption and sockets, a chunk on the wire
  double wire = 1e9;       // bytes per second
  double source =
      1e12;  // bytes of data per second that come; a lane that is not served queues no more
  double target = 1e12;  // bytes of data per second that are taken there
  double noise = 0.1;    // of a chunk's ratio and costs
  bool busy = false;     // what looks like waiting for the wire is waiting for a processor
};

class Lane {
 public:
  struct Seen {
    double seconds = 0;
    double data = 0;                        // bytes
    std::array<std::uint64_t, 4> chunks{};  // with which encoding
    unsigned changes = 0;                   // of current()
    [[nodiscard]] double goodput() const { return data / seconds; }
    [[nodiscard]] double share(std::size_t step) const {
      std::uint64_t all = 0;
      for (const std::uint64_t count : chunks) all += count;
      return static_cast<double>(chunks.at(step)) / static_cast<double>(all);
    }
  };

  // `fixed`: what is encoded with, whatever the policy says.
  Seen run(const World& world, double length, std::optional<std::size_t> fixed = {}) {
    Seen seen;
    const double end = time_ + length;
    arrives_ = std::max(arrives_, time_);
    while (time_ < end) {
      if (arrives_ > time_) {
        const auto before = static_cast<std::uint64_t>(outstanding_);
        const double waited = pass(world, std::min(arrives_, time_ + 0.05) - time_);
        policy_.starved(duration(waited), before, static_cast<std::uint64_t>(outstanding_));
      } else {
        send_one(world, seen, fixed);
      }
      const EncodeOptions before = policy_.current();
      if (policy_.due(instant())) policy_.look(instant(), static_cast<std::uint64_t>(left_));
      if (encoding_name(before) != encoding_name(policy_.current())) ++seen.changes;
    }
    seen.seconds = time_ - (end - length);
    return seen;
  }
  [[nodiscard]] std::string current() const { return encoding_name(policy_.current()); }
  [[nodiscard]] const CompressionPolicy& policy() const { return policy_; }

 private:
  static Instant at(double seconds) {
    return Instant() + std::chrono::hours(1) + duration(seconds);
  }
  static Duration duration(double seconds) {
    return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
  }
  [[nodiscard]] Instant instant() const { return at(time_); }

  // Bytes per second, if the target takes it.
  [[nodiscard]] double rate_of(const World& world) const {
    return std::min(world.wire, world.target * last_ratio_);
  }
  // Time passes; how much.
  double pass(const World& world, double length) {
    const double moved = std::min(outstanding_, rate_of(world) * length);
    outstanding_ -= moved;
    left_ += moved;
    time_ += length;
    return length;
  }

  void send_one(const World& world, Seen& seen, std::optional<std::size_t> fixed) {
    EncodeOptions with = policy_.choose(instant());
    if (fixed) with = CompressionPolicy::kEncodings.at(*fixed);
    std::size_t step = 0;
    while (encoding_name(CompressionPolicy::kEncodings.at(step)) != encoding_name(with)) ++step;
    const auto vary = [&] {
      return 1 + world.noise * (static_cast<double>(random_.below(2001)) / 1000 - 1);
    };
    const double ratio = step == 0 ? 1 : std::min(1.0, world.ratio.at(step) * vary());
    const double encode = world.encode.at(step) * vary();
    pass(world, encode);
    const double bytes = kChunk * ratio;
    policy_.encoded(with, {static_cast<std::size_t>(kChunk), static_cast<std::size_t>(bytes),
                           duration(encode)});
    ++seen.chunks.at(step);
    last_ratio_ = ratio;
    // Encrypted and given to the kernel in pieces, as there is room.
    for (double waiting = bytes; waiting > 0; waiting -= kPiece) {
      const double piece = std::min(waiting, kPiece);
      pass(world, world.handle * piece / kChunk);
      const double missing = outstanding_ + piece - kKernel;
      if (missing > 0) {
        const Duration waited = duration(pass(world, missing / rate_of(world)));
        policy_.blocked(waited);
        if (world.busy) policy_.delayed(waited);
      }
      outstanding_ += piece;
    }
    seen.data += kChunk;
    arrives_ = std::max(arrives_ + kChunk / world.source, time_ - 4 * kChunk / world.source);
  }

  double time_ = 0;
  double arrives_ = 0;
  double outstanding_ = 0;
  double left_ = 0;
  double last_ratio_ = 1;
  Random random_{7};
  CompressionPolicy policy_{at(0)};
};

double goodput_of(const World& world, std::size_t step) {
  return Lane().run(world, 10, step).goodput();
}
double best_goodput(const World& world) {
  double best = 0;
  for (std::size_t step = 0; step < 4; ++step) best = std::max(best, goodput_of(world, step));
  return best;
}

TEST(CompressionPolicy, ALaneThatNeverWaitsForItsSocketSendsPlain) {
  Lane lane;
  const auto seen = lane.run({.wire = 1e12}, 20);
  EXPECT_EQ(seen.share(0), 1);
}

TEST(CompressionPolicy, WhatTheSourceIsTheLimitOfIsSentPlain) {
  Lane lane;
  const auto seen = lane.run({.wire = 100e6, .source = 40e6}, 20);
  EXPECT_GT(seen.share(0), 0.98);
  EXPECT_EQ(lane.current(), "none");
}

TEST(CompressionPolicy, ASlowWireIsCompressedForTheMost) {
  Lane lane;
  (void)lane.run({.wire = 12e6}, 5);
  EXPECT_EQ(lane.current(), "zstd:3");
  const auto seen = lane.run({.wire = 12e6}, 30);
  EXPECT_GT(seen.goodput(), 0.92 * best_goodput({.wire = 12e6}));
}

TEST(CompressionPolicy, WhatDoesNotCompressCostsNextToNothing) {
  for (const double wire : {12e6, 60e6, 500e6}) {
    const World world{
        .ratio = {1, 1, 1, 1}, .encode = {0.1e-3, 0.3e-3, 1.5e-3, 3e-3}, .wire = wire};
    Lane lane;
    (void)lane.run(world, 5);
    const auto seen = lane.run(world, 60);
    EXPECT_EQ(lane.current(), "none");
    EXPECT_EQ(seen.changes, 0U);
    EXPECT_GT(seen.goodput(), 0.98 * goodput_of(world, 0)) << wire;
    // Tried once a second at most, or once in 64 chunks.
    EXPECT_LE(seen.chunks[1] + seen.chunks[2] + seen.chunks[3], 60 + wire * 60 / kChunk / 50);
  }
}

TEST(CompressionPolicy, DataThatChangesIsNoticed) {
  const World dull{.ratio = {1, 1, 1, 1}, .encode = {0.1e-3, 0.3e-3, 1.5e-3, 3e-3}, .wire = 12e6};
  const World good{.wire = 12e6};
  Lane lane;
  (void)lane.run(dull, 20);
  EXPECT_EQ(lane.current(), "none");
  (void)lane.run(good, 5);
  EXPECT_NE(lane.current(), "none");
  (void)lane.run(dull, 10);
  EXPECT_EQ(lane.current(), "none");
}

TEST(CompressionPolicy, ItFollowsALinkWhoseRateChanges) {
  Lane lane;
  for (int i = 0; i < 3; ++i) {
    (void)lane.run({.wire = 12e6}, 6);
    EXPECT_GT(lane.run({.wire = 12e6}, 6).goodput(), 0.9 * best_goodput({.wire = 12e6})) << i;
    (void)lane.run({.wire = 5e9}, 18);  // held down from an earlier try at most
    EXPECT_EQ(lane.current(), "none") << i;
    EXPECT_GT(lane.run({.wire = 5e9}, 6).goodput(), 0.9 * best_goodput({.wire = 5e9})) << i;
  }
}

// A target that takes no more looks as a slow wire does, until it is tried.
TEST(CompressionPolicy, ATargetThatIsTheLimitIsNotCompressedFor) {
  Lane lane;
  (void)lane.run({.wire = 1e9, .target = 50e6}, 10);
  const auto seen = lane.run({.wire = 1e9, .target = 50e6}, 120);
  EXPECT_GT(seen.share(0), 0.85);
  EXPECT_LE(seen.changes, 8U);
}

// Whatever the wire, the processor and the data are: near the best of all fixed choices, and calm.
TEST(CompressionPolicy, NearTheBestEverywhereAndCalm) {
  for (const double wire : {2e6, 10e6, 30e6, 60e6, 120e6, 250e6, 400e6, 700e6, 1.2e9, 3e9}) {
    for (const double processor : {0.5, 1.0, 2.0, 4.0}) {
      for (const std::array<double, 4>& ratio :
           {std::array{1.0, 1.0, 1.0, 1.0}, std::array{1.0, 0.99, 0.8, 0.78},
            std::array{1.0, 0.6, 0.5, 0.45}, std::array{1.0, 0.3, 0.2, 0.1},
            std::array{1.0, 0.9, 0.89, 0.88}}) {
        World world{.ratio = ratio, .wire = wire};
        for (double& cost : world.encode) cost /= processor;
        world.handle /= processor;
        Lane lane;
        (void)lane.run(world, 30);
        const auto seen = lane.run(world, 60);
        const auto context = testing::Message()
                             << wire << " B/s, processor " << processor << ", ratios "
                             << testing::PrintToString(ratio) << ", at " << lane.current();
        EXPECT_GT(seen.goodput(), 0.85 * best_goodput(world)) << context;
        EXPECT_LE(seen.changes, 16U) << context;
      }
    }
  }
}

// The wire has room again, but the thread is not let to run: what is short is the processor.
TEST(CompressionPolicy, WaitingForAProcessorIsNotWaitingForTheWire) {
  Lane lane;
  const auto seen = lane.run({.wire = 60e6, .busy = true}, 30);
  EXPECT_GT(seen.share(0), 0.9);
  (void)lane.run({.wire = 60e6}, 10);
  EXPECT_NE(lane.current(), "none");
}

TEST(CompressionPolicy, SmallWritesStayPlain) {
  Lane lane;
  EXPECT_EQ(lane.policy().choose_write(1 << 20).encoding, Encoding::Plain)
      << "nothing is known yet";
  (void)lane.run({.wire = 12e6}, 10);
  EXPECT_EQ(lane.policy().choose_write(4096).encoding, Encoding::Plain);
  EXPECT_EQ(lane.policy().choose_write(CompressionPolicy::kLeastWrite).encoding, Encoding::Zstd);
  (void)lane.run({.wire = 1e12}, 20);
  EXPECT_EQ(lane.policy().choose_write(1 << 20).encoding, Encoding::Plain);
}

TEST(CompressionPolicy, NothingToSendIsNothingToLearn) {
  CompressionPolicy policy{Instant()};
  Instant time{};
  for (int i = 0; i < 100; ++i) {
    time += std::chrono::seconds(1);
    policy.starved(std::chrono::seconds(1), 0, 0);
    ASSERT_TRUE(policy.due(time));
    policy.look(time, 0);
  }
  EXPECT_EQ(policy.current().encoding, Encoding::Plain);
}

TEST(Compression, NamesGoThereAndBack) {
  for (const char* name : {"auto", "none", "lz4", "zstd:1", "zstd:3", "zstd:6"}) {
    const auto parsed = parse_compression(name);
    ASSERT_TRUE(parsed) << name;
    EXPECT_EQ(compression_name(*parsed), name);
  }
  EXPECT_EQ(compression_name(*parse_compression("zstd")), "zstd:1");
  for (const char* name : {"", "Auto", "zstd:", "zstd:0", "zstd:7", "zstd:10", "zstd:-1", "zstd:1 ",
                           "lz4:1", "gzip"}) {
    const auto parsed = parse_compression(name);
    ASSERT_FALSE(parsed) << name;
    EXPECT_THAT(parsed.error().hint, HasSubstr("zstd:LEVEL (1 to 6)"));
  }
}

}  // namespace
}  // namespace drover::mirror
