// SPDX-License-Identifier: Apache-2.0
#include "mirror/relay.h"

#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

namespace drover::mirror {

namespace {

constexpr int kAccountInterval = 20;  // ms

struct Pieces {
  std::unique_ptr<std::byte[]> memory = std::make_unique_for_overwrite<std::byte[]>(kMemoryBlock);
  std::size_t begin = 0;
  std::size_t end = 0;
  [[nodiscard]] std::span<const std::byte> left() const {
    return {memory.get() + begin, end - begin};
  }
  void drop(std::size_t count) {
    begin += count;
    if (begin == end) begin = end = 0;
  }
};

// From the guest's QEMU to the link.
class Outward {
 public:
  Outward(TlsSocket& link, int plain, const std::optional<Compression>& compression)
      : link_(link), plain_(plain) {
    if (!compression) return;
    choice_.emplace(*compression);
    encoder_.emplace();
  }

  // Does what can be done without blocking. True: something moved.
  Result<bool> step(RelayTotals& totals) {
    bool moved = false;
    if (can_read()) {
      DROVER_ASSIGN(moved, read());
      put_up();
    }
    if (!left_.empty()) {
      DROVER_ASSIGN(const std::size_t taken, link_.tls().write(left_));
      left_ = left_.subspan(taken);
      totals.passed.fetch_add(taken, std::memory_order_relaxed);
      moved = moved || taken > 0;
      if (left_.empty()) taken_by_link();
    }
    if (left_.empty() && !closed_) {
      if (ended_) {
        DROVER_ASSIGN(closed_, link_.tls().close());
      } else {
        DROVER_TRY(link_.tls().flush());
      }
    }
    DROVER_ASSIGN(sent_, link_.send());
    // Room again for what found none before: nothing would wake us.
    const bool more = !left_.empty() || link_.tls().unflushed() || (ended_ && !closed_);
    return moved || (sent_ && more);
  }

  [[nodiscard]] bool can_read() const { return !ended_ && left_.empty(); }
  [[nodiscard]] bool wants_link() const { return !sent_; }
  [[nodiscard]] bool done() const { return closed_ && sent_; }
  [[nodiscard]] std::int64_t taken() const { return plain_taken_; }  // from the plain socket
  // The link did not take what was at hand.
  [[nodiscard]] bool blocked() const { return !sent_ && !left_.empty(); }
  // In poll(), whatever for.
  void slept(Duration time, bool blocked) {
    slept_ += time;
    if (blocked) waits_.blocked += time;
  }

 private:
  // As much as there is; a block is better compressed the larger it is.
  Result<bool> read() {
    have_ = 0;
    while (have_ < kMemoryBlock) {
      const ssize_t count =
          ::recv(plain_, memory_.get() + have_, kMemoryBlock - have_, MSG_DONTWAIT);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
      if (count < 0) return fail_errno(errno, "reading from the memory migration's socket");
      if (count == 0) {
        ended_ = true;
        return true;
      }
      have_ += static_cast<std::size_t>(count);
      plain_taken_ += count;
      if (!choice_) break;
    }
    return have_ > 0;
  }

  void put_up() {
    left_ = {memory_.get(), have_};
    if (!choice_ || have_ == 0) return;
    const Instant start = now();
    left_ = encoder_->encode(left_, choice_->next());
    waits_.worked += now() - start;
  }

  void taken_by_link() {
    if (!choice_) return;
    const Instant time = now();
    const Duration ran = thread_time();
    const Duration closed = window_closed();
    // While the target takes nothing the wire is not what is waited for.
    waits_.blocked = std::max(Duration(), waits_.blocked - (closed - closed_before_));
    waits_.starved = std::max(Duration(), (time - before_) - slept_ - (ran - ran_before_));
    choice_->sent(time, have_, waits_);
    before_ = time;
    ran_before_ = ran;
    closed_before_ = closed;
    slept_ = Duration();
    waits_ = {};
  }

  // On a CPU.
  static Duration thread_time() {
    timespec time{};
    (void)::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  }

  // How long the target's receive window was too small for what there was to send, ever.
  [[nodiscard]] Duration window_closed() const {
    tcp_info info{};
    socklen_t size = sizeof info;
    if (::getsockopt(link_.fd(), IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return {};
    return std::chrono::microseconds(info.tcpi_rwnd_limited);
  }

  TlsSocket& link_;
  const int plain_;
  std::optional<CompressionChoice> choice_;  // none: plain bytes
  std::optional<MemoryEncoder> encoder_;
  std::unique_ptr<std::byte[]> memory_ = std::make_unique_for_overwrite<std::byte[]>(kMemoryBlock);
  std::size_t have_ = 0;
  std::int64_t plain_taken_ = 0;
  std::span<const std::byte> left_;  // not taken by the link yet
  CompressionChoice::Waits waits_;
  Duration slept_{};
  Instant before_ = now();
  Duration ran_before_ = thread_time();
  Duration closed_before_{};
  bool ended_ = false;
  bool closed_ = false;
  bool sent_ = true;
};

// From the link to the guest's QEMU.
class Inward {
 public:
  Inward(TlsSocket& link, int plain, bool blocks) : link_(link), plain_(plain) {
    if (blocks) decoder_.emplace();
  }

  Result<bool> step(RelayTotals& totals) {
    bool moved = false;
    while (!done_) {
      if (!left().empty()) {
        const auto left = this->left();
        const ssize_t count = ::send(plain_, left.data(), left.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return moved;
        if (count < 0) return fail_errno(errno, "writing to the memory migration's socket");
        drop(static_cast<std::size_t>(count));
        put_ += count;
        totals.passed.fetch_add(static_cast<std::uint64_t>(count), std::memory_order_relaxed);
        moved = true;
        continue;
      }
      DROVER_TRY(decoder_ ? fill_block(moved) : fill(moved));
      if (link_.tls().closed() && left().empty()) {
        if (decoder_ && !decoder_->between_blocks()) {
          return fail(Code::Protocol, "the memory ends within a block");
        }
        ::shutdown(plain_, SHUT_WR);
        done_ = true;
        return true;
      }
      if (left().empty()) return moved;
    }
    return moved;
  }

  [[nodiscard]] bool can_receive() const { return !done_ && left().empty(); }
  [[nodiscard]] bool wants_plain() const { return !left().empty(); }
  [[nodiscard]] std::int64_t put() const { return put_; }  // into the plain socket
  [[nodiscard]] bool done() const { return done_; }

 private:
  [[nodiscard]] std::span<const std::byte> left() const {
    return decoder_ ? decoder_->decoded() : buffer_.left();
  }
  void drop(std::size_t count) {
    if (decoder_) {
      decoder_->drop(count);
    } else {
      buffer_.drop(count);
    }
  }

  // Until there is a block or nothing more has come.
  Status fill_block(bool& moved) {
    while (decoder_->decoded().empty()) {
      const std::span<std::byte> room = decoder_->space();
      DROVER_ASSIGN(const std::size_t count, link_.tls().read(room));
      DROVER_TRY(decoder_->received(count));
      if (count == room.size()) continue;
      if (link_.tls().closed()) return {};
      DROVER_ASSIGN(const bool received, link_.receive());
      if (!received) return {};
      moved = true;
    }
    return {};
  }

  // Decrypts until the buffer is full or nothing more has come.
  Status fill(bool& moved) {
    while (buffer_.end < kMemoryBlock) {
      const std::span<std::byte> room(buffer_.memory.get() + buffer_.end,
                                      kMemoryBlock - buffer_.end);
      DROVER_ASSIGN(const std::size_t count, link_.tls().read(room));
      buffer_.end += count;
      if (count == room.size() || link_.tls().closed()) return {};
      DROVER_ASSIGN(const bool received, link_.receive());
      if (!received) return {};
      moved = true;
    }
    return {};
  }

  TlsSocket& link_;
  const int plain_;
  Pieces buffer_;
  std::optional<MemoryDecoder> decoder_;  // none: plain bytes
  std::int64_t put_ = 0;
  bool done_ = false;
};

// Keeps the totals of what QEMU has given and loaded up to date: a socket's buffer lies between it
// and us.
class Account {
 public:
  Account(int plain, RelayTotals& totals) : plain_(plain), totals_(totals) {}
  ~Account() {
    totals_.given -= given_;
    totals_.loaded -= loaded_;
  }
  Account(const Account&) = delete;
  Account& operator=(const Account&) = delete;

  // What we have taken from the plain socket and put into it. True: more is in its buffers.
  bool look(std::int64_t taken, std::int64_t put) {
    int waits = 0;
    int unread = 0;  // of a unix socket this counts what the buffers take, which is somewhat more
    if (::ioctl(plain_, SIOCINQ, &waits) != 0) waits = 0;
    if (::ioctl(plain_, SIOCOUTQ, &unread) != 0) unread = 0;
    const std::int64_t given = taken + waits;
    const std::int64_t loaded = std::max<std::int64_t>(0, put - unread);
    totals_.given += given - std::exchange(given_, given);
    totals_.loaded += loaded - std::exchange(loaded_, loaded);
    return waits > 0 || unread > 0;
  }

 private:
  const int plain_;
  RelayTotals& totals_;
  std::int64_t given_ = 0;
  std::int64_t loaded_ = 0;
};

}  // namespace

Status Gate::open() {
  fd_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd_) return fail_errno(errno, "creating an eventfd");
  return {};
}

void Gate::set(bool open) {
  const std::lock_guard lock(mutex_);
  if (open_.exchange(open) == open || !fd_) return;
  std::uint64_t count = 1;
  if (open) {
    (void)!::write(fd_.get(), &count, sizeof count);
  } else {
    (void)!::read(fd_.get(), &count, sizeof count);
  }
}

Status relay(TlsSocket& link, int plain, int stop_fd, RelayTotals& totals, const Gate* gate,
             const RelayCoding& coding) {
  link.tls().grow_buffers(kMemoryBlock, kMemoryBlock + kMemoryBlock / 4);
  Outward outward(link, plain, coding.outward);
  Inward inward(link, plain, coding.inward);
  Account account(plain, totals);
  while (true) {
    const bool open = gate == nullptr || gate->is_open();
    bool out_moved = false;
    if (open) {
      DROVER_ASSIGN(out_moved, outward.step(totals));
    }
    DROVER_ASSIGN(const bool in_moved, inward.step(totals));
    const bool buffered = account.look(outward.taken(), inward.put());
    if (outward.done() && inward.done()) return {};
    if (out_moved || in_moved) continue;
    const auto events = [](bool in, bool out) {
      return static_cast<short>((in ? POLLIN : 0) | (out ? POLLOUT : 0));
    };
    const short plain_events = events(open && outward.can_read(), inward.wants_plain());
    const short link_events = events(inward.can_receive(), open && outward.wants_link());
    std::array<pollfd, 4> polled = {pollfd{plain_events != 0 ? plain : -1, plain_events, 0},
                                    pollfd{link_events != 0 ? link.fd() : -1, link_events, 0},
                                    pollfd{stop_fd, POLLIN, 0},
                                    pollfd{open ? -1 : gate->fd(), POLLIN, 0}};
    const Instant asleep = now();
    // Nothing wakes us when the buffers get emptier, or fuller while nothing is read.
    const bool look = buffered || (plain_events & POLLIN) == 0;
    const int ready = ::poll(polled.data(), polled.size(), look ? kAccountInterval : -1);
    outward.slept(now() - asleep, open && outward.blocked());
    if (ready < 0 && errno != EINTR) return fail_errno(errno, "waiting for the memory migration");
    if (ready > 0 && polled[2].revents != 0) {
      return fail(Code::Cancelled, "the memory migration's connection was closed");
    }
  }
}

Result<UniqueFd> connect_unix(const std::string& path) {
  const std::string doing = "connecting to " + path;
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  if (path.size() >= sizeof name.sun_path) return fail_errno(ENAMETOOLONG, doing);
  std::ranges::copy(path, name.sun_path);
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) return fail_errno(errno, doing);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) != 0) {
    return fail_errno(errno, doing);
  }
  return fd;
}

}  // namespace drover::mirror
