// SPDX-License-Identifier: Apache-2.0
//
// Another job: a guest's disks to another place on the same host, while the guest runs, stands
// still or is off. One guest's disks are one job: all of them go, or none.
//
//   job::RelocateOptions options{.guest = "web1", .directory = "/mnt/array2"};
//   job::Cancel cancel;
//   Result<job::Summary> summary = job::relocate(options, observer, cancel);
//
// The job is on disk as a move is: job::resume() and job::cancel() (job/move.h) take it up again,
// `drover jobs` shows it, the control socket works.
//
// Threads: as job::move(); several relocations may run in one process, each on its own thread, each
// of another guest.
//
// Errors: Blocked when the plan has a blocker (the observer got the plan); Cancelled when the user
// asked; otherwise what went wrong. After an error the guest uses its old images and nothing is
// left of the new ones, unless the message says otherwise (Held: it stopped half-way with nothing
// deleted; an error that says which disks did go).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "job/move.h"

namespace drover::job {

struct RelocateOptions {
  std::string guest;  // name or UUID
  // Where to: exactly one of these two, or places.
  std::string directory;
  std::string pool;                           // of libvirt's, of type dir, fs or netfs
  std::map<std::string, std::string> places;  // "vda" -> an absolute path; one that is a directory:
                                              // a file in it
  std::vector<std::string> disks;  // only these ("vda"); empty: all that can be, or those of places
  std::string format;              // "raw", "qcow2"; empty: as it is
  std::string uri = "qemu:///system";
  bool keep_source = false;  // the old files stay
  Length bandwidth;          // per second, of all disks together; zero: no limit
  unsigned parallel = 4;     // disks that are copied at once
};

// Says what a relocation would do and what would stop it; changes nothing. Errors: Denied if not
// root; NotFound for the guest or the pool; Unreachable.
Result<Plan> plan_relocation(const RelocateOptions& options, Cancel& cancel);

Result<Summary> relocate(const RelocateOptions& options, Observer& observer, Cancel& cancel);

}  // namespace drover::job
