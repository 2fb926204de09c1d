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
  const bool fresh_id = writes_.emplace(id, Write()).second;
  CHECK(fresh_id, "a write's id is new");
  // In strict mode a write waits when too much is on its way.
  const bool wait_for_target = strict_ && kind != WriteKind::Discard &&
                               bytes_on_the_way_ + extent.length > options_.strict_window;
  begin_part(id);  // held until all parts are taken
  if (wait_for_target) waiting_.push_back(id);
  writes_.at(id).acknowledged = !wait_for_target;
  writes_.at(id).arrived = now;
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
  if (pending_.contains(piece.chunk)) return skip_part(piece.write, out);
  if (piece.kind == WriteKind::Discard && !options_.mutation.repeat_discard) {
    return take_discard(piece, out);
  }
  Copy* const copy = copy_of(piece.chunk);
  if (copy != nullptr && copy->redo) return skip_part(piece.write, out);
  const bool lane_down = lane_down_[lane_of(piece.chunk)];
  const bool too_much =
      !strict_ && bytes_on_the_way_ + piece.extent.length > options_.max_forwarded;
  if (lane_down || too_much) {
    if (copy != nullptr) {
      copy->redo = true;
    } else {
      pending_.insert(piece.chunk);
    }
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

void Arbiter::take_discard(const Piece& piece, Actions& out) {
  if (Copy* const copy = copy_of(piece.chunk); copy != nullptr) {
    copy->redo = true;
  } else {
    pending_.insert(piece.chunk);
  }
  skip_part(piece.write, out);
}

PieceId Arbiter::wait(const Piece& piece) {
  const PieceId id = next_piece_++;
  pieces_.emplace_hint(pieces_.end(), id, piece);
  bytes_on_the_way_ += piece.extent.length;
  return id;
}

void Arbiter::forward(PieceId id, Actions& out) {
  Piece& piece = pieces_.at(id);
  piece.forwarded = true;
  sent_.insert(piece.chunk);
  LaneIndex lane = lane_of(piece.chunk);
  if (options_.mutation.wrong_lane) lane = (lane + 1) % options_.lanes;
  out.push_back({Action::Kind::Forward, piece.write, id, piece.extent, lane});
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

void Arbiter::finish_pieces(const std::vector<PieceId>& ids, Actions& out) {
  for (const PieceId id : ids) {
    if (pieces_.contains(id)) finish_piece(id, out);
  }
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
    if (!pieces_.contains(piece)) continue;  // given up meanwhile
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
}

void Arbiter::copy_abandoned(TicketId id, Actions& out) {
  if (copies_.contains(id)) forget_copy(id, out);
}

void Arbiter::copy_acked(TicketId id) {
  const auto found = copies_.find(id);
  if (found == copies_.end()) return;
  CHECK(found->second.state == CopyState::Sending, "only what was sent is acknowledged");
  const ChunkIndex chunk = found->second.chunk;
  const bool redo = found->second.redo;
  copies_.erase(found);
  copying_.erase(chunk);
  if (redo && !options_.mutation.forget_redo) pending_.insert(chunk);
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
    if (!written && !sent_.contains(*chunk)) {
      pending_.erase(*chunk);
    }
  }
}

// --- the link ---

void Arbiter::piece_acked(PieceId id, Actions& out) {
  if (pieces_.contains(id)) finish_piece(id, out);
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
  if (strict_) {
    if (waiting_.empty()) return std::nullopt;
    return writes_.at(waiting_.front()).arrived + options_.max_strict_wait;
  }
  if (pieces_.empty()) return std::nullopt;
  return pieces_.begin()->second.arrived + options_.max_lag;
}

void Arbiter::tick(Instant now, Actions& out) {
  while (true) {
    const std::optional<Instant> deadline = next_deadline();
    if (!deadline || *deadline > now) return;
    if (strict_) {
      end_strict(out);
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

void Arbiter::leave_strict(Actions& out) { end_strict(out); }

void Arbiter::end_strict(Actions& out) {
  if (!std::exchange(strict_, false)) return;
  for (const WriteId write : std::exchange(waiting_, {})) {
    writes_.at(write).acknowledged = true;
    out.push_back({.kind = Action::Kind::Acknowledge, .write = write});
  }
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
  summary.waiting = waiting_.size();
  summary.on_the_way = pieces_.size();
  summary.expired = expired_;
  const std::uint64_t copied = chunks_ - pending_.count() - copies_.size();
  summary.copied = options_.chunk_size * copied;
  if (is_copied(chunks_ - 1)) {
    summary.copied -= options_.chunk_size - chunk_extent(chunks_ - 1).length;
  }
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
