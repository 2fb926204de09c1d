// SPDX-License-Identifier: Apache-2.0
//
// One suite for every kind of image, real and fake (ImageContract), and what only one kind can
// show.
#include "blockcopy/image.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "blockcopy/nbd_connection.h"
#include "blockcopy/storage_daemon.h"
#include "tests/contract/image_places.h"
#include "tests/fakes/fake_image.h"

namespace drover::blockcopy::test {
namespace {

struct Kind {
  const char* name;
  std::function<std::unique_ptr<Place>()> make;
};

void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

const std::array<Kind, 9> kKinds = {{
    {"RawFile", [] { return std::make_unique<RealFilesystemPlace>(); }},
    {"RawFileCached", [] { return std::make_unique<RealFilesystemPlace>(true); }},
    {"RawTmpfs", [] { return std::make_unique<TmpfsPlace>(); }},
    {"RawXfs", [] { return std::make_unique<SmallFilesystemPlace>("xfs", 320 << 20); }},
    {"RawBtrfs", [] { return std::make_unique<SmallFilesystemPlace>("btrfs", 256 << 20); }},
    {"BlockDevice", [] { return std::make_unique<BlockDevicePlace>(512); }},
    {"BlockDevice4k", [] { return std::make_unique<BlockDevicePlace>(4096); }},
    {"Qcow2", [] { return std::make_unique<Qcow2Place>(); }},
    {"Fake", [] { return std::make_unique<FakePlace>(1); }},
}};

// Odd at the end in every way: below a sector's, a page's, a cluster's and a chunk's bounds.
const std::array<std::uint64_t, 6> kSizes = {
    512, 4096, 5 * std::uint64_t{65536}, (1 << 20) + 512, (3 << 20) + 4096 + 512, 3000};

// Random extents of a disk, most of them small, none aligned on purpose.
Extent random_extent(Random& random, std::uint64_t size) {
  const std::array<std::uint64_t, 4> limits = {64, 5000, 70'000, 400'000};
  const std::uint64_t offset = random.below(size);
  const std::uint64_t length = 1 + random.below(limits.at(random.below(limits.size())));
  return Extent{Offset(offset), Length(std::min(length, size - offset))};
}

// Data with holes: runs of up to 300 KiB of either kind.
Bytes patchy(Random& random, std::uint64_t size) {
  Bytes bytes(size);
  std::uint64_t at = 0;
  bool data = random.one_in(2);
  while (at < size) {
    const std::uint64_t count = std::min<std::uint64_t>(size - at, (1 + random.below(75)) * 4096);
    if (data) {
      const Bytes run = random_bytes(random, count);
      std::copy(run.begin(), run.end(), bytes.begin() + static_cast<std::ptrdiff_t>(at));
    }
    data = !data;
    at += count;
  }
  return bytes;
}

class ImageContract : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    place_ = GetParam().make();
    if (const std::string why = place_->unusable(); !why.empty()) GTEST_SKIP() << why;
  }

  [[nodiscard]] std::vector<std::uint64_t> sizes() const {
    std::vector<std::uint64_t> sizes(kSizes.begin(), kSizes.end());
    if (!place_->any_size()) std::erase_if(sizes, [](std::uint64_t s) { return s % 512 != 0; });
    return sizes;
  }

  Status write(ImageWriter& writer, std::uint64_t offset, std::span<const std::byte> bytes) {
    return wait([&](Done done) { writer.write(Offset(offset), bytes, std::move(done)); });
  }
  Status write_zeroes(ImageWriter& writer, std::uint64_t offset, std::uint64_t length) {
    return wait([&](Done done) {
      writer.write_zeroes(Extent{Offset(offset), Length(length)}, std::move(done));
    });
  }
  Status read(ImageReader& reader, std::uint64_t offset, std::span<std::byte> bytes) {
    return wait([&](Done done) { reader.read(Offset(offset), bytes, std::move(done)); });
  }
  Status wait(const std::function<void(Done)>& issue) {
    Status result = fail(Code::Internal, "never called back");
    place_->run([&](const std::function<void()>& stop) {
      issue([&, stop](Status status) {
        result = std::move(status);
        stop();
      });
    });
    return result;
  }
  Result<std::vector<MappedExtent>> extents(ImageReader& reader, Extent range) {
    Result<std::vector<MappedExtent>> result;
    place_->run([&](const std::function<void()>& stop) {
      reader.extents(range, [&, stop](Result<std::vector<MappedExtent>> found) {
        result = std::move(found);
        stop();
      });
    });
    return result;
  }

  std::unique_ptr<ImageReader> source(std::span<const std::byte> content) {
    auto reader = place_->source(content);
    EXPECT_TRUE(reader.has_value()) << reader.error().to_string();
    return reader ? std::move(*reader) : nullptr;
  }
  std::unique_ptr<TargetImage> target(std::uint64_t size) {
    auto target = place_->target(Length(size));
    EXPECT_TRUE(target.has_value()) << target.error().to_string();
    return target ? std::move(*target) : nullptr;
  }
  std::unique_ptr<ImageWriter> writer(TargetImage& target) {
    auto writer = place_->writer(target);
    EXPECT_TRUE(writer.has_value()) << writer.error().to_string();
    return writer ? std::move(*writer) : nullptr;
  }
  // What the target holds before the first write.
  Bytes fresh(TargetImage& target) {
    return target.initially_zero() ? Bytes(target.spec().size.bytes()) : place_->content(target);
  }
  void expect_content(TargetImage& target, const Bytes& expected) {
    const Status released = target.release();
    ASSERT_TRUE(released.has_value()) << released.error().to_string();
    const Bytes found = place_->content(target);
    ASSERT_EQ(found.size(), expected.size());
    const auto difference = std::mismatch(found.begin(), found.end(), expected.begin());
    ASSERT_EQ(difference.first, found.end())
        << "first difference at byte " << difference.first - found.begin();
  }

  std::unique_ptr<Place> place_;
};

// `count` writes and write_zeroes at random, up to 16 at a time, none that shares a block with
// another in flight; what the disk must hold in the end is in the model.
class Storm {
 public:
  Storm(ImageWriter& writer, Bytes& model, std::uint64_t seed, int count)
      : writer_(writer), model_(model), random_(seed), left_(count) {}

  void begin(std::function<void()> stop) {
    stop_ = std::move(stop);
    issue();
  }
  [[nodiscard]] const std::vector<std::string>& errors() const { return errors_; }

 private:
  static constexpr std::size_t kDepth = 16;

  void issue() {
    while (left_ > 0 && in_flight_.size() < kDepth) {
      const Extent extent = random_extent(random_, model_.size());
      const Extent blocks = widen(extent, writer_.alignment());
      if (std::any_of(in_flight_.begin(), in_flight_.end(),
                      [&](const auto& other) { return overlap(other.blocks, blocks); })) {
        break;
      }
      --left_;
      const auto begin = model_.begin() + static_cast<std::ptrdiff_t>(extent.offset.bytes());
      const bool zero = random_.one_in(4);
      auto request = in_flight_.insert(in_flight_.end(), Request{blocks, {}});
      const auto done = [this, request](const Status& status) {
        if (!status) errors_.push_back(status.error().to_string());
        in_flight_.erase(request);
        issue();
      };
      if (zero) {
        std::fill_n(begin, extent.length.bytes(), std::byte{0});
        writer_.write_zeroes(extent, done);
      } else {
        // Memory that is aligned half of the time.
        const std::size_t shift = random_.one_in(2) ? 0 : random_.below(4096);
        request->memory = std::make_unique<Memory>(shift + extent.length.bytes());
        const auto bytes = request->memory->bytes().subspan(shift);
        const Bytes content = random_bytes(random_, extent.length.bytes());
        std::copy(content.begin(), content.end(), bytes.begin());
        std::copy(content.begin(), content.end(), begin);
        writer_.write(extent.offset, bytes, done);
      }
    }
    if (left_ == 0 && in_flight_.empty()) stop_();
  }

  // Aligned to a page; gone when its request is done, so that a use after that shows.
  class Memory {
   public:
    explicit Memory(std::size_t size)
        : size_(size),
          memory_(static_cast<std::byte*>(std::aligned_alloc(4096, (size + 4095) / 4096 * 4096))) {}
    ~Memory() { std::free(memory_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    [[nodiscard]] std::span<std::byte> bytes() const { return {memory_, size_}; }

   private:
    std::size_t size_;
    std::byte* memory_;
  };
  struct Request {
    Extent blocks;
    std::unique_ptr<Memory> memory;
  };

  ImageWriter& writer_;
  Bytes& model_;
  Random random_;
  int left_;
  std::list<Request> in_flight_;
  std::vector<std::string> errors_;
  std::function<void()> stop_;
};

TEST_P(ImageContract, ReadsWhatIsThereAtAnyOffsetAndLength) {
  for (const std::uint64_t size : sizes()) {
    SCOPED_TRACE(size);
    Random random(size);
    const Bytes content = patchy(random, size);
    const auto reader = source(content);
    ASSERT_NE(reader, nullptr);
    EXPECT_EQ(reader->size(), Length(size));
    EXPECT_LE(reader->alignment(), 64_KiB);
    Bytes all(size);
    ASSERT_TRUE(read(*reader, 0, all).has_value());
    EXPECT_EQ(all, content);
    for (int i = 0; i < 40; ++i) {
      const Extent extent = random_extent(random, size);
      const std::size_t shift = random.below(600);
      Bytes buffer(shift + extent.length.bytes(), std::byte{0xee});
      const auto part = std::span(buffer).subspan(shift);
      const Status status = read(*reader, extent.offset.bytes(), part);
      ASSERT_TRUE(status.has_value()) << status.error().to_string();
      ASSERT_TRUE(std::equal(part.begin(), part.end(),
                             content.begin() + static_cast<std::ptrdiff_t>(extent.offset.bytes())))
          << extent.length.bytes() << " at " << extent.offset.bytes();
    }
  }
}

TEST_P(ImageContract, ServesManyReadsAtOnce) {
  constexpr std::size_t kChunk = 65536;
  constexpr std::size_t kCount = 64;
  Random random(3);
  const Bytes content = random_bytes(random, kChunk * kCount);
  const auto reader = source(content);
  ASSERT_NE(reader, nullptr);
  Bytes found(content.size());
  std::size_t done = 0;
  place_->run([&](const std::function<void()>& stop) {
    for (std::size_t i = 0; i < kCount; ++i) {
      reader->read(Offset(i * kChunk), std::span(found).subspan(i * kChunk, kChunk),
                   [&, stop](const Status& status) {
                     EXPECT_TRUE(status.has_value()) << status.error().to_string();
                     if (++done == kCount) stop();
                   });
    }
    EXPECT_EQ(done, 0U) << "callbacks never run from inside the call";
  });
  EXPECT_EQ(found, content);
}

TEST_P(ImageContract, ExtentsCoverTheRangeAndCallZeroOnlyWhatIsZero) {
  for (const std::uint64_t size : sizes()) {
    SCOPED_TRACE(size);
    Random random(size + 1);
    const Bytes content = patchy(random, size);
    const auto reader = source(content);
    ASSERT_NE(reader, nullptr);
    std::vector<Extent> ranges = {Extent{Offset(), Length(size)}};
    for (int i = 0; i < 10; ++i) ranges.push_back(random_extent(random, size));
    for (const Extent& range : ranges) {
      Offset position = range.offset;
      while (position < range.end()) {
        const auto found = extents(*reader, Extent{position, range.end() - position});
        ASSERT_TRUE(found.has_value()) << found.error().to_string();
        ASSERT_FALSE(found->empty());
        for (const MappedExtent& run : *found) {
          ASSERT_EQ(run.extent.offset, position);
          ASSERT_GT(run.extent.length, Length());
          position = run.extent.end();
          ASSERT_LE(position, range.end());
          if (run.data) continue;
          const auto begin =
              content.begin() + static_cast<std::ptrdiff_t>(run.extent.offset.bytes());
          ASSERT_TRUE(std::all_of(begin,
                                  begin + static_cast<std::ptrdiff_t>(run.extent.length.bytes()),
                                  [](std::byte b) { return b == std::byte{0}; }));
        }
      }
    }
  }
}

TEST_P(ImageContract, ExtentsFindTheHoles) {
  if (!place_->knows_holes()) GTEST_SKIP() << "this kind does not know its holes";
  Bytes content(16 << 20);
  Random random(5);
  const Bytes data = random_bytes(random, 1 << 20);
  std::copy(data.begin(), data.end(), content.begin() + (8 << 20));
  const auto reader = source(content);
  ASSERT_NE(reader, nullptr);
  std::uint64_t data_bytes = 0;
  Offset position;
  while (position < Offset(content.size())) {
    const auto found = extents(*reader, Extent{position, Offset(content.size()) - position});
    ASSERT_TRUE(found.has_value()) << found.error().to_string();
    for (const MappedExtent& run : *found) data_bytes += run.data ? run.extent.length.bytes() : 0;
    position = found->back().extent.end();
  }
  EXPECT_EQ(data_bytes, data.size());
}

TEST_P(ImageContract, HoldsWhatWasWrittenAtAnyOffsetAndLength) {
  for (const std::uint64_t size : sizes()) {
    SCOPED_TRACE(size);
    const auto image = target(size);
    ASSERT_NE(image, nullptr);
    EXPECT_EQ(image->spec().size, Length(size));
    Bytes model = fresh(*image);
    auto out = writer(*image);
    ASSERT_NE(out, nullptr);
    EXPECT_EQ(out->size(), Length(size));
    Storm storm(*out, model, size, 300);
    place_->run([&](std::function<void()> stop) { storm.begin(std::move(stop)); });
    EXPECT_TRUE(storm.errors().empty()) << storm.errors().front();
    out.reset();
    expect_content(*image, model);
  }
}

TEST_P(ImageContract, SeveralWritersShareAnImage) {
  const std::uint64_t size = (2 << 20) + 512;
  const auto image = target(size);
  ASSERT_NE(image, nullptr);
  Bytes model = fresh(*image);
  std::vector<std::unique_ptr<ImageWriter>> writers;
  for (int i = 0; i < 4; ++i) {
    writers.push_back(writer(*image));
    ASSERT_NE(writers.back(), nullptr);
  }
  Random random(9);
  for (std::size_t at = 0; at < size; at += 65536) {
    const Bytes bytes = random_bytes(random, std::min<std::size_t>(65536, size - at));
    std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<std::ptrdiff_t>(at));
    const Status status = write(*writers.at(at / 65536 % writers.size()), at, bytes);
    ASSERT_TRUE(status.has_value()) << status.error().to_string();
  }
  writers.clear();
  const Status flushed = image->flush();
  EXPECT_TRUE(flushed.has_value()) << flushed.error().to_string();
  expect_content(*image, model);
}

TEST_P(ImageContract, AFreshImageIsZeroIfItSaysSo) {
  const auto image = target((1 << 20) + 512);
  ASSERT_NE(image, nullptr);
  if (!image->initially_zero()) GTEST_SKIP() << "this kind makes no promise";
  expect_content(*image, Bytes((1 << 20) + 512));
}

TEST_P(ImageContract, ThinStaysThin) {
  constexpr std::uint64_t kSize = 200 << 20;
  const auto image = place_->target(Length(place_->knows_holes() ? kSize : 4 << 20));
  ASSERT_TRUE(image.has_value()) << image.error().to_string();
  if (!(*image)->initially_zero()) GTEST_SKIP() << "this kind is as large as it is";
  auto out = writer(**image);
  ASSERT_NE(out, nullptr);
  Random random(11);
  for (std::uint64_t at = 0; at < kSize; at += 50 << 20) {
    ASSERT_TRUE(write(*out, at, random_bytes(random, 1 << 20)).has_value());
  }
  out.reset();
  ASSERT_TRUE((*image)->release().has_value());
  EXPECT_LE(place_->space_taken(**image), (4 << 20) + place_->overhead());
}

TEST_P(ImageContract, ZeroesGiveSpaceBack) {
  constexpr std::uint64_t kSize = 8 << 20;
  const auto image = target(kSize);
  ASSERT_NE(image, nullptr);
  auto out = writer(*image);
  ASSERT_NE(out, nullptr);
  Random random(12);
  Bytes model = random_bytes(random, kSize);
  ASSERT_TRUE(write(*out, 0, model).has_value());
  ASSERT_TRUE(image->flush().has_value());
  const std::uint64_t full = place_->space_taken(*image);
  ASSERT_GE(full, kSize);
  // Odd ends, so that the blocks around them are changed in part.
  const std::uint64_t begin = (1 << 20) + 100;
  const std::uint64_t length = (6 << 20) + 700;
  const Status zeroed = write_zeroes(*out, begin, length);
  ASSERT_TRUE(zeroed.has_value()) << zeroed.error().to_string();
  std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(begin), length, std::byte{0});
  out.reset();
  expect_content(*image, model);
  if (place_->gives_space_back()) {
    EXPECT_LE(place_->space_taken(*image), full - (5 << 20));
  }
}

TEST_P(ImageContract, RequestsOfNoBytesCallBack) {
  const Bytes content(4096, std::byte{1});
  const auto reader = source(content);
  ASSERT_NE(reader, nullptr);
  EXPECT_TRUE(read(*reader, 5, {}).has_value());
  EXPECT_TRUE(read(*reader, 4096, {}).has_value());
  const auto image = target(4096);
  ASSERT_NE(image, nullptr);
  Bytes model = fresh(*image);
  auto out = writer(*image);
  ASSERT_NE(out, nullptr);
  EXPECT_TRUE(write(*out, 5, {}).has_value());
  EXPECT_TRUE(write_zeroes(*out, 4096, 0).has_value());
  out.reset();
  expect_content(*image, model);
}

TEST_P(ImageContract, TheLastCallbackMayDestroyReaderAndWriter) {
  auto reader = source(Bytes(65536, std::byte{1}));
  ASSERT_NE(reader, nullptr);
  const auto image = target(65536);
  ASSERT_NE(image, nullptr);
  auto out = writer(*image);
  ASSERT_NE(out, nullptr);
  Bytes buffer(65536);  // a device's garbage by now, if source and target are the same one
  place_->run([&](const std::function<void()>& stop) {
    reader->read(Offset(), buffer, [&, stop](const Status& status) {
      EXPECT_TRUE(status.has_value());
      reader.reset();
      out->write(Offset(), buffer, [&, stop](const Status& written) {
        EXPECT_TRUE(written.has_value());
        out.reset();
        stop();
      });
    });
  });
  expect_content(*image, buffer);
}

TEST_P(ImageContract, ReleasingTwiceIsHarmless) {
  const auto image = target(1 << 20);
  ASSERT_NE(image, nullptr);
  EXPECT_TRUE(image->release().has_value());
  EXPECT_TRUE(image->release().has_value());
  EXPECT_TRUE(image->remove().has_value());
  EXPECT_TRUE(image->remove().has_value());
}

TEST_P(ImageContract, OpenedAgainItHoldsWhatWasWrittenAndTakesMore) {
  constexpr std::uint64_t kSize = (3 << 20) + 4096;
  auto image = target(kSize);
  ASSERT_NE(image, nullptr);
  const TargetSpec spec = image->spec();
  const ImageIdentity identity = image->identity();
  const bool initially_zero = image->initially_zero();
  const std::string holder = image->holder();
  Bytes model = fresh(*image);
  Random random(9);
  for (const std::uint64_t offset : {0ULL, 700'000ULL, 2'000'000ULL}) {
    const Bytes bytes = random_bytes(random, 100'000);
    ASSERT_TRUE(write(*writer(*image), offset, bytes).has_value());
    std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<std::ptrdiff_t>(offset));
    const Status released = image->release();
    ASSERT_TRUE(released.has_value()) << released.error().to_string();
    image.reset();
    auto again = place_->reopen(spec, identity);
    ASSERT_TRUE(again.has_value()) << again.error().to_string();
    image = std::move(*again);
    EXPECT_EQ(image->identity(), identity);
    EXPECT_EQ(image->initially_zero(), initially_zero);
    EXPECT_TRUE(image->alive());
    EXPECT_EQ(image->holder().empty(), holder.empty());
    EXPECT_TRUE(holder.empty() || image->holder() != holder);
  }
  expect_content(*image, model);
}

INSTANTIATE_TEST_SUITE_P(Images, ImageContract, testing::ValuesIn(kKinds),
                         [](const auto& tested) { return std::string(tested.param.name); });

// --- What a process has of its own ---------------------------------------------------------------

std::size_t open_descriptors() {
  return static_cast<std::size_t>(
      std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator()));
}

std::string child_processes() {
  std::string all;
  for (const auto& task : fs::directory_iterator("/proc/self/task")) {
    std::ifstream file(task.path() / "children");
    std::string word;
    while (file >> word) all += word + " ";
  }
  return all;
}

std::vector<std::string> entries(const fs::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) {
    names.push_back(entry.path().filename());
  }
  return names;
}

// --- Targets that are files ----------------------------------------------------------------------

class FileTarget : public testing::TestWithParam<Format> {
 protected:
  FileTarget() : directory_(fs::current_path()), path_(directory_.path() / "disk") {
    auto made = Loop::create();
    EXPECT_TRUE(made.has_value()) << made.error().to_string();
    loop_ = std::move(*made);
    spec_.path = path_;
    spec_.format = GetParam();
    spec_.size = 1_MiB + Length(512);
    spec_.work_directory = directory_.path();
  }

  Status write(ImageWriter& writer, Offset offset, std::span<const std::byte> bytes) {
    Status result;
    writer.write(offset, bytes, [&](Status status) {
      result = std::move(status);
      loop_->stop();
    });
    loop_->run();
    return result;
  }

  TempDir directory_;
  fs::path path_;
  TargetSpec spec_;
  std::unique_ptr<Loop> loop_;
};

// Invariant 8.
TEST_P(FileTarget, NeverOverwritesAnExistingFile) {
  std::ofstream(path_) << "precious";
  const auto target = create_target(spec_);
  ASSERT_FALSE(target.has_value());
  EXPECT_EQ(target.error().code, Code::AlreadyExists);
  std::string text;
  std::ifstream(path_) >> text;
  EXPECT_EQ(text, "precious");
  EXPECT_EQ(entries(directory_.path()), std::vector<std::string>{"disk"});
}

TEST_P(FileTarget, FollowsNoSymbolicLink) {
  fs::create_symlink(directory_.path() / "elsewhere", path_);
  const auto target = create_target(spec_);
  ASSERT_FALSE(target.has_value());
  EXPECT_EQ(target.error().code, Code::AlreadyExists);
  EXPECT_FALSE(fs::exists(directory_.path() / "elsewhere"));
  EXPECT_TRUE(fs::is_symlink(path_));
}

TEST_P(FileTarget, SaysWhatIsWrongWithItsSpec) {
  const auto code_of = [](const TargetSpec& spec) {
    const auto target = create_target(spec);
    return target ? Code::Internal : target.error().code;
  };
  TargetSpec spec = spec_;
  spec.path = directory_.path() / "missing" / "disk";
  EXPECT_EQ(code_of(spec), Code::NotFound);
  spec = spec_;
  spec.path = "disk";
  EXPECT_EQ(code_of(spec), Code::InvalidArgument);
  spec = spec_;
  spec.size = Length();
  EXPECT_EQ(code_of(spec), Code::InvalidArgument);
  spec = spec_;
  spec.path = directory_.path();
  EXPECT_EQ(code_of(spec), Code::AlreadyExists);
  EXPECT_TRUE(entries(directory_.path()).empty());
}

TEST_P(FileTarget, IsPrivateWhateverTheUmask) {
  for (const mode_t mask : {mode_t{0}, mode_t{0777}}) {
    const mode_t before = ::umask(mask);
    auto target = create_target(spec_);
    ::umask(before);
    ASSERT_TRUE(target.has_value()) << target.error().to_string();
    EXPECT_EQ(fs::status(path_).permissions(), fs::perms::owner_read | fs::perms::owner_write);
    EXPECT_TRUE((*target)->remove().has_value());
  }
}

TEST_P(FileTarget, ReleaseLeavesNoProcessNoLockNoSocketAndNoDescriptor) {
  const std::size_t descriptors = open_descriptors();
  auto target = create_target(spec_);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  auto writer = (*target)->open_writer(*loop_);
  ASSERT_TRUE(writer.has_value()) << writer.error().to_string();
  const Bytes bytes(4096, std::byte{0x5a});
  ASSERT_TRUE(write(**writer, Offset(8192), bytes).has_value());
  writer->reset();
  // What the loop still had to do about the writer's socket.
  loop_->post([&] { loop_->post([&] { loop_->stop(); }); });
  loop_->run();
  const Status released = (*target)->release();
  ASSERT_TRUE(released.has_value()) << released.error().to_string();
  EXPECT_EQ(open_descriptors(), descriptors);
  EXPECT_EQ(child_processes(), "");
  EXPECT_EQ(entries(directory_.path()), std::vector<std::string>{"disk"});
  // Both take QEMU's locks; a lock of ours, or of the daemon's, would stop them.
  const std::string format = GetParam() == Format::Raw ? "raw" : "qcow2";
  const auto info = run_process({"qemu-img", "info", "-f", format, path_});
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->exit_code, 0) << info->err;
  const auto io = run_process({"qemu-io", "-f", format, "-c", "read -P 0x5a 8192 4096", "-c",
                               "write -P 0x33 0 4096", "-c", "flush", path_});
  ASSERT_TRUE(io.has_value());
  EXPECT_EQ(io->exit_code, 0) << io->out << io->err;
  EXPECT_EQ(io->out.find("verification failed"), std::string::npos) << io->out;
}

TEST_P(FileTarget, AnErrorlessImageIsConsistent) {
  if (GetParam() == Format::Raw) GTEST_SKIP() << "a raw image is always consistent";
  spec_.size = 64_MiB;
  spec_.cluster_size = 4_KiB;
  auto target = create_target(spec_);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  auto writer = (*target)->open_writer(*loop_);
  ASSERT_TRUE(writer.has_value()) << writer.error().to_string();
  Bytes model(spec_.size.bytes());
  Storm storm(**writer, model, 1, 500);
  loop_->post([&] { storm.begin([&] { loop_->stop(); }); });
  loop_->run();
  EXPECT_TRUE(storm.errors().empty());
  writer->reset();
  ASSERT_TRUE((*target)->release().has_value());
  const auto check = run_process({"qemu-img", "check", "-f", "qcow2", path_});
  ASSERT_TRUE(check.has_value());
  EXPECT_EQ(check->exit_code, 0) << check->out << check->err;
  const auto info = run_process({"qemu-img", "info", "-f", "qcow2", path_});
  ASSERT_TRUE(info.has_value());
  EXPECT_NE(info->out.find("cluster_size: 4096"), std::string::npos) << info->out;
}

TEST_P(FileTarget, RemoveDeletesWhatCreateMade) {
  const std::size_t descriptors = open_descriptors();
  auto target = create_target(spec_);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  EXPECT_TRUE((*target)->remove().has_value());
  EXPECT_TRUE(entries(directory_.path()).empty());
  EXPECT_EQ(open_descriptors(), descriptors);
  EXPECT_EQ(child_processes(), "");
  EXPECT_TRUE((*target)->remove().has_value()) << "the file is gone: that is what was wanted";
}

TEST_P(FileTarget, RemoveWorksAfterRelease) {
  auto target = create_target(spec_);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  ASSERT_TRUE((*target)->release().has_value());
  EXPECT_TRUE(fs::exists(path_));
  EXPECT_TRUE((*target)->remove().has_value());
  EXPECT_TRUE(entries(directory_.path()).empty());
}

TEST_P(FileTarget, RemoveLeavesAnotherFileOfThatNameAlone) {
  auto target = create_target(spec_);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  ASSERT_TRUE((*target)->release().has_value());
  fs::remove(path_);
  std::ofstream(path_) << "precious";
  const Status removed = (*target)->remove();
  ASSERT_FALSE(removed.has_value());
  EXPECT_EQ(removed.error().code, Code::Busy);
  EXPECT_TRUE(fs::exists(path_));
}

TEST_P(FileTarget, GoingAwayReleasesAndRemovesNothing) {
  const std::size_t descriptors = open_descriptors();
  { ASSERT_TRUE(create_target(spec_).has_value()); }
  EXPECT_EQ(entries(directory_.path()), std::vector<std::string>{"disk"});
  EXPECT_EQ(open_descriptors(), descriptors);
  EXPECT_EQ(child_processes(), "");
}

TEST_P(FileTarget, IsOpenedAgainOnlyIfItIsTheSameFileOfTheSameSize) {
  auto made = create_target(spec_);
  ASSERT_TRUE(made.has_value()) << made.error().to_string();
  const ImageIdentity identity = (*made)->identity();
  ASSERT_TRUE((*made)->release().has_value());
  const auto code = [&](const TargetSpec& spec) {
    const auto opened = open_target(spec, identity);
    return opened ? Code::Internal : opened.error().code;
  };
  TargetSpec larger = spec_;
  larger.size = 2_MiB;
  EXPECT_EQ(code(larger), Code::Incompatible);
  const fs::path other = directory_.path() / "other";
  fs::rename(path_, other);
  EXPECT_EQ(code(spec_), Code::NotFound);
  fs::create_symlink(other, path_);
  EXPECT_EQ(code(spec_), Code::Busy);
  fs::remove(path_);
  fs::copy_file(other, path_);
  EXPECT_EQ(code(spec_), Code::Busy);
  fs::rename(other, path_);
  EXPECT_EQ(code(spec_), Code::Internal) << "it is back";
}

TEST_P(FileTarget, IsNotOpenedAgainWhileAnotherHoldsIt) {
  if (GetParam() == Format::Raw) GTEST_SKIP() << "our own writer takes no lock";
  auto made = create_target(spec_);
  ASSERT_TRUE(made.has_value()) << made.error().to_string();
  const auto second = open_target(spec_, (*made)->identity());
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().code, Code::Busy) << second.error().to_string();
}

TEST_P(FileTarget, ADamagedImageSaysSo) {
  if (GetParam() == Format::Raw) GTEST_SKIP() << "a raw image is always consistent";
  auto made = create_target(spec_);
  ASSERT_TRUE(made.has_value()) << made.error().to_string();
  const ImageIdentity identity = (*made)->identity();
  ASSERT_TRUE((*made)->release().has_value());
  for (const std::streamoff at : {std::streamoff{65536}, std::streamoff{0}}) {
    {
      std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(at);  // the refcounts, then the header
      file << std::string(4096, '\xff');
    }
    const auto opened = open_target(spec_, identity);
    ASSERT_FALSE(opened.has_value());
    EXPECT_TRUE(is_corrupt(opened.error())) << opened.error().to_string();
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, FileTarget, testing::Values(Format::Raw, Format::Qcow2),
                         [](const auto& tested) {
                           return std::string(tested.param == Format::Raw ? "Raw" : "Qcow2");
                         });

// --- A full disk ---------------------------------------------------------------------------------

struct SmallDisk {
  const char* name;
  const char* filesystem;
  std::uint64_t size;
  Format format;
};

void PrintTo(const SmallDisk& disk, std::ostream* out) { *out << disk.name; }

class FullDisk : public testing::TestWithParam<SmallDisk> {};

TEST_P(FullDisk, IsNoSpaceAndNothingElseBreaks) {
  const TempDir directory(fs::current_path());
  SmallFilesystem filesystem;
  const std::string why = filesystem.make(GetParam().filesystem, GetParam().size, directory.path());
  if (!why.empty()) GTEST_SKIP() << why;
  auto loop = std::move(Loop::create().value());
  TargetSpec spec;
  spec.path = filesystem.path() / "disk";
  spec.format = GetParam().format;
  spec.size = 1_GiB;
  spec.work_directory = directory.path();
  auto target = create_target(spec);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  auto writer = (*target)->open_writer(*loop);
  ASSERT_TRUE(writer.has_value()) << writer.error().to_string();
  Random random(1);
  const Bytes bytes = random_bytes(random, 1 << 20);
  const auto write = [&](std::uint64_t at) {
    Status result;
    (*writer)->write(Offset(at), bytes, [&](Status status) {
      result = std::move(status);
      loop->stop();
    });
    loop->run();
    return result;
  };
  Status status;
  std::uint64_t at = 0;
  for (; at < spec.size.bytes() && status; at += bytes.size()) status = write(at);
  ASSERT_FALSE(status.has_value()) << "1 GiB went into " << GetParam().size;
  EXPECT_EQ(status.error().code, Code::NoSpace) << status.error().to_string();
  EXPECT_NE(status.error().message.find(spec.path), std::string::npos);
  EXPECT_GT(at, std::uint64_t{8} << 20);
  // Zeroes make room again.
  Status zeroed;
  (*writer)->write_zeroes(Extent{Offset(), 8_MiB}, [&](Status done) {
    zeroed = std::move(done);
    loop->stop();
  });
  loop->run();
  ASSERT_TRUE(zeroed.has_value()) << zeroed.error().to_string();
  ASSERT_TRUE((*target)->flush().has_value());
  if (GetParam().filesystem != std::string("btrfs")) {  // which frees its space when it likes
    EXPECT_TRUE(write(0).has_value());
  }
  writer->reset();
  const Status removed = (*target)->remove();
  EXPECT_TRUE(removed.has_value()) << removed.error().to_string();
  EXPECT_FALSE(fs::exists(spec.path));
}

INSTANTIATE_TEST_SUITE_P(Disks, FullDisk,
                         testing::Values(SmallDisk{"RawExt4", "ext4", 32 << 20, Format::Raw},
                                         SmallDisk{"RawXfs", "xfs", 320 << 20, Format::Raw},
                                         SmallDisk{"RawBtrfs", "btrfs", 256 << 20, Format::Raw},
                                         SmallDisk{"Qcow2Ext4", "ext4", 32 << 20, Format::Qcow2}),
                         [](const auto& tested) { return std::string(tested.param.name); });

TEST(FullDiskTest, ANewImageThatDoesNotFitLeavesNoFile) {
  const TempDir directory(fs::current_path());
  SmallFilesystem filesystem;
  const std::string why = filesystem.make("ext4", 4 << 20, directory.path());
  if (!why.empty()) GTEST_SKIP() << why;
  // Nothing is left for qcow2's tables.
  const UniqueFd filler(
      ::open((filesystem.path() / "filler").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  const Bytes bytes(65536, std::byte{1});
  while (::write(filler.get(), bytes.data(), bytes.size()) > 0) {
  }
  TargetSpec spec;
  spec.path = filesystem.path() / "disk";
  spec.format = Format::Qcow2;
  spec.size = 1_GiB;
  spec.work_directory = directory.path();
  const auto target = create_target(spec);
  ASSERT_FALSE(target.has_value());
  EXPECT_EQ(target.error().code, Code::NoSpace) << target.error().to_string();
  EXPECT_FALSE(fs::exists(spec.path));
  EXPECT_EQ(child_processes(), "");
}

// --- Block devices -------------------------------------------------------------------------------

class Device : public testing::Test {
 protected:
  void SetUp() override {
    const std::string why = device_.make(4 << 20, 512, directory_.path());
    if (!why.empty()) GTEST_SKIP() << why;
    spec_.path = device_.path();
    spec_.block_device = true;
    spec_.size = 4_MiB;
  }
  Code create() {
    const auto target = create_target(spec_);
    return target ? Code::Internal : target.error().code;
  }
  TempDir directory_{fs::current_path()};
  LoopDevice device_;
  TargetSpec spec_;
};

TEST_F(Device, MustBeLargeEnough) {
  spec_.size = 4_MiB + Length(512);
  EXPECT_EQ(create(), Code::NoSpace);
}

TEST_F(Device, MustBeABlockDevice) {
  spec_.path = directory_.path() / "file";
  EXPECT_EQ(create(), Code::NotFound);
  std::ofstream(spec_.path) << "precious";
  EXPECT_EQ(create(), Code::InvalidArgument);
  spec_.path = "/dev/null";
  EXPECT_EQ(create(), Code::InvalidArgument);
}

TEST_F(Device, TakesRawOnly) {
  spec_.format = Format::Qcow2;
  EXPECT_EQ(create(), Code::Incompatible);
}

TEST_F(Device, IsRefusedWhileAnotherTargetHasIt) {
  const auto first = create_target(spec_);
  ASSERT_TRUE(first.has_value()) << first.error().to_string();
  EXPECT_FALSE((*first)->initially_zero());
  EXPECT_EQ(create(), Code::Busy);
  ASSERT_TRUE((*first)->release().has_value());
  const auto second = create_target(spec_);
  EXPECT_TRUE(second.has_value()) << second.error().to_string();
}

TEST_F(Device, IsRefusedWhileMounted) {
  SmallFilesystem filesystem;
  const std::string why = filesystem.make("ext4", 16 << 20, directory_.path());
  if (!why.empty()) GTEST_SKIP() << why;
  spec_.path = filesystem.device();
  EXPECT_EQ(create(), Code::Busy);
}

TEST_F(Device, IsRefusedWhileQemuHasIt) {
  const UniqueFd fd(::open(device_.path().c_str(), O_RDWR | O_CLOEXEC));
  StorageDaemonOptions options;
  options.image_fd = fd.get();
  options.image = device_.path();
  options.driver = "raw";
  options.protocol = "host_device";
  options.writable = true;
  options.work_directory = directory_.path();
  auto daemon = StorageDaemon::start(options);
  ASSERT_TRUE(daemon.has_value()) << daemon.error().to_string();
  auto connection = (*daemon)->connect();
  ASSERT_TRUE(connection.has_value()) << connection.error().to_string();
  EXPECT_EQ(create(), Code::Busy);
}

TEST_F(Device, StaysWhenRemoved) {
  auto target = create_target(spec_);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  EXPECT_TRUE((*target)->remove().has_value());
  EXPECT_TRUE(fs::is_block_file(spec_.path));
  EXPECT_TRUE(create_target(spec_).has_value()) << "and nobody holds it";
}

TEST_F(Device, AReadErrorIsIoAndNamesTheImageAndTheExtent) {
  auto loop = std::move(Loop::create().value());
  auto reader = open_raw_reader(*loop, {.path = device_.path()});
  ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
  // Behind the loop device's back: what it can't read is an I/O error.
  ASSERT_EQ(::ftruncate(device_.backing(), 1 << 20), 0);
  Bytes buffer(65536);
  const auto read = [&](std::uint64_t at) {
    Status result;
    (*reader)->read(Offset(at), buffer, [&](Status status) {
      result = std::move(status);
      loop->stop();
    });
    loop->run();
    return result;
  };
  const Status failed = read(2 << 20);
  ASSERT_FALSE(failed.has_value());
  EXPECT_EQ(failed.error().code, Code::Io);
  EXPECT_NE(failed.error().message.find(device_.path()), std::string::npos);
  EXPECT_NE(failed.error().message.find("64.0 KiB at 2097152"), std::string::npos)
      << failed.error().message;
  EXPECT_TRUE(read(0).has_value()) << "the reader is still usable";
}

// --- Raw sources ---------------------------------------------------------------------------------

class RawSourceTest : public testing::Test {
 protected:
  TempDir directory_{fs::current_path()};
  std::unique_ptr<Loop> loop_ = std::move(Loop::create().value());
};

TEST_F(RawSourceTest, AShorterFileReadsAsZeroesBeyondItsEnd) {
  Random random(1);
  for (const bool cached : {false, true}) {
    const Bytes content = random_bytes(random, 10'000);
    const fs::path path = directory_.path() / (cached ? "cached" : "direct");
    write_sparse(path, content);
    constexpr std::uint64_t kSize = 1 << 20;
    auto reader = open_raw_reader(*loop_, {.path = path, .size = Length(kSize), .cached = cached});
    ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
    EXPECT_EQ((*reader)->size(), Length(kSize));
    for (const std::uint64_t at : {std::uint64_t{0}, std::uint64_t{9'999}, std::uint64_t{10'000},
                                   std::uint64_t{8'192}, std::uint64_t{500'000}}) {
      Bytes buffer(kSize - at, std::byte{0xee});
      Status result;
      (*reader)->read(Offset(at), buffer, [&](Status status) {
        result = std::move(status);
        loop_->stop();
      });
      loop_->run();
      ASSERT_TRUE(result.has_value()) << result.error().to_string();
      Bytes expected(kSize - at);
      if (at < content.size()) {
        std::copy(content.begin() + static_cast<std::ptrdiff_t>(at), content.end(),
                  expected.begin());
      }
      EXPECT_EQ(buffer, expected) << at;
    }
    std::vector<MappedExtent> found;
    (*reader)->extents(Extent{Offset(), Length(kSize)}, [&](auto result) {
      found = result.value();
      loop_->stop();
    });
    loop_->run();
    ASSERT_FALSE(found.empty());
    EXPECT_FALSE(found.back().data);
    EXPECT_EQ(found.back().extent.end(), Offset(kSize));
  }
}

TEST_F(RawSourceTest, ManyHolesComeInPieces) {
  constexpr std::size_t kRuns = 1000;
  const fs::path path = directory_.path() / "holes";
  {
    const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    const Bytes block(4096, std::byte{1});
    for (std::size_t i = 0; i < kRuns; ++i) {
      ASSERT_EQ(::pwrite(fd.get(), block.data(), block.size(), static_cast<off_t>(i * 65536)),
                4096);
    }
    ASSERT_EQ(::fsync(fd.get()), 0);
  }
  auto reader = open_raw_reader(*loop_, {.path = path});
  ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
  Offset position;
  const Offset end(((kRuns - 1) * 65536) + 4096);
  std::size_t answers = 0;
  std::size_t data_runs = 0;
  while (position < end) {
    (*reader)->extents(Extent{position, end - position}, [&](auto result) {
      for (const MappedExtent& run : result.value()) {
        data_runs += run.data ? 1U : 0U;
        position = run.extent.end();
      }
      loop_->stop();
    });
    loop_->run();
    ++answers;
  }
  EXPECT_EQ(data_runs, kRuns);
  EXPECT_GT(answers, 1U);
}

TEST_F(RawSourceTest, RefusesWhatIsNoDisk) {
  const auto code_of = [&](const fs::path& path) {
    const auto reader = open_raw_reader(*loop_, {.path = path});
    return reader ? Code::Internal : reader.error().code;
  };
  EXPECT_EQ(code_of(directory_.path() / "missing"), Code::NotFound);
  EXPECT_EQ(code_of(directory_.path()), Code::InvalidArgument);
  EXPECT_EQ(code_of("/dev/null"), Code::InvalidArgument);
  const std::string fifo = directory_.path() / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_EQ(code_of(fifo), Code::InvalidArgument);
  const fs::path empty = directory_.path() / "empty";
  std::ofstream(empty).flush();
  EXPECT_EQ(code_of(empty), Code::InvalidArgument);
}

// Invariant 3.
TEST_F(RawSourceTest, TakesNoLockAndDoesNotNeedToWrite) {
  const fs::path path = directory_.path() / "disk";
  Random random(2);
  write_sparse(path, random_bytes(random, 1 << 20));
  fs::permissions(path, fs::perms::owner_read);
  const auto before = fs::last_write_time(path);
  auto reader = open_raw_reader(*loop_, {.path = path});
  ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
  fs::permissions(path, fs::perms::owner_read | fs::perms::owner_write);
  const auto io = run_process({"qemu-io", "-f", "raw", "-c", "read 0 512", path});
  ASSERT_TRUE(io.has_value());
  EXPECT_EQ(io->exit_code, 0) << io->err;
  EXPECT_EQ(fs::last_write_time(path), before);
}

// --- NBD -----------------------------------------------------------------------------------------

UniqueFd listen_at(const std::string& path) {
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  EXPECT_LT(path.size(), sizeof name.sun_path);
  std::memcpy(name.sun_path, path.data(), std::min(path.size(), sizeof name.sun_path - 1));
  EXPECT_EQ(::bind(socket.get(), reinterpret_cast<sockaddr*>(&name), sizeof name), 0);
  EXPECT_EQ(::listen(socket.get(), 8), 0);
  return socket;
}

class NbdTest : public testing::Test {
 protected:
  Qcow2Place place_;

  // A child that is stopped answers nothing: what is issued now stays outstanding.
  static void stop_process(pid_t pid) {
    ASSERT_EQ(::kill(pid, SIGSTOP), 0);
    siginfo_t info{};
    ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(pid), &info, WSTOPPED | WNOWAIT), 0);
  }
};

TEST_F(NbdTest, ADeadServerFailsEveryReadWithUnreachable) {
  Random random(1);
  const Bytes content = random_bytes(random, 4 << 20);
  auto reader = place_.source(content);
  ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
  const pid_t pid = place_.daemon().pid();
  stop_process(pid);
  constexpr std::size_t kReads = 32;
  Bytes buffer(content.size());
  std::vector<Code> codes;
  const auto note = [&](const Status& status) {
    codes.push_back(status ? Code::Internal : status.error().code);
    if (codes.size() == kReads + 1) place_.loop().stop();
  };
  for (std::size_t i = 0; i < kReads; ++i) {
    (*reader)->read(Offset(i * 65536), std::span(buffer).subspan(i * 65536, 65536), note);
  }
  (*reader)->extents(Extent{Offset(), Length(content.size())}, [&](const auto& result) {
    note(result ? Status() : tl::unexpected(result.error()));
  });
  place_.loop().post([&] { ASSERT_EQ(::kill(pid, SIGKILL), 0); });
  place_.loop().run();
  EXPECT_EQ(codes, std::vector<Code>(kReads + 1, Code::Unreachable));

  // And so do those that come later.
  Code later = Code::Internal;
  (*reader)->read(Offset(), std::span(buffer).first(512), [&](const Status& status) {
    later = status ? Code::Internal : status.error().code;
    place_.loop().stop();
  });
  place_.loop().run();
  EXPECT_EQ(later, Code::Unreachable);
}

TEST_F(NbdTest, ADeadDaemonFailsTheTargetCleanly) {
  const std::size_t descriptors = open_descriptors();
  TargetSpec spec;
  spec.path = place_.directory() / "disk";
  spec.format = Format::Qcow2;
  spec.size = 64_MiB;
  spec.work_directory = place_.directory();
  auto target = create_target(spec);
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  auto writer = (*target)->open_writer(place_.loop());
  ASSERT_TRUE(writer.has_value()) << writer.error().to_string();
  const pid_t pid = static_cast<pid_t>(std::stol(child_processes()));
  stop_process(pid);
  constexpr std::size_t kWrites = 16;
  const Bytes bytes(1 << 20, std::byte{7});
  std::vector<Code> codes;
  const auto note = [&](const Status& status) {
    codes.push_back(status ? Code::Internal : status.error().code);
    if (codes.size() == kWrites + 1) place_.loop().stop();
  };
  for (std::size_t i = 0; i < kWrites; ++i) {
    (*writer)->write(Offset(i * bytes.size()), bytes, note);
  }
  (*writer)->write_zeroes(Extent{Offset(32 << 20), 1_MiB}, note);
  place_.loop().post([&] { ASSERT_EQ(::kill(pid, SIGKILL), 0); });
  place_.loop().run();
  EXPECT_EQ(codes, std::vector<Code>(kWrites + 1, Code::Unreachable));
  writer->reset();
  const auto another = (*target)->open_writer(place_.loop());
  EXPECT_FALSE(another.has_value());
  EXPECT_FALSE((*target)->flush().has_value());
  EXPECT_FALSE((*target)->release().has_value()) << "what was not flushed may be lost";
  EXPECT_EQ(child_processes(), "");
  EXPECT_TRUE((*target)->remove().has_value());
  EXPECT_TRUE(entries(place_.directory()).empty());
  place_.loop().post([&] { place_.loop().post([&] { place_.loop().stop(); }); });
  place_.loop().run();
  EXPECT_EQ(open_descriptors(), descriptors);
}

TEST_F(NbdTest, ADaemonThatDoesNotEndIsKilledWhichIsAnError) {
  TargetSpec spec;
  spec.path = place_.directory() / "disk";
  spec.format = Format::Qcow2;
  spec.size = 1_MiB;
  spec.work_directory = place_.directory();
  const UniqueFd fd(::open(spec.path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  const Bytes bytes(1 << 20);
  ASSERT_EQ(::write(fd.get(), bytes.data(), bytes.size()), 1 << 20);
  StorageDaemonOptions options;
  options.image_fd = fd.get();
  options.image = spec.path;
  options.driver = "raw";
  options.work_directory = place_.directory();
  options.stop_grace = std::chrono::milliseconds(1);
  auto daemon = StorageDaemon::start(options);
  ASSERT_TRUE(daemon.has_value()) << daemon.error().to_string();
  stop_process((*daemon)->pid());
  const Status stopped = (*daemon)->stop();
  ASSERT_FALSE(stopped.has_value());
  EXPECT_EQ(stopped.error().code, Code::Unreachable);
  EXPECT_EQ(child_processes(), "");
  EXPECT_EQ(entries(place_.directory()), std::vector<std::string>{"disk"});
}

TEST_F(NbdTest, ADaemonThatCanNotOpenTheImageSaysWhy) {
  const fs::path path = place_.directory() / "disk";
  std::ofstream(path) << "this is no qcow2 image";
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  StorageDaemonOptions options;
  options.image_fd = fd.get();
  options.image = path;
  options.driver = "qcow2";
  options.work_directory = place_.directory();
  auto daemon = StorageDaemon::start(options);
  ASSERT_TRUE(daemon.has_value()) << daemon.error().to_string();
  const auto connection = (*daemon)->connect();
  ASSERT_FALSE(connection.has_value());
  EXPECT_EQ(connection.error().code, Code::Io);
  EXPECT_NE(connection.error().message.find("Image is not in qcow2 format"), std::string::npos)
      << connection.error().message;
}

TEST_F(NbdTest, SaysWhenThereIsNoServerOrNoSuchExport) {
  Random random(1);
  auto reader = place_.source(random_bytes(random, 1 << 20));
  ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
  const std::string socket = place_.daemon().address().unix_socket;
  const auto wrong_name =
      open_nbd_reader(place_.loop(), {.unix_socket = socket, .export_name = "other"});
  ASSERT_FALSE(wrong_name.has_value());
  EXPECT_EQ(wrong_name.error().code, Code::NotFound) << wrong_name.error().to_string();
  const auto no_server = open_nbd_reader(
      place_.loop(), {.unix_socket = place_.directory() / "none", .export_name = "disk"});
  ASSERT_FALSE(no_server.has_value());
  EXPECT_EQ(no_server.error().code, Code::Unreachable) << no_server.error().to_string();
  const auto no_connections = open_nbd_reader(
      place_.loop(), {.unix_socket = socket, .export_name = "disk", .connections = 0});
  ASSERT_FALSE(no_connections.has_value());
  EXPECT_EQ(no_connections.error().code, Code::InvalidArgument);
}

TEST_F(NbdTest, AServerThatSaysNothingIsUnreachableInTime) {
  const std::string path = place_.directory() / "mute";
  const UniqueFd socket = listen_at(path);
  ASSERT_TRUE(socket);
  NbdOpenOptions options;
  options.image = "mute";
  options.timeout = std::chrono::milliseconds(20);
  const auto connection = NbdConnection::open({path, "disk"}, options);
  ASSERT_FALSE(connection.has_value());
  EXPECT_EQ(connection.error().code, Code::Unreachable);
  EXPECT_TRUE(connection.error().retryable);
}

TEST_F(NbdTest, ReadsMoreThanOneRequestMayCarry) {
  constexpr std::uint64_t kSize = 70 << 20;  // QEMU takes 32 MiB
  Random random(4);
  Bytes content(kSize);
  const Bytes part = random_bytes(random, 5 << 20);
  for (const std::uint64_t at : {0U, 31U << 20, 63U << 20}) {
    std::copy(part.begin(), part.end(), content.begin() + static_cast<std::ptrdiff_t>(at));
  }
  auto reader = place_.source(content);
  ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
  Bytes found(kSize - 3);
  Status result;
  (*reader)->read(Offset(3), found, [&](Status status) {
    result = std::move(status);
    place_.loop().stop();
  });
  place_.loop().run();
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_TRUE(std::equal(found.begin(), found.end(), content.begin() + 3));
}

TEST_F(NbdTest, QemuNbdServesAReaderToo) {
  Random random(6);
  const Bytes content = patchy(random, (2 << 20) + 512);
  const fs::path path = place_.directory() / "disk";
  write_sparse(path, content);
  const std::string socket = place_.directory() / "socket";
  const UniqueFd listening = listen_at(socket);
  ASSERT_TRUE(listening);
  // systemd's way of handing over a listening socket: no waiting until it is there.
  const std::string script =
      "exec 3<&" + std::to_string(listening.get()) +
      "; LISTEN_PID=$$ LISTEN_FDS=1 exec qemu-nbd -r -t -e 4 -x disk -f raw \"$0\"";
  const auto server =
      ChildProcess::start({"bash", "-c", script, path}, {.descriptors = {listening.get()}});
  ASSERT_TRUE(server.has_value()) << server.error().to_string();
  auto reader = open_nbd_reader(place_.loop(), {.unix_socket = socket, .export_name = "disk"});
  ASSERT_TRUE(reader.has_value()) << reader.error().to_string();
  Bytes found(content.size());
  Status result;
  (*reader)->read(Offset(), found, [&](Status status) {
    result = std::move(status);
    place_.loop().stop();
  });
  place_.loop().run();
  ASSERT_TRUE(result.has_value()) << result.error().to_string();
  EXPECT_EQ(found, content);
}

// --- The fake ------------------------------------------------------------------------------------

// What this process has had read from a device.
std::uint64_t bytes_from_storage() {
  std::ifstream io("/proc/self/io");
  std::string name;
  std::uint64_t value = 0;
  while (io >> name >> value) {
    if (name == "read_bytes:") return value;
  }
  return 0;
}

TEST(ReadingBack, ComesFromStorageWhereNothingIsDirect) {
  RealFilesystemPlace place(true);
  if (const std::string why = place.unusable(); !why.empty()) GTEST_SKIP() << why;
  constexpr Length kSize = 1_MiB;
  auto image = place.target(kSize);
  ASSERT_TRUE(image);
  if (!(*image)->reads_storage()) GTEST_SKIP() << "this filesystem does not let go of its cache";
  Random random(7);
  const Bytes written = random_bytes(random, kSize.bytes());
  {
    auto writer = (*image)->open_writer(place.loop());
    auto reader = (*image)->open_reader(place.loop());
    ASSERT_TRUE(writer && reader);
    Bytes found(kSize.bytes());
    const auto run = [&](auto&& begin) {
      Status ended = fail(Code::Internal, "not yet");
      begin([&](Status status) {
        ended = std::move(status);
        place.loop().stop();
      });
      place.loop().run();
      ASSERT_TRUE(ended) << ended.error().to_string();
    };
    run([&](Done done) { (*writer)->write(Offset(), written, std::move(done)); });
    ASSERT_TRUE((*image)->flush());
    const std::uint64_t before = bytes_from_storage();
    run([&](Done done) { (*reader)->read(Offset(), found, std::move(done)); });
    EXPECT_EQ(found, written);
    EXPECT_GE(bytes_from_storage() - before, kSize.bytes()) << "it was in the page cache just now";
    // What is not flushed is read, too.
    run([&](Done done) {
      (*writer)->write(Offset(5), std::span(written).first(9), std::move(done));
    });
    run([&](Done done) { (*reader)->read(Offset(), found, std::move(done)); });
    EXPECT_TRUE(std::ranges::equal(std::span(found).subspan(5, 9), std::span(written).first(9)));
  }
  EXPECT_TRUE((*image)->remove());
}

TEST(ReadingBack, SaysWhereThereIsOnlyMemory) {
  TmpfsPlace place;
  if (const std::string why = place.unusable(); !why.empty()) GTEST_SKIP() << why;
  auto image = place.target(64_KiB);
  ASSERT_TRUE(image);
  EXPECT_FALSE((*image)->reads_storage());
  EXPECT_TRUE((*image)->remove());
}

TEST(FakeImageTest, SyncedSurvivesACrashAndWrittenMayNot) {
  int old_blocks = 0;
  int new_blocks = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    fakes::FakeQueue queue(seed);
    fakes::FakeImage image(64_KiB, seed, queue.schedule());
    const Bytes first(65536, std::byte{1});
    const Bytes second(32768, std::byte{2});
    auto writer = image.open_writer();
    writer->write(Offset(), first, [](const Status&) {});
    queue.run_all();
    image.flush();
    writer->write(Offset(), second, [](const Status&) {});
    queue.run_all();
    EXPECT_EQ(image.content()[0], std::byte{2});
    EXPECT_EQ(image.synced()[0], std::byte{1});
    image.crash();
    for (std::size_t at = 0; at < 65536; at += 512) {
      const std::byte value = image.content()[at];
      if (at >= 32768) {
        EXPECT_EQ(value, std::byte{1});
      } else {
        (value == std::byte{1} ? old_blocks : new_blocks) += 1;
      }
      EXPECT_EQ(image.content()[at + 511], value) << "a sector is written whole or not at all";
    }
  }
  EXPECT_GT(old_blocks, 0);
  EXPECT_GT(new_blocks, 0);
}

TEST(FakeImageTest, RequestsUnderWayWhenItCrashesNeverCallBack) {
  fakes::FakeQueue queue(1);
  fakes::FakeImage image(64_KiB, 1, queue.schedule());
  const Bytes bytes(4096, std::byte{1});
  auto writer = image.open_writer();
  bool called = false;
  writer->write(Offset(), bytes, [&](const Status&) { called = true; });
  image.crash();
  queue.run_all();
  EXPECT_FALSE(called);
  EXPECT_EQ(image.in_flight(), 0U);
}

TEST(FakeImageTest, LosesAWriteThatSharesABlockWithAnother) {
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    fakes::FakeQueue queue(seed);
    fakes::FakeImage image(4_KiB, seed, queue.schedule());
    const Bytes left(256, std::byte{1});
    const Bytes right(256, std::byte{2});
    auto writer = image.open_writer();
    writer->write(Offset(0), left, [](const Status&) {});
    writer->write(Offset(256), right, [](const Status&) {});
    queue.run_all();
    EXPECT_EQ(image.overlaps(), 1U);
    if (image.content()[0] != std::byte{1} || image.content()[256] != std::byte{2}) ++lost;
  }
  EXPECT_GT(lost, 0) << "as two read-modify-writes do";
}

TEST(FakeImageTest, TearsAReadThatRunsBesideAWrite) {
  int torn = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    fakes::FakeQueue queue(seed);
    fakes::FakeImage image(64_KiB, seed, queue.schedule());
    const Bytes bytes(65536, std::byte{1});
    Bytes found(65536);
    auto writer = image.open_writer();
    auto reader = image.open_reader();
    writer->write(Offset(), bytes, [](const Status&) {});
    reader->read(Offset(), found, [](const Status&) {});
    queue.run_all();
    const auto ones = std::count(found.begin(), found.end(), std::byte{1});
    if (ones != 0 && ones != 65536) ++torn;
  }
  EXPECT_GT(torn, 0);
}

TEST(FakeImageTest, InjectsErrorsAndRunsOutOfSpace) {
  fakes::FakeQueue queue(1);
  fakes::FakeImageOptions options;
  options.space = 8_KiB;
  fakes::FakeImage image(64_KiB, 1, queue.schedule(), options);
  auto writer = image.open_writer();
  auto reader = image.open_reader();
  const Bytes bytes(4096, std::byte{1});
  Bytes found(4096);
  std::vector<Code> codes;
  const auto note = [&](const Status& status) {
    codes.push_back(status ? Code::Internal : status.error().code);
  };
  const auto write = [&](std::uint64_t at) {
    writer->write(Offset(at), bytes, note);
    queue.run_all();
  };
  write(0);
  write(4096);
  write(8192);
  EXPECT_EQ(image.content()[8192], std::byte{0}) << "a write without room changes nothing";
  writer->write_zeroes(Extent{Offset(), 4_KiB}, note);
  queue.run_all();
  write(8192);
  image.fail_next_writes(1);
  write(8192);
  image.fail_next_reads(1);
  reader->read(Offset(), found, note);
  queue.run_all();
  reader->read(Offset(8192), found, note);
  queue.run_all();
  EXPECT_EQ(codes, (std::vector<Code>{Code::Internal, Code::Internal, Code::NoSpace, Code::Internal,
                                      Code::Internal, Code::Io, Code::Io, Code::Internal}));
}

}  // namespace
}  // namespace drover::blockcopy::test
