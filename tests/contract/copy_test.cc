// SPDX-License-Identifier: Apache-2.0
//
// The copier: over fakes that tear, delay and fail, and over real images; and what is done with
// image files beside it.
#include "blockcopy/copy.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <fstream>

#include "base/subprocess.h"
#include "base/unique_fd.h"
#include "blockcopy/image_file.h"
#include "tests/contract/image_places.h"
#include "tests/fakes/fake_image.h"

namespace drover::blockcopy {
namespace {

using fakes::FakeImage;
using fakes::FakeImageOptions;

class Copying : public ::testing::Test {
 protected:
  Copying() : loop_(std::move(*Loop::create())) {
    std::string name = "/tmp/drover-copy-XXXXXX";
    CHECK(::mkdtemp(name.data()) != nullptr, "a temporary directory can be made");
    directory_ = name;
  }
  ~Copying() override {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }

  // Steps of the fakes, as the loop takes them.
  FakeImage::Schedule schedule() {
    return [this](std::function<void()> step) { loop_->post(std::move(step)); };
  }
  [[nodiscard]] std::string path(const std::string& name) const { return directory_ + "/" + name; }

  // Data in the middle, at an odd place, and zeroes within them.
  void fill(FakeImage& image) {
    std::vector<std::byte> bytes((3_MiB).bytes() + 777, std::byte{0x5a});
    std::fill_n(bytes.begin() + (1 << 20), 300'000, std::byte{0});
    image.preset(Offset(12'345), bytes);
  }

  std::unique_ptr<Loop> loop_;
  std::string directory_;
};

TEST_F(Copying, EveryByteArrivesWhateverTheOrder) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    FakeImage source(8_MiB, seed, schedule());
    FakeImage target(8_MiB, seed + 1, schedule());
    fill(source);
    Length copied;
    Length data;
    const auto reader = source.open_reader();
    const auto writer = target.open_writer();
    const Status done = copy_image(*loop_, *reader, *writer,
                                   {.target_zero = true, .progress = [&](Length now, Length all) {
                                      EXPECT_GE(now, copied);
                                      copied = now;
                                      data = all;
                                    }});
    ASSERT_TRUE(done.has_value()) << done.error().to_string();
    EXPECT_TRUE(std::ranges::equal(source.content(), target.content())) << seed;
    EXPECT_EQ(copied, data);
    EXPECT_EQ(target.overlaps(), 0U);
    EXPECT_LT(target.allocated(), 4_MiB) << "holes and zeroes are not written";
  }
}

TEST_F(Copying, ATargetThatIsNotZeroIsOverwrittenAsAWhole) {
  FakeImage source(4_MiB, 1, schedule());
  FakeImage target(4_MiB, 2, schedule());
  fill(source);
  target.preset(Offset(), std::vector<std::byte>((4_MiB).bytes(), std::byte{0xee}));
  const auto reader = source.open_reader();
  const auto writer = target.open_writer();
  ASSERT_TRUE(copy_image(*loop_, *reader, *writer, {}).has_value());
  EXPECT_TRUE(std::ranges::equal(source.content(), target.content()));
}

TEST_F(Copying, AFailureEndsItWhenAllIsQuiet) {
  for (const bool reading : {true, false}) {
    FakeImage source(8_MiB, 1, schedule());
    FakeImage target(8_MiB, 2, schedule());
    fill(source);
    const auto reader = source.open_reader();
    const auto writer = target.open_writer();
    if (reading) source.fail_next_reads(1);
    if (!reading) target.fail_next_writes(1, Code::NoSpace);
    const Status done = copy_image(*loop_, *reader, *writer, {.target_zero = true});
    ASSERT_FALSE(done.has_value());
    EXPECT_EQ(done.error().code, reading ? Code::Io : Code::NoSpace);
    EXPECT_EQ(source.in_flight() + target.in_flight(), 0U);
  }
}

TEST_F(Copying, StopsWhenItIsAskedTo) {
  FakeImage source(8_MiB, 1, schedule());
  FakeImage target(8_MiB, 2, schedule());
  fill(source);
  int asked = 0;
  const auto reader = source.open_reader();
  const auto writer = target.open_writer();
  const Status done =
      copy_image(*loop_, *reader, *writer,
                 {.target_zero = true, .in_flight = 1, .stopped = [&] { return ++asked > 2; }});
  ASSERT_FALSE(done.has_value());
  EXPECT_EQ(done.error().code, Code::Cancelled);
}

TEST_F(Copying, ALimitMakesItWaitAndMayBeLifted) {
  FakeImage source(8_MiB, 1, schedule());
  FakeImage target(8_MiB, 2, schedule());
  fill(source);
  int asked = 0;
  const auto reader = source.open_reader();
  const auto writer = target.open_writer();
  // At a byte a second it would never end.
  const auto limit = [&] { return ++asked < 4 ? Length(1) : Length(); };
  ASSERT_TRUE(
      copy_image(*loop_, *reader, *writer, {.target_zero = true, .bandwidth = limit}).has_value());
  EXPECT_TRUE(std::ranges::equal(source.content(), target.content()));
}

TEST_F(Copying, FromARawFileIntoAQcow2ImageOfTheSameContent) {
  {
    std::ofstream file(path("source.raw"), std::ios::binary);
    file.seekp(5'000'000);
    file << std::string(70'000, 'x');
  }
  std::filesystem::resize_file(path("source.raw"), (64_MiB).bytes());
  TargetSpec spec;
  spec.path = path("target.qcow2");
  spec.format = Format::Qcow2;
  spec.size = 64_MiB;
  spec.work_directory = directory_;
  auto target = create_target(spec);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  {
    auto reader = open_raw_reader(*loop_, {.path = path("source.raw")});
    auto writer = (*target)->open_writer(*loop_);
    ASSERT_TRUE(reader.has_value() && writer.has_value());
    const Status done =
        copy_image(*loop_, **reader, **writer, {.target_zero = (*target)->initially_zero()});
    ASSERT_TRUE(done.has_value()) << done.error().to_string();
  }
  ASSERT_TRUE((*target)->release().has_value());
  const auto compared = run_process({"qemu-img", "compare", "-f", "raw", "-F", "qcow2",
                                     path("source.raw"), path("target.qcow2")});
  ASSERT_TRUE(compared.has_value());
  EXPECT_EQ(compared->exit_code, 0) << compared->out << compared->err;
  EXPECT_LT(*allocated(path("target.qcow2")), 1_MiB);
}

// ---- files --------------------------------------------------------------------------------------

class ImageFiles : public Copying {
 protected:
  std::string file(const std::string& name, const std::string& text = "data") {
    std::ofstream(path(name)) << text;
    return path(name);
  }
};

TEST_F(ImageFiles, PublishingNeverOverwrites) {
  const std::string staged = staged_path(path("web1.raw"), "job-vda");
  EXPECT_EQ(staged, path(".drover-job-vda"));
  file(".drover-job-vda", "new");
  file("web1.raw", "old");
  EXPECT_EQ(publish(staged, path("web1.raw")).error().code, Code::AlreadyExists);
  ::unlink(path("web1.raw").c_str());
  ::symlink("/nowhere", path("web1.raw").c_str());
  EXPECT_EQ(publish(staged, path("web1.raw")).error().code, Code::AlreadyExists);
  ::unlink(path("web1.raw").c_str());
  EXPECT_TRUE(publish(staged, path("web1.raw")).has_value());
  EXPECT_FALSE(std::filesystem::exists(staged));
}

TEST_F(ImageFiles, OnlyTheSameFileIsRemoved) {
  const auto identity = identify_file(file("a"));
  ASSERT_TRUE(identity.has_value());
  std::filesystem::rename(path("a"), path("kept"));
  file("a", "another");
  EXPECT_EQ(remove_file(path("a"), *identity).error().code, Code::Busy);
  EXPECT_TRUE(std::filesystem::exists(path("a")));
  EXPECT_TRUE(remove_file(path("kept"), *identity).has_value());
  EXPECT_FALSE(std::filesystem::exists(path("kept")));
  EXPECT_TRUE(remove_file(path("kept"), *identity).has_value()) << "gone already";
}

// Sets the time of its last change, relative to now.
void change_at(const std::string& path, std::chrono::seconds when) {
  const auto since = std::chrono::system_clock::now().time_since_epoch() + when;
  const timespec at{std::chrono::duration_cast<std::chrono::seconds>(since).count(), 0};
  const std::array<timespec, 2> times{at, at};
  ASSERT_EQ(::utimensat(AT_FDCWD, path.c_str(), times.data(), 0), 0);
}

TEST_F(ImageFiles, AStampTellsWhetherAnImageWasWrittenTo) {
  const std::string name = file("a");
  change_at(name, std::chrono::seconds(-10));
  const auto stamp = image_stamp(name);
  ASSERT_TRUE(stamp.has_value());
  ::chmod(name.c_str(), 0600);  // of its content only
  EXPECT_EQ(*image_stamp(name), *stamp);
  const UniqueFd fd(::open(name.c_str(), O_WRONLY | O_CLOEXEC));
  ASSERT_EQ(::pwrite(fd.get(), "D", 1, 0), 1);
  EXPECT_NE(*image_stamp(name), *stamp);
  EXPECT_EQ(image_stamp(path("b")).error().code, Code::NotFound);
  EXPECT_EQ(image_stamp("/dev/null").error().code, Code::InvalidArgument);
}

TEST_F(ImageFiles, AStampOfABlockDeviceToo) {
  test::LoopDevice device;
  const std::string unusable = device.make(1 << 20, 512, std::filesystem::path(path("a")).parent_path());
  if (!unusable.empty()) GTEST_SKIP() << unusable;
  const auto stamp = image_stamp(device.path());
  ASSERT_TRUE(stamp.has_value()) << stamp.error().message;
  const UniqueFd fd(::open(device.path().c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  const std::unique_ptr<void, decltype(&::free)> block(::aligned_alloc(4096, 4096), &::free);
  ASSERT_EQ(::pread(fd.get(), block.get(), 4096, 0), 4096);
  EXPECT_EQ(*image_stamp(device.path()), *stamp);
  ASSERT_EQ(::pwrite(fd.get(), block.get(), 4096, 0), 4096);
  EXPECT_NE(*image_stamp(device.path()), *stamp);
}

TEST_F(ImageFiles, WhatNobodyElseHasIsFreed) {
  const std::string name = file("a", std::string(std::size_t{1} << 20, 'x'));
  const UniqueFd known(::open(name.c_str(), O_PATH | O_CLOEXEC));  // not open, and keeps the inode
  ASSERT_TRUE(unlink_file(name).has_value());
  EXPECT_FALSE(std::filesystem::exists(name));
  struct stat status {};
  ASSERT_EQ(::fstat(known.get(), &status), 0);
  struct statfs filesystem {};
  ASSERT_EQ(::fstatfs(known.get(), &filesystem), 0);
  if (filesystem.f_type == TMPFS_MAGIC) GTEST_SKIP() << "this directory is on tmpfs, where files are just unlinked";
  EXPECT_EQ(status.st_blocks, 0) << "left to the last close";
  EXPECT_TRUE(unlink_file(name).has_value()) << "gone already";
}

// Tells when the last who could write to a file has closed it.
class LastClose {
 public:
  explicit LastClose(const std::string& path) : fd_(::inotify_init1(IN_CLOEXEC)) {
    CHECK(::inotify_add_watch(fd_.get(), path.c_str(), IN_CLOSE_WRITE) >= 0, "the file can be watched");
  }
  // Within a minute.
  [[nodiscard]] bool wait() const {
    pollfd one{fd_.get(), POLLIN, 0};
    return ::poll(&one, 1, 60000) == 1;
  }

 private:
  UniqueFd fd_;
};

// Blocks that files without a name have yet; none where tmpfs frees them in its own way.
std::optional<blkcnt_t> blocks_of(const std::vector<UniqueFd>& files) {
  blkcnt_t blocks = 0;
  for (const UniqueFd& fd : files) {
    struct stat status {};
    struct statfs filesystem {};
    CHECK(::fstat(fd.get(), &status) == 0 && ::fstatfs(fd.get(), &filesystem) == 0, "an open file can be looked at");
    if (filesystem.f_type == TMPFS_MAGIC) return std::nullopt;
    blocks += status.st_blocks;
  }
  return blocks;
}

TEST_F(ImageFiles, WhatIsMuchIsFreedByAnotherProcess) {
  std::vector<NamedFile> removed;
  std::vector<UniqueFd> known;  // not open, and keep the inodes
  std::vector<std::unique_ptr<LastClose>> closes;
  for (const char* const name : {"a", "b"}) {
    const std::string path = file(name, std::string(kFreedAtOnce / 2 + (std::size_t{8} << 20), 'x'));
    known.emplace_back(::open(path.c_str(), O_PATH | O_CLOEXEC));
    closes.push_back(std::make_unique<LastClose>(path));
    auto gone = unlink_open(path);
    ASSERT_TRUE(gone.has_value());
    EXPECT_FALSE(std::filesystem::exists(path));
    removed.push_back({std::move(*gone), path});
  }
  free_in_background(std::move(removed), {DROVER_FREE_HELPER});
  for (const auto& close : closes) ASSERT_TRUE(close->wait());
  const auto blocks = blocks_of(known);
  if (!blocks) GTEST_SKIP() << "this directory is on tmpfs, where files are just unlinked";
  EXPECT_EQ(*blocks, 0) << "left to the last close";
}

TEST_F(ImageFiles, WithoutThatProcessTheyAreFreedHere) {
  for (const char* const program : {"/nonexistent/program", "/bin/false"}) {
    const std::string path = file("a", std::string(kFreedAtOnce + (std::size_t{8} << 20), 'x'));
    std::vector<UniqueFd> known;
    known.emplace_back(::open(path.c_str(), O_PATH | O_CLOEXEC));
    std::vector<NamedFile> removed;
    removed.push_back({*unlink_open(path), path});
    free_in_background(std::move(removed), {program});
    const auto blocks = blocks_of(known);
    if (!blocks) GTEST_SKIP() << "this directory is on tmpfs, where files are just unlinked";
    EXPECT_EQ(*blocks, 0);
  }
}

TEST_F(ImageFiles, ThatProcessFreesNothingThatHasAName) {
  const UniqueFd fd(::open(file("a", "text").c_str(), O_RDWR | O_CLOEXEC));
  const auto nameless = unlink_open(file("b", "text"));
  ASSERT_TRUE(nameless.has_value());
  const std::string number = std::to_string(fd.get());
  const std::string gone = std::to_string(nameless->fd());
  for (const std::vector<std::string>& words : {std::vector<std::string>{}, {number}, {"x", "a"}, {number + "x", "a"},
                                                {"-1", "a"}, {"1", "a"}, {number, "a"}, {gone, "b", number, "a"},
                                                {gone}, {gone, "b", gone}}) {
    std::vector<std::string> argv{DROVER_FREE_HELPER};
    argv.insert(argv.end(), words.begin(), words.end());
    const auto ended = run_process(argv, {.descriptors = {fd.get(), nameless->fd()}});
    ASSERT_TRUE(ended.has_value());
    EXPECT_EQ(ended->exit_code, 2);
  }
  EXPECT_EQ(std::filesystem::file_size(path("a")), 4);
}

TEST_F(ImageFiles, WhatOthersHaveStaysTheirs) {
  const std::string text(std::size_t{1} << 20, 'x');
  const auto content = [&](int fd) {
    std::string bytes(text.size(), 0);
    EXPECT_EQ(::pread(fd, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return bytes;
  };
  const UniqueFd reader(::open(file("read", text).c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(unlink_file(path("read")).has_value());
  EXPECT_EQ(content(reader.get()), text) << "somebody reads it";

  std::filesystem::create_hard_link(file("linked", text), path("second"));
  ASSERT_TRUE(unlink_file(path("linked")).has_value());
  EXPECT_EQ(content(UniqueFd(::open(path("second").c_str(), O_RDONLY | O_CLOEXEC)).get()), text);
}

TEST_F(ImageFiles, ALinkIsTheSameFileUnderASecondName) {
  file("a");
  ASSERT_TRUE(link_file(path("a"), path("b")).has_value());
  EXPECT_TRUE(same_file(path("a"), path("b")));
  EXPECT_EQ(link_file(path("a"), path("b")).error().code, Code::AlreadyExists);
  // Another filesystem.
  if (const std::string other = "/dev/shm" + directory_.substr(4);
      std::filesystem::exists("/dev/shm")) {
    EXPECT_EQ(link_file(path("a"), other).error().code, Code::Incompatible);
  }
  EXPECT_FALSE(same_file(path("a"), path("nothing")));
}

TEST_F(ImageFiles, AFailedCloneLeavesNothing) {
  file("a");
  const Status cloned = clone_file(path("a"), path("b"));
  if (!cloned) {
    EXPECT_EQ(cloned.error().code, Code::Incompatible) << cloned.error().to_string();
    EXPECT_FALSE(std::filesystem::exists(path("b")));
  }
  file("c", "other");
  EXPECT_EQ(clone_file(path("a"), path("c")).error().code, Code::AlreadyExists);
}

TEST_F(ImageFiles, OwnerAndModeAreTheOtherOnes) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  file("a");
  file("b");
  ASSERT_EQ(::chown(path("a").c_str(), 1234, 2345), 0);
  ASSERT_EQ(::chmod(path("a").c_str(), 0640), 0);
  ASSERT_TRUE(take_after(path("a"), path("b")).has_value());
  struct stat status {};
  ASSERT_EQ(::stat(path("b").c_str(), &status), 0);
  EXPECT_EQ(status.st_uid, 1234U);
  EXPECT_EQ(status.st_gid, 2345U);
  EXPECT_EQ(status.st_mode & 07777U, 0640U);
}

}  // namespace
}  // namespace drover::blockcopy
