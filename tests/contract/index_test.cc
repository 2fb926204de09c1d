// SPDX-License-Identifier: Apache-2.0
//
// The content index on real files, and moves of images to a host that has one: over the real link,
// receiver and index, what another image holds is not sent, and whatever has become of that image
// the target ends equal to the source.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rocksdb/db.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <fstream>

#include "base/subprocess.h"
#include "mirror/content_index.h"
#include "mirror/known_filter.h"
#include "tests/contract/image_places.h"
#include "tests/contract/link_support.h"

namespace drover::mirror::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr const char* kSession = "job-1";

void write_file(const std::string& path, std::span<const std::byte> bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(reinterpret_cast<const char*>(bytes.data()),
            static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(out.good()) << path;
}
Bytes read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

// Data, a run of zeroes in each MiB, and an odd tail.
Bytes guest_disk(std::uint64_t seed, std::size_t size = (6U << 20) + 12345) {
  Random random(seed);
  Bytes bytes = random_bytes(random, size);
  for (std::size_t at = 0; at + (1U << 20) <= size; at += 1U << 20) {
    const auto from = static_cast<std::ptrdiff_t>(at + random.below(800'000));
    std::fill_n(bytes.begin() + from, 200'000, std::byte{0});
  }
  return bytes;
}

class IndexTest : public testing::Test {
 protected:
  [[nodiscard]] std::string index_directory() const { return dir_ / "index"; }
  std::unique_ptr<IndexWriter> writer() {
    auto made = IndexWriter::open(index_directory());
    EXPECT_TRUE(made.has_value()) << made.error().to_string();
    return std::move(*made);
  }
  void index(const std::vector<std::string>& paths) {
    const auto made = writer();
    for (const std::string& path : paths) {
      const auto added = made->add(path, {});
      ASSERT_TRUE(added.has_value()) << added.error().to_string();
    }
    const Status finished = made->finish();
    ASSERT_TRUE(finished.has_value()) << finished.error().to_string();
  }
  [[nodiscard]] std::vector<std::string> known() const {
    std::vector<std::string> paths;
    const auto reader = IndexReader::open(index_directory());
    EXPECT_TRUE(reader.has_value());
    if (!reader) return paths;
    for (const IndexedImage& image : (*reader)->images()) paths.push_back(image.path);
    return paths;
  }
  void damage() const {
    for (const auto& entry : std::filesystem::directory_iterator(index_directory())) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with("MANIFEST")) write_file(entry.path().string(), Bytes(100, std::byte{7}));
    }
  }
  TempDir dir_;
};

TEST_F(IndexTest, ReadsWhatIsNewOrHasChangedAndNothingElse) {
  const std::string a = dir_ / "a.raw";
  const std::string b = dir_ / "b.raw";
  write_file(a, guest_disk(1));
  write_file(b, guest_disk(2));
  const auto made = writer();
  EXPECT_TRUE(*made->add(a, {}));
  EXPECT_TRUE(*made->add(b, {}));
  EXPECT_FALSE(*made->add(a, {}));
  EXPECT_EQ(made->images().size(), 2U);
  EXPECT_GT(made->images()[0].pieces, 70U);
  write_file(a, guest_disk(3));
  EXPECT_TRUE(*made->add(a, {}));
  EXPECT_EQ(made->images().size(), 2U);
  EXPECT_TRUE(made->finish().has_value());
  EXPECT_TRUE(*made->remove(b));
  EXPECT_FALSE(*made->remove(b));
  std::filesystem::remove(a);
  EXPECT_THAT(*made->remove_missing(),
              ElementsAre(std::filesystem::canonical(dir_.path()).string() + "/a.raw"));
  EXPECT_TRUE(made->finish().has_value());
  EXPECT_THAT(made->images(), IsEmpty());
}

TEST_F(IndexTest, OnlyRegularFilesAreRead) {
  const auto made = writer();
  const std::string pipe = dir_ / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_EQ(made->add(pipe, {}).error().code, Code::InvalidArgument);
  EXPECT_EQ(made->add(dir_.path(), {}).error().code, Code::InvalidArgument);
  EXPECT_EQ(made->add(dir_ / "nothing", {}).error().code, Code::NotFound);
}

TEST_F(IndexTest, HasOneWriterAndAnyNumberOfReadersBesideIt) {
  const std::string a = dir_ / "a.raw";
  write_file(a, guest_disk(1));
  EXPECT_EQ(IndexReader::open(index_directory()).error().code, Code::NotFound);
  index({a});
  const auto first = writer();
  EXPECT_EQ(IndexWriter::open(index_directory()).error().code, Code::Busy);
  EXPECT_EQ(known().size(), 1U);
  const auto reader = IndexReader::open(index_directory());
  ASSERT_TRUE(reader.has_value());
  EXPECT_TRUE(*first->remove(a));
  EXPECT_TRUE(first->finish().has_value());
  ASSERT_TRUE((*reader)->filter().has_value());
}

TEST_F(IndexTest, WhatWasReadBeforeAWriterWasKilledCountsWithTheNext) {
  const std::string a = dir_ / "a.raw";
  write_file(a, guest_disk(1));
  EXPECT_TRUE(*writer()->add(a, {}));  // gone without finish()
  EXPECT_EQ(*(*IndexReader::open(index_directory()))->filter(), nullptr);
  index({});
  EXPECT_NE(*(*IndexReader::open(index_directory()))->filter(), nullptr);
}

TEST_F(IndexTest, ADamagedOneIsPutAsideAndMadeAnew) {
  const std::string a = dir_ / "a.raw";
  write_file(a, guest_disk(1));
  index({a});
  damage();
  EXPECT_FALSE(IndexReader::open(index_directory()).has_value());
  index({a});
  EXPECT_EQ(known().size(), 1U);
  EXPECT_TRUE(std::filesystem::exists(index_directory() + ".damaged/CURRENT"));
}

TEST_F(IndexTest, OneOfANewerDroverIsLeftAlone) {
  index({});
  {
    rocksdb::DB* raw = nullptr;
    ASSERT_TRUE(rocksdb::DB::Open({}, index_directory(), &raw).ok());
    const std::unique_ptr<rocksdb::DB> db(raw);
    ASSERT_TRUE(db->Put({}, "v", "2").ok());
  }
  EXPECT_EQ(IndexReader::open(index_directory()).error().code, Code::Incompatible);
  EXPECT_EQ(IndexWriter::open(index_directory()).error().code, Code::Incompatible);
  EXPECT_FALSE(std::filesystem::exists(index_directory() + ".damaged"));
}

TEST_F(IndexTest, MovesAddToItOnlyWhereThereIsOne) {
  const std::string a = dir_ / "a.raw";
  const std::string b = dir_ / "b.raw";
  write_file(a, guest_disk(1));
  write_file(b, guest_disk(2));
  EXPECT_TRUE(note_images(index_directory(), {a}, 0s).has_value());
  EXPECT_FALSE(std::filesystem::exists(index_directory()));
  index({a});
  std::filesystem::remove(a);
  EXPECT_TRUE(note_images(index_directory(), {b}, 0s).has_value());
  EXPECT_THAT(known(), ElementsAre(HasSubstr("/b.raw")));
  const auto busy = writer();
  EXPECT_EQ(note_images(index_directory(), {b}, 0s).error().code, Code::Busy);
}

TEST(KnownFilter, ComesInParts) {
  PieceFilter filter = PieceFilter::for_pieces(2'000'000);
  filter.add(PieceHash{});
  unsigned parts = 0;
  const auto fetched = fetch_filter([&](const nlohmann::json& request) {
    ++parts;
    return filter_part(&filter, request);
  });
  ASSERT_TRUE(fetched.has_value());
  EXPECT_EQ(parts, filter.bytes().size() / (512U << 10));
  EXPECT_TRUE(std::ranges::equal((*fetched)->bytes(), filter.bytes()));
}

TEST(KnownFilter, WhatAPeerSaysIsChecked) {
  const auto fetch = [](const Result<nlohmann::json>& answer) {
    return fetch_filter([&](const nlohmann::json&) { return answer; });
  };
  using nlohmann::json;
  // An older drover; nothing there; pieces of another size.
  EXPECT_EQ(*fetch(fail(Code::InvalidArgument, "the receiver does not know \"index\"")), nullptr);
  EXPECT_EQ(*fetch(*filter_part(nullptr, {{"offset", 0U}})), nullptr);
  EXPECT_EQ(*fetch(json{{"piece", 4096U}, {"size", 64U}}), nullptr);
  EXPECT_EQ(fetch(fail(Code::Unreachable, "gone")).error().code, Code::Unreachable);
  const std::string data = "AAAA";
  for (const json& nonsense :
       {json::object(), json{{"piece", 65536U}}, json{{"piece", 65536U}, {"size", 1U << 30}},
        json{{"piece", 65536U}, {"size", 64U}, {"probes", 6U}, {"data", ""}},
        json{{"piece", 65536U}, {"size", 64U}, {"probes", 6U}, {"data", "?"}},
        json{{"piece", 65536U}, {"size", 3U}, {"probes", 6U}, {"data", data}},
        json{{"piece", 65536U}, {"size", 2U}, {"probes", 6U}, {"data", data}},
        json{{"piece", 65536U}, {"size", 192U}, {"probes", 6U}, {"data", data}}}) {
    EXPECT_FALSE(fetch(nonsense).has_value()) << nonsense;
  }
}

// --- moves ---

class IndexedMoveTest : public IndexTest {
 protected:
  void start(const Bytes& disk, Length chunk = 1_MiB) {
    ReceiverOptions options;
    options.session = kSession;
    options.key = key_;
    options.jobs_directory = dir_ / "jobs";
    options.index_directory = index_directory();
    receiver_ = std::make_unique<TestReceiver>(std::move(options));
    LinkOptions link;
    link.address = "127.0.0.1";
    link.port = receiver_->port();
    link.session = kSession;
    link.key = key_;
    link.disk_sizes = {Length(disk.size())};
    link.chunk_size = chunk;
    const Status connected = source_.connect(link);
    ASSERT_TRUE(connected.has_value()) << connected.error().to_string();
    const auto reserved =
        call({{"op", "reserve"},
              {"disks", {{{"path", target_path()}, {"format", "raw"}, {"size", disk.size()}}}}});
    ASSERT_TRUE(reserved.has_value()) << reserved.error().to_string();
    auto filter = fetch_filter([this](const nlohmann::json& request) { return call(request); });
    ASSERT_TRUE(filter.has_value()) << filter.error().to_string();
    has_filter_ = *filter != nullptr;
    if (has_filter_) source_.link().use_filter(*filter);
  }
  Result<nlohmann::json> call(const nlohmann::json& request) {
    return source_.link().call(request, kPatience);
  }
  // Copies the disk, what was not found again; the target holds it then.
  void move(const Bytes& disk) {
    constexpr std::uint64_t kChunk = 1U << 20;
    const auto send = [&](std::uint64_t i, bool fresh) {
      const Extent extent{Offset(i * kChunk),
                          Length(std::min<std::uint64_t>(kChunk, disk.size() - i * kChunk))};
      source_.copy(static_cast<std::uint32_t>(i % 2), 0, disk, extent, fresh, i);
    };
    for (std::uint64_t i = 0; i * kChunk < disk.size(); ++i) send(i, true);
    ASSERT_TRUE(source_.wait_answers());
    missed_ = source_.differing_tokens();
    expect_nothing_foreign(disk);
    for (const std::uint64_t i : missed_) send(i, false);
    ASSERT_TRUE(source_.wait_answers());
    EXPECT_THAT(source_.refused_tokens(), IsEmpty());
    const auto passed = source_.link().barrier(kPatience);
    ASSERT_TRUE(passed.has_value()) << passed.error().to_string();
    const LinkCounters counters = source_.link().counters();
    sent_ = counters.bytes_sent;
    found_ = counters.found_bytes;
    const auto stats = call({{"op", "stats"}});
    ASSERT_TRUE(stats.has_value());
    // The source counts in blocks, of which the disk's last one is shorter.
    EXPECT_LT(found_ - stats->at("bytes_found").get<std::uint64_t>(), kBlock.bytes());
    ASSERT_TRUE(call({{"op", "finish"}}).has_value());
    EXPECT_TRUE(read_file(target_path()) == disk) << "the target holds something else";
  }
  // A source that offers hashes and then sends nothing must not get what others have: each block of
  // the target is the disk's or zero.
  void expect_nothing_foreign(const Bytes& disk) {
    const Bytes target = read_file(target_path());
    ASSERT_EQ(target.size(), disk.size());
    const auto block = static_cast<std::size_t>(kBlock.bytes());
    for (std::size_t at = 0; at < disk.size(); at += block) {
      const std::span has(target.data() + at, std::min(block, disk.size() - at));
      ASSERT_TRUE(all_zero(has) || std::ranges::equal(has, std::span(disk.data() + at, has.size())))
          << "foreign bytes at " << at;
    }
  }
  [[nodiscard]] std::string target_path() const {
    return (place_.empty() ? dir_.path() : place_) + "/moved.raw";
  }

  std::string place_;  // another directory for the target's image

  LinkKey key_ = *random_key();
  std::unique_ptr<TestReceiver> receiver_;
  TestSource source_;
  bool has_filter_ = false;
  std::vector<std::uint64_t> missed_;  // chunks of which something was not found
  std::uint64_t sent_ = 0;
  std::uint64_t found_ = 0;
};

TEST_F(IndexedMoveTest, WhatAnotherImageHoldsIsNotSent) {
  const Bytes disk = guest_disk(1);
  write_file(dir_ / "template.raw", disk);
  index({dir_ / "template.raw"});
  start(disk);
  ASSERT_TRUE(has_filter_);
  move(disk);
  EXPECT_THAT(missed_, IsEmpty());
  EXPECT_GT(found_, disk.size() * 3 / 4);
  EXPECT_LT(sent_, disk.size() / 100);
}

TEST_F(IndexedMoveTest, ACloneThatDivergedCostsWhatDiffers) {
  const Bytes original = guest_disk(1);
  write_file(dir_ / "template.raw", original);
  index({dir_ / "template.raw"});
  Bytes disk = original;
  for (std::size_t at = 300'000; at < disk.size(); at += 1U << 20) disk[at] ^= std::byte{1};
  start(disk);
  move(disk);
  EXPECT_EQ(missed_.size(), 6U) << "a piece of each chunk";
  EXPECT_GT(found_, disk.size() * 3 / 5);
}

TEST_F(IndexedMoveTest, AnImageThatHasChangedSinceIsNotBelieved) {
  const Bytes disk = guest_disk(1);
  Bytes image = disk;
  write_file(dir_ / "template.raw", image);
  index({dir_ / "template.raw"});
  // In place, as a guest does it.
  for (std::size_t at = 100'000; at < image.size(); at += 300'000) image[at] ^= std::byte{1};
  const int fd = ::open((dir_ / "template.raw").c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::pwrite(fd, image.data(), image.size(), 0), static_cast<ssize_t>(image.size()));
  ::close(fd);
  start(disk);
  ASSERT_TRUE(has_filter_);
  move(disk);
  EXPECT_FALSE(missed_.empty());
  EXPECT_GT(found_, 0U);
}

TEST_F(IndexedMoveTest, AnImageThatIsGoneShorterOrNoFileAnyMoreIsNoHarm) {
  const Bytes disk = guest_disk(1);
  const Bytes second = guest_disk(2);
  for (const char* const name : {"gone", "shorter", "pipe", "link"}) {
    Bytes all = disk;
    write_file(dir_ / name, all);
  }
  index({dir_ / "gone", dir_ / "shorter", dir_ / "pipe", dir_ / "link"});
  std::filesystem::remove(dir_ / "gone");
  std::filesystem::resize_file(dir_ / "shorter", 1000);
  std::filesystem::remove(dir_ / "pipe");
  ASSERT_EQ(::mkfifo((dir_ / "pipe").c_str(), 0600), 0);
  std::filesystem::rename(dir_ / "link", dir_ / "elsewhere");
  std::filesystem::create_symlink(dir_ / "elsewhere", dir_ / "link");
  start(disk);
  ASSERT_TRUE(has_filter_);
  move(disk);
  EXPECT_EQ(found_, 0U);
}

TEST_F(IndexedMoveTest, AnIndexThatCanNotBeReadIsNone) {
  const Bytes disk = guest_disk(1);
  write_file(dir_ / "template.raw", disk);
  index({dir_ / "template.raw"});
  damage();
  start(disk);
  EXPECT_FALSE(has_filter_);
  move(disk);
}

TEST_F(IndexedMoveTest, ItsWriterIsNoHindrance) {
  const Bytes disk = guest_disk(1);
  write_file(dir_ / "template.raw", disk);
  index({dir_ / "template.raw"});
  const auto busy = writer();
  start(disk);
  EXPECT_TRUE(has_filter_);
  move(disk);
  EXPECT_GT(found_, 0U);
}

TEST_F(IndexedMoveTest, BlocksAreSharedWhereTheFilesystemCan) {
  blockcopy::test::SmallFilesystem xfs;
  if (const std::string why = xfs.make("xfs", 320U << 20, dir_.path()); !why.empty()) {
    GTEST_SKIP() << why;
  }
  const auto free_blocks = [&] {
    struct statvfs info {};
    EXPECT_EQ(::statvfs(xfs.path().c_str(), &info), 0);
    return info.f_bfree * info.f_frsize;
  };
  const Bytes disk = guest_disk(1, 24U << 20);
  place_ = xfs.path().string();
  write_file(place_ + "/template.raw", disk);
  index({place_ + "/template.raw"});
  // Not what the index says, in one place: found out although it is shared first.
  Bytes changed = disk;
  changed[1'000'000] ^= std::byte{1};
  {
    const UniqueFd fd(::open((place_ + "/template.raw").c_str(), O_WRONLY | O_CLOEXEC));
    ASSERT_EQ(::pwrite(fd.get(), &changed[1'000'000], 1, 1'000'000), 1);
    ASSERT_EQ(::fsync(fd.get()), 0);
  }
  const auto before = free_blocks();
  start(disk);
  move(disk);
  EXPECT_THAT(missed_, ElementsAre(0U));
  EXPECT_GT(found_, disk.size() * 3 / 4);
  EXPECT_LT(before - free_blocks(), 4U << 20);
  EXPECT_TRUE(read_file(place_ + "/template.raw") == changed) << "nobody writes to it";
}

TEST_F(IndexedMoveTest, AQcow2ImageHoldsTheSamePieces) {
  if (::access("/usr/bin/qemu-img", X_OK) != 0) GTEST_SKIP() << "there is no qemu-img";
  const Bytes disk = guest_disk(1, 6U << 20);
  write_file(dir_ / "template.raw", disk);
  const auto converted = run_process(
      {"qemu-img", "convert", "-O", "qcow2", dir_ / "template.raw", dir_ / "template.qcow2"});
  ASSERT_TRUE(converted.has_value() && converted->exit_code == 0);
  std::filesystem::remove(dir_ / "template.raw");
  index({dir_ / "template.qcow2"});
  start(disk);
  move(disk);
  EXPECT_GT(found_, disk.size() * 3 / 4);
}

}  // namespace
}  // namespace drover::mirror::test
