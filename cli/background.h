// SPDX-License-Identifier: Apache-2.0
//
// A job that outlives its terminal, and following a job that another process works on.
//
//   DROVER_ASSIGN(Background background, start_background([&](int events) { ... return code; }));
//   const Followed followed = follow(events_of(background), {.observer = reporter, .stop_fd = fd});
//
// Threads: start_background() is called before any thread is started.
#pragma once

#include <sys/types.h>

#include <functional>
#include <optional>
#include <string>
#include <variant>

#include "base/result.h"
#include "base/unique_fd.h"
#include "job/control.h"
#include "job/events.h"
#include "job/move.h"

namespace drover::cli {

struct Background {
  pid_t pid = 0;
  UniqueFd events;  // lines of JSON; their reader may go at any time
};

// Runs `body` in a process of its own: no terminal, no parent that waits for it, SIGHUP ignored,
// the standard streams at /dev/null, given the descriptor that its events go to. It ends with the
// body's code, without returning.
Result<Background> start_background(const std::function<int(int events)>& body);

// In that process: what it and its helpers print goes to the job's log.
void print_to_log(const std::string& path);

// The next event; absent at the end; Cancelled when stop_fd is readable.
using EventSource = std::function<Result<std::optional<job::JobEvent>>(int stop_fd)>;
EventSource events_of(const Background& background);
EventSource events_of(job::ControlClient& client);

// How it went: the job's end, or
struct Left {};   // stop_fd became readable
struct Died {};   // the other process ended without a word
struct Begun {};  // only with until_started: the job is on disk
using Followed = std::variant<job::Summary, Error, Left, Died, Begun>;

struct Following {
  job::Observer& observer;
  int stop_fd = -1;
  bool until_started = false;
};
// Tells the observer what the job says, but not its end. Blocks.
Followed follow(const EventSource& next, const Following& following);

}  // namespace drover::cli
