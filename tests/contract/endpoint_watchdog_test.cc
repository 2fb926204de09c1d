// SPDX-License-Identifier: Apache-2.0
//
// The watchdog as real processes: a runner that is stopped or killed, a watchdog that is killed.
#include "mirror/endpoint_watchdog.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <string>

namespace drover::mirror {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kEnough{30000};

TEST(Liveness, SilenceIsToldOnceWhenItIsLongerThanTheLimit) {
  const Instant start{};
  Liveness liveness(milliseconds(250), start);
  for (int ms = 50; ms <= 250; ms += 50)
    EXPECT_FALSE(liveness.look(start + milliseconds(ms))) << ms;
  EXPECT_TRUE(liveness.look(start + milliseconds(300)));
  EXPECT_EQ(liveness.silence(), milliseconds(300));
  EXPECT_FALSE(liveness.look(start + milliseconds(350)));
}

TEST(Liveness, ASignOfLifeEndsTheSilence) {
  const Instant start{};
  Liveness liveness(milliseconds(250), start);
  for (int ms = 50; ms <= 5000; ms += 50) {
    if (ms % 250 == 0) liveness.beat(start + milliseconds(ms));
    EXPECT_FALSE(liveness.look(start + milliseconds(ms))) << ms;
  }
  for (int ms = 5050; ms <= 5250; ms += 50) EXPECT_FALSE(liveness.look(start + milliseconds(ms)));
  EXPECT_TRUE(liveness.look(start + milliseconds(5300)));
  liveness.beat(start + milliseconds(5310));
  for (int ms = 5350; ms <= 5550; ms += 50) EXPECT_FALSE(liveness.look(start + milliseconds(ms)));
  EXPECT_TRUE(liveness.look(start + milliseconds(5600)));  // and the next one is told again
}

TEST(Liveness, NobodyIsSilentWhileTheJudgeStandsStill) {
  const Instant start{};
  Liveness liveness(milliseconds(250), start);
  EXPECT_FALSE(liveness.look(start + std::chrono::hours(1)));
  EXPECT_FALSE(liveness.look(start + std::chrono::hours(2)));
  EXPECT_TRUE(liveness.look(start + std::chrono::hours(3)));
}

// Two connections, as of QEMU: [0] is the client's end.
struct Pair {
  Pair() {
    std::array<int, 2> pair{};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()), 0);
    client = UniqueFd(pair[0]);
    server = UniqueFd(pair[1]);
  }
  // Whether the client sees the end within `timeout`.
  [[nodiscard]] bool ends(milliseconds timeout) const {
    pollfd entry{client.get(), POLLIN | POLLRDHUP, 0};
    if (::poll(&entry, 1, static_cast<int>(timeout.count())) != 1) return false;
    char byte = 0;
    return ::recv(client.get(), &byte, 1, MSG_DONTWAIT) == 0;
  }
  UniqueFd client;
  UniqueFd server;
};

class Watched : public testing::Test {
 protected:
  void SetUp() override {
    std::array<int, 2> pipe{};
    ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC), 0);
    output_ = UniqueFd(pipe[0]);
    const UniqueFd theirs(pipe[1]);
    auto started = ChildProcess::start(
        {DROVER_WATCHDOG_HELPER, "runner", std::to_string(watched_.server.get()),
         std::to_string(forgotten_.server.get())},
        {.output = theirs.get(), .descriptors = {watched_.server.get(), forgotten_.server.get()}});
    ASSERT_TRUE(started) << started.error().message;
    runner_.emplace(std::move(*started));
    watched_.server.reset();
    forgotten_.server.reset();
    watchdog_ = next_watchdog();
    ASSERT_GT(watchdog_, 0);
  }

  // The process id that the runner prints next.
  pid_t next_watchdog() {
    std::string line;
    for (char byte = 0;;) {
      pollfd entry{output_.get(), POLLIN, 0};
      if (::poll(&entry, 1, static_cast<int>(kEnough.count())) != 1) return -1;
      if (::read(output_.get(), &byte, 1) != 1) return -1;
      if (byte == '\n') return std::atoi(line.c_str());
      line += byte;
    }
  }

  Pair watched_;
  Pair forgotten_;
  UniqueFd output_;
  std::optional<ChildProcess> runner_;
  pid_t watchdog_ = -1;
};

TEST_F(Watched, AConnectionLivesAsLongAsTheRunnerDoes) {
  EXPECT_FALSE(watched_.ends(5 * EndpointWatchdog::kLimit));
}

TEST_F(Watched, AStoppedRunnerLosesItsConnections) {
  ASSERT_EQ(::kill(runner_->pid(), SIGSTOP), 0);
  EXPECT_TRUE(watched_.ends(kEnough));
  EXPECT_FALSE(forgotten_.ends(milliseconds(0)));
  ASSERT_EQ(::kill(runner_->pid(), SIGCONT), 0);
  EXPECT_FALSE(forgotten_.ends(2 * EndpointWatchdog::kLimit));
  EXPECT_TRUE(runner_->running());
}

TEST_F(Watched, AKilledWatchdogIsReplacedAndKnowsTheConnections) {
  ASSERT_EQ(::kill(watchdog_, SIGKILL), 0);
  const pid_t next = next_watchdog();
  ASSERT_GT(next, 0);
  EXPECT_NE(next, watchdog_);
  EXPECT_FALSE(watched_.ends(milliseconds(0)));
  ASSERT_EQ(::kill(runner_->pid(), SIGSTOP), 0);
  EXPECT_TRUE(watched_.ends(kEnough));
}

TEST_F(Watched, WatchdogsAreReplacedOnlySoOften) {
  for (pid_t pid = watchdog_; pid > 0; pid = next_watchdog()) ASSERT_EQ(::kill(pid, SIGKILL), 0);
  EXPECT_TRUE(runner_->running());
  EXPECT_FALSE(watched_.ends(milliseconds(0)));
}

TEST_F(Watched, AKilledRunnerTakesItsWatchdogAlong) {
  const UniqueFd watchdog(static_cast<int>(::syscall(SYS_pidfd_open, watchdog_, 0)));
  ASSERT_TRUE(watchdog);
  ASSERT_EQ(::kill(runner_->pid(), SIGKILL), 0);
  EXPECT_TRUE(watched_.ends(kEnough));
  pollfd entry{watchdog.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&entry, 1, static_cast<int>(kEnough.count())), 1);
}

TEST(WatchdogCommand, NonsenseIsRefused) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{}, {"0"}, {"-5"}, {"abc"}, {"5x"}, {"5", "6"}}) {
    EXPECT_EQ(run_endpoint_watchdog(arguments), 2);
  }
}

}  // namespace
}  // namespace drover::mirror
