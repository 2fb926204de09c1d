// SPDX-License-Identifier: Apache-2.0
//
// Tells the user what the job says: for people or, with --json, for programs. Composes
// cli/render.h, cli/json_events.h and cli/output.h.
//
//   Output output(...);
//   Reporter reporter(output, {.json = false, ...});
//   Result<job::Summary> summary = job::move(options, reporter, cancel);
//   summary ? reporter.finished(*summary) : reporter.failed(summary.error());
//
// Threads: any; calls are put in order by a lock. None blocks.
#pragma once

#include <functional>
#include <mutex>
#include <string>

#include "cli/output.h"
#include "cli/progress_view.h"
#include "cli/render.h"
#include "job/move.h"

namespace drover::cli {

class Reporter : public job::Observer {
 public:
  struct Options {
    Purpose purpose = Purpose::Move;
    bool json = false;
    bool redraw = false;   // progress on one line; else lines, one in kLineInterval
    bool colours = false;  // of standard output
    bool error_colours = false;
    int width_of = 1;   // the terminal whose width counts when a line is redrawn
    std::string guest;  // as the user named them, until the plan is there
    std::string host;
    job::Kind kind = job::Kind::Move;
    std::function<void(const std::string& id)> on_started;  // may be empty
    std::string interrupted;  // the answer to the first signal; empty: what suits the job
  };
  static constexpr std::chrono::milliseconds kLineInterval{5000};
  static constexpr std::chrono::milliseconds kJsonInterval{500};

  Reporter(Output& output, const Options& options);

  void started(const std::string& id) override;
  void planned(const job::Plan& plan) override;
  void progress(const job::Progress& progress) override;
  void note(const std::string& text) override;

  // A block of text for people, or the line (without its new line) for programs.
  void say(const std::string& text, const std::string& json);
  // Another job begins, of that guest: its progress starts from nothing.
  void next(const std::string& guest);
  void finished(const job::Summary& summary);
  void failed(const Error& error);
  // Something about the command itself: for people on standard error, for programs a note.
  void remark(const std::string& text);
  // A signal asked to stop; the second and later ones are answered differently.
  void interrupted();

 private:
  Output& output_;
  const Options options_;
  const Style style_;
  const Style error_style_;
  std::mutex mutex_;  // guards what follows
  ProgressTracker tracker_;
  ProgressPace pace_;
  Interruption interruption_;
};

}  // namespace drover::cli
