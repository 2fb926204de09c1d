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
// Loss: when one of the connections breaks, or nothing is heard on it for too long, the whole link
// goes down: Answers::link_down() once, no answer of that epoch afterwards. A thread of the link's
// then connects again, with growing pauses and a new epoch each time, until it is up
// (Answers::link_up()) or must not or can't go on (Answers::link_failed()). The receiver applies or
// drops what is left of the old epoch before it welcomes the new one. The first connect() is one
// try and reports nothing.
//
// While it is down: send() drops, call() waits for the link within its timeout, barrier() and
// start_relay() fail with Unreachable. A call under way when the link goes down fails at once, with
// Unreachable: whether it was carried out is not known.
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
#include "mirror/addresses.h"
#include "mirror/compression.h"
#include "mirror/lanes.h"
#include "mirror/memory_codec.h"
#include "mirror/session.h"
#include "mirror/tls.h"

namespace drover::mirror {

// Between two tries to reconnect: none, `first`, twice that and so on up to `longest`, each
// shortened by chance by up to a quarter.
struct RetryDelays {
  std::chrono::milliseconds first{100};
  std::chrono::milliseconds longest{5000};
};
// The pause before try `attempt` (from 0); `random` is any number. Pure.
std::chrono::milliseconds reconnect_delay(unsigned attempt, const RetryDelays& delays,
                                          std::uint64_t random);

// Where the receiver listens.
struct LinkAddress {
  std::string address;  // host name or IP address
  std::uint16_t port = 0;
};

struct LinkOptions {
  std::string address;  // host name or IP address of the target
  std::uint16_t port = 0;
  // Several addresses of the target (instead of `address`), each with its listener at `port`: the
  // lanes are spread over them. One that does not answer is left out of this epoch, and tried again
  // in the next; the control and memory connections use the first one that answers.
  std::vector<std::string> via;  // at most kMaxAddresses
  // Each time the link has come up: those that did not answer, with why, when they are not those of
  // the time before. On the caller's thread of connect(), later on the link's own.
  std::function<void(const std::vector<Error>& silent)> partly_connected;
  std::string session;  // the job's id: TLS-PSK identity
  LinkKey key{};
  // Counts the connects of one session: the receiver drops what is older. Further ones count on.
  std::uint64_t epoch = 1;
  unsigned lanes = 2;  // 1 to 16
  std::vector<Length> disk_sizes;
  Length chunk_size = kMaxChunk;
  Compression compression;
  std::chrono::milliseconds connect_timeout{10000};
  // No sign of life from the target for this long, on any connection: it is lost.
  std::chrono::milliseconds silence_timeout{kSilence};
  // How long the link tries to come up again; zero: for ever.
  std::chrono::milliseconds give_up_after{0};
  RetryDelays retry;
  // Says before each try where the receiver listens by now; it may start one that resumes the
  // session. On the link's own thread; may block, but not for long once cancel_fd is readable.
  // `last`: why the link broke, or why the last try failed. Its own error ends the link, unless it
  // is retryable or Unreachable. None: the same address is tried again, and a receiver there that
  // denies the key or breaks the protocol ends the link.
  // Of several addresses (`via`) only the port is taken from its answer.
  std::function<Result<LinkAddress>(unsigned attempt, const Error& last, int cancel_fd)> locate;
};

struct LinkCounters {
  std::uint64_t bytes_sent = 0;  // on the wire: payload and headers, before TLS's own overhead
  std::uint64_t bytes_received = 0;
  std::uint64_t bytes_saved = 0;   // by compression: the payloads' bytes that were not sent
  std::uint64_t memory_bytes = 0;  // relayed for QEMU's memory migration
  std::uint64_t memory_given = 0;  // by the source's QEMU, on the memory connections that there are
  std::uint64_t frames_sent = 0;
  std::uint64_t reconnects = 0;
  EncodeOptions encoding;  // what compresses most of what the lanes are at now
  std::uint64_t found_bytes = 0;  // of copies: the target had them of other images, and took those
};

// What the target's part of the barrier took, by its clock. Zero: an older receiver did not say.
struct BarrierTimes {
  std::chrono::microseconds compare{0};
  std::chrono::microseconds flush{0};
  std::chrono::microseconds release{0};
};
// Of the barrier's answer; what is not a plausible number counts as not said.
BarrierTimes barrier_times(const nlohmann::json& answer);

class Link : public Lanes {
 public:
  static Result<std::unique_ptr<Link>> connect(Loop& engine, const LinkOptions& options,
                                               Answers& answers);
  ~Link() override = default;  // closes every connection; joins its threads

  // Sends a control message and waits for its answer. The target's refusal comes back as its Error;
  // Unreachable when the connection broke or no answer came in time. {"op":"finish"} ends the
  // lanes, without link_down(); after its answer the Link is only good for destruction.
  virtual Result<nlohmann::json> call(const nlohmann::json& request,
                                      std::chrono::milliseconds timeout) = 0;
  // From now on what is copied for the first time is offered where the filter says that the target
  // has most of it (mirror/offers.h). Also in later epochs. Any thread.
  virtual void use_filter(std::shared_ptr<const PieceFilter> filter) = 0;
  // The source is still and nothing more will be queued: waits until every frame is answered, then
  // has the target prove that it took the same frames in the same order, flush its images to stable
  // storage and release them. The images are kept from {"op":"keep"} on, at the latest from here.
  // Protocol if the proof fails (it names the lane), Busy if frames stay unanswered, Unreachable,
  // or the target's error. A barrier that was passed, but whose answer was lost with the link, may
  // be asked for again on the next one if no frame was sent there.
  virtual Result<BarrierTimes> barrier(std::chrono::milliseconds timeout) = 0;
  // Listens on `unix_path` (mode and owner as given; removed at the end) and relays each
  // connection, encrypted, to the unix socket of the same path on the target, in the order in which
  // they were made here: QEMU's memory migration. Until stop_relay(), or until the link goes down:
  // both break the connections that are left.
  struct RelayOptions {
    std::string unix_path;
    bool gated =
        false;  // connections are taken, but nothing is carried until let_memory_pass(true)
    unsigned mode = 0600;
    int uid = -1;
    int gid = -1;
  };
  virtual Status start_relay(const RelayOptions& options) = 0;
  // Opens and closes the gate of a gated relay: what the source's QEMU sends waits while it is
  // closed. Any thread.
  virtual void let_memory_pass(bool pass) = 0;
  virtual void stop_relay() = 0;
  // From the next frame on. Any thread.
  virtual void set_compression(const Compression& compression) = 0;
  [[nodiscard]] virtual LinkCounters counters() const = 0;  // any thread
};

}  // namespace drover::mirror
