// SPDX-License-Identifier: Apache-2.0
#include <csignal>
#include <string_view>

#include "blockcopy/image_file.h"
#include "cli/app.h"
#include "cli/receive.h"
#include "job/evacuate.h"
#include "job/move.h"
#include "job/rebalance.h"
#include "job/relocate.h"
#include "mirror/endpoint_watchdog.h"

int main(int argc, char** argv) {
  // A reader that goes away, of our output or at the other end of a connection, is an error like
  // others.
  std::signal(SIGPIPE, SIG_IGN);
  // Not a command of the user's: the runner starts it, and it must be small and quick.
  if (argc > 1 && std::string_view(argv[1]) == drover::mirror::kWatchdogCommand) {
    return drover::mirror::run_endpoint_watchdog({argv + 2, argv + argc});
  }
  // Nor this: it frees what a move has left of the source's disks.
  if (argc > 1 && std::string_view(argv[1]) == drover::blockcopy::kFreeCommand) {
    return drover::blockcopy::run_free_command({argv + 2, argv + argc});
  }
  return drover::cli::run(
      {argv + 1, argv + argc},
      {drover::job::move, drover::job::plan_move, drover::cli::receive, drover::job::resume,
       drover::job::cancel, drover::job::relocate, drover::job::plan_relocation,
       [](const std::string& uri) {
         return drover::job::real_rebalance_world(uri, drover::job::relocating_mover(uri));
       },
       drover::job::real_evacuate_world},
      {});
}
