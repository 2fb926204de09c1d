// SPDX-License-Identifier: Apache-2.0
#include "job/record_store.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

namespace drover::job {
namespace {

class MapJournal final : public Journal {
 public:
  Status write(const Batch& batch, Sync sync) override {
    if (fails) return fail(Code::Io, "full");
    for (const Batch::Change& change : batch.changes()) {
      if (change.value) {
        map[change.key] = *change.value;
      } else {
        map.erase(change.key);
      }
    }
    synced = synced || sync == Sync::Yes;
    return {};
  }
  Result<std::optional<std::string>> get(std::string_view /*key*/) override { return std::nullopt; }
  Status scan(std::string_view /*prefix*/, const Visitor& /*visitor*/) override { return {}; }

  std::map<std::string, std::string> map;
  bool synced = false;
  bool fails = false;
};

class RecordStoreTest : public testing::Test {
 protected:
  [[nodiscard]] std::string stored(std::size_t disk, mirror::GroupIndex group) const {
    const auto found = journal_.map.find(record_key(disk, group));
    return found == journal_.map.end() ? "none" : found->second;
  }
  MapJournal journal_;
  RecordStore store_{journal_};
};

TEST_F(RecordStoreTest, AnOlderRecordReplacesNoNewerOne) {
  ASSERT_TRUE(store_.put(0, {7, "newer", 2}));
  ASSERT_TRUE(
      store_.write(std::vector<RecordStore::One>{{0, {7, "older", 1}}, {0, {8, "another", 1}}}, {},
                   Journal::Sync::No));
  EXPECT_EQ(stored(0, 7), "newer");
  EXPECT_EQ(stored(0, 8), "another");
  ASSERT_TRUE(
      store_.write(std::vector<RecordStore::One>{{0, {7, "newest", 3}}}, {}, Journal::Sync::No));
  EXPECT_EQ(stored(0, 7), "newest");
}

TEST_F(RecordStoreTest, DisksCountOnTheirOwn) {
  ASSERT_TRUE(store_.put(0, {7, "of the first", 5}));
  ASSERT_TRUE(store_.put(1, {7, "of the second", 1}));
  EXPECT_EQ(stored(1, 7), "of the second");
}

// Who has taken a record does not get it again: a pass after that would not be a whole one.
TEST_F(RecordStoreTest, NothingIsStoredAfterAFailure) {
  journal_.fails = true;
  EXPECT_FALSE(store_.put(0, {7, "lost", 2}));
  journal_.fails = false;
  EXPECT_FALSE(store_.put(0, {8, "later", 3}));
  EXPECT_FALSE(store_.write({}, {}, Journal::Sync::Yes));
  EXPECT_FALSE(store_.write(std::vector<RecordStore::One>{{0, {9, "later", 4}}}, {}, Journal::Sync::Yes));
  EXPECT_EQ(journal_.get(record_key(0, 8)).value(), std::nullopt);
  EXPECT_EQ(journal_.get(record_key(0, 9)).value(), std::nullopt);
}

TEST_F(RecordStoreTest, SyncsAlsoWhenAllOfItIsThereInANewerForm) {
  ASSERT_TRUE(store_.put(0, {7, "newer", 2}));
  EXPECT_FALSE(journal_.synced);
  Journal::Batch also;
  also.put("targets", "t");
  ASSERT_TRUE(store_.write(std::vector<RecordStore::One>{{0, {7, "older", 1}}}, std::move(also),
                           Journal::Sync::Yes));
  EXPECT_TRUE(journal_.synced);
  EXPECT_EQ(journal_.map.at("targets"), "t");
  EXPECT_EQ(stored(0, 7), "newer");
}

TEST(RecordKey, IsReadStrictly) {
  const auto place = parse_record_key(record_key(3, 0xabc));
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(*place, (std::pair<std::size_t, mirror::GroupIndex>(3, 0xabc)));
  for (const char* wrong : {"", "chunks/", "chunks//1", "chunks/1", "chunks/1/", "chunks/1/x",
                            "chunks/1/1 ", "other/1/1"}) {
    EXPECT_FALSE(parse_record_key(wrong).has_value()) << wrong;
  }
}

}  // namespace
}  // namespace drover::job
