// SPDX-License-Identifier: Apache-2.0
#include "base/subprocess.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <string>
#include <thread>

namespace drover {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

Result<ProcessResult> shell(const std::string& script, const ProcessOptions& options = {}) {
  return run_process({"/bin/sh", "-c", script}, options);
}

bool exists(pid_t pid) { return ::kill(pid, 0) == 0; }

TEST(RunProcess, CapturesBothOutputsAndTheExitCode) {
  const auto result = shell("echo out; echo err >&2; exit 3");
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->exit_code, 3);
  EXPECT_EQ(result->out, "out\n");
  EXPECT_EQ(result->err, "err\n");
  EXPECT_FALSE(result->truncated);
}

TEST(RunProcess, FindsTheProgramInThePathAndUsesNoShell) {
  const auto result = run_process({"printf", "%s|", "a b", "$HOME", "*"});
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->out, "a b|$HOME|*|");
}

TEST(RunProcess, GivesTheInputAndSurvivesAProgramThatReadsNone) {
  const std::string text(std::size_t{3} << 20, 'x');
  auto result = shell("wc -c", {.input = text});
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(std::stoul(result->out), text.size());
  result = shell("true", {.input = text});
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->exit_code, 0);
}

TEST(RunProcess, WithoutInputReadsTheEndOfFile) {
  const auto result = shell("cat");
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->out, "");
}

TEST(RunProcess, DropsOutputBeyondTheLimit) {
  const auto result = shell("head -c 300000 /dev/zero; echo small >&2", {.output_limit = 1000});
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->out.size(), 1000U);
  EXPECT_EQ(result->err, "small\n");
  EXPECT_TRUE(result->truncated);
}

TEST(RunProcess, AddsToTheEnvironmentAndReplacesInIt) {
  ::setenv("DROVER_TEST_KEPT", "kept", 1);
  ::setenv("DROVER_TEST_REPLACED", "old", 1);
  const auto result = shell("echo $DROVER_TEST_KEPT $DROVER_TEST_REPLACED $DROVER_TEST_NEW",
                            {.environment = {"DROVER_TEST_REPLACED=new", "DROVER_TEST_NEW=added"}});
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->out, "kept new added\n");
  EXPECT_STREQ(::getenv("DROVER_TEST_REPLACED"), "old");
}

TEST(RunProcess, SaysWhichProgramIsMissing) {
  auto result = run_process({"drover-no-such-program"});
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().code, Code::NotFound);
  EXPECT_NE(result.error().message.find("drover-no-such-program"), std::string::npos);
  result = run_process({"/nonexistent/program"});
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().code, Code::NotFound);
  result = run_process({"/"});
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().code, Code::Denied);
}

TEST(RunProcess, ReportsADeathBySignalAsShellsDo) {
  const auto result = shell("kill -9 $$");
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->exit_code, 128 + SIGKILL);
}

TEST(RunProcess, StopsAProgramThatTakesTooLong) {
  const auto result = run_process({"sleep", "1000"}, {.timeout = milliseconds(1)});
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().code, Code::Unreachable);
}

TEST(RunProcess, EndsWithTheProgramThoughABackgroundChildHoldsItsOutput) {
  // The background child waits for a pipe of ours, so that it ends with this test.
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  const std::string path = "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(ends[0]);
  const auto result = shell("cat " + path + " & echo done");
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->out, "done\n");
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(RunProcess, InheritsNoDescriptorNoIgnoredAndNoBlockedSignal) {
  const int leaked = ::open("/dev/null", O_RDONLY);  // NOLINT: without CLOEXEC, as a library may
  ASSERT_GE(leaked, 0);
  auto* const before = ::signal(SIGPIPE, SIG_IGN);
  sigset_t blocked;
  sigset_t mask_before;
  ::sigemptyset(&blocked);
  ::sigaddset(&blocked, SIGTERM);
  ::pthread_sigmask(SIG_BLOCK, &blocked, &mask_before);
  const auto result = run_process({"/bin/cat", "/proc/self/status"});
  const auto descriptors = run_process({"/bin/ls", "/proc/self/fd"});
  ::pthread_sigmask(SIG_SETMASK, &mask_before, nullptr);
  ::signal(SIGPIPE, before);
  ::close(leaked);
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_NE(result->out.find("SigIgn:\t0000000000000000"), std::string::npos) << result->out;
  EXPECT_NE(result->out.find("SigBlk:\t0000000000000000"), std::string::npos) << result->out;
  ASSERT_TRUE(descriptors.has_value()) << descriptors.error().to_string();
  EXPECT_EQ(descriptors->out, "0\n1\n2\n3\n") << "3 is the directory that ls reads";
}

TEST(RunProcess, HandsOverTheDescriptorsItWasToldTo) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  const auto result =
      shell("echo through >/proc/self/fd/" + std::to_string(ends[1]), {.descriptors = {ends[1]}});
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(result->exit_code, 0) << result->err;
  EXPECT_NE(::fcntl(ends[1], F_GETFD) & FD_CLOEXEC, 0) << "only the child's copy changes";
  std::array<char, 16> text{};
  EXPECT_EQ(::read(ends[0], text.data(), text.size()), 8);
  EXPECT_STREQ(text.data(), "through\n");
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(RunProcess, WorksOnManyThreadsAtOnce) {
  std::array<std::thread, 4> threads;
  for (std::thread& thread : threads) {
    thread = std::thread([] {
      for (int i = 0; i < 10; ++i) {
        const auto result = shell("cat; exit 7", {.input = std::to_string(i)});
        ASSERT_TRUE(result.has_value()) << result.error().to_string();
        EXPECT_EQ(result->out, std::to_string(i));
        EXPECT_EQ(result->exit_code, 7);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ChildProcessTest, RunsUntilTerminated) {
  auto child = ChildProcess::start({"sleep", "1000"});
  ASSERT_TRUE(child.has_value()) << child.error().to_string();
  EXPECT_TRUE(child->running());
  const auto early = child->wait(milliseconds(0));
  ASSERT_FALSE(early.has_value());
  EXPECT_EQ(early.error().code, Code::Unreachable);
  const auto code = child->terminate(seconds(60));
  ASSERT_TRUE(code.has_value()) << code.error().to_string();
  EXPECT_EQ(*code, 128 + SIGTERM);
  EXPECT_FALSE(child->running());
  EXPECT_FALSE(exists(child->pid()));
  EXPECT_EQ(child->terminate(seconds(60)).value(), 128 + SIGTERM) << "doing it twice is harmless";
}

TEST(ChildProcessTest, KillsWhatIgnoresTheRequestAndSaysSo) {
  std::array<int, 2> in{};
  std::array<int, 2> out{};
  ASSERT_EQ(::pipe2(in.data(), O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(out.data(), O_CLOEXEC), 0);
  auto child = ChildProcess::start({"/bin/sh", "-c", "trap '' TERM; echo r; read line"},
                                   {.input = in[0], .output = out[1]});
  ASSERT_TRUE(child.has_value()) << child.error().to_string();
  char ready = 0;
  ASSERT_EQ(::read(out[0], &ready, 1), 1);
  const auto code = child->terminate(milliseconds(1));
  ASSERT_FALSE(code.has_value());
  EXPECT_EQ(code.error().code, Code::Unreachable);
  EXPECT_FALSE(child->running());
  EXPECT_FALSE(exists(child->pid()));
  for (const int fd : {in[0], in[1], out[0], out[1]}) ::close(fd);
}

TEST(ChildProcessTest, DiesWithItsObject) {
  pid_t pid = -1;
  {
    auto child = ChildProcess::start({"sleep", "1000"});
    ASSERT_TRUE(child.has_value()) << child.error().to_string();
    ChildProcess moved = std::move(*child);
    pid = moved.pid();
    EXPECT_TRUE(moved.running());
  }
  EXPECT_FALSE(exists(pid));
}

TEST(ChildProcessTest, DiesWithTheThreadThatStartedIt) {
  std::optional<ChildProcess> child;
  std::thread starter([&] {
    auto started = ChildProcess::start({"sleep", "1000"});
    ASSERT_TRUE(started.has_value()) << started.error().to_string();
    child.emplace(std::move(*started));
  });
  starter.join();
  ASSERT_TRUE(child.has_value());
  EXPECT_EQ(child->wait(seconds(60)).value(), 128 + SIGKILL);
}

TEST(ChildProcessTest, KeepsABoundedErrorOutputThatNobodyReads) {
  auto child = ChildProcess::start({"/bin/sh", "-c", "echo broken >&2; exit 4"});
  ASSERT_TRUE(child.has_value()) << child.error().to_string();
  EXPECT_EQ(child->wait(seconds(60)).value(), 4);
  EXPECT_EQ(child->error_output(), "broken\n");
  auto chatty = ChildProcess::start({"/bin/sh", "-c", "yes error | head -c 1000000 >&2; exit 0"});
  ASSERT_TRUE(chatty.has_value()) << chatty.error().to_string();
  EXPECT_TRUE(chatty->wait(seconds(60)).has_value());
  EXPECT_LE(chatty->error_output().size(), std::size_t{64} << 10);
  EXPECT_EQ(chatty->error_output().substr(0, 12), "error\nerror\n");
}

TEST(ChildProcessTest, IsGivenItsInputAndOutput) {
  std::array<int, 2> in{};
  std::array<int, 2> out{};
  ASSERT_EQ(::pipe2(in.data(), O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(out.data(), O_CLOEXEC), 0);
  auto child = ChildProcess::start({"cat"}, {.input = in[0], .output = out[1]});
  ASSERT_TRUE(child.has_value()) << child.error().to_string();
  ASSERT_EQ(::write(in[1], "ping", 4), 4);
  std::array<char, 4> answer{};
  ASSERT_EQ(::read(out[0], answer.data(), answer.size()), 4);
  EXPECT_EQ(std::string(answer.data(), answer.size()), "ping");
  ::close(in[0]);
  ::close(in[1]);
  EXPECT_EQ(child->wait(seconds(60)).value(), 0);
  ::close(out[0]);
  ::close(out[1]);
}

}  // namespace
}  // namespace drover
