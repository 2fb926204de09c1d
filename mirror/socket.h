// SPDX-License-Identifier: Apache-2.0
//
// TCP sockets of the link, and a TLS session on one of them for threads that poll(2): the source's
// connections and the memory relay. (The receiver's lanes drive Tls with their Loop.)
//
//   DROVER_ASSIGN(UniqueFd fd, connect_tcp("hostb", 40123, deadline));
//   TlsSocket socket(std::move(fd), std::move(tls));
//   DROVER_TRY(socket.handshake(deadline));
//   DROVER_TRY(socket.write_all(encode_message(hello), deadline));
//
// Threads: a TlsSocket belongs to one thread at a time. Signals: nothing here raises SIGPIPE.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "mirror/tls.h"

namespace drover::mirror {

// No delay for small frames, little unsent data in the kernel (so that a guest's write does not
// queue behind megabytes), keepalive probes when idle.
//
// `give_up`: the kernel breaks the connection when the peer has not acknowledged data, or has had
// no room for any, for so long. Zero for lanes: their target may rightly take nothing for as long
// as its disk stalls (Linux does not tell a full peer from a dead one here); their beats show that
// it lives.
void tune_socket(int fd, std::chrono::milliseconds give_up);

// Tries every address of the name until one answers. NotFound for an unknown name, Unreachable
// otherwise. `cancel_fd` (if not negative): gives up with Cancelled when it becomes readable.
Result<UniqueFd> connect_tcp(const std::string& address, std::uint16_t port, Instant deadline,
                             int cancel_fd = -1);

struct ListenOptions {
  std::string address;          // empty: every address, IPv6 and IPv4
  std::uint16_t port = 0;       // 0: any free one
  std::uint16_t last_port = 0;  // with port: the first free one of this range
};
struct Listener {
  UniqueFd fd;
  std::uint16_t port = 0;
};
Result<Listener> listen_tcp(const ListenOptions& options);

// Waits for `events` on `fd`. Unreachable ("doing: no answer ...") at the deadline, Cancelled if
// cancel_fd becomes readable.
Status wait_for(int fd, short events, Instant deadline, int cancel_fd, std::string_view doing);

class TlsSocket {
 public:
  TlsSocket(UniqueFd fd, std::unique_ptr<Tls> tls) : fd_(std::move(fd)), tls_(std::move(tls)) {}
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] Tls& tls() const { return *tls_; }
  // Readable: the blocking calls below give up.
  void set_cancel_fd(int cancel_fd) { cancel_fd_ = cancel_fd; }

  // Do not block. receive(): false when nothing came. send(): true when all output is sent.
  Result<bool> receive();
  Result<bool> send();

  // Block, at most until the deadline.
  Status handshake(Instant deadline);
  Status write_all(std::string_view bytes, Instant deadline);
  Result<std::string> read_message(std::size_t limit, Instant deadline);

 private:
  Status send_all(Instant deadline);

  UniqueFd fd_;
  std::unique_ptr<Tls> tls_;
  int cancel_fd_ = -1;
};

}  // namespace drover::mirror
