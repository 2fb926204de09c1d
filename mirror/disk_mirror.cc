// SPDX-License-Identifier: Apache-2.0
#include "mirror/disk_mirror.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"

namespace drover::mirror {

namespace {

// A frame's token says what it carried: a copy's ticket or a write's piece.
std::uint64_t copy_token(TicketId ticket) { return ticket << 1; }
std::uint64_t piece_token(PieceId piece) { return piece << 1 | 1; }
bool is_piece(std::uint64_t token) { return (token & 1) != 0; }

WriteKind write_kind(NbdRequest::Kind kind) {
  switch (kind) {
    case NbdRequest::Kind::Write: return WriteKind::Data;
    case NbdRequest::Kind::Zero: return WriteKind::Zero;
    case NbdRequest::Kind::Discard: return WriteKind::Discard;
    case NbdRequest::Kind::Flush: break;
  }
  CHECK(false, "a flush changes nothing");
}

}  // namespace

DiskMirror::DiskMirror(const Options& options, blockcopy::ImageReader& reader, Lanes& lanes,
                       BufferPool& copy_buffers, Events events)
    : options_(options),
      reader_(reader),
      lanes_(lanes),
      copy_buffers_(copy_buffers),
      events_(std::move(events)),
      arbiter_(options.arbiter) {
  CHECK(copy_buffers.buffer_size() >= options.arbiter.chunk_size, "a chunk fits a buffer");
  CHECK(reader.size() == options.arbiter.disk_size, "the reader is this disk's");
}

DiskMirror::~DiskMirror() { CHECK(idle(), "a mirror is drained before it goes"); }

void DiskMirror::start() {
  CHECK(!started_, "a mirror starts once");
  started_ = true;
  if (options_.target_initially_zero) return scan_from(Offset(0));
  events_.changed();
}

void DiskMirror::scan_from(Offset at) {
  // NBD answers for 4 GiB at most: so that each question costs what it may bring, not what is left.
  constexpr Length kAhead = Length(std::uint64_t{1} << 40);
  const Length rest = Offset(options_.arbiter.disk_size.bytes()) - at;
  const Extent range{at, std::min(rest, kAhead)};
  scanning_ = true;
  arbiter_.scan_begin(range);
  reader_.extents(range, [this, at](Result<std::vector<blockcopy::MappedExtent>> result) {
    on_extents(at, std::move(result));
  });
}

void DiskMirror::on_extents(Offset at, Result<std::vector<blockcopy::MappedExtent>> result) {
  scanning_ = false;
  if (stopped_) return events_.changed();
  // Not knowing the holes costs time, not correctness: everything is read then.
  if (!result || result->empty()) return events_.changed();
  for (const blockcopy::MappedExtent& run : *result) {
    CHECK(run.extent.offset == at, "extents come without gaps");
    if (!run.data) arbiter_.scan_hole(run.extent);
    at = run.extent.end();
  }
  if (at < Offset(options_.arbiter.disk_size.bytes())) return scan_from(at);
  events_.changed();
}

std::optional<DiskMirror::Cost> DiskMirror::start_copy() {
  if (!started_ || scanning_ || stopped_ || mute_ || !arbiter_.wants_copy()) return std::nullopt;
  if (arbiter_.copying() >= options_.max_copies) return std::nullopt;
  Buffer buffer = copy_buffers_.try_take();
  if (!buffer) return std::nullopt;
  const std::optional<CopyTicket> ticket = arbiter_.start_copy(events_.now());
  if (!ticket) return std::nullopt;
  if (ticket->touches) touch(*ticket->touches);
  if (mute_) {
    arbiter_.copy_abandoned(ticket->id, actions_);
    carry_out();
    return std::nullopt;
  }
  const std::uint64_t blocks = (ticket->extent.length + kBlock - Length(1)) / kBlock;
  const Length sent = ticket->compare ? Length(blocks * kHashSize) : ticket->wanted;
  return Cost{.sent = sent, .read = read(*ticket, std::move(buffer)), .compares = ticket->compare};
}

// Reads what is wanted of the ticket's extent; what lies between is read over where it is little.
// How much that is.
Length DiskMirror::read(const CopyTicket& ticket, Buffer buffer) {
  constexpr std::size_t kReadOver = 16;  // blocks: 64 KiB cost about as much as another request
  ++reads_;
  auto read = std::make_shared<Read>(Read{ticket, std::move(buffer), 1, {}});
  const auto done = [this, read](Status status) {
    if (!status && read->status) read->status = std::move(status);
    if (--read->outstanding == 0) on_read(*read);
  };
  const std::size_t blocks = (ticket.extent.length + kBlock - Length(1)) / kBlock;
  Length total;
  for (std::size_t first = 0; first < blocks;) {
    std::size_t end = first + 1;
    for (std::size_t at = end; at < blocks && at - end <= kReadOver; ++at) {
      if (ticket.blocks.contains(at)) end = at + 1;
    }
    const Offset start = ticket.extent.offset + kBlock * first;
    const Length length = std::min(ticket.extent.end(), start + kBlock * (end - first)) - start;
    total += length;
    ++read->outstanding;
    reader_.read(start, read->buffer.bytes().subspan(kBlock.bytes() * first, length.bytes()), done);
    for (first = end; first < blocks && !ticket.blocks.contains(first);) ++first;
  }
  --read->outstanding;  // callbacks never run inside read(): some are outstanding still
  counters_.read_bytes += total;
  return total;
}

void DiskMirror::on_read(Read& read) {
  --reads_;
  if (stopped_) events_.changed();  // whatever becomes of it, somebody may be waiting for its end
  const CopyTicket& ticket = read.ticket;
  if (!read.status || mute_) {
    arbiter_.copy_abandoned(ticket.id, actions_);
    carry_out();
    if (!read.status && !stopped_) events_.failed(read.status.error());
    return;
  }
  // The chunk's frame goes first, then what waited for it. Nothing is being carried out here: reads
  // complete on their own.
  if (!arbiter_.copy_read(ticket.id, actions_)) return;
  OutFrame frame;
  if (ticket.compare) {
    counters_.compared += ticket.wanted;
    frame.type = FrameType::Compare;
  } else {
    ++counters_.copies;
    if (!ticket.fresh) counters_.sent_again += ticket.wanted;
    frame.type = FrameType::Copy;
  }
  frame.disk = options_.disk;
  frame.extent = ticket.extent;
  frame.fresh = ticket.fresh && !ticket.compare && options_.target_initially_zero;
  frame.blocks = ticket.blocks;
  frame.content = read.buffer.bytes().first(ticket.extent.length.bytes());
  frame.buffer = std::move(read.buffer);
  frame.token = copy_token(ticket.id);
  lanes_.send(ticket.lane, std::move(frame));
  carry_out();
}

void DiskMirror::guest(NbdRequest request, bool scarce) {
  if (request.kind == NbdRequest::Kind::Flush) {
    // What the guest relies on is the source's disk; the target is flushed at the barrier.
    return events_.acknowledge(request.id);
  }
  ++counters_.guest_writes;
  counters_.guest_bytes += request.extent.length;
  const WriteId id = request.id;
  const WriteKind kind = write_kind(request.kind);
  const Extent extent = request.extent;
  const bool is_new = writes_.emplace(id, std::move(request)).second;
  CHECK(is_new, "the NBD server names each request once");
  const Instant now = events_.now();
  if (arbiter_.strict()) strict_since_.emplace(id, now);
  arbiter_.guest_write(id, kind, extent, now, actions_, scarce);
  carry_out();
}

void DiskMirror::applied(std::uint64_t token) {
  if (is_piece(token)) {
    arbiter_.piece_acked(token >> 1, actions_);
  } else {
    arbiter_.copy_acked(token >> 1);
  }
  carry_out();
}

void DiskMirror::differs(std::uint64_t token, const BlockMask& blocks) {
  const auto damaged = arbiter_.copy_differs(token >> 1, blocks, events_.now());
  if (!damaged) return;
  if (events_.damaged) events_.damaged(damaged->extent);
  if (damaged->again && !stopped_) {
    events_.failed({Code::Io, "the target does not keep what is written to it: what had differed was sent again, and differs",
                    "its storage or memory is failing: see the job's log for where", false});
  }
}

void DiskMirror::refused(std::uint64_t /*token*/, const Error& error) { events_.failed(error); }

void DiskMirror::lane_lost(LaneIndex lane) {
  arbiter_.lane_lost(lane, actions_);
  carry_out();
}

void DiskMirror::tick() {
  arbiter_.tick(events_.now(), actions_);
  carry_out();
}

void DiskMirror::shed() {
  arbiter_.shed(actions_);
  carry_out();
}

void DiskMirror::leave_strict() {
  arbiter_.leave_strict(actions_);
  carry_out();
}

bool DiskMirror::all_copied() const {
  const Arbiter::Summary summary = arbiter_.summary();
  return started_ && !scanning_ && summary.pending == 0 && summary.copying == 0;
}

void DiskMirror::carry_out() {
  // Answering QEMU may bring its next request at once, and with it further actions: they go behind
  // those that are here already.
  if (std::exchange(carrying_out_, true)) return;
  for (std::size_t i = 0; i < actions_.size(); ++i) {
    const Action action = actions_[i];
    switch (action.kind) {
      case Action::Kind::Acknowledge: acknowledge(action.write); break;
      case Action::Kind::Forget: {
        const std::size_t erased = writes_.erase(action.write);
        CHECK(erased == 1, "a write is forgotten once");
        break;
      }
      case Action::Kind::Forward: forward(action); break;
      case Action::Kind::Touch:
        touch(action.group);
        break;
      case Action::Kind::Abandon:
        lanes_.abandon(action.lane, options_.disk, piece_token(action.piece));
        break;
    }
  }
  actions_.clear();
  carrying_out_ = false;
}

void DiskMirror::acknowledge(WriteId id) {
  if (const auto since = strict_since_.extract(id)) {
    const Duration waited = events_.now() - since.mapped();
    ++counters_.strict_writes;
    counters_.strict_wait += waited;
    counters_.longest_wait = std::max(counters_.longest_wait, waited);
  }
  events_.acknowledge(id);
}

void DiskMirror::touch(GroupIndex group) {
  if (events_.touching && !events_.touching(group)) mute_ = true;
}

// What is not sent expires, as if the link stood still.
void DiskMirror::forward(const Action& action) {
  if (mute_) return;
  const NbdRequest& request = writes_.at(action.write);
  ++counters_.forwarded_writes;
  counters_.forwarded_bytes += action.extent.length;
  OutFrame frame;
  frame.disk = options_.disk;
  frame.extent = action.extent;
  frame.token = piece_token(action.piece);
  if (request.kind == NbdRequest::Kind::Write) {
    frame.type = FrameType::Write;
    frame.content = request.payload.subspan((action.extent.offset - request.extent.offset).bytes(),
                                            action.extent.length.bytes());
    frame.buffer = request.buffer;
  } else {
    frame.type = FrameType::Zero;
  }
  lanes_.send(action.lane, std::move(frame));
}

}  // namespace drover::mirror
