// SPDX-License-Identifier: Apache-2.0
//
// The images of a relocation: whoever is killed when, nothing of theirs is left, and nobody else's
// file is touched.
#include "job/new_images.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "blockcopy/image_file.h"
#include "tests/fakes/job_samples.h"

namespace drover::job {
namespace {

namespace fs = std::filesystem;

class NewImagesTest : public ::testing::Test {
 protected:
  NewImagesTest() {
    fs::create_directory(path("a"));
    fs::create_directory(path("b"));
    std::ofstream(path("a/web1.raw")) << "old";
    fs::resize_file(path("a/web1.raw"), (1_MiB).bytes());
    disk_ = {.disk = "vda",
             .source_path = path("a/web1.raw"),
             .source_format = "raw",
             .target_path = path("b/web1.raw"),
             .target_format = "raw",
             .delete_source = true,
             .virtual_size = 1_MiB};
    again();
  }

  [[nodiscard]] std::string path(const std::string& name) const {
    return temporary_.directory() + "/" + name;
  }
  // As another process, with the same journal.
  void again() {
    images_.reset();
    journal_.reset();
    journal_ = std::move(*Journal::open(path("journal")));
    images_ = std::make_unique<NewImages>(
        *journal_, NewImages::Options{.job = "web1-0a", .work_directory = temporary_.directory()});
  }
  [[nodiscard]] std::set<std::string> there() const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(path("b"))) {
      names.insert(entry.path().filename().string());
    }
    return names;
  }
  using Names = std::set<std::string>;

  testing::TemporaryPlaces temporary_;
  DiskPlan disk_;
  std::unique_ptr<Journal> journal_;
  std::unique_ptr<NewImages> images_;
};

TEST_F(NewImagesTest, OneThatIsMadeIsThinAndGoesAgain) {
  ASSERT_TRUE(images_->make(disk_, Length()).has_value());
  EXPECT_EQ(there(), Names{"web1.raw"});
  EXPECT_EQ(fs::file_size(disk_.target_path), (1_MiB).bytes());
  EXPECT_LT(*blockcopy::allocated(disk_.target_path), 64_KiB);
  again();
  EXPECT_TRUE(images_->remove(disk_).has_value());
  EXPECT_EQ(there(), Names{});
  EXPECT_TRUE(images_->remove(disk_).has_value()) << "twice is fine";
}

TEST_F(NewImagesTest, WhatIsThereAlreadyIsNeverTouched) {
  std::ofstream(disk_.target_path) << "another's";
  const Status made = images_->make(disk_, Length());
  ASSERT_FALSE(made.has_value());
  EXPECT_EQ(made.error().code, Code::AlreadyExists);
  EXPECT_TRUE(images_->remove(disk_).has_value());
  EXPECT_EQ(there(), Names{"web1.raw"}) << "the hidden one is gone";
}

TEST_F(NewImagesTest, AKilledProcessLeavesOnlyAHiddenFileThatTheNextOneRemoves) {
  ASSERT_TRUE(images_->begin(disk_, Length()).has_value());
  EXPECT_EQ(there(), Names{".drover-web1-0a-vda"});
  again();
  EXPECT_TRUE(images_->remove(disk_).has_value());
  EXPECT_EQ(there(), Names{});
}

TEST_F(NewImagesTest, OneThatWasFinishedIsPublishedByTheNextProcessOnce) {
  {
    const auto target = images_->begin(disk_, Length());
    ASSERT_TRUE(target.has_value());
    ASSERT_TRUE((*target)->release().has_value());
  }
  ASSERT_TRUE(images_->finish(disk_).has_value());
  again();
  EXPECT_TRUE(images_->publish(disk_).has_value());
  EXPECT_TRUE(images_->publish(disk_).has_value());
  EXPECT_EQ(there(), Names{"web1.raw"});
  again();
  EXPECT_TRUE(images_->remove(disk_).has_value()) << "it is known by its number";
  EXPECT_EQ(there(), Names{});
}

TEST_F(NewImagesTest, ALinkIsTheSourceUnderAnotherName) {
  ASSERT_TRUE(images_->note_source(disk_).has_value());
  ASSERT_TRUE(images_->link(disk_).has_value());
  ASSERT_TRUE(images_->publish(disk_).has_value());
  EXPECT_TRUE(blockcopy::same_file(disk_.source_path, disk_.target_path));
  EXPECT_TRUE(images_->remove_source(disk_).has_value());
  EXPECT_FALSE(fs::exists(disk_.source_path));
  EXPECT_EQ(there(), Names{"web1.raw"});
}

TEST_F(NewImagesTest, ASourceThatWasReplacedIsNotDeleted) {
  EXPECT_FALSE(images_->remove_source(disk_).has_value()) << "it was never noted";
  ASSERT_TRUE(images_->note_source(disk_).has_value());
  fs::rename(disk_.source_path, path("a/kept"));
  std::ofstream(disk_.source_path) << "another's";
  again();
  EXPECT_EQ(images_->remove_source(disk_).error().code, Code::Busy);
  EXPECT_TRUE(fs::exists(disk_.source_path));
}

TEST_F(NewImagesTest, ErrorsNameTheImageNotItsHiddenName) {
  const Error error{Code::NoSpace, "writing " + path("b/.drover-web1-0a-vda") + ": full", "",
                    false};
  EXPECT_EQ(images_->in_its_own_name(disk_, error).message,
            "writing " + disk_.target_path + ": full");
}

}  // namespace
}  // namespace drover::job
