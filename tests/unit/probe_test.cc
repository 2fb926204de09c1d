// SPDX-License-Identifier: Apache-2.0
#include "memmig/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace drover::memmig {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class Probe : public testing::Test {
 protected:
  Probe() {
    std::string name = testing::TempDir() + "probe-XXXXXX";
    folder = ::mkdtemp(name.data());
    ::chmod(folder.c_str(), 0755);
  }
  ~Probe() override { std::filesystem::remove_all(folder); }

  PathFacts one(const std::string& path) {
    auto answer = probe_here({.paths = {path}});
    EXPECT_TRUE(answer);
    return answer && answer->paths.size() == 1 ? answer->paths[0] : PathFacts{};
  }
  std::string folder;
};

TEST_F(Probe, SaysWhoItIs) {
  const auto answer = probe_here({});
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->drover_version, DROVER_VERSION);
  EXPECT_FALSE(answer->hostname.empty());
  EXPECT_GT(answer->cores, 0U);
  EXPECT_FALSE(answer->qemu_user.empty());
  EXPECT_EQ(answer->host_id, probe_here({})->host_id);
  EXPECT_FALSE(answer->host_id.empty());
}

TEST_F(Probe, FileThatIsNotThere) {
  const PathFacts facts = one(folder + "/new.raw");
  EXPECT_FALSE(facts.exists);
  EXPECT_EQ(facts.kind, PathFacts::Kind::Nothing);
  EXPECT_TRUE(facts.directory_exists && facts.directory_writable);
  EXPECT_FALSE(facts.read_only_filesystem);
  EXPECT_GT(facts.free, Length(0));
  EXPECT_NE(facts.filesystem, 0U);
  EXPECT_EQ(facts.problem, "");
  EXPECT_THAT(std::filesystem::directory_iterator(folder),
              testing::Eq(std::filesystem::directory_iterator()))
      << "a probe changes nothing";
}

TEST_F(Probe, FileThatIsThere) {
  std::ofstream(folder + "/old.raw") << "12345";
  const PathFacts facts = one(folder + "/old.raw");
  EXPECT_TRUE(facts.exists);
  EXPECT_EQ(facts.kind, PathFacts::Kind::File);
  EXPECT_EQ(facts.size, Length(5));
  EXPECT_EQ(one(folder).kind, PathFacts::Kind::Directory);
}

TEST_F(Probe, LinkToNothingIsSomething) {
  ASSERT_EQ(::symlink("/nowhere/at/all", (folder + "/link").c_str()), 0);
  EXPECT_TRUE(one(folder + "/link").exists);
  EXPECT_EQ(one(folder + "/link").kind, PathFacts::Kind::Other);
}

TEST_F(Probe, DirectoryThatIsNotThere) {
  EXPECT_FALSE(one(folder + "/missing/new.raw").directory_exists);
  std::ofstream(folder + "/file") << "x";
  EXPECT_FALSE(one(folder + "/file/new.raw").directory_exists);
}

TEST_F(Probe, PathsMustBeAbsolute) {
  EXPECT_THAT(one("new.raw").problem, HasSubstr("absolute"));
  EXPECT_THAT(one("").problem, HasSubstr("absolute"));
}

TEST_F(Probe, DirectoryThatQemusUserMayNotEnter) {
  const auto answer = probe_here({});
  if (::geteuid() != 0 || answer->qemu_user == "root") GTEST_SKIP() << "needs root and a QEMU user";
  std::filesystem::create_directories(folder + "/closed/open");
  EXPECT_EQ(one(folder + "/closed/open/x").unreachable_for_qemu, "");
  ::chmod((folder + "/closed").c_str(), 0700);
  EXPECT_EQ(one(folder + "/closed/open/x").unreachable_for_qemu,
            std::filesystem::canonical(folder).string() + "/closed");
  EXPECT_TRUE(one(folder + "/closed/open/x").directory_exists);
  EXPECT_EQ(::geteuid(), 0U);
}

TEST_F(Probe, InterfacesAndPrograms) {
  const auto answer = probe_here(
      {.interfaces = {"lo", "no-such-bridge"}, .programs = {"sh", "no-such-program", "../bin/sh"}});
  ASSERT_TRUE(answer);
  EXPECT_THAT(answer->interfaces_missing, ElementsAre("no-such-bridge"));
  EXPECT_THAT(answer->programs_missing, ElementsAre("no-such-program", "../bin/sh"));
}

TEST_F(Probe, RequestAndAnswerTravelAsJson) {
  std::ofstream(folder + "/old.raw") << "12345";
  const ProbeRequest request{
      .paths = {folder + "/old.raw", folder + "/new.raw", folder + "/a\"b\xff"},
      .interfaces = {"lo", "br-none"},
      .programs = {"no-such-program"}};
  const auto text = answer_probe(to_json(request));
  ASSERT_TRUE(text) << text.error().message;
  const auto answer = parse_probe_answer(*text);
  ASSERT_TRUE(answer) << answer.error().message;
  const auto direct = probe_here(request);
  EXPECT_EQ(answer->host_id, direct->host_id);
  EXPECT_EQ(answer->qemu_user, direct->qemu_user);
  ASSERT_EQ(answer->paths.size(), 3U);
  const PathFacts* old = answer->path(folder + "/old.raw");
  ASSERT_NE(old, nullptr);
  EXPECT_EQ(old->kind, PathFacts::Kind::File);
  EXPECT_EQ(old->size, Length(5));
  EXPECT_EQ(old->filesystem, direct->paths[0].filesystem);
  EXPECT_TRUE(old->directory_exists && old->directory_writable);
  EXPECT_EQ(answer->paths[1].kind, PathFacts::Kind::Nothing);
  EXPECT_THAT(answer->interfaces_missing, ElementsAre("br-none"));
  EXPECT_THAT(answer->programs_missing, ElementsAre("no-such-program"));
}

TEST_F(Probe, WhatALoginScriptPrintsIsSkipped) {
  const auto answer = parse_probe_answer("Welcome\n\n{to this} host\n{}\n{\"drover-version\":\"9\",\"paths\":[]}\nBye\n");
  ASSERT_TRUE(answer) << answer.error().message;
  EXPECT_EQ(answer->drover_version, "9");
}

TEST_F(Probe, NonsenseIsRefused) {
  for (const char* text :
       {"", "[]", "{\"paths\":1}", "{\"paths\":[1]}", "{\"interfaces\":\"lo\"}", "{"}) {
    const auto answer = answer_probe(text);
    ASSERT_FALSE(answer) << text;
    EXPECT_EQ(answer.error().code, Code::InvalidArgument);
  }
  for (const char* text :
       {"", "[]", "{}", "{\"drover-version\":1}", "{\"drover-version\":\"1\",\"paths\":{}}",
        "{\"drover-version\":\"1\",\"paths\":[{\"size\":-1}]}",
        "{\"drover-version\":\"1\",\"cores\":\"many\"}", "bash: drover: command not found", "Welcome\n", "Welcome"}) {
    const auto answer = parse_probe_answer(text);
    ASSERT_FALSE(answer) << text;
    EXPECT_EQ(answer.error().code, Code::Protocol);
  }
  ProbeRequest huge;
  huge.paths.resize(kMaxProbePaths + 1, "/x");
  EXPECT_FALSE(answer_probe(to_json(huge)));
}

TEST_F(Probe, AnswerOfALaterVersionIsUnderstood) {
  const auto answer = parse_probe_answer(
      R"({"drover-version":"9","new":{},"paths":[{"path":"/x","exists":true,"kind":"hologram"}]})");
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->paths[0].kind, PathFacts::Kind::Other);
}

}  // namespace
}  // namespace drover::memmig
