// SPDX-License-Identifier: Apache-2.0
#include "cli/progress_view.h"

#include <algorithm>

namespace drover::cli {

namespace {

int share(double done, double all) {
  if (all <= 0) return 0;
  return static_cast<int>(std::clamp(done / all, 0.0, 1.0) * 100.0);
}

double bytes(Length length) { return static_cast<double>(length.bytes()); }

// How the phases stand to the copy and to memory.
enum class Stage { Before, Copying, Copied, MemoryDone, Done, Undo };

Stage stage(job::Phase phase) {
  switch (phase) {
    case job::Phase::Plan:
    case job::Phase::Reserve:
    case job::Phase::Attach: return Stage::Before;
    case job::Phase::Copy: return Stage::Copying;
    case job::Phase::Synchronised:
    case job::Phase::Memory: return Stage::Copied;
    case job::Phase::Barrier:
    case job::Phase::Resume:
    case job::Phase::Switch:
    case job::Phase::Commit: return Stage::MemoryDone;
    case job::Phase::Done: return Stage::Done;
    case job::Phase::Undo: return Stage::Undo;
  }
  return Stage::Undo;
}

}  // namespace

void ProgressTracker::planned(const job::Plan& plan) { memory_ = plan.memory; }

ProgressView ProgressTracker::update(const job::Progress& progress) {
  ProgressView view{progress, 0, {}};
  const Stage at = stage(progress.phase);

  for (const job::DiskProgress& disk : progress.disks) {
    int& shown = disk_percent_[disk.disk];
    int percent = share(bytes(disk.copied), bytes(disk.data));
    if (disk.data == Length(0) && at == Stage::Copied) percent = 100;
    // What the guest wrote over must go again: not everything is there.
    if (disk.dirty > Length(0)) percent = std::min(percent, 99);
    if (at == Stage::MemoryDone || at == Stage::Done) percent = 100;
    shown = std::max(shown, percent);
    view.disk_percent.push_back(shown);
  }

  int percent = percent_;
  switch (at) {
    case Stage::Before:
    case Stage::Undo: break;
    case Stage::Copying:
    case Stage::Copied: {
      if (progress.memory_total > Length(0)) memory_ = progress.memory_total;
      const Length memory_moved =
          progress.memory_total > progress.memory_remaining && at == Stage::Copied
              ? progress.memory_total - progress.memory_remaining
              : Length(0);
      const Length copied = std::min(progress.copied, progress.data);
      percent = std::min(share(bytes(copied + memory_moved), bytes(progress.data + memory_)), 99);
      break;
    }
    case Stage::MemoryDone: percent = 99; break;
    case Stage::Done: percent = 100; break;
  }
  percent_ = std::max(percent_, percent);
  view.percent = percent_;
  return view;
}

bool ProgressPace::due(const job::Progress& progress) {
  if (shown_ && shown_->phase == progress.phase && shown_->waiting_for == progress.waiting_for &&
      progress.elapsed < shown_->elapsed + interval_) {
    return false;
  }
  shown_ = Shown{progress.phase, progress.waiting_for, progress.elapsed};
  return true;
}

std::string_view phase_label(job::Phase phase) {
  switch (phase) {
    case job::Phase::Plan: return "examining both hosts";
    case job::Phase::Reserve: return "reserving space";
    case job::Phase::Attach: return "attaching mirrors";
    case job::Phase::Copy: return "copying disks";
    case job::Phase::Synchronised: return "disks in step";
    case job::Phase::Memory: return "moving memory";
    case job::Phase::Barrier: return "switching over";
    case job::Phase::Resume: return "resuming there";
    case job::Phase::Switch: return "switching over";
    case job::Phase::Commit: return "clearing up here";
    case job::Phase::Done: return "done";
    case job::Phase::Undo: return "undoing";
  }
  return "";
}

bool past_undoing(job::Phase phase) {
  switch (phase) {
    case job::Phase::Barrier:
    case job::Phase::Resume:
    case job::Phase::Switch:
    case job::Phase::Commit:
    case job::Phase::Done: return true;
    case job::Phase::Plan:
    case job::Phase::Reserve:
    case job::Phase::Attach:
    case job::Phase::Copy:
    case job::Phase::Synchronised:
    case job::Phase::Memory:
    case job::Phase::Undo: return false;
  }
  return false;
}

}  // namespace drover::cli
