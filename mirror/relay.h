// SPDX-License-Identifier: Apache-2.0
//
// Carries bytes between a plain stream socket and a TLS connection of the link, both ways at once:
// QEMU's memory migration. The same code runs on both hosts.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "base/result.h"
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

// Blocks until both directions have ended (ok), one broke, or `stop_fd` became readable
// (Cancelled). The end of one direction is passed on (half-close) while the other goes on. Holds at
// most about 1 MiB; when one side does not take what the other sends, the latter is no longer read.
// `bytes` counts what was passed on, both directions together, as it happens.
Status relay(TlsSocket& link, int plain, int stop_fd, std::atomic<std::uint64_t>& bytes,
             const Gate* gate = nullptr);

// Connects to a unix socket; NotFound, Denied, Unreachable with the path.
Result<UniqueFd> connect_unix(const std::string& path);

}  // namespace drover::mirror
