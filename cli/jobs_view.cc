// SPDX-License-Identifier: Apache-2.0
#include "cli/jobs_view.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "cli/progress_view.h"
#include "cli/render.h"
#include "cli/values.h"
#include "mirror/session.h"

namespace drover::cli {

namespace {

using job::JobView;

std::string time_text(job::WallTime time) {
  const std::time_t seconds = std::chrono::system_clock::to_time_t(time);
  std::tm local{};
  ::localtime_r(&seconds, &local);
  return fmt::format("{:%Y-%m-%d %H:%M:%S}", local);
}

std::uint64_t seconds_of(job::WallTime time) {
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::seconds>(time.time_since_epoch()).count());
}

ProgressView progress_of(const JobView& view) {
  ProgressTracker tracker;
  if (view.record) tracker.planned(view.record->plan);
  return tracker.update(view.status ? view.status->progress : job::Progress{});
}

std::string runner_text(const JobView& view) {
  if (!view.alive) return "none";
  return view.pid > 0 ? fmt::format("process {}", view.pid) : "alive";
}

std::string phase_text(const JobView& view) {
  return view.status ? std::string(phase_label(view.status->progress.phase)) : "not known";
}

std::string guest_of(const JobView& view) {
  return view.record ? printable(view.record->plan.guest) : "?";
}

std::string host_of(const JobView& view) {
  return view.record ? printable(view.record->plan.host) : "?";
}

std::string waiting_text(const JobView& view) {
  if (!view.status || view.status->progress.waiting_for.empty()) return {};
  const job::Progress& progress = view.status->progress;
  return fmt::format("{}, since {}", printable(progress.waiting_for),
                     time_text(view.status->updated - progress.waiting));
}

// A name and its text, on the lines below a job or of its status.
using Lines = std::vector<std::pair<std::string, std::string>>;

Lines remarks(const JobView& view) {
  Lines out;
  const auto add = [&](const char* name, const std::string& text) {
    if (!text.empty()) out.emplace_back(name, text);
  };
  add("damaged", view.damaged);
  add("waits for", waiting_text(view));
  if (view.status && view.status->last_error) {
    add("last error", view.status->last_error->to_string());
  }
  add("to do", advice(view));
  return out;
}

std::string written(const Lines& lines, std::size_t indent) {
  static constexpr std::size_t kNames = 12;
  std::string out;
  for (const auto& [name, text] : lines) {
    out += std::string(indent, ' ') + padded(name, kNames) +
           printable_lines(text, indent + kNames) + "\n";
  }
  return out;
}

// Columns as wide as their widest cell.
template <std::size_t kColumns>
class Table {
 public:
  using Row = std::array<std::string, kColumns>;
  void add(Row row, std::string below = {}) {
    for (std::size_t i = 0; i < kColumns; ++i) widths_[i] = std::max(widths_[i], columns(row[i]));
    rows_.push_back({std::move(row), std::move(below)});
  }
  [[nodiscard]] std::string text(const Style& style) const {
    static constexpr std::size_t kGap = 2;
    std::string out;
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      std::string line;
      for (std::size_t i = 0; i < kColumns; ++i) {
        const bool last = i + 1 == kColumns;
        line += last ? rows_[r].cells[i] : padded(rows_[r].cells[i], widths_[i] + kGap);
      }
      out += (r == 0 ? style.bold(line) : line) + "\n" + rows_[r].below;
    }
    return out;
  }

 private:
  struct Line {
    Row cells;
    std::string below;
  };
  std::array<std::size_t, kColumns> widths_{};
  std::vector<Line> rows_;
};

}  // namespace

std::string advice(const JobView& view) {
  if (view.alive) return {};
  if (!view.record) {
    return fmt::format("nothing is deleted by itself: look at {} and at the job's log",
                       view.directory);
  }
  return fmt::format(
      "its process has ended: `drover resume {0}` goes on with it, `drover cancel {0}` undoes it",
      view.id);
}

std::string render_jobs(const std::vector<JobView>& jobs, const Style& style) {
  if (jobs.empty()) return "no jobs\n";
  Table<7> table;
  table.add({"JOB", "GUEST", "TO", "PHASE", "DONE", "RUNNER", "SINCE"});
  for (const JobView& view : jobs) {
    const std::string done = view.status ? fmt::format("{}%", progress_of(view).percent) : "?";
    table.add({printable(view.id), guest_of(view), host_of(view), phase_text(view), done,
               runner_text(view), view.record ? time_text(view.record->created) : "?"},
              written(remarks(view), 2));
  }
  return table.text(style);
}

std::string render_job(const JobView& view, const Style& style) {
  Lines lines;
  if (view.record) {
    lines.emplace_back("guest", view.record->plan.guest);
    lines.emplace_back("to", view.record->plan.host);
    lines.emplace_back("since", time_text(view.record->created));
  }
  lines.emplace_back("runner", runner_text(view));
  if (view.status) {
    if (!view.status->state.empty()) lines.emplace_back("state", view.status->state);
    lines.emplace_back("progress", render_progress_line(progress_of(view), 1000));
    lines.emplace_back("as of", time_text(view.status->updated));
  }
  for (auto& line : remarks(view)) lines.push_back(std::move(line));
  return style.bold("job " + printable(view.id)) + "\n" + written(lines, 2);
}

std::string render_history(const job::History& history, const Style& style) {
  std::string out;
  if (history.entries.empty()) {
    out = "no job has ended yet\n";
  } else {
    Table<6> table;
    table.add({"JOB", "GUEST", "TO", "OUTCOME", "ENDED", "TOOK"});
    for (const job::HistoryEntry& entry : history.entries) {
      const auto took =
          std::chrono::duration_cast<std::chrono::milliseconds>(entry.ended - entry.created);
      std::string below;
      if (entry.reason) below = written({{"because", entry.reason->message}}, 2);
      table.add({printable(entry.id), printable(entry.guest), printable(entry.host),
                 std::string(job::outcome_name(entry.outcome)), time_text(entry.ended),
                 format_span(std::max(took, std::chrono::milliseconds(0)))},
                below);
    }
    out = table.text(style);
  }
  if (history.damaged > 0) {
    out += plural(history.damaged, "line") + " of the history can't be read\n";
  }
  return out;
}

std::string json_job(const JobView& view) {
  job::OrderedJson out = {{"job", view.id}, {"alive", view.alive}};
  out["pid"] = view.pid > 0 ? job::OrderedJson(view.pid) : job::OrderedJson(nullptr);
  const auto text = [](const std::string& what) {
    return what.empty() ? job::OrderedJson(nullptr) : job::OrderedJson(what);
  };
  if (view.record) {
    const job::JobRecord& record = *view.record;
    out["kind"] = job::kind_name(record.kind());
    out["guest"] = record.plan.guest;
    out["uuid"] = record.plan.uuid;
    out["host"] = record.plan.host;
    out["created_at"] = seconds_of(record.created);
  }
  out["state"] = nullptr;
  out["progress"] = nullptr;
  out["last_error"] = nullptr;
  if (view.status) {
    const job::JobStatus& status = *view.status;
    const ProgressView progress = progress_of(view);
    out["state"] = text(status.state);
    out["progress"] = job::event_of(status.progress);
    out["progress"]["percent"] = progress.percent;
    if (status.last_error) out["last_error"] = mirror::error_to_json(*status.last_error);
    out["updated_at"] = seconds_of(status.updated);
  }
  out["damaged"] = text(view.damaged);
  out["to_do"] = text(advice(view));
  return job::to_line(out);
}

std::string json_history(const job::HistoryEntry& entry) { return job::to_line(entry.to_json()); }

}  // namespace drover::cli
