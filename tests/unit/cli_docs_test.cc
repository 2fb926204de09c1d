// SPDX-License-Identifier: Apache-2.0
//
// The manual pages and the completion say what the program says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>

#include "base/subprocess.h"
#include "cli/config.h"
#include "cli/exit_codes.h"
#include "cli/jobs_view.h"
#include "cli/json_events.h"
#include "cli/evacuate_view.h"
#include "cli/rebalance_view.h"
#include "tests/fakes/fake_evacuate_world.h"
#include "tests/fakes/fake_rebalance_world.h"
#include "tests/unit/cli_fake_job.h"

namespace drover::cli {
namespace {

using testing::lines_of;
using testing::sample_blocker;
using testing::sample_plan;
using testing::sample_progress;
using testing::sample_summary;

using Names = std::set<std::string>;

const std::vector<std::string> kPages = {"drover.1", "drover-move.1", "drover-check.1",
                                         "drover-evacuate.1", "drover-index.1", "drover-jobs.1",
                                         "drover-rebalance.1",
                                         "drover-relocate.1"};

std::string page_path(const std::string& page) {
  return std::string(DROVER_SOURCE) + "/docs/" + page;
}

// A page's source, with its escaped dashes as dashes.
std::string page_text(const std::string& page) {
  std::ifstream file(page_path(page));
  EXPECT_TRUE(file) << page;
  std::stringstream text;
  text << file.rdbuf();
  return std::regex_replace(text.str(), std::regex(R"(\\-)"), "-");
}

// What comes between the heading `name` and the next one of its level.
std::string section(const std::string& text, const std::string& heading) {
  const std::size_t start = text.find(heading + "\n");
  if (start == std::string::npos) {
    ADD_FAILURE() << "no " << heading;
    return "";
  }
  return text.substr(start, text.find("\n.S", start + heading.size()) - start);
}

Names all_matches(const std::string& text, const std::string& pattern) {
  const std::regex regex(pattern);
  Names out;
  for (std::sregex_iterator at(text.begin(), text.end(), regex), end; at != end; ++at) {
    out.insert((*at)[1]);
  }
  return out;
}

// The options in the lists of --help (which begin with two spaces), "--json" and "-h".
Names options_of_help(const std::vector<std::string>& arguments) {
  const auto command = parse_command_line(arguments, "/nonexistent/drover.toml");
  Names out;
  const std::string options = std::get<ShowCommand>(*command).text;
  for (const std::string& line : lines_of(options.substr(0, options.find("Examples:")))) {
    static const std::regex kOption(R"(^  (-[^ ,]+(, --[^ ]+)?))");
    std::smatch match;
    if (std::regex_search(line, match, kOption))
      out.merge(all_matches(match[1], R"((--?[a-z][a-z-]*))"));
  }
  return out;
}

// The options that a page's OPTIONS list: the tag is the line behind .TP.
Names options_of_page(const std::string& page) {
  Names out;
  bool tag = false;
  for (const std::string& line : lines_of(section(page_text(page), ".SH OPTIONS"))) {
    if (tag) out.merge(all_matches(line, R"((?:^|[ "])(--?[a-z][a-z-]*))"));
    tag = line == ".TP";
  }
  return out;
}

TEST(ManualPages, ListTheOptionsOfHelpAndNoOthers) {
  EXPECT_EQ(options_of_page("drover-move.1"), options_of_help({"move", "--help"}));
  EXPECT_EQ(options_of_page("drover-check.1"), options_of_help({"check", "--help"}));
  EXPECT_EQ(options_of_page("drover-relocate.1"), options_of_help({"relocate", "--help"}));
  EXPECT_EQ(options_of_page("drover.1"), options_of_help({"--help"}));
  Names of_jobs;
  for (const char* command : {"jobs", "status", "watch", "cancel", "resume", "history", "set"}) {
    of_jobs.merge(options_of_help({command, "--help"}));
  }
  EXPECT_EQ(options_of_page("drover-jobs.1"), of_jobs);
  EXPECT_EQ(options_of_page("drover-rebalance.1"), options_of_help({"rebalance", "--help"}));
  EXPECT_EQ(options_of_page("drover-evacuate.1"), options_of_help({"evacuate", "--help"}));
  EXPECT_EQ(options_of_page("drover-index.1"), options_of_help({"index", "--help"}));
  EXPECT_GE(options_of_page("drover-move.1").size(), 15U);  // or the patterns above are wrong
  EXPECT_TRUE(options_of_page("drover-move.1").contains("--max-downtime"));
  EXPECT_TRUE(options_of_page("drover.1").contains("-h"));
}

TEST(ManualPages, SayTheSameDefaultsAsTheHelp) {
  const auto command = parse_command_line({"move", "--help"}, "/etc/drover.toml.not-there");
  const std::string help = std::get<ShowCommand>(*command).text;
  const std::string page = page_text("drover-move.1");
  for (const auto& [option, standard] :
       {std::pair("--max-downtime", "500ms"), std::pair("--connections", "2"),
        std::pair("--bandwidth", "none"), std::pair("--link-timeout", "none"),
         std::pair("--max-slowdown", "5s"), std::pair("--memory-channels", "auto"),
         std::pair("--compress", "auto")}) {
    EXPECT_NE(page.find("Default: " + std::string(standard) + "."), std::string::npos) << option;
    EXPECT_NE(help.find("[default: " + std::string(standard) + "]"), std::string::npos) << option;
  }
}

TEST(ManualPages, ListTheExitCodes) {
  Names documented;
  bool tag = false;
  for (const std::string& line : lines_of(section(page_text("drover.1"), ".SH EXIT STATUS"))) {
    if (tag) documented.merge(all_matches(line, R"(^\.B ([0-9]+)$)"));
    tag = line == ".TP";
  }
  Names used = {std::to_string(kExitOk), std::to_string(kExitLeft)};
  for (int code = 0; code <= static_cast<int>(Code::Held); ++code) {
    used.insert(std::to_string(exit_code(static_cast<Code>(code))));
  }
  EXPECT_EQ(documented, used);
}

TEST(ManualPages, ListTheKeysOfTheConfigurationFile) {
  const std::string text = section(page_text("drover.1"), ".SH CONFIGURATION FILE");
  Names keys;
  for (const std::string_view key : config_keys()) keys.emplace(key);
  EXPECT_EQ(all_matches(text, R"(\n([a-z-]+) = )"), keys);
  // And what they show is a file that can be read.
  const std::size_t start = text.find(".nf\n") + 4;
  job::MoveOptions options;
  const Status read =
      read_config({"the example", text.substr(start, text.find(".fi", start) - start)}, options);
  EXPECT_TRUE(read.has_value()) << read.error().to_string();
}

// All names of an object and of those in it.
void collect(const nlohmann::json& json, Names& out) {
  if (json.is_array()) {
    for (const auto& item : json) collect(item, out);
  } else if (json.is_object()) {
    for (const auto& [name, value] : json.items()) {
      if (name != "event") out.insert(name);
      collect(value, out);
    }
  }
}

TEST(ManualPages, ListTheFieldsOfEachEvent) {
  job::Plan plan = sample_plan();
  plan.findings = {sample_blocker()};
  ProgressTracker tracker;
  const std::map<std::string, std::string> events = {
      {"started", json_started("web1-0a")},
      {"plan", json_plan(plan)},
      {"progress", json_progress(tracker.update(sample_progress()))},
      {"note", json_note("text")},
      {"summary", json_summary(sample_summary())},
      {"error", json_error({Code::Io, "m", "h", false})}};
  const std::string json = section(page_text("drover-move.1"), ".SS JSON");
  for (const auto& [event, text] : events) {
    Names fields;
    collect(nlohmann::json::parse(text), fields);
    if (event == "summary") {  // its disks are those of the plan
      Names of_plan;
      collect(nlohmann::json::parse(events.at("plan")).at("disks"), of_plan);
      for (const std::string& name : of_plan) fields.erase(name);
    }
    const std::size_t start = json.find(".TP\n.B " + event + "\n");
    ASSERT_NE(start, std::string::npos) << event;
    const std::string entry = json.substr(start, json.find("\n.TP", start + 4) - start);
    Names documented = all_matches(entry, R"(\n\.BR? ([a-z_]+))");
    documented.erase(event);
    EXPECT_EQ(documented, fields) << event;
  }
}

// The members of an event of `--json`, but for its name; `deep`: those of its values, too.
Names fields_of(const std::string& text, bool deep) {
  Names fields;
  const nlohmann::json object = nlohmann::json::parse(text);
  for (const auto& [name, value] : object.items()) {
    if (name != "event") fields.insert(name);
    if (deep) collect(value, fields);
  }
  return fields;
}

// Those that the page's section describes in the event's entry; none, and a failure, where it has no entry.
Names documented_fields(const std::string& section_text, const std::string& event) {
  const std::size_t start = section_text.find(".TP\n.B " + event + "\n");
  if (start == std::string::npos) {
    ADD_FAILURE() << "no entry for " << event;
    return {};
  }
  const std::string entry =
      section_text.substr(start, section_text.find("\n.TP", start + 4) - start);
  Names documented = all_matches(entry, R"(\n\.BR? ([a-z_]+)(?! \())");
  documented.erase(event);
  return documented;
}

TEST(ManualPages, ListTheFieldsOfWhatRebalanceSays) {
  job::testing::FakeRebalanceWorld world;
  job::testing::FakeRebalanceWorld::fill_one(world);
  for (auto& disk : world.disks) disk.busy = 1;
  job::Cancel cancel;
  const auto proposal = job::propose_rebalance({.storages = {"/mnt/a", "/mnt/b", "/mnt/c"},
                                                .by = job::RebalanceProblem::By::Io,
                                                .tolerance = 0.15},
                                               world, cancel);
  ASSERT_TRUE(proposal.has_value());
  ASSERT_FALSE(proposal->moves.empty());
  const MoveView view{1, proposal->moves[0]};
  const std::map<std::string, std::string> events = {
      {"proposal", json_proposal(*proposal, "why")},
      {"move", json_end(view, {})},
      {"rebalanced", json_rebalanced({.last = *proposal})}};
  const std::string section_text = section(page_text("drover-rebalance.1"), ".SS JSON");
  for (const auto& [event, text] : events) {
    Names fields = fields_of(text, event == "proposal");  // storages are described only there
    Names documented = documented_fields(section_text, event);
    // The events of the moves themselves are only named.
    if (event == "move") {
      for (const char* other : {"started", "progress", "note", "drover"}) documented.erase(other);
    }
    EXPECT_EQ(documented, fields) << event;
  }
}

TEST(ManualPages, ListTheFieldsOfWhatEvacuateSays) {
  job::testing::FakeEvacuateWorld world;
  job::testing::FakeEvacuateWorld::fill(world);
  world.jobs = {{"web2-1", "web2", "uuid-of-web2", false}};
  world.items.back().stays = "why";
  job::Cancel cancel;
  const auto proposal =
      job::propose_evacuation({.from = "/mnt/a", .to = {"/mnt/b"}}, world, cancel);
  ASSERT_TRUE(proposal.has_value());
  ASSERT_FALSE(proposal->plan.steps.empty() || proposal->plan.obstacles.empty());
  const std::map<std::string, std::string> events = {
      {"evacuation", json_evacuation(*proposal)},
      {"step", json_step(*proposal, 0, "done", {})},
      {"resume", json_resume(world.jobs[0], "done", {})},
      {"evacuated", json_evacuated({})}};
  const std::string section_text = section(page_text("drover-evacuate.1"), ".SS JSON");
  for (const auto& [event, text] : events) {
    Names fields = fields_of(text, event == "evacuation");  // steps are described only there
    Names documented = documented_fields(section_text, event);
    if (event == "step") {  // its other members are those of a step of the plan
      for (const char* other : {"number", "kind", "guests", "bytes", "files"}) fields.erase(other);
    }
    EXPECT_EQ(documented, fields) << event;
  }
}

TEST(ManualPages, ListTheMembersOfAJobAndOfTheHistory) {
  job::JobView view;
  view.record = job::testing::sample_record();
  view.status = job::JobStatus{};
  const auto names_of = [](const std::string& line) {
    Names names;
    const nlohmann::json object = nlohmann::json::parse(line);
    for (const auto& [name, value] : object.items()) names.insert(name);
    return names;
  };
  const std::string json = section(page_text("drover-jobs.1"), ".SS JSON");
  const std::size_t history = json.find("\n.B history\n");
  ASSERT_NE(history, std::string::npos);
  Names of_job = all_matches(json.substr(0, history), R"(\n\.BR? ([a-z_]+)(?! \())");
  of_job.erase("jobs");
  Names expected = names_of(json_job(view));
  EXPECT_THAT(of_job, ::testing::IsSupersetOf(expected));
  Names of_history = all_matches(json.substr(history), R"(\n\.BR? ([a-z_]+))");
  of_history.erase("history");
  EXPECT_EQ(of_history, names_of(json_history({})));
}

TEST(ManualPages, NameEachPhase) {
  const std::string text = page_text("drover-move.1");
  for (int phase = 0; phase <= static_cast<int>(job::Phase::Undo); ++phase) {
    const std::string name(job::phase_name(static_cast<job::Phase>(phase)));
    const bool named = text.find("\n.B " + name + "\n") != std::string::npos ||
                       text.find("\n.BR " + name + " ") != std::string::npos;
    EXPECT_TRUE(named) << name;
  }
}

TEST(ManualPages, AreFormattedWithoutWarnings) {
  for (const std::string& page : kPages) {
    const std::vector<std::vector<std::string>> checkers = {
        {"groff", "-ww", "-man", "-z", "-Tutf8", page_path(page)},
        {"mandoc", "-T", "lint", "-W", "warning", page_path(page)}};
    bool checked = false;
    for (const auto& checker : checkers) {
      const auto result = run_process(checker);
      if (!result && result.error().code == Code::NotFound) continue;
      ASSERT_TRUE(result.has_value()) << result.error().to_string();
      EXPECT_EQ(result->exit_code, 0) << page;
      EXPECT_EQ(result->err + result->out, "") << page;
      checked = true;
      break;
    }
    if (!checked) GTEST_SKIP() << "neither groff nor mandoc is installed (Debian: groff-base)";
  }
}

// ---- the completion -----------------------------------------------------------------------------

// What bash would offer for a command line whose last word is to be completed.
Names completions(const std::vector<std::string>& words) {
  std::string script =
      "source '" + std::string(DROVER_SOURCE) + "/packaging/drover.bash-completion'\n";
  script +=
      "virsh() { case $2 in list) echo web1; echo db1;; domblklist) echo 'vda /a'; echo 'vdb /b';; "
      "esac; }\n";
  script += "COMP_WORDS=(drover";
  for (const std::string& word : words) script += " '" + word + "'";
  script += ")\nCOMP_CWORD=" + std::to_string(words.size()) +
            "\n_drover\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n";
  const auto result = run_process({"bash", "--norc", "-c", script});
  EXPECT_TRUE(result.has_value());
  if (!result) return {};
  EXPECT_EQ(result->err, "");
  Names out;
  for (const std::string& line : lines_of(result->out)) {
    if (!line.empty()) out.insert(line);
  }
  return out;
}

TEST(Completion, OffersTheOptionsOfHelpAndNoOthers) {
  for (const std::vector<std::string>& command : {std::vector<std::string>{"move"},
                                                  {"check"},
                                                  {"relocate"},
                                                  {"jobs"},
                                                  {"status"},
                                                  {"watch"},
                                                  {"cancel"},
                                                  {"resume"},
                                                  {"history"},
                                                  {"set"},
                                                  {"receive"},
                                                  {"rebalance"},
                                                  {"evacuate"},
                                                  {"index"},
                                                  {}}) {
    std::vector<std::string> words = command;
    words.emplace_back("-");
    std::vector<std::string> help = command;
    help.emplace_back("--help");
    Names options = options_of_help(help);
    options.erase("-h");
    EXPECT_EQ(completions(words), options);
  }
}

TEST(Completion, KnowsCommandsGuestsAndDisks) {
  EXPECT_EQ(completions({""}), (Names{"cancel", "check", "evacuate", "history", "index", "jobs", "move", "rebalance", "relocate",
                                      "resume", "set", "status", "watch"}));
  EXPECT_EQ(completions({"mo"}), (Names{"move"}));
  EXPECT_EQ(completions({"relocate", "web1", "/mnt", "--disk", ""}), (Names{"vda", "vdb"}));
  EXPECT_EQ(completions({"relocate", "w"}), (Names{"web1"}));
  EXPECT_EQ(completions({"move", ""}), (Names{"db1", "web1"}));
  EXPECT_EQ(completions({"move", "--port", "1", "w"}), (Names{"web1"}));
  EXPECT_EQ(completions({"move", "--port", "=", "1", "w"}), (Names{"web1"}));
  EXPECT_EQ(completions({"move", "--disk", "vda", "=", "/srv/a", "w"}), (Names{"web1"}));
  EXPECT_EQ(completions({"move", "web1", "hostb", "--disk", ""}), (Names{"vda=", "vdb="}));
  EXPECT_EQ(completions({"move", "web1", "hostb", "--bandwidth", ""}), Names{});
}

TEST(Completion, KnowsTheJobs) {
  const job::testing::TemporaryPlaces temporary;
  const job::JobStore store(temporary.places());
  const auto job = store.create(job::testing::sample_record());
  ASSERT_TRUE(job.has_value());
  ::setenv("DROVER_JOBS", temporary.places().jobs().c_str(), 1);
  for (const char* command : {"status", "watch", "cancel", "resume", "set"}) {
    EXPECT_EQ(completions({command, ""}), Names{(*job)->id()});
    EXPECT_EQ(completions({command, "x"}), Names{});
  }
  EXPECT_EQ(completions({"jobs", ""}), Names{});
  ::setenv("DROVER_JOBS", "/nonexistent", 1);
  EXPECT_EQ(completions({"watch", ""}), Names{});
  ::unsetenv("DROVER_JOBS");
}

}  // namespace
}  // namespace drover::cli
