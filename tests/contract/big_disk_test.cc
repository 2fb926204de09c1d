// SPDX-License-Identifier: Apache-2.0
//
// A disk of 64 TiB with a thousand scattered pieces of data, in a sparse file: what planning,
// copying, recording and verifying it take follows the data, not the size. Counted in operations;
// no clock.
#include <gtest/gtest.h>
#include <malloc.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "mirror/disk_mirror.h"
#include "tests/contract/image_places.h"

namespace drover::mirror {
namespace {

using blockcopy::MappedExtent;
namespace test = blockcopy::test;

constexpr Length kSize = Length(std::uint64_t{64} << 40);
constexpr std::uint64_t kPieces = 1000;
constexpr Length kChunk = 1_MiB;
constexpr std::size_t kMostMemory = std::size_t{64} << 20;

Offset piece_at(std::uint64_t number) {
  // Each in a chunk and a group of its own, the last at the very end.
  const std::uint64_t step = kSize.bytes() / kPieces / kChunk.bytes() * kChunk.bytes();
  return number + 1 == kPieces ? Offset(kSize.bytes() - 8192) : Offset(number * step + 65536);
}

std::size_t allocated() { return ::mallinfo2().uordblks + ::mallinfo2().hblkhd; }

// Counts what is asked of it.
class Counted final : public blockcopy::ImageReader {
 public:
  explicit Counted(std::unique_ptr<blockcopy::ImageReader> reader) : reader_(std::move(reader)) {}
  [[nodiscard]] Length size() const override { return reader_->size(); }
  [[nodiscard]] Length alignment() const override { return reader_->alignment(); }
  void read(Offset offset, std::span<std::byte> into, blockcopy::Done done) override {
    ++reads;
    reader_->read(offset, into, std::move(done));
  }
  void extents(Extent range, blockcopy::ExtentsDone done) override {
    ++questions;
    reader_->extents(range, [this, done = std::move(done)](auto found) {
      if (found) runs += found->size();  // an lseek each
      done(std::move(found));
    });
  }
  std::uint64_t reads = 0;
  std::uint64_t questions = 0;
  std::uint64_t runs = 0;

 private:
  std::unique_ptr<blockcopy::ImageReader> reader_;
};

// Each frame is applied at once.
class NearLanes final : public Lanes {
 public:
  explicit NearLanes(Loop& loop) : loop_(loop) {}
  [[nodiscard]] std::uint32_t count() const override { return 2; }
  void send(std::uint32_t /*lane*/, OutFrame frame) override {
    ++frames;
    loop_.post([this, token = frame.token] { applied(token); });
  }
  bool abandon(std::uint32_t, std::uint16_t, std::uint64_t) override { return false; }
  std::function<void(std::uint64_t token)> applied;
  std::uint64_t frames = 0;

 private:
  Loop& loop_;
};

class BigDisk : public testing::Test {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "only root mounts filesystems";
    directory_ = std::make_unique<test::TempDir>(std::filesystem::current_path());
    const std::string why = filesystem_.make("xfs", std::uint64_t{512} << 20, directory_->path());
    if (!why.empty()) GTEST_SKIP() << why;
    auto loop = Loop::create();
    ASSERT_TRUE(loop.has_value());
    loop_ = std::move(*loop);
  }

  // Returns false if the filesystem takes no such file.
  bool make_source() {
    path_ = filesystem_.path() / "source";
    const UniqueFd fd(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(kSize.bytes())) != 0) return false;
    const std::vector<std::byte> data(8192, std::byte{7});
    for (std::uint64_t i = 0; i < kPieces; ++i) {
      const auto at = static_cast<off_t>(piece_at(i).bytes());
      if (::pwrite(fd.get(), data.data(), data.size(), at) != static_cast<ssize_t>(data.size()))
        return false;
    }
    return ::fsync(fd.get()) == 0;
  }

  // Copies, on the loop's thread, until nothing is left to do.
  void run(DiskMirror& mirror) {
    pump_ = [this, &mirror] {
      while (mirror.start_copy()) {
      }
      if (mirror.scanned() && mirror.idle() && mirror.arbiter().copying() == 0) loop_->stop();
    };
    loop_->post(pump_);
    loop_->run();
  }

  std::unique_ptr<test::TempDir> directory_;
  test::SmallFilesystem filesystem_;
  std::unique_ptr<Loop> loop_;
  std::filesystem::path path_;
  std::function<void()> pump_;
};

TEST_F(BigDisk, CopyingItCostsWhatItsDataCosts) {
  ASSERT_TRUE(make_source()) << std::strerror(errno);
  auto raw = blockcopy::open_raw_reader(*loop_, {.path = path_, .size = kSize});
  ASSERT_TRUE(raw.has_value()) << raw.error().to_string();
  Counted reader(std::move(*raw));
  NearLanes lanes(*loop_);
  BufferPool buffers(kChunk, 8);
  const std::size_t before = allocated();

  DiskMirror::Options options;
  options.arbiter.disk_size = kSize;
  options.arbiter.lanes = 2;
  options.max_copies = 8;
  std::uint64_t touched = 0;
  DiskMirror mirror(options, reader, lanes, buffers,
                    {.acknowledge = {},
                     .failed = [](const Error& error) { FAIL() << error.to_string(); },
                     .changed = [this] { pump_(); },
                     .now = [this] { return loop_->now(); },
                     .touching =
                         [&](GroupIndex) {
                           ++touched;
                           return true;
                         },
                     .damaged = {}});
  lanes.applied = [&](std::uint64_t token) {
    mirror.applied(token);
    pump_();
  };
  loop_->post([&] { mirror.start(); });
  run(mirror);
  EXPECT_TRUE(mirror.arbiter().synchronised());
  const std::uint64_t tebibytes = kSize.bytes() >> 40;
  EXPECT_LE(reader.runs, 2 * kPieces + 1 + tebibytes) << "holes and data in turns";
  EXPECT_LE(reader.questions, reader.runs / 200 + 1 + tebibytes);
  EXPECT_EQ(reader.reads, kPieces);
  EXPECT_EQ(lanes.frames, kPieces);
  EXPECT_LE(touched, kPieces);
  EXPECT_LT(allocated() - before, kMostMemory);

  // Records: only the groups that have data, and each once.
  std::uint64_t records = 0;
  for (std::optional<GroupIndex> next = 0; next;) {
    const Arbiter::Records taken = mirror.take_records(*next, 64);
    records += taken.records.size();
    next = taken.next;
  }
  EXPECT_EQ(records, kPieces);
  EXPECT_TRUE(mirror.take_records(0, 1).records.empty());
  mirror.flush_done(mirror.flush_begin());
  EXPECT_EQ(mirror.take_records(0, 5000).records.size(), kPieces) << "they are durable now";

  // Verifying: what was sent, and no more.
  mirror.verify();
  run(mirror);
  EXPECT_EQ(mirror.arbiter().summary().to_verify, 0U);
  EXPECT_EQ(lanes.frames, 2 * kPieces);
  EXPECT_LT(allocated() - before, kMostMemory);
  mirror.stop();
}

TEST_F(BigDisk, AResumeLooksAtTheTargetsDataAlone) {
  blockcopy::TargetSpec spec;
  spec.path = filesystem_.path() / "target";
  spec.size = kSize;
  spec.work_directory = directory_->path();
  auto made = blockcopy::create_target(spec);
  ASSERT_TRUE(made.has_value()) << made.error().to_string();
  blockcopy::TargetImage& target = **made;
  {
    auto writer = target.open_writer(*loop_);
    ASSERT_TRUE(writer.has_value());
    const std::vector<std::byte> data(8192, std::byte{7});
    std::uint64_t left = kPieces;
    loop_->post([&] {
      for (std::uint64_t i = 0; i < kPieces; ++i) {
        (*writer)->write(piece_at(i), data, [&](const Status& status) {
          EXPECT_TRUE(status.has_value());
          if (--left == 0) loop_->stop();
        });
      }
    });
    loop_->run();
  }
  ASSERT_TRUE(target.flush().has_value());
  const std::size_t before = allocated();
  Arbiter::Options options;
  options.disk_size = kSize;
  Arbiter arbiter(options);
  arbiter.restore_nothing();
  std::uint64_t questions = 0;
  for (Offset at; at < Offset(kSize.bytes());) {
    ++questions;
    for (const MappedExtent& run : target.map({at, Offset(kSize.bytes()) - at})) {
      if (!run.data) arbiter.restore_hole(run.extent);
      at = run.extent.end();
    }
  }
  EXPECT_LE(questions, 2 * kPieces / 200 + 1);
  // A hole on both sides is not compared.
  arbiter.scan_begin({Offset(), kSize});
  for (std::uint64_t i = 0; i + 1 < kPieces; ++i) {
    const Offset end = piece_at(i) + Length(8192);
    arbiter.scan_hole({end, piece_at(i + 1) - end});
  }
  EXPECT_EQ(arbiter.summary().pending, kPieces);
  EXPECT_LT(allocated() - before, kMostMemory);
  EXPECT_TRUE(target.release().has_value());
  EXPECT_TRUE(target.remove().has_value());
}

}  // namespace
}  // namespace drover::mirror
