// SPDX-License-Identifier: Apache-2.0
#include <csignal>

#include "cli/app.h"
#include "cli/receive.h"
#include "job/move.h"

int main(int argc, char** argv) {
  // A reader that goes away, of our output or at the other end of a connection, is an error like
  // others.
  std::signal(SIGPIPE, SIG_IGN);
  return drover::cli::run({argv + 1, argv + argc},
                          {drover::job::move, drover::job::plan_move, drover::cli::receive,
                           drover::job::resume, drover::job::cancel},
                          {});
}
