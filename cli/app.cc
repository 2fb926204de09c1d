// SPDX-License-Identifier: Apache-2.0
#include "cli/app.h"

#include <unistd.h>

#include <atomic>
#include <exception>
#include <type_traits>
#include <variant>

#include "base/log.h"
#include "cli/exit_codes.h"
#include "cli/finding.h"
#include "cli/output.h"
#include "cli/render.h"
#include "cli/reporter.h"
#include "cli/signals.h"

namespace drover::cli {

namespace {

Style error_style(const Surroundings& surroundings) {
  return Style(terminal_of(surroundings.err, surroundings.environment).colours);
}

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

struct Request {
  job::MoveOptions options;
  Purpose purpose = Purpose::Move;
  bool json = false;
  bool verbose = false;
};

int move(const Request& request, const Services& services, Reporter& reporter,
         job::Cancel& cancel) {
  const auto summary = guarded([&] { return services.move(request.options, reporter, cancel); });
  if (!summary) {
    reporter.failed(summary.error());
    return exit_code(summary.error().code);
  }
  reporter.finished(*summary);
  return kExitOk;
}

int examine(const Request& request, const Services& services, Reporter& reporter,
            job::Cancel& cancel) {
  const auto plan = guarded([&] { return services.plan_move(request.options, cancel); });
  if (!plan) {
    reporter.failed(plan.error());
    return exit_code(plan.error().code);
  }
  reporter.planned(*plan);
  return blocked(*plan) ? kExitBlocked : kExitOk;
}

// From here on signals ask for a clean end; the job's threads inherit that they are blocked.
int run_job(const Request& request, const Services& services, const Surroundings& surroundings) {
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
               .guest = request.options.guest,
               .host = request.options.host});
  std::atomic<int> code{kRunning};
  int after_the_end = 0;
  const SignalWatcher watcher([&](int /*signal*/) {
    if (code.load() == kRunning) {
      reporter.interrupted();  // first: what the job says then comes behind it
      cancel.request();
    } else if (++after_the_end > 1) {
      // The job has ended; only somebody who doesn't read our output keeps us.
      ::_exit(code.load());
    }
  });
  code = request.purpose == Purpose::Move ? move(request, services, reporter, cancel)
                                          : examine(request, services, reporter, cancel);
  output.finish();
  return code;
}

}  // namespace

int run(const std::vector<std::string>& arguments, const Services& services,
        const Surroundings& surroundings) {
  const Result<Command> command = parse_command_line(arguments, surroundings.config_path);
  if (!command) {
    write_all(surroundings.err, render_error(command.error(), error_style(surroundings)));
    return kExitUsage;
  }
  const auto run_away = [&](const Request& request) {
    const auto body = [&] { return run_job(request, services, surroundings); };
    return surroundings.away_from_keyboard ? run_away_from_keyboard(body) : body();
  };
  return std::visit(
      [&](const auto& wanted) -> int {
        using Wanted = std::decay_t<decltype(wanted)>;
        if constexpr (std::is_same_v<Wanted, ShowCommand>) {
          return write_all(surroundings.out, wanted.text) ? kExitOk : kExitFailed;
        } else if constexpr (std::is_same_v<Wanted, ReceiveCommand>) {
          return services.receive(wanted);
        } else if constexpr (std::is_same_v<Wanted, CheckCommand>) {
          return run_away({wanted.options, Purpose::Examine, wanted.json, wanted.verbose});
        } else {
          static_assert(std::is_same_v<Wanted, MoveCommand>);
          return run_away({wanted.options, wanted.dry_run ? Purpose::Examine : Purpose::Move,
                           wanted.json, wanted.verbose});
        }
      },
      *command);
}

}  // namespace drover::cli
