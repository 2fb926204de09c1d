// SPDX-License-Identifier: Apache-2.0
//
// The program `drover`, without what it drives: that comes in as functions, so that tests give
// others.
//
//   int main(int argc, char** argv) {
//     return cli::run({argv + 1, argv + argc},
//                     {job::move, job::plan_move, receive, job::resume, job::cancel,
//                      job::relocate, job::plan_relocation}, {});
//   }
//
// Threads: call run() from a process's only thread. It returns the exit code (cli/exit_codes.h);
// what was to be said has been said. Afterwards SIGINT, SIGTERM, SIGHUP and SIGQUIT are as before
// (with a terminal: see run_away_from_keyboard in cli/signals.h).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/result.h"
#include "cli/command_line.h"
#include "cli/config.h"
#include "cli/terminal.h"
#include "job/evacuate.h"
#include "job/job_store.h"
#include "job/move.h"
#include "job/rebalance.h"
#include "job/relocate.h"
#include "mirror/content_index.h"

namespace drover::cli {

// The link seam.
struct Services {
  std::function<Result<job::Summary>(const job::MoveOptions&, job::Observer&, job::Cancel&)> move;
  std::function<Result<job::Plan>(const job::MoveOptions&, job::Cancel&)> plan_move;
  // Speaks on standard output itself; returns the exit code. No thread has been started before it.
  std::function<int(const ReceiveCommand&)> receive;
  // Of jobs whose process has ended; the others are reached through their control sockets.
  std::function<Result<job::Summary>(const std::string& id, job::Observer&, job::Cancel&)> resume;
  std::function<Status(const std::string& id, job::Observer&, job::Cancel&)> cancel;
  std::function<Result<job::Summary>(const job::RelocateOptions&, job::Observer&, job::Cancel&)>
      relocate;
  std::function<Result<job::Plan>(const job::RelocateOptions&, job::Cancel&)> plan_relocation;
  // This host's storages, by the URI of its libvirt.
  std::function<std::unique_ptr<job::RebalanceWorld>(const std::string& uri)> rebalance_world;
  std::function<std::unique_ptr<job::EvacuateWorld>(const std::string& uri)> evacuate_world;
};

struct Surroundings {
  int out = 1;
  int err = 2;
  std::string config_path{kConfigPath};
  TerminalEnvironment environment = TerminalEnvironment::of_process();
  // Work where the keyboard's signals don't reach (forks when there is a terminal).
  bool away_from_keyboard = true;
  job::JobPlaces places;
  std::string index_directory{mirror::kIndexDirectory};
};

int run(const std::vector<std::string>& arguments, const Services& services,
        const Surroundings& surroundings);

}  // namespace drover::cli
