// SPDX-License-Identifier: Apache-2.0
//
// Carries bytes between a plain stream socket and a TLS connection of the link, both ways at once:
// QEMU's memory migration. The same code runs on both hosts.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "base/result.h"
#include "mirror/memory_codec.h"
#include "mirror/socket.h"

namespace drover::mirror {

// Holds back what comes from the plain socket while it is closed. Any thread.
class Gate {
 public:
  Status open();  // makes it; closed
  void set(bool open);
  [[nodiscard]] bool is_open() const { return open_.load(); }
  [[nodiscard]] int fd() const { return fd_.get(); }  // readable while it is open

 private:
  std::mutex mutex_;
  std::atomic<bool> open_{false};
  UniqueFd fd_;
};

// What travels in blocks (mirror/memory_codec.h) instead of as plain bytes: both ends agreed on it.
struct RelayCoding {
  std::optional<Compression> outward;  // what goes to the link
  bool inward = false;                       // what comes from it
};

// Of all relays of one side, as it happens, or at most 20 ms old; `given` and `loaded` of those that run.
struct RelayTotals {
  std::atomic<std::uint64_t> passed{0};  // both directions together: blocks as they are on the wire where they go
                                         // out, memory where it comes in
  std::atomic<std::int64_t> given{0};    // by who is behind the plain sockets, also what waits there to be read
  std::atomic<std::int64_t> loaded{0};   // by them: what they have read of what came from the link. Rather too
                                         // little than too much, while they have not read all
};

// Blocks until both directions have ended (ok), one broke, or `stop_fd` became readable
// (Cancelled). Protocol: what came in are no blocks. The end of one direction is passed on
// (half-close) while the other goes on. Holds at most about 2 MiB; when one side does not take what
// the other sends, the latter is no longer read.
Status relay(TlsSocket& link, int plain, int stop_fd, RelayTotals& totals, const Gate* gate = nullptr,
             const RelayCoding& coding = {});

// Connects to a unix socket; NotFound, Denied, Unreachable with the path.
Result<UniqueFd> connect_unix(const std::string& path);

}  // namespace drover::mirror
