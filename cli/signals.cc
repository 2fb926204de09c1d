// SPDX-License-Identifier: Apache-2.0
#include "cli/signals.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <utility>

#include "base/check.h"
#include "cli/exit_codes.h"
#include "cli/output.h"

namespace drover::cli {

sigset_t ending_signals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT}) sigaddset(&set, signal);
  return set;
}

BlockedSignals::BlockedSignals() {
  const sigset_t set = ending_signals();
  CHECK(::pthread_sigmask(SIG_BLOCK, &set, &before_) == 0, "signals can be blocked");
}

BlockedSignals::~BlockedSignals() {
  const sigset_t set = ending_signals();
  const timespec at_once{};
  while (::sigtimedwait(&set, nullptr, &at_once) > 0) {
  }
  ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

SignalWatcher::SignalWatcher(std::function<void(int)> on_signal)
    : on_signal_(std::move(on_signal)) {
  const sigset_t set = ending_signals();
  signals_ = UniqueFd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  stop_ = UniqueFd(::eventfd(0, EFD_CLOEXEC));
  CHECK(signals_ && stop_, "a process at its start has two descriptors left");
  thread_ = std::thread([this] { run(); });
}

SignalWatcher::~SignalWatcher() {
  const std::uint64_t one = 1;
  CHECK(::write(stop_.get(), &one, sizeof one) == sizeof one, "an eventfd takes a one");
  thread_.join();
}

void SignalWatcher::run() {
  for (;;) {
    std::array<pollfd, 2> ready = {{{signals_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}}};
    if (::poll(ready.data(), ready.size(), -1) < 0) {
      CHECK(errno == EINTR, "poll takes two descriptors");
      continue;
    }
    signalfd_siginfo info{};
    while (::read(signals_.get(), &info, sizeof info) == sizeof info) {
      on_signal_(static_cast<int>(info.ssi_signo));
    }
    if (ready[1].revents != 0) return;
  }
}

namespace {

// Whether a terminal can send us signals, and somebody sits at it.
bool at_a_terminal() {
  const UniqueFd terminal(::open("/dev/tty", O_RDWR | O_CLOEXEC | O_NOCTTY));
  if (!terminal) return false;
  return ::isatty(0) == 1 || ::isatty(1) == 1 || ::isatty(2) == 1;
}

// The process in front. Returns the child's exit code.
int stand_in_front(pid_t child, const sigset_t& watched) {
  for (;;) {
    siginfo_t info{};
    const int signal = ::sigwaitinfo(&watched, &info);
    if (signal < 0) continue;
    if (signal != SIGCHLD) {
      ::kill(child, signal);
      continue;
    }
    int status = 0;
    if (::waitpid(child, &status, WNOHANG) != child) continue;
    if (WIFEXITED(status)) return WEXITSTATUS(status);
    const int killer = WTERMSIG(status);
    write_all(2,
              fmt::format("drover: the process that did the work was ended by signal {}; its job's "
                          "log and state are kept\n",
                          killer));
    return 128 + killer;
  }
}

}  // namespace

int run_away_from_keyboard(const std::function<int()>& body) {
  if (!at_a_terminal()) return body();
  sigset_t watched = ending_signals();
  sigaddset(&watched, SIGCHLD);
  sigset_t before;
  CHECK(::pthread_sigmask(SIG_BLOCK, &watched, &before) == 0, "signals can be blocked");
  // Stopping only this process would leave the keyboard's Ctrl-C without effect.
  const auto stop_before = std::signal(SIGTSTP, SIG_IGN);
  const pid_t front = ::getpid();
  const pid_t child = ::fork();
  if (child <= 0) std::signal(SIGTSTP, stop_before);
  if (child < 0) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return body();  // worse at Ctrl-C, otherwise the same
  }
  if (child > 0) {
    const int code = stand_in_front(child, watched);
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return code;
  }
  ::setsid();
  // When the process in front is killed nobody is left to hand on a Ctrl-C.
  ::prctl(PR_SET_PDEATHSIG, SIGHUP);
  if (::getppid() != front) ::raise(SIGHUP);
  // The ending signals stay blocked: one that comes now is for the SignalWatcher.
  sigset_t child_signal;
  sigemptyset(&child_signal);
  sigaddset(&child_signal, SIGCHLD);
  ::pthread_sigmask(SIG_UNBLOCK, &child_signal, nullptr);
  return body();
}

}  // namespace drover::cli
