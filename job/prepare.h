// SPDX-License-Identifier: Apache-2.0
//
// What comes before a move: both hosts are asked what they have, and the plan is made of the answers.
// Changes nothing on either host.
#pragma once

#include <memory>

#include "base/clock.h"
#include "base/result.h"
#include "job/move.h"
#include "job/platform.h"
#include "memmig/hypervisor.h"
#include "memmig/preflight.h"

namespace drover::job {

struct Prepared {
  Plan plan;                   // what people are shown
  memmig::MovePlan move_plan;  // the same in full
  memmig::GuestInfo guest;
  memmig::GuestIo io;  // its disks' counters when it was described
  Instant io_at{};
  unsigned cores = 0;  // of the host that has fewer; 0: not known
  std::unique_ptr<memmig::Hypervisor> source;
  std::unique_ptr<memmig::Hypervisor> target;  // null when a blocker kept it from being asked
};

// Denied if not root; NotFound for the guest; Unreachable, Denied, NotFound, Incompatible when one of the
// hosts can't be asked. Everything that would stop the move itself is a finding of the plan.
Result<Prepared> prepare(Platform& platform, const MoveOptions& options, Cancel& cancel);

// For a job that an earlier process has worked on: both hosts are asked about its guest, which may be on either.
Result<Prepared> prepare_again(Platform& platform, const MoveOptions& options, const Plan& plan);

}  // namespace drover::job
