// SPDX-License-Identifier: Apache-2.0
//
// Signals, sent to a drover process of our own (cli_fake_drover.cc): by kill, and by a terminal.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/subprocess.h"
#include "cli/exit_codes.h"
#include "cli/signals.h"
#include "job/control.h"
#include "job/job_store.h"
#include "tests/fakes/job_samples.h"

namespace drover::cli {
namespace {

using std::chrono::seconds;
using ::testing::HasSubstr;

struct Pipe {
  UniqueFd read;
  UniqueFd write;
};

Pipe make_pipe() {
  std::array<int, 2> ends{};
  EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

// Reads until `needle` has come; all of what came so far. Fails the test at the end of the file.
std::string read_until(int fd, const std::string& needle, std::string& so_far) {
  while (so_far.find(needle) == std::string::npos) {
    std::array<char, 4096> piece{};
    const ssize_t count = ::read(fd, piece.data(), piece.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      ADD_FAILURE() << "'" << needle << "' did not come, only: " << so_far;
      break;
    }
    so_far.append(piece.data(), static_cast<std::size_t>(count));
  }
  return so_far;
}

std::string read_rest(int fd) {
  std::string out;
  std::array<char, 4096> piece{};
  for (;;) {
    const ssize_t count = ::read(fd, piece.data(), piece.size());
    if (count <= 0) return out;
    out.append(piece.data(), static_cast<std::size_t>(count));
  }
}

// A move without a terminal.
class Moving {
 public:
  explicit Moving(std::vector<std::string> options) : out_(make_pipe()), release_(make_pipe()) {
    std::vector<std::string> argv = {DROVER_FAKE, "move", "web1", "hostb"};
    argv.insert(argv.end(), options.begin(), options.end());
    auto started = ChildProcess::start(
        argv, {.output = out_.write.get(),
               .environment = {"DROVER_FAKE_RELEASE=" + std::to_string(release_.read.get())},
               .descriptors = {release_.read.get()}});
    if (!started) ADD_FAILURE() << started.error().to_string();
    if (started) child_.emplace(std::move(*started));
    out_.write.reset();
  }
  void signal(int number) { EXPECT_EQ(::kill(child_->pid(), number), 0); }
  void until(const std::string& needle) { read_until(out_.read.get(), needle, text_); }
  void release() { EXPECT_EQ(::write(release_.write.get(), "x", 1), 1); }
  int end() {
    text_ += read_rest(out_.read.get());
    const auto code = child_->wait(seconds(600));
    return code ? *code : -1;
  }
  [[nodiscard]] const std::string& out() const { return text_; }
  [[nodiscard]] std::string err() const { return child_->error_output(); }

 private:
  Pipe out_;
  Pipe release_;
  std::optional<ChildProcess> child_;
  std::string text_;
};

class SignalTest : public ::testing::TestWithParam<int> {};

TEST_P(SignalTest, UndoesTheMoveAndEndsWith130) {
  Moving moving({});
  moving.until("copying disks");
  moving.signal(GetParam());
  moving.until("undoing");
  moving.release();
  EXPECT_EQ(moving.end(), kExitCancelled);
  EXPECT_EQ(moving.err(),
            "drover: interrupted: undoing the move; web1 runs on here. Please wait.\n"
            "drover: cancelled; everything was undone\n");
}
INSTANTIATE_TEST_SUITE_P(Each, SignalTest, ::testing::Values(SIGINT, SIGTERM, SIGHUP, SIGQUIT));

TEST(Signals, TheSecondOnlySaysWhatItWaitsFor) {
  Moving moving({"--json"});
  moving.until("copy");
  moving.signal(SIGINT);
  moving.until("the helper is ");
  moving.signal(SIGINT);
  moving.until("still undoing, waiting for the test");
  moving.signal(SIGTERM);
  moving.until("stopping now would leave things behind\"}\n");
  moving.release();
  EXPECT_EQ(moving.end(), kExitCancelled);
  // Standard output is JSON and nothing else.
  std::vector<std::string> events;
  std::size_t start = 0;
  while (start < moving.out().size()) {
    const std::size_t end = moving.out().find('\n', start);
    ASSERT_NE(end, std::string::npos);
    events.push_back(nlohmann::json::parse(moving.out().substr(start, end - start)).at("event"));
    start = end + 1;
  }
  ASSERT_GE(events.size(), 6U);
  EXPECT_EQ(events.front(), "plan");
  EXPECT_EQ(events.back(), "error");
}

TEST(Signals, AReaderThatWentAwayDoesNotEndTheMove) {
  Pipe out = make_pipe();
  Pipe release = make_pipe();
  auto child = ChildProcess::start(
      {DROVER_FAKE, "move", "web1", "hostb"},
      {.output = out.write.get(),
       .environment = {"DROVER_FAKE_RELEASE=" + std::to_string(release.read.get())},
       .descriptors = {release.read.get()}});
  ASSERT_TRUE(child.has_value());
  out.write.reset();
  std::string text;
  read_until(out.read.get(), "copying", text);
  out.read.reset();  // what follows meets EPIPE
  ::kill(child->pid(), SIGINT);
  EXPECT_EQ(::write(release.write.get(), "x", 1), 1);
  EXPECT_EQ(*child->wait(seconds(600)), kExitCancelled);
}

TEST(Signals, AreLeftAsTheyWere) {
  sigset_t before;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &before);
  {
    const BlockedSignals blocked;
    ::raise(SIGTERM);  // pending, and dropped at the end
  }
  sigset_t after;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &after);
  EXPECT_EQ(::sigismember(&after, SIGTERM), ::sigismember(&before, SIGTERM));
  sigset_t pending;
  ::sigpending(&pending);
  EXPECT_EQ(::sigismember(&pending, SIGTERM), 0);
}

// ---- at a terminal ------------------------------------------------------------------------------

class AtATerminal : public ::testing::Test {
 protected:
  // As the terminal's only program, or by a shell with job control.
  enum class By { Itself, Shell };
  void start(By by = By::Itself, std::vector<std::string> arguments = {"move", "web1", "hostb"}) {
    release_ = make_pipe();
    winsize size{};
    size.ws_row = 24;
    size.ws_col = 60;
    int master = -1;
    const pid_t child = ::forkpty(&master, nullptr, nullptr, &size);
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::setenv("TERM", "xterm", 1);
      ::unsetenv("NO_COLOR");
      ::setenv("DROVER_FAKE_RELEASE", "9", 1);
      ::dup2(release_.read.get(), 9);
      if (by == By::Shell) {
        ::execl("/bin/sh", "sh", "-c",
                "set -m; " DROVER_FAKE " move web1 hostb; echo the shell has $?", nullptr);
      } else {
        std::vector<char*> argv = {const_cast<char*>(DROVER_FAKE)};
        for (std::string& argument : arguments) argv.push_back(argument.data());
        argv.push_back(nullptr);
        ::execv(DROVER_FAKE, argv.data());
      }
      ::_exit(99);
    }
    child_ = child;
    terminal_ = UniqueFd(master);
  }
  void TearDown() override {
    if (child_ < 0) return;
    ::kill(child_, SIGKILL);  // a test that failed half-way
    ::waitpid(child_, nullptr, 0);
  }
  void type(char key) { EXPECT_EQ(::write(terminal_.get(), &key, 1), 1); }
  void until(const std::string& needle) { read_until(terminal_.get(), needle, text_); }
  void release() { EXPECT_EQ(::write(release_.write.get(), "x", 1), 1); }
  int end() {
    text_ += read_rest(terminal_.get());  // EIO when the last process has closed it
    int status = 0;
    EXPECT_EQ(::waitpid(child_, &status, 0), child_);
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  Pipe release_;
  UniqueFd terminal_;
  pid_t child_ = -1;
  std::string text_;
};

TEST_F(AtATerminal, CtrlCReachesNothingButDrover) {
  start();
  until("copying disks");
  type('\x03');
  until("Please wait.");
  until("the helper is ");
  release();
  EXPECT_EQ(end(), kExitCancelled);
  EXPECT_THAT(text_, HasSubstr("the helper is alive"));
}

TEST_F(AtATerminal, CtrlZDoesNotStopTheMove) {
  start(By::Shell);
  until("copying disks");
  type('\x1a');  // the shell would have 128 + SIGTSTP
  type('\x03');
  release();
  end();
  EXPECT_THAT(text_, HasSubstr("the helper is alive"));
  EXPECT_THAT(text_, HasSubstr("the shell has 130"));
}

TEST_F(AtATerminal, ProgressIsOneLineThatIsDrawnAgain) {
  start();
  until("0:14 left");
  ::kill(child_, SIGINT);  // a key would be echoed
  until("alive");
  release();
  EXPECT_EQ(end(), kExitCancelled);
  // 60 columns: one less, and no new line behind it; erased before other text.
  EXPECT_THAT(text_,
              HasSubstr("\r[ 42%] copying disks  110.0 MiB/s  0:14 left\x1b[K\r\x1b[Kdrover: "));
  EXPECT_THAT(text_, HasSubstr("\x1b[1mMove web1 to hostb"));
  EXPECT_THAT(text_, HasSubstr("\x1b[1;31mdrover:\x1b[0m cancelled; everything was undone\r\n"));
}

TEST_F(AtATerminal, ATerminalThatIsClosedUndoesTheMove) {
  start();
  until("copying disks");
  // The process in front can't be waited for past this: the kernel sends it SIGHUP.
  terminal_.reset();
  release();
  int status = 0;
  EXPECT_EQ(::waitpid(child_, &status, 0), child_);
  child_ = -1;
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), kExitCancelled);
}

// ---- in the background --------------------------------------------------------------------------

class InTheBackground : public AtATerminal {
 protected:
  void SetUp() override { ::setenv("DROVER_FAKE_STATE", state().c_str(), 1); }
  void TearDown() override {
    ::unsetenv("DROVER_FAKE_STATE");
    release_.write.reset();  // ends a job that a failed test has left
    AtATerminal::TearDown();
  }
  [[nodiscard]] std::string state() const { return temporary_.places().state; }
  void move_detached() {
    start(By::Itself, {"move", "web1", "hostb", "--detach"});
    until("runs in the background");
    id_ = store().find("web1")->id;
  }
  [[nodiscard]] job::JobStore store() const { return job::JobStore({state(), state() + "-log"}); }
  // To the end of the job.
  job::JobEvent wait_for_the_end(const char* op = "watch") {
    auto client =
        job::ControlClient::connect(temporary_.places().jobs() + "/" + id_ + "/control.sock");
    EXPECT_TRUE(client.has_value()) << client.error().to_string();
    EXPECT_TRUE(client->call({{"op", "watch"}}).has_value());
    EXPECT_TRUE(client->call({{"op", op}}).has_value());
    if (op == std::string("watch")) release();
    for (;;) {
      auto event = client->next_event();
      EXPECT_TRUE(event.has_value() && event->has_value());
      if (!event || !*event) return Error{};
      if (std::holds_alternative<job::Summary>(**event) || std::holds_alternative<Error>(**event)) {
        return **event;
      }
    }
  }

  job::testing::TemporaryPlaces temporary_;
  std::string id_;
};

TEST_F(InTheBackground, AJobSurvivesItsTerminal) {
  move_detached();
  const pid_t worker = store().look(id_)->pid;
  EXPECT_NE(::getsid(worker), ::getsid(child_));
  terminal_.reset();
  int status = 0;
  EXPECT_EQ(::waitpid(child_, &status, 0), child_);
  child_ = -1;
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), kExitLeft);
  EXPECT_TRUE(store().look(id_)->alive);
  EXPECT_TRUE(std::holds_alternative<job::Summary>(wait_for_the_end()));
  EXPECT_EQ(store().history()->entries.back().outcome, job::Outcome::Moved);
}

TEST_F(InTheBackground, CtrlCLeavesItRunningAndSaysHowToGoOn) {
  move_detached();
  type('\x03');
  EXPECT_EQ(end(), kExitLeft);
  EXPECT_THAT(text_, HasSubstr("job " + id_ + " goes on: `drover watch " + id_ + "` shows it"));
  const job::JobEvent ended = wait_for_the_end("cancel");
  ASSERT_TRUE(std::holds_alternative<Error>(ended));
  EXPECT_EQ(std::get<Error>(ended).code, Code::Cancelled);
  EXPECT_EQ(store().history()->entries.back().outcome, job::Outcome::Undone);
}

TEST_F(InTheBackground, ItIsFollowedToItsEnd) {
  move_detached();
  until("copying disks");  // the newest status only is drawn
  release();
  EXPECT_EQ(end(), kExitOk);
  EXPECT_THAT(text_, HasSubstr("web1 runs on hostb"));
}

TEST_F(InTheBackground, OneThatIsKilledIsSaidToBeDead) {
  move_detached();
  ::kill(store().look(id_)->pid, SIGKILL);
  EXPECT_EQ(end(), kExitHeld);
  EXPECT_THAT(text_, HasSubstr("job " + id_ + " has no process any more"));
  EXPECT_THAT(text_, HasSubstr("drover resume " + id_));
}

TEST_F(InTheBackground, WhatItPrintsGoesToItsLog) {
  move_detached();
  std::error_code error;
  const std::string target = std::filesystem::read_symlink(
      "/proc/" + std::to_string(store().look(id_)->pid) + "/fd/2", error);
  EXPECT_EQ(target, state() + "-log/" + id_ + ".log");
  release();
  end();
}

TEST_F(InTheBackground, AllThatWereInterruptedAreStartedAgain) {
  id_ = (*store().create(job::testing::sample_record()))->id();
  start(By::Itself, {"resume", "--all"});
  EXPECT_EQ(end(), kExitOk);
  EXPECT_THAT(text_, HasSubstr("job " + id_ + " goes on: "));
  EXPECT_TRUE(store().look(id_)->alive);
  EXPECT_TRUE(std::holds_alternative<job::Summary>(wait_for_the_end()));
}

TEST_F(InTheBackground, OneThatIsAtWorkIsNotResumed) {
  const auto job = store().create(job::testing::sample_record());
  start(By::Itself, {"resume", "web1"});
  EXPECT_EQ(end(), kExitInTheWay);
  EXPECT_THAT(text_, HasSubstr("job " + (*job)->id() + " is at work already, in process "));
}

}  // namespace
}  // namespace drover::cli
