// SPDX-License-Identifier: Apache-2.0
#include "mirror/session.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "base/random.h"
#include "mirror/lane_queue.h"

namespace drover::mirror {
namespace {

Hello control_hello() {
  Hello hello;
  hello.kind = ConnectionKind::Control;
  hello.session = "job-1";
  hello.epoch = 3;
  hello.lanes = 4;
  hello.limits = {{1_GiB, 12345_KiB}, 256_KiB};
  hello.silence = std::chrono::milliseconds(700);
  return hello;
}

nlohmann::json as_sent(const Hello& hello) {
  return nlohmann::json::parse(hello_to_json(hello).dump());
}

TEST(HelloTest, ComesBackAsItWasSent) {
  const auto hello = hello_from_json(as_sent(control_hello()));
  ASSERT_TRUE(hello.has_value()) << hello.error().to_string();
  EXPECT_EQ(hello->session, "job-1");
  EXPECT_EQ(hello->epoch, 3U);
  EXPECT_EQ(hello->lanes, 4U);
  EXPECT_EQ(hello->limits.disk_sizes, control_hello().limits.disk_sizes);
  EXPECT_EQ(hello->limits.chunk_size, 256_KiB);
  EXPECT_EQ(hello->silence.count(), 700);
}

TEST(HelloTest, WhatNoSourceSendsIsRefused) {
  const nlohmann::json good = as_sent(control_hello());
  const std::vector<std::pair<const char*, nlohmann::json>> changes = {
      {"kind", "ship"},
      {"epoch", 0U},
      {"epoch", -1},
      {"session", 7U},
      {"lanes", 0U},
      {"lanes", 17U},
      {"chunk_size", 3U << 18},
      {"chunk_size", 2048U},
      {"chunk_size", 2U << 20},
      {"disks", "all"},
      {"disks", {-1}},
      {"disks", {UINT64_MAX}},
      {"disks", std::vector<unsigned>(65, 1U)},
      {"silence_ms", 0U},
      {"session", std::string(100, 'x')}};
  for (const auto& [name, value] : changes) {
    nlohmann::json changed = good;
    changed[name] = value;
    const auto hello = hello_from_json(changed);
    ASSERT_FALSE(hello.has_value()) << name << " " << value;
    EXPECT_EQ(hello.error().code, Code::Protocol);
  }
  for (const auto& [name, value] : good.items()) {
    if (name == "version") continue;
    nlohmann::json without = good;
    without.erase(name);
    EXPECT_FALSE(hello_from_json(without).has_value()) << name;
  }
  Hello memory = control_hello();
  memory.kind = ConnectionKind::Memory;
  for (const std::string& path : {std::string("relative"), std::string(), std::string("/a\0b", 4),
                                  "/" + std::string(107, 'x')}) {
    memory.path = path;
    EXPECT_FALSE(hello_from_json(as_sent(memory)).has_value());
  }
}

TEST(MessageTest, ComesBackFromPiecesOfAnySize) {
  Random random(1);
  MessageReader reader;
  for (int i = 0; i < 200; ++i) {
    const nlohmann::json sent = {{"n", i}, {"text", std::string(random.below(40000), 'x')}};
    const std::string bytes = *encode_message(sent);
    std::optional<std::string> got;
    for (std::size_t at = 0; at < bytes.size();) {
      ASSERT_FALSE(got.has_value());
      const auto space = reader.space();
      ASSERT_FALSE(space.empty());
      const std::size_t count =
          std::min({space.size(), bytes.size() - at, std::size_t{1} + random.below(30000)});
      std::memcpy(space.data(), bytes.data() + at, count);
      at += count;
      auto result = reader.received(count);
      ASSERT_TRUE(result.has_value());
      got = std::move(*result);
    }
    ASSERT_TRUE(got.has_value());
    EXPECT_EQ(*parse_object(*got, "it"), sent);
  }
}

TEST(MessageTest, OversizedAndEmptyOnesAreRefusedByTheirHeader) {
  for (const std::uint32_t length : {0U, 101U, 0xffffffffU}) {
    MessageReader reader(100);
    std::memcpy(reader.space().data(), &length, sizeof length);
    EXPECT_FALSE(reader.received(sizeof length).has_value()) << length;
  }
}

TEST(MessageTest, OnlyObjectsThatDoNotNestDeeplyAreTaken) {
  EXPECT_TRUE(parse_object(R"({"a":[[[{"b":"[[[[[[[[[[[[[[[[[[[[[["}]]]})", "it").has_value());
  for (const std::string& text :
       {std::string(), std::string("[]"), std::string("{"), std::string("{} x"), std::string("nul"),
        std::string("{\"a\":") + std::string(50, '[') + std::string(50, ']') + "}"}) {
    EXPECT_EQ(parse_object(text, "it").error().code, Code::Protocol) << text;
  }
}

TEST(MessageTest, ErrorsKeepTheirCodeAndTheirWords) {
  const Error error{Code::NoSpace, "writing: no space", "make room", true};
  const Error back = error_from_json(nlohmann::json::parse(error_to_json(error).dump()));
  EXPECT_EQ(back.code, error.code);
  EXPECT_EQ(back.message, error.message);
  EXPECT_EQ(back.hint, error.hint);
  EXPECT_TRUE(back.retryable);
  EXPECT_EQ(error_from_json({{"code", "no-such"}}).code, Code::Protocol);
  EXPECT_EQ(error_from_json("x").code, Code::Protocol);
}

TEST(KeyTest, HexComesBack) {
  const LinkKey key = *random_key();
  EXPECT_EQ(*key_from_hex(key_to_hex(key)), key);
  EXPECT_NE(*random_key(), key);
  for (const std::string& hex : {std::string(), std::string(63, 'a'), std::string(64, 'g'),
                                 std::string(64, 'A'), std::string(66, 'a')}) {
    EXPECT_FALSE(key_from_hex(hex).has_value());
  }
}

TEST(SessionIdTest, IsAFileNameWithoutSurprises) {
  for (const char* good : {"a", "job-1", "20260101T000000_web1.x"}) {
    EXPECT_TRUE(check_session_id(good).has_value()) << good;
  }
  for (const std::string& bad : {std::string(), std::string("."), std::string("../x"),
                                 std::string("a/b"), std::string("a b"), std::string(65, 'x')}) {
    EXPECT_FALSE(check_session_id(bad).has_value()) << bad;
  }
}

TEST(LaneDigestTest, DependsOnEveryHeaderAndTheirOrder) {
  std::array<std::byte, kHeaderSize> one{std::byte{1}};
  std::array<std::byte, kHeaderSize> two{std::byte{2}};
  LaneDigest a;
  LaneDigest b;
  a.add(one);
  b.add(two);
  EXPECT_NE(a, b);
  a.add(two);
  b.add(one);
  EXPECT_NE(a, b);
  EXPECT_EQ(a.frames(), 2U);
  EXPECT_EQ(*LaneDigest::from_json(nlohmann::json::parse(a.to_json().dump())), a);
}

// Whatever is pushed, dropped and popped: frames of one chunk come out in their order, each once,
// and a copy that waits is not put off for ever.
TEST(LaneQueueTest, FramesOfAChunkKeepTheirOrder) {
  constexpr Length kChunk = 64_KiB;
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    Random random(seed);
    LaneQueue queue(kChunk);
    std::map<std::pair<std::uint16_t, std::uint64_t>, std::vector<std::uint64_t>> expected;
    const auto forget = [&](std::uint64_t token) {
      for (auto& [chunk, tokens] : expected) std::erase(tokens, token);
    };
    std::uint64_t next = 1;
    std::size_t waiting = 0;
    for (int step = 0; step < 500; ++step) {
      const std::uint64_t what = random.below(10);
      if (what < 6) {
        OutFrame frame;
        frame.type = random.one_in(3)   ? FrameType::Copy
                     : random.one_in(4) ? FrameType::Zero
                                        : FrameType::Write;
        frame.disk = static_cast<std::uint16_t>(random.below(2));
        const std::uint64_t chunk = random.below(4);
        frame.extent = {Offset(chunk * kChunk.bytes() + random.below(100)), Length(30000)};
        frame.token = next++;
        expected[{frame.disk, chunk}].push_back(frame.token);
        queue.push(std::move(frame));
        ++waiting;
      } else if (what < 7 && next > 1) {
        const std::uint64_t token = 1 + random.below(next - 1);
        if (queue.abandon(0, token) || queue.abandon(1, token)) {
          forget(token);
          --waiting;
        }
      } else if (auto frame = queue.pop()) {
        --waiting;
        auto& tokens = expected[{frame->disk, frame->extent.offset.bytes() / kChunk.bytes()}];
        ASSERT_FALSE(tokens.empty());
        EXPECT_EQ(tokens.front(), frame->token) << "seed " << seed;
        tokens.erase(tokens.begin());
      }
      ASSERT_EQ(queue.empty(), waiting == 0);
    }
  }
}

TEST(LaneQueueTest, AWriteOvertakesCopiesOfOtherChunks) {
  LaneQueue queue(1_MiB);
  for (std::uint64_t i = 0; i < 4; ++i) {
    queue.push({.type = FrameType::Copy, .extent = {Offset(i << 20), 1_MiB}, .token = i});
  }
  queue.push({.type = FrameType::Write, .extent = {Offset(9U << 20), 4_KiB}, .token = 10});
  queue.push({.type = FrameType::Write, .extent = {Offset(2U << 20), 4_KiB}, .token = 11});
  std::vector<std::uint64_t> order;
  while (auto frame = queue.pop()) order.push_back(frame->token);
  EXPECT_EQ(order, (std::vector<std::uint64_t>{10, 0, 1, 2, 3, 11}));
}

// Each disk names its frames by itself, and disks share lanes.
TEST(LaneQueueTest, WhatOneDiskAbandonsIsNoFrameOfAnothers) {
  LaneQueue queue(1_MiB);
  queue.push({.disk = 0, .extent = {Offset(0), 4_KiB}, .token = 3});
  queue.push({.disk = 1, .extent = {Offset(0), 4_KiB}, .token = 3});
  EXPECT_FALSE(queue.abandon(2, 3));
  EXPECT_TRUE(queue.abandon(1, 3));
  const auto left = queue.pop();
  ASSERT_TRUE(left);
  EXPECT_EQ(left->disk, 0);
  EXPECT_FALSE(queue.pop());
}

TEST(LaneQueueTest, ABusyGuestDoesNotStopTheCopy) {
  LaneQueue queue(1_MiB);
  queue.push({.type = FrameType::Copy, .extent = {Offset(0), 1_MiB}, .token = 1});
  int writes = 0;
  while (true) {
    queue.push({.type = FrameType::Write, .extent = {Offset(8U << 20), 64_KiB}, .token = 2});
    if (queue.pop()->token == 1) break;
    ASSERT_LT(++writes, 1000);
  }
  EXPECT_GT(writes, 10);
}

}  // namespace
}  // namespace drover::mirror
