// SPDX-License-Identifier: Apache-2.0
//
// The control socket of a running job: a unix socket in its directory, for its owner only. Lines of
// JSON, one request a line; a client may send several on one connection:
//
//   {"op":"status"}                   -> {"ok":true,"status":{...}}         (JobStatus::to_json)
//   {"op":"cancel"}                   -> {"ok":true}                        it was asked to; watch
//   it
//   {"op":"set","bandwidth":N}        -> {"ok":true}                        bytes per second, 0: no
//   limit; and, or instead, "compress":"auto" (mirror/compression.h)
//   {"op":"watch"}                    -> {"ok":true}, then the events (job/events.h) until the job
//   ends:
//                                        first what was said last, then what is said
//   anything else                     -> {"ok":false,"error":{"code":...}}
//
// The runner:
//
//   DROVER_ASSIGN(auto control, ControlServer::start(job->control_socket(), {
//       .status = [&] { return status.current().to_json(); },
//       .cancel = [&] { cancel.request(); },
//       .set_bandwidth = [&](Length rate) { return engine.set_bandwidth(rate); },
//       .set_compression = [&](mirror::Compression wanted) { ...; return Status(); }}));
//   control->publish(event_of(progress));                // job/broadcast.h does this
//   control->stop();                                     // after the last event
//
// Threads: the server has one of its own, which the callbacks are called on: they must return soon
// and must be callable until stop() returns. publish() may be called from any thread and never
// blocks: a client that does not read loses progress first, then its connection.
//
// A client:
//
//   DROVER_ASSIGN(auto client, ControlClient::connect(view.directory + "/control.sock"));
//   DROVER_ASSIGN(json answer, client.call({{"op", "cancel"}}));
//
// What comes from the other side is not trusted by either.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "base/result.h"
#include "base/unique_fd.h"
#include "job/events.h"
#include "mirror/compression.h"

namespace drover::job {

class ControlServer {
 public:
  struct Callbacks {
    std::function<nlohmann::json()> status;
    std::function<void()> cancel;
    std::function<Status(Length per_second)> set_bandwidth;
    std::function<Status(mirror::Compression)> set_compression;
  };
  static constexpr std::size_t kMostClients = 32;
  static constexpr std::size_t kMostRequest = 4096;              // bytes of a line
  static constexpr std::size_t kMostQueued = 4 * kMaxEventLine;  // per client; then it is let go
  static constexpr std::size_t kProgressQueued = 65536;  // per client; then it misses progress
  static constexpr std::size_t kMostNotes = 16;          // for who comes later
  // A client that watches nothing is let go when it has not asked for so long.
  static constexpr std::chrono::seconds kIdle{10};
  // How long stop() waits for clients to read the end.
  static constexpr std::chrono::seconds kLinger{2};

  // Replaces what is left of an earlier one at `path`: call it with the job's lock held.
  static Result<std::unique_ptr<ControlServer>> start(const std::string& path, Callbacks callbacks);
  virtual ~ControlServer() = default;  // stops
  ControlServer(const ControlServer&) = delete;
  ControlServer& operator=(const ControlServer&) = delete;

  // To all who watch; an event_of().
  virtual void publish(OrderedJson event) = 0;
  // Lets the clients read what was published, closes and removes the socket.
  virtual void stop() = 0;

 protected:
  ControlServer() = default;
};

// Lines from a descriptor that stays the caller's: a socket or a pipe.
class LineReader {
 public:
  LineReader(int fd, std::size_t longest) : fd_(fd), longest_(longest) {}

  struct Wait {
    int stop_fd = -1;                                  // readable: Cancelled
    std::optional<std::chrono::milliseconds> timeout;  // passed: Unreachable
  };
  // The next line without its new line; absent at the end. Protocol if a line is too long or the
  // last one has no end.
  Result<std::optional<std::string>> next(const Wait& wait);

 private:
  const int fd_;
  const std::size_t longest_;
  std::string buffer_;
};

class ControlClient {
 public:
  static constexpr std::chrono::seconds kPatience{10};

  // Unreachable when nobody listens there.
  static Result<ControlClient> connect(const std::string& path);

  // Sends a request and waits for its answer, at most kPatience. The error is the other side's, or
  // Unreachable. Events that come before the answer are kept for next_event().
  Result<nlohmann::json> call(const nlohmann::json& request);

  // After a "watch": absent when the other side has ended. Cancelled when stop_fd is readable.
  Result<std::optional<JobEvent>> next_event(int stop_fd = -1);

 private:
  explicit ControlClient(UniqueFd fd) : fd_(std::move(fd)), reader_(fd_.get(), kMaxEventLine) {}

  UniqueFd fd_;
  LineReader reader_;
  std::vector<JobEvent> early_;
};

}  // namespace drover::job
