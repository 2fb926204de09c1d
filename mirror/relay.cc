// SPDX-License-Identifier: Apache-2.0
#include "mirror/relay.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <span>

namespace drover::mirror {

namespace {

constexpr std::size_t kPiece = std::size_t{256} << 10;

struct Pieces {
  std::unique_ptr<std::byte[]> memory = std::make_unique_for_overwrite<std::byte[]>(kPiece);
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
  Outward(TlsSocket& link, int plain) : link_(link), plain_(plain) {}

  // Does what can be done without blocking. True: something moved.
  Result<bool> step(std::atomic<std::uint64_t>& bytes) {
    bool moved = false;
    if (can_read()) {
      const ssize_t count = ::recv(plain_, buffer_.memory.get(), kPiece, MSG_DONTWAIT);
      if (count > 0) {
        buffer_.end = static_cast<std::size_t>(count);
        moved = true;
      } else if (count == 0) {
        ended_ = true;
        moved = true;
      } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
        return fail_errno(errno, "reading from the memory migration's socket");
      }
    }
    if (!buffer_.left().empty()) {
      DROVER_ASSIGN(const std::size_t taken, link_.tls().write(buffer_.left()));
      buffer_.drop(taken);
      bytes.fetch_add(taken, std::memory_order_relaxed);
      moved = moved || taken > 0;
    }
    if (buffer_.left().empty() && !closed_) {
      if (ended_) {
        DROVER_ASSIGN(closed_, link_.tls().close());
      } else {
        DROVER_TRY(link_.tls().flush());
      }
    }
    DROVER_ASSIGN(sent_, link_.send());
    // Room again for what found none before: nothing would wake us.
    const bool more = !buffer_.left().empty() || link_.tls().unflushed() || (ended_ && !closed_);
    return moved || (sent_ && more);
  }

  [[nodiscard]] bool can_read() const { return !ended_ && buffer_.left().empty(); }
  [[nodiscard]] bool wants_link() const { return !sent_; }
  [[nodiscard]] bool done() const { return closed_ && sent_; }

 private:
  TlsSocket& link_;
  const int plain_;
  Pieces buffer_;
  bool ended_ = false;
  bool closed_ = false;
  bool sent_ = true;
};

// From the link to the guest's QEMU.
class Inward {
 public:
  Inward(TlsSocket& link, int plain) : link_(link), plain_(plain) {}

  Result<bool> step(std::atomic<std::uint64_t>& bytes) {
    bool moved = false;
    while (!done_) {
      if (!buffer_.left().empty()) {
        const auto left = buffer_.left();
        const ssize_t count = ::send(plain_, left.data(), left.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return moved;
        if (count < 0) return fail_errno(errno, "writing to the memory migration's socket");
        buffer_.drop(static_cast<std::size_t>(count));
        bytes.fetch_add(static_cast<std::uint64_t>(count), std::memory_order_relaxed);
        moved = true;
        continue;
      }
      DROVER_TRY(fill(moved));
      if (link_.tls().closed() && buffer_.left().empty()) {
        ::shutdown(plain_, SHUT_WR);
        done_ = true;
        return true;
      }
      if (buffer_.left().empty()) return moved;
    }
    return moved;
  }

  [[nodiscard]] bool can_receive() const { return !done_ && buffer_.left().empty(); }
  [[nodiscard]] bool wants_plain() const { return !buffer_.left().empty(); }
  [[nodiscard]] bool done() const { return done_; }

 private:
  // Decrypts until the buffer is full or nothing more has come.
  Status fill(bool& moved) {
    while (buffer_.end < kPiece) {
      const std::span<std::byte> room(buffer_.memory.get() + buffer_.end, kPiece - buffer_.end);
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
  bool done_ = false;
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

Status relay(TlsSocket& link, int plain, int stop_fd, std::atomic<std::uint64_t>& bytes,
             const Gate* gate) {
  link.tls().grow_buffers(kPiece, kPiece + kPiece / 4);
  Outward outward(link, plain);
  Inward inward(link, plain);
  while (true) {
    const bool open = gate == nullptr || gate->is_open();
    bool out_moved = false;
    if (open) {
      DROVER_ASSIGN(out_moved, outward.step(bytes));
    }
    DROVER_ASSIGN(const bool in_moved, inward.step(bytes));
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
    const int ready = ::poll(polled.data(), polled.size(), -1);
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
