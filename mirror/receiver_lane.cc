// SPDX-License-Identifier: Apache-2.0
#include "mirror/receiver_lane.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/priority.h"

namespace drover::mirror {

namespace {

constexpr std::size_t kReceiveAtLeast = std::size_t{128} << 10;
constexpr std::size_t kRecordAndMore = std::size_t{32} << 10;  // TLS: at most 16 KiB and some
constexpr std::size_t kInput = std::size_t{256} << 10;
constexpr std::size_t kOutput = std::size_t{64} << 10;
// Zero frames hold no buffer: what bounds them.
constexpr std::size_t kMaxInFlight = 256;
// Answers that the source does not read.
constexpr std::size_t kMaxAnswers = std::size_t{64} << 10;

}  // namespace

LaneReceiver::LaneReceiver(Options options, UniqueFd fd, std::unique_ptr<Tls> tls,
                           ReceiverTotals& totals, Lost lost)
    : options_(std::move(options)),
      fd_(std::move(fd)),
      tls_(std::move(tls)),
      totals_(totals),
      lost_(std::move(lost)),
      pool_(kLaneBuffer, options_.buffers) {}

LaneReceiver::~LaneReceiver() { CHECK(!thread_.joinable(), "finish() comes first"); }

Status LaneReceiver::start(const std::vector<std::unique_ptr<blockcopy::TargetImage>>& images) {
  DROVER_ASSIGN(loop_, Loop::create());
  if (!images.empty()) DROVER_TRY(open_images(images));
  tls_->grow_buffers(kInput, kOutput);
  thread_ = std::thread([this] {
    give_way();
    send_output();
    beat_later();
    if (auto status = process(); !status) lose(status.error());
    loop_->run();
  });
  return {};
}

// Runs `work` on the caller's thread while the lane's thread stands still.
void LaneReceiver::run_parked(const std::function<void()>& work) {
  std::promise<void> parked;
  std::promise<void> go_on;
  loop_->post([&parked, go = std::make_shared<std::future<void>>(go_on.get_future())] {
    parked.set_value();
    go->wait();
  });
  parked.get_future().wait();
  work();
  go_on.set_value();
}

// A TargetImage belongs to the worker's thread (which may start helpers that end with it), its
// readers and writers to this lane's, which does not run or stands still.
Status LaneReceiver::open_images(
    const std::vector<std::unique_ptr<blockcopy::TargetImage>>& images) {
  std::vector<OpenImage> opened;
  std::vector<Applier::Disk> disks;
  for (const auto& image : images) {
    OpenImage& one = opened.emplace_back();
    DROVER_ASSIGN(one.writer, image->open_writer(*loop_));
    DROVER_ASSIGN(one.reader, image->open_reader(*loop_));
    disks.push_back({one.writer.get(), one.reader.get()});
  }
  images_ = std::move(opened);
  if (options_.content && !known_) known_ = options_.content->open_content(*loop_);
  Applier::Options applier = options_.applier;
  applier.known = known_.get();
  found_ = Length();
  applier_ = std::make_unique<Applier>(
      std::move(disks),
      [this](std::uint64_t sequence, std::uint16_t, Result<BlockMask> differing) {
        answer(sequence, std::move(differing));
      },
      applier);
  return {};
}

Status LaneReceiver::attach(const std::vector<std::unique_ptr<blockcopy::TargetImage>>& images) {
  Status status;
  run_parked([&] { status = open_images(images); });
  return status;
}

LaneDigest LaneReceiver::detach() {
  std::promise<LaneDigest> detached;
  loop_->post([&] {
    auto let_go = [&] {
      // Not from inside a writer's callback, which when_idle() may be called from.
      loop_->at(Instant(), [&] {
        applier_.reset();
        images_.clear();
        known_.reset();
        detached.set_value(digest_);
      });
    };
    if (applier_ != nullptr) {
      applier_->when_idle(let_go);
    } else {
      let_go();
    }
  });
  return detached.get_future().get();
}

void LaneReceiver::finish() {
  if (!thread_.joinable()) return;
  loop_->post([this] { close_connection(); });
  detach();
  loop_->stop();
  thread_.join();
  loop_.reset();  // waits for the kernel to let go of the buffers
}

void LaneReceiver::close_connection() {
  if (closed_) return;
  closed_ = true;
  payload_.reset();
  ::shutdown(fd_.get(), SHUT_RDWR);  // completes what is outstanding on it
}

void LaneReceiver::lose(const Error& error) {
  if (closed_) return;
  close_connection();
  lost_(*this, error);
}

void LaneReceiver::receive() {
  if (receiving_ || closed_) return;
  receiving_ = true;
  wait_for_more();
  loop_->receive(fd_.get(), tls_->input_space(), [this](int count) { on_received(count); });
}

// In the middle of a payload: to be woken for each segment that arrives costs more than it brings.
// No more is asked for than is still to come of this frame.
void LaneReceiver::wait_for_more() {
  int wanted = 1;
  if (header_ && payload_) {
    // A record that has come in part may be in TLS's buffers already.
    const std::size_t left = header_->payload_length - payload_size_;
    if (left > kRecordAndMore) {
      wanted = static_cast<int>(std::min(left - kRecordAndMore, kReceiveAtLeast));
    }
  }
  if (wanted == receive_at_least_) return;
  if (::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof wanted) == 0) {
    receive_at_least_ = wanted;
  }
}

void LaneReceiver::on_received(int count) {
  receiving_ = false;
  if (closed_) return;
  if (count < 0 && count != -EAGAIN && count != -EINTR) {
    return lose(error_from_errno(-count, "receiving from the source"));
  }
  if (count == 0) tls_->input_ended();
  if (count > 0) tls_->input_received(static_cast<std::size_t>(count));
  if (auto status = process(); !status) lose(status.error());
}

// Takes frames until input, buffers or patience run out; asks for more input if that is what is
// missing.
Status LaneReceiver::process() {
  while (!closed_) {
    // Paused until an answer goes out: turn() comes back here.
    if (answers_.size() >= kMaxAnswers) return {};
    if (applier_ != nullptr && applier_->in_flight() >= kMaxInFlight) return {};
    if (!header_) {
      DROVER_ASSIGN(const std::size_t count, tls_->read(std::span(head_).subspan(head_size_)));
      head_size_ += count;
      if (head_size_ == kHeaderSize) {
        DROVER_TRY(begin_payload());
        continue;
      }
    } else if (header_->payload_length > 0 && !payload_) {
      payload_ = pool_.try_take();
      if (!payload_) return {};  // one comes back when a frame is applied
      continue;
    } else if (payload_size_ < header_->payload_length) {
      const auto room = payload_.bytes().subspan(payload_offset(), header_->payload_length);
      DROVER_ASSIGN(const std::size_t count, tls_->read(room.subspan(payload_size_)));
      payload_size_ += count;
      if (payload_size_ == header_->payload_length) continue;
    } else {
      const bool looks_up = header_->type == FrameType::Offer;
      DROVER_ASSIGN(const bool taken, take_frame());
      if (!taken) return {};
      // The index may be on a slow disk: answers and beats go out in between.
      if (looks_up) return schedule_turn(), Status();
      continue;
    }
    if (tls_->closed()) {
      return fail(Code::Unreachable, "the source closed the connection");
    }
    receive();
    return {};
  }
  return {};
}

Status LaneReceiver::begin_payload() {
  const std::span<const std::byte, kHeaderSize> head(head_);
  head_size_ = 0;
  if (is_beat(head)) return {};
  DROVER_ASSIGN(const FrameHeader header, decode_header(head, options_.limits));
  if (header.type == FrameType::Ack || header.type == FrameType::Differs ||
      header.type == FrameType::Failed) {
    return fail(Code::Protocol, "the source sent a frame that only a target sends");
  }
  if (header.sequence != sequence_ + 1) {
    return fail(Code::Protocol,
                fmt::format("frame {} came where {} was due", header.sequence, sequence_ + 1));
  }
  if (applier_ == nullptr) {
    return fail(Code::Protocol, "a frame came when there was no image to write to");
  }
  header_ = header;
  payload_size_ = 0;
  return {};
}

// Some payloads begin with bitmaps: what follows them shall lie on a page of its own.
std::size_t LaneReceiver::payload_offset() const {
  const std::size_t bitmaps = bitmap_bytes(*header_);
  return bitmaps == 0 ? 0 : kBlock.bytes() - bitmaps;
}

// The frame is complete. False: no buffer to decompress it to is free.
Result<bool> LaneReceiver::take_frame() {
  std::span<const std::byte> payload;
  if (payload_) payload = payload_.bytes().subspan(payload_offset(), header_->payload_length);
  Buffer scratch;
  std::span<std::byte> room;
  if (header_->encoding != Encoding::Plain) {
    scratch = pool_.try_take();
    if (!scratch) return false;
    room = scratch.bytes().subspan(payload_offset());
  }
  DROVER_TRY(decode_payload(*header_, payload, room, runs_));
  sequence_ = header_->sequence;
  digest_.add(head_);  // the next header is read when this frame is done
  totals_.frames.fetch_add(1, std::memory_order_relaxed);
  totals_.bytes_received.fetch_add(kHeaderSize + payload.size(), std::memory_order_relaxed);
  const FrameHeader header = *std::exchange(header_, std::nullopt);
  Buffer buffer = scratch ? std::move(scratch) : std::move(payload_);
  payload_.reset();
  if (applier_ == nullptr) {  // detached while the payload came
    return fail(Code::Protocol, "a frame came when there was no image to write to");
  }
  for (const Run& run : runs_) {
    if (header.type == FrameType::Compare || header.type == FrameType::Offer) break;
    auto& total = run.bytes.empty() ? totals_.bytes_zeroed : totals_.bytes_written;
    total.fetch_add(run.extent.length.bytes(), std::memory_order_relaxed);
  }
  applier_->apply(header, std::move(buffer), runs_);
  return true;
}

void LaneReceiver::answer(std::uint64_t sequence, Result<BlockMask> differing) {
  const Length found = applier_->found() - found_;
  totals_.bytes_found.fetch_add(found.bytes(), std::memory_order_relaxed);
  found_ += found;
  if (closed_) return;
  if (!differing && differing.error().code == Code::Unreachable) {
    // The process behind the image is gone, and what it had not flushed: nothing that was
    // acknowledged can be relied on. The next epoch opens the image again, and tells.
    return lose(differing.error());
  }
  FrameHeader header;
  header.sequence = sequence;
  std::array<std::byte, kDiffersPayload> bitmap{};
  std::span<const std::byte> payload;
  if (differing && !differing->empty()) {
    encode_differs(header, *differing, bitmap);
    payload = bitmap;
  }
  if (!differing) {
    log_error("lane {}: frame {}: {}", options_.index, sequence, differing.error().message);
    totals_.failed.fetch_add(1, std::memory_order_relaxed);
    const std::string_view reason = std::string_view(differing.error().message).substr(0, kMaxReason);
    payload = std::as_bytes(std::span(reason));
    header.type = FrameType::Failed;
    header.flags = static_cast<std::uint8_t>(differing.error().code);
    header.payload_length = header.decoded_length = static_cast<std::uint32_t>(payload.size());
  }
  std::array<std::byte, kHeaderSize> head{};
  encode_header(header, head);
  answers_.insert(answers_.end(), head.begin(), head.end());
  answers_.insert(answers_.end(), payload.begin(), payload.end());
  schedule_turn();
}

// Once all that completed together has been answered, the answers go out together.
void LaneReceiver::schedule_turn() {
  if (turn_scheduled_) return;
  turn_scheduled_ = true;
  loop_->at(Instant(), [this] {
    turn_scheduled_ = false;
    turn();
  });
}

void LaneReceiver::turn() {
  if (closed_) return;
  send_output();
  if (receiving_ || closed_) return;
  if (auto status = process(); !status) lose(status.error());
}

void LaneReceiver::send_output() {
  while (!closed_ && !polling_) {
    auto taken = tls_->write(answers_);
    if (!taken) return lose(taken.error());
    answers_.erase(answers_.begin(), answers_.begin() + static_cast<std::ptrdiff_t>(*taken));
    if (auto flushed = tls_->flush(); !flushed) return lose(flushed.error());
    const std::span<const std::byte> bytes = tls_->output();
    if (bytes.empty()) return;
    const ssize_t sent = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0) {
      tls_->output_sent(static_cast<std::size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      polling_ = true;
      loop_->poll(fd_.get(), POLLOUT, [this](int) {
        polling_ = false;
        turn();
      });
    } else if (errno != EINTR) {
      return lose(error_from_errno(errno, "answering the source"));
    }
  }
}

// Says that the lane lives, also while it receives nothing because the disks are slow.
void LaneReceiver::beat_later() {
  loop_->at(now() + options_.silence / 4, [this] {
    if (closed_) return;
    if (answers_.empty()) answers_.insert(answers_.end(), beat().begin(), beat().end());
    turn();
    beat_later();
  });
}

}  // namespace drover::mirror
