// SPDX-License-Identifier: Apache-2.0
#include "mirror/arbiter.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "mirror/frame.h"

namespace drover::mirror {

Arbiter::Arbiter(const Options& options)
    : options_(options),
      chunks_((options.disk_size.bytes() + options.chunk_size.bytes() - 1) /
              options.chunk_size.bytes()),
      pending_({chunks_, options.chunk_size / kBlock, options.max_masks, true}),
      hot_(chunks_),
      written_since_scan_(chunks_),
      sent_(chunks_),
      compare_(chunks_),
      verify_cursor_(chunks_),
      touched_(chunks_),
      changed_((chunks_ + kGroupChunks - 1) / kGroupChunks),
      unflushed_({chunks_, options.chunk_size / kBlock, options.max_masks / 8, false}),
      flushing_({chunks_, options.chunk_size / kBlock, options.max_masks / 8, false}),
      lane_down_(options.lanes, false) {
  CHECK(options.touch_span > 0 && kGroupChunks % options.touch_span == 0,
        "a span is of one group");
  CHECK(options.disk_size.bytes() > 0, "a disk has at least one byte");
  CHECK(options.chunk_size.bytes() > 0 && options.lanes > 0, "chunks and lanes exist");
  CHECK(options.chunk_size.bytes() % kBlock.bytes() == 0 && options.chunk_size <= kMaxChunk,
        "a chunk is made of blocks, as many as a mask can hold");
}

LaneIndex Arbiter::lane_of(ChunkIndex chunk) const {
  return static_cast<LaneIndex>((chunk + options_.first_lane) % options_.lanes);
}

Extent Arbiter::chunk_extent(ChunkIndex chunk) const {
  const Offset start(chunk * options_.chunk_size.bytes());
  return {start, std::min(options_.chunk_size, options_.disk_size - Length(start.bytes()))};
}

std::size_t Arbiter::blocks_in(ChunkIndex chunk) const {
  return (chunk_extent(chunk).length + kBlock - Length(1)) / kBlock;
}

BlockMask Arbiter::blocks_of(const Piece& piece) const {
  const Extent blocks = widen(piece.extent, kBlock);
  const Length before = blocks.offset - chunk_extent(piece.chunk).offset;
  return BlockMask::range(before / kBlock, (before + blocks.length) / kBlock);
}

Length Arbiter::bytes_of(ChunkIndex chunk, const BlockMask& blocks) const {
  const std::size_t count = blocks_in(chunk);
  const Length bytes = kBlock * (blocks & BlockMask::range(0, count)).count();
  // The disk's last block may be cut short.
  return blocks.contains(count - 1) ? bytes - (kBlock * count - chunk_extent(chunk).length) : bytes;
}

void Arbiter::changed(const BlockSet& chunks) {
  for (auto chunk = chunks.next(0); chunk;
       chunk = chunks.next((*chunk / kGroupChunks + 1) * kGroupChunks)) {
    changed(*chunk);
  }
}

// The target's blocks are not the source's any more.
void Arbiter::dirty(ChunkIndex chunk, const BlockMask& blocks) {
  changed(chunk);
  no_longer_in_doubt(chunk, blocks);
  if (Copy* const copy = copy_of(chunk); copy != nullptr) {
    if (options_.mutation.forget_redo_mask) copy->redo = {};
    copy->redo |= blocks;
    return;
  }
  if (options_.mutation.forget_joined_mask && pending_.has_mask(chunk)) {
    pending_.erase(chunk);
    hot_.erase(chunk);
  }
  pending_.add(chunk, blocks);
}

// The guest writes to it.
void Arbiter::put_off(ChunkIndex chunk) {
  if (pending_.contains(chunk)) hot_.insert(chunk);
}

// Something is about to be sent. True: its group's record must say so first.
bool Arbiter::touch(ChunkIndex chunk) {
  if (touched_.contains(chunk)) return false;
  // The others of its span, too: their turn is next. Those that are put off come much later, and until then the record can
  // say that nothing was sent for them.
  const ChunkIndex first = chunk / options_.touch_span * options_.touch_span;
  const ChunkIndex end = std::min(chunks_, first + options_.touch_span);
  if (strict_ || hot_.count() == pending_.count()) {
    touched_.insert_range(first, end);
  } else {
    for (ChunkIndex other = first; other < end; ++other) {
      if (!hot_.contains(other)) touched_.insert(other);
    }
    touched_.insert(chunk);
  }
  changed(chunk);
  return !options_.mutation.touch_late;
}

Arbiter::Copy* Arbiter::copy_of(ChunkIndex chunk) {
  const auto found = copying_.find(chunk);
  return found == copying_.end() ? nullptr : &copies_.at(found->second);
}

// --- the guest ---

void Arbiter::guest_write(WriteId id, WriteKind kind, Extent extent, Instant now, Actions& out,
                          bool scarce) {
  CHECK(extent.length.bytes() > 0 && extent.end() <= Offset(options_.disk_size.bytes()),
        "the NBD server lets only extents of the disk through");
  const auto [entry, fresh_id] = writes_.try_emplace(id);
  CHECK(fresh_id, "a write's id is new");
  // In strict mode a write waits when too much is on its way.
  const bool may_wait = strict_ || options_.mutation.wait_outside_strict;
  const bool much = scarce || bytes_on_the_way_ + extent.length > options_.strict_window;
  const bool wait_for_target = may_wait && kind != WriteKind::Discard && much;
  entry->second.acknowledged = !wait_for_target;
  entry->second.arrived = now;
  begin_part(id);  // held until all parts are taken
  if (wait_for_target) waiting_.push_back(id);
  for (Offset at = extent.offset; at < extent.end();) {
    const ChunkIndex chunk = at.bytes() / options_.chunk_size.bytes();
    const Offset end = std::min(extent.end(), chunk_extent(chunk).end());
    begin_part(id);
    take_piece(Piece{id, chunk, kind, Extent{at, end - at}, false, now}, out);
    at = end;
  }
  if (!wait_for_target) out.push_back({.kind = Action::Kind::Acknowledge, .write = id});
  skip_part(id, out);
}

void Arbiter::take_piece(const Piece& piece, Actions& out) {
  written_since_scan_.insert(piece.chunk);
  put_off(piece.chunk);
  const BlockMask blocks = blocks_of(piece);
  no_longer_in_doubt(piece.chunk, blocks);
  if (Copy* const copy = copy_of(piece.chunk); copy != nullptr) copy->written |= blocks;
  if (piece.kind == WriteKind::Discard && !options_.mutation.repeat_discard) {
    dirty(piece.chunk, blocks);
    put_off(piece.chunk);
    return skip_part(piece.write, out);
  }
  Copy* const copy = copy_of(piece.chunk);
  // Will be read after this.
  if ((copy != nullptr ? copy->redo : pending_.blocks(piece.chunk)).covers(blocks)) {
    return skip_part(piece.write, out);
  }
  const bool lane_down = lane_down_[lane_of(piece.chunk)];
  const bool too_much =
      !strict_ && bytes_on_the_way_ + piece.extent.length > options_.max_forwarded;
  if (lane_down || too_much) {
    dirty(piece.chunk, blocks);
    put_off(piece.chunk);
    ++expired_;
    return skip_part(piece.write, out);
  }
  const PieceId id = wait(piece);
  if (copy != nullptr && copy->state == CopyState::Reading &&
      !options_.mutation.forward_during_read) {
    copy->waiting.push_back(id);
    return;
  }
  forward(id, out);
}

PieceId Arbiter::wait(const Piece& piece) {
  const PieceId id = next_piece_++;
  pieces_.emplace_hint(pieces_.end(), id, piece);
  bytes_on_the_way_ += piece.extent.length;
  changed(piece.chunk);
  return id;
}

void Arbiter::forward(PieceId id, Actions& out) {
  Piece& piece = pieces_.at(id);
  piece.forwarded = true;
  if (touch(piece.chunk)) {
    out.push_back({.kind = Action::Kind::Touch, .group = piece.chunk / kGroupChunks});
  }
  mark_sent(piece.chunk);
  LaneIndex lane = lane_of(piece.chunk);
  if (options_.mutation.wrong_lane) lane = (lane + 1) % options_.lanes;
  out.push_back({.kind = Action::Kind::Forward,
                 .write = piece.write,
                 .piece = id,
                 .extent = piece.extent,
                 .lane = lane});
  part_forwarded(piece.write, out);
}

void Arbiter::finish_piece(PieceId id, Actions& out) {
  const auto found = pieces_.find(id);
  CHECK(found != pieces_.end(), "only pieces on their way finish");
  const Piece piece = found->second;
  bytes_on_the_way_ -= piece.extent.length;
  pieces_.erase(found);
  if (!piece.forwarded) part_forwarded(piece.write, out);
  part_finished(piece.write, out);
}

void Arbiter::begin_part(WriteId write) {
  Write& entry = writes_.at(write);
  ++entry.unforwarded;
  ++entry.unfinished;
}

void Arbiter::part_forwarded(WriteId write, Actions& out) {
  Write& entry = writes_.at(write);
  CHECK(entry.unforwarded > 0, "each part is forwarded or skipped once");
  if (--entry.unforwarded > 0) return;
  out.push_back({.kind = Action::Kind::Forget, .write = write});
}

void Arbiter::part_finished(WriteId write, Actions& out) {
  const auto found = writes_.find(write);
  CHECK(found != writes_.end() && found->second.unfinished > 0, "each part is finished once");
  if (--found->second.unfinished > 0) return;
  if (!found->second.acknowledged) {
    std::erase(waiting_, write);
    out.push_back({.kind = Action::Kind::Acknowledge, .write = write});
  }
  writes_.erase(found);
}

// A part of which nothing is forwarded: its chunk is, or will be, copied.
void Arbiter::skip_part(WriteId write, Actions& out) {
  part_forwarded(write, out);
  part_finished(write, out);
}

// --- the copier ---

std::optional<CopyTicket> Arbiter::start_copy(Instant now) {
  // In turns with copies, or a guest that never lets them end would put verification off for ever.
  if (!std::exchange(verified_last_, false)) {
    if (auto ticket = start_verify(now)) {
      verified_last_ = true;
      return ticket;
    }
  }
  std::optional<ChunkIndex> chunk;
  if (!strict_ && options_.hot_last && hot_.count() > 0) chunk = next_to_copy(true);
  if (!chunk) chunk = next_to_copy(false);
  if (!chunk) return start_verify(now);
  cursor_ = *chunk + 1 < chunks_ ? *chunk + 1 : 0;
  return ticket_for(*chunk);
}

// From the cursor to the end, then from the beginning. `cold`: none that is put off.
std::optional<ChunkIndex> Arbiter::next_to_copy(bool cold) const {
  if (cold && hot_.count() == pending_.count()) return std::nullopt;
  ChunkIndex from = cursor_;
  bool wrapped = false;
  while (true) {
    const std::optional<ChunkIndex> chunk =
        cold ? pending_.next_outside(from, hot_) : pending_.next(from);
    if (!chunk || (wrapped && *chunk >= cursor_)) {
      if (wrapped || cursor_ == 0) return std::nullopt;
      wrapped = true;
      from = 0;
      continue;
    }
    if (!lane_down_[lane_of(*chunk)]) return chunk;
    // With every lane down there is nothing to find in a long bitmap.
    if (std::ranges::all_of(lane_down_, [](bool down) { return down; })) return std::nullopt;
    from = *chunk + 1;
  }
}

CopyTicket Arbiter::ticket_for(ChunkIndex chunk) {
  const BlockMask every = BlockMask::range(0, blocks_in(chunk));
  const BlockMask blocks = pending_.blocks(chunk) & every;
  pending_.erase(chunk);
  hot_.erase(chunk);
  CopyTicket ticket = new_ticket(chunk, blocks);
  copies_.at(ticket.id).compare = ticket.compare = compare_.contains(chunk) && blocks == every;
  if (touch(chunk)) ticket.touches = chunk / kGroupChunks;
  return ticket;
}

bool Arbiter::verify_is_due() const {
  if (strict_ || flushed_ < verify_after_) return false;
  if (std::ranges::any_of(lane_down_, [](bool down) { return down; })) return false;
  return !due_.empty() || (passed_ < sent_.count() && doubts_.size() < options_.max_doubts);
}

// The next whose turn it is. Those that had one come first: only so many may wait for another.
std::optional<ChunkIndex> Arbiter::next_to_verify() {
  if (!verify_is_due()) return std::nullopt;
  if (!due_.empty()) {
    const ChunkIndex chunk = due_.front();
    due_.pop_front();
    return chunk;
  }
  const std::optional<ChunkIndex> chunk = sent_.next(verify_cursor_);
  CHECK(chunk.has_value(), "what the cursor has not passed is ahead of it");
  verify_cursor_ = *chunk + 1;
  ++passed_;
  ++verifying_;
  return chunk;
}

// Each turn ends with a ticket or a chunk in doubt, of which there are few: this does not look at
// much.
std::optional<CopyTicket> Arbiter::start_verify(Instant now) {
  while (const std::optional<ChunkIndex> chunk = next_to_verify()) {
    const auto doubt = doubts_.find(*chunk);
    const BlockMask mended = doubt != doubts_.end() ? doubt->second.mended : BlockMask();
    const BlockMask unflushed = unflushed_.blocks(*chunk) | flushing_.blocks(*chunk);
    if (!is_copied(*chunk) || !(mended & unflushed).empty()) {
      turn_is_over(*chunk, now);
      continue;
    }
    CopyTicket ticket = new_ticket(*chunk, BlockMask::range(0, blocks_in(*chunk)));
    Copy& copy = copies_.at(ticket.id);
    copy.compare = ticket.compare = true;
    copy.verify = verify_pass_;
    return ticket;
  }
  return std::nullopt;
}

// It was not seen equal throughout: there is another, or it was its last.
void Arbiter::turn_is_over(ChunkIndex chunk, Instant now) {
  Doubt& doubt = doubts_[chunk];
  const BlockMask every = BlockMask::range(0, blocks_in(chunk));
  if (doubt.equal.covers(every) && doubt.differed.empty()) {
    doubts_.erase(chunk);
    --verifying_;
    return;
  }
  if (++doubt.tries < options_.verify_tries) {
    resting_.emplace(now + options_.verify_pause, chunk);
    return;
  }
  const BlockMask unseen = every.without(doubt.equal) | doubt.differed;
  doubts_.erase(chunk);
  --verifying_;
  ++unverified_;
  if (!options_.mutation.forget_unseen)
    dirty(chunk, unseen);  // whatever it was, it is sent once more
}

void Arbiter::mark_sent(ChunkIndex chunk) {
  if (sent_.contains(chunk)) return;
  sent_.insert(chunk);
  if (chunk < verify_cursor_) ++passed_;
}

CopyTicket Arbiter::new_ticket(ChunkIndex chunk, const BlockMask& blocks) {
  const TicketId id = next_ticket_++;
  Copy copy;
  copy.chunk = chunk;
  copy.blocks = blocks;
  copy.first_unseen = next_piece_;
  copies_.emplace(id, std::move(copy));
  copying_.emplace(chunk, id);

  const Extent whole = chunk_extent(chunk);
  const Offset start = whole.offset + kBlock * blocks.first();
  const Offset end = std::min(whole.end(), whole.offset + kBlock * blocks.end());
  CopyTicket ticket;
  ticket.id = id;
  ticket.chunk = chunk;
  ticket.extent = {start, end - start};
  if (!blocks.covers(BlockMask::range(blocks.first(), blocks.end()))) {
    ticket.blocks = blocks.shifted_down(blocks.first());
  }
  ticket.lane = lane_of(chunk);
  ticket.fresh = !sent_.contains(chunk);
  ticket.wanted = bytes_of(chunk, blocks);
  return ticket;
}

bool Arbiter::copy_read(TicketId id, Actions& out) {
  const auto found = copies_.find(id);
  if (found == copies_.end()) return false;
  Copy& copy = found->second;
  CHECK(copy.state == CopyState::Reading, "a chunk is read once per ticket");
  copy.state = CopyState::Sending;
  mark_sent(copy.chunk);
  for (const PieceId piece : std::exchange(copy.waiting, {})) {
    const auto waiting = pieces_.find(piece);
    if (waiting == pieces_.end()) continue;  // given up meanwhile
    if (copy.redo.covers(blocks_of(waiting->second))) {
      finish_piece(piece, out);
    } else {
      forward(piece, out);
    }
  }
  return true;
}

void Arbiter::forget_copy(TicketId id, Actions& out) {
  const auto found = copies_.find(id);
  const Copy copy = std::move(found->second);
  copies_.erase(found);
  copying_.erase(copy.chunk);
  if (copy.verify != 0) {
    if (copy.verify == verify_pass_) due_.push_back(copy.chunk);  // that was no turn
  } else if (!options_.mutation.forget_ticket_mask) {
    dirty(copy.chunk, copy.blocks);
  }
  dirty(copy.chunk, copy.redo);
  if (!copy.redo.empty() || !copy.waiting.empty()) put_off(copy.chunk);
  for (const PieceId waiting : copy.waiting) {
    const auto piece = pieces_.find(waiting);
    if (piece == pieces_.end()) continue;  // given up meanwhile
    if (!options_.mutation.forget_waiting_mask) dirty(copy.chunk, blocks_of(piece->second));
    finish_piece(waiting, out);
  }
}

void Arbiter::copy_abandoned(TicketId id, Actions& out) {
  if (copies_.contains(id)) forget_copy(id, out);
}

void Arbiter::copy_acked(TicketId id) {
  const auto found = copies_.find(id);
  if (found == copies_.end()) return;
  CHECK(found->second.state == CopyState::Sending, "only what was sent is acknowledged");
  const Copy copy = std::move(found->second);
  copies_.erase(found);
  copying_.erase(copy.chunk);
  if (copy.verify == verify_pass_ && copy.verify != 0) {
    doubts_.erase(copy.chunk);
    --verifying_;
  } else if (copy.verify == 0) {
    acknowledged(copy.chunk, copy.blocks);
    compare_.erase(copy.chunk);
  }
  if (!options_.mutation.forget_redo) dirty(copy.chunk, copy.redo);
  if (!copy.redo.empty()) put_off(copy.chunk);
}

std::optional<Arbiter::Damage> Arbiter::copy_differs(TicketId id, BlockMask blocks, Instant now) {
  const auto found = copies_.find(id);
  if (found == copies_.end()) return std::nullopt;
  CHECK(found->second.state == CopyState::Sending, "only what was sent is answered");
  const bool compared = found->second.compare;
  if (compared ? options_.mutation.same_though_different : options_.mutation.forget_not_found) {
    copy_acked(id);
    return std::nullopt;
  }
  const Copy copy = std::move(found->second);
  copies_.erase(found);
  copying_.erase(copy.chunk);
  blocks = blocks & BlockMask::range(0, blocks_in(copy.chunk));
  if (blocks.empty()) blocks = copy.blocks;  // nonsense
  if (copy.verify == 0) {
    // What was written meanwhile is behind the frame on its lane, or to be copied again anyway.
    compare_.erase(copy.chunk);
    acknowledged(copy.chunk, copy.blocks);  // the others
    dirty(copy.chunk, blocks | copy.redo);
    if (!copy.redo.empty()) put_off(copy.chunk);
    return std::nullopt;
  }
  dirty(copy.chunk, copy.redo);
  if (!copy.redo.empty()) put_off(copy.chunk);
  if (copy.verify != verify_pass_) return std::nullopt;  // it has begun anew meanwhile
  Doubt& doubt = doubts_[copy.chunk];
  const BlockMask unexplained = blocks.without(copy.written);
  const BlockMask damaged =
      options_.mutation.damaged_at_once ? unexplained : unexplained & doubt.differed;
  doubt.differed = unexplained.without(damaged);
  doubt.equal = (doubt.equal | copy.blocks.without(blocks)).without(damaged);
  const bool again = !(damaged & doubt.mended).empty();
  doubt.mended |= damaged;
  dirty(copy.chunk, damaged);
  turn_is_over(copy.chunk, now);
  if (damaged.empty()) return std::nullopt;
  ++damaged_;
  const Extent whole = chunk_extent(copy.chunk);
  const Offset start = whole.offset + kBlock * damaged.first();
  return Damage{{start, std::min(whole.end(), whole.offset + kBlock * damaged.end()) - start}, again};
}

// That it differed may be because of what happened now.
void Arbiter::no_longer_in_doubt(ChunkIndex chunk, const BlockMask& blocks) {
  const auto doubt = doubts_.find(chunk);
  if (doubt != doubts_.end()) doubt->second.differed = doubt->second.differed.without(blocks);
}

void Arbiter::verify() {
  ++verify_pass_;
  verify_cursor_ = 0;
  passed_ = verifying_ = unverified_ = 0;
  doubts_.clear();
  resting_.clear();
  due_.clear();
  // The one under way, where that covers all: there may be no other.
  verify_after_ = unflushed_.count() > 0 ? flush_ + 1 : flushing_.count() > 0 ? flush_ : 0;
}

void Arbiter::scan_begin(Extent range) {
  const std::uint64_t size = options_.chunk_size.bytes();
  written_since_scan_.erase_range(range.offset.bytes() / size,
                                  (range.end().bytes() + size - 1) / size);
}

// [first, end) of those that lie in it.
std::pair<ChunkIndex, ChunkIndex> Arbiter::whole_chunks(Extent extent) const {
  const std::uint64_t size = options_.chunk_size.bytes();
  const bool to_the_end = extent.end() == Offset(options_.disk_size.bytes());
  return {(extent.offset.bytes() + size - 1) / size,
          to_the_end ? chunks_ : extent.end().bytes() / size};
}

void Arbiter::scan_hole(Extent hole) {
  const auto [first, end] = whole_chunks(hole);
  // From one chunk that is to be kept to the next: a large hole costs no more than a small one.
  for (ChunkIndex at = first; at < end;) {
    ChunkIndex kept = sent_.next(at, end).value_or(end);
    if (!options_.mutation.ignore_write_during_scan) {
      kept = written_since_scan_.next(at, kept).value_or(kept);
    }
    pending_.erase_range(at, kept);
    hot_.erase_range(at, kept);
    at = kept + 1;
  }
}

// --- the link ---

void Arbiter::piece_acked(PieceId id, Actions& out) {
  const auto found = pieces_.find(id);
  if (found == pieces_.end()) return;
  acknowledged(found->second.chunk, blocks_of(found->second));
  finish_piece(id, out);
}

void Arbiter::lane_lost(LaneIndex lane, Actions& out) {
  CHECK(lane < options_.lanes, "the lane exists");
  lane_down_[lane] = true;
  end_strict(out);
  std::vector<TicketId> lost_copies;
  for (const auto& [id, copy] : copies_) {
    if (lane_of(copy.chunk) == lane) lost_copies.push_back(id);
  }
  for (const TicketId id : lost_copies) {
    const ChunkIndex chunk = copies_.at(id).chunk;
    const bool sending = copies_.at(id).state == CopyState::Sending;
    forget_copy(id, out);
    if (sending && options_.mutation.keep_copied_on_loss) {
      pending_.erase(chunk);
      hot_.erase(chunk);
    }
  }
  std::vector<PieceId> lost_pieces;
  for (const auto& [id, piece] : pieces_) {
    if (piece.forwarded && lane_of(piece.chunk) == lane) lost_pieces.push_back(id);
  }
  for (const PieceId id : lost_pieces) {
    const Piece& piece = pieces_.at(id);
    if (!options_.mutation.keep_copied_on_loss) dirty(piece.chunk, blocks_of(piece));
    put_off(piece.chunk);
    finish_piece(id, out);
  }
}

void Arbiter::lane_up(LaneIndex lane) {
  CHECK(lane < options_.lanes, "the lane exists");
  lane_down_[lane] = false;
}

// --- time ---

std::optional<Instant> Arbiter::next_deadline() const {
  if (strict_) {
    if (waiting_.empty() || options_.mutation.wait_past_limit) return std::nullopt;
    return writes_.at(waiting_.front()).arrived + options_.max_strict_wait;
  }
  std::optional<Instant> first;
  if (!pieces_.empty()) first = pieces_.begin()->second.arrived + options_.max_lag;
  if (!resting_.empty()) first = std::min(first.value_or(Instant::max()), resting_.begin()->first);
  return first;
}

void Arbiter::tick(Instant now, Actions& out) {
  while (true) {
    const std::optional<Instant> deadline = next_deadline();
    if (!deadline || *deadline > now) return;
    if (strict_) {
      end_strict(out);
    } else if (!resting_.empty() && resting_.begin()->first <= now) {
      due_.push_back(resting_.begin()->second);
      resting_.erase(resting_.begin());
    } else {
      give_up(pieces_.begin()->first, out);
    }
  }
}

void Arbiter::shed(Actions& out) {
  while (!strict_ && !pieces_.empty()) give_up(pieces_.begin()->first, out);
}

void Arbiter::give_up(PieceId id, Actions& out) {
  const Piece& piece = pieces_.at(id);
  const Copy* const copy = copy_of(piece.chunk);
  BlockMask missed = blocks_of(piece);
  if (copy != nullptr && id < copy->first_unseen) {
    // The copy's read saw it, in the blocks that it reads; a comparison brings nothing there.
    const bool brings = !copy->compare || options_.mutation.compare_trusted;
    if (brings) missed = options_.mutation.trust_partial_read ? BlockMask() : missed.without(copy->blocks);
  }
  if (!options_.mutation.drop_expired) dirty(piece.chunk, missed);
  put_off(piece.chunk);
  if (piece.forwarded) {
    out.push_back({.kind = Action::Kind::Abandon,
                   .write = piece.write,
                   .piece = id,
                   .extent = piece.extent,
                   .lane = lane_of(piece.chunk)});
  }
  ++expired_;
  finish_piece(id, out);
}

// --- the handover ---

bool Arbiter::enter_strict() {
  if (std::ranges::any_of(lane_down_, [](bool down) { return down; })) return false;
  strict_ = true;
  return true;
}

void Arbiter::leave_strict(Actions& out) { end_strict(out); }

void Arbiter::end_strict(Actions& out) {
  if (!std::exchange(strict_, false)) return;
  for (const WriteId write : std::exchange(waiting_, {})) {
    writes_.at(write).acknowledged = true;
    out.push_back({.kind = Action::Kind::Acknowledge, .write = write});
  }
}

void Arbiter::mark_pending(Extent range) {
  CHECK(range.end() <= Offset(options_.disk_size.bytes()), "only what is on the disk is marked");
  for (Offset at = range.offset; at < range.end();) {
    const ChunkIndex chunk = at.bytes() / options_.chunk_size.bytes();
    const ChunkIndex whole_end = range.end() == Offset(options_.disk_size.bytes())
                                     ? chunks_
                                     : range.end().bytes() / options_.chunk_size.bytes();
    if (at == chunk_extent(chunk).offset && chunk < whole_end) {
      mark_chunks(chunk, whole_end);
      at = chunk_extent(whole_end - 1).end();
      continue;
    }
    const Offset end = std::min(range.end(), chunk_extent(chunk).end());
    written_since_scan_.insert(chunk);
    dirty(chunk, blocks_of({.chunk = chunk, .extent = {at, end - at}}));
    at = end;
  }
}

// Whole ones, [first, end): of a disk without a bitmap these are many.
void Arbiter::mark_chunks(ChunkIndex first, ChunkIndex end) {
  written_since_scan_.insert_range(first, end);
  changed_.insert_range(first / kGroupChunks, (end + kGroupChunks - 1) / kGroupChunks);
  pending_.add_range(first, end);
  for (auto doubt = doubts_.lower_bound(first); doubt != doubts_.end() && doubt->first < end;
       ++doubt) {
    doubt->second.differed = {};
  }
  for (auto& [id, copy] : copies_) {
    if (copy.chunk < first || copy.chunk >= end) continue;
    pending_.erase(copy.chunk);
    hot_.erase(copy.chunk);
    copy.redo = BlockMask::all();
  }
}

// --- what is on stable storage ---

void Arbiter::acknowledged(ChunkIndex chunk, const BlockMask& blocks) {
  changed(chunk);
  unflushed_.add(chunk, blocks);
  unflushed_bytes_ += bytes_of(chunk, blocks);
}

FlushId Arbiter::flush_begin() {
  if (flushing_.count() == 0) {
    std::swap(flushing_, unflushed_);
  } else {
    for (auto chunk = unflushed_.next(0); chunk; chunk = unflushed_.next(*chunk + 1)) {
      flushing_.add(*chunk, unflushed_.blocks(*chunk));
    }
    unflushed_.clear();
  }
  flushing_bytes_ += std::exchange(unflushed_bytes_, Length());
  return ++flush_;
}

void Arbiter::flush_done(FlushId id) {
  if (id != flush_) return;
  flushed_ = id;
  changed(flushing_);
  flushing_.clear();
  flushing_bytes_ = Length();
  if (options_.mutation.flush_covers_all) unflushed_.clear();
}

void Arbiter::flush_failed(FlushId id) {
  if (id != flush_) return;
  ++flush_;
  unflushed_bytes_ += std::exchange(flushing_bytes_, Length());
}

void Arbiter::target_lost_unflushed() {
  ++flush_;  // one that is under way says nothing any more
  for (BlockSet* const lost : {&unflushed_, &flushing_}) {
    for (auto chunk = lost->next(0); chunk && !options_.mutation.forget_unflushed;
         chunk = lost->next(*chunk + 1)) {
      dirty(*chunk, lost->blocks(*chunk));
    }
    lost->clear();
  }
  unflushed_bytes_ = flushing_bytes_ = Length();
}

// --- records ---

GroupIndex Arbiter::groups() const { return changed_.size(); }

// By chunk, the blocks of which something is on its way.
std::unordered_map<ChunkIndex, BlockMask> Arbiter::in_flight() const {
  std::unordered_map<ChunkIndex, BlockMask> blocks;  // look-ups only
  for (const auto& [id, copy] : copies_) {
    blocks[copy.chunk] |= copy.verify != 0 ? copy.redo : copy.blocks | copy.redo;
  }
  for (const auto& [id, piece] : pieces_) blocks[piece.chunk] |= blocks_of(piece);
  if (options_.mutation.record_in_flight_as_copied) blocks.clear();
  return blocks;
}

std::string Arbiter::record(GroupIndex group,
                            const std::unordered_map<ChunkIndex, BlockMask>& in_flight) {
  const ChunkIndex first = group * kGroupChunks;
  std::vector<ChunkRecord> chunks(std::min(kGroupChunks, chunks_ - first));
  for (std::uint64_t i = 0; i < chunks.size(); ++i) {
    const ChunkIndex chunk = first + i;
    if (!touched_.contains(chunk)) continue;
    ChunkRecord& out = chunks[i];
    out.touched = true;
    // It was a hole, or was not sent yet; when this record is read it may have been.
    if (!sent_.contains(chunk)) {
      out.pending = BlockMask::all();
      continue;
    }
    out.pending = pending_.blocks(chunk);
    if (const auto found = in_flight.find(chunk); found != in_flight.end()) {
      out.pending |= found->second;
    }
    const BlockMask every = BlockMask::range(0, blocks_in(chunk));
    if (out.pending.covers(every)) out.pending = BlockMask::all();
    if (options_.mutation.record_unflushed_as_durable) continue;
    out.unflushed = unflushed_.blocks(chunk) | flushing_.blocks(chunk);
    if (out.unflushed.covers(every)) out.unflushed = BlockMask::all();
  }
  changed_.erase(group);
  return encode_group({group, options_.disk_size, options_.chunk_size}, chunks);
}

GroupRecord Arbiter::take_record(GroupIndex group) {
  CHECK(group < groups(), "the group exists");
  return {group, record(group, in_flight()), ++taken_};
}

Arbiter::Records Arbiter::take_records(GroupIndex first, std::size_t most) {
  Records taken;
  std::optional<std::unordered_map<ChunkIndex, BlockMask>> on_the_way;
  for (auto group = changed_.next(first); group; group = changed_.next(*group + 1)) {
    if (!touched_.next(*group * kGroupChunks, std::min(chunks_, (*group + 1) * kGroupChunks))) continue;
    if (taken.records.size() == most) {
      taken.next = *group;
      break;
    }
    if (!on_the_way) on_the_way = in_flight();
    taken.records.push_back({*group, record(*group, *on_the_way), ++taken_});
  }
  return taken;
}

Status Arbiter::restore(GroupIndex group, std::string_view bytes, bool unflushed_lost) {
  CHECK(group < groups(), "the group exists");
  CHECK(pieces_.empty() && copies_.empty(), "an arbiter is restored before anything happens");
  const ChunkIndex first = group * kGroupChunks;
  const ChunkIndex end = std::min(chunks_, first + kGroupChunks);
  auto chunks = decode_group({group, options_.disk_size, options_.chunk_size}, bytes);
  if (!chunks) {
    know_nothing(first, end);
    return fail(std::move(chunks.error()));
  }
  for (std::uint64_t i = 0; i < chunks->size(); ++i) {
    ChunkRecord& chunk = (*chunks)[i];
    if (!chunk.touched) continue;
    touched_.insert(first + i);
    if (!options_.mutation.restore_as_fresh) mark_sent(first + i);
    pending_.erase(first + i);
    if (unflushed_lost && !chunk.unflushed.empty()) {
      changed(first + i);
      if (!options_.mutation.forget_unflushed) chunk.pending |= chunk.unflushed;
      chunk.unflushed = {};
    }
    pending_.add(first + i, chunk.pending);
    // Sent or not: the record does not know.
    if (chunk.pending == BlockMask::all()) compare_.insert(first + i);
    unflushed_.add(first + i, chunk.unflushed);
    unflushed_bytes_ += bytes_of(first + i, chunk.unflushed);
  }
  return {};
}

void Arbiter::restore_nothing() {
  CHECK(pieces_.empty() && copies_.empty(), "an arbiter is restored before anything happens");
  for (ChunkIndex first = 0; first < chunks_; first += kGroupChunks) {
    know_nothing(first, std::min(chunks_, first + kGroupChunks));
  }
}

void Arbiter::restore_hole(Extent hole) {
  CHECK(pieces_.empty() && copies_.empty(), "an arbiter is restored before anything happens");
  const auto [first, end] = whole_chunks(hole);
  if (first >= end) return;
  // That their records say otherwise costs a comparison at worst.
  pending_.add_range(first, end);
  sent_.erase_range(first, end);
  compare_.erase_range(first, end);
  passed_ = sent_.count();
}

// The chunks of one group.
void Arbiter::know_nothing(ChunkIndex first, ChunkIndex end) {
  pending_.add_range(first, end);
  sent_.insert_range(first, end);
  passed_ = sent_.count();
  compare_.insert_range(first, end);
  touched_.insert_range(first, end);
  changed(first);
}

// --- what is known ---

Arbiter::Summary Arbiter::summary() const {
  Summary summary;
  summary.chunks = chunks_;
  summary.pending = pending_.count();
  summary.copying = copies_.size();
  summary.waiting = waiting_.size();
  summary.on_the_way = pieces_.size();
  summary.expired = expired_;
  summary.to_verify = sent_.count() - passed_ + verifying_;
  summary.damaged = damaged_;
  summary.unverified = unverified_;
  summary.left = options_.chunk_size * (pending_.count() - pending_.masks()) +
                 kBlock * pending_.masked_blocks();
  const ChunkIndex last = chunks_ - 1;
  if (pending_.contains(last)) {
    const BlockMask blocks = pending_.blocks(last);
    const Length counted = pending_.has_mask(last) ? kBlock * blocks.count() : options_.chunk_size;
    summary.left -= counted - bytes_of(last, blocks);
  }
  for (const auto& [id, copy] : copies_) {
    summary.left += bytes_of(copy.chunk, copy.verify != 0 ? copy.redo : copy.blocks | copy.redo);
  }
  summary.copied = options_.disk_size - summary.left;
  return summary;
}

bool Arbiter::synchronised() const {
  const bool arrived = pieces_.empty() || options_.mutation.forget_on_the_way;
  return pending_.count() == 0 && copies_.empty() && waiting_.empty() && arrived;
}

bool Arbiter::is_copied(ChunkIndex chunk) const {
  return !pending_.contains(chunk) && !copying_.contains(chunk);
}

}  // namespace drover::mirror
