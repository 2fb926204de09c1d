// SPDX-License-Identifier: Apache-2.0
//
// The ways of the link: with what it compresses, and over which of the target's addresses it goes,
// over real TCP and TLS on loopback. Whatever the way, the target holds what was sent.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "mirror/link.h"
#include "tests/contract/link_support.h"

namespace drover::mirror::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr const char* kSession = "job-1";
constexpr Length kChunk = 1_MiB;

class LinkWays : public testing::Test {
 protected:
  LinkWays() : key_(*random_key()) {}

  void start(Length size) {
    disk_ = std::make_unique<ModelDisk>(size, 1);
    ReceiverOptions options;
    options.session = kSession;
    options.key = key_;
    options.jobs_directory = dir_ / "jobs";
    options.linger = kPatience;
    options.create_image = [this](const blockcopy::TargetSpec& spec) {
      return disk_->create(spec);
    };
    options.open_image = [this](const blockcopy::TargetSpec& spec,
                                const blockcopy::ImageIdentity&) {
      return disk_->open_again(spec);
    };
    receiver_ = std::make_unique<TestReceiver>(std::move(options));
  }
  [[nodiscard]] LinkOptions link_options(std::uint16_t port, unsigned lanes = 2) const {
    LinkOptions options;
    options.address = "127.0.0.1";
    options.port = port;
    options.session = kSession;
    options.key = key_;
    options.lanes = lanes;
    options.disk_sizes = {disk_->size()};
    options.retry = {10ms, 50ms};
    options.connect_timeout = 4000ms;
    return options;
  }
  void connect(TestSource& source, const LinkOptions& options) {
    const Status connected = source.connect(options);
    ASSERT_TRUE(connected.has_value()) << connected.error().to_string();
    const nlohmann::json disk = {
        {"path", "/0"}, {"format", "raw"}, {"block_device", true}, {"size", disk_->size().bytes()}};
    const auto reserved = source.link().call({{"op", "reserve"}, {"disks", {disk}}}, kPatience);
    ASSERT_TRUE(reserved.has_value()) << reserved.error().to_string();
  }

  TempDir dir_;
  const LinkKey key_;
  std::unique_ptr<ModelDisk> disk_;
  std::unique_ptr<TestReceiver> receiver_;
};

// About half of it is won.
Bytes compressible(Random& random, std::size_t size) {
  Bytes bytes = random_bytes(random, size);
  for (std::size_t i = 0; i < size; i += 8)
    std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(i), 5, std::byte{65});
  return bytes;
}

TEST_F(LinkWays, CompressionChangesWhileItRunsAndNothingIsLost) {
  constexpr unsigned kLanes = 2;
  start(48_MiB);
  Random random(5);
  Bytes truth = compressible(random, 48U << 20);
  TestSource source;
  LinkOptions options = link_options(receiver_->port(), kLanes);
  options.compression = {.automatic = false};
  ASSERT_NO_FATAL_FAILURE(connect(source, options));
  std::uint64_t token = 0;
  const auto send_all = [&](const char* with) {
    source.link().set_compression(*parse_compression(with));
    for (std::uint64_t chunk = 0; chunk < 48; ++chunk) {
      const auto lane = static_cast<std::uint32_t>(chunk % kLanes);
      source.copy(lane, 0, truth, {Offset(chunk << 20), kChunk}, false, ++token);
      const Extent written{Offset((chunk << 20) + random.below(4096)),
                           Length(1 + random.below(600000))};
      const Bytes fresh = compressible(random, written.length.bytes());
      std::ranges::copy(fresh, truth.begin() + static_cast<std::ptrdiff_t>(written.offset.bytes()));
      source.write(lane, 0, truth, written, ++token);
    }
    EXPECT_TRUE(source.wait_answers());
  };
  send_all("none");
  EXPECT_EQ(source.link().counters().bytes_saved, 0U);
  EXPECT_EQ(encoding_name(source.link().counters().encoding), "none");
  std::uint64_t saved = 0;
  for (const char* with : {"lz4", "zstd:1", "zstd:6"}) {
    send_all(with);
    EXPECT_GT(source.link().counters().bytes_saved, saved + (10U << 20)) << with;
    saved = source.link().counters().bytes_saved;
  }
  EXPECT_EQ(encoding_name(source.link().counters().encoding), "zstd:6");
  send_all("none");
  EXPECT_EQ(source.link().counters().bytes_saved, saved);
  EXPECT_EQ(encoding_name(source.link().counters().encoding), "none");
  send_all("auto");
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  EXPECT_TRUE(disk_->bytes() == truth);
}

TEST_F(LinkWays, ASlowWireIsCompressedForByItself) {
  start(128_MiB);
  Random random(6);
  const Bytes truth = compressible(random, 128U << 20);
  Network slow(receiver_->port(), {.rate = 24U << 20});
  TestSource source(16);
  ASSERT_NO_FATAL_FAILURE(connect(source, link_options(slow.port())));
  EXPECT_TRUE(source.deliver(truth, kChunk, 2));
  const LinkCounters counters = source.link().counters();
  EXPECT_NE(encoding_name(counters.encoding), "none");
  EXPECT_GT(counters.bytes_saved, truth.size() / 5);
  EXPECT_LT(counters.bytes_sent + counters.bytes_saved, truth.size() + (1U << 20));
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  EXPECT_TRUE(disk_->bytes() == truth);
}

TEST_F(LinkWays, WhatDoesNotCompressIsSentPlainOverASlowWireToo) {
  start(64_MiB);
  Random random(8);
  const Bytes truth = random_bytes(random, 64U << 20);
  Network slow(receiver_->port(), {.rate = 32U << 20});
  TestSource source(16);
  ASSERT_NO_FATAL_FAILURE(connect(source, link_options(slow.port())));
  EXPECT_TRUE(source.deliver(truth, kChunk, 2));
  EXPECT_EQ(encoding_name(source.link().counters().encoding), "none");
  EXPECT_EQ(source.link().counters().bytes_saved, 0U);
}

// --- several addresses ---

class LinkVia : public LinkWays {
 protected:
  // Two networks to the receiver, at one port of two addresses.
  void make_networks() {
    one_ = std::make_unique<Network>(receiver_->port());
    two_ = std::make_unique<Network>(
        receiver_->port(), Network::Options{.address = "127.0.0.2", .port = one_->port()});
  }
  [[nodiscard]] LinkOptions via_options(unsigned lanes) {
    LinkOptions options = link_options(one_->port(), lanes);
    options.address = "unused.invalid";
    options.via = {"127.0.0.1", "127.0.0.2"};
    options.partly_connected = [this](const std::vector<Error>& silent) {
      const std::lock_guard lock(mutex_);
      told_.push_back(silent.empty() ? "all" : silent.front().message);
    };
    return options;
  }
  [[nodiscard]] std::vector<std::string> told() {
    const std::lock_guard lock(mutex_);
    return told_;
  }

  std::unique_ptr<Network> one_;
  std::unique_ptr<Network> two_;
  std::mutex mutex_;
  std::vector<std::string> told_;
};

TEST_F(LinkVia, LanesAreSpreadOverTheAddresses) {
  start(32_MiB);
  make_networks();
  Random random(9);
  const Bytes truth = random_bytes(random, 32U << 20);
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(connect(source, via_options(5)));
  EXPECT_EQ(one_->connections(), 1U + 3U) << "control and lanes 0, 2, 4";
  EXPECT_EQ(two_->connections(), 2U) << "lanes 1, 3";
  EXPECT_TRUE(source.deliver(truth, kChunk, 5));
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  EXPECT_TRUE(disk_->bytes() == truth);
  EXPECT_THAT(told(), IsEmpty());
}

TEST_F(LinkVia, AnAddressThatDoesNotAnswerIsLeftOutAndTriedAgainLater) {
  start(64_MiB);
  make_networks();
  Random random(10);
  const Bytes truth = random_bytes(random, 64U << 20);
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(connect(source, via_options(2)));
  const std::size_t before = one_->connections();
  // The second network is gone: the link goes on over the first.
  two_->stall_all();
  one_->cut(0);
  ASSERT_TRUE(source.wait_up(1));
  ASSERT_THAT(told(), ElementsAre(HasSubstr("127.0.0.2")));
  EXPECT_EQ(one_->connections(), before + 3);
  EXPECT_TRUE(source.deliver(truth, kChunk, 2));
  // It is back: a later reconnect takes it again, and none happens for its sake.
  two_->heal();
  EXPECT_TRUE(source.deliver(truth, kChunk, 2));
  EXPECT_EQ(source.downs().size(), 1U);
  const std::size_t then = two_->connections();
  one_->cut(before);  // the control connection
  ASSERT_TRUE(source.wait_up(2));
  EXPECT_EQ(two_->connections(), then + 1);
  EXPECT_THAT(told(), ElementsAre(HasSubstr("127.0.0.2"), "all"));
  ASSERT_TRUE(source.link().barrier(kPatience).has_value());
  EXPECT_TRUE(disk_->bytes() == truth);
}

TEST_F(LinkVia, WithoutItsFirstAddressTheControlConnectionUsesTheNext) {
  start(1_MiB);
  make_networks();
  one_->stall_all();
  TestSource source;
  ASSERT_NO_FATAL_FAILURE(connect(source, via_options(3)));
  EXPECT_EQ(two_->connections(), 4U);
  EXPECT_THAT(told(), ElementsAre(HasSubstr("127.0.0.1")));
}

TEST_F(LinkVia, WhereNoneAnswersTheFirstOnesErrorIsTold) {
  start(1_MiB);
  make_networks();
  LinkOptions options = via_options(2);
  one_.reset();
  two_.reset();
  TestSource source;
  const Status connected = source.connect(options);
  ASSERT_FALSE(connected.has_value());
  EXPECT_EQ(connected.error().code, Code::Unreachable);
  EXPECT_THAT(connected.error().message, HasSubstr("127.0.0.1"));
  options.via = {"127.0.0.1", "127.0.0.1"};
  EXPECT_EQ(source.connect(options).error().code, Code::InvalidArgument);
}

}  // namespace
}  // namespace drover::mirror::test
