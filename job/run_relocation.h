// SPDX-License-Identifier: Apache-2.0
//
// The driver of job/relocate_machine.h: carries out what the machine says, and tells it what is
// seen. job::relocate() (job/relocate.h) is this with the job on disk around it.
#pragma once

#include <optional>

#include "base/result.h"
#include "job/move.h"
#include "job/prepare_relocation.h"
#include "job/relocate.h"
#include "job/run_move.h"

namespace drover::job {

// Blocks until the job has ended; errors as relocate(). The plan has no blocker. `undo_because`: a
// resumed job is undone, if that is still possible.
MoveEnd run_relocation(const RelocateOptions& options, Observer& observer, Cancel& cancel,
                       PreparedRelocation prepared, const JobFiles& files,
                       std::optional<Error> undo_because = {});

}  // namespace drover::job
