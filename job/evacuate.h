// SPDX-License-Identifier: Apache-2.0
//
// Emptying a storage of this host of all files that guests use: looks at it, plans
// (job/evacuate_plan.h) and carries the plan out, several steps at once.
//
//   auto world = real_evacuate_world(options.uri);
//   DROVER_ASSIGN(EvacuateProposal proposal, propose_evacuation(options, *world, cancel));
//   DROVER_ASSIGN(EvacuateSummary summary, evacuate(options, *world, observer, cancel));
//
// It has no journal. What is left to do is what is left on the storage: the same command again
// first takes up the relocations that were interrupted, and goes on with the rest. A step is done
// or undone, but for a CD-ROM image that several guests use: of those some may have changed.
//
// All has to have room: if not, nothing is begun. What can't go for another reason stays, and so
// does what failed; the rest goes on without it.
//
// Threads: the functions block until all is done. Steps run on threads of theirs, no two of one
// guest at once; the observer is called from them, one call at a time.
//
// Errors: what memmig/storage.h says of names; NoSpace (nothing was changed); Cancelled: what ran
// was undone, what is done stays.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "job/evacuate_plan.h"
#include "job/move.h"
#include "memmig/storage.h"

namespace drover::job {

struct EvacuateOptions {
  std::string from;             // a directory, or a pool
  std::vector<std::string> to;  // the same
  unsigned parallel = 2;        // files copied at once; each is read from the one storage
  Length bandwidth;             // per second, of all together; zero: no limit
  std::string uri = "qemu:///system";
};

// What there is.
struct EvacuateSurvey {
  // A relocation that is on disk, from the storage or to it.
  struct Job {
    std::string id;
    std::string guest;
    std::string uuid;
    bool alive = false;  // a process works on it
    unsigned files = 1;  // that it copies at once
  };
  memmig::Storage source;
  std::vector<memmig::Storage> targets;
  EvacuateProblem problem;          // its targets are those, in their order
  std::vector<std::string> others;  // files on the storage that are no guest's; never touched
  std::vector<Job> jobs;
  std::vector<std::string> notes;  // for people
};

// What a step may take.
struct EvacuateShare {
  unsigned files = 1;  // copied at once
  Length bandwidth;    // per second; zero: no limit
};

// What is asked of the host.
class EvacuateWorld {
 public:
  virtual ~EvacuateWorld() = default;
  EvacuateWorld(const EvacuateWorld&) = delete;
  EvacuateWorld& operator=(const EvacuateWorld&) = delete;

  // As long as this world lives no other empties the storage. Busy: another does.
  virtual Status claim(const EvacuateSurvey& survey) = 0;
  virtual Result<EvacuateSurvey> look(const EvacuateOptions& options) = 0;
  // Whether the step can begin; changes nothing.
  virtual Status check(const EvacuateProblem& problem, const EvacuateStep& step,
                       Cancel& cancel) = 0;
  // Afterwards the guests use the new files and the old ones are gone; after an error neither, but
  // for what the message says.
  virtual Status carry_out(const EvacuateProblem& problem, const EvacuateStep& step,
                           const EvacuateShare& share, Observer& observer, Cancel& cancel) = 0;
  virtual Status resume(const std::string& job, Observer& observer, Cancel& cancel) = 0;

 protected:
  EvacuateWorld() = default;
};

std::unique_ptr<EvacuateWorld> real_evacuate_world(const std::string& uri);

struct EvacuateProposal {
  EvacuateSurvey survey;
  EvacuatePlan plan;  // of survey.problem
};

// Looks and plans; changes nothing. Disks whose relocation can't begin (EvacuateWorld::check()) are
// among the obstacles.
Result<EvacuateProposal> propose_evacuation(const EvacuateOptions& options, EvacuateWorld& world,
                                            Cancel& cancel);

class EvacuateObserver {
 public:
  virtual ~EvacuateObserver() = default;
  virtual void resumes(const EvacuateSurvey::Job& job) = 0;
  virtual void resumed(const EvacuateSurvey::Job& job, const Status& status) = 0;
  virtual void planned(const EvacuateProposal& proposal) = 0;
  // plan.steps[step]
  virtual void begins(const EvacuateProposal& proposal, std::size_t step) = 0;
  virtual void ended(const EvacuateProposal& proposal, std::size_t step, const Status& status) = 0;
  // Of all steps together; its disks ("web1:vda") are those under way.
  virtual void progress(const Progress& progress) = 0;
  virtual void note(const std::string& text) = 0;
};

struct EvacuateSummary {
  struct Left {
    EvacuateItem item;
    std::string why;
  };
  memmig::Storage source;
  std::size_t resumed = 0;  // relocations that were interrupted
  std::size_t steps = 0;    // that were done
  std::size_t failed = 0;   // both kinds
  Length bytes;             // of the steps that were done
  // At the end, as looked at then.
  std::vector<Left> left;
  std::vector<std::string> others;
  [[nodiscard]] bool empty() const { return left.empty(); }
};

Result<EvacuateSummary> evacuate(const EvacuateOptions& options, EvacuateWorld& world,
                                 EvacuateObserver& observer, Cancel& cancel);

}  // namespace drover::job
