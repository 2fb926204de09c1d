// SPDX-License-Identifier: Apache-2.0
//
// Keeps a guest from waiting for a drover that stands still (SIGSTOP, a debugger, a frozen disk of
// the log). QEMU's mirror lets the guest's write wait until drover has answered it, for ever if
// need be. So a second, tiny process holds a duplicate of each connection from QEMU and shuts it
// down when the data path's thread has given no sign of life for a while. That works whatever state
// drover is in: QEMU sees the connection's end, gives up the mirror, the guest's writes complete on
// the source alone, and the dirty bitmap records them.
//
//   DROVER_ASSIGN(auto watchdog, EndpointWatchdog::start(loop, {.command = {"/proc/self/exe",
//   "guard"}})); watchdog->watch(socket);    // an NBD client was accepted
//   watchdog->forget(socket);   // before it is closed
//
// The process is the same program with another argument (fork and exec: safe beside threads), in a
// session of its own (Ctrl-Z does not stop it), in real time where that is allowed, its memory
// locked. It ends when drover does, closing its duplicates: the kernel kills it with the thread
// that started it, and it sees the end of their socket. One that ended or hangs is replaced,
// kMaxStarts times in all.
//
// It judges the process's life only: whether the target keeps up is the arbiter's business.
//
// Threads: an EndpointWatchdog belongs to its loop's thread, whose life is what is watched, and
// which must be the one that calls start(). Lifetime: the Loop outlives it.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/loop.h"
#include "base/result.h"
#include "base/subprocess.h"
#include "base/unique_fd.h"

namespace drover::mirror {

// drover's own: `/proc/self/exe guard MILLISECONDS` (it is found also when it was upgraded
// meanwhile).
inline constexpr std::string_view kWatchdogCommand = "guard";

// Whether somebody who should give signs of life has been silent too long. Only time during which
// the judge itself was running counts: if the whole machine stood still (suspended, frozen
// together), nobody was silent. Pure.
class Liveness {
 public:
  // The judge looks at least this often...
  static constexpr std::chrono::milliseconds kLook{50};
  // ...and a longer time between two looks counts as this much.
  static constexpr std::chrono::milliseconds kMaxCounted{100};

  Liveness(Duration limit, Instant start) : limit_(limit), looked_(start) {}
  void beat(Instant time) {
    looked_ = time;
    silence_ = {};
    told_ = false;
  }
  // True once in each silence: when it has become longer than the limit.
  bool look(Instant time);
  [[nodiscard]] Duration silence() const { return silence_; }

 private:
  Duration limit_;
  Instant looked_;
  Duration silence_{};
  bool told_ = false;
};

class EndpointWatchdog {
 public:
  static constexpr std::chrono::milliseconds kBeat{50};
  // The engine's thread only moves references and runs in real time, so it is never silent for so
  // long while it lives.
  static constexpr std::chrono::milliseconds kLimit{250};
  // Without real-time priority a busy machine may keep a living thread waiting longer: the limit is
  // multiplied. A mirror ended for nothing costs more than a write that waits a second.
  static constexpr int kLimitFactorWithoutRealTime = 4;
  static constexpr int kMaxStarts = 6;

  struct Options {
    // Runs run_endpoint_watchdog(); the limit in milliseconds is added as the last argument.
    std::vector<std::string> command;
    std::chrono::milliseconds limit = kLimit;
  };
  static Result<std::unique_ptr<EndpointWatchdog>> start(Loop& loop, Options options);
  ~EndpointWatchdog();
  EndpointWatchdog(const EndpointWatchdog&) = delete;
  EndpointWatchdog& operator=(const EndpointWatchdog&) = delete;

  void watch(int socket);
  void forget(int socket);

  [[nodiscard]] pid_t pid() const { return child_ ? child_->pid() : -1; }

 private:
  // Outlives this object while a receive is under way.
  struct Channel {
    UniqueFd socket;
    std::array<std::byte, 64> buffer{};
    bool current = true;  // this object is there, and its child_ at the other end
  };

  EndpointWatchdog(Loop& loop, Options options) : loop_(loop), options_(std::move(options)) {}
  Status launch();
  void end_child();
  // Another one in place of one that is gone or does not listen.
  void replace(const std::string& why);
  void receive();
  void beat();
  // False: it does not take it.
  bool send(char kind, int socket, bool with_descriptor);

  Loop& loop_;
  const Options options_;
  std::vector<int> watched_;
  std::shared_ptr<Channel> channel_;
  std::optional<ChildProcess> child_;
  Loop::Handle receive_ = 0;
  Loop::Handle timer_ = 0;
  int starts_ = 0;
};

// The second process: reads from `channel` until its end. Returns the exit code.
int run_endpoint_watchdog(int channel, std::chrono::milliseconds limit);

// What main() does when it was started by EndpointWatchdog: `arguments` are those after
// Options::command. The channel is standard input.
int run_endpoint_watchdog(const std::vector<std::string>& arguments);

}  // namespace drover::mirror
