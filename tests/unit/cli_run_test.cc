// SPDX-License-Identifier: Apache-2.0
//
// The program with a fake job: exit codes, what goes to which stream, and the output's thread.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pty.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <thread>

#include "cli/app.h"
#include "cli/exit_codes.h"
#include "cli/output.h"
#include "cli/terminal.h"
#include "tests/unit/cli_fake_job.h"

namespace drover::cli {
namespace {

using ::testing::ElementsAre;
using testing::FakeJob;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::lines_of;
using ::testing::Not;
using testing::run_cli;
using testing::sample_blocker;
using testing::sample_plan;
using testing::sample_progress;
using testing::sample_warning;

constexpr std::array kAllCodes = {
    Code::InvalidArgument, Code::NotFound, Code::AlreadyExists, Code::Denied, Code::NoSpace,
    Code::Unreachable,     Code::Protocol, Code::Incompatible,  Code::Busy,   Code::Io,
    Code::Cancelled,       Code::Blocked,  Code::Internal};

std::vector<std::string> events_of(const std::string& out) {
  std::vector<std::string> events;
  for (const std::string& line : lines_of(out)) {
    events.push_back(nlohmann::json::parse(line).at("event"));
  }
  return events;
}

TEST(Run, AMoveForPeople) {
  FakeJob job;
  const auto result = run_cli({"move", "web1", "hostb"}, job.services());
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(result.out, HasSubstr("Move web1 to hostb: 2 disks"));
  EXPECT_THAT(result.out, HasSubstr("\n   0:14  [ 42%] copying disks  "));
  EXPECT_THAT(result.out, HasSubstr("\n   0:14  [100%] done\n"));
  EXPECT_THAT(result.out, HasSubstr("\nweb1 runs on hostb. It stood still for 61 ms"));
  EXPECT_THAT(result.out, Not(HasSubstr("\x1b")));  // not a terminal
  EXPECT_THAT(result.out, Not(HasSubstr("\r")));
  ASSERT_EQ(job.moves.size(), 1U);
  EXPECT_EQ(job.moves[0].guest, "web1");
  EXPECT_EQ(job.moves[0].host, "hostb");
}

TEST(Run, AMoveForPrograms) {
  FakeJob job;
  const auto result = run_cli({"move", "web1", "hostb", "--json"}, job.services());
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(events_of(result.out), ElementsAre("plan", "progress", "progress", "summary"));
}

TEST(Run, EachErrorHasItsExitCodeAndBothStreamsTheirForm) {
  for (const Code code : kAllCodes) {
    FakeJob job;
    job.act = [&](job::Observer&, job::Cancel&) -> Result<job::Summary> {
      return fail(code, "it went wrong", "try something else");
    };
    const auto people = run_cli({"move", "web1", "hostb"}, job.services());
    EXPECT_EQ(people.code, exit_code(code));
    EXPECT_NE(people.code, 0);
    EXPECT_THAT(people.out, IsEmpty());
    EXPECT_EQ(people.err, "drover: it went wrong\n  hint: try something else\n");

    const auto programs = run_cli({"move", "web1", "hostb", "--json"}, job.services());
    EXPECT_EQ(programs.code, exit_code(code));
    EXPECT_EQ(programs.err, people.err);
    ASSERT_THAT(events_of(programs.out), ElementsAre("error"));
    const auto error = nlohmann::json::parse(programs.out);
    EXPECT_EQ(error.at("code"), code_name(code));
    EXPECT_EQ(error.at("exit_code"), exit_code(code));

    job.plan = fail(code, "it went wrong");
    EXPECT_EQ(run_cli({"check", "web1", "hostb"}, job.services()).code, exit_code(code));
  }
}

TEST(Run, NotRootIsDenied) {
  FakeJob job;
  job.act = [](job::Observer&, job::Cancel&) -> Result<job::Summary> {
    return fail(Code::Denied, "drover needs root", "run it with sudo");
  };
  const auto result = run_cli({"move", "web1", "hostb"}, job.services());
  EXPECT_EQ(result.code, kExitDenied);
  EXPECT_EQ(result.err, "drover: drover needs root\n  hint: run it with sudo\n");
}

TEST(Run, AnExceptionOfALibraryIsAnErrorLikeOthers) {
  FakeJob job;
  job.act = [](job::Observer&, job::Cancel&) -> Result<job::Summary> {
    throw std::runtime_error("surprise");
  };
  const auto result = run_cli({"move", "web1", "hostb"}, job.services());
  EXPECT_EQ(result.code, kExitInternal);
  EXPECT_THAT(result.err, HasSubstr("drover: an unexpected error: surprise\n"));
}

TEST(Run, DryRunAndCheckPlanAndMoveNothing) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"move", "web1", "hostb", "--dry-run"},
        {"check", "web1", "hostb"}}) {
    FakeJob job;
    const auto result = run_cli(arguments, job.services());
    EXPECT_EQ(result.code, kExitOk);
    EXPECT_THAT(result.out, HasSubstr("\nweb1 can move to hostb. Nothing was changed.\n"));
    EXPECT_THAT(result.err, IsEmpty());
    EXPECT_EQ(job.plans.size(), 1U);
    EXPECT_THAT(job.moves, IsEmpty());
  }
}

TEST(Run, BlockersMakeACheckFailWarningsDoNot) {
  FakeJob job;
  job.plan->findings = {sample_warning()};
  EXPECT_EQ(run_cli({"check", "web1", "hostb"}, job.services()).code, kExitOk);
  job.plan->findings = {sample_warning(), sample_blocker()};
  const auto people = run_cli({"check", "web1", "hostb"}, job.services());
  EXPECT_EQ(people.code, kExitBlocked);
  EXPECT_THAT(people.out, HasSubstr("web1 can't move to hostb: 1 blocker"));
  EXPECT_THAT(people.err, IsEmpty());
  const auto programs = run_cli({"check", "web1", "hostb", "--json"}, job.services());
  EXPECT_EQ(programs.code, kExitBlocked);
  ASSERT_THAT(events_of(programs.out), ElementsAre("plan"));
  EXPECT_EQ(nlohmann::json::parse(programs.out).at("blocked"), true);
}

TEST(Run, ABlockedMoveShowsThePlanAndThenTheError) {
  FakeJob job;
  job.act = [](job::Observer& observer, job::Cancel&) -> Result<job::Summary> {
    job::Plan plan = sample_plan();
    plan.findings = {sample_blocker()};
    observer.planned(plan);
    return fail(Code::Blocked, "web1 can't be moved");
  };
  const auto result = run_cli({"move", "web1", "hostb"}, job.services());
  EXPECT_EQ(result.code, kExitBlocked);
  EXPECT_THAT(result.out, HasSubstr("  blocked  disk vda: "));
  EXPECT_EQ(result.err, "drover: web1 can't be moved\n");
}

TEST(Run, ReceiveIsHandedOnWithItsExitCode) {
  FakeJob job;
  EXPECT_EQ(run_cli({"receive", "--cleanup", "web1-0a"}, job.services()).code, 7);
  ASSERT_EQ(job.receives.size(), 1U);
  EXPECT_EQ(job.receives[0].mode, ReceiveCommand::Mode::Cleanup);
  EXPECT_EQ(job.receives[0].job, "web1-0a");
}

TEST(Run, WrongUsageIsTwoAndSaysSoOnStandardErrorOnly) {
  FakeJob job;
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{},
        {"frobnicate"},
        {"--frobnicate"},
        {"move", "web1"},
        {"move", "web1", "hostb", "--frobnicate"},
        {"move", "web1", "hostb", "--json", "--port", "x"}}) {
    const auto result = run_cli(arguments, job.services());
    EXPECT_EQ(result.code, kExitUsage);
    EXPECT_THAT(result.out, IsEmpty());
    EXPECT_THAT(result.err, ::testing::StartsWith("drover: "));
    EXPECT_THAT(result.err, HasSubstr("\n  hint: "));
  }
  EXPECT_THAT(job.moves, IsEmpty());
}

TEST(Run, HelpAndVersionGoToStandardOutput) {
  FakeJob job;
  const auto version = run_cli({"--version"}, job.services());
  EXPECT_EQ(version.code, kExitOk);
  EXPECT_EQ(version.out, "drover " DROVER_VERSION "\n");
  EXPECT_THAT(version.err, IsEmpty());
  EXPECT_EQ(run_cli({"--help"}, job.services()).code, kExitOk);
  EXPECT_EQ(run_cli({"move", "--help"}, job.services()).code, kExitOk);
}

TEST(Run, NotesAreShownBetweenTheProgress) {
  FakeJob job;
  job.act = [](job::Observer& observer, job::Cancel&) -> Result<job::Summary> {
    observer.progress(sample_progress());
    observer.note("one of the connections broke\x1b[2J");
    return fail(Code::Io, "x");
  };
  EXPECT_THAT(run_cli({"move", "web1", "hostb"}, job.services()).out,
              HasSubstr("\nnote: one of the connections broke\\x1b[2J\n"));
  EXPECT_THAT(events_of(run_cli({"move", "web1", "hostb", "--json"}, job.services()).out),
              ElementsAre("progress", "note", "error"));
}

TEST(Run, ProgressIsALineNowAndThenNotEachTime) {
  FakeJob job;
  job.act = [](job::Observer& observer, job::Cancel&) -> Result<job::Summary> {
    job::Progress progress = sample_progress();
    for (int i = 0; i < 100; ++i) {  // 25 seconds
      progress.elapsed = std::chrono::milliseconds(250 * i);
      observer.progress(progress);
    }
    return fail(Code::Io, "x");
  };
  EXPECT_EQ(lines_of(run_cli({"move", "web1", "hostb"}, job.services()).out).size(), 5U);
  EXPECT_EQ(events_of(run_cli({"move", "web1", "hostb", "--json"}, job.services()).out).size(),
            50U + 1U);
}

// ---- terminals ----------------------------------------------------------------------------------

class PseudoTerminal {
 public:
  explicit PseudoTerminal(unsigned short width) {
    winsize size{};
    size.ws_row = 24;
    size.ws_col = width;
    int master = -1;
    int slave = -1;
    if (::openpty(&master, &slave, nullptr, nullptr, &size) != 0) return;
    master_ = UniqueFd(master);
    slave_ = UniqueFd(slave);
  }
  [[nodiscard]] int fd() const { return slave_.get(); }
  // What was written (a few lines: more would not fit into the terminal's buffer).
  std::string close_and_read() {
    slave_.reset();
    std::string out;
    std::array<char, 4096> piece{};
    for (;;) {
      const ssize_t count = ::read(master_.get(), piece.data(), piece.size());
      if (count <= 0) return out;
      out.append(piece.data(), static_cast<std::size_t>(count));
    }
  }

 private:
  UniqueFd master_;
  UniqueFd slave_;
};

TEST(TerminalOf, ColoursAndRedrawing) {
  const PseudoTerminal terminal(80);
  const auto of = [&](const TerminalEnvironment& environment) {
    const Terminal what = terminal_of(terminal.fd(), environment);
    return std::pair(what.redraw, what.colours);
  };
  EXPECT_EQ(of({"xterm", ""}), std::pair(true, true));
  EXPECT_EQ(of({"xterm", "1"}), std::pair(true, false));
  EXPECT_EQ(of({"dumb", ""}), std::pair(false, false));
  EXPECT_EQ(of({"", ""}), std::pair(false, false));
  const testing::Captured file;
  EXPECT_FALSE(terminal_of(file.fd(), {"xterm", ""}).redraw);
  EXPECT_EQ(line_width(terminal.fd()), 79U);
  EXPECT_EQ(line_width(file.fd()), 79U);  // not known
}

std::string at_terminal(FakeJob& job, unsigned short width,
                        const TerminalEnvironment& environment) {
  PseudoTerminal terminal(width);
  const testing::Captured err;
  run({"move", "web1", "hostb"}, job.services(),
      {.out = terminal.fd(),
       .err = err.fd(),
       .config_path = "/nonexistent/drover.toml",
       .environment = environment,
       .away_from_keyboard = false});
  return terminal.close_and_read();
}

FakeJob one_progress() {
  FakeJob job;
  job.act = [](job::Observer& observer, job::Cancel&) -> Result<job::Summary> {
    observer.progress(sample_progress());
    observer.note("here");
    return fail(Code::Io, "x");
  };
  return job;
}

TEST(Redraw, FitsTheTerminal) {
  FakeJob job = one_progress();
  EXPECT_EQ(at_terminal(job, 40, {"xterm", "1"}),
            "\r[ 50%] copying disks  0:14 left\x1b[K\r\x1b[Knote: here\r\n");
  EXPECT_EQ(at_terminal(job, 10, {"xterm", "1"}), "\r50%\x1b[K\r\x1b[Knote: here\r\n");
  EXPECT_EQ(at_terminal(job, 1, {"xterm", "1"}), "note: here\r\n");
}

TEST(Redraw, IsLeftToTerminalsThatCan) {
  FakeJob job = one_progress();
  EXPECT_EQ(
      at_terminal(job, 40, {"dumb", ""}),
      "   0:14  [ 50%] copying disks  1.5 GiB of 3.0 GiB  110.0 MiB/s  0:14 left  vda 50%, vdb 50%"
      "  1,234 guest writes mirrored\r\nnote: here\r\n");
}

TEST(Redraw, ColoursOnlyWithoutNoColor) {
  FakeJob job = one_progress();
  EXPECT_THAT(at_terminal(job, 40, {"xterm", ""}), HasSubstr("\x1b[1mnote:\x1b[0m here"));
}

// ---- the output's thread ------------------------------------------------------------------------

struct Pipe {
  Pipe() {
    std::array<int, 2> ends{};
    EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    read = UniqueFd(ends[0]);
    write = UniqueFd(ends[1]);
  }
  std::string read_all() {
    std::string out;
    std::array<char, 65536> piece{};
    for (;;) {
      const ssize_t count = ::read(read.get(), piece.data(), piece.size());
      if (count <= 0) return out;
      out.append(piece.data(), static_cast<std::size_t>(count));
    }
  }
  UniqueFd read;
  UniqueFd write;
};

TEST(OutputThread, ASlowReaderHoldsUpNobodyAndLosesOnlyWhatMayBeLost) {
  Pipe pipe;
  const testing::Captured err;
  Output output({.out = pipe.write.get(), .err = err.fd()});
  const std::string line(999, 'x');
  for (int i = 0; i < 10'000; ++i) output.out(line + "\n", Output::Keep::IfRoom);
  output.out("the summary\n");
  // Only now somebody reads. Nobody waited for that above.
  std::string out;
  std::thread reader([&] { out = pipe.read_all(); });
  output.finish();
  pipe.write.reset();
  reader.join();
  EXPECT_TRUE(out.ends_with("x\nthe summary\n"));
  EXPECT_LT(out.size(), 2 * Output::kMostQueued);
  EXPECT_GT(out.size(), Output::kMostQueued / 2);
}

TEST(OutputThread, OnlyTheNewestStatusWaits) {
  Pipe pipe;
  const testing::Captured err;
  Output output({.out = pipe.write.get(), .err = err.fd(), .redraw = true});
  output.out(std::string(std::size_t{1} << 18, '.'));  // more than a pipe takes
  for (int i = 0; i < 100; ++i) output.status("status " + std::to_string(i));
  std::string out;
  std::thread reader([&] { out = pipe.read_all(); });
  output.finish();
  pipe.write.reset();
  reader.join();
  EXPECT_TRUE(out.ends_with(".\rstatus 99\x1b[K\r\x1b[K"));
}

TEST(OutputThread, KeepsTheOrderOverBothStreams) {
  const testing::Captured both;
  {
    Output output({.out = both.fd(), .err = both.fd(), .redraw = true});
    output.out("one\n");
    output.status("half");
    output.err("two\n");
    output.status("half");
    output.out("three\n");
  }
  EXPECT_EQ(both.text(), "one\n\rhalf\x1b[K\r\x1b[Ktwo\n\rhalf\x1b[K\r\x1b[Kthree\n");
}

TEST(OutputThread, EndsWhenTheReaderHasGone) {
  const auto before = std::signal(SIGPIPE, SIG_IGN);
  Pipe pipe;
  pipe.read.reset();
  const testing::Captured err;
  Output output({.out = pipe.write.get(), .err = err.fd()});
  output.out("nobody reads this\n");
  output.err("but this\n");
  output.finish();
  EXPECT_EQ(err.text(), "but this\n");
  std::signal(SIGPIPE, before);
}

}  // namespace
}  // namespace drover::cli
