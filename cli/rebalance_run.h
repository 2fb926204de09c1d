// SPDX-License-Identifier: Apache-2.0
//
// Runs `drover rebalance`: proposes, or carries out. Returns the exit code; what was to be said has
// been said.
//
// Threads: call it from a process's only thread.
#pragma once

#include "cli/app.h"
#include "cli/rebalance_command.h"

namespace drover::cli {

int run_rebalance(const RebalanceCommand& command, const Services& services,
                  const Surroundings& surroundings);

}  // namespace drover::cli
