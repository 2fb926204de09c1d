// SPDX-License-Identifier: Apache-2.0
//
// What comes before a relocation: the guest, its images and the place are looked at, and the plan
// is made of that. Changes nothing.
#pragma once

#include <memory>

#include "base/result.h"
#include "job/move.h"
#include "job/relocate.h"
#include "memmig/disk_host.h"

namespace drover::job {

struct PreparedRelocation {
  Plan plan;
  memmig::GuestInfo guest;
  std::unique_ptr<memmig::DiskHost> host;
};

// Denied if not root; NotFound for the guest or pool; Unreachable. What would stop the relocation
// itself is a finding of the plan.
Result<PreparedRelocation> prepare_relocation(const RelocateOptions& options);

// For a job that an earlier process has worked on: the guest may be gone.
Result<PreparedRelocation> prepare_relocation_again(const RelocateOptions& options,
                                                    const Plan& plan);

// All who use an image on this host, as far as it can be known.
Result<std::vector<memmig::ImageUse>> all_image_uses(memmig::DiskHost& host);

}  // namespace drover::job
