// SPDX-License-Identifier: Apache-2.0
//
// The arbiter: for one disk, the order between the background copy and the guest's mirrored writes.
// A pure state machine: events in, actions out; no I/O, no clock, no thread of its own.
//
// The disk is divided into chunks. A chunk is
//
//   Pending   its content on the source must still be read and sent. A guest's write to it is
//             acknowledged at once and not sent: the copier will read it later.
//   Reading   the copier's read has been issued. It may or may not see a write that arrives now, so
//             the write waits until the read is done, then goes behind the chunk's frame.
//   Sending   the chunk's frame is queued on its lane and not yet acknowledged. Writes go behind
//   it. Copied    the target has it. Writes are forwarded.
//
// Why this is right: QEMU completes a write on the source before it sends it to the mirror (QEMU
// 7.2 and later, block/mirror.c, bdrv_mirror_top_do_write), so a read issued after a mirrored
// write arrived sees that write. And a chunk's frames always travel on one lane, which the target
// applies in order.
//
// The guest does not wait: outside strict mode every write is acknowledged at once, and what is to
// be forwarded follows behind (its bytes are in the mirror's buffers). How much may be on its way
// is bounded (max_forwarded, max_lag); a write beyond that is not forwarded, its chunk becomes
// Pending (again). In strict mode (the handover) nothing becomes Pending for that: a write that
// finds more than strict_window on its way is acknowledged only when the target has applied it. So
// the number of Pending chunks only falls, and what is on its way when the guest stops is little.
//
// A discard says nothing about what the source reads afterwards (it may be ignored, or only done in
// part), so it is never repeated: it is acknowledged at once and its chunks become Pending, in
// strict mode too.
//
// No write waits longer than max_strict_wait: past it strict mode ends, and with it the handover.
//
// A Pending chunk may owe some of its 4 KiB blocks only: those that were written while the write
// could not be forwarded. Its other blocks are as good as Copied, and writes to those alone are
// forwarded. So an outage costs what was written during it. A chunk that was never copied is
// Pending whole.
//
// Order. A Pending chunk that the guest writes to will be written to again soon, and after it was
// copied each of those writes must be sent. So it is put off until nothing else is Pending ("hot
// last"); until then its writes cost nothing. What a guest's write makes Pending is put off, too, so
// that what is not put off only gets less, but for outages and comparisons: the others have their
// turn. In strict mode, and once only such chunks are left, all are taken in ascending order. (To
// forward a write that covers a Pending chunk wholly, instead of copying the chunk later, was
// considered: what the guest overwrites again before its turn would be sent twice.)
//
// Comparing. Where the target may have a chunk already, but nothing says so (its record is damaged
// or missing, or nobody knows what was written since), its ticket says `compare`: hashes go in
// place of the content, and copy_differs() makes the blocks that differ Pending, to be sent.
//
// Offering. What is sent of a chunk that is copied may be its content's name instead of its content
// (mirror/offers.h): the target has it of another image, or not. Then copy_differs() says which
// blocks it could not find: the chunk is copied but for these, which are Pending as if they had
// been written just now.
//
// Verifying. verify() has every chunk to which anything was ever sent compared that way, in the
// same order with the guest's writes, without making it Pending. It begins when what the target had
// acknowledged by then has been flushed (flush_done()): what is read back then comes from stable
// storage, if the target reads past its caches. Of each block this holds: after verify() was
// called, and after what was sent of it until then had been flushed, the target read it back and it
// was equal to the source, or it is in a chunk that is counted as `unverified`. What the guest
// writes after that look is not read back. (A chunk to which nothing was ever sent is a hole on
// both sides.)
//
//   A write is on the source a moment before it is here: so a chunk that differs is looked at again
//   after a pause, and only blocks that differ twice without a write in between were damaged. They
//   are sent again, and seen equal after a flush before the chunk is done. A chunk that is not
//   Copied in its turn, because the guest writes there without a pause, has its next turn after the
//   same pause. A chunk is done when each of its blocks was equal at one look or another. After
//   verify_tries turns it is over: the blocks that never were are sent once more, and the chunk
//   counts as unverified. So verifying ends, whatever the guest does, and says what it can't vouch
//   for. At most max_doubts chunks wait for another turn; with more of them no further chunk has
//   its first.
//
// What survives. The target's acknowledgement means that its page cache has it; flush_begin() and
// flush_done() tell the arbiter what is on stable storage, target_lost_unflushed() that the rest is
// gone.
//
// What survives the arbiter itself: records, one per group of 4096 chunks, that a journal keeps,
// and QEMU's dirty bitmaps. After restore() of all records and mark_pending() of all bitmaps no
// write is missed if
//
//   1. touching (CopyTicket::touches, Action::Touch) stored the group's record before what it
//   precedes
//      was handed to a lane: a group without a record is one to which nothing was ever sent;
//   2. a bitmap is removed only after a later one records, and then
//      a. every request that QEMU had begun before the later one recorded has arrived here
//      (guest_write();
//         QEMU drained, as its `transaction` does, or each such request answered), and then
//      b. a whole pass of take_records() over all groups was made and is stored.
//      For then a write that no bitmap holds arrived before every record taken after it;
//   3. what else makes chunks Pending is stored before its cause is forgotten: a pass of
//   take_records()
//      after target_lost_unflushed() or after restore(unflushed_lost) before the target's new
//      instance is noted as known (else the next restore() would not be told of the loss), and
//      after mark_pending() of what no bitmap says.
//
// What is in flight is recorded as Pending, what was acknowledged as such, at whatever moment a
// record is taken. So between a and b nothing needs to be awaited; fence_begin() .. fence_passed(),
// then a flush, make the records better (less of them Pending or not durable), not safer.
//
// Threads: none; use from one. Every call appends its actions; carry them out in that order.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "base/units.h"
#include "mirror/block_mask.h"
#include "mirror/block_set.h"
#include "mirror/chunk_set.h"
#include "mirror/group_record.h"

namespace drover::mirror {

using ChunkIndex = std::uint64_t;
using LaneIndex = std::uint32_t;  // a data connection of the link
using WriteId = std::uint64_t;    // one request of QEMU's; the caller's name for it
using PieceId = std::uint64_t;    // the part of a write that falls into one chunk
using TicketId = std::uint64_t;   // one copy of one chunk
using FlushId = std::uint64_t;
using FenceId = std::uint64_t;

enum class WriteKind { Data, Zero, Discard };

struct Action {
  enum class Kind {
    // The write is done as far as QEMU is concerned: answer it. Once per write.
    Acknowledge,
    // Nothing of the write is left to be forwarded: its payload may go. Once per write.
    Forget,
    // Queue the piece on its lane, behind everything queued there before. Then call
    // piece_acked() when the target has applied it.
    Forward,
    // This piece's chunk will be copied again: if it is still in the lane's queue it may be
    // dropped. Not
    // an obligation.
    Abandon,
    // Store the group's record (take_record()) before the next Forward is carried out. Without a
    // journal:
    // nothing to do.
    Touch,
  };
  Kind kind = Kind::Acknowledge;
  WriteId write = 0;
  PieceId piece = 0;   // Forward, Abandon
  Extent extent;       // Forward: of the piece
  LaneIndex lane = 0;  // Forward, Abandon
  GroupIndex group = 0;  // Touch
};
using Actions = std::vector<Action>;

struct CopyTicket {
  TicketId id = 0;
  ChunkIndex chunk = 0;
  Extent extent;  // from the first to the last block that is wanted
  // Which blocks of the extent (its first is 0) are wanted; BlockMask::all(): every one.
  BlockMask blocks = BlockMask::all();
  LaneIndex lane = 0;
  bool fresh = false;  // nothing was ever sent for this chunk
  bool compare = false;  // send a hash, then call copy_acked() or copy_differs()
  Length wanted;       // bytes in `blocks`
  // Store this group's record (take_record()) before anything of the chunk is sent.
  std::optional<GroupIndex> touches;
};

struct GroupRecord {
  GroupIndex group = 0;
  std::string bytes;  // at most kMaxGroupRecord
  std::uint64_t taken = 0;  // counts what this arbiter took: the larger of a group's is the newer
};

class Arbiter {
 public:
  struct Options {
    Length disk_size;
    Length chunk_size = Length(std::uint64_t{1} << 20);  // a multiple of 4 KiB, at most 1 MiB
    LaneIndex lanes = 1;
    LaneIndex first_lane = 0;  // chunk c travels on lane (c + first_lane) % lanes
    // What may be on its way at once outside strict mode, and for how long, before it is given up and
    // the chunks are copied again.
    Length max_forwarded = Length(std::uint64_t{16} << 20);
    Duration max_lag = std::chrono::seconds(2);
    // What may be on its way in strict mode before writes wait.
    Length strict_window = Length(std::uint64_t{1} << 20);
    Duration max_strict_wait = std::chrono::seconds(5);
    // Chunks of which single blocks are Pending, at most (40 bytes each, in a table at most 4 times
    // as large); further ones are copied whole. A quarter of it again for what is not flushed.
    std::size_t max_masks = std::size_t{64} << 10;
    // A record is stored before anything is sent into each span of so many chunks, and once more
    // before those of it that are put off: of the others it can say then that nothing was sent.
    // (64 MiB of 1 MiB chunks: at 1 GB/s some 15 records a second.) Divides a group's.
    std::uint64_t touch_span = 64;
    // Before a chunk that differs is looked at again: a write that is on the source has arrived by then.
    Duration verify_pause = std::chrono::seconds(2);
    // Turns of a chunk that is written all the time.
    unsigned verify_tries = 8;
    std::size_t max_doubts = 1024;  // about 200 bytes each
    bool hot_last = true;           // false: in ascending order, for the test that it pays
    // For the test that the simulation notices each missing rule; see tests/sim.
    struct Mutation {
      bool forward_during_read = false;      // a write to a Reading chunk is forwarded at once
      bool forget_redo = false;              // a write not forwarded during a copy is not copied again
      bool ignore_write_during_scan = false; // a hole found by a scan hides a write that came meanwhile
      bool repeat_discard = false;           // a discard is forwarded as zeroes
      bool drop_expired = false;             // a write given up on leaves its chunk Copied
      bool forget_on_the_way = false;        // synchronised() does not count what is on its way
      bool keep_copied_on_loss = false;      // a lost lane leaves what was in flight as Copied
      bool wrong_lane = false;               // a write travels on another lane than its chunk
      bool wait_outside_strict = false;  // writes wait for the target at any time
      bool forget_joined_mask = false;       // a Pending chunk's mask is replaced, not joined
      bool forget_redo_mask = false;     // of the writes to redo, only the last one's blocks count
      bool forget_ticket_mask = false;   // a lost copy's blocks do not come back
      bool forget_waiting_mask = false;  // what waited for a read that failed is forgotten
      bool trust_partial_read = false;  // a copy saw older writes also to blocks that it leaves out
      bool forget_unflushed = false;    // a target's restart loses nothing
      bool flush_covers_all = false;    // a flush covers what was acknowledged during it, too
      bool record_in_flight_as_copied = false;  // a record takes what is in flight for acknowledged
      bool record_unflushed_as_durable = false;  // a record takes what was acknowledged for flushed
      bool restore_as_fresh = false;  // restored chunks count as ones to which nothing was sent
      bool touch_late = false;        // frames may be sent before their group has a record
      bool ignore_fence = false;      // fences pass at once
      bool same_though_different = false;  // a comparison's answer does not matter
      bool damaged_at_once = false;        // a chunk that differs once is taken for damaged
      bool compare_trusted = false;  // a write given up on is seen by a comparison, as by a copy
      bool forget_unseen = false;    // what verifying never saw is not sent again
      bool forget_not_found = false;  // an offer of which something was not found counts as copied
      bool wait_past_limit = false;  // in strict mode a write waits for as long as it takes
    } mutation;
  };

  // Every chunk is Pending, every lane is up, no group has a record.
  explicit Arbiter(const Options& options);

  // --- the guest (through QEMU's mirror) ---
  // The extent lies within the disk and is not empty. `id` is new.
  // `scarce`: the caller has few buffers left, so in strict mode it waits however little is on its
  // way (or the next would wait for a buffer, and nobody would know since when).
  void guest_write(WriteId id, WriteKind kind, Extent extent, Instant now, Actions& out,
                   bool scarce = false);

  // --- the copier ---
  // The next Pending chunk whose lane is up, in ascending order from where the last one was, those
  // that are put off last; it is Reading now. Nothing if there is none. Issue the read after this
  // call.
  std::optional<CopyTicket> start_copy(Instant now);
  // False: start_copy() has nothing.
  [[nodiscard]] bool wants_copy() const { return pending_.count() > 0 || verify_is_due(); }
  // The read is done. True: queue the chunk's frame on the ticket's lane first, then carry out the
  // actions. False: the ticket is void (its lane was lost meanwhile); forget what was read.
  [[nodiscard]] bool copy_read(TicketId id, Actions& out);
  // The read failed or was not wanted after all: the chunk is Pending again.
  void copy_abandoned(TicketId id, Actions& out);
  // The target has applied the chunk, or has the same content. Unknown tickets (from before a lane was
  // lost) are ignored.
  void copy_acked(TicketId id);
  // What verify() found damaged. Again: it had been sent again already, to no avail.
  struct Damage {
    Extent extent;
    bool again = false;
  };
  // The target has another content in these blocks of the chunk (bits beyond it are ignored); of a
  // copy that was offered: it could not write them.
  std::optional<Damage> copy_differs(TicketId id, BlockMask blocks, Instant now);
  // Each chunk is compared, in turns with copies, outside strict mode, once what is unflushed now
  // has been flushed. Begins anew if it was under way.
  void verify();

  // --- what is on stable storage ---
  // The target is about to be asked to flush: what it has acknowledged so far is covered. A flush
  // begun while another is under way replaces it: only the newest one's end counts.
  FlushId flush_begin();
  void flush_done(FlushId id);
  // Nothing is known of it: what it covered is as unflushed as before. (Where the target's disk
  // itself failed, what is unflushed may be lost: target_lost_unflushed().)
  void flush_failed(FlushId id);
  // The target's host or its qemu-storage-daemon was restarted: what was not flushed is Pending
  // again. What was in flight is lane_lost()'s business.
  void target_lost_unflushed();
  // Acknowledged since the last flush began: time for another?
  [[nodiscard]] Length unflushed() const { return unflushed_bytes_; }
  // That, and what the flush under way covers.
  [[nodiscard]] Length not_durable() const { return unflushed_bytes_ + flushing_bytes_; }

  // --- records, for a journal ---
  [[nodiscard]] GroupIndex groups() const;
  // The group as it is now; it counts as unchanged then.
  GroupRecord take_record(GroupIndex group);
  // Up to `most` of the groups >= first that have a record and changed since it was taken. `next`:
  // where to go on; nothing: that was the last.
  struct Records {
    std::vector<GroupRecord> records;
    std::optional<GroupIndex> next;
  };
  Records take_records(GroupIndex first, std::size_t most);
  // On an arbiter to which nothing else has happened yet, for every record there is.
  // `unflushed_lost`: the target is not the instance any more that acknowledged it. Protocol: the
  // record is damaged; then all of the group is Pending, and anything may have been sent to it.
  Status restore(GroupIndex group, std::string_view bytes, bool unflushed_lost);
  // The same as if every group's record was damaged.
  void restore_nothing();
  // After those: the target was asked, after a flush and before anything was sent to it. It reads
  // as zeroes there as if nothing had ever been sent.
  void restore_hole(Extent hole);

  // Passed: every write that arrived before fence_begin() is acknowledged by the target, or
  // Pending.
  FenceId fence_begin() const { return next_piece_; }
  [[nodiscard]] bool fence_passed(FenceId id) const {
    return pieces_.empty() || pieces_.begin()->first >= id || options_.mutation.ignore_fence;
  }

  // Finding holes: scan_begin() before the source is asked how `range` is mapped, scan_hole() for
  // each run that reads as zeroes. Chunks that lie wholly in a hole, are Pending and saw no write
  // since scan_begin() become Copied without being sent. Only for a target that reads as zeroes where
  // nothing was written; only chunks to which nothing was ever sent are skipped.
  void scan_begin(Extent range);
  void scan_hole(Extent hole);

  // --- the link ---
  void piece_acked(PieceId id, Actions& out);  // unknown ones are ignored
  // What was in flight on the lane may or may not have arrived: its blocks become Pending, strict
  // mode ends.
  void lane_lost(LaneIndex lane, Actions& out);
  void lane_up(LaneIndex lane);

  // --- time ---
  // When tick() should be called next, if ever.
  [[nodiscard]] std::optional<Instant> next_deadline() const;
  void tick(Instant now, Actions& out);
  // Gives up all that is on its way outside strict mode: the caller's buffers run short.
  void shed(Actions& out);

  // --- the handover ---
  // False, and nothing changes, while a lane is down: a write could not wait for the target then.
  [[nodiscard]] bool enter_strict();
  // Also ends by itself when a lane is lost or a write has waited for too long. Waiting writes are
  // acknowledged.
  void leave_strict(Actions& out);
  [[nodiscard]] bool strict() const { return strict_; }

  // Mark as to be copied (again), by blocks: what a dirty bitmap or a comparison says.
  void mark_pending(Extent range);

  // --- what is known ---
  struct Summary {
    std::uint64_t chunks = 0;
    std::uint64_t pending = 0;   // chunks that are Pending
    std::uint64_t copying = 0;   // Reading or Sending
    std::uint64_t waiting = 0;   // writes not yet acknowledged
    std::uint64_t on_the_way = 0;  // pieces of writes, forwarded or waiting for a read
    std::uint64_t expired = 0;   // pieces not forwarded or given up because of the bounds, ever
    std::uint64_t to_verify = 0;   // chunks that verify() has not done with
    std::uint64_t damaged = 0;     // times that a chunk was, ever
    std::uint64_t unverified = 0;  // chunks that it can't vouch for, of this verify()
    Length left;                 // bytes that are Pending or being copied
    Length copied;               // the others
  };
  [[nodiscard]] Summary summary() const;
  [[nodiscard]] std::size_t copying() const {
    return copies_.size();
  }  // Reading, Sending or compared
  // Nothing Pending, being copied, or on its way: the target has all that was acknowledged.
  [[nodiscard]] bool synchronised() const;
  [[nodiscard]] const Options& options() const { return options_; }
  [[nodiscard]] bool is_copied(ChunkIndex chunk) const;
  // Something may have been sent for it: else the target reads as zeroes there.
  [[nodiscard]] bool was_sent(ChunkIndex chunk) const { return sent_.contains(chunk); }
  // Pending chunks whose copy is put off because the guest writes to them.
  [[nodiscard]] std::uint64_t put_off() const { return hot_.count(); }

 private:
  enum class CopyState { Reading, Sending };
  struct Copy {
    ChunkIndex chunk = 0;
    CopyState state = CopyState::Reading;
    BlockMask blocks;                // what it copies
    BlockMask redo;                  // Pending again once it is acknowledged
    PieceId first_unseen = 0;        // the read saw every piece before this one
    std::vector<PieceId> waiting;    // Reading: forwarded when the read is done
    bool compare = false;
    std::uint64_t verify =
        0;  // not 0: the chunk is Copied, the target is expected to have it; the pass's number
    BlockMask written;  // verify: by writes that came meanwhile
  };
  struct Piece {
    WriteId write = 0;
    ChunkIndex chunk = 0;
    WriteKind kind = WriteKind::Data;
    Extent extent;
    bool forwarded = false;
    Instant arrived;
  };
  struct Write {
    std::uint32_t unforwarded = 0;  // parts whose payload is still needed
    std::uint32_t unfinished = 0;   // parts that the target has not applied
    Instant arrived;
    bool acknowledged = false;
  };

  [[nodiscard]] LaneIndex lane_of(ChunkIndex chunk) const;
  [[nodiscard]] Extent chunk_extent(ChunkIndex chunk) const;
  [[nodiscard]] std::size_t blocks_in(ChunkIndex chunk) const;
  [[nodiscard]] BlockMask blocks_of(const Piece& piece) const;
  [[nodiscard]] Length bytes_of(ChunkIndex chunk, const BlockMask& blocks) const;
  [[nodiscard]] std::pair<ChunkIndex, ChunkIndex> whole_chunks(Extent extent) const;
  void know_nothing(ChunkIndex first, ChunkIndex end);
  void changed(ChunkIndex chunk) { changed_.insert(chunk / kGroupChunks); }
  void changed(const BlockSet& chunks);
  void dirty(ChunkIndex chunk, const BlockMask& blocks);
  void mark_chunks(ChunkIndex first, ChunkIndex end);
  void put_off(ChunkIndex chunk);
  [[nodiscard]] std::optional<ChunkIndex> next_to_copy(bool cold) const;
  bool touch(ChunkIndex chunk);
  void acknowledged(ChunkIndex chunk, const BlockMask& blocks);
  [[nodiscard]] std::unordered_map<ChunkIndex, BlockMask> in_flight() const;
  std::string record(GroupIndex group, const std::unordered_map<ChunkIndex, BlockMask>& in_flight);
  [[nodiscard]] Copy* copy_of(ChunkIndex chunk);
  void take_piece(const Piece& piece, Actions& out);
  CopyTicket ticket_for(ChunkIndex chunk);
  [[nodiscard]] bool verify_is_due() const;
  std::optional<CopyTicket> start_verify(Instant now);
  std::optional<ChunkIndex> next_to_verify();
  CopyTicket new_ticket(ChunkIndex chunk, const BlockMask& blocks);
  void no_longer_in_doubt(ChunkIndex chunk, const BlockMask& blocks);
  void mark_sent(ChunkIndex chunk);
  void turn_is_over(ChunkIndex chunk, Instant now);
  PieceId wait(const Piece& piece);
  void forward(PieceId id, Actions& out);
  void finish_piece(PieceId id, Actions& out);
  void begin_part(WriteId write);
  void part_forwarded(WriteId write, Actions& out);
  void part_finished(WriteId write, Actions& out);
  void skip_part(WriteId write, Actions& out);
  void give_up(PieceId id, Actions& out);
  void end_strict(Actions& out);
  void forget_copy(TicketId id, Actions& out);

  // Of a chunk that is verified and needs more than one turn.
  struct Doubt {
    unsigned tries = 0;
    BlockMask equal;     // at one look or another
    BlockMask differed;  // at the latest look, and were not written since
    BlockMask mended;    // were damaged, and sent again
  };

  Options options_;
  std::uint64_t chunks_ = 0;
  bool strict_ = false;
  BlockSet pending_;
  ChunkSet hot_;  // of those: written to while they were
  ChunkSet written_since_scan_;
  ChunkSet sent_;  // chunks for which something may have been sent
  ChunkSet compare_;    // Pending chunks of which the target may have all
  // verify(): a cursor over sent_; what it has passed and is not done with is in verifying_.
  std::uint64_t verify_pass_ = 0;
  ChunkIndex verify_cursor_ = 0;
  std::uint64_t passed_ = 0;  // members of sent_ below the cursor
  FlushId verify_after_ = 0;  // begins when this flush, or a later one, is done
  std::uint64_t verifying_ = 0;
  std::map<ChunkIndex, Doubt> doubts_;          // at most max_doubts and what is being compared
  std::multimap<Instant, ChunkIndex> resting_;  // of verifying_: until they have another turn
  std::deque<ChunkIndex> due_;                  // and those that have it now
  bool verified_last_ = false;                  // the latest ticket was one of those
  std::uint64_t damaged_ = 0;
  std::uint64_t unverified_ = 0;
  // Something may have been sent, and a record says so. Comes in spans of touch_span chunks.
  ChunkSet touched_;
  ChunkSet changed_;    // groups that are not as their records say, or have none
  BlockSet unflushed_;  // acknowledged since the last flush began
  BlockSet flushing_;   // acknowledged before it
  Length unflushed_bytes_;
  Length flushing_bytes_;
  FlushId flush_ = 0;  // the newest
  FlushId flushed_ = 0;  // the newest that is done
  ChunkIndex cursor_ = 0;
  std::vector<bool> lane_down_;
  std::map<TicketId, Copy> copies_;
  std::unordered_map<ChunkIndex, TicketId> copying_;  // look-ups only, never iterated
  std::map<PieceId, Piece> pieces_;             // on their way, oldest first
  std::unordered_map<WriteId, Write> writes_;   // look-ups only, never iterated
  std::vector<WriteId> waiting_;                // strict: not acknowledged yet, oldest first
  Length bytes_on_the_way_;
  std::uint64_t expired_ = 0;
  TicketId next_ticket_ = 1;
  std::uint64_t taken_ = 0;  // records
  PieceId next_piece_ = 1;
};

}  // namespace drover::mirror
