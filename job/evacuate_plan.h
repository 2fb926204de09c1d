// SPDX-License-Identifier: Apache-2.0
//
// Which file of a storage goes where when the storage is emptied: a pure function. It reads no
// clock and no disk; the same problem gives the same plan.
//
//   EvacuateProblem problem;
//   problem.items = {{.path = "/mnt/a/web1.raw", .bytes = 60_GiB, .users = {{"web1", uuid,
//   "vda"}}}}; problem.targets = {{.name = "/mnt/b", .directory = "/mnt/b", .free = 100_GiB}};
//   const EvacuatePlan plan = plan_evacuation(problem);
//   for (const EvacuateStep& step : plan.steps) ...      // in this order, several at once
//
// Each file goes, the largest first, to the target with the most free space left; if not all have
// room that way, other ways are looked for (a search bounded by a count). What a plan keeps to:
//   - On no target more is put than is free, less the margin; whichever steps run at once.
//   - Each item is in one step, or in one obstacle with the reason.
//   - No two new files have one path, and none that of a file that is there.
//   - The disks of one guest are one step: they are relocated by one job.
//
// Threads: any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/units.h"
#include "memmig/preflight.h"

namespace drover::job {

enum class EvacuateKind { Disk, Medium, Nvram };

// A file on the storage that guests use.
struct EvacuateItem {
  struct User {
    std::string guest;
    std::string uuid;
    std::string disk;      // "vda"; of NVRAM: empty
    bool running = false;  // or stands still
    bool operator==(const User&) const = default;
  };
  EvacuateKind kind = EvacuateKind::Disk;
  std::string path;
  Length bytes;             // that its copy takes
  std::vector<User> users;  // of a disk and of NVRAM: one
  std::string stays;        // why it can't go; empty: it can
  // A copy that an earlier run has made (media and NVRAM only).
  struct Copy {
    std::size_t target = 0;
    std::string path;
  };
  std::optional<Copy> copy;
};

struct EvacuateProblem {
  struct Target {
    std::string name;
    std::string directory;
    Length free;
    std::set<std::string> names;  // of what is in the directory
  };
  std::vector<EvacuateItem> items;
  std::vector<Target> targets;
  Length margin = memmig::kSpaceMargin;  // that stays free on each target
  std::uint64_t effort = 200'000;        // of the search
};

struct EvacuateStep {
  struct File {
    std::size_t item = 0;  // indexes into the problem
    std::size_t target = 0;
    std::string path;  // the new one
  };
  EvacuateKind kind = EvacuateKind::Disk;
  std::vector<File> files;  // of media and NVRAM: one
  Length bytes;
};

struct EvacuateObstacle {
  std::size_t item = 0;
  std::string why;
};

struct EvacuatePlan {
  std::vector<EvacuateStep> steps;          // the largest first
  std::vector<EvacuateObstacle> obstacles;  // in the items' order
  Length bytes;                             // of all steps
  bool room = true;                         // nothing stays for want of room
};

EvacuatePlan plan_evacuation(const EvacuateProblem& problem);

}  // namespace drover::job
