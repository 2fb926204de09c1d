// SPDX-License-Identifier: Apache-2.0
#include "mirror/link.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/priority.h"
#include "base/random.h"
#include "mirror/compression_policy.h"
#include "mirror/connect.h"
#include "mirror/lane_queue.h"
#include "mirror/offers.h"
#include "mirror/relay.h"
#include "mirror/session.h"

namespace drover::mirror {

namespace {

constexpr std::size_t kLaneInput = std::size_t{32} << 10;
// One of several addresses.
constexpr std::chrono::milliseconds kAddressPatience{3000};
// What is encrypted before it is handed to the kernel in one call.
constexpr std::size_t kLaneOutput = std::size_t{256} << 10;

struct Totals {
  std::atomic<std::uint64_t> bytes_sent{0};
  std::atomic<std::uint64_t> bytes_received{0};
  std::atomic<std::uint64_t> bytes_saved{0};
  RelayTotals memory;
  std::atomic<std::uint64_t> frames_sent{0};
  std::atomic<Compression> compression;                         // what is wanted
  std::array<std::atomic<Compression>, kMaxLanes> compressing;  // what each lane is at
  std::atomic<std::uint64_t> found_bytes{0};
};
static_assert(std::atomic<Compression>::is_always_lock_free);

Error lost_error(std::string message) {
  return Error{Code::Unreachable, std::move(message), "is the network between the hosts up?", true};
}

std::string op_name(const nlohmann::json& request) {
  return get_string(request, "op", 64).value_or("?");
}

// Wakes a thread out of poll(2).
class Waker {
 public:
  Status open() {
    fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!fd_) return fail_errno(errno, "creating an eventfd");
    return {};
  }
  [[nodiscard]] int fd() const { return fd_.get(); }
  void wake() const {
    if (!fd_) return;  // nobody waits yet
    const std::uint64_t one = 1;
    const ssize_t rc = ::write(fd_.get(), &one, sizeof one);
    CHECK(rc == sizeof one, "an eventfd takes every wake-up");
  }
  void take() const {
    std::uint64_t count = 0;
    (void)!::read(fd_.get(), &count, sizeof count);
  }

 private:
  UniqueFd fd_;
};

// How long the calling thread could have run and had no processor (CONFIG_SCHED_INFO; else: never).
class ProcessorWaits {
 public:
  // Since the last call. Of one thread.
  Duration waited() {
    if (!fd_) fd_ = UniqueFd(::open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC));
    std::array<char, 128> text{};
    const ssize_t size = fd_ ? ::pread(fd_.get(), text.data(), text.size() - 1, 0) : 0;
    unsigned long long ran = 0;
    unsigned long long waited = 0;
    if (size <= 0 || std::sscanf(text.data(), "%llu %llu", &ran, &waited) != 2) return Duration(0);
    const auto total = std::chrono::nanoseconds(static_cast<std::int64_t>(waited));
    const auto before = std::exchange(total_, total);
    return std::chrono::duration_cast<Duration>(std::max(total - before, std::chrono::nanoseconds(0)));
  }

 private:
  UniqueFd fd_;
  std::chrono::nanoseconds total_{0};
};

class LaneSender;
class Control;

// The connections of one epoch. Its threads are joined before it goes.
struct Connections {
  ~Connections();
  std::uint64_t epoch = 0;
  std::vector<std::unique_ptr<LaneSender>> lanes;
  std::unique_ptr<Control> control;
  std::vector<TargetDisk> disks;  // as the receiver's welcome named them
  std::vector<Error> silent;      // of addresses that did not answer

  void start();
  // Ends and joins every thread; with an error, calls that wait fail with it.
  void stop(const std::optional<Error>& why);
};

// Brings what happens on the link's threads to the engine's: one queue, so that everything of an
// epoch comes before its end, nothing after it, and the next one's beginning behind that.
class Delivery : public std::enable_shared_from_this<Delivery> {
 public:
  struct Event {
    enum class Kind { Applied, Differs, Refused, Down, Up, Failed };
    Kind kind = Kind::Applied;
    std::uint32_t lane = 0;
    std::uint16_t disk = 0;
    BlockMask blocks;  // Differs
    std::uint64_t token = 0;
    std::unique_ptr<Error> error;
    std::shared_ptr<Connections> up;
  };

  Delivery(Loop& engine, Answers& answers) : engine_(engine), answers_(&answers) {}

  // Of a link that is new: nobody need be told.
  void begin(std::shared_ptr<Connections> first) {
    epoch_ = first->epoch;
    active_ = std::move(first);
  }
  // Any thread; leaves `events` empty. Those of an epoch that has ended are dropped.
  void add(std::uint64_t epoch, std::vector<Event>& events) {
    post(events, [&] { return epoch == epoch_; });
  }
  void up(std::shared_ptr<Connections> connections) {
    std::vector<Event> events(1);
    events[0].kind = Event::Kind::Up;
    const std::uint64_t epoch = connections->epoch;
    events[0].up = std::move(connections);
    post(events, [&] {
      epoch_ = epoch;
      return true;
    });
  }
  // False: it has ended already.
  bool down(std::uint64_t epoch, const Error& error) {
    std::vector<Event> events(1);
    events[0].kind = Event::Kind::Down;
    events[0].error = std::make_unique<Error>(error);
    return post(events,
                [&] { return std::exchange(epoch_, epoch_ == epoch ? 0 : epoch_) == epoch; });
  }
  void failed(const Error& error) {
    std::vector<Event> events(1);
    events[0].kind = Event::Kind::Failed;
    events[0].error = std::make_unique<Error>(error);
    post(events, [] { return true; });
  }

  // The engine's thread, or its loop does not run.
  [[nodiscard]] Connections* active() const { return active_.get(); }
  void stop() {
    answers_ = nullptr;
    active_.reset();
    std::vector<Event> dropped;
    const std::lock_guard lock(mutex_);
    dropped.swap(events_);
    epoch_ = 0;
  }

 private:
  template <class Valid>
  bool post(std::vector<Event>& events, Valid valid) {
    bool first = false;
    bool taken = false;
    if (!events.empty()) {
      const std::lock_guard lock(mutex_);
      taken = valid();
      first = taken && events_.empty();
      if (taken) std::ranges::move(events, std::back_inserter(events_));
    }
    events.clear();
    if (first) engine_.post([self = shared_from_this()] { self->run(); });
    return taken;
  }

  void run() {
    {
      const std::lock_guard lock(mutex_);
      running_.swap(events_);
    }
    for (Event& event : running_) {
      if (answers_ == nullptr) break;  // a callback may destroy the Link
      switch (event.kind) {
        case Event::Kind::Applied: answers_->applied(event.lane, event.disk, event.token); break;
        case Event::Kind::Differs: 
          answers_->differs(event.lane, event.disk, event.token, event.blocks);
          break;
        case Event::Kind::Refused:
          answers_->refused(event.lane, event.disk, event.token, *event.error);
          break;
        case Event::Kind::Down:
          active_.reset();
          answers_->link_down(*event.error);
          break;
        case Event::Kind::Up:
          active_ = std::move(event.up);
          answers_->link_up(std::vector<TargetDisk>(active_->disks));
          break;
        case Event::Kind::Failed: answers_->link_failed(*event.error); break;
      }
    }
    running_.clear();
  }

  Loop& engine_;
  Answers* answers_;
  std::shared_ptr<Connections> active_;  // engine thread
  std::mutex mutex_;                     // guards the following
  std::vector<Event> events_;
  std::uint64_t epoch_ = 0;     // whose events are taken; 0: none's
  std::vector<Event> running_;  // engine thread
};

// One data connection and its thread.
class LaneSender {
 public:
  using Lost = std::function<void(const Error&)>;  // on the lane's thread, at most once

  LaneSender(std::uint32_t index, std::uint64_t epoch, TlsSocket socket, const LinkOptions& options,
             std::shared_ptr<Delivery> delivery, const KnownPieces& known, Totals& totals,
             Lost lost)
      : index_(index),
        epoch_(epoch),
        lost_(std::move(lost)),
        socket_(std::move(socket)),
        silence_(options.silence_timeout),
        limits_{options.disk_sizes, options.chunk_size},
        delivery_(std::move(delivery)),
        totals_(totals),
        queue_(options.chunk_size),
        offers_(known) {}

  ~LaneSender() { CHECK(!thread_.joinable(), "stop() and join() come first"); }
  LaneSender(const LaneSender&) = delete;
  LaneSender& operator=(const LaneSender&) = delete;

  Status prepare() {
    DROVER_TRY(waker_.open());
    socket_.tls().grow_buffers(kLaneInput, kLaneOutput);
    scratch_ = std::make_unique_for_overwrite<std::byte[]>(kEncodeScratch);
    return {};
  }
  void start() {
    thread_ = std::thread([this] { run(); });
  }

  void send(OutFrame frame) {
    bool wake = false;
    {
      const std::lock_guard lock(mutex_);
      if (over_) return;
      queue_.push(std::move(frame));
      wake = std::exchange(sleeping_, false);
    }
    if (wake) waker_.wake();
  }

  bool abandon(std::uint16_t disk, std::uint64_t token) {
    const std::lock_guard lock(mutex_);
    const bool dropped = queue_.abandon(disk, token);
    if (dropped) tell_if_idle();
    return dropped;
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
      stop_ = true;
    }
    waker_.wake();
  }
  void join() {
    if (thread_.joinable()) thread_.join();
  }

  // Waits until every frame is answered; what was sent up to then.
  Result<LaneDigest> settle(Instant deadline) {
    std::unique_lock lock(mutex_);
    const bool settled = idle_.wait_until(lock, deadline, [this] { return over_ || is_idle(); });
    if (over_) {
      return fail(lost_error(fmt::format("data connection {} of the link is lost", index_)));
    }
    if (!settled) {
      return fail(Error{Code::Busy,
                        fmt::format("data connection {}: the target has not applied everything in "
                                    "time",
                                    index_),
                        "", true});
    }
    return digest_;
  }

 private:
  struct Unanswered {
    std::uint16_t disk = 0;
    std::uint64_t token = 0;
    bool compare = false;
    bool offered = false;
    BlockMask data;  // offered: the blocks that are not zero
    bool answered = false;
  };
  struct Current {
    OutFrame frame;
    std::array<std::byte, kHeaderSize> header{};
    std::span<const std::byte> payload;
    std::size_t sent = 0;  // of header and payload together
  };

  [[nodiscard]] bool is_idle() const { return queue_.empty() && in_progress_ == 0; }
  void tell_if_idle() {
    if (is_idle()) idle_.notify_all();
  }

  void run() {
    give_way();
    const Status status = serve();
    bool stopped = false;
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
      queue_.clear();
      stopped = stop_;
    }
    current_.reset();
    idle_.notify_all();
    if (status || stopped) return;
    Error error = status.error();
    error.message = fmt::format("data connection {}: {}", index_, error.message);
    lost_(error);
  }

  Status serve() {
    heard_ = now();
    while (!stopping()) {
      DROVER_TRY(encode_some());
      DROVER_ASSIGN(const bool sent, socket_.send());
      DROVER_TRY(receive_answers());
      deliver();
      if (const Instant time = now(); automatic_ && policy_.due(time)) {
        policy_.delayed(processor_.waited());
        policy_.look(time, arrived());
      }
      if (sent && (current_ || socket_.tls().unflushed())) continue;
      DROVER_TRY(wait(sent));
    }
    if (auto closed = socket_.tls().close()) (void)socket_.send();
    return {};
  }

  bool stopping() {
    const std::lock_guard lock(mutex_);
    return stop_;
  }

  // Encrypts frames until the output is full or none is left.
  Status encode_some() {
    Tls& tls = socket_.tls();
    while (true) {
      if (!current_ && !take_next()) {
        DROVER_TRY(tls.flush());
        return {};
      }
      if (current_->sent < kHeaderSize) {
        DROVER_ASSIGN(const std::size_t taken,
                      tls.write(std::span(current_->header).subspan(current_->sent)));
        current_->sent += taken;
        if (current_->sent < kHeaderSize) return {};
      }
      const auto left = current_->payload.subspan(current_->sent - kHeaderSize);
      DROVER_ASSIGN(const std::size_t taken, tls.write(left));
      current_->sent += taken;
      if (taken < left.size()) return {};
      totals_.bytes_sent.fetch_add(current_->sent, std::memory_order_relaxed);
      totals_.frames_sent.fetch_add(1, std::memory_order_relaxed);
      current_.reset();  // gives the buffer back
    }
  }

  bool take_next() {
    Current next;
    FrameHeader header;
    {
      const std::lock_guard lock(mutex_);
      auto frame = queue_.pop();
      if (!frame) return false;
      ++in_progress_;
      next.frame = std::move(*frame);
    }
    const OutFrame& frame = next.frame;
    header.type = frame.type;
    header.disk = frame.disk;
    header.extent = frame.extent;
    header.flags = frame.fresh ? kFlagFresh : 0;
    header.sequence = ++sequence_;
    Unanswered& unanswered = unanswered_.emplace_back();
    unanswered.disk = frame.disk;
    unanswered.token = frame.token;
    unanswered.compare = frame.type == FrameType::Compare;
    switch (frame.type) {
      case FrameType::Copy:
        if (const auto offer = offers_.consider(frame, limits_.chunk_size)) {
          header.type = FrameType::Offer;
          next.payload = encode_offer(header, *offer, std::span(scratch_.get(), kEncodeScratch));
          unanswered.offered = true;
          unanswered.data = data_blocks(*offer, frame.extent);
          break;
        }
        next.payload = encode(header, frame);
        break;
      case FrameType::Write: next.payload = encode(header, frame); break;
      case FrameType::Zero: break;
      case FrameType::Compare:
        next.payload = encode_compare(header, frame.content, std::span(scratch_.get(), kEncodeScratch));
        break;
      case FrameType::Offer: CHECK(false, "only a lane makes an offer of a copy");
      case FrameType::Ack:
      case FrameType::Differs:
      case FrameType::Failed: CHECK(false, "only the target answers");
    }
    encode_header(header, next.header);
    {
      const std::lock_guard lock(mutex_);
      digest_.add(next.header);
    }
    current_ = std::move(next);
    return true;
  }

  std::span<const std::byte> encode(FrameHeader& header, const OutFrame& frame) {
    const bool write = frame.type == FrameType::Write;
    const std::span<std::byte> out(scratch_.get(), kEncodeScratch);
    const auto wanted = totals_.compression.load(std::memory_order_relaxed);
    const Instant begin = now();
    if (wanted.automatic && !automatic_) policy_ = CompressionPolicy(begin, arrived());
    automatic_ = wanted.automatic;
    EncodeOptions with{wanted.encoding, wanted.level};
    if (automatic_) {
      with = write ? policy_.choose_write(frame.content.size()) : policy_.choose(begin);
    } else if (write && frame.content.size() < CompressionPolicy::kLeastWrite) {
      with = {};
    }
    const auto payload = write ? encode_write(header, frame.content, with, out)
                               : encode_copy(header, frame.content, frame.blocks, with, out);
    if (automatic_) {
      policy_.encoded(with, {header.decoded_length, payload.size(), now() - begin});
      with = policy_.current();
    }
    totals_.bytes_saved.fetch_add(header.decoded_length - payload.size(), std::memory_order_relaxed);
    if (!write) {
      totals_.compressing[index_].store({automatic_, with.encoding, static_cast<std::int8_t>(with.level)},
                                        std::memory_order_relaxed);
    }
    return payload;
  }

  // Bytes that the target's kernel has not acknowledged yet; and those that it has.
  [[nodiscard]] std::uint64_t outstanding() const {
    int bytes = 0;
    if (::ioctl(socket_.fd(), SIOCOUTQ, &bytes) != 0 || bytes < 0) return 0;
    return static_cast<std::uint64_t>(bytes);
  }
  std::uint64_t arrived() {
    tcp_info info{};
    socklen_t size = sizeof info;
    if (::getsockopt(socket_.fd(), IPPROTO_TCP, TCP_INFO, &info, &size) == 0) {
      arrived_ = std::max<std::uint64_t>(arrived_, info.tcpi_bytes_acked);
    }
    return arrived_;
  }

  Status receive_answers() {
    while (true) {
      DROVER_ASSIGN(const std::size_t count,
                    socket_.tls().read(std::span(answer_).subspan(have_, want_ - have_)));
      have_ += count;
      if (have_ == want_) {
        DROVER_TRY(take_answer());
        continue;
      }
      if (socket_.tls().closed()) {
        return fail(lost_error("the target closed the connection"));
      }
      DROVER_ASSIGN(const bool received, socket_.receive());
      if (!received) return {};
      heard_ = now();
    }
  }

  // answer_ holds a whole header, or a header and the reason that follows it.
  Status take_answer() {
    const auto head = std::span<const std::byte>(answer_).first<kHeaderSize>();
    if (have_ == kHeaderSize && is_beat(head)) {
      have_ = 0;
      return {};
    }
    DROVER_ASSIGN(const FrameHeader header, decode_header(head, limits_));
    if (header.type != FrameType::Ack && header.type != FrameType::Differs &&
        header.type != FrameType::Failed) {
      return fail(Code::Protocol, "the target sent a frame that only a source sends");
    }
    if (have_ < kHeaderSize + header.payload_length) {
      want_ = kHeaderSize + header.payload_length;
      return {};
    }
    totals_.bytes_received.fetch_add(have_, std::memory_order_relaxed);
    const std::uint64_t first = sequence_ - unanswered_.size() + 1;
    if (header.sequence < first || header.sequence > sequence_ ||
        unanswered_[header.sequence - first].answered) {
      return fail(Code::Protocol,
                  fmt::format("the target answered frame {}, which nobody asked", header.sequence));
    }
    Unanswered& frame = unanswered_[header.sequence - first];
    frame.answered = true;
    Delivery::Event event{.lane = index_, .disk = frame.disk, .token = frame.token};
    const auto payload = std::span<const std::byte>(answer_).subspan(kHeaderSize, header.payload_length);
    if (header.type == FrameType::Differs) {
      if (!frame.compare && !frame.offered) {
        return fail(Code::Protocol, "the target compared what it was to write");
      }
      event.kind = Delivery::Event::Kind::Differs;
      DROVER_ASSIGN(event.blocks, decode_differs(payload));
    }
    if (frame.offered && header.type != FrameType::Failed) {
      totals_.found_bytes.fetch_add(offers_.answered(frame.data, event.blocks).bytes(),
                                    std::memory_order_relaxed);
    }
    if (header.type == FrameType::Failed) {
      event.kind = Delivery::Event::Kind::Refused;
      event.error = std::make_unique<Error>();
      event.error->code = static_cast<Code>(header.flags);
      event.error->message = std::string(reinterpret_cast<const char*>(payload.data()), payload.size());
    }
    events_.push_back(std::move(event));
    while (!unanswered_.empty() && unanswered_.front().answered) unanswered_.pop_front();
    have_ = 0;
    want_ = kHeaderSize;
    return {};
  }

  void deliver() {
    if (events_.empty()) return;
    const std::size_t count = events_.size();
    // First the answers, then idle: who waits for idle finds the answers queued.
    delivery_->add(epoch_, events_);
    const std::lock_guard lock(mutex_);
    in_progress_ -= count;
    tell_if_idle();
  }

  Status wait(bool sent) {
    {
      const std::lock_guard lock(mutex_);
      if (stop_ || (sent && !queue_.empty())) return {};
      sleeping_ = sent;
    }
    const std::uint64_t before = automatic_ && sent ? outstanding() : 0;
    const Instant begin = now();
    const Instant deadline = heard_ + silence_;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now());
    std::array<pollfd, 2> polled = {
        pollfd{socket_.fd(), static_cast<short>(sent ? POLLIN : POLLIN | POLLOUT), 0},
        pollfd{waker_.fd(), POLLIN, 0}};
    const int ready = ::poll(polled.data(), polled.size(),
                             static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 60000)));
    if (ready < 0 && errno != EINTR) return fail_errno(errno, "waiting for the link");
    if (ready > 0 && polled[1].revents != 0) waker_.take();
    {
      const std::lock_guard lock(mutex_);
      sleeping_ = false;
    }
    if (automatic_ && sent) {
      policy_.starved(now() - begin, before, before > 0 ? outstanding() : 0);
    } else if (automatic_) {
      policy_.blocked(now() - begin);
    }
    // The target's beats come four times in this time. Only a poll that found nothing proves
    // silence: this process may itself have been stopped.
    if (ready >= 0 && (polled[0].revents & (POLLIN | POLLHUP | POLLERR)) == 0 &&
        now() >= deadline) {
      return fail(
          lost_error(fmt::format("nothing was heard from the target for {} ms", silence_.count())));
    }
    return {};
  }

  const std::uint32_t index_;
  const std::uint64_t epoch_;
  const Lost lost_;
  TlsSocket socket_;
  const std::chrono::milliseconds silence_;
  const FrameLimits limits_;
  const std::shared_ptr<Delivery> delivery_;
  Totals& totals_;
  Waker waker_;
  std::thread thread_;

  std::mutex mutex_;  // guards the following
  LaneQueue queue_;
  std::size_t in_progress_ = 0;  // frames taken from the queue and not answered
  LaneDigest digest_;
  bool sleeping_ = false;
  bool stop_ = false;
  bool over_ = false;  // the thread has ended, or is about to
  std::condition_variable idle_;

  // The thread's own.
  LaneOffers offers_;
  std::unique_ptr<std::byte[]> scratch_;
  CompressionPolicy policy_{now()};
  ProcessorWaits processor_;
  bool automatic_ = true;       // it decides
  std::uint64_t arrived_ = 0;   // bytes, when it was last asked
  std::optional<Current> current_;
  std::uint64_t sequence_ = 0;
  std::deque<Unanswered> unanswered_;  // the last one has sequence_
  std::array<std::byte, kHeaderSize + kMaxReason> answer_{};
  std::size_t have_ = 0;
  std::size_t want_ = kHeaderSize;
  std::vector<Delivery::Event> events_;
  Instant heard_;
};

// The control connection and its thread.
class Control {
 public:
  Control(TlsSocket socket, std::chrono::milliseconds silence,
          std::function<void(const Error&)> lost)
      : socket_(std::move(socket)), silence_(silence), lost_(std::move(lost)) {}
  ~Control() { CHECK(!thread_.joinable(), "stop() comes first"); }
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  Status prepare() { return waker_.open(); }
  void start() {
    thread_ = std::thread([this] { run(); });
  }

  // With an error, the calls that wait fail with it.
  void stop(const std::optional<Error>& why) {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      if (why && !error_) error_ = why;
    }
    answered_.notify_all();
    waker_.wake();
    if (thread_.joinable()) thread_.join();
  }

  Result<nlohmann::json> call(nlohmann::json request, std::chrono::milliseconds timeout) {
    const Instant deadline = now() + timeout;
    const std::string op = op_name(request);
    std::unique_lock lock(mutex_);
    if (error_) return fail(*error_);
    const std::uint64_t id = ++last_id_;
    request["id"] = id;
    DROVER_ASSIGN(std::string message, encode_message(request));
    out_.push_back(std::move(message));
    waiting_.emplace(id, std::nullopt);
    waker_.wake();
    answered_.wait_until(lock, deadline, [&] { return error_ || waiting_.at(id); });
    auto answer = std::move(waiting_.extract(id).mapped());
    if (answer) {
      if (op == "finish" && *answer) finished_ = true;
      return std::move(*answer);
    }
    if (error_) return fail(*error_);
    return fail(
        Error{Code::Unreachable,
              fmt::format("the target did not answer \"{}\" within {} ms", op, timeout.count()), "",
              true});
  }

 private:
  void run() {
    const Status status = serve();
    bool finished = false;
    {
      const std::lock_guard lock(mutex_);
      if (!error_) {
        error_ = status ? Error{Code::Cancelled, "the link was closed", "", false} : status.error();
      }
      finished = finished_;
    }
    answered_.notify_all();
    if (!status && !finished) lost_(status.error());
  }

  Status serve() {
    heard_ = spoke_ = now();
    while (true) {
      bool stop = false;
      {
        const std::lock_guard lock(mutex_);
        stop = stop_;
        while (!out_.empty()) {
          writing_ += out_.front();
          out_.pop_front();
        }
      }
      if (stop) {
        if (auto closed = socket_.tls().close()) (void)socket_.send();
        return {};
      }
      if (now() >= spoke_ + silence_ / 4) {
        DROVER_ASSIGN(const std::string ping, encode_message({{"op", "ping"}, {"id", 0}}));
        writing_ += ping;
      }
      DROVER_TRY(write());
      DROVER_ASSIGN(const bool sent, socket_.send());
      DROVER_TRY(read());
      if (sent && (!writing_.empty() || socket_.tls().unflushed())) continue;
      DROVER_TRY(wait(sent));
    }
  }

  Status write() {
    if (writing_.empty() && !socket_.tls().unflushed()) return {};
    DROVER_ASSIGN(const std::size_t taken, socket_.tls().write(std::as_bytes(std::span(writing_))));
    writing_.erase(0, taken);
    DROVER_TRY(socket_.tls().flush());
    spoke_ = now();
    return {};
  }

  Status read() {
    while (true) {
      DROVER_ASSIGN(const std::size_t count, socket_.tls().read(reader_.space()));
      if (count > 0) {
        DROVER_ASSIGN(auto message, reader_.received(count));
        if (message) DROVER_TRY(take(*message));
        continue;
      }
      if (socket_.tls().closed()) {
        return fail(lost_error("the receiver on the target has ended"));
      }
      DROVER_ASSIGN(const bool received, socket_.receive());
      if (!received) return {};
      heard_ = now();
    }
  }

  Status take(const std::string& text) {
    DROVER_ASSIGN(const nlohmann::json answer, parse_object(text, "the receiver's answer"));
    DROVER_ASSIGN(const std::uint64_t id, get_unsigned(answer, "id"));
    const std::lock_guard lock(mutex_);
    const auto found = waiting_.find(id);
    if (found == waiting_.end()) return {};  // a ping's, or nobody waits any longer
    if (const auto error = answer.find("error"); error != answer.end()) {
      found->second = fail(error_from_json(*error));
    } else if (const auto result = answer.find("result"); result != answer.end()) {
      found->second = *result;
    } else {
      found->second = nlohmann::json::object();
    }
    answered_.notify_all();
    return {};
  }

  Status wait(bool sent) {
    const Instant silent = heard_ + silence_;
    const Instant next = std::min(silent, spoke_ + silence_ / 4);
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(next - now());
    std::array<pollfd, 2> polled = {
        pollfd{socket_.fd(), static_cast<short>(sent ? POLLIN : POLLIN | POLLOUT), 0},
        pollfd{waker_.fd(), POLLIN, 0}};
    const int ready = ::poll(polled.data(), polled.size(),
                             static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 60000)));
    if (ready < 0 && errno != EINTR) return fail_errno(errno, "waiting for the link");
    if (ready > 0 && polled[1].revents != 0) waker_.take();
    if (ready >= 0 && (polled[0].revents & (POLLIN | POLLHUP | POLLERR)) == 0 && now() >= silent) {
      return fail(
          lost_error(fmt::format("nothing was heard from the target for {} ms", silence_.count())));
    }
    return {};
  }

  TlsSocket socket_;
  const std::chrono::milliseconds silence_;
  const std::function<void(const Error&)> lost_;
  Waker waker_;
  std::thread thread_;

  std::mutex mutex_;  // guards the following
  std::condition_variable answered_;
  std::deque<std::string> out_;
  std::map<std::uint64_t, std::optional<Result<nlohmann::json>>> waiting_;
  std::uint64_t last_id_ = 0;
  std::optional<Error> error_;
  bool stop_ = false;
  bool finished_ = false;  // the receiver said goodbye because we asked it to

  // The thread's own.
  std::string writing_;
  MessageReader reader_;
  Instant heard_;
  Instant spoke_;
};

// Memory: a unix socket here, a TLS connection per connection to it.
class MemoryRelay {
 public:
  MemoryRelay(Endpoint endpoint, Hello hello, const Compression& compression,
              std::chrono::milliseconds connect_timeout, Totals& totals)
      : endpoint_(std::move(endpoint)),
        hello_(std::move(hello)),
        compression_(compression),
        connect_timeout_(connect_timeout),
        totals_(totals) {}
  ~MemoryRelay() { stop(); }
  MemoryRelay(const MemoryRelay&) = delete;
  MemoryRelay& operator=(const MemoryRelay&) = delete;

  Status start(const Link::RelayOptions& options) {
    const std::string doing = "listening on " + options.unix_path;
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    if (options.unix_path.size() >= sizeof name.sun_path) return fail_errno(ENAMETOOLONG, doing);
    std::ranges::copy(options.unix_path, name.sun_path);
    DROVER_TRY(stop_.open());
    DROVER_TRY(gate_.open());
    if (!options.gated) gate_.set(true);
    listener_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!listener_) return fail_errno(errno, doing);
    if (::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) != 0) {
      if (errno == EADDRINUSE) {
        return fail(Code::AlreadyExists, doing + ": the socket exists already");
      }
      return fail_errno(errno, doing);
    }
    path_ = options.unix_path;
    // Nobody can connect before listen(): owner and mode are right by then.
    if ((options.uid >= 0 || options.gid >= 0) &&
        ::chown(path_.c_str(),
                options.uid >= 0 ? static_cast<uid_t>(options.uid) : static_cast<uid_t>(-1),
                options.gid >= 0 ? static_cast<gid_t>(options.gid) : static_cast<gid_t>(-1)) != 0) {
      return fail_errno(errno, doing);
    }
    if (::chmod(path_.c_str(), options.mode) != 0) return fail_errno(errno, doing);
    if (::listen(listener_.get(), static_cast<int>(kMaxRelays)) != 0)
      return fail_errno(errno, doing);
    acceptor_ = std::thread([this] { accept_all(); });
    return {};
  }

  void set_gate(bool open) { gate_.set(open); }

  // Breaks every connection; no more are taken.
  void cut() { stop_.wake(); }

  void stop() {
    if (acceptor_.joinable()) {
      cut();
      acceptor_.join();
    }
    for (Connection& connection : connections_) connection.thread.join();
    connections_.clear();
    listener_.reset();
    if (!path_.empty()) ::unlink(std::exchange(path_, {}).c_str());
  }

 private:
  struct Connection {
    std::thread thread;
    std::atomic<bool> done{false};
  };

  void accept_all() {
    while (true) {
      std::array<pollfd, 2> polled = {pollfd{listener_.get(), POLLIN, 0},
                                      pollfd{stop_.fd(), POLLIN, 0}};
      if (::poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR) return;
      if (polled[1].revents != 0) return;
      if ((polled[0].revents & POLLIN) == 0) continue;
      UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!fd) continue;
      for (auto it = connections_.begin(); it != connections_.end();) {
        if (!it->done) {
          ++it;
          continue;
        }
        it->thread.join();
        it = connections_.erase(it);
      }
      if (connections_.size() >= kMaxRelays) {
        log_warning("a memory connection was refused: there are {} already", kMaxRelays);
        continue;
      }
      // One after the other: the target's QEMU (before 8.0) takes the first that reaches it for the
      // main one, as it is here. The receiver has connected to it when it says welcome.
      nlohmann::json welcome;
      auto link =
          open_connection(endpoint_, hello_, now() + connect_timeout_, stop_.fd(), &welcome);
      if (!link) {
        log_warning("memory connection: {}", link.error().to_string());
        continue;
      }
      // An older receiver does not know of blocks.
      RelayCoding coding;
      if (hello_.blocks && get_bool(welcome, "blocks", false).value_or(false)) {
        coding.outward = compression_;
      }
      Connection& connection = connections_.emplace_back();
      connection.thread =
          std::thread([this, &connection, plain = std::move(fd), coding,
                       made = std::make_shared<TlsSocket>(std::move(*link))]() mutable {
            give_way();
            if (const Status status =
                    relay(*made, plain.get(), stop_.fd(), totals_.memory, &gate_, coding);
                !status) {
              log_warning("memory connection: {}", status.error().to_string());
            }
            made.reset();
            plain.reset();
            connection.done = true;
          });
    }
  }

  const Endpoint endpoint_;
  const Hello hello_;
  const Compression compression_;
  const std::chrono::milliseconds connect_timeout_;
  Totals& totals_;
  Waker stop_;
  Gate gate_;
  UniqueFd listener_;
  std::string path_;
  std::thread acceptor_;
  std::list<Connection> connections_;  // the acceptor's, until it is joined
};

Connections::~Connections() = default;

void Connections::start() {
  for (const auto& lane : lanes) lane->start();
  control->start();
}

void Connections::stop(const std::optional<Error>& why) {
  for (const auto& lane : lanes) lane->stop();
  for (const auto& lane : lanes) lane->join();
  // Last: a receiver that is not resumable ends its session when this one closes.
  if (control) control->stop(why);
}

Result<std::vector<TargetDisk>> read_target_disks(const nlohmann::json& welcome) {
  std::vector<TargetDisk> disks;
  const auto images = welcome.find("images");
  if (images == welcome.end()) return disks;
  if (!images->is_array() || images->size() > kMaxDisks) {
    return fail(Code::Protocol, "the receiver's list of images makes no sense");
  }
  for (const nlohmann::json& image : *images) {
    if (!image.is_object()) return fail(Code::Protocol, "an image of the receiver is no object");
    TargetDisk disk;
    DROVER_ASSIGN(disk.path, get_string(image, "path"));
    DROVER_ASSIGN(disk.id, get_string(image, "id", 256));
    DROVER_ASSIGN(disk.instance, get_string(image, "instance", 256));
    disks.push_back(std::move(disk));
  }
  return disks;
}

// The target's addresses while an epoch's connections are made: those that answer take turns.
class Addresses {
 public:
  explicit Addresses(const std::vector<std::string>& all) {
    for (const std::string& one : all) left_.push_back({one, false});
  }

  void next() { at_ = (at_ + 1) % left_.size(); }
  // To the one whose turn it is, or the next that answers; the others are left out from then on.
  // Fails when none is left, with what was wrong with the first. An address answers when TLS stands
  // there: what the receiver behind it needs for its welcome is no matter of addresses.
  Result<TlsSocket> open(Endpoint& endpoint, const Hello& hello, Instant deadline, int cancel_fd,
                         nlohmann::json* welcome = nullptr) {
    while (true) {
      Address& address = left_[at_];
      endpoint.address = address.name;
      // One that swallows everything leaves time for the others.
      const auto untried = std::ranges::count(left_, false, &Address::answers);
      Instant until = deadline;
      if (left_.size() > 1 && !address.answers) {
        until = now() + std::min<Duration>((deadline - now()) / (untried + 1), kAddressPatience);
      }
      auto opened = reach(endpoint, hello, until, cancel_fd);
      if (opened) {
        address.answers = true;
        DROVER_TRY(exchange_hello(*opened, endpoint, hello, deadline, welcome));
        return opened;
      }
      if (opened.error().code == Code::Cancelled) return opened;
      silent_.push_back(opened.error());
      if (left_.size() == 1) return fail(silent_.front());
      left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(at_));
      at_ %= left_.size();
    }
  }
  [[nodiscard]] const std::vector<Error>& silent() const { return silent_; }

 private:
  struct Address {
    std::string name;
    bool answers = false;
  };
  std::vector<Address> left_;  // never empty
  std::size_t at_ = 0;
  std::vector<Error> silent_;
};

class LinkImpl final : public Link {
 public:
  LinkImpl(Loop& engine, LinkOptions options, Answers& answers)
      : options_(std::move(options)),
        delivery_(std::make_shared<Delivery>(engine, answers)),
        endpoint_{options_.address, options_.port, options_.key, options_.silence_timeout},
        epoch_(options_.epoch) {
    totals_.compression = options_.compression;
  }

  ~LinkImpl() override {
    delivery_->stop();
    stop_relay();
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    stopped_.wake();
    if (keeper_.joinable()) keeper_.join();
    if (current_) current_->stop(std::nullopt);
  }

  Status open() {
    if (options_.lanes == 0 || options_.lanes > kMaxLanes) {
      return fail(Code::InvalidArgument,
                  fmt::format("a link has 1 to {} data connections", kMaxLanes));
    }
    if (!options_.via.empty()) DROVER_TRY(check_addresses(options_.via));
    DROVER_TRY(check_session_id(options_.session));
    DROVER_TRY(stopped_.open());
    DROVER_ASSIGN(current_, connect_all(endpoint_, epoch_));
    tell_silent(current_->silent);
    delivery_->begin(current_);
    current_->start();
    keeper_ = std::thread([this] { keep(); });
    return {};
  }

  [[nodiscard]] std::uint32_t count() const override { return options_.lanes; }
  void send(std::uint32_t lane, OutFrame frame) override {
    CHECK(lane < options_.lanes, "there is such a lane");
    if (Connections* const active = delivery_->active())
      active->lanes[lane]->send(std::move(frame));
  }
  bool abandon(std::uint32_t lane, std::uint16_t disk, std::uint64_t token) override {
    CHECK(lane < options_.lanes, "there is such a lane");
    Connections* const active = delivery_->active();
    return active != nullptr && active->lanes[lane]->abandon(disk, token);
  }

  Result<nlohmann::json> call(const nlohmann::json& request,
                              std::chrono::milliseconds timeout) override {
    const Instant deadline = now() + timeout;
    std::shared_ptr<Connections> connections;
    {
      std::unique_lock lock(mutex_);
      changed_.wait_until(lock, deadline, [this] { return current_ || failed_ || stop_; });
      if (!current_) return fail(why_down());
      connections = current_;
      // The job is over: that the receiver closes its connections now is no loss.
      if (op_name(request) == "finish") finishing_ = true;
      if (finishing_) {
        for (const auto& lane : connections->lanes) lane->stop();
      }
    }
    return connections->control->call(request, left_until(deadline));
  }

  void use_filter(std::shared_ptr<const PieceFilter> filter) override {
    known_.set(std::move(filter));
  }

  Result<BarrierTimes> barrier(std::chrono::milliseconds timeout) override {
    const Instant deadline = now() + timeout;
    DROVER_ASSIGN(const std::shared_ptr<Connections> connections, up_now());
    nlohmann::json digests = nlohmann::json::array();
    for (const auto& lane : connections->lanes) {
      DROVER_ASSIGN(const LaneDigest digest, lane->settle(deadline));
      digests.push_back(digest.to_json());
    }
    const auto answer = connections->control->call(
        {{"op", "barrier"}, {"lanes", std::move(digests)}}, left_until(deadline));
    if (!answer) {
      // An image's storage daemon is gone, or one image was let go of and another not: the receiver
      // opens what it has closed or lost when the next epoch begins.
      if (answer.error().code == Code::Unreachable) broken(connections->epoch, answer.error());
      return fail(answer.error());
    }
    return barrier_times(*answer);
  }

  Status start_relay(const RelayOptions& options) override {
    stop_relay();
    DROVER_ASSIGN(const std::shared_ptr<Connections> connections, up_now());
    Hello hello = make_hello(ConnectionKind::Memory, connections->epoch);
    hello.path = options.unix_path;
    const Compression compression = totals_.compression.load();
    hello.blocks = compression.automatic || compression.encoding != Encoding::Plain;
    Endpoint endpoint;
    {
      const std::lock_guard lock(mutex_);
      endpoint = endpoint_;
    }
    auto made = std::make_unique<MemoryRelay>(
        endpoint, std::move(hello), compression, options_.connect_timeout, totals_);
    DROVER_TRY(made->start(options));
    // The link goes down: current_ changes first, then the relay is stopped.
    const std::lock_guard relay_lock(relay_mutex_);
    const std::lock_guard lock(mutex_);
    if (current_ != connections) return fail(why_down());
    relay_ = std::move(made);
    if (options.gated) relay_->set_gate(memory_may_pass_);
    return {};
  }

  void let_memory_pass(bool pass) override {
    const std::lock_guard lock(relay_mutex_);
    memory_may_pass_ = pass;
    if (relay_) relay_->set_gate(pass);
  }

  void stop_relay() override {
    std::unique_ptr<MemoryRelay> old;
    {
      const std::lock_guard lock(relay_mutex_);
      old = std::move(relay_);
    }
  }

  [[nodiscard]] LinkCounters counters() const override {
    return {.bytes_sent = totals_.bytes_sent,
            .bytes_received = totals_.bytes_received,
            .bytes_saved = totals_.bytes_saved,
            .memory_bytes = totals_.memory.passed,
            .memory_given = static_cast<std::uint64_t>(totals_.memory.given),
            .frames_sent = totals_.frames_sent,
            .reconnects = reconnects_,
            .encoding = strongest(),
            .found_bytes = totals_.found_bytes};
  }

  void set_compression(const Compression& compression) override { totals_.compression = compression; }

 private:
  [[nodiscard]] EncodeOptions strongest() const {
    EncodeOptions most;
    for (const auto& lane : totals_.compressing) {
      const Compression one = lane.load(std::memory_order_relaxed);
      if (std::pair(one.encoding, int{one.level}) > std::pair(most.encoding, most.level)) {
        most = {one.encoding, one.level};
      }
    }
    return most;
  }

  [[nodiscard]] Hello make_hello(ConnectionKind kind, std::uint64_t epoch) const {
    Hello hello;
    hello.kind = kind;
    hello.session = options_.session;
    hello.epoch = epoch;
    return hello;
  }

  static std::chrono::milliseconds left_until(Instant deadline) {
    return std::max(std::chrono::ceil<std::chrono::milliseconds>(deadline - now()),
                    std::chrono::milliseconds(1));
  }

  // The endpoint is left with the address that the control connection found.
  Result<std::shared_ptr<Connections>> connect_all(Endpoint& endpoint, std::uint64_t epoch) {
    const Instant deadline = now() + options_.connect_timeout;
    auto made = std::make_shared<Connections>();
    made->epoch = epoch;
    const auto lost = [this, epoch](const Error& error) { broken(epoch, error); };
    Hello hello = make_hello(ConnectionKind::Control, epoch);
    hello.lanes = options_.lanes;
    hello.limits = {options_.disk_sizes, options_.chunk_size};
    hello.silence = options_.silence_timeout;
    nlohmann::json welcome;
    Addresses addresses(options_.via.empty() ? std::vector{endpoint.address} : options_.via);
    DROVER_ASSIGN(TlsSocket control, addresses.open(endpoint, hello, deadline, stopped_.fd(), &welcome));
    DROVER_ASSIGN(made->disks, read_target_disks(welcome));
    const Endpoint first = endpoint;
    for (unsigned i = 0; i < options_.lanes; ++i) {
      hello = make_hello(ConnectionKind::Lane, epoch);
      hello.lane = i;
      DROVER_ASSIGN(TlsSocket lane, addresses.open(endpoint, hello, deadline, stopped_.fd()));
      made->lanes.push_back(std::make_unique<LaneSender>(i, epoch, std::move(lane), options_,
                                                         delivery_, known_, totals_, lost));
      DROVER_TRY(made->lanes.back()->prepare());
      addresses.next();
    }
    endpoint = first;
    made->control = std::make_unique<Control>(std::move(control), options_.silence_timeout, lost);
    DROVER_TRY(made->control->prepare());
    made->silent = addresses.silent();
    return made;
  }

  void tell_silent(const std::vector<Error>& silent) {
    std::vector<std::string> messages;
    for (const Error& error : silent) messages.push_back(error.message);
    if (messages == std::exchange(told_silent_, messages)) return;
    for (const std::string& message : messages) log_warning("the link goes on without it: {}", message);
    if (options_.partly_connected) options_.partly_connected(silent);
  }

  // On the thread of the connection that broke; the others go with it.
  void broken(std::uint64_t epoch, const Error& error) {
    const std::lock_guard lock(mutex_);
    if (finishing_ || !current_ || current_->epoch != epoch || broken_) return;
    log_warning("the link is down: {}", error.message);
    broken_ = error;
    changed_.notify_all();
  }

  // mutex_ is held.
  [[nodiscard]] Error why_down() const {
    if (failed_) return *failed_;
    if (stop_) return {Code::Cancelled, "the link was closed", "", false};
    Error error = lost_error("the link to the target is down");
    if (down_) error.message += ": " + down_->message;
    return error;
  }
  Result<std::shared_ptr<Connections>> up_now() {
    const std::lock_guard lock(mutex_);
    if (!current_ || broken_) return fail(broken_ ? *broken_ : why_down());
    return current_;
  }

  // The link's own thread: takes down what broke, and builds it up again.
  void keep() {
    while (true) {
      std::shared_ptr<Connections> old;
      Error error;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return stop_ || broken_; });
        if (stop_) return;
        error = *std::exchange(broken_, std::nullopt);
        down_ = error;
        old = std::exchange(current_, nullptr);
        // One that breaks at once each time is no reason to hurry.
        if (now() >= up_since_ + options_.retry.longest) attempts_ = 0;
        // In the lock: who finds that there is no link any more finds this told.
        delivery_->down(old->epoch, error);
      }
      const Instant since = now();
      stop_relay();
      old->stop(error);
      old.reset();
      // A peer that has the key and breaks the rules would do so again.
      if (error.code == Code::Protocol) return give_up(error);
      if (!reconnect(since, error)) return;
    }
  }

  // False: it has ended for good.
  bool reconnect(Instant since, Error last) {
    while (true) {
      const unsigned attempt = attempts_++;
      if (options_.give_up_after.count() > 0 && now() >= since + options_.give_up_after) {
        last.message = fmt::format("the link was down for {} ms: {}",
                                   options_.give_up_after.count(), last.message);
        give_up(last);
        return false;
      }
      if (!pause(attempt, since)) return false;
      Endpoint endpoint = endpoint_;
      if (options_.locate) {
        auto found = options_.locate(attempt, last, stopped_.fd());
        if (!found) {
          last = found.error();
          if (last.retryable || last.code == Code::Unreachable) continue;
          give_up(last);
          return false;
        }
        endpoint.address = found->address;
        endpoint.port = found->port;
      }
      ++epoch_;
      auto made = connect_all(endpoint, epoch_);
      if (!made) {
        last = made.error();
        log_info("the link is still down: {}", last.message);
        // With someone who can find the receiver again, even a stranger at its port means nothing.
        if (options_.locate || !is_final(last.code)) continue;
        give_up(last);
        return false;
      }
      tell_silent((*made)->silent);
      const std::lock_guard lock(mutex_);
      if (stop_) return false;
      endpoint_ = endpoint;
      current_ = std::move(*made);
      ++reconnects_;
      up_since_ = now();
      log_info("the link is up again, epoch {}", epoch_);
      delivery_->up(current_);
      current_->start();
      changed_.notify_all();
      return true;
    }
  }

  static bool is_final(Code code) {
    return code == Code::Denied || code == Code::Protocol || code == Code::Incompatible ||
           code == Code::InvalidArgument;
  }

  // False: the link is being closed.
  bool pause(unsigned attempt, Instant since) {
    auto delay = reconnect_delay(attempt, options_.retry, jitter_.next());
    if (options_.give_up_after.count() > 0) {
      delay = std::min(delay, left_until(since + options_.give_up_after));
    }
    std::unique_lock lock(mutex_);
    return !changed_.wait_for(lock, delay, [this] { return stop_; });
  }

  void give_up(const Error& error) {
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
      failed_ = error;
      delivery_->failed(error);
    }
    log_error("the link is given up: {}", error.message);
    changed_.notify_all();
  }

  const LinkOptions options_;
  Totals totals_;
  KnownPieces known_;
  const std::shared_ptr<Delivery> delivery_;
  Waker stopped_;  // readable once the link is being closed
  std::atomic<std::uint64_t> reconnects_{0};

  std::mutex mutex_;  // guards the following
  std::condition_variable changed_;
  std::shared_ptr<Connections> current_;  // null: down
  std::optional<Error> broken_;           // of current_; not taken down yet
  std::optional<Error> down_;             // why it is, or last was, down
  std::optional<Error> failed_;           // why it stays down
  bool finishing_ = false;
  bool stop_ = false;
  Endpoint endpoint_;

  // The link's own thread's.
  std::uint64_t epoch_;
  std::vector<std::string> told_silent_;
  unsigned attempts_ = 0;
  Instant up_since_ = now();
  Random jitter_{std::random_device{}()};

  std::mutex relay_mutex_;  // before mutex_
  bool memory_may_pass_ = false;
  std::unique_ptr<MemoryRelay> relay_;
  std::thread keeper_;
};

}  // namespace

BarrierTimes barrier_times(const nlohmann::json& answer) {
  const auto time = [&answer](const char* name) {
    if (!answer.is_object() || !answer.contains(name)) return std::chrono::microseconds(0);
    const Result<std::uint64_t> told = get_unsigned(answer, name, UINT32_MAX);
    return std::chrono::microseconds(told ? static_cast<std::int64_t>(*told) : 0);
  };
  return {time("compare_us"), time("flush_us"), time("release_us")};
}

std::chrono::milliseconds reconnect_delay(unsigned attempt, const RetryDelays& delays,
                                          std::uint64_t random) {
  if (attempt == 0) return std::chrono::milliseconds(0);
  constexpr unsigned kMostDoublings = 16;
  const auto doubled =
      std::min(delays.first * (1U << std::min(attempt - 1, kMostDoublings)), delays.longest);
  // Between three quarters and the whole: sources that lost the same target don't come back in
  // step.
  const auto quarter = static_cast<std::uint64_t>(doubled.count()) / 4;
  return doubled - std::chrono::milliseconds(random % (quarter + 1));
}

Result<std::unique_ptr<Link>> Link::connect(Loop& engine, const LinkOptions& options,
                                            Answers& answers) {
  auto link = std::make_unique<LinkImpl>(engine, options, answers);
  DROVER_TRY(link->open());
  return link;
}

}  // namespace drover::mirror
