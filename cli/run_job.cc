// SPDX-License-Identifier: Apache-2.0
#include "cli/run_job.h"

#include <unistd.h>

#include <atomic>

#include "base/log.h"
#include "cli/exit_codes.h"
#include "cli/output.h"
#include "cli/signals.h"

namespace drover::cli {

int report(const Error& error, Reporter& reporter) {
  reporter.failed(error);
  return exit_code(error.code);
}

int report(const Result<job::Summary>& result, Reporter& reporter) {
  if (!result) return report(result.error(), reporter);
  reporter.finished(*result);
  return kExitOk;
}

// From here on signals ask for a clean end; the job's threads inherit that they are blocked.
int run_job(const Request& request, const Surroundings& surroundings, const Work& work) {
  static constexpr int kRunning = -1;
  if (request.verbose) set_log_level(LogLevel::Debug);
  const Terminal terminal = terminal_of(surroundings.out, surroundings.environment);
  // Lines of the log would tear a line that is redrawn.
  const bool redraw = terminal.redraw && !request.json && !request.verbose;

  const BlockedSignals blocked;
  job::Cancel cancel;
  Output output({.out = surroundings.out, .err = surroundings.err, .redraw = redraw});
  Reporter reporter(
      output, {.purpose = request.purpose,
               .json = request.json,
               .redraw = redraw,
               .colours = terminal.colours && !request.json,
               .error_colours = terminal_of(surroundings.err, surroundings.environment).colours,
               .width_of = surroundings.out,
               .guest = request.guest,
               .host = request.host,
               .kind = request.kind,
               .on_started = request.on_started,
               .interrupted = request.interrupted});
  std::atomic<int> code{kRunning};
  int after_the_end = 0;
  const SignalWatcher watcher([&](int /*signal*/) {
    if (code.load() == kRunning) {
      // First: what the job says then comes behind it.
      if (request.signals == Request::Signals::Cancel) reporter.interrupted();
      cancel.request();
    } else if (++after_the_end > 1) {
      // The job has ended; only somebody who doesn't read our output keeps us.
      ::_exit(code.load());
    }
  });
  code = work(reporter, cancel);
  output.finish();
  return code;
}

}  // namespace drover::cli
