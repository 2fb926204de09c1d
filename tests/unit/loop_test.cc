// SPDX-License-Identifier: Apache-2.0
#include "base/loop.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <thread>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/buffer.h"

namespace drover {
namespace {

class LoopTest : public testing::Test {
 protected:
  void SetUp() override {
    auto made = Loop::create();
    ASSERT_TRUE(made.has_value()) << made.error().to_string();
    loop_ = std::move(*made);
  }
  std::unique_ptr<Loop> loop_;
};

TEST_F(LoopTest, PostedTasksRunInOrderFromAnyThread) {
  std::vector<int> seen;
  std::thread other([&] {
    for (int i = 0; i < 100; ++i) loop_->post([&seen, i] { seen.push_back(i); });
    loop_->post([this] { loop_->stop(); });
  });
  loop_->run();
  other.join();
  ASSERT_EQ(seen.size(), 100U);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(seen.at(static_cast<std::size_t>(i)), i);
}

TEST_F(LoopTest, ReadsBackWhatItWrote) {
  const int fd = ::memfd_create("loop_test", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  std::array<std::byte, 6> out{};
  std::memcpy(out.data(), "drover", 6);
  std::array<std::byte, 6> in{};
  loop_->write(fd, out, Offset(10), [&](int written) {
    EXPECT_EQ(written, 6);
    loop_->read(fd, in, Offset(10), [&](int got) {
      EXPECT_EQ(got, 6);
      loop_->stop();
    });
  });
  loop_->run();
  EXPECT_EQ(in, out);
  ::close(fd);
}

TEST_F(LoopTest, TimersRunInTimeOrderAndCancelledOnesNever) {
  std::vector<int> seen;
  const Instant start = now();
  loop_->at(start + std::chrono::milliseconds(4), [&] {
    seen.push_back(2);
    loop_->stop();
  });
  loop_->at(start + std::chrono::milliseconds(2), [&] { seen.push_back(1); });
  const Loop::Handle never = loop_->at(start + std::chrono::milliseconds(1), [&] { seen.push_back(0); });
  loop_->cancel(never);
  loop_->run();
  EXPECT_EQ(seen, (std::vector<int>{1, 2}));
}

TEST_F(LoopTest, ACancelledPollCompletesWithECanceled) {
  std::array<int, 2> sockets{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets.data()), 0);
  int result = 0;
  const Loop::Handle handle = loop_->poll(sockets[0], POLLIN, [&](int value) {
    result = value;
    loop_->stop();
  });
  loop_->post([&] { loop_->cancel(handle); });
  loop_->run();
  EXPECT_EQ(result, -ECANCELED);
  ::close(sockets[0]);
  ::close(sockets[1]);
}

TEST_F(LoopTest, MoreOperationsThanTheRingHoldsAllComplete) {
  const int fd = ::memfd_create("loop_test", MFD_CLOEXEC);
  ASSERT_EQ(::ftruncate(fd, 4096), 0);
  std::array<std::byte, 16> in{};
  int completed = 0;
  constexpr int kMany = 3000;
  for (int i = 0; i < kMany; ++i) {
    loop_->read(fd, in, Offset(0), [&](int got) {
      EXPECT_EQ(got, 16);
      if (++completed == kMany) loop_->stop();
    });
  }
  loop_->run();
  EXPECT_EQ(completed, kMany);
  ::close(fd);
}

TEST_F(LoopTest, DestructionWaitsForOutstandingOperationsAndDropsTheirCallbacks) {
  std::array<int, 2> sockets{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets.data()), 0);
  std::array<std::byte, 16> in{};
  bool called = false;
  loop_->receive(sockets[0], in, [&](int) { called = true; });
  loop_.reset();
  EXPECT_FALSE(called);
  ::close(sockets[0]);
  ::close(sockets[1]);
}

TEST(BufferPool, BuffersLieApartAndOnPages) {
  // More than a slab holds, and of a size that does not divide it.
  const Length size = 1_MiB + 8_KiB;
  BufferPool pool(size, 40);
  std::vector<Buffer> all;
  while (Buffer buffer = pool.try_take()) {
    ASSERT_EQ(buffer.bytes().size(), size.bytes());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.bytes().data()) % 4096, 0U);
    std::ranges::fill(buffer.bytes(), static_cast<std::byte>(all.size()));
    all.push_back(std::move(buffer));
  }
  ASSERT_EQ(all.size(), 40U);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto is_its_own = [&](std::byte b) { return b == static_cast<std::byte>(i); };
    EXPECT_TRUE(std::ranges::all_of(all[i].bytes(), is_its_own)) << i;
  }
}

TEST(BufferPool, RefusesBeyondItsCountAndTellsWhenOneIsBack) {
  BufferPool pool(4_KiB, 2);
  int told = 0;
  pool.on_available([&] { ++told; });
  Buffer first = pool.try_take();
  Buffer second = pool.try_take();
  ASSERT_TRUE(first && second);
  EXPECT_FALSE(pool.try_take());
  Buffer copy = first;
  first.reset();
  EXPECT_EQ(told, 0) << "a copy still holds it";
  copy.reset();
  EXPECT_EQ(told, 1);
  EXPECT_TRUE(pool.try_take());
}

}  // namespace
}  // namespace drover
