// SPDX-License-Identifier: Apache-2.0
//
// Taking one CD-ROM image or NVRAM file off a storage: it is copied, the definitions that name it
// are changed, and it is deleted when it is what was copied and nobody names it any more.
//
//   DROVER_TRY(evacuate_file(*guest_files, JobStore(), {.item = item, .target = "/mnt/b/x.iso"},
//                            observer, cancel));
//
// While definitions are changed no job of their guests begins, and none is at work.
//
// Threads: any; it blocks on the disk and on libvirt.
//
// Errors: Busy: something is not as it was when this was planned; the same again plans anew. After
// an error the old file is there, and the copy only if a guest uses it: of several guests with one
// CD-ROM image, some may.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "job/evacuate_plan.h"
#include "job/job_store.h"
#include "job/move.h"
#include "memmig/guest_files.h"

namespace drover::job {

struct FileStep {
  EvacuateItem item;
  std::string target;
  std::vector<std::string> directories;  // where one that was killed may have left half a copy
  Length bandwidth;                      // per second; zero: no limit
};

Status evacuate_file(memmig::GuestFiles& files, const JobStore& jobs, const FileStep& step,
                     Observer& observer, Cancel& cancel);

// Busy unless the guest's disks are the files that the step means, by all its definitions.
Status disks_are_there(memmig::GuestFiles& files, const EvacuateProblem& problem,
                       const EvacuateStep& step);

}  // namespace drover::job
