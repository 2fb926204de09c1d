// SPDX-License-Identifier: Apache-2.0
#include "cli/background.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <type_traits>

namespace drover::cli {

namespace {

void put_in_place_of(int fd, std::initializer_list<int> streams) {
  for (const int stream : streams) ::dup2(fd, stream);
}

// Two descriptors above the standard streams.
Result<std::array<UniqueFd, 2>> make_pipe() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return fail_errno(errno, "making a pipe");
  return std::array<UniqueFd, 2>{UniqueFd(ends[0]), UniqueFd(ends[1])};
}

[[noreturn]] void be_background(const std::function<int(int)>& body, int events) {
  std::signal(SIGHUP, SIG_IGN);
  const UniqueFd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  put_in_place_of(nothing.get(), {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO});
  std::exit(body(events));
}

}  // namespace

Result<Background> start_background(const std::function<int(int events)>& body) {
  DROVER_ASSIGN(auto events, make_pipe());
  DROVER_ASSIGN(auto pids, make_pipe());
  const pid_t between = ::fork();
  if (between < 0) return fail_errno(errno, "starting a process");
  if (between == 0) {
    // A new session has no terminal; not being its leader, the next process never gets one.
    ::setsid();
    const pid_t child = ::fork();
    if (child == 0) {
      pids = {};
      events[0].reset();
      be_background(body, events[1].get());
    }
    const bool told = ::write(pids[1].get(), &child, sizeof child) == sizeof child;
    ::_exit(told && child > 0 ? 0 : 1);
  }
  pids[1].reset();
  Background out;
  const ssize_t got = ::read(pids[0].get(), &out.pid, sizeof out.pid);
  while (::waitpid(between, nullptr, 0) < 0 && errno == EINTR) {
  }
  if (got != sizeof out.pid || out.pid <= 0) {
    return fail(Code::Internal, "the process in the background can't be started");
  }
  out.events = std::move(events[0]);
  return out;
}

void print_to_log(const std::string& path) {
  const UniqueFd log(
      ::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, S_IRUSR | S_IWUSR));
  if (log) put_in_place_of(log.get(), {STDOUT_FILENO, STDERR_FILENO});
}

EventSource events_of(const Background& background) {
  auto reader = std::make_shared<job::LineReader>(background.events.get(), job::kMaxEventLine);
  return [reader](int stop_fd) -> Result<std::optional<job::JobEvent>> {
    DROVER_ASSIGN(const std::optional<std::string> line, reader->next({.stop_fd = stop_fd}));
    if (!line) return std::optional<job::JobEvent>();
    DROVER_ASSIGN(job::JobEvent event, job::parse_event(*line));
    return std::optional<job::JobEvent>(std::move(event));
  };
}

EventSource events_of(job::ControlClient& client) {
  return [&client](int stop_fd) { return client.next_event(stop_fd); };
}

Followed follow(const EventSource& next, const Following& following) {
  for (;;) {
    Result<std::optional<job::JobEvent>> event = next(following.stop_fd);
    if (!event && event.error().code == Code::Cancelled) return Left{};
    if (!event) return event.error();
    if (!*event) return Died{};
    std::optional<Followed> end;
    std::visit(
        [&](auto& said) {
          using Said = std::decay_t<decltype(said)>;
          if constexpr (std::is_same_v<Said, job::Started>) {
            following.observer.started(said.id);
            if (following.until_started) end = Begun{};
          } else if constexpr (std::is_same_v<Said, job::Plan>) {
            following.observer.planned(said);
          } else if constexpr (std::is_same_v<Said, job::Progress>) {
            following.observer.progress(said);
          } else if constexpr (std::is_same_v<Said, job::Note>) {
            following.observer.note(said.text);
          } else {
            end = std::move(said);
          }
        },
        **event);
    if (end) return std::move(*end);
  }
}

}  // namespace drover::cli
