// SPDX-License-Identifier: Apache-2.0
//
// The commands about jobs, on jobs in a temporary directory: live ones with a real control socket,
// dead and damaged ones.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <fstream>
#include <functional>
#include <thread>

#include "cli/exit_codes.h"
#include "cli/jobs_view.h"
#include "job/broadcast.h"
#include "tests/unit/cli_fake_job.h"

namespace drover::cli {
namespace {

using job::testing::sample_record;
using std::chrono::seconds;
using testing::FakeJob;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::lines_of;
using ::testing::Not;
using testing::sample_plan;
using testing::sample_progress;
using testing::sample_summary;

// A job with a process: this one.
class LiveJob {
 public:
  LiveJob(const job::JobStore& store, std::function<void(LiveJob&)> on_cancel)
      : on_cancel_(std::move(on_cancel)) {
    auto created = store.create(sample_record());
    EXPECT_TRUE(created.has_value()) << created.error().to_string();
    job_ = std::move(*created);
    id_ = job_->id();
    status_.emplace(job_->status_path());
    auto started = job::ControlServer::start(
        job_->control_socket(), {.status = [this] { return status_->current().to_json(); },
                                 .cancel =
                                     [this] {
                                       if (!cancelled_.exchange(true)) on_cancel_(*this);
                                     },
                                 .set_bandwidth = [this](Length rate) -> Status {
                                   bandwidth_ = rate.bytes();
                                   return {};
                                 },
                                 .set_compression = [this](mirror::Compression wanted) -> Status {
                                   compression_ = wanted;
                                   return {};
                                 }});
    EXPECT_TRUE(started.has_value());
    control_ = std::move(*started);
    broadcast_.emplace(nobody_, *status_, *control_);
    broadcast_->started(job_->id());
    broadcast_->planned(sample_plan());
    broadcast_->progress(sample_progress());
  }
  void end(const Result<job::Summary>& result) {
    EXPECT_TRUE((result ? job_->finish({job::Outcome::Moved, {}, *result})
                        : job_->finish({job::Outcome::Undone, result.error(), {}}))
                    .has_value());
    broadcast_->ended(result);
  }
  void stop() { control_->stop(); }
  void release_lock() { job_.reset(); }
  [[nodiscard]] const std::string& id() const { return id_; }
  [[nodiscard]] std::uint64_t bandwidth() const { return bandwidth_; }
  [[nodiscard]] mirror::Compression compression() const { return compression_; }
  job::StatusWriter& status() { return *status_; }
  job::Broadcast& broadcast() { return *broadcast_; }

 private:
  class Nobody final : public job::Observer {
    void started(const std::string& /*id*/) override {}
    void planned(const job::Plan& /*plan*/) override {}
    void progress(const job::Progress& /*progress*/) override {}
    void note(const std::string& /*text*/) override {}
  } nobody_;
  const std::function<void(LiveJob&)> on_cancel_;
  std::atomic<bool> cancelled_{false};
  std::atomic<std::uint64_t> bandwidth_{0};
  std::atomic<mirror::Compression> compression_{};
  std::unique_ptr<job::Job> job_;
  std::string id_;
  std::optional<job::StatusWriter> status_;
  std::optional<job::Broadcast> broadcast_;
  std::unique_ptr<job::ControlServer> control_;  // last: its thread uses the others
};

class Jobs : public ::testing::Test {
 protected:
  testing::RunResult run(const std::vector<std::string>& arguments) {
    return testing::run_cli(arguments, fake.services(), "/nonexistent/drover.toml",
                            temporary.places());
  }
  // A job that was killed in the middle of its copy, while it waited.
  std::string dead() {
    auto job = store.create(sample_record());
    EXPECT_TRUE(job.has_value()) << job.error().to_string();
    job::StatusWriter status((*job)->status_path());
    job::Progress progress = sample_progress();
    progress.waiting_for = "the link to hostb";
    progress.waiting = seconds(45);
    status.progress(progress);
    status.state("copying");
    status.error(Error{Code::Unreachable, "the link broke", "", true});
    return (*job)->id();
  }
  std::string damaged() {
    const std::string id = "db1-00000001";
    const std::string directory = temporary.places().jobs() + "/" + id;
    std::filesystem::create_directories(directory);
    std::ofstream(directory + "/job.json") << "garb\x1b[2Jage";
    std::ofstream(directory + "/lock") << "x";
    return id;
  }
  std::unique_ptr<LiveJob> live(std::function<void(LiveJob&)> on_cancel = [](LiveJob&) {}) {
    return std::make_unique<LiveJob>(store, std::move(on_cancel));
  }

  FakeJob fake;
  job::testing::TemporaryPlaces temporary;
  job::JobStore store{temporary.places()};
};

const Result<job::Summary> kCancelled = fail(Code::Cancelled, "cancelled; everything was undone");

// ---- jobs, status, history ----------------------------------------------------------------------

TEST_F(Jobs, NoneIsSaid) {
  EXPECT_EQ(run({"jobs"}).out, "no jobs\n");
  EXPECT_EQ(run({"jobs", "--json"}).out, "");
  EXPECT_EQ(run({"history"}).out, "no job has ended yet\n");
  for (const char* command : {"status", "watch", "cancel", "resume"}) {
    const auto result = run({command, "web1"});
    EXPECT_EQ(result.code, kExitNotFound) << command;
    EXPECT_THAT(result.err, HasSubstr("there is no job web1"));
  }
}

TEST_F(Jobs, ADeadOneIsListedWithWhatToDo) {
  const std::string id = dead();
  const auto people = run({"jobs"});
  EXPECT_EQ(people.code, kExitOk);
  EXPECT_THAT(people.out, HasSubstr("JOB            GUEST  TO     PHASE          DONE  RUNNER"));
  EXPECT_THAT(people.out, HasSubstr(id + "  web1   hostb  copying disks  42%   none    20"));
  EXPECT_THAT(people.out, HasSubstr("\n  waits for   the link to hostb, since 20"));
  EXPECT_THAT(people.out, HasSubstr("\n  last error  the link broke"));
  EXPECT_THAT(people.out, HasSubstr("`drover resume " + id + "` goes on with it"));
  const auto json = nlohmann::json::parse(run({"jobs", "--json"}).out);
  EXPECT_EQ(json.at("job"), id);
  EXPECT_EQ(json.at("alive"), false);
  EXPECT_EQ(json.at("pid"), nullptr);
  EXPECT_EQ(json.at("progress").at("percent"), 42);
  EXPECT_EQ(json.at("progress").at("waiting_ms"), 45'000);
  EXPECT_EQ(json.at("last_error").at("code"), "unreachable");
  EXPECT_THAT(json.at("to_do"), HasSubstr("drover resume"));
}

TEST_F(Jobs, ADamagedOneIsListedAndSaysSo) {
  const std::string id = damaged();
  const auto people = run({"jobs"});
  EXPECT_EQ(people.code, kExitOk);
  EXPECT_THAT(people.out, HasSubstr(id + "  ?      ?   not known  ?     none    ?\n"));
  EXPECT_THAT(people.out, HasSubstr("\n  damaged     job " + id + ": its job.json can't be used"));
  EXPECT_THAT(people.out, Not(HasSubstr("\x1b")));
  EXPECT_EQ(nlohmann::json::parse(run({"jobs", "--json"}).out).at("job"), id);
  EXPECT_THAT(run({"status", id}).out, HasSubstr("damaged"));
  EXPECT_EQ(run({"watch", id}).code, kExitHeld);
}

TEST_F(Jobs, ALiveOneIsListedWithItsProcess) {
  const auto job = live();
  const auto people = run({"jobs"});
  EXPECT_THAT(people.out, HasSubstr("process " + std::to_string(::getpid())));
  EXPECT_THAT(people.out, Not(HasSubstr("to do")));
  EXPECT_EQ(nlohmann::json::parse(run({"jobs", "--json"}).out).at("alive"), true);
}

TEST_F(Jobs, TheStatusOfALiveOneIsFresherThanItsFile) {
  const auto job = live();
  job::Progress progress = sample_progress();
  progress.copied = progress.data;
  job->broadcast().progress(progress);  // less than a second after the last: not in the file
  const auto json = nlohmann::json::parse(run({"status", "web1", "--json"}).out);
  EXPECT_EQ(json.at("progress").at("copied_bytes"), progress.data.bytes());
  EXPECT_THAT(run({"status", job->id()}).out, HasSubstr("copying disks  3.0 GiB of 3.0 GiB"));
}

TEST_F(Jobs, TheStatusOfADeadOneIsItsLast) {
  const std::string id = dead();
  const auto people = run({"status", "web1"});
  EXPECT_EQ(people.code, kExitOk);
  EXPECT_THAT(people.out, HasSubstr("job " + id + "\n  guest       web1\n  to          hostb\n"));
  EXPECT_THAT(people.out, HasSubstr("\n  state       copying\n"));
  EXPECT_THAT(people.out,
              HasSubstr("[ 42%] copying disks  waiting for the link to hostb for 0:45"));
  EXPECT_THAT(people.out, HasSubstr("\n  to do       its process has ended"));
}

TEST_F(Jobs, TheHistoryHasThoseThatEnded) {
  live()->end(sample_summary());
  live()->end(fail(Code::Io, "the disk\x1b failed"));
  const auto people = run({"history"});
  EXPECT_THAT(people.out, HasSubstr("OUTCOME"));
  EXPECT_THAT(people.out, HasSubstr("web1   hostb  moved "));
  EXPECT_THAT(people.out, HasSubstr("web1   hostb  undone "));
  EXPECT_THAT(people.out, HasSubstr("\n  because     the disk\\x1b failed\n"));
  const auto lines = lines_of(run({"history", "--json"}).out);
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(nlohmann::json::parse(lines[0]).at("outcome"), "moved");
  EXPECT_EQ(nlohmann::json::parse(lines[1]).at("reason").at("code"), "io");
  std::ofstream(temporary.places().history(), std::ios::app) << "garbage\n";
  EXPECT_THAT(run({"history"}).out, HasSubstr("1 line of the history can't be read\n"));
}

TEST_F(Jobs, OneThatHasEndedIsSaidToHave) {
  std::string id;
  {
    const auto job = live();
    id = job->id();
    job->end(sample_summary());
  }
  const auto result = run({"watch", id});
  EXPECT_EQ(result.code, kExitNotFound);
  EXPECT_THAT(result.err, HasSubstr("job " + id + " has ended: web1 runs on hostb"));
  // Programs are told the same.
  const auto told = nlohmann::json::parse(run({"resume", id, "--json"}).out);
  EXPECT_EQ(told.at("event"), "error");
  EXPECT_EQ(told.at("code"), "not-found");
}

// ---- watch --------------------------------------------------------------------------------------

// `drover watch` on a thread, whose output can be waited for.
class Watching {
 public:
  Watching(const Services& services, const job::JobPlaces& places,
           std::vector<std::string> arguments) {
    std::array<int, 2> ends{};
    EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    read_ = UniqueFd(ends[0]);
    write_ = UniqueFd(ends[1]);
    thread_ = std::thread([this, services, places, arguments = std::move(arguments)] {
      code_ = cli::run(arguments, services,
                       {.out = write_.get(),
                        .err = write_.get(),
                        .config_path = "/nonexistent/drover.toml",
                        .environment = {.term = "dumb", .no_color = ""},
                        .away_from_keyboard = false,
                        .places = places});
      write_.reset();
    });
  }
  void until(const std::string& needle) {
    while (text_.find(needle) == std::string::npos && more()) {
    }
    EXPECT_THAT(text_, HasSubstr(needle));
  }
  int end() {
    while (more()) {
    }
    thread_.join();
    return code_;
  }
  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  bool more() {
    std::array<char, 4096> piece{};
    const ssize_t got = ::read(read_.get(), piece.data(), piece.size());
    if (got > 0) text_.append(piece.data(), static_cast<std::size_t>(got));
    return got > 0;
  }
  UniqueFd read_;
  UniqueFd write_;
  std::string text_;
  int code_ = -1;
  std::thread thread_;
};

TEST_F(Jobs, WatchingShowsWhatTheMoveShowsAndEndsAsItEnds) {
  for (const bool moved : {true, false}) {
    const auto job = live();
    Watching people(fake.services(), temporary.places(), {"watch", "web1"});
    Watching programs(fake.services(), temporary.places(), {"watch", job->id(), "--json"});
    people.until("copying disks");
    programs.until("progress");
    job->end(moved ? Result<job::Summary>(sample_summary()) : fail(Code::NoSpace, "full"));
    EXPECT_EQ(people.end(), moved ? kExitOk : kExitNoSpace);
    EXPECT_EQ(programs.end(), moved ? kExitOk : kExitNoSpace);
    EXPECT_THAT(people.text(), HasSubstr("Move web1 to hostb: 2 disks"));
    EXPECT_THAT(people.text(), HasSubstr("[ 42%] copying disks"));
    EXPECT_THAT(people.text(), HasSubstr(moved ? "web1 runs on hostb" : "drover: full"));
    EXPECT_EQ(nlohmann::json::parse(lines_of(programs.text()).front()).at("event"), "started");
    EXPECT_THAT(programs.text(),
                HasSubstr(moved ? R"({"event":"summary")" : R"("code":"no-space")"));
  }
}

TEST_F(Jobs, AProcessThatDiesWhileItIsWatchedIsSaidToHave) {
  auto job = live();
  const std::string id = job->id();
  Watching people(fake.services(), temporary.places(), {"watch", "web1"});
  people.until("copying disks");
  job->release_lock();
  job->stop();  // without a last word
  EXPECT_EQ(people.end(), kExitHeld);
  EXPECT_THAT(people.text(), HasSubstr("job " + id + " has no process any more"));
}

TEST_F(Jobs, WatchingADeadOneSaysSo) {
  const std::string id = dead();
  const auto people = run({"watch", id});
  EXPECT_EQ(people.code, kExitHeld);
  EXPECT_THAT(people.out, HasSubstr("waiting for the link to hostb"));
  EXPECT_THAT(people.err, HasSubstr("drover: job " + id + " has no process any more\n"));
  EXPECT_THAT(people.err, HasSubstr("drover resume " + id));
  const auto programs = run({"watch", id, "--json"});
  EXPECT_EQ(programs.code, kExitHeld);
  EXPECT_EQ(nlohmann::json::parse(programs.out).at("code"), "held");
}

// ---- cancel, resume, set ------------------------------------------------------------------------

TEST_F(Jobs, CancellingALiveOneWaitsUntilItIsUndone) {
  const auto job = live([](LiveJob& cancelled) {
    job::Progress undoing = sample_progress();
    undoing.phase = job::Phase::Undo;
    cancelled.broadcast().progress(undoing);
    cancelled.end(kCancelled);
  });
  const auto result = run({"cancel", "web1"});
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_THAT(result.out, HasSubstr("undoing"));
  EXPECT_THAT(result.out,
              HasSubstr("note: job " + job->id() + ": cancelled; everything was undone\n"));
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(fake.cancelled, IsEmpty());
  EXPECT_EQ(run({"jobs"}).out, "no jobs\n");
}

TEST_F(Jobs, CancellingTooLateSaysThatItHasMoved) {
  const auto job = live([](LiveJob& finished) { finished.end(sample_summary()); });
  const auto result = run({"cancel", "web1"});
  EXPECT_EQ(result.code, kExitHeld);
  EXPECT_THAT(result.out, HasSubstr("web1 runs on hostb"));
  EXPECT_THAT(result.err, HasSubstr("too late to cancel"));
}

TEST_F(Jobs, CancellingADeadOneUndoesItHere) {
  const std::string id = dead();
  const auto result = run({"cancel", "web1"});
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_EQ(fake.cancelled, std::vector<std::string>{id});
  EXPECT_THAT(result.out, HasSubstr("job " + id + " was undone"));
  fake.cancel_result = fail(Code::Unreachable, "hostb does not answer");
  EXPECT_EQ(run({"cancel", id}).code, kExitUnreachable);
}

TEST_F(Jobs, ResumingGoesOnLikeAMove) {
  const std::string id = dead();
  const auto people = run({"resume", "web1"});
  EXPECT_EQ(people.code, kExitOk);
  EXPECT_EQ(fake.resumed, std::vector<std::string>{id});
  EXPECT_THAT(people.out, HasSubstr("web1 runs on hostb"));
  const auto lines = lines_of(run({"resume", id, "--json"}).out);
  EXPECT_EQ(nlohmann::json::parse(lines.back()).at("event"), "summary");
}

TEST_F(Jobs, SettingTheBandwidthReachesTheProcess) {
  const auto job = live();
  const auto result = run({"set", "web1", "--bandwidth", "100M"});
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_EQ(result.out, "job " + job->id() + ": bandwidth 100M\n");
  EXPECT_EQ(job->bandwidth(), (100_MiB).bytes());
  EXPECT_EQ(run({"set", "web1", "--bandwidth", "none"}).code, kExitOk);
  EXPECT_EQ(job->bandwidth(), 0U);
  EXPECT_EQ(run({"set", "web1", "--bandwidth", "100Mb"}).code, kExitUsage);
  EXPECT_EQ(run({"set", "web1"}).code, kExitUsage);
}

TEST_F(Jobs, SettingTheCompressionReachesTheProcess) {
  const auto job = live();
  const auto both = run({"set", "web1", "--compress", "zstd:3", "--bandwidth", "100M"});
  EXPECT_EQ(both.code, kExitOk);
  EXPECT_EQ(both.out, "job " + job->id() + ": bandwidth 100M, compression zstd:3\n");
  EXPECT_EQ(mirror::compression_name(job->compression()), "zstd:3");
  EXPECT_EQ(job->bandwidth(), (100_MiB).bytes());
  const auto json = nlohmann::json::parse(run({"set", "web1", "--compress", "auto", "--json"}).out);
  EXPECT_EQ(json, nlohmann::json({{"job", job->id()}, {"compress", "auto"}}));
  EXPECT_EQ(mirror::compression_name(job->compression()), "auto");
  EXPECT_EQ(job->bandwidth(), (100_MiB).bytes()) << "as it was";
  EXPECT_EQ(run({"set", "web1", "--compress", "gzip"}).code, kExitUsage);
}

TEST_F(Jobs, SettingOneThatIsDeadIsRefused) {
  dead();
  EXPECT_EQ(run({"set", "web1", "--bandwidth", "100M"}).code, kExitHeld);
}

TEST_F(Jobs, WhichOneHasToBeSaid) {
  EXPECT_EQ(run({"resume"}).code, kExitUsage);
  EXPECT_EQ(run({"resume", "web1", "--all"}).code, kExitUsage);
  EXPECT_EQ(run({"status"}).code, kExitUsage);
  EXPECT_EQ(run({"cancel", ""}).code, kExitUsage);
  EXPECT_EQ(run({"resume", "--all"}).code, kExitOk);  // there are none
}

}  // namespace
}  // namespace drover::cli
