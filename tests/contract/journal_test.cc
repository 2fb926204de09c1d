// SPDX-License-Identifier: Apache-2.0
//
// The journal on the real RocksDB: what it keeps, and that damage to its files is noticed.
#include "job/journal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <fstream>
#include <sstream>

#include "tests/fakes/job_samples.h"

namespace drover::job {
namespace {

using ::testing::ElementsAre;

class JournalTest : public ::testing::Test {
 protected:
  std::unique_ptr<Journal> open(Journal::Make make = Journal::Make::IfMissing) {
    auto opened = Journal::open(path, make);
    EXPECT_TRUE(opened.has_value()) << opened.error().to_string();
    return opened ? std::move(*opened) : nullptr;
  }
  static std::vector<std::string> keys(Journal& journal, const std::string& prefix) {
    std::vector<std::string> out;
    const Status scanned =
        journal.scan(prefix, [&](std::string_view key, std::string_view) -> Status {
          out.emplace_back(key);
          return {};
        });
    EXPECT_TRUE(scanned.has_value());
    return out;
  }
  // Enough for several files, so that there is more than the log.
  void fill() {
    const auto journal = open();
    const std::string value(1000, 'v');
    for (int i = 0; i < 5000; ++i) {
      ASSERT_TRUE(journal->put_unsynced(fmt_key(i), value).has_value());
    }
    ASSERT_TRUE(journal->put("state", "copying").has_value());
  }
  static std::string fmt_key(int i) { return "chunk/" + std::to_string(100'000 + i); }

  // Reads all of it; the first error.
  Status read_all() {
    DROVER_ASSIGN(const auto journal, Journal::open(path, Journal::Make::Never));
    return journal->scan("", [](std::string_view, std::string_view) -> Status { return {}; });
  }
  std::vector<std::string> files(const std::string& extension) {
    std::vector<std::string> out;
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      const std::string name = entry.path().string();
      if (name.ends_with(extension) && entry.file_size() > 200) out.push_back(name);
    }
    return out;
  }

  testing::TemporaryPlaces temporary;
  const std::string path = temporary.directory() + "/journal";
};

TEST_F(JournalTest, KeepsWhatWasPut) {
  {
    const auto journal = open();
    ASSERT_TRUE(journal->put("state", "copying").has_value());
    Journal::Batch batch;
    batch.put("durable/vda/1", std::string("\0\1", 2))
        .put("durable/vda/2", "")
        .put("durable/vdb/1", "x");
    ASSERT_TRUE(journal->write(batch, Journal::Sync::No).has_value());
    ASSERT_TRUE(journal->put_unsynced("e", "y").has_value());
  }
  const auto journal = open(Journal::Make::Never);
  EXPECT_EQ(**journal->get("state"), "copying");
  EXPECT_EQ(**journal->get("durable/vda/1"), std::string("\0\1", 2));
  EXPECT_FALSE(journal->get("durable")->has_value());
  EXPECT_THAT(keys(*journal, "durable/vda/"), ElementsAre("durable/vda/1", "durable/vda/2"));
  EXPECT_THAT(keys(*journal, "nothing"), ElementsAre());
  Journal::Batch batch;
  batch.remove("durable/vda/1").put("durable/vda/3", "z");
  ASSERT_TRUE(journal->write(batch, Journal::Sync::Yes).has_value());
  EXPECT_THAT(keys(*journal, "durable/vda/"), ElementsAre("durable/vda/2", "durable/vda/3"));
}

TEST_F(JournalTest, AScanEndsWithItsVisitorsError) {
  const auto journal = open();
  ASSERT_TRUE(journal->put("a/1", "").has_value());
  ASSERT_TRUE(journal->put("a/2", "").has_value());
  int seen = 0;
  const Status scanned = journal->scan("a/", [&](std::string_view, std::string_view) -> Status {
    ++seen;
    return fail(Code::Cancelled, "enough");
  });
  EXPECT_EQ(scanned.error().code, Code::Cancelled);
  EXPECT_EQ(seen, 1);
}

TEST_F(JournalTest, UnsyncedRecordsSurviveTheProcess) {
  const pid_t child = ::fork();
  if (child == 0) {
    auto journal = Journal::open(path);
    if (journal) {
      (void)(*journal)->put_unsynced("a", "1");
      (void)(*journal)->put_unsynced("b", "2");
    }
    ::kill(::getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  const auto journal = open(Journal::Make::Never);
  EXPECT_EQ(**journal->get("a"), "1");
  EXPECT_EQ(**journal->get("b"), "2");
}

TEST_F(JournalTest, OneProcessHasItOpen) {
  const auto journal = open();
  const auto second = Journal::open(path);
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().code, Code::Busy) << second.error().message;
}

TEST_F(JournalTest, ANewerVersionIsLeftAlone) {
  ASSERT_TRUE(open()->put("drover-journal-version", "2").has_value());
  EXPECT_EQ(Journal::open(path).error().code, Code::Incompatible);
}

TEST_F(JournalTest, OneThatIsNotThereIsNotMadeForAResume) {
  EXPECT_EQ(Journal::open(path, Journal::Make::Never).error().code, Code::Protocol);
  std::filesystem::create_directories(path);
  EXPECT_EQ(Journal::open(path, Journal::Make::Never).error().code, Code::Protocol);
}

TEST_F(JournalTest, ADirectoryThatCantBeReadIsNoDamage) {
  std::ofstream(temporary.directory() + "/file") << "x";
  const auto opened = Journal::open(temporary.directory() + "/file/journal");
  ASSERT_FALSE(opened.has_value());
  EXPECT_NE(opened.error().code, Code::Protocol) << opened.error().message;
}

// Each file of a kind, damaged at several places: noticed when it is opened or read.
class Damage : public JournalTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(Damage, FlippedBitsAreNoticed) {
  fill();
  ASSERT_TRUE(read_all().has_value());
  ASSERT_FALSE(files(GetParam()).empty());
  for (const std::string& file : files(GetParam())) {
    const auto size = std::filesystem::file_size(file);
    for (const std::uint64_t at : {size / 4, size / 2, size - size / 4}) {
      const std::string kept = path + "-kept";
      std::filesystem::copy(path, kept);
      {
        std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
        bytes.seekg(static_cast<std::streamoff>(at));
        const int byte = bytes.get();
        bytes.seekp(static_cast<std::streamoff>(at));
        bytes.put(static_cast<char>(byte ^ 0x55));
      }
      const Status read = read_all();
      EXPECT_FALSE(read.has_value()) << file << " at " << at;
      if (!read) {
        EXPECT_EQ(read.error().code, Code::Protocol) << read.error().message;
      }
      std::filesystem::remove_all(path);
      std::filesystem::rename(kept, path);
    }
  }
}

TEST_P(Damage, AFileThatIsGoneIsNoticed) {
  fill();
  for (const std::string& file : files(GetParam())) {
    const std::string kept = path + "-kept";
    std::filesystem::copy(path, kept);
    std::filesystem::remove(file);
    const Status read = read_all();
    EXPECT_FALSE(read.has_value()) << file;
    if (!read) {
      EXPECT_EQ(read.error().code, Code::Protocol) << read.error().message;
    }
    std::filesystem::remove_all(path);
    std::filesystem::rename(kept, path);
  }
}
INSTANTIATE_TEST_SUITE_P(Each, Damage, ::testing::Values(".sst"));

TEST_F(JournalTest, ATornEndOfTheLogLosesOnlyTheEnd) {
  fill();
  for (const std::string& log : files(".log")) {
    std::filesystem::resize_file(log, std::filesystem::file_size(log) - 3);
  }
  const auto journal = open(Journal::Make::Never);
  ASSERT_NE(journal, nullptr);
  EXPECT_TRUE(journal->get(fmt_key(0))->has_value());
}

TEST_F(JournalTest, FlippedBitsInTheMiddleOfTheLogAreNoticed) {
  fill();
  ASSERT_FALSE(files(".log").empty());
  const std::string log = files(".log").front();
  const auto middle = static_cast<std::streamoff>(std::filesystem::file_size(log) / 2);
  {
    std::fstream bytes(log, std::ios::in | std::ios::out | std::ios::binary);
    bytes.seekg(middle);
    const int byte = bytes.get();
    bytes.seekp(middle);
    bytes.put(static_cast<char>(byte ^ 0x55));
  }
  const auto opened = Journal::open(path, Journal::Make::Never);
  ASSERT_FALSE(opened.has_value());
  EXPECT_EQ(opened.error().code, Code::Protocol) << opened.error().message;
}

TEST_F(JournalTest, FilesThatSayWhichFilesThereAreAreMissed) {
  fill();
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.path().filename().string().starts_with("MANIFEST")) {
      std::filesystem::resize_file(entry.path(), 10);
    }
  }
  const auto opened = Journal::open(path, Journal::Make::Never);
  ASSERT_FALSE(opened.has_value());
  EXPECT_EQ(opened.error().code, Code::Protocol) << opened.error().message;
}

}  // namespace
}  // namespace drover::job
