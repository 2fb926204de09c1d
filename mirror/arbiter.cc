// SPDX-License-Identifier: Apache-2.0
#include "mirror/arbiter.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace drover::mirror {

Arbiter::Arbiter(const Options& options)
    : options_(options),
      chunks_((options.disk_size.bytes() + options.chunk_size.bytes() - 1) /
              options.chunk_size.bytes()),
      pending_(chunks_, true),
      written_since_scan_(chunks_),
      sent_(chunks_),
      lane_down_(options.lanes, false) {
  CHECK(options.disk_size.bytes() > 0, "a disk has at least one byte");
  CHECK(options.chunk_size.bytes() > 0 && options.lanes > 0, "chunks and lanes exist");
}

LaneIndex Arbiter::lane_of(ChunkIndex chunk) const {
  return static_cast<LaneIndex>((chunk + options_.first_lane) % options_.lanes);
}

Extent Arbiter::chunk_extent(ChunkIndex chunk) const {
  const Offset start(chunk * options_.chunk_size.bytes());
  return {start, std::min(options_.chunk_size, options_.disk_size - Length(start.bytes()))};
}

Arbiter::Copy* Arbiter::copy_of(ChunkIndex chunk) {
  const auto found = copying_.find(chunk);
  return found == copying_.end() ? nullptr : &copies_.at(found->second);
}

// --- the guest ---

void Arbiter::guest_write(WriteId id, WriteKind kind, Extent extent, Instant now, Actions& out) {
  CHECK(extent.length.bytes() > 0 && extent.end() <= Offset(options_.disk_size.bytes()),
        "the NBD server lets only extents of the disk through");
  const bool fresh_id = writes_.emplace(id, 1).second;  // one part held until all are taken
  CHECK(fresh_id, "a write's id is new");
  for (Offset at = extent.offset; at < extent.end();) {
    const ChunkIndex chunk = at.bytes() / options_.chunk_size.bytes();
    const Offset end = std::min(extent.end(), chunk_extent(chunk).end());
    ++writes_.at(id);
    take_piece(Piece{id, chunk, kind, Extent{at, end - at}, false, now}, out);
    at = end;
  }
  finish_write_part(id, out);
}

void Arbiter::take_piece(const Piece& piece, Actions& out) {
  written_since_scan_.insert(piece.chunk);
  if (pending_.contains(piece.chunk)) return finish_write_part(piece.write, out);
  if (piece.kind == WriteKind::Discard && !options_.mutation.repeat_discard) {
    return take_discard(piece, out);
  }
  Copy* const copy = copy_of(piece.chunk);
  if (copy != nullptr && copy->redo) return finish_write_part(piece.write, out);
  if (copy != nullptr && copy->state == CopyState::Reading &&
      !options_.mutation.forward_during_read) {
    copy->waiting.push_back(wait(piece));
    return;
  }
  const bool lane_down = lane_down_[lane_of(piece.chunk)];
  const bool too_much = !strict_ && forwarded_bytes_ + piece.extent.length > options_.max_forwarded;
  if (lane_down || too_much) {
    if (copy != nullptr) {
      copy->redo = true;
    } else {
      pending_.insert(piece.chunk);
    }
    ++expired_;
    return finish_write_part(piece.write, out);
  }
  forward(wait(piece), out);
}

void Arbiter::take_discard(const Piece& piece, Actions& out) {
  Copy* const copy = copy_of(piece.chunk);
  if (copy != nullptr) {
    copy->redo = true;
    if (strict_) return copy->discards.push_back(wait(piece));
  } else {
    pending_.insert(piece.chunk);
    if (strict_) return pending_discards_[piece.chunk].push_back(wait(piece));
  }
  finish_write_part(piece.write, out);
}

PieceId Arbiter::wait(const Piece& piece) {
  const PieceId id = next_piece_++;
  pieces_.emplace_hint(pieces_.end(), id, piece);
  return id;
}

void Arbiter::forward(PieceId id, Actions& out) {
  Piece& piece = pieces_.at(id);
  piece.forwarded = true;
  sent_.insert(piece.chunk);
  forwarded_bytes_ += piece.extent.length;
  ++forwarded_;
  LaneIndex lane = lane_of(piece.chunk);
  if (options_.mutation.wrong_lane) lane = (lane + 1) % options_.lanes;
  out.push_back({Action::Kind::Forward, piece.write, id, piece.extent, lane});
}

void Arbiter::finish_piece(PieceId id, Actions& out) {
  const auto found = pieces_.find(id);
  CHECK(found != pieces_.end(), "only waiting pieces finish");
  if (found->second.forwarded) {
    forwarded_bytes_ -= found->second.extent.length;
    --forwarded_;
  }
  const WriteId write = found->second.write;
  pieces_.erase(found);
  finish_write_part(write, out);
}

void Arbiter::finish_pieces(const std::vector<PieceId>& ids, Actions& out) {
  for (const PieceId id : ids) {
    if (pieces_.contains(id)) finish_piece(id, out);
  }
}

void Arbiter::finish_write_part(WriteId write, Actions& out) {
  const auto found = writes_.find(write);
  CHECK(found != writes_.end(), "a write is acknowledged once");
  if (--found->second > 0) return;
  writes_.erase(found);
  out.push_back({.kind = Action::Kind::Acknowledge, .write = write});
}

// --- the copier ---

std::optional<CopyTicket> Arbiter::start_copy() {
  ChunkIndex from = cursor_;
  bool wrapped = false;
  while (true) {
    const std::optional<ChunkIndex> chunk = pending_.next(from);
    if (!chunk || (wrapped && *chunk >= cursor_)) {
      if (wrapped || cursor_ == 0) return std::nullopt;
      wrapped = true;
      from = 0;
      continue;
    }
    if (lane_down_[lane_of(*chunk)]) {
      // With every lane down there is nothing to find in a long bitmap.
      if (std::ranges::all_of(lane_down_, [](bool down) { return down; })) return std::nullopt;
      from = *chunk + 1;
      continue;
    }
    cursor_ = *chunk + 1 < chunks_ ? *chunk + 1 : 0;
    pending_.erase(*chunk);
    const TicketId id = next_ticket_++;
    Copy copy;
    copy.chunk = *chunk;
    copy.first_unseen = next_piece_;
    if (const auto discards = pending_discards_.find(*chunk); discards != pending_discards_.end()) {
      copy.covered = std::move(discards->second);
      pending_discards_.erase(discards);
    }
    copies_.emplace(id, std::move(copy));
    copying_.emplace(*chunk, id);
    return CopyTicket{id, *chunk, chunk_extent(*chunk), lane_of(*chunk), !sent_.contains(*chunk)};
  }
}

bool Arbiter::copy_read(TicketId id, Actions& out) {
  const auto found = copies_.find(id);
  if (found == copies_.end()) return false;
  Copy& copy = found->second;
  CHECK(copy.state == CopyState::Reading, "a chunk is read once per ticket");
  copy.state = CopyState::Sending;
  sent_.insert(copy.chunk);
  for (const PieceId piece : std::exchange(copy.waiting, {})) {
    if (!pieces_.contains(piece)) continue;  // expired meanwhile
    if (copy.redo) {
      finish_piece(piece, out);
    } else {
      forward(piece, out);
    }
  }
  return true;
}

void Arbiter::forget_copy(TicketId id, Actions& out) {
  const auto found = copies_.find(id);
  Copy copy = std::move(found->second);
  copies_.erase(found);
  copying_.erase(copy.chunk);
  pending_.insert(copy.chunk);
  finish_pieces(copy.waiting, out);
  std::vector<PieceId> discards = std::move(copy.covered);
  discards.insert(discards.end(), copy.discards.begin(), copy.discards.end());
  if (!discards.empty()) pending_discards_[copy.chunk] = std::move(discards);
}

void Arbiter::copy_abandoned(TicketId id, Actions& out) {
  if (copies_.contains(id)) forget_copy(id, out);
}

void Arbiter::copy_acked(TicketId id, Actions& out) {
  const auto found = copies_.find(id);
  if (found == copies_.end()) return;
  CHECK(found->second.state == CopyState::Sending, "only what was sent is acknowledged");
  const Copy copy = std::move(found->second);
  copies_.erase(found);
  copying_.erase(copy.chunk);
  if (copy.redo && !options_.mutation.forget_redo) {
    pending_.insert(copy.chunk);
    if (!copy.discards.empty()) pending_discards_[copy.chunk] = copy.discards;
  } else {
    finish_pieces(copy.discards, out);
  }
  finish_pieces(copy.covered, out);
}

void Arbiter::scan_begin(Extent range) {
  const std::uint64_t size = options_.chunk_size.bytes();
  written_since_scan_.erase_range(range.offset.bytes() / size,
                                  (range.end().bytes() + size - 1) / size);
}

void Arbiter::scan_hole(Extent hole) {
  const std::uint64_t size = options_.chunk_size.bytes();
  const ChunkIndex first = (hole.offset.bytes() + size - 1) / size;
  const ChunkIndex end = hole.end() == Offset(options_.disk_size.bytes())
                             ? chunks_
                             : hole.end().bytes() / size;
  for (auto chunk = pending_.next(first); chunk && *chunk < end; chunk = pending_.next(*chunk + 1)) {
    const bool written = written_since_scan_.contains(*chunk) &&
                         !options_.mutation.ignore_write_during_scan;
    if (!written && !sent_.contains(*chunk) && !pending_discards_.contains(*chunk)) {
      pending_.erase(*chunk);
    }
  }
}

// --- the link ---

void Arbiter::piece_acked(PieceId id, Actions& out) {
  if (pieces_.contains(id)) finish_piece(id, out);
}

void Arbiter::lane_lost(LaneIndex lane, Instant now, Actions& out) {
  CHECK(lane < options_.lanes, "the lane exists");
  lane_down_[lane] = true;
  end_strict(now, out);
  std::vector<TicketId> lost_copies;
  for (const auto& [id, copy] : copies_) {
    if (lane_of(copy.chunk) == lane) lost_copies.push_back(id);
  }
  for (const TicketId id : lost_copies) {
    const ChunkIndex chunk = copies_.at(id).chunk;
    const bool sending = copies_.at(id).state == CopyState::Sending;
    forget_copy(id, out);
    if (sending && options_.mutation.keep_copied_on_loss) pending_.erase(chunk);
  }
  std::vector<PieceId> lost_pieces;
  for (const auto& [id, piece] : pieces_) {
    if (piece.forwarded && lane_of(piece.chunk) == lane) lost_pieces.push_back(id);
  }
  for (const PieceId id : lost_pieces) {
    if (!options_.mutation.keep_copied_on_loss) pending_.insert(pieces_.at(id).chunk);
    finish_piece(id, out);
  }
}

void Arbiter::lane_up(LaneIndex lane) {
  CHECK(lane < options_.lanes, "the lane exists");
  lane_down_[lane] = false;
}

// --- time ---

std::optional<Instant> Arbiter::next_deadline() const {
  if (strict_ || pieces_.empty()) return std::nullopt;
  return pieces_.begin()->second.arrived + options_.guest_delay;
}

void Arbiter::tick(Instant now, Actions& out) {
  while (true) {
    const std::optional<Instant> deadline = next_deadline();
    if (!deadline || *deadline > now) return;
    expire(pieces_.begin()->first, out);
  }
}

void Arbiter::expire(PieceId id, Actions& out) {
  const Piece& piece = pieces_.at(id);
  Copy* const copy = copy_of(piece.chunk);
  if (copy == nullptr) {
    if (!options_.mutation.drop_expired) pending_.insert(piece.chunk);
  } else if (id >= copy->first_unseen && !options_.mutation.drop_expired) {
    copy->redo = true;
  }
  if (piece.forwarded) {
    out.push_back({Action::Kind::Abandon, piece.write, id, piece.extent, lane_of(piece.chunk)});
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

void Arbiter::leave_strict(Instant now, Actions& out) { end_strict(now, out); }

void Arbiter::end_strict(Instant now, Actions& out) {
  if (!std::exchange(strict_, false)) return;
  // Discards wait only in strict mode: their chunks are Pending, or will be.
  for (const auto& [chunk, discards] : std::exchange(pending_discards_, {})) {
    finish_pieces(discards, out);
  }
  for (auto& [id, copy] : copies_) {
    finish_pieces(std::exchange(copy.covered, {}), out);
    finish_pieces(std::exchange(copy.discards, {}), out);
  }
  for (auto& [id, piece] : pieces_) piece.arrived = now;
}

void Arbiter::mark_pending(Extent range) {
  const std::uint64_t size = options_.chunk_size.bytes();
  const ChunkIndex first = range.offset.bytes() / size;
  const ChunkIndex end = (range.end().bytes() + size - 1) / size;
  pending_.insert_range(first, end);
  for (auto& [id, copy] : copies_) {
    if (copy.chunk < first || copy.chunk >= end) continue;
    pending_.erase(copy.chunk);
    copy.redo = true;
  }
}

// --- what is known ---

Arbiter::Summary Arbiter::summary() const {
  Summary summary;
  summary.chunks = chunks_;
  summary.pending = pending_.count();
  summary.copying = copies_.size();
  summary.waiting = writes_.size();
  summary.forwarded = forwarded_;
  summary.expired = expired_;
  const std::uint64_t copied = chunks_ - pending_.count() - copies_.size();
  summary.copied = options_.chunk_size * copied;
  if (is_copied(chunks_ - 1)) {
    summary.copied -= options_.chunk_size - chunk_extent(chunks_ - 1).length;
  }
  return summary;
}

bool Arbiter::synchronised() const {
  return pending_.count() == 0 && copies_.empty() && writes_.empty();
}

bool Arbiter::is_copied(ChunkIndex chunk) const {
  return !pending_.contains(chunk) && !copying_.contains(chunk);
}

}  // namespace drover::mirror
