// SPDX-License-Identifier: Apache-2.0
//
// The source's end of the link: a session of several TCP connections with TLS 1.3 and a pre-shared
// key to one `drover receive` process (mirror/receiver.h). One connection carries control messages
// (JSON, small), the others ("lanes") carry frames, further ones relay QEMU's memory migration.
//
//   DROVER_ASSIGN(auto link, Link::connect(engine_loop, {.address = ..., .key = ...}, answers));
//   DROVER_ASSIGN(auto made, link->call({{"op", "reserve"}, {"disks", ...}}, 60s));  // job thread
//   link->send(lane, frame);                                                      // engine thread
//   DROVER_TRY(link->barrier(30s));                                               // job thread
//   DROVER_TRY(link->call({{"op", "finish"}}, 30s));
//
// docs/protocol.md lists the operations that call() knows.
//
// Threads: Lanes' calls and Answers' callbacks are on the engine loop's thread, and so is the
// Link's destruction (or when that loop no longer runs). connect(), call(), barrier() and
// start_relay() block: use them from other threads. Each lane has a thread of its own that encodes
// (zero blocks, checksum, compression), encrypts and sends.
//
// Order: of two frames of one chunk the first that was queued is sent first; a guest's write may
// overtake waiting copies of other chunks (mirror/lane_queue.h).
//
// Loss: a lane that breaks is reported once, by Answers::lane_lost(), and stays lost. When the
// control connection breaks, or the target is silent for too long, every lane is lost and calls
// fail with Unreachable. Nothing is rebuilt: connect() again, with the next epoch.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/loop.h"
#include "base/result.h"
#include "mirror/lanes.h"
#include "mirror/tls.h"

namespace drover::mirror {

struct LinkOptions {
  std::string address;  // host name or IP address of the target
  std::uint16_t port = 0;
  std::string session;  // the job's id: TLS-PSK identity
  LinkKey key{};
  // Counts the connects of one session: the receiver drops what is older.
  std::uint64_t epoch = 1;
  unsigned lanes = 2;  // 1 to 16
  std::vector<Length> disk_sizes;
  Length chunk_size = kMaxChunk;
  EncodeOptions encode;
  std::chrono::milliseconds connect_timeout{10000};
  // No sign of life from the target for this long, on any connection: it is lost.
  std::chrono::milliseconds silence_timeout{10000};
};

struct LinkCounters {
  std::uint64_t bytes_sent = 0;  // on the wire: payload and headers, before TLS's own overhead
  std::uint64_t bytes_received = 0;
  std::uint64_t memory_bytes = 0;  // relayed for QEMU's memory migration
  std::uint64_t frames_sent = 0;
};

class Link : public Lanes {
 public:
  static Result<std::unique_ptr<Link>> connect(Loop& engine, const LinkOptions& options,
                                               Answers& answers);
  ~Link() override = default;  // closes every connection; joins its threads

  // Sends a control message and waits for its answer. The target's refusal comes back as its Error;
  // Unreachable when the connection broke or no answer came in time. {"op":"finish"} ends the
  // lanes, without lane_lost(); after its answer the Link is only good for destruction.
  virtual Result<nlohmann::json> call(const nlohmann::json& request,
                                      std::chrono::milliseconds timeout) = 0;
  // The source is still and nothing more will be queued: waits until every frame is answered, then
  // has the target prove that it took the same frames in the same order, flush its images to stable
  // storage and release them. The images are kept from {"op":"keep"} on, at the latest from here.
  // Protocol if the proof fails (it names the lane), Busy if frames stay unanswered, Unreachable,
  // or the target's error.
  virtual Status barrier(std::chrono::milliseconds timeout) = 0;
  // Listens on `unix_path` (mode and owner as given; removed at the end) and relays each
  // connection, encrypted, to the unix socket of the same path on the target: QEMU's memory
  // migration. Until stop_relay(), which breaks the connections that are left.
  struct RelayOptions {
    std::string unix_path;
    bool gated = false;  // connections are taken, but nothing is carried until let_memory_pass(true)
    unsigned mode = 0600;
    int uid = -1;
    int gid = -1;
  };
  virtual Status start_relay(const RelayOptions& options) = 0;
  // Opens and closes the gate of a gated relay: what the source's QEMU sends waits while it is closed.
  // Any thread.
  virtual void let_memory_pass(bool pass) = 0;
  virtual void stop_relay() = 0;
  [[nodiscard]] virtual LinkCounters counters() const = 0;  // any thread
};

}  // namespace drover::mirror
