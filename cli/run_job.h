// SPDX-License-Identifier: Apache-2.0
//
// Runs a job, or follows one, with everything around it: output, signals, exceptions of libraries.
//
//   return run_job({.guest = "web1", .host = "hostb"}, surroundings,
//                  [&](Reporter& reporter, job::Cancel& cancel) { ...; return kExitOk; });
//
// Threads: call it from a process's only thread. Returns what `work` returns; all is written then.
#pragma once

#include <exception>
#include <functional>
#include <string>

#include "base/result.h"
#include "cli/app.h"
#include "cli/reporter.h"
#include "job/move.h"

namespace drover::cli {

struct Request {
  Purpose purpose = Purpose::Move;
  bool json = false;
  bool verbose = false;
  std::string guest;
  std::string host;
  job::Kind kind = job::Kind::Move;
  std::function<void(const std::string& id)> on_started;
  std::string interrupted;  // what the first signal gets for an answer; empty: what suits a job
  // What signals ask for: the work's clean end, which the user is told of; or, when the work only
  // looks at somebody else's job, that it looks away. Both by the Cancel.
  enum class Signals { Cancel, Leave };
  Signals signals = Signals::Cancel;
};

using Work = std::function<int(Reporter&, job::Cancel&)>;
int run_job(const Request& request, const Surroundings& surroundings, const Work& work);

// The end of a job: tells the user, and is the exit code.
int report(const Result<job::Summary>& result, Reporter& reporter);
int report(const Error& error, Reporter& reporter);

// Libraries that the job uses may throw (std::bad_alloc if nothing else).
template <class Function>
auto guarded(Function function) -> decltype(function()) {
  try {
    return function();
  } catch (const std::exception& exception) {
    return fail(Code::Internal, std::string("an unexpected error: ") + exception.what(),
                "please report it, with the job's log");
  }
}

}  // namespace drover::cli
