// SPDX-License-Identifier: Apache-2.0
//
// `drover rebalance`: its command line, and what it prints for a world that only exists as numbers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/exit_codes.h"
#include "tests/fakes/fake_rebalance_world.h"
#include "tests/unit/cli_fake_job.h"

namespace drover::cli {
namespace {

using By = job::RebalanceProblem::By;
using job::testing::FakeRebalanceWorld;
using nlohmann::json;
using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::lines_of;
using ::testing::Not;
using testing::run_cli;

Result<Command> parse(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "rebalance");
  return parse_command_line(arguments, "/nonexistent/drover.toml");
}

std::string error_of(const std::vector<std::string>& arguments) {
  const auto command = parse(arguments);
  return command ? "no error" : command.error().message;
}

TEST(RebalanceCommandLine, WithoutOptionsIsTheDefaults) {
  const auto command = parse({"/mnt/a", "fast"});
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& rebalance = std::get<RebalanceCommand>(*command);
  EXPECT_THAT(rebalance.options.storages, ElementsAre("/mnt/a", "fast"));
  EXPECT_EQ(rebalance.options.by, By::Space);
  EXPECT_DOUBLE_EQ(rebalance.options.tolerance, 0.05);
  EXPECT_EQ(rebalance.options.most_moves, job::RebalanceOptions{}.most_moves);
  EXPECT_EQ(rebalance.options.uri, "qemu:///system");
  EXPECT_FALSE(rebalance.apply || rebalance.json || rebalance.verbose);
}

TEST(RebalanceCommandLine, TakesEachOption) {
  const auto command =
      parse({"/mnt/a",  "--by",         "io",        "/mnt/b", "--window",    "2min",
             "--pin",   "a:b:vda",      "--pin",     "x:sdb",  "--tolerance", "2.5%",
             "--apart", "db1,db2",      "--apart",   "a,b,c",  "--max-moves", "7",
             "/mnt/c",  "--source-uri", "qemu:///x", "--json", "--verbose",   "--apply"});
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& rebalance = std::get<RebalanceCommand>(*command);
  EXPECT_THAT(rebalance.options.storages, ElementsAre("/mnt/a", "/mnt/b", "/mnt/c"));
  EXPECT_EQ(rebalance.options.by, By::Io);
  EXPECT_EQ(rebalance.options.window, milliseconds(120'000));
  EXPECT_DOUBLE_EQ(rebalance.options.tolerance, 0.025);
  EXPECT_EQ(rebalance.options.most_moves, 7U);
  EXPECT_THAT(rebalance.options.apart,
              ElementsAre(ElementsAre("db1", "db2"), ElementsAre("a", "b", "c")));
  EXPECT_THAT(rebalance.options.pins, ElementsAre(std::pair("a:b", "vda"), std::pair("x", "sdb")));
  EXPECT_EQ(rebalance.options.uri, "qemu:///x");
  EXPECT_TRUE(rebalance.apply && rebalance.json && rebalance.verbose);
}

TEST(RebalanceCommandLine, SaysWhatIsWrong) {
  EXPECT_EQ(error_of({}), "STORAGE is required");
  EXPECT_EQ(error_of({"/a"}), "one STORAGE can't be balanced: name two or more");
  EXPECT_EQ(error_of({"/a", ""}), "STORAGE is empty");
  EXPECT_EQ(error_of({"/a", "/b", "--by", "size"}), "--by: 'size' is neither space nor io");
  EXPECT_EQ(error_of({"/a", "/b", "--window", "10s"}), "--window is of no use without --by io");
  EXPECT_EQ(error_of({"/a", "/b", "--by", "io", "--window", "10"}), "--window: '10' has no unit");
  EXPECT_EQ(error_of({"/a", "/b", "--by", "io", "--window", "10ms"}),
            "--window: '10ms' is too short to say anything");
  EXPECT_EQ(error_of({"/a", "/b", "--tolerance", "5"}), "--tolerance: '5' is not a percentage");
  EXPECT_EQ(error_of({"/a", "/b", "--tolerance", "101%"}),
            "--tolerance: '101%' is more than all of it");
  EXPECT_THAT(error_of({"/a", "/b", "--max-moves", "0"}), HasSubstr("--max-moves: '0'"));
  EXPECT_EQ(error_of({"/a", "/b", "--apart", "db1"}),
            "--apart: 'db1' names one guest: apart from which?");
  EXPECT_EQ(error_of({"/a", "/b", "--apart", "db1,"}),
            "--apart: 'db1,' has a guest without a name");
  EXPECT_EQ(error_of({"/a", "/b", "--apart", "db1,db1"}), "--apart: 'db1,db1' names a guest twice");
  for (const char* pin : {"web1", "web1:", ":vda"}) {
    EXPECT_EQ(error_of({"/a", "/b", "--pin", pin}),
              std::string("--pin: '") + pin + "' is not VM:TARGET");
  }
  EXPECT_EQ(error_of({"/a", "/b", "--source-uri", ""}), "--source-uri: the value is empty");
}

// ---- running it ---------------------------------------------------------------------------------

class RunRebalance : public ::testing::Test {
 protected:
  RunRebalance() { FakeRebalanceWorld::fill_one(world_); }

  testing::RunResult run(std::vector<std::string> options) {
    std::vector<std::string> arguments = {"rebalance", "/mnt/a", "/mnt/b", "/mnt/c"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    Services services;
    services.rebalance_world = [this](const std::string& uri) {
      EXPECT_EQ(uri, "qemu:///system");
      auto world = std::make_unique<Lent>();
      world->lender = &world_;
      return world;
    };
    return run_cli(arguments, services);
  }
  static std::vector<std::string> events_of(const std::string& out) {
    std::vector<std::string> events;
    for (const std::string& line : lines_of(out)) events.push_back(json::parse(line).at("event"));
    return events;
  }

  // The test's world, in the command's hands.
  struct Lent final : job::RebalanceWorld {
    FakeRebalanceWorld* lender = nullptr;
    Result<memmig::StorageReport> look(const std::vector<std::string>& storages) override {
      return lender->look(storages);
    }
    Result<std::vector<memmig::DiskLoad>> loads(milliseconds window, job::Cancel& cancel) override {
      return lender->loads(window, cancel);
    }
    Status check(const job::RebalanceMove& move, job::Cancel& cancel) override {
      return lender->check(move, cancel);
    }
    Status carry_out(const job::RebalanceMove& move, job::Observer& observer,
                     job::Cancel& cancel) override {
      return lender->carry_out(move, observer, cancel);
    }
  };

  FakeRebalanceWorld world_;
};

TEST_F(RunRebalance, ProposesForPeople) {
  const auto result = run({});
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_EQ(result.out,
            R"(3 storages by space: the mean is 50.0 %, and each is to be within 5.0 points of it

  /mnt/a     90.0 GiB of 100.0 GiB   90.0 % -> 50.0 %
  /mnt/b     30.0 GiB of 100.0 GiB   30.0 % -> 50.0 %
  /mnt/c     30.0 GiB of 100.0 GiB   30.0 % -> 50.0 %

2 moves, 40.0 GiB:

  1. web2:vda, 20.0 GiB, /mnt/a -> /mnt/b
     /mnt/a is filled to 90.0 %, 40.0 points above the mean of 50.0 %
     then /mnt/a is at 70.0 %, /mnt/b at 50.0 %
  2. web3:vda, 20.0 GiB, /mnt/a -> /mnt/c
     /mnt/a is filled to 70.0 %, 20.0 points above the mean of 50.0 %
     then /mnt/a is at 50.0 %, /mnt/c at 50.0 %

Fewer bytes would not do.

Nothing was changed; --apply carries it out.
)");
  EXPECT_THAT(world_.log, IsEmpty());
}

TEST_F(RunRebalance, ProposesForPrograms) {
  const auto result = run({"--json"});
  EXPECT_EQ(result.code, kExitOk);
  ASSERT_THAT(events_of(result.out), ElementsAre("proposal"));
  const json event = json::parse(result.out);
  EXPECT_EQ(event.at("reached"), true);
  EXPECT_EQ(event.at("bytes"), (40_GiB).bytes());
  EXPECT_EQ(event.at("storages").at(0).at("share"), 0.9);
  EXPECT_EQ(event.at("moves").at(1).at("guest"), "web3");
  EXPECT_EQ(event.at("moves").at(1).at("source_share"), 0.7);
  EXPECT_EQ(event.at("disks").at(0).at("load"), nullptr);
}

TEST_F(RunRebalance, SaysThatNothingIsToBeDone) {
  const auto result = run({"--tolerance", "50%"});
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_THAT(result.out, HasSubstr("\nNothing is to be moved.\n"));
  EXPECT_THAT(result.out, Not(HasSubstr("->")));
  EXPECT_THAT(result.out, Not(HasSubstr("--apply")));
}

TEST_F(RunRebalance, SaysWhyTheToleranceCanNotBeReached) {
  for (auto& disk : world_.disks) disk.stays = "it has a backing file";
  const auto result = run({});
  EXPECT_EQ(result.code, kExitBlocked);
  EXPECT_THAT(result.out, HasSubstr("\nNo move makes it better.\nThe tolerance is not reached:\n"
                                    "  /mnt/a is filled to 90.0 %, 40.0 points above the mean"));
  EXPECT_EQ(json::parse(run({"--json"}).out).at("reached"), false);
}

TEST_F(RunRebalance, ByIoShowsTheLoadsOfWhatMoves) {
  for (auto& disk : world_.disks) disk.busy = 300'000'000;
  const auto result = run({"--by", "io", "--tolerance", "15%"});
  EXPECT_EQ(result.code, kExitOk) << result.out;
  EXPECT_EQ(result.err, "drover: measuring the load of the disks for 10s\n");
  EXPECT_THAT(result.out, HasSubstr("3 storages by io: the mean is 33.3 %"));
  EXPECT_THAT(result.out, HasSubstr("     100 requests/s of 1.0 ms each, "));
  const auto programs = run({"--by", "io", "--tolerance", "15%", "--json"});
  ASSERT_THAT(events_of(programs.out), ElementsAre("note", "proposal"));
  const json load = json::parse(lines_of(programs.out)[1]).at("disks").at(0).at("load");
  EXPECT_EQ(load.at("latency_us"), 1000);
  EXPECT_EQ(load.at("busy"), 0.3);
}

TEST_F(RunRebalance, CarriesOutForPeople) {
  const auto result = run({"--apply"});
  EXPECT_EQ(result.code, kExitOk);
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(world_.log, ElementsAre("web2:vda > /mnt/b", "web3:vda > /mnt/c"));
  EXPECT_THAT(result.out, Not(HasSubstr("Nothing was changed")));
  EXPECT_THAT(result.out, HasSubstr("\n1. web2:vda, 20.0 GiB, /mnt/a -> /mnt/b\n"));
  EXPECT_THAT(result.out, HasSubstr("copying vda\n   done\n"));
  EXPECT_THAT(result.out, HasSubstr("\n2 moves done, 40.0 GiB.\n"));
  EXPECT_THAT(result.out, HasSubstr("  /mnt/a     50.0 GiB of 100.0 GiB   50.0 %\n"));
  EXPECT_THAT(result.out, HasSubstr("\nEach is within 5.0 points of the mean of 50.0 %.\n"));
}

TEST_F(RunRebalance, CarriesOutForPrograms) {
  const auto result = run({"--apply", "--json"});
  EXPECT_EQ(result.code, kExitOk);
  ASSERT_THAT(events_of(result.out), ElementsAre("proposal", "move", "note", "move", "move", "note",
                                                 "move", "rebalanced"));
  const auto lines = lines_of(result.out);
  EXPECT_EQ(json::parse(lines[1]).at("state"), "begun");
  EXPECT_EQ(json::parse(lines[3]).at("state"), "done");
  EXPECT_EQ(json::parse(lines[6]).at("number"), 2);
  EXPECT_EQ(json::parse(lines[7]).at("reached"), true);
}

TEST_F(RunRebalance, TellsOfMovesThatFailed) {
  world_.broken["web2:vda"] = {Code::Io, "read error", "look at the disk", false};
  world_.disks[0].stays = world_.disks[1].stays = "it is shareable";
  const auto people = run({"--apply"});
  EXPECT_EQ(people.code, kExitFailed);
  EXPECT_THAT(people.out,
              HasSubstr("   web2:vda stays where it is: read error (look at the disk)\n"));
  EXPECT_THAT(people.out, HasSubstr("Planning again: web2:vda could not be moved\n"));
  EXPECT_THAT(people.out, HasSubstr("; 1 move failed.\n"));
  FakeRebalanceWorld::fill_one(world_);
  const auto programs = run({"--apply", "--json"});
  const auto lines = lines_of(programs.out);
  ASSERT_GE(lines.size(), 4U);
  EXPECT_EQ(json::parse(lines[3]).at("message"), "read error");
}

TEST_F(RunRebalance, AnErrorHasItsExitCode) {
  world_.broken["web2:vda"] = {Code::Cancelled, "the relocation was cancelled", {}, false};
  const auto result = run({"--apply"});
  EXPECT_EQ(result.code, kExitCancelled);
  EXPECT_EQ(result.err, "drover: the relocation was cancelled\n");
  EXPECT_EQ(run({"--pin", "nobody:vda"}).code, kExitNotFound);
  EXPECT_EQ(run_cli({"rebalance", "/mnt/a"}, {}).code, kExitUsage);
}

}  // namespace
}  // namespace drover::cli
