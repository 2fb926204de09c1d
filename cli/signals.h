// SPDX-License-Identifier: Apache-2.0
//
// SIGINT, SIGTERM, SIGHUP and SIGQUIT ask for a clean end; none ends the process in the middle of a
// job.
//
//   const BlockedSignals blocked;             // before any other thread is started
//   ...
//   const SignalWatcher watcher([&](int) { cancel.request(); });
//   ... the job ...
#pragma once

#include <csignal>
#include <functional>
#include <thread>

#include "base/result.h"
#include "base/unique_fd.h"

namespace drover::cli {

// The signals above.
sigset_t ending_signals();

// Blocks them in this thread and in those that it starts. At the end what came in the meantime is
// dropped, and they do again what they did before.
class BlockedSignals {
 public:
  BlockedSignals();
  ~BlockedSignals();
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t before_{};
};

// Calls back for each of them, on a thread of its own, and not after its destructor has returned.
// They must be blocked. One that is ignored (nohup) stays ignored.
class SignalWatcher {
 public:
  explicit SignalWatcher(std::function<void(int signal)> on_signal);
  ~SignalWatcher();
  SignalWatcher(const SignalWatcher&) = delete;
  SignalWatcher& operator=(const SignalWatcher&) = delete;

 private:
  void run();

  const std::function<void(int)> on_signal_;
  UniqueFd signals_;
  UniqueFd stop_;
  std::thread thread_;
};

// Runs `body` where the keyboard reaches none of its processes.
//
// Ctrl-C on a terminal goes to every process of the foreground group: also to the ssh that carries
// libvirt's connection to the target (libvirt starts it with default signal actions in our group;
// seen with libvirt 9.0), which would die at the very moment when the undo needs it. Ctrl-Z would
// stop them all while the guest's writes come through us, and closing the terminal would hang all
// of them up. So with a terminal `body` runs in a child process in a session of its own; this
// process stays in front, hands the signals on to that one process and returns its exit code.
// Without a terminal there is no such signal and `body` runs right here.
//
// What it costs: ssh can't ask for a password or about a host key; it has to work without.
//
// Call it before any thread is started. Returns in both processes.
int run_away_from_keyboard(const std::function<int()>& body);

}  // namespace drover::cli
