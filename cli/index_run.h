// SPDX-License-Identifier: Apache-2.0
//
// Runs `drover index`: reads images to the content index of this host (mirror/content_index.h), at
// the lowest priority. Returns the exit code; what was to be said has been said.
//
// Ctrl-C just ends it: what was read completely is in the index, and counts once a later run has
// ended.
//
// Threads: call it from a process's only thread.
#pragma once

#include "cli/app.h"
#include "cli/index_command.h"

namespace drover::cli {

int run_index(const IndexCommand& command, const Surroundings& surroundings);

}  // namespace drover::cli
