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
//   Sending   the chunk's frame is queued on its lane and not yet acknowledged. Writes go behind it.
//   Copied    the target has it. Writes are forwarded.
//
// Why this is right: QEMU completes a write on the source before it sends it to the mirror (QEMU
// 7.2 and later, block/mirror.c, bdrv_mirror_top_do_write), so a read issued after a mirrored
// write arrived sees that write. And a chunk's frames always travel on one lane, which the target
// applies in order.
//
// The guest does not wait: outside strict mode every write is acknowledged at once, and what is to be
// forwarded follows behind (its bytes are in the mirror's buffers). How much may be on its way is
// bounded (max_forwarded, max_lag); a write beyond that is not forwarded, its chunk becomes Pending (again).
// In strict mode (the handover) nothing becomes Pending for that: a write that finds more than
// strict_window on its way is acknowledged only when the target has applied it. So the number of Pending
// chunks only falls, and what is on its way when the guest stops is little.
//
// A discard says nothing about what the source reads afterwards (it may be ignored, or only done in
// part), so it is never repeated: it is acknowledged at once and its chunks become Pending, in strict
// mode too.
//
// No write waits longer than max_strict_wait: past it strict mode ends, and with it the handover.
//
// Threads: none; use from one. Every call appends its actions; carry them out in that order.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/units.h"
#include "mirror/chunk_set.h"

namespace drover::mirror {

using ChunkIndex = std::uint64_t;
using LaneIndex = std::uint32_t;  // a data connection of the link
using WriteId = std::uint64_t;    // one request of QEMU's; the caller's name for it
using PieceId = std::uint64_t;    // the part of a write that falls into one chunk
using TicketId = std::uint64_t;   // one copy of one chunk

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
    // This piece's chunk will be copied again: if it is still in the lane's queue it may be dropped. Not
    // an obligation.
    Abandon,
  };
  Kind kind = Kind::Acknowledge;
  WriteId write = 0;
  PieceId piece = 0;   // Forward, Abandon
  Extent extent;       // Forward: of the piece
  LaneIndex lane = 0;  // Forward, Abandon
};
using Actions = std::vector<Action>;

struct CopyTicket {
  TicketId id = 0;
  ChunkIndex chunk = 0;
  Extent extent;
  LaneIndex lane = 0;
  bool fresh = false;  // nothing was ever sent for this chunk
};

class Arbiter {
 public:
  struct Options {
    Length disk_size;
    Length chunk_size = Length(std::uint64_t{1} << 20);
    LaneIndex lanes = 1;
    LaneIndex first_lane = 0;  // chunk c travels on lane (c + first_lane) % lanes
    // What may be on its way at once outside strict mode, and for how long, before it is given up and
    // the chunks are copied again.
    Length max_forwarded = Length(std::uint64_t{16} << 20);
    Duration max_lag = std::chrono::seconds(2);
    // What may be on its way in strict mode before writes wait.
    Length strict_window = Length(std::uint64_t{1} << 20);
    Duration max_strict_wait = std::chrono::seconds(5);
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
    } mutation;
  };

  // Every chunk is Pending, every lane is up.
  explicit Arbiter(const Options& options);

  // --- the guest (through QEMU's mirror) ---
  // The extent lies within the disk and is not empty. `id` is new.
  void guest_write(WriteId id, WriteKind kind, Extent extent, Instant now, Actions& out);

  // --- the copier ---
  // The next Pending chunk whose lane is up, in ascending order from where the last one was; it is
  // Reading now. Nothing if there is none. Issue the read after this call.
  std::optional<CopyTicket> start_copy();
  // The read is done. True: queue the chunk's frame on the ticket's lane first, then carry out the
  // actions. False: the ticket is void (its lane was lost meanwhile); forget what was read.
  [[nodiscard]] bool copy_read(TicketId id, Actions& out);
  // The read failed or was not wanted after all: the chunk is Pending again.
  void copy_abandoned(TicketId id, Actions& out);
  // The target has applied the chunk. Unknown tickets (from before a lane was lost) are ignored.
  void copy_acked(TicketId id);

  // Finding holes: scan_begin() before the source is asked how `range` is mapped, scan_hole() for
  // each run that reads as zeroes. Chunks that lie wholly in a hole, are Pending and saw no write
  // since scan_begin() become Copied without being sent. Only for a target that reads as zeroes where
  // nothing was written; only chunks to which nothing was ever sent are skipped.
  void scan_begin(Extent range);
  void scan_hole(Extent hole);

  // --- the link ---
  void piece_acked(PieceId id, Actions& out);  // unknown ones are ignored
  // What was in flight on the lane may or may not have arrived: its chunks become Pending, strict mode
  // ends.
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

  // Mark as to be copied (again): what a dirty bitmap or a journal says.
  void mark_pending(Extent range);

  // --- what is known ---
  struct Summary {
    std::uint64_t chunks = 0;
    std::uint64_t pending = 0;   // chunks that are Pending
    std::uint64_t copying = 0;   // Reading or Sending
    std::uint64_t waiting = 0;   // writes not yet acknowledged
    std::uint64_t on_the_way = 0;  // pieces of writes, forwarded or waiting for a read
    std::uint64_t expired = 0;   // pieces not forwarded or given up because of the bounds, ever
    Length copied;               // bytes of chunks that are Copied
  };
  [[nodiscard]] Summary summary() const;
  // Nothing Pending, being copied, or on its way: the target has all that was acknowledged.
  [[nodiscard]] bool synchronised() const;
  [[nodiscard]] const Options& options() const { return options_; }
  [[nodiscard]] bool is_copied(ChunkIndex chunk) const;

 private:
  enum class CopyState { Reading, Sending };
  struct Copy {
    ChunkIndex chunk = 0;
    CopyState state = CopyState::Reading;
    bool redo = false;               // becomes Pending, not Copied, once acknowledged
    PieceId first_unseen = 0;        // the read saw every piece before this one
    std::vector<PieceId> waiting;    // Reading: forwarded when the read is done
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
  [[nodiscard]] Copy* copy_of(ChunkIndex chunk);
  void take_piece(const Piece& piece, Actions& out);
  void take_discard(const Piece& piece, Actions& out);
  PieceId wait(const Piece& piece);
  void forward(PieceId id, Actions& out);
  void finish_piece(PieceId id, Actions& out);
  void finish_pieces(const std::vector<PieceId>& ids, Actions& out);
  void begin_part(WriteId write);
  void part_forwarded(WriteId write, Actions& out);
  void part_finished(WriteId write, Actions& out);
  void skip_part(WriteId write, Actions& out);
  void give_up(PieceId id, Actions& out);
  void end_strict(Actions& out);
  void forget_copy(TicketId id, Actions& out);

  Options options_;
  std::uint64_t chunks_ = 0;
  bool strict_ = false;
  ChunkSet pending_;
  ChunkSet written_since_scan_;
  ChunkSet sent_;
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
  PieceId next_piece_ = 1;
};

}  // namespace drover::mirror
