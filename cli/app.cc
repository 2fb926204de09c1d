// SPDX-License-Identifier: Apache-2.0
#include "cli/app.h"

#include <type_traits>
#include <variant>

#include "cli/evacuate_run.h"
#include "cli/exit_codes.h"
#include "cli/finding.h"
#include "cli/index_run.h"
#include "cli/job_commands.h"
#include "cli/output.h"
#include "cli/rebalance_run.h"
#include "cli/render.h"
#include "cli/reporter.h"
#include "cli/run_job.h"

namespace drover::cli {

namespace {

int move(const MoveCommand& command, const Services& services, const Surroundings& surroundings) {
  const Request request{.json = command.json,
                        .verbose = command.verbose,
                        .guest = command.options.guest,
                        .host = command.options.host};
  const Work work = [&](Reporter& reporter, job::Cancel& cancel) {
    return report(guarded([&] { return services.move(command.options, reporter, cancel); }),
                  reporter);
  };
  return command.detach ? run_in_background(request, surroundings, work)
                        : run_in_front(request, surroundings, work);
}

int examine(const CheckCommand& command, const Services& services,
            const Surroundings& surroundings) {
  const Request request{.purpose = Purpose::Examine,
                        .json = command.json,
                        .verbose = command.verbose,
                        .guest = command.options.guest,
                        .host = command.options.host};
  return run_in_front(request, surroundings, [&](Reporter& reporter, job::Cancel& cancel) {
    const auto plan = guarded([&] { return services.plan_move(command.options, cancel); });
    if (!plan) return report(plan.error(), reporter);
    reporter.planned(*plan);
    return blocked(*plan) ? kExitBlocked : kExitOk;
  });
}

std::string destination(const job::RelocateOptions& options) {
  if (!options.pool.empty()) return "pool " + options.pool;
  return options.directory.empty() ? "other places" : options.directory;
}

int relocate(const RelocateCommand& command, const Services& services,
             const Surroundings& surroundings) {
  Request request{.json = command.json,
                  .verbose = command.verbose,
                  .guest = command.options.guest,
                  .host = destination(command.options),
                  .kind = job::Kind::Relocate};
  if (command.dry_run) {
    request.purpose = Purpose::Examine;
    return run_in_front(request, surroundings, [&](Reporter& reporter, job::Cancel& cancel) {
      const auto plan = guarded([&] { return services.plan_relocation(command.options, cancel); });
      if (!plan) return report(plan.error(), reporter);
      reporter.planned(*plan);
      return blocked(*plan) ? kExitBlocked : kExitOk;
    });
  }
  const Work work = [&](Reporter& reporter, job::Cancel& cancel) {
    return report(guarded([&] { return services.relocate(command.options, reporter, cancel); }),
                  reporter);
  };
  return command.detach ? run_in_background(request, surroundings, work)
                        : run_in_front(request, surroundings, work);
}

}  // namespace

int run(const std::vector<std::string>& arguments, const Services& services,
        const Surroundings& surroundings) {
  const Result<Command> command = parse_command_line(arguments, surroundings.config_path);
  if (!command) {
    refuse(command.error(), false, surroundings);
    return kExitUsage;
  }
  return std::visit(
      [&](const auto& wanted) -> int {
        using Wanted = std::decay_t<decltype(wanted)>;
        if constexpr (std::is_same_v<Wanted, ShowCommand>) {
          return write_all(surroundings.out, wanted.text) ? kExitOk : kExitFailed;
        } else if constexpr (std::is_same_v<Wanted, ReceiveCommand>) {
          return services.receive(wanted);
        } else if constexpr (std::is_same_v<Wanted, CheckCommand>) {
          return examine(wanted, services, surroundings);
        } else if constexpr (std::is_same_v<Wanted, RebalanceCommand>) {
          return run_rebalance(wanted, services, surroundings);
        } else if constexpr (std::is_same_v<Wanted, EvacuateCommand>) {
          return run_evacuate(wanted, services, surroundings);
        } else if constexpr (std::is_same_v<Wanted, IndexCommand>) {
          return run_index(wanted, surroundings);
        } else if constexpr (std::is_same_v<Wanted, RelocateCommand>) {
          return relocate(wanted, services, surroundings);
        } else if constexpr (std::is_same_v<Wanted, JobsCommand>) {
          return list_jobs(wanted, surroundings);
        } else if constexpr (std::is_same_v<Wanted, StatusCommand>) {
          return show_status(wanted, surroundings);
        } else if constexpr (std::is_same_v<Wanted, WatchCommand>) {
          return watch_job(wanted, surroundings);
        } else if constexpr (std::is_same_v<Wanted, CancelCommand>) {
          return cancel_job(wanted, services, surroundings);
        } else if constexpr (std::is_same_v<Wanted, ResumeCommand>) {
          return resume_job(wanted, services, surroundings);
        } else if constexpr (std::is_same_v<Wanted, HistoryCommand>) {
          return show_history(wanted, surroundings);
        } else if constexpr (std::is_same_v<Wanted, SetCommand>) {
          return set_job(wanted, surroundings);
        } else {
          static_assert(std::is_same_v<Wanted, MoveCommand>);
          if (wanted.dry_run) {
            return examine({wanted.options, wanted.json, wanted.verbose}, services, surroundings);
          }
          return move(wanted, services, surroundings);
        }
      },
      *command);
}

}  // namespace drover::cli
