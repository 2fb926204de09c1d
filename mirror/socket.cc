// SPDX-License-Identifier: Apache-2.0
#include "mirror/socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "mirror/session.h"

namespace drover::mirror {

namespace {

// Unsent bytes that the kernel holds of one connection.
constexpr int kUnsent = 256 << 10;
constexpr int kBacklog = 64;
constexpr int kKeepalive = 5;  // seconds between probes

struct AddressesDeleter {
  void operator()(addrinfo* list) const { ::freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, AddressesDeleter>;

void set_option(int fd, int level, int name, int value) {
  // Tuning only: an old kernel may not know an option.
  (void)::setsockopt(fd, level, name, &value, sizeof value);
}

Result<Addresses> resolve(const std::string& address, std::uint16_t port, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int rc = ::getaddrinfo(address.empty() ? nullptr : address.c_str(),
                               std::to_string(port).c_str(), &hints, &list);
  if (rc != 0) {
    return fail(Code::NotFound,
                fmt::format("looking up the address of {}: {}", address,
                            rc == EAI_SYSTEM ? std::strerror(errno) : ::gai_strerror(rc)));
  }
  return Addresses(list);
}

int remaining_ms(Instant deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now());
  return static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 3600 * 1000));
}

Result<UniqueFd> connect_one(const addrinfo& address, const std::string& doing, Instant deadline,
                             int cancel_fd) {
  UniqueFd fd(::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return fail_errno(errno, doing);
  if (::connect(fd.get(), address.ai_addr, address.ai_addrlen) != 0) {
    if (errno != EINPROGRESS) return fail_errno(errno, doing);
    DROVER_TRY(wait_for(fd.get(), POLLOUT, deadline, cancel_fd, doing));
    int error = 0;
    socklen_t size = sizeof error;
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
    if (error != 0) return fail_errno(error, doing);
  }
  // From here on every call says itself whether it may block.
  const int flags = ::fcntl(fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK) != 0) {
    return fail_errno(errno, doing);
  }
  return fd;
}

Result<Listener> listen_on(const addrinfo& address, bool both, std::uint16_t port,
                           const std::string& doing) {
  UniqueFd fd(::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) return fail_errno(errno, doing);
  set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (address.ai_family == AF_INET6) set_option(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, both ? 0 : 1);
  sockaddr_storage name{};
  std::memcpy(&name, address.ai_addr, address.ai_addrlen);
  socklen_t size = address.ai_addrlen;
  auto* const in6 = reinterpret_cast<sockaddr_in6*>(&name);
  auto* const in4 = reinterpret_cast<sockaddr_in*>(&name);
  (address.ai_family == AF_INET6 ? in6->sin6_port : in4->sin_port) = htons(port);
  if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&name), size) != 0 ||
      ::listen(fd.get(), kBacklog) != 0) {
    return fail_errno(errno, doing);
  }
  size = sizeof name;
  if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&name), &size) != 0) {
    return fail_errno(errno, doing);
  }
  Listener listener;
  listener.port = ntohs(address.ai_family == AF_INET6 ? in6->sin6_port : in4->sin_port);
  listener.fd = std::move(fd);
  return listener;
}

}  // namespace

void tune_socket(int fd, std::chrono::milliseconds give_up) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, kUnsent);
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT,
             static_cast<int>(std::clamp<std::int64_t>(give_up.count(), 0, 3600 * 1000)));
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepalive);
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepalive);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 4);
}

Status wait_for(int fd, short events, Instant deadline, int cancel_fd, std::string_view doing) {
  while (true) {
    std::array<pollfd, 2> polled = {pollfd{fd, events, 0}, pollfd{cancel_fd, POLLIN, 0}};
    const int ready = ::poll(polled.data(), polled.size(), remaining_ms(deadline));
    if (ready < 0 && errno != EINTR) return fail_errno(errno, doing);
    if (ready > 0 && polled[1].revents != 0) {
      return fail(Code::Cancelled, fmt::format("{}: cancelled", doing));
    }
    if (ready > 0 && polled[0].revents != 0) return {};
    if (now() >= deadline) {
      return fail(Error{Code::Unreachable, fmt::format("{}: no answer in time", doing), "", true});
    }
  }
}

Result<UniqueFd> connect_tcp(const std::string& address, std::uint16_t port, Instant deadline,
                             int cancel_fd) {
  const std::string doing = fmt::format("connecting to {} port {}", address, port);
  DROVER_ASSIGN(const Addresses list, resolve(address, port, 0));
  Result<UniqueFd> last = fail(Code::Unreachable, doing + ": it has no address");
  int left = 0;
  for (const addrinfo* one = list.get(); one != nullptr; one = one->ai_next) ++left;
  for (const addrinfo* one = list.get(); one != nullptr; one = one->ai_next, --left) {
    // An address that swallows everything leaves time for the others.
    last = connect_one(*one, doing, now() + (deadline - now()) / left, cancel_fd);
    if (last || last.error().code == Code::Cancelled) break;
  }
  if (!last && last.error().code != Code::Cancelled) {
    last.error().code = Code::Unreachable;
    last.error().hint = "does a firewall between the hosts block this port?";
  }
  return last;
}

Result<Listener> listen_tcp(const ListenOptions& options) {
  const std::uint16_t last_port = std::max(options.port, options.last_port);
  const std::string doing =
      fmt::format("listening on {} port {}", options.address.empty() ? "*" : options.address,
                  options.port == 0 ? "any" : std::to_string(options.port));
  DROVER_ASSIGN(const Addresses list, resolve(options.address, options.port, AI_PASSIVE));
  Result<Listener> last = fail(Code::Unreachable, doing + ": there is no address");
  // IPv6 first: it serves both where the host has it.
  for (const int family : {AF_INET6, AF_INET}) {
    for (const addrinfo* one = list.get(); one != nullptr; one = one->ai_next) {
      if (one->ai_family != family) continue;
      for (std::uint32_t port = options.port; port <= last_port; ++port) {
        last = listen_on(*one, options.address.empty(), static_cast<std::uint16_t>(port), doing);
        if (last) return last;
      }
    }
  }
  return last;
}

Result<bool> TlsSocket::receive() {
  const std::span<std::byte> space = tls_->input_space();
  CHECK(!space.empty(), "read() empties the input first");
  const ssize_t count = ::recv(fd_.get(), space.data(), space.size(), MSG_DONTWAIT);
  if (count < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return false;
    return fail_errno(errno, "receiving from the link");
  }
  if (count == 0) {
    tls_->input_ended();
  } else {
    tls_->input_received(static_cast<std::size_t>(count));
  }
  return true;
}

Result<bool> TlsSocket::send() {
  while (!tls_->output().empty()) {
    const std::span<const std::byte> bytes = tls_->output();
    const ssize_t count =
        ::send(fd_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
      return fail_errno(errno, "sending on the link");
    }
    tls_->output_sent(static_cast<std::size_t>(count));
  }
  return true;
}

Status TlsSocket::send_all(Instant deadline) {
  while (true) {
    DROVER_ASSIGN(const bool sent, send());
    if (sent) return {};
    DROVER_TRY(wait_for(fd_.get(), POLLOUT, deadline, cancel_fd_, "sending on the link"));
  }
}

Status TlsSocket::handshake(Instant deadline) {
  while (true) {
    auto done = tls_->handshake();
    if (!done) {
      (void)send();  // the alert that says why, if it goes out
      return fail(std::move(done).error());
    }
    DROVER_TRY(send_all(deadline));
    if (*done) return {};
    DROVER_TRY(wait_for(fd_.get(), POLLIN, deadline, cancel_fd_, "the TLS handshake"));
    DROVER_TRY(receive());
  }
}

Status TlsSocket::write_all(std::string_view bytes, Instant deadline) {
  auto left = std::as_bytes(std::span(bytes));
  while (true) {
    DROVER_ASSIGN(const std::size_t taken, tls_->write(left));
    left = left.subspan(taken);
    DROVER_ASSIGN(const bool flushed, tls_->flush());
    DROVER_TRY(send_all(deadline));
    if (left.empty() && flushed) return {};
  }
}

Result<std::string> TlsSocket::read_message(std::size_t limit, Instant deadline) {
  MessageReader reader(limit);
  while (true) {
    DROVER_ASSIGN(const std::size_t count, tls_->read(reader.space()));
    if (count > 0) {
      DROVER_ASSIGN(auto message, reader.received(count));
      if (message) return std::move(*message);
      continue;
    }
    if (tls_->closed()) {
      return fail(Error{Code::Unreachable, "the other side closed the connection", "", true});
    }
    DROVER_TRY(wait_for(fd_.get(), POLLIN, deadline, cancel_fd_, "waiting for the other side"));
    DROVER_TRY(receive());
  }
}

}  // namespace drover::mirror
