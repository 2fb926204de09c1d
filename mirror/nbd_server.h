// SPDX-License-Identifier: Apache-2.0
//
// The NBD server that QEMU's mirror job writes into: the guest's write path. Serves one export over
// a unix socket: fixed newstyle handshake, GO, simple replies (structured where the client
// negotiates them and the protocol asks for it), write, write zeroes, trim, flush; reads are
// refused with EPERM. The client is not trusted: what breaks the protocol ends its connection and
// nothing else.
//
//   NbdServer::Events events;
//   events.request = [&](NbdRequest request) { ...; server->complete(request.id, 0); };
//   DROVER_ASSIGN(auto server, NbdServer::listen(loop, pool, {.socket_path = ..., ...}, events));
//
// Two layers: NbdSession (nbd_session.h) is the protocol without I/O, and NbdServer puts it on a
// Loop and a unix socket.
//
// Flush and FUA. A Flush is handed on like any other request and may be answered at once: NBD asks
// that a flush covers the writes *answered* before it, and when those were answered is the engine's
// decision. FUA is not handed on at all. The reason: nothing that the guest relies on is behind
// this socket. Until the barrier the guest's promise of durability is kept by the source's images,
// which QEMU writes and flushes itself (its mirror does not even pass the guest's flushes on: the
// one that comes is the job's own, before it reports ready), and at the barrier drover flushes the
// target's images whatever the guest asked for before. If target or link die sooner, the move is
// undone or resumed from the source.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/buffer.h"
#include "base/loop.h"
#include "base/result.h"
#include "base/units.h"

namespace drover::mirror {

// One request of the client's, already checked against the export's size and limits.
struct NbdRequest {
  enum class Kind { Write, Zero, Discard, Flush };
  Kind kind = Kind::Write;
  Extent extent;         // not empty and within the export; empty for Flush
  std::uint64_t id = 0;  // names the request in complete(); never used twice by a server
  // Write: keeps `payload` alive, for as long as the handler holds on to it (it may be longer than
  // until complete()). Several requests may share one buffer.
  Buffer buffer;
  std::span<const std::byte> payload;  // Write: the extent's bytes; not aligned to anything
};

struct NbdServerOptions {
  std::string socket_path;  // created by the server, removed by its destructor
  unsigned socket_mode = 0600;
  // QEMU runs as another user: the socket's owner; -1 leaves it
  int socket_uid = -1;
  int socket_gid = -1;
  std::string export_name;
  Length size;
  // Requests answered later than they arrive: at most this many at once; then reading stops. QEMU
  // has at most 16 in flight. At most 1024.
  unsigned max_in_flight = 32;
  // A client that has not finished its handshake by then is thrown out: there is room for one.
  std::chrono::milliseconds handshake_timeout{10000};
};

// Threads: all on the loop's thread.
//
// Lifetime: the Loop must outlive the server, and the pool the Loop: a receive into one of its
// buffers may be under way, so that one comes back only when the loop runs on, or goes. Destroying
// the server with requests outstanding is safe, also from inside one of its events: the client sees
// the connection close (QEMU drops the mirror job, the guest runs on).
class NbdServer {
 public:
  // Called for each request; answer with complete(), in any order, now or later.
  using Handler = std::function<void(NbdRequest request)>;
  // `connected`: a client finished its handshake. A mirror job has one connection; a second client
  // is refused (its connection closes at once) while one is there. `disconnected`, once for each
  // `connected`: it is gone, and why (Protocol if it was thrown out). Requests outstanding then
  // need no complete(). While nothing is read (max_in_flight requests are unanswered, or no buffer
  // is free) nobody notices that a client has gone.
  struct Events {
    Handler request;
    std::function<void()> connected;
    std::function<void(const Error&)> disconnected;
    // A client's socket, from when it is accepted until it is closed: for who must be able to end
    // the connection when this process can't (endpoint_watchdog.h). `closing` comes also from the
    // destructor.
    std::function<void(int socket)> accepted;
    std::function<void(int socket)> closing;
  };

  // Buffers for payloads come from `pool`. The largest write a client may send is the pool's buffer
  // size, which is announced as the maximum block size (QEMU 7.2 and 10.0 split what is longer; a
  // client that does not gets EINVAL). A connected client holds one buffer; writes are received
  // next to each other into it, and a new one is taken when it is full. So at most one more buffer
  // is out than there are requests whose `buffer` somebody holds. No buffer left: reading stops,
  // and the guest waits.
  //
  // The socket is nobody's until it is listened on: it has its owner and mode before anybody can
  // connect. A socket left behind by a crash (nobody listens on it; it belongs to this process's
  // user or to socket_uid) is replaced. Errors: AlreadyExists (another file is there), Busy
  // (somebody listens on it), InvalidArgument (path longer than the 107 bytes of a unix address),
  // and the system's.
  static Result<std::unique_ptr<NbdServer>> listen(Loop& loop, BufferPool& pool,
                                                   const NbdServerOptions& options, Events events);
  virtual ~NbdServer() = default;  // closes the connection and removes the socket

  // errno_value 0: done; otherwise EIO, ENOSPC, ... Unknown ids (their connection is gone) are
  // ignored. May hand on further requests before it returns.
  virtual void complete(std::uint64_t id, int errno_value) = 0;

  // A client is connected, and neither it nor anybody here (endpoint_watchdog.h) has ended the connection
  // by now, whether that was noticed or not.
  [[nodiscard]] virtual bool client_is_there() const = 0;

  // Tells the server that the pool may have buffers again; call it (on the loop's thread) after
  // BufferPool::on_available, which belongs to the pool's owner:
  //   pool.on_available([&] { loop.post([&] { server->buffers_available(); copier.resume(); }); });
  // Tell servers before copiers: a guest waits for this one. Harmless when nothing was waiting.
  virtual void buffers_available() = 0;
};

}  // namespace drover::mirror
