// SPDX-License-Identifier: Apache-2.0
#include "job/noted_copy.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace drover::job {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;

class NotedCopy : public ::testing::Test {
 protected:
  NotedCopy() {
    std::string name = (fs::current_path() / "noted-copy-XXXXXX").string();
    directory_ = ::mkdtemp(name.data());
    source_ = directory_ + "/a.iso";
    fs::create_directory(directory_ + "/b");
    target_ = directory_ + "/b/a.iso";
    std::ofstream(source_) << content_;
    ::chmod(source_.c_str(), 0640);
  }
  ~NotedCopy() override { fs::remove_all(directory_); }

  static std::string read(const std::string& path) {
    std::stringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(directory_ + "/b")) {
      out.push_back(entry.path().filename());
    }
    return out;
  }

  const std::string content_ = std::string(3'000'000, 'x') + "end";
  std::string directory_, source_, target_;
  Cancel cancel_;
};

TEST_F(NotedCopy, HasTheContentOwnerAndModeAndIsFoundAgain) {
  Length last;
  const NotedCopyOptions options{.progress = [&](Length copied) { last = copied; }};
  ASSERT_TRUE(copy_noted(source_, target_, options, cancel_).has_value());
  EXPECT_EQ(read(target_), content_);
  EXPECT_EQ(last, Length(content_.size()));
  struct stat status {};
  ASSERT_EQ(::stat(target_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0640U);
  EXPECT_THAT(names(), ElementsAre("a.iso"));

  if (::geteuid() != 0) GTEST_SKIP() << "only root may write such a note";
  const auto note = note_of(source_);
  ASSERT_TRUE(note.has_value());
  EXPECT_EQ(noted_copies(directory_ + "/b"),
            (std::map<std::string, std::string>{{*note, target_}}));
  // Not when the source is another since.
  std::ofstream(source_, std::ios::app) << "more";
  EXPECT_NE(*note_of(source_), *note);
  forget_note(target_);
  EXPECT_THAT(noted_copies(directory_ + "/b"), IsEmpty());
}

TEST_F(NotedCopy, NeverReplacesAFile) {
  std::ofstream(target_) << "mine";
  const auto copied = copy_noted(source_, target_, {}, cancel_);
  ASSERT_FALSE(copied.has_value());
  EXPECT_EQ(copied.error().code, Code::AlreadyExists);
  EXPECT_EQ(read(target_), "mine");
  EXPECT_THAT(names(), ElementsAre("a.iso"));
}

TEST_F(NotedCopy, LeavesNothingWhenItIsCancelled) {
  // At this rate it would take an hour.
  const NotedCopyOptions options{.bandwidth = Length(1000),
                                 .progress = [&](Length) { cancel_.request(); }};
  const auto copied = copy_noted(source_, target_, options, cancel_);
  ASSERT_FALSE(copied.has_value());
  EXPECT_EQ(copied.error().code, Code::Cancelled);
  EXPECT_THAT(names(), IsEmpty());
}

TEST_F(NotedCopy, LeavesNothingWhenTheSourceChangesMeanwhile) {
  bool changed = false;
  const NotedCopyOptions options{.progress = [&](Length) {
    if (!std::exchange(changed, true)) std::ofstream(source_, std::ios::app) << "more";
  }};
  const auto copied = copy_noted(source_, target_, options, cancel_);
  ASSERT_FALSE(copied.has_value());
  EXPECT_EQ(copied.error().code, Code::Busy);
  EXPECT_THAT(names(), IsEmpty());
}

TEST_F(NotedCopy, WhatAKilledOneHasLeftIsNoCopyAndIsReplaced) {
  const pid_t killed = ::fork();
  ASSERT_GE(killed, 0);
  if (killed == 0) {
    (void)copy_noted(source_, target_, {.progress = [](Length) { ::_exit(0); }}, cancel_);
    ::_exit(1);
  }
  int status = 1;
  ASSERT_EQ(::waitpid(killed, &status, 0), killed);
  ASSERT_EQ(status, 0);
  ASSERT_THAT(names(), SizeIs(1));
  EXPECT_THAT(noted_copies(directory_ + "/b"), IsEmpty());
  ASSERT_TRUE(copy_noted(source_, target_, {}, cancel_).has_value());
  EXPECT_THAT(names(), ElementsAre("a.iso"));
  EXPECT_EQ(read(target_), content_);
}

TEST_F(NotedCopy, TwoFilesOfOneNameAreCopiedAtOnce) {
  fs::create_directory(directory_ + "/other");
  const std::string other = directory_ + "/other/a.iso";
  std::ofstream(other) << "other";
  bool once = false;
  const NotedCopyOptions options{.progress = [&](Length) {
    if (std::exchange(once, true)) return;
    ASSERT_TRUE(remove_unfinished_copy(other, directory_ + "/b").has_value());
    EXPECT_TRUE(copy_noted(other, directory_ + "/b/other.iso", {}, cancel_).has_value());
  }};
  ASSERT_TRUE(copy_noted(source_, target_, options, cancel_).has_value());
  EXPECT_THAT(names(), UnorderedElementsAre("a.iso", "other.iso"));
  EXPECT_EQ(read(target_), content_);
  EXPECT_EQ(read(directory_ + "/b/other.iso"), "other");
}

TEST_F(NotedCopy, OneThatIsUnderWayIsLeftAlone) {
  const NotedCopyOptions options{.progress = [&](Length) {
    const auto second = copy_noted(source_, directory_ + "/b/second.iso", {}, cancel_);
    ASSERT_FALSE(second.has_value());
    EXPECT_EQ(second.error().code, Code::Busy);
    EXPECT_FALSE(remove_unfinished_copy(source_, directory_ + "/b").has_value());
  }};
  ASSERT_TRUE(copy_noted(source_, target_, options, cancel_).has_value());
  EXPECT_THAT(names(), ElementsAre("a.iso"));
  EXPECT_EQ(read(target_), content_);
}

TEST_F(NotedCopy, AnotherFileUnderItsHiddenNameIsNotPublished) {
  bool once = false;
  std::string hidden;
  const NotedCopyOptions options{.progress = [&](Length) {
    if (std::exchange(once, true)) return;
    hidden = directory_ + "/b/" + names().front();
    fs::remove(hidden);
    std::ofstream(hidden) << "half";
  }};
  const auto copied = copy_noted(source_, target_, options, cancel_);
  ASSERT_FALSE(copied.has_value());
  EXPECT_EQ(copied.error().code, Code::Busy);
  EXPECT_FALSE(fs::exists(target_));
  EXPECT_EQ(read(hidden), "half");
}

}  // namespace
}  // namespace drover::job
