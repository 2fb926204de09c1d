// SPDX-License-Identifier: Apache-2.0
//
// The NBD server that QEMU's mirror job writes into: the guest's write path. Serves one export over a
// unix socket: fixed newstyle handshake, GO, simple replies (structured where the client negotiates
// them), write, write zeroes, trim, flush; reads are refused with EINVAL... cleanly. The client is not
// trusted: what breaks the protocol ends its connection and nothing else.
//
// Two layers: NbdSession is the protocol without I/O (bytes in, requests and bytes out; fuzzed), and
// NbdServer puts it on a Loop and a unix socket.
#pragma once

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
  Extent extent;                       // empty for Flush
  std::uint64_t id = 0;                // names the request in complete()
  Buffer buffer;                       // Write: holds `payload`
  std::span<const std::byte> payload;  // Write: the extent's bytes
};

struct NbdServerOptions {
  std::string socket_path;  // created by the server, removed by its destructor
  unsigned socket_mode = 0600;
  // QEMU runs as another user: the socket's owner; -1 leaves it
  int socket_uid = -1;
  int socket_gid = -1;
  std::string export_name;
  Length size;
  // Requests answered later than they arrive: at most this many at once; then reading stops.
  unsigned max_in_flight = 32;
};

// Threads: all on the loop's thread.
class NbdServer {
 public:
  // Called for each request; answer with complete(), in any order, now or later.
  using Handler = std::function<void(NbdRequest request)>;
  // The client came or went (with why); a mirror job has one connection, and a second client is
  // refused while one is connected.
  struct Events {
    Handler request;
    std::function<void()> connected;
    std::function<void(const Error&)> disconnected;
  };

  // Buffers for payloads come from `pool` (one buffer per write; the largest write a client may send
  // is the pool's buffer size, which is announced as the maximum block size).
  static Result<std::unique_ptr<NbdServer>> listen(Loop& loop, BufferPool& pool,
                                                   const NbdServerOptions& options, Events events);
  virtual ~NbdServer() = default;  // closes the connection and removes the socket

  // errno_value 0: done; otherwise EIO, ENOSPC, ... Unknown ids (their connection is gone) are ignored.
  virtual void complete(std::uint64_t id, int errno_value) = 0;
};

}  // namespace drover::mirror
