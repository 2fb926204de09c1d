// SPDX-License-Identifier: Apache-2.0
//
// From the job's progress to what people and programs are shown: per cents that never run
// backwards, and when a new line is due. Pure; the time is that of the progress itself.
//
//   ProgressTracker tracker;
//   tracker.planned(plan);
//   ProgressView view = tracker.update(progress);   // cli/render.h and cli/json_events.h show it
//
// Threads: one object belongs to one thread at a time.
#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "job/move.h"

namespace drover::cli {

struct ProgressView {
  job::Progress progress;
  // Of the whole move: the disks' data and the guest's memory. 100 only when it is done.
  int percent = 0;
  std::vector<int> disk_percent;  // of each of progress.disks
};

class ProgressTracker {
 public:
  void planned(const job::Plan& plan);
  ProgressView update(const job::Progress& progress);

 private:
  Length memory_;  // the plan's, until QEMU says how much there is
  int percent_ = 0;
  std::map<std::string, int, std::less<>> disk_percent_;
};

// Says which progress is worth a line: each new phase, each change of what is waited for, and
// otherwise one in `interval`.
class ProgressPace {
 public:
  explicit ProgressPace(std::chrono::milliseconds interval) : interval_(interval) {}
  bool due(const job::Progress& progress);

 private:
  struct Shown {
    job::Phase phase;
    std::string waiting_for;
    std::chrono::milliseconds elapsed;
  };
  std::chrono::milliseconds interval_;
  std::optional<Shown> shown_;
};

// "copying disks": the phase for people. The name for programs is job::phase_name().
std::string_view phase_label(job::Phase phase);

// From Barrier on a move is finished, not undone.
bool past_undoing(job::Phase phase);

}  // namespace drover::cli
