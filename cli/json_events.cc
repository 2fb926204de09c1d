// SPDX-License-Identifier: Apache-2.0
#include "cli/json_events.h"

#include "cli/exit_codes.h"
#include "job/events.h"

namespace drover::cli {

std::string json_started(const std::string& id) {
  return job::to_line(job::event_of(job::Started{id}));
}

std::string json_plan(const job::Plan& plan) { return job::to_line(job::event_of(plan)); }

std::string json_progress(const ProgressView& view) {
  job::OrderedJson event = job::event_of(view.progress);
  event["percent"] = view.percent;
  for (std::size_t i = 0; i < view.disk_percent.size(); ++i) {
    event["disks"][i]["percent"] = view.disk_percent[i];
  }
  return job::to_line(event);
}

std::string json_note(const std::string& text) {
  return job::to_line(job::event_of(job::Note{text}));
}

std::string json_summary(const job::Summary& summary) {
  return job::to_line(job::event_of(summary));
}

std::string json_error(const Error& error) {
  job::OrderedJson event = job::event_of(error);
  event["exit_code"] = exit_code(error.code);
  return job::to_line(event);
}

}  // namespace drover::cli
