// SPDX-License-Identifier: Apache-2.0
//
// The source's end of the link: a session of several TCP connections with TLS 1.3 and a pre-shared
// key to one `drover receive` process (mirror/receiver.h). One connection carries control messages
// (JSON, small), the others ("lanes") carry frames, further ones relay QEMU's memory migration.
//
//   DROVER_ASSIGN(auto link, Link::connect(engine_loop, {.address = ..., .key = ...}, answers));
//   link->send(lane, frame);                                        // engine thread
//   DROVER_ASSIGN(auto reply, link->call({{"op", "flush"}}, 30s));  // job thread
//
// Threads: Lanes' calls and Answers' callbacks are on the engine loop's thread. call() blocks and may
// be used from any other thread, one call at a time per thread. Each lane has a thread of its own that
// encodes (zero blocks, checksum, compression), encrypts and sends.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "base/buffer.h"
#include "base/loop.h"
#include "base/result.h"
#include "mirror/lanes.h"

namespace drover::mirror {

using LinkKey = std::array<std::byte, 32>;

struct LinkOptions {
  std::string address;  // host name or IP address of the target
  std::uint16_t port = 0;
  std::string session;  // the job's id: TLS-PSK identity
  LinkKey key{};
  unsigned lanes = 2;
  std::vector<Length> disk_sizes;
  Length chunk_size = kMaxChunk;
  EncodeOptions encode;
  std::chrono::milliseconds connect_timeout{10000};
  // No sign of life from the target for this long (control connection pings): the link is lost.
  std::chrono::milliseconds silence_timeout{10000};
};

struct LinkCounters {
  std::uint64_t bytes_sent = 0;      // on the wire: payload and headers, before TLS's own overhead
  std::uint64_t bytes_received = 0;
  std::uint64_t memory_bytes = 0;    // relayed for QEMU's memory migration
  std::uint64_t frames_sent = 0;
};

class Link : public Lanes {
 public:
  static Result<std::unique_ptr<Link>> connect(Loop& engine, const LinkOptions& options,
                                               Answers& answers);
  ~Link() override = default;  // closes every connection; joins its threads

  // Sends a control message and waits for its answer. The target's refusal comes back as its Error.
  virtual Result<nlohmann::json> call(const nlohmann::json& request,
                                      std::chrono::milliseconds timeout) = 0;
  // Listens on `unix_path` (mode and owner as given) and relays each connection, encrypted, to the
  // unix socket of the same path on the target: QEMU's memory migration. Until stop_relay().
  struct RelayOptions {
    std::string unix_path;
    unsigned mode = 0600;
    int uid = -1;
    int gid = -1;
  };
  virtual Status start_relay(const RelayOptions& options) = 0;
  virtual void stop_relay() = 0;
  [[nodiscard]] virtual LinkCounters counters() const = 0;  // any thread
};

}  // namespace drover::mirror
