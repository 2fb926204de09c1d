// SPDX-License-Identifier: Apache-2.0
//
// Blocks of memory: their format, what hostile ones do, and when they are compressed.
#include "mirror/memory_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace drover::mirror {
namespace {

using namespace std::chrono_literals;

std::vector<std::byte> memory_like(std::size_t size, bool shrinks) {
  std::vector<std::byte> out(size);
  std::uint64_t random = 7;
  for (std::size_t i = 0; i < size; ++i) {
    random = random * 6364136223846793005ULL + 1442695040888963407ULL;
    out[i] = static_cast<std::byte>(shrinks && i % 64 > 8 ? 0 : random >> 56);
  }
  return out;
}

// Feeds `stream` in pieces of `piece` bytes; what came of it.
Result<std::vector<std::byte>> decode(const std::vector<std::byte>& stream, std::size_t piece) {
  MemoryDecoder decoder;
  std::vector<std::byte> out;
  for (std::size_t at = 0; at < stream.size();) {
    const auto space = decoder.space();
    const std::size_t count = std::min({space.size(), piece, stream.size() - at});
    std::copy_n(stream.begin() + static_cast<std::ptrdiff_t>(at), count, space.begin());
    DROVER_TRY(decoder.received(count));
    at += count;
    out.insert(out.end(), decoder.decoded().begin(), decoder.decoded().end());
    decoder.drop(decoder.decoded().size());
  }
  if (!decoder.between_blocks()) return fail(Code::Protocol, "ends within a block");
  return out;
}

TEST(MemoryBlocks, ComeOutAsTheyWentIn) {
  for (const Encoding encoding : {Encoding::Plain, Encoding::Lz4, Encoding::Zstd}) {
    for (const bool shrinks : {true, false}) {
      for (const std::size_t size :
           {std::size_t{1}, std::size_t{2}, std::size_t{4097}, kMemoryBlock}) {
        const auto memory = memory_like(size, shrinks);
        MemoryEncoder encoder;
        std::vector<std::byte> stream;
        for (int i = 0; i < 3; ++i) {
          const auto block = encoder.encode(memory, {encoding, 0});
          EXPECT_LE(block.size(), kMemoryHeader + size) << "a block never grows";
          stream.insert(stream.end(), block.begin(), block.end());
        }
        for (const std::size_t piece : {std::size_t{3}, std::size_t{4096}, stream.size()}) {
          const auto out = decode(stream, piece);
          ASSERT_TRUE(out.has_value()) << out.error().to_string();
          ASSERT_EQ(out->size(), 3 * size);
          for (std::size_t i = 0; i < 3; ++i) {
            EXPECT_EQ(std::memcmp(out->data() + i * size, memory.data(), size), 0);
          }
        }
      }
    }
  }
}

TEST(MemoryBlocks, ShrinkWhereTheMemoryDoes) {
  MemoryEncoder encoder;
  const auto memory = memory_like(kMemoryBlock, true);
  EXPECT_LT(encoder.encode(memory, {Encoding::Lz4, 0}).size(), kMemoryBlock / 2);
  EXPECT_LT(encoder.encode(memory, {Encoding::Zstd, 3}).size(), kMemoryBlock / 2);
}

std::vector<std::byte> block(std::uint32_t raw, std::uint32_t encoding, std::uint32_t stored,
                             std::size_t follows) {
  std::vector<std::byte> out(kMemoryHeader + follows);
  const std::uint32_t first = raw | encoding << 24;
  std::memcpy(out.data(), &first, 4);
  std::memcpy(out.data() + 4, &stored, 4);
  return out;
}

TEST(MemoryBlocks, ThatMakeNoSenseAreRefused) {
  constexpr auto kMost = static_cast<std::uint32_t>(kMemoryBlock);
  const auto refused = [](const std::vector<std::byte>& stream) {
    const auto out = decode(stream, stream.size());
    return !out && out.error().code == Code::Protocol;
  };
  EXPECT_TRUE(refused(block(0, 0, 0, 0))) << "of nothing";
  EXPECT_TRUE(refused(block(kMost + 1, 0, kMost + 1, 0))) << "too large";
  EXPECT_TRUE(refused(block(100, 3, 50, 0))) << "of an encoding that there is not";
  EXPECT_TRUE(refused(block(100, 0, 99, 0))) << "plain, of two lengths";
  EXPECT_TRUE(refused(block(100, 1, 100, 0))) << "compressed to as much";
  EXPECT_TRUE(refused(block(100, 2, 0xFFFFFFFF, 0)));
  EXPECT_TRUE(refused(block(100, 1, 50, 50))) << "lz4 that is none";
  EXPECT_TRUE(refused(block(100, 2, 50, 50))) << "zstd that is none";
  EXPECT_TRUE(refused(block(100, 0, 100, 99))) << "cut short";
  EXPECT_TRUE(refused(std::vector<std::byte>(5))) << "cut short in its header";
}

TEST(MemoryBlocks, ThatDecompressToMoreOrLessThanTheySayAreRefused) {
  MemoryEncoder encoder;
  for (const Encoding encoding : {Encoding::Lz4, Encoding::Zstd}) {
    const auto made = encoder.encode(memory_like(8192, true), {encoding, 0});
    for (const std::uint32_t claimed : {8191U, 8193U, 200000U}) {
      std::vector<std::byte> stream(made.begin(), made.end());
      const std::uint32_t first = claimed | static_cast<std::uint32_t>(encoding) << 24;
      std::memcpy(stream.data(), &first, 4);
      const auto out = decode(stream, stream.size());
      ASSERT_FALSE(out.has_value());
      EXPECT_EQ(out.error().code, Code::Protocol);
    }
  }
}

// --- the choice ---

// A connection whose wire takes `wire` bytes per second, of memory that shrinks to `ratio` at `cpu`
// bytes per second.
class Connection {
 public:
  struct World {
    double wire = 10e6;
    double ratio = 0.25;
    double cpu = 300e6;
    double source = 1e12;  // what QEMU has to send
    double starved = 0;    // the part of its waiting that is for a CPU
  };
  World world;
  CompressionChoice choice{Compression{}};

  // Sends for so long; the share of it that was compressed.
  double run(Duration time) {
    const Instant end = now_ + time;
    double all = 0;
    double compressed = 0;
    while (now_ < end) {
      const bool compress = choice.next().encoding != Encoding::Plain;
      const double size = kMemoryBlock;
      const double waits = size / world.source;
      const double works = compress ? size / world.cpu : 0;
      const double on_wire = (compress ? size * world.ratio : size) / world.wire;
      // The wire works while QEMU and the CPU do; only what it takes longer is waited for.
      const double blocked = std::max(0.0, on_wire - works - waits);
      now_ += seconds(waits + works + blocked);
      choice.sent(now_, kMemoryBlock,
                  {seconds(blocked), seconds(works), seconds(blocked * world.starved)});
      all += size;
      if (compress) compressed += size;
    }
    return compressed / all;
  }

 private:
  static Duration seconds(double s) {
    return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(s));
  }
  Instant now_ = Instant() + 1h;
};

TEST(CompressionChoice, ASlowWireIsHelped) {
  Connection connection;
  connection.run(2s);
  EXPECT_GT(connection.run(30s), 0.9);
  EXPECT_EQ(connection.choice.next().encoding, Encoding::Zstd);
}

TEST(CompressionChoice, AFasterWireGetsTheFasterMethod) {
  Connection connection;
  connection.world.wire = 120e6;
  connection.world.cpu = 800e6;
  connection.run(2s);
  EXPECT_GT(connection.run(30s), 0.9);
  EXPECT_EQ(connection.choice.next().encoding, Encoding::Lz4);
}

TEST(CompressionChoice, WhereTheCpuIsSlowerThanTheWireNothingIsCompressed) {
  Connection connection;
  connection.world.wire = 1e9;
  connection.world.cpu = 300e6;
  connection.run(30s);
  EXPECT_LT(connection.run(60s), 0.02);
}

TEST(CompressionChoice, MemoryThatDoesNotShrinkIsSentAsItIs) {
  Connection connection;
  connection.world.ratio = 1.0;
  connection.run(30s);
  EXPECT_LT(connection.run(60s), 0.05);
  connection.world.ratio = 0.2;
  connection.run(30s);
  EXPECT_GT(connection.run(30s), 0.9) << "what comes later may shrink";
}

TEST(CompressionChoice, AWireThatHasRoomIsLeftAlone) {
  Connection connection;
  connection.world.source = 5e6;
  EXPECT_EQ(connection.run(60s), 0.0);
}

TEST(CompressionChoice, AWireThatBecomesFastIsNoticed) {
  Connection connection;
  connection.run(20s);
  connection.world.wire = 2e9;
  connection.run(15s);
  EXPECT_LT(connection.run(60s), 0.02);
}

TEST(CompressionChoice, WhereThreadsWaitForACpuNothingIsCompressed) {
  Connection connection;
  connection.world.starved = 0.3;
  EXPECT_EQ(connection.run(60s), 0.0);
  connection.world.starved = 0;
  connection.run(2s);
  EXPECT_GT(connection.run(9s), 0.9);
  connection.world.starved = 5;  // what it compresses is waited for, too
  connection.run(2s);
  EXPECT_LT(connection.run(60s), 0.02);
}

TEST(CompressionChoice, OneThatWasAskedForByNameIsKept) {
  CompressionChoice named(*parse_compression("zstd:5"));
  EXPECT_EQ(named.next().encoding, Encoding::Zstd);
  EXPECT_EQ(named.next().level, 5);
  CompressionChoice none(*parse_compression("none"));
  for (int i = 0; i < 100; ++i) none.sent(Instant() + 1h + i * 100ms, 1000, {100ms, 0ms, 0ms});
  EXPECT_FALSE(none.compressing());
}

}  // namespace
}  // namespace drover::mirror
