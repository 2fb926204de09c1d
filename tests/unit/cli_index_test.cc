// SPDX-License-Identifier: Apache-2.0
//
// `drover index`: its command line, and what it prints for images in a directory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "cli/exit_codes.h"
#include "tests/fakes/job_samples.h"
#include "tests/unit/cli_fake_job.h"

namespace drover::cli {
namespace {

using nlohmann::json;
using testing::Captured;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::lines_of;

std::string error_of(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "index");
  const auto command = parse_command_line(arguments, "/nonexistent/drover.toml");
  return command ? "no error" : command.error().message;
}

TEST(IndexCommandLine, TakesPathsAndOptions) {
  const auto command = parse_command_line({"index", "/a", "--remove", "/b", "/c", "--json"}, "");
  ASSERT_TRUE(command.has_value()) << command.error().to_string();
  const auto& index = std::get<IndexCommand>(*command);
  EXPECT_THAT(index.paths, ElementsAre("/a", "/c"));
  EXPECT_THAT(index.remove, ElementsAre("/b"));
  EXPECT_TRUE(index.json && !index.list);
}

TEST(IndexCommandLine, SaysWhatIsWrong) {
  EXPECT_EQ(error_of({}), "name a PATH, or --list");
  EXPECT_EQ(error_of({""}), "a PATH is empty");
  EXPECT_THAT(error_of({"--list", "/a"}), HasSubstr("--list changes nothing"));
}

class RunIndex : public ::testing::Test {
 protected:
  // The lines that it prints.
  std::vector<std::string> index(std::vector<std::string> arguments, int code = kExitOk) {
    arguments.insert(arguments.begin(), "index");
    const Captured out;
    const Captured err;
    Surroundings surroundings{.out = out.fd(), .err = err.fd()};
    surroundings.index_directory = places_.directory() + "/index";
    EXPECT_EQ(run(arguments, Services(), surroundings), code) << err.text();
    return lines_of(out.text());
  }
  std::string image(const std::string& name, char fill) {
    std::filesystem::create_directories(places_.directory() + "/images");
    const std::string path = places_.directory() + "/images/" + name;
    std::ofstream(path) << std::string(2 << 20, fill);
    return path;
  }
  job::testing::TemporaryPlaces places_;
};

TEST_F(RunIndex, ReadsTheImagesOfADirectory) {
  const std::string a = image("a.raw", 'a');
  const std::string b = image("b.raw", 'b');
  (void)image(".hidden", 'c');
  std::ofstream(places_.directory() + "/images/readme") << "small";
  const std::string images = places_.directory() + "/images";
  EXPECT_THAT(index({"--list"}), ElementsAre("there is no content index on this host"));
  EXPECT_THAT(index({images}),
              ElementsAre(a + ": read, 2.0 MiB of data", b + ": read, 2.0 MiB of data"));
  EXPECT_THAT(index({images}),
              ElementsAre(a + ": unchanged, 2.0 MiB of data", b + ": unchanged, 2.0 MiB of data"));
  EXPECT_THAT(index({"--remove", a}), ElementsAre(a + ": removed"));
  std::filesystem::remove(b);
  EXPECT_THAT(index({a}), ElementsAre(b + ": gone", a + ": read, 2.0 MiB of data"));
  const auto listed = index({"--list", "--json"});
  ASSERT_EQ(listed.size(), 1U);
  const json object = json::parse(listed[0]);
  EXPECT_EQ(object.at("path"), a);
  EXPECT_EQ(object.at("state"), "known");
  EXPECT_EQ(object.at("size_bytes"), 2 << 20);
  EXPECT_EQ(object.at("pieces"), 32);
}

TEST_F(RunIndex, WhatCanNotBeReadIsToldAndTheRestIsRead) {
  const std::string a = image("a.raw", 'a');
  EXPECT_THAT(index({"/nonexistent/image", a}, kExitNotFound),
              ElementsAre(a + ": read, 2.0 MiB of data"));
  const auto lines = index({"/nonexistent/image", "--json"}, kExitNotFound);
  ASSERT_EQ(lines.size(), 1U);
  EXPECT_EQ(json::parse(lines[0]).at("event"), "error");
}

}  // namespace
}  // namespace drover::cli
