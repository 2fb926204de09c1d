// SPDX-License-Identifier: Apache-2.0
//
// Runs `drover evacuate`. Returns the exit code; what was to be said has been said.
//
// Threads: call it from a process's only thread.
#pragma once

#include "cli/app.h"
#include "cli/evacuate_command.h"

namespace drover::cli {

int run_evacuate(const EvacuateCommand& command, const Services& services,
                 const Surroundings& surroundings);

}  // namespace drover::cli
