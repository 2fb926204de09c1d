// SPDX-License-Identifier: Apache-2.0
#include "cli/reporter.h"

#include "cli/json_events.h"
#include "cli/terminal.h"

namespace drover::cli {

Reporter::Reporter(Output& output, const Options& options)
    : output_(output),
      options_(options),
      style_(options.colours),
      error_style_(options.error_colours),
      pace_(options.json ? kJsonInterval : kLineInterval) {
  interruption_.guest = options.guest;
  interruption_.host = options.host;
  interruption_.kind = options.kind;
}

void Reporter::started(const std::string& id) {
  if (options_.on_started) options_.on_started(id);
  const std::lock_guard lock(mutex_);
  if (options_.json) output_.out(json_started(id) + "\n");
}

void Reporter::planned(const job::Plan& plan) {
  const std::lock_guard lock(mutex_);
  tracker_.planned(plan);
  interruption_.guest = plan.guest;
  interruption_.host = plan.host;
  interruption_.kind = plan.kind;
  output_.out(options_.json ? json_plan(plan) + "\n" : render_plan(plan, options_.purpose, style_));
}

void Reporter::progress(const job::Progress& progress) {
  const std::lock_guard lock(mutex_);
  interruption_.progress = progress;
  const ProgressView view = tracker_.update(progress);
  if (!options_.json && options_.redraw) {
    output_.status(render_progress_line(view, line_width(options_.width_of)));
    return;
  }
  if (!pace_.due(progress)) return;
  output_.out((options_.json ? json_progress(view) : render_progress_text(view)) + "\n",
              Output::Keep::IfRoom);
}

void Reporter::note(const std::string& text) {
  const std::lock_guard lock(mutex_);
  output_.out(options_.json ? json_note(text) + "\n" : render_note(text, style_));
}

void Reporter::say(const std::string& text, const std::string& json) {
  const std::lock_guard lock(mutex_);
  output_.out(options_.json ? json + "\n" : text);
}

void Reporter::next(const std::string& guest) {
  const std::lock_guard lock(mutex_);
  tracker_ = {};
  pace_ = ProgressPace(options_.json ? kJsonInterval : kLineInterval);
  interruption_ = {};
  interruption_.kind = options_.kind;
  interruption_.guest = guest;
  interruption_.host = options_.host;
}

void Reporter::finished(const job::Summary& summary) {
  const std::lock_guard lock(mutex_);
  output_.out(options_.json ? json_summary(summary) + "\n"
                            : "\n" + render_summary(summary, style_));
}

void Reporter::failed(const Error& error) {
  const std::lock_guard lock(mutex_);
  if (options_.json) output_.out(json_error(error) + "\n");
  output_.err(render_error(error, error_style_));
}

void Reporter::interrupted() {
  std::string text;
  {
    const std::lock_guard lock(mutex_);
    text = interruption_.again || options_.interrupted.empty()
               ? render_interruption(interruption_, options_.purpose)
               : options_.interrupted;
    interruption_.again = true;
  }
  remark(text);
}

void Reporter::remark(const std::string& text) {
  const std::lock_guard lock(mutex_);
  if (options_.json) output_.out(json_note(text) + "\n");
  output_.err("drover: " + text + "\n");
}

}  // namespace drover::cli
