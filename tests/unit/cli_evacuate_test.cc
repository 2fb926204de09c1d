// SPDX-License-Identifier: Apache-2.0
//
// `drover evacuate`: its command line, and what it prints for a world that is only a list of files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/exit_codes.h"
#include "tests/fakes/fake_evacuate_world.h"
#include "tests/unit/cli_fake_job.h"

namespace drover::cli {
namespace {

using job::testing::FakeEvacuateWorld;
using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::lines_of;
using testing::run_cli;

Result<Command> parse(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "evacuate");
  return parse_command_line(arguments, "/nonexistent/drover.toml");
}

std::string error_of(const std::vector<std::string>& arguments) {
  const auto command = parse(arguments);
  return command ? "no error" : command.error().message;
}

TEST(EvacuateCommandLine, TakesEachOption) {
  const auto least = parse({"--from", "/mnt/a", "--to", "fast"});
  ASSERT_TRUE(least.has_value()) << least.error().to_string();
  EXPECT_EQ(std::get<EvacuateCommand>(*least).options.parallel, 2U);
  const auto command = parse({"--from", "old", "--to", "/mnt/b", "/mnt/c", "--to", "/mnt/d",
                              "--parallel", "4", "--bandwidth", "100M", "--source-uri", "qemu:///x",
                              "--dry-run", "--json", "--verbose"});
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& evacuate = std::get<EvacuateCommand>(*command);
  EXPECT_EQ(evacuate.options.from, "old");
  EXPECT_THAT(evacuate.options.to, ElementsAre("/mnt/b", "/mnt/c", "/mnt/d"));
  EXPECT_EQ(evacuate.options.parallel, 4U);
  EXPECT_EQ(evacuate.options.bandwidth, 100_MiB);
  EXPECT_EQ(evacuate.options.uri, "qemu:///x");
  EXPECT_TRUE(evacuate.dry_run && evacuate.json && evacuate.verbose);
}

TEST(EvacuateCommandLine, SaysWhatIsWrong) {
  EXPECT_EQ(error_of({"--to", "/b"}), "--from is required");
  EXPECT_EQ(error_of({"--from", "/a"}), "--to is required");
  EXPECT_EQ(error_of({"--from", "", "--to", "/b"}), "--from: the value is empty");
  EXPECT_EQ(error_of({"--from", "/a", "--to", ""}), "--to: the value is empty");
  EXPECT_THAT(error_of({"--from", "/a", "--to", "/b", "--parallel", "0"}),
              HasSubstr("--parallel: '0'"));
  EXPECT_THAT(error_of({"--from", "/a", "--to", "/b", "--bandwidth", "x"}),
              HasSubstr("--bandwidth: 'x'"));
}

class RunEvacuate : public ::testing::Test {
 protected:
  RunEvacuate() { FakeEvacuateWorld::fill(world_); }

  testing::RunResult run(std::vector<std::string> options) {
    std::vector<std::string> arguments = {"evacuate", "--from", "/mnt/a", "--to",
                                          "/mnt/b",   "--to",   "/mnt/c"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    Services services;
    services.evacuate_world = [this](const std::string& uri) {
      EXPECT_EQ(uri, "qemu:///system");
      return std::make_unique<Lent>(world_);
    };
    return run_cli(arguments, services);
  }

  // The command owns its world.
  class Lent final : public job::EvacuateWorld {
   public:
    explicit Lent(FakeEvacuateWorld& lender) : lender_(lender) {}
    Status claim(const job::EvacuateSurvey& survey) override { return lender_.claim(survey); }
    Result<job::EvacuateSurvey> look(const job::EvacuateOptions& options) override {
      return lender_.look(options);
    }
    Status check(const job::EvacuateProblem& problem, const job::EvacuateStep& step,
                 job::Cancel& cancel) override {
      return lender_.check(problem, step, cancel);
    }
    Status carry_out(const job::EvacuateProblem& problem, const job::EvacuateStep& step,
                     const job::EvacuateShare& share, job::Observer& observer,
                     job::Cancel& cancel) override {
      return lender_.carry_out(problem, step, share, observer, cancel);
    }
    Status resume(const std::string& job, job::Observer& observer, job::Cancel& cancel) override {
      return lender_.resume(job, observer, cancel);
    }

   private:
    FakeEvacuateWorld& lender_;
  };

  FakeEvacuateWorld world_;
};

TEST_F(RunEvacuate, ADryRunShowsThePlan) {
  world_.items.back().stays = "guest web3 runs with it";
  world_.jobs = {{"web2-1", "web2", "uuid-of-web2", false}};
  const auto result = run({"--dry-run"});
  EXPECT_EQ(result.code, kExitBlocked);
  EXPECT_EQ(result.out, R"(Emptying /mnt/a: 5 steps, 101.0 GiB
  to /mnt/b, which has 100.0 GiB free
  to /mnt/c, which has 50.0 GiB free
First job web2-1 goes on, which relocates disks of web2.

1. db1: vda, 40.0 GiB
     /mnt/a/db1.raw -> /mnt/b/db1.raw
2. web1: vda, 30.0 GiB
     /mnt/a/web1.raw -> /mnt/b/web1.raw
3. web2: vda, 20.0 GiB
     /mnt/a/web2.raw -> /mnt/c/web2.raw
4. web3: vda, 10.0 GiB
     /mnt/a/web3.raw -> /mnt/b/web3.raw
5. debian.iso, in web1, web2, 1.0 GiB
     /mnt/a/debian.iso -> /mnt/c/debian.iso

These stay where they are:
  /mnt/a/web3_VARS.fd
    guest web3 runs with it

Not a guest's, left alone:
  /mnt/a/notes.txt

Nothing was changed.
)");
  EXPECT_THAT(world_.log, IsEmpty());
}

TEST_F(RunEvacuate, EmptiesAndSaysSo) {
  const auto result = run({"--parallel", "1"});
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_THAT(result.out, HasSubstr("1. db1: vda: begins\n"));
  EXPECT_THAT(result.out, HasSubstr("6. web3: NVRAM: done\n"));
  EXPECT_THAT(result.out, HasSubstr("\n6 steps done, 101.0 GiB.\n"
                                    "No guest has anything on /mnt/a any more.\n"
                                    "Not a guest's, left alone:\n  /mnt/a/notes.txt\n"));
}

TEST_F(RunEvacuate, TellsProgramsTheSame) {
  world_.jobs = {{"web2-1", "web2", "uuid-of-web2", false}};
  world_.broken["/mnt/a/db1.raw"] = {Code::Io, "broken", "", false};
  const auto result = run({"--json", "--parallel", "1"});
  EXPECT_EQ(result.code, kExitFailed);
  std::vector<std::string> events;
  for (const std::string& line : lines_of(result.out)) {
    const json event = json::parse(line);
    if (event.at("event") == "progress") continue;
    events.push_back(event.at("event").get<std::string>() +
                     (event.contains("state") ? "/" + event["state"].get<std::string>() : ""));
  }
  EXPECT_THAT(events,
              ElementsAre("resume/begun", "resume/done", "evacuation", "step/begun", "step/failed",
                          "step/begun", "step/done", "step/begun", "step/done", "step/begun",
                          "step/done", "step/begun", "step/done", "evacuated"));
  const json end = json::parse(lines_of(result.out).back());
  EXPECT_FALSE(end.at("empty"));
  EXPECT_EQ(end.at("stay"), json::parse(R"([{"path": "/mnt/a/db1.raw", "why": "broken"}])"));
}

TEST_F(RunEvacuate, ExitCodesSayWhatIsLeft) {
  world_.items.back().stays = "guest web3 runs with it";
  const auto blocked = run({});
  EXPECT_EQ(blocked.code, kExitBlocked);
  EXPECT_THAT(blocked.out, HasSubstr("Still on /mnt/a:\n  /mnt/a/web3_VARS.fd\n"));
  world_.targets[0].free = 1_GiB;
  world_.targets[1].free = 1_GiB;
  world_.items.push_back(FakeEvacuateWorld::file(job::EvacuateKind::Disk, "x", 9_GiB, {"x"}));
  EXPECT_EQ(run({}).code, kExitNoSpace);
  EXPECT_EQ(run({"--dry-run"}).code, kExitNoSpace);
}

}  // namespace
}  // namespace drover::cli
