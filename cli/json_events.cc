// SPDX-License-Identifier: Apache-2.0
#include "cli/json_events.h"

#include <nlohmann/json.hpp>

#include "cli/exit_codes.h"
#include "cli/finding.h"

namespace drover::cli {

namespace {

using Json = nlohmann::ordered_json;

std::string line(const Json& event) {
  return event.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Json text_or_null(const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); }

Json known_or_null(Length length) {
  return length == Length(0) ? Json(nullptr) : Json(length.bytes());
}

Json disk_plans(const std::vector<job::DiskPlan>& plans) {
  Json disks = Json::array();
  for (const job::DiskPlan& disk : plans) {
    disks.push_back({{"disk", disk.disk},
                     {"source_path", disk.source_path},
                     {"source_format", disk.source_format},
                     {"source_block_device", disk.source_block_device},
                     {"target_path", disk.target_path},
                     {"target_format", disk.target_format},
                     {"target_block_device", disk.target_block_device},
                     {"delete_source", disk.delete_source},
                     {"size_bytes", disk.virtual_size.bytes()},
                     {"allocated_bytes", known_or_null(disk.allocation)}});
  }
  return disks;
}

}  // namespace

std::string json_plan(const job::Plan& plan) {
  Json findings = Json::array();
  for (const FindingText& finding : findings_of(plan)) {
    findings.push_back({{"severity", finding.blocker ? "blocker" : "warning"},
                        {"rule", finding.rule},
                        {"disk", text_or_null(finding.disk)},
                        {"what", finding.what},
                        {"why", text_or_null(finding.why)},
                        {"to_do", text_or_null(finding.to_do)}});
  }
  return line({{"event", "plan"},
               {"guest", plan.guest},
               {"uuid", plan.uuid},
               {"host", plan.host},
               {"memory_bytes", plan.memory.bytes()},
               {"blocked", blocked(plan)},
               {"disks", disk_plans(plan.disks)},
               {"findings", findings}});
}

std::string json_progress(const ProgressView& view) {
  const job::Progress& progress = view.progress;
  Json disks = Json::array();
  for (std::size_t i = 0; i < progress.disks.size(); ++i) {
    const job::DiskProgress& disk = progress.disks[i];
    disks.push_back({{"disk", disk.disk},
                     {"percent", view.disk_percent[i]},
                     {"size_bytes", disk.size.bytes()},
                     {"data_bytes", disk.data.bytes()},
                     {"copied_bytes", disk.copied.bytes()},
                     {"dirty_bytes", disk.dirty.bytes()}});
  }
  const Json time_left = progress.time_left ? Json(progress.time_left->count()) : Json(nullptr);
  return line({{"event", "progress"},
               {"phase", job::phase_name(progress.phase)},
               {"percent", view.percent},
               {"elapsed_ms", progress.elapsed.count()},
               {"time_left_s", time_left},
               {"data_bytes", progress.data.bytes()},
               {"copied_bytes", progress.copied.bytes()},
               {"rate_bytes_per_s", progress.rate.bytes()},
               {"mirrored_writes", progress.mirrored_writes},
               {"wire_bytes", progress.wire_bytes.bytes()},
               {"memory_total_bytes", progress.memory_total.bytes()},
               {"memory_remaining_bytes", progress.memory_remaining.bytes()},
               {"waiting_for", text_or_null(progress.waiting_for)},
               {"disks", disks}});
}

std::string json_note(const std::string& text) { return line({{"event", "note"}, {"text", text}}); }

std::string json_summary(const job::Summary& summary) {
  Json phases = Json::array();
  for (const auto& [phase, time] : summary.phase_times) {
    phases.push_back({{"phase", job::phase_name(phase)}, {"ms", time.count()}});
  }
  return line({{"event", "summary"},
               {"guest", summary.guest},
               {"host", summary.host},
               {"total_ms", summary.total.count()},
               {"blackout_us", summary.blackout.count()},
               {"data_bytes", summary.data.bytes()},
               {"wire_bytes", summary.wire_bytes.bytes()},
               {"memory_bytes", summary.memory_bytes.bytes()},
               {"mirrored_writes", summary.mirrored_writes},
               {"phases", phases},
               {"disks", disk_plans(summary.disks)},
               {"deleted", summary.deleted},
               {"kept", summary.kept},
               {"notes", summary.notes},
               {"runner_peak_memory_bytes", summary.runner_peak_memory.bytes()},
               {"receiver_peak_memory_bytes", summary.receiver_peak_memory.bytes()}});
}

std::string json_error(const Error& error) {
  return line({{"event", "error"},
               {"code", code_name(error.code)},
               {"exit_code", exit_code(error.code)},
               {"message", error.message},
               {"hint", text_or_null(error.hint)},
               {"retryable", error.retryable}});
}

}  // namespace drover::cli
