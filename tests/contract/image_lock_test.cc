// SPDX-License-Identifier: Apache-2.0
//
// The guard of invariant 6 against the program it must stop: QEMU's own block layer (qemu-io).
#include "memmig/image_lock.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

#include "base/subprocess.h"
#include "base/unique_fd.h"

namespace drover::memmig {
namespace {

using testing::HasSubstr;

class InvariantSixGuard : public testing::TestWithParam<const char*> {
 protected:
  InvariantSixGuard() {
    std::string name = testing::TempDir() + "guard-XXXXXX";
    folder = ::mkdtemp(name.data());
    image = folder + "/disk." + GetParam();
    EXPECT_EQ(run({"qemu-img", "create", "-q", "-f", GetParam(), image, "1M"}).exit_code, 0);
  }
  ~InvariantSixGuard() override { std::filesystem::remove_all(folder); }

  static ProcessResult run(const std::vector<std::string>& argv) {
    auto result = run_process(argv);
    EXPECT_TRUE(result) << result.error().message;
    return result.value_or(ProcessResult{});
  }
  [[nodiscard]] ProcessResult io(const char* command) const {
    return run({"qemu-io", "-f", GetParam(), "-c", command, image});
  }

  // A QEMU that has the image open until this goes.
  class Holder {
   public:
    Holder(const InvariantSixGuard& test, bool writing) {
      std::array<int, 2> input{};
      std::array<int, 2> output{};
      EXPECT_EQ(::pipe2(input.data(), O_CLOEXEC), 0);
      EXPECT_EQ(::pipe2(output.data(), O_CLOEXEC), 0);
      const UniqueFd program_input(input[0]);
      commands_ = UniqueFd(input[1]);
      const UniqueFd answers(output[0]);
      UniqueFd program_output(output[1]);
      std::vector<std::string> argv = {"qemu-io", "-f", GetParam(), test.image};
      if (!writing) argv.insert(argv.begin() + 1, "-r");
      auto started =
          ChildProcess::start(argv, {.input = program_input.get(), .output = program_output.get()});
      EXPECT_TRUE(started);
      if (started) child_.emplace(std::move(*started));
      program_output.reset();
      // It asks for a command when it has opened the image.
      const std::string command = "length\n";
      EXPECT_EQ(::write(commands_.get(), command.data(), command.size()),
                static_cast<ssize_t>(command.size()));
      std::string said;
      std::array<char, 256> buffer{};
      while (said.find("1 MiB") == std::string::npos) {
        const ssize_t count = ::read(answers.get(), buffer.data(), buffer.size());
        if (count <= 0) {
          ADD_FAILURE() << said;
          break;
        }
        said.append(buffer.data(), static_cast<std::size_t>(count));
      }
    }

   private:
    UniqueFd commands_;
    std::optional<ChildProcess> child_;
  };

  std::string folder;
  std::string image;
};

TEST_P(InvariantSixGuard, KeepsQemuFromWriting) {
  {
    const auto guard = lock_image(image);
    ASSERT_TRUE(guard) << guard.error().message;
    const ProcessResult refused = io("write -P 7 0 4096");
    EXPECT_NE(refused.exit_code, 0);
    EXPECT_THAT(refused.err + refused.out, HasSubstr("Failed to get \"write\" lock"));
    // Reading is nobody's danger.
    EXPECT_EQ(run({"qemu-io", "-r", "-f", GetParam(), "-c", "read 0 4096", image}).exit_code, 0);
  }
  EXPECT_EQ(io("write -P 7 0 4096").exit_code, 0);  // it went with the object
}

TEST_P(InvariantSixGuard, IsNotHadWhileQemuWrites) {
  const Holder writer(*this, true);
  const auto guard = lock_image(image);
  ASSERT_FALSE(guard);
  EXPECT_EQ(guard.error().code, Code::Busy);
  EXPECT_TRUE(guard.error().retryable);
  EXPECT_THAT(guard.error().message, HasSubstr(image));
}

TEST_P(InvariantSixGuard, IsHadWhileQemuReads) {
  const Holder reader(*this, false);
  EXPECT_TRUE(lock_image(image));
}

TEST_P(InvariantSixGuard, IsFreeAgainWhenItWasRefused) {
  {
    const Holder writer(*this, true);
    EXPECT_FALSE(lock_image(image));
  }
  EXPECT_EQ(io("write -P 7 0 4096").exit_code, 0);
  EXPECT_TRUE(lock_image(image));
}

TEST_P(InvariantSixGuard, SurvivesThatTheFileIsOpenedAndClosedElsewhere) {
  // Classic POSIX locks would be lost with any close() of the file in this process.
  const auto guard = lock_image(image);
  ASSERT_TRUE(guard);
  { const UniqueFd other(::open(image.c_str(), O_RDONLY | O_CLOEXEC)); }
  { EXPECT_TRUE(lock_image(image)); }
  EXPECT_NE(io("write -P 7 0 4096").exit_code, 0);
}

TEST_P(InvariantSixGuard, WritesNothing) {
  const auto before = std::filesystem::last_write_time(image);
  EXPECT_TRUE(lock_image(image));
  EXPECT_EQ(std::filesystem::last_write_time(image), before);
}

TEST_P(InvariantSixGuard, NeedsTheFile) {
  const auto guard = lock_image(folder + "/missing");
  ASSERT_FALSE(guard);
  EXPECT_EQ(guard.error().code, Code::NotFound);
}

INSTANTIATE_TEST_SUITE_P(Formats, InvariantSixGuard, testing::Values("raw", "qcow2"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace drover::memmig
