// SPDX-License-Identifier: Apache-2.0
//
// The driver of job/move_machine.h: carries out what the machine says, and tells it what happened.
// job::move() (job/move.h) is this with the real world.
#pragma once

#include "job/move.h"
#include "job/platform.h"
#include "job/prepare.h"

namespace drover::job {

// Blocks until the job has ended; errors as job::move(). The plan has no blocker.
Result<Summary> run_move(Platform& platform, const MoveOptions& options, Observer& observer,
                         Cancel& cancel, Prepared prepared);

}  // namespace drover::job
