// SPDX-License-Identifier: Apache-2.0
//
// The arbiter's rules about blocks, stable storage and records, one by one. That they hold together
// under every interleaving is the simulation's business (tests/sim).
#include "mirror/arbiter.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "mirror/frame.h"

namespace drover::mirror {
namespace {

constexpr Length kChunk = 1_MiB;

Arbiter::Options disk_of(std::uint64_t chunks) {
  Arbiter::Options options;
  options.disk_size = kChunk * chunks;
  options.lanes = 1;
  return options;
}
Extent block(ChunkIndex chunk, std::uint64_t number, std::uint64_t count = 1) {
  return {Offset(chunk * kChunk.bytes() + number * kBlock.bytes()), kBlock * count};
}

class ArbiterRules : public testing::Test {
 protected:
  void copy_all() {
    while (const auto ticket = arbiter_.start_copy(Instant())) {
      ASSERT_TRUE(arbiter_.copy_read(ticket->id, actions_));
      arbiter_.copy_acked(ticket->id);
    }
  }
  void write(Extent extent) {
    actions_.clear();
    arbiter_.guest_write(++writes_, WriteKind::Data, extent, Instant(), actions_);
  }
  // The piece that the last write was forwarded as.
  PieceId forwarded() {
    for (const Action& action : actions_) {
      if (action.kind == Action::Kind::Forward) return action.piece;
    }
    return 0;
  }
  void outage(const std::function<void()>& during) {
    arbiter_.lane_lost(0, actions_);
    during();
    arbiter_.lane_up(0);
  }
  void flush() { arbiter_.flush_done(arbiter_.flush_begin()); }
  std::string record(GroupIndex group = 0) { return arbiter_.take_record(group).bytes; }

  Arbiter arbiter_{disk_of(8)};
  Actions actions_;
  WriteId writes_ = 0;
};

TEST_F(ArbiterRules, AnOutageCostsTheBlocksWrittenDuringIt) {
  copy_all();
  outage([this] {
    write({Offset(3 * kChunk.bytes() + 100), Length(8192)});  // blocks 0 to 2
    write(block(3, 200));
    write(block(5, 7));
  });
  const auto summary = arbiter_.summary();
  EXPECT_EQ(summary.pending, 2U);
  EXPECT_EQ(summary.left, kBlock * 5);
  EXPECT_EQ(summary.copied + summary.left, arbiter_.options().disk_size);
  const auto ticket = arbiter_.start_copy(Instant());
  ASSERT_TRUE(ticket);
  EXPECT_EQ(ticket->extent, block(3, 0, 201));
  EXPECT_EQ(ticket->blocks, BlockMask::range(0, 3) | BlockMask::range(200, 201));
  EXPECT_EQ(ticket->wanted, kBlock * 4);
  EXPECT_FALSE(ticket->fresh);
  EXPECT_EQ(arbiter_.summary().left, kBlock * 5) << "what is being copied is left";
}

TEST_F(ArbiterRules, AChunkNeverCopiedStaysWhole) {
  outage([this] { write(block(2, 9)); });
  EXPECT_EQ(arbiter_.summary().left, arbiter_.options().disk_size);
}

TEST_F(ArbiterRules, ALostTicketOwesItsBlocksAndWhatCameMeanwhile) {
  copy_all();
  arbiter_.mark_pending(block(1, 4));
  const auto ticket = arbiter_.start_copy(Instant());
  ASSERT_TRUE(ticket && arbiter_.copy_read(ticket->id, actions_));
  arbiter_.mark_pending(block(1, 9));
  outage([] {});
  EXPECT_EQ(arbiter_.summary().left, kBlock * 2);
  const auto again = arbiter_.start_copy(Instant());
  ASSERT_TRUE(again);
  EXPECT_EQ(again->extent, block(1, 4, 6));
  EXPECT_EQ(again->blocks, BlockMask::range(0, 1) | BlockMask::range(5, 6));
}

TEST_F(ArbiterRules, OnlyTheBlocksToRedoArePendingAfterACopy) {
  const auto ticket = arbiter_.start_copy(Instant());
  ASSERT_TRUE(ticket && arbiter_.copy_read(ticket->id, actions_));
  arbiter_.guest_write(++writes_, WriteKind::Discard, block(0, 30, 2), Instant(), actions_);
  arbiter_.copy_acked(ticket->id);
  copy_all();
  EXPECT_TRUE(arbiter_.synchronised());
  arbiter_.mark_pending(block(0, 0));
  EXPECT_EQ(arbiter_.summary().left, kBlock);
}

TEST_F(ArbiterRules, OfAnOfferOnlyWhatWasNotFoundIsPending) {
  const auto ticket = arbiter_.start_copy(Instant());
  ASSERT_TRUE(ticket && ticket->fresh && arbiter_.copy_read(ticket->id, actions_));
  write(block(0, 5));
  EXPECT_NE(forwarded(), 0U) << "it goes behind the frame, whatever comes of that";
  arbiter_.guest_write(++writes_, WriteKind::Discard, block(0, 30), Instant(), actions_);
  EXPECT_FALSE(arbiter_.copy_differs(ticket->id, BlockMask::range(4, 8), Instant()).has_value());
  arbiter_.copy_acked(ticket->id);  // of a ticket that has ended: nothing
  EXPECT_EQ(arbiter_.summary().left, kChunk * 7 + kBlock * 5);
  EXPECT_TRUE(arbiter_.was_sent(0));
  // As the record says, too.
  Arbiter restored(disk_of(8));
  ASSERT_TRUE(restored.restore(0, record(), false).has_value());
  EXPECT_EQ(restored.summary().left, kChunk * 7 + kBlock * 5);
  // Its next copy is of these blocks, and can't be offered.
  copy_all();
  EXPECT_FALSE(arbiter_.wants_copy());
}

TEST_F(ArbiterRules, AWriteGivenUpDuringAnOfferIsCopiedWhereNothingWasFound) {
  const auto ticket = arbiter_.start_copy(Instant());
  ASSERT_TRUE(ticket && arbiter_.copy_read(ticket->id, actions_));
  write(block(0, 6));
  ASSERT_NE(forwarded(), 0U);
  arbiter_.shed(actions_);
  (void)arbiter_.copy_differs(ticket->id, BlockMask::range(5, 6), Instant());
  EXPECT_EQ(arbiter_.summary().left, kChunk * 7 + kBlock * 2);
}

TEST_F(ArbiterRules, AnOfferOfWhichNothingWasFoundIsCopiedWhole) {
  const auto ticket = arbiter_.start_copy(Instant());
  ASSERT_TRUE(ticket && arbiter_.copy_read(ticket->id, actions_));
  (void)arbiter_.copy_differs(ticket->id, BlockMask::all(), Instant());
  EXPECT_EQ(arbiter_.summary().left, kChunk * 8);
  while (const auto next = arbiter_.start_copy(Instant())) {
    EXPECT_EQ(next->fresh, next->chunk != 0) << "it is offered once";
    ASSERT_TRUE(arbiter_.copy_read(next->id, actions_));
    arbiter_.copy_acked(next->id);
  }
}

TEST_F(ArbiterRules, WritesToOtherBlocksOfAPendingChunkAreForwarded) {
  copy_all();
  arbiter_.mark_pending(block(0, 10));
  write(block(0, 10));
  EXPECT_EQ(forwarded(), 0U);
  write(block(0, 11));
  EXPECT_NE(forwarded(), 0U);
  EXPECT_EQ(arbiter_.summary().left, kBlock);
}

TEST_F(ArbiterRules, BeyondTheLimitOfMasksChunksArePendingWhole) {
  auto options = disk_of(8);
  options.max_masks = 2;
  Arbiter arbiter(options);
  while (const auto ticket = arbiter.start_copy(Instant())) {
    ASSERT_TRUE(arbiter.copy_read(ticket->id, actions_));
    arbiter.copy_acked(ticket->id);
  }
  for (ChunkIndex chunk = 0; chunk < 3; ++chunk) arbiter.mark_pending(block(chunk, 1));
  EXPECT_EQ(arbiter.summary().left, kBlock * 2 + kChunk);
}

TEST_F(ArbiterRules, TheLastBlockOfADiskMayBeShort) {
  auto options = disk_of(2);
  options.disk_size -= Length(kChunk.bytes() - 4096 - 512);
  Arbiter arbiter(options);
  EXPECT_EQ(arbiter.summary().left, options.disk_size);
  while (const auto ticket = arbiter.start_copy(Instant())) {
    ASSERT_TRUE(arbiter.copy_read(ticket->id, actions_));
    arbiter.copy_acked(ticket->id);
  }
  EXPECT_EQ(arbiter.summary().left, Length());
  arbiter.mark_pending({Offset(options.disk_size.bytes() - 1), Length(1)});
  EXPECT_EQ(arbiter.summary().left, Length(512));
  const auto ticket = arbiter.start_copy(Instant());
  ASSERT_TRUE(ticket);
  EXPECT_EQ(ticket->extent, (Extent{Offset(kChunk.bytes() + 4096), Length(512)}));
  EXPECT_EQ(ticket->blocks, BlockMask::all());
}

// --- stable storage ---

TEST_F(ArbiterRules, WhatWasNotFlushedIsLostWithTheTarget) {
  copy_all();
  EXPECT_EQ(arbiter_.unflushed(), arbiter_.options().disk_size);
  flush();
  EXPECT_EQ(arbiter_.unflushed(), Length());
  write(block(4, 1));
  arbiter_.piece_acked(forwarded(), actions_);
  EXPECT_EQ(arbiter_.unflushed(), kBlock);
  arbiter_.target_lost_unflushed();
  EXPECT_EQ(arbiter_.summary().left, kBlock);
}

TEST_F(ArbiterRules, AFlushCoversWhatWasAcknowledgedBeforeItBegan) {
  copy_all();
  const FlushId flush = arbiter_.flush_begin();
  write(block(0, 1));
  arbiter_.piece_acked(forwarded(), actions_);
  arbiter_.flush_done(flush);
  arbiter_.target_lost_unflushed();
  EXPECT_EQ(arbiter_.summary().left, kBlock);
}

TEST_F(ArbiterRules, AFlushThatFailedOrWasReplacedCoversNothing) {
  copy_all();
  const FlushId first = arbiter_.flush_begin();
  const FlushId second = arbiter_.flush_begin();
  arbiter_.flush_done(first);
  arbiter_.flush_failed(second);
  arbiter_.flush_done(second);
  EXPECT_EQ(arbiter_.unflushed(), arbiter_.options().disk_size);
  arbiter_.target_lost_unflushed();
  EXPECT_EQ(arbiter_.summary().left, arbiter_.options().disk_size);
}

TEST_F(ArbiterRules, AFenceWaitsForWhatArrivedBeforeIt) {
  copy_all();
  write(block(0, 1));
  const PieceId before = forwarded();
  const FenceId fence = arbiter_.fence_begin();
  write(block(1, 1));
  EXPECT_FALSE(arbiter_.fence_passed(fence));
  arbiter_.piece_acked(before, actions_);
  EXPECT_TRUE(arbiter_.fence_passed(fence));
}

// --- records ---

TEST_F(ArbiterRules, ARecordBringsEverythingBack) {
  copy_all();
  flush();
  arbiter_.mark_pending(block(1, 3));
  write(block(2, 4));  // stays in flight
  write(block(3, 5));
  arbiter_.piece_acked(forwarded(), actions_);
  const std::string bytes = record();
  for (const bool lost : {false, true}) {
    Arbiter restored(disk_of(8));
    ASSERT_TRUE(restored.restore(0, bytes, lost));
    EXPECT_EQ(restored.summary().left, kBlock * (lost ? 3 : 2));
    EXPECT_EQ(restored.is_copied(3), !lost);
    EXPECT_EQ(restored.take_records(0, 1).records.size(), lost ? 1U : 0U)
        << "what was lost must be recorded before the target's new instance is";
    const auto ticket = restored.start_copy(Instant());
    ASSERT_TRUE(ticket);
    EXPECT_FALSE(ticket->fresh);
    EXPECT_FALSE(ticket->touches);
  }
}

TEST_F(ArbiterRules, ADamagedRecordMakesItsGroupPending) {
  copy_all();
  const std::string bytes = record();
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string damaged = bytes;
    damaged[i] ^= 0x10;
    Arbiter restored(disk_of(8));
    EXPECT_FALSE(restored.restore(0, damaged, false));
    EXPECT_EQ(restored.summary().left, arbiter_.options().disk_size);
    EXPECT_FALSE(restored.start_copy(Instant())->fresh);
  }
  EXPECT_FALSE(Arbiter(disk_of(8)).restore(0, bytes.substr(0, bytes.size() - 1), false));
  EXPECT_FALSE(Arbiter(disk_of(8)).restore(0, "", false));
  EXPECT_FALSE(Arbiter(disk_of(9)).restore(0, bytes, false)) << "another disk's";
}

TEST(ArbiterRecords, ASpanIsTouchedBeforeTheFirstFrameAndOnce) {
  Arbiter arbiter(disk_of(2 * kGroupChunks));
  Actions actions;
  for (int i = 0; i < 64; ++i) {
    const auto ticket = arbiter.start_copy(Instant());
    ASSERT_TRUE(ticket);
    EXPECT_EQ(ticket->touches.has_value(), i == 0);
  }
  // What is recorded now: these may have been sent, the others were not.
  Arbiter restored(disk_of(2 * kGroupChunks));
  ASSERT_TRUE(restored.restore(0, arbiter.take_record(0).bytes, false));
  EXPECT_FALSE(restored.start_copy(Instant())->fresh);
  for (int i = 1; i < 64; ++i) EXPECT_FALSE(restored.start_copy(Instant())->fresh);
  EXPECT_TRUE(restored.start_copy(Instant())->fresh);
  EXPECT_EQ(arbiter.start_copy(Instant())->touches, GroupIndex{0});
}

TEST(ArbiterRecords, WhatIsPutOffIsNotTouchedWithItsSpan) {
  Arbiter arbiter(disk_of(128));
  Actions actions;
  arbiter.guest_write(1, WriteKind::Data, block(3, 0), Instant(), actions);
  std::vector<CopyTicket> tickets;
  for (int i = 0; i < 63; ++i) {
    tickets.push_back(*arbiter.start_copy(Instant()));
    EXPECT_EQ(tickets.back().touches.has_value(), i == 0);
    EXPECT_NE(tickets.back().chunk, 3U);
    ASSERT_TRUE(arbiter.copy_read(tickets.back().id, actions));
    arbiter.copy_acked(tickets.back().id);
  }
  Arbiter restored(disk_of(128));
  ASSERT_TRUE(restored.restore(0, arbiter.take_record(0).bytes, false));
  const auto first = restored.start_copy(Instant());
  EXPECT_EQ(first->chunk, 3U);
  EXPECT_TRUE(first->fresh) << "it can't have been sent";
  EXPECT_TRUE(first->touches) << "from now on it can";
  // In its own turn it is touched by itself.
  for (int i = 0; i < 64; ++i) (void)arbiter.start_copy(Instant());
  const auto last = arbiter.start_copy(Instant());
  EXPECT_EQ(last->chunk, 3U);
  EXPECT_TRUE(last->touches);
}

TEST(ArbiterRecords, AWriteToAHoleTouchesToo) {
  Arbiter arbiter(disk_of(2 * kGroupChunks));
  Actions actions;
  const Extent all{Offset(0), kChunk * (2 * kGroupChunks)};
  arbiter.scan_begin(all);
  arbiter.scan_hole(all);
  EXPECT_TRUE(arbiter.synchronised());
  arbiter.guest_write(1, WriteKind::Data, block(kGroupChunks + 5, 1), Instant(), actions);
  ASSERT_GE(actions.size(), 2U);
  EXPECT_EQ(actions[0].kind, Action::Kind::Touch);
  EXPECT_EQ(actions[0].group, 1U);
  EXPECT_EQ(actions[1].kind, Action::Kind::Forward);
}

TEST(ArbiterRecords, OnlyGroupsThatChangedAreTaken) {
  Arbiter arbiter(disk_of(3 * kGroupChunks));
  EXPECT_TRUE(arbiter.take_records(0, 10).records.empty()) << "nothing was sent to any";
  Actions actions;
  while (const auto ticket = arbiter.start_copy(Instant())) {
    ASSERT_TRUE(arbiter.copy_read(ticket->id, actions));
    arbiter.copy_acked(ticket->id);
  }
  auto taken = arbiter.take_records(0, 2);
  ASSERT_EQ(taken.records.size(), 2U);
  EXPECT_EQ(taken.next, GroupIndex{2});
  taken = arbiter.take_records(*taken.next, 2);
  ASSERT_EQ(taken.records.size(), 1U);
  EXPECT_FALSE(taken.next);
  EXPECT_TRUE(arbiter.take_records(0, 10).records.empty());
  arbiter.mark_pending(block(kGroupChunks, 0));
  taken = arbiter.take_records(0, 10);
  ASSERT_EQ(taken.records.size(), 1U);
  EXPECT_EQ(taken.records[0].group, 1U);
  EXPECT_LT(taken.records[0].bytes.size(), 64U) << "chunks that are alike take a few bytes";
}

TEST(ArbiterRecords, TheLargestRecordFitsItsLimit) {
  constexpr GroupPlace kPlace{0, kChunk * kGroupChunks, kChunk};
  std::vector<ChunkRecord> chunks(kGroupChunks);
  BlockMask odd;
  for (std::size_t i = 1; i < BlockMask::kBits; i += 2) odd.set(i);
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    chunks[i] = {true, odd, i % 2 == 0 ? odd : BlockMask::range(3, 7)};
  }
  const std::string bytes = encode_group(kPlace, chunks);
  EXPECT_LE(bytes.size(), kMaxGroupRecord);
  const auto decoded = decode_group(kPlace, bytes);
  ASSERT_TRUE(decoded);
  EXPECT_EQ(*decoded, chunks);
}

// Not in seconds: were any of this done chunk by chunk, it would be noticed.
TEST(ArbiterSize, A64TiBDiskIsCheap) {
  Arbiter arbiter(disk_of(std::uint64_t{64} << 20));
  EXPECT_EQ(arbiter.groups(), 16384U);
  arbiter.mark_pending({Offset(0), arbiter.options().disk_size});
  EXPECT_TRUE(arbiter.take_records(0, 100).records.empty());
}

// --- comparing ---

TEST_F(ArbiterRules, WhereNothingIsKnownChunksAreComparedAndOnlyThoseThatDifferAreSent) {
  arbiter_.restore_nothing();
  for (ChunkIndex chunk = 0; chunk < 8; ++chunk) {
    const auto ticket = arbiter_.start_copy(Instant());
    ASSERT_TRUE(ticket && ticket->compare && ticket->chunk == chunk);
    ASSERT_TRUE(arbiter_.copy_read(ticket->id, actions_));
    if (chunk == 5) {
      EXPECT_FALSE(arbiter_.copy_differs(ticket->id, BlockMask::range(4, 6), Instant()))
          << "no news where nothing was known";
    } else {
      arbiter_.copy_acked(ticket->id);
    }
  }
  const auto sent = arbiter_.start_copy(Instant());
  ASSERT_TRUE(sent);
  EXPECT_EQ(sent->chunk, 5U);
  EXPECT_EQ(sent->extent, block(5, 4, 2));
  EXPECT_FALSE(sent->compare || sent->fresh);
  ASSERT_TRUE(arbiter_.copy_read(sent->id, actions_));
  arbiter_.copy_acked(sent->id);
  EXPECT_TRUE(arbiter_.synchronised());
}

TEST_F(ArbiterRules, WhatIsEmptyOnTheTargetIsNotCompared) {
  arbiter_.restore_nothing();
  arbiter_.restore_hole({Offset(kChunk.bytes() - 1), kChunk * 4 + Length(2)});  // 1 to 4 whole
  arbiter_.scan_begin({Offset(0), arbiter_.options().disk_size});
  arbiter_.scan_hole({Offset(3 * kChunk.bytes()), kChunk * 5});
  std::vector<ChunkIndex> compared;
  std::vector<ChunkIndex> fresh;
  while (const auto ticket = arbiter_.start_copy(Instant())) {
    (ticket->compare ? compared : fresh).push_back(ticket->chunk);
    EXPECT_EQ(ticket->fresh, !ticket->compare);
    ASSERT_TRUE(arbiter_.copy_read(ticket->id, actions_));
    arbiter_.copy_acked(ticket->id);
  }
  EXPECT_EQ(compared, (std::vector<ChunkIndex>{0, 5, 6, 7})) << "there may be anything";
  EXPECT_EQ(fresh, (std::vector<ChunkIndex>{1, 2})) << "3 and 4 are holes on both sides";
}

TEST_F(ArbiterRules, AComparisonThatIsLostIsMadeAgain) {
  arbiter_.restore_nothing();
  const auto first = arbiter_.start_copy(Instant());
  ASSERT_TRUE(first && arbiter_.copy_read(first->id, actions_));
  outage([] {});
  EXPECT_FALSE(arbiter_.copy_differs(first->id, BlockMask::all(), Instant()))
      << "its answer is of the old connections";
  std::size_t compared = 0;
  while (const auto ticket = arbiter_.start_copy(Instant())) {
    EXPECT_TRUE(ticket->compare);
    ASSERT_TRUE(arbiter_.copy_read(ticket->id, actions_));
    arbiter_.copy_acked(ticket->id);
    ++compared;
  }
  EXPECT_EQ(compared, 8U);
}

class Verification : public ArbiterRules {
 protected:
  // Compares what is to be compared now; `differs` says which chunks do.
  std::vector<ChunkIndex> round(const std::function<bool(ChunkIndex)>& differs) {
    std::vector<ChunkIndex> damaged;
    while (const auto ticket = arbiter_.start_copy(now_)) {
      EXPECT_TRUE(arbiter_.copy_read(ticket->id, actions_));
      if (ticket->compare && differs(ticket->chunk)) {
        if (const auto found = arbiter_.copy_differs(ticket->id, BlockMask::range(1, 3), now_)) {
          EXPECT_EQ(found->again, !sent_.empty());
          damaged.push_back(found->extent.offset.bytes() / kChunk.bytes());
        }
      } else {
        arbiter_.copy_acked(ticket->id);
        if (!ticket->compare) sent_.push_back(ticket->chunk);
      }
    }
    return damaged;
  }
  void pause() {
    now_ += arbiter_.options().verify_pause;
    arbiter_.tick(now_, actions_);
  }
  // Everything copied, flushed, and to be verified.
  void verify() {
    copy_all();
    arbiter_.verify();
    flush();
  }
  static bool third(ChunkIndex chunk) { return chunk == 3; }
  static bool none(ChunkIndex) { return false; }

  Instant now_{std::chrono::seconds(100)};
  std::vector<ChunkIndex> sent_;
};

TEST_F(Verification, AChunkThatDiffersTwiceIsReportedSentAgainAndLookedAtAgain) {
  verify();
  EXPECT_EQ(arbiter_.summary().to_verify, 8U);
  EXPECT_TRUE(round(third).empty());
  EXPECT_EQ(arbiter_.summary().to_verify, 1U);
  EXPECT_EQ(arbiter_.summary().pending, 0U);
  EXPECT_EQ(arbiter_.next_deadline(), now_ + arbiter_.options().verify_pause);
  pause();
  bool once = true;
  EXPECT_EQ(round([&](ChunkIndex) { return std::exchange(once, false); }), std::vector<ChunkIndex>{3});
  pause();
  EXPECT_EQ(arbiter_.start_copy(now_), std::nullopt) << "what was sent again is not flushed yet";
  flush();
  pause();
  EXPECT_TRUE(round(none).empty());
  EXPECT_EQ(sent_, std::vector<ChunkIndex>{3});
  EXPECT_EQ(arbiter_.summary().to_verify, 0U);
  EXPECT_EQ(arbiter_.summary().damaged, 1U);
  EXPECT_EQ(arbiter_.summary().unverified, 0U);
}

TEST_F(Verification, WhatIsDamagedAgainAfterItWasSentAgainIsSaidToBe) {
  verify();
  for (int looks = 0; looks < 2; ++looks) {
    EXPECT_TRUE(round(third).empty());
    pause();
    EXPECT_EQ(round(third), std::vector<ChunkIndex>{3});
    flush();
    pause();
  }
}

// It was on the source already when that was read, and arrives after the answer.
TEST_F(Verification, AWriteThatArrivesExplainsADifference) {
  verify();
  EXPECT_TRUE(round(third).empty());
  write(block(3, 1, 2));
  arbiter_.piece_acked(forwarded(), actions_);
  pause();
  EXPECT_TRUE(round(third).empty()) << "that is the first time again";
  pause();
  EXPECT_TRUE(round(none).empty());
  EXPECT_EQ(arbiter_.summary().to_verify, 0U);
  EXPECT_EQ(arbiter_.summary().damaged, 0U);
  EXPECT_TRUE(sent_.empty());
}

TEST_F(Verification, AChunkThatIsWrittenAllTheTimeIsSentOnceMoreAndCounted) {
  verify();
  for (unsigned i = 0; i < arbiter_.options().verify_tries; ++i) {
    EXPECT_TRUE(round(third).empty());
    write(block(3, 1, 2));
    arbiter_.piece_acked(forwarded(), actions_);
    pause();
  }
  EXPECT_TRUE(round(none).empty());
  EXPECT_EQ(sent_, std::vector<ChunkIndex>{3});
  EXPECT_EQ(arbiter_.summary().to_verify, 0U);
  EXPECT_EQ(arbiter_.summary().unverified, 1U);
}

TEST_F(Verification, StopsInStrictModeAndGoesOnAfterIt) {
  verify();
  ASSERT_TRUE(arbiter_.enter_strict());
  EXPECT_FALSE(arbiter_.start_copy(now_));
  arbiter_.leave_strict(actions_);
  EXPECT_TRUE(round(none).empty());
  EXPECT_EQ(arbiter_.summary().to_verify, 0U);
}

TEST_F(Verification, BeginsWhenWhatTheTargetHasIsOnItsStableStorage) {
  copy_all();
  const FlushId before = arbiter_.flush_begin();
  write(block(1, 0));
  arbiter_.piece_acked(forwarded(), actions_);
  arbiter_.verify();
  EXPECT_FALSE(arbiter_.wants_copy());
  EXPECT_FALSE(arbiter_.start_copy(now_));
  arbiter_.flush_done(before);
  EXPECT_FALSE(arbiter_.start_copy(now_)) << "that flush had begun before";
  arbiter_.flush_failed(arbiter_.flush_begin());
  EXPECT_FALSE(arbiter_.start_copy(now_));
  EXPECT_EQ(arbiter_.summary().to_verify, 8U);
  flush();
  EXPECT_TRUE(arbiter_.wants_copy());
  EXPECT_TRUE(round(none).empty());
  EXPECT_EQ(arbiter_.summary().to_verify, 0U);
  arbiter_.verify();
  EXPECT_TRUE(arbiter_.start_copy(now_)) << "nothing is unflushed";
}

TEST_F(Verification, BeginsWithTheFlushThatIsUnderWayIfThatCoversAll) {
  copy_all();
  const FlushId under_way = arbiter_.flush_begin();
  arbiter_.verify();
  EXPECT_FALSE(arbiter_.start_copy(now_));
  EXPECT_EQ(arbiter_.unflushed(), Length()) << "so that nobody begins another";
  arbiter_.flush_done(under_way);
  EXPECT_TRUE(arbiter_.start_copy(now_));
}

TEST_F(Verification, HolesAreNotRead) {
  arbiter_.scan_begin({Offset(0), arbiter_.options().disk_size});
  arbiter_.scan_hole({Offset(0), kChunk * 6});
  verify();
  EXPECT_EQ(arbiter_.summary().to_verify, 2U);
  const auto ticket = arbiter_.start_copy(now_);
  ASSERT_TRUE(ticket && ticket->compare);
  EXPECT_EQ(ticket->chunk, 6U);
}

TEST_F(Verification, AChunkThatIsNeverCopiedDoesNotHoldItUpForEver) {
  verify();
  const auto keep_pending = [&] {
    actions_.clear();
    arbiter_.guest_write(++writes_, WriteKind::Discard, block(3, 7), now_, actions_);
  };
  keep_pending();
  std::optional<CopyTicket> copy;
  for (unsigned turn = 1; turn <= arbiter_.options().verify_tries; ++turn) {
    EXPECT_EQ(arbiter_.summary().unverified, 0U) << turn;
    EXPECT_GT(arbiter_.summary().to_verify, 0U) << turn;
    // In its turn it is Pending or being copied, and when that is done it is discarded again.
    copy.reset();
    while (const auto ticket = arbiter_.start_copy(now_)) {
      ASSERT_TRUE(arbiter_.copy_read(ticket->id, actions_));
      if (ticket->compare) {
        arbiter_.copy_acked(ticket->id);
      } else {
        copy = ticket;
      }
    }
    ASSERT_TRUE(copy);
    EXPECT_EQ(copy->chunk, 3U);
    arbiter_.copy_acked(copy->id);
    keep_pending();
    pause();
  }
  EXPECT_EQ(arbiter_.summary().to_verify, 0U);
  EXPECT_EQ(arbiter_.summary().unverified, 1U);
  EXPECT_EQ(copy->extent, block(3, 0, kChunk / kBlock))
      << "nothing of it was seen, so it is all sent once more";
}

TEST_F(Verification, BlocksMayBeSeenEqualOneAfterTheOther) {
  verify();
  BlockMask differ = BlockMask::range(1, 3);
  const auto look = [&] {
    while (const auto ticket = arbiter_.start_copy(now_)) {
      ASSERT_TRUE(arbiter_.copy_read(ticket->id, actions_));
      if (ticket->chunk != 3) {
        arbiter_.copy_acked(ticket->id);
        continue;
      }
      write(block(3, differ.first(), 2));  // while it is compared
      arbiter_.piece_acked(forwarded(), actions_);
      EXPECT_FALSE(arbiter_.copy_differs(ticket->id, differ, now_));
    }
  };
  look();
  EXPECT_EQ(arbiter_.summary().to_verify, 1U);
  differ = BlockMask::range(7, 9);
  pause();
  look();
  EXPECT_EQ(arbiter_.summary().to_verify, 0U) << "others differed, and those were equal now";
  EXPECT_EQ(arbiter_.summary().unverified, 0U);
  EXPECT_EQ(arbiter_.summary().damaged, 0U);
}

TEST_F(Verification, OnlySoManyChunksAreInDoubtAtOnce) {
  Arbiter::Options options = disk_of(100);
  options.max_doubts = 3;
  Arbiter arbiter(options);
  const auto all_differ = [&] {
    std::size_t compared = 0;
    while (const auto ticket = arbiter.start_copy(now_)) {
      EXPECT_TRUE(arbiter.copy_read(ticket->id, actions_));
      if (ticket->compare) {
        (void)arbiter.copy_differs(ticket->id, BlockMask::range(0, 1), now_);
        ++compared;
      } else {
        arbiter.copy_acked(ticket->id);
      }
    }
    return compared;
  };
  EXPECT_EQ(all_differ(), 0U);
  arbiter.flush_done(arbiter.flush_begin());
  arbiter.verify();
  EXPECT_EQ(all_differ(), 3U);
  std::size_t rounds = 0;
  while (arbiter.summary().to_verify > 0) {
    ASSERT_LT(++rounds, 1000U);
    now_ += options.verify_pause;
    arbiter.tick(now_, actions_);
    EXPECT_LE(all_differ(), 6U);
    arbiter.flush_done(arbiter.flush_begin());
  }
  EXPECT_EQ(arbiter.summary().unverified, 100U);
}

TEST_F(Verification, BegunAnewItForgetsWhatIsUnderWay) {
  verify();
  const auto old = arbiter_.start_copy(now_);
  ASSERT_TRUE(old && arbiter_.copy_read(old->id, actions_));
  arbiter_.verify();
  EXPECT_EQ(arbiter_.summary().to_verify, 8U);
  EXPECT_FALSE(arbiter_.copy_differs(old->id, BlockMask::range(0, 1), now_));
  EXPECT_EQ(arbiter_.summary().to_verify, 8U);
  EXPECT_TRUE(round(none).empty());
  EXPECT_EQ(arbiter_.summary().to_verify, 0U);
}

// A guest that writes little each time fills the buffers before it fills the window.
TEST_F(ArbiterRules, InStrictModeAWriteWaitsWhereBuffersAreScarce) {
  copy_all();
  ASSERT_TRUE(arbiter_.enter_strict());
  write(block(1, 0));
  EXPECT_EQ(arbiter_.summary().waiting, 0U);
  arbiter_.guest_write(++writes_, WriteKind::Data, block(1, 1), Instant(), actions_, true);
  EXPECT_EQ(arbiter_.summary().waiting, 1U);
  EXPECT_EQ(arbiter_.next_deadline(), Instant() + arbiter_.options().max_strict_wait);
  arbiter_.leave_strict(actions_);
  arbiter_.guest_write(++writes_, WriteKind::Data, block(1, 2), Instant(), actions_, true);
  EXPECT_EQ(arbiter_.summary().waiting, 0U) << "only there";
}

// --- size ---

constexpr std::uint64_t k64TiB = std::uint64_t{64} << 20;  // chunks

std::size_t allocated() { return ::mallinfo2().uordblks + ::mallinfo2().hblkhd; }

// A chunk in each group, as on a disk with a filesystem: its holes cost next to nothing, in time
// and in memory.
TEST_F(Verification, ASparse64TiBDiskIsCheap) {
  const std::size_t before = allocated();
  Arbiter::Options options = disk_of(k64TiB);
  options.lanes = 4;
  Arbiter arbiter(options);
  arbiter.scan_begin({Offset(0), options.disk_size});
  for (ChunkIndex chunk = 0; chunk < k64TiB; chunk += kGroupChunks) {
    arbiter.scan_hole({Offset((chunk + 1) * kChunk.bytes()), kChunk * (kGroupChunks - 1)});
  }
  const auto pass = [&](bool differ) {
    std::uint64_t tickets = 0;
    for (; const auto ticket = arbiter.start_copy(now_); ++tickets) {
      EXPECT_TRUE(arbiter.copy_read(ticket->id, actions_));
      if (ticket->compare && differ) {
        (void)arbiter.copy_differs(ticket->id, BlockMask::range(0, 1), now_);
      } else {
        arbiter.copy_acked(ticket->id);
      }
    }
    return tickets;
  };
  EXPECT_EQ(pass(false), k64TiB / kGroupChunks);
  arbiter.verify();
  arbiter.flush_done(arbiter.flush_begin());
  EXPECT_EQ(arbiter.summary().to_verify, k64TiB / kGroupChunks);
  EXPECT_EQ(pass(true), options.max_doubts);
  std::size_t most = allocated() - before;
  for (int i = 0; i < 4; ++i) {
    now_ += options.verify_pause;
    arbiter.tick(now_, actions_);
    (void)pass(true);
    (void)arbiter.take_records(0, 1000);
    most = std::max(most, allocated() - before);
  }
  RecordProperty("bytes", static_cast<int>(most));
  EXPECT_LT(most, std::size_t{48} << 20);
}

// --- hot last ---

class HotChunks : public ArbiterRules {
 protected:
  // Copies one chunk, at once.
  std::optional<ChunkIndex> copy_one() {
    const auto ticket = arbiter_.start_copy(Instant());
    if (!ticket) return std::nullopt;
    EXPECT_TRUE(arbiter_.copy_read(ticket->id, actions_));
    arbiter_.copy_acked(ticket->id);
    return ticket->chunk;
  }
  std::vector<ChunkIndex> copy_the_rest() {
    std::vector<ChunkIndex> order;
    while (const auto chunk = copy_one()) order.push_back(*chunk);
    return order;
  }
};

TEST_F(HotChunks, WhatTheGuestWritesBeforeItsCopyIsCopiedLast) {
  write(block(1, 7));
  write(block(4, 0));
  EXPECT_EQ(arbiter_.put_off(), 2U);
  EXPECT_EQ(copy_the_rest(), (std::vector<ChunkIndex>{0, 2, 3, 5, 6, 7, 1, 4}));
  EXPECT_EQ(arbiter_.put_off(), 0U);
}

TEST_F(HotChunks, AChunkThatAnOutageMadePendingByItsWritesIsPutOff) {
  copy_all();
  outage([this] { write(block(1, 7)); });
  arbiter_.mark_pending(block(5, 0));  // a bitmap's word: nobody knows how hot it is
  EXPECT_EQ(copy_the_rest(), (std::vector<ChunkIndex>{5, 1}));
}

TEST_F(HotChunks, ADiscardedChunkIsPutOff) {
  copy_all();
  arbiter_.mark_pending(block(5, 0));
  arbiter_.guest_write(++writes_, WriteKind::Discard, block(2, 0, 256), Instant(), actions_);
  EXPECT_EQ(copy_the_rest(), (std::vector<ChunkIndex>{5, 2}));
}

TEST_F(HotChunks, StrictModeTakesThemAsTheyCome) {
  write(block(0, 7));
  ASSERT_TRUE(arbiter_.enter_strict());
  EXPECT_EQ(copy_the_rest(), (std::vector<ChunkIndex>{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST_F(HotChunks, AHoleIsNoLongerPutOff) {
  arbiter_.scan_begin({Offset(0), kChunk * 8});
  copy_one();
  write(block(3, 0));  // the scan's answer is of before
  arbiter_.scan_begin({Offset(0), kChunk * 8});
  arbiter_.scan_hole({Offset(kChunk.bytes()), kChunk * 7});
  EXPECT_EQ(arbiter_.put_off(), 0U);
  EXPECT_EQ(arbiter_.summary().pending, 0U);
}

TEST_F(HotChunks, AreCopiedWhileOthersWaitForALane) {
  Arbiter::Options options = disk_of(8);
  options.lanes = 2;
  Arbiter arbiter(options);
  arbiter.guest_write(1, WriteKind::Data, block(1, 0), Instant(), actions_);
  for (int i = 0; i < 3; ++i) {  // 0, 2 and 3; 1 is put off
    ASSERT_TRUE(arbiter.start_copy(Instant()));
  }
  arbiter.lane_lost(0, actions_);
  std::vector<ChunkIndex> order;
  while (const auto ticket = arbiter.start_copy(Instant())) order.push_back(ticket->chunk);
  EXPECT_EQ(order.back(), 1U) << "lane 1 carries on";
}

// A guest writes to a tenth of its disk all the time, and each write that is forwarded is sent.
TEST(HotLast, SendsLessOfAHotRegionTwice) {
  constexpr std::uint64_t kChunks = 400;
  constexpr std::uint64_t kHotFrom = 20;  // copied early where the order is ascending
  constexpr std::uint64_t kHot = 40;
  const auto bytes_sent = [&](bool hot_last) {
    Arbiter::Options options = disk_of(kChunks);
    options.hot_last = hot_last;
    Arbiter arbiter(options);
    Actions actions;
    Length sent;
    std::uint64_t random = 12345;
    std::uint64_t writes = 0;
    std::uint64_t steps = 0;
    while (const auto ticket = arbiter.start_copy(Instant())) {
      EXPECT_LE(arbiter.put_off(), arbiter.summary().pending);
      EXPECT_LT(++steps, 10 * kChunks) << "every chunk has its turn";
      for (int i = 0; i < 20; ++i) {
        random = random * 6364136223846793005ULL + 1442695040888963407ULL;
        actions.clear();
        const Extent hot = block(kHotFrom + (random >> 33) % kHot, (random >> 20) % 256);
        arbiter.guest_write(++writes, WriteKind::Data, hot, Instant(), actions);
        for (const Action& action : actions) {
          if (action.kind != Action::Kind::Forward) continue;
          sent += action.extent.length;
          Actions done;
          arbiter.piece_acked(action.piece, done);
        }
      }
      sent += ticket->wanted;
      Actions behind;
      EXPECT_TRUE(arbiter.copy_read(ticket->id, behind));
      for (const Action& action : behind) {
        if (action.kind != Action::Kind::Forward) continue;
        sent += action.extent.length;
        Actions done;
        arbiter.piece_acked(action.piece, done);
      }
      arbiter.copy_acked(ticket->id);
    }
    EXPECT_TRUE(arbiter.synchronised());
    return sent;
  };
  const Length disk = kChunk * kChunks;
  const Length ascending_again = bytes_sent(false) - disk;
  const Length hot_last_again = bytes_sent(true) - disk;
  RecordProperty("sent_again_ascending", std::to_string(ascending_again.bytes()));
  RecordProperty("sent_again_hot_last", std::to_string(hot_last_again.bytes()));
  EXPECT_LT(hot_last_again * 10, ascending_again)
      << format_length(hot_last_again) << " instead of " << format_length(ascending_again);
}

// Writes that can't be forwarded make chunks Pending again and again; that keeps nobody from its
// turn.
TEST(HotLast, StarvesNoChunk) {
  Arbiter::Options options = disk_of(64);
  options.max_forwarded = Length(4096);
  Arbiter arbiter(options);
  Actions actions;
  std::uint64_t random = 99;
  WriteId writes = 0;
  std::vector<int> copies(64);
  for (int step = 0; step < 64 * 20; ++step) {
    for (int i = 0; i < 30; ++i) {
      random = random * 6364136223846793005ULL + 1442695040888963407ULL;
      arbiter.guest_write(++writes, WriteKind::Data,
                          block((random >> 33) % 64, (random >> 20) % 256), Instant(), actions);
    }
    const auto ticket = arbiter.start_copy(Instant());
    ASSERT_TRUE(ticket);
    ASSERT_TRUE(arbiter.copy_read(ticket->id, actions));
    arbiter.copy_acked(ticket->id);
    ++copies[ticket->chunk];
  }
  for (const int count : copies) EXPECT_GE(count, 10);
}

}  // namespace
}  // namespace drover::mirror
