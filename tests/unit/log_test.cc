// SPDX-License-Identifier: Apache-2.0
#include "base/log.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

namespace drover {
namespace {

TEST(Log, AThreadThatLeavesTheJobsLogsGoesToStandardError) {
  std::string name = (std::filesystem::current_path() / "log-XXXXXX").string();
  const std::string directory = ::mkdtemp(name.data());
  const std::string path = directory + "/job.log";
  std::thread([&] {
    ASSERT_TRUE(log_to_file(path).has_value());
    log_warning("of the job");
  }).join();
  std::thread([] { log_warning("of its helper"); }).join();
  ::testing::internal::CaptureStderr();
  std::thread([] {
    log_to_stderr();
    log_warning("of nobody");
  }).join();
  const std::string err = ::testing::internal::GetCapturedStderr();
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  std::filesystem::remove_all(directory);
  EXPECT_NE(text.str().find("of the job"), std::string::npos);
  EXPECT_NE(text.str().find("of its helper"), std::string::npos);
  EXPECT_EQ(text.str().find("of nobody"), std::string::npos);
  EXPECT_NE(err.find("of nobody"), std::string::npos);
}

}  // namespace
}  // namespace drover
