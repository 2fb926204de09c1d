// SPDX-License-Identifier: Apache-2.0
#include "job/events.h"

#include <algorithm>
#include <limits>

#include "mirror/session.h"

namespace drover::job {
namespace {

using nlohmann::json;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::size_t kMaxText =
    65536;  // of one text: a message may quote another program's output
constexpr std::size_t kMaxItems = 4096;  // of one list

// --- out ---

OrderedJson text_or_null(const std::string& text) {
  return text.empty() ? OrderedJson(nullptr) : OrderedJson(text);
}

// As what it is read back as.
template <class Time>
std::uint64_t number(Time time) {
  return time.count() < 0 ? 0 : static_cast<std::uint64_t>(time.count());
}

OrderedJson known_or_null(Length length) {
  return length == Length(0) ? OrderedJson(nullptr) : OrderedJson(length.bytes());
}

OrderedJson disk_plans(const std::vector<DiskPlan>& plans) {
  OrderedJson disks = OrderedJson::array();
  for (const DiskPlan& disk : plans) {
    disks.push_back({{"disk", disk.disk},
                     {"source_path", disk.source_path},
                     {"source_format", disk.source_format},
                     {"source_block_device", disk.source_block_device},
                     {"target_path", disk.target_path},
                     {"target_format", disk.target_format},
                     {"target_block_device", disk.target_block_device},
                     {"delete_source", disk.delete_source},
                     {"renamed", disk.renamed},
                     {"size_bytes", disk.virtual_size.bytes()},
                     {"allocated_bytes", known_or_null(disk.allocation)}});
  }
  return disks;
}

// The names of a blackout's parts, out and in.
struct BlackoutName {
  const char* name;
  microseconds BlackoutParts::*part;
};
constexpr BlackoutName kBlackoutNames[] = {
    {"quiesce_us", &BlackoutParts::quiesce}, {"disks_us", &BlackoutParts::disks},
    {"drain_us", &BlackoutParts::drain},     {"barrier_us", &BlackoutParts::barrier},
    {"compare_us", &BlackoutParts::compare}, {"flush_us", &BlackoutParts::flush},
    {"release_us", &BlackoutParts::release}, {"memory_us", &BlackoutParts::memory},
    {"wait_us", &BlackoutParts::wait},       {"guard_us", &BlackoutParts::guard},
    {"resume_us", &BlackoutParts::resume}};

OrderedJson blackout_or_null(const std::optional<BlackoutParts>& parts) {
  if (!parts) return nullptr;
  OrderedJson out = OrderedJson::object();
  for (const BlackoutName& one : kBlackoutNames) out[one.name] = number((*parts).*one.part);
  return out;
}

// --- in ---

tl::unexpected<Error> broken(const std::string& what) { return fail(Code::Protocol, what); }

Result<std::string> text(const json& object, const char* name) {
  return mirror::get_string(object, name, kMaxText);
}

// Absent or null: empty.
Result<std::string> optional_text(const json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end() || found->is_null()) return std::string();
  return text(object, name);
}

// Absent or null: zero.
Result<std::uint64_t> optional_number(const json& object, const char* name,
                                      std::uint64_t max = UINT64_MAX) {
  const auto found = object.find(name);
  if (found == object.end() || found->is_null()) return 0;
  return mirror::get_unsigned(object, name, max);
}

Result<Length> length(const json& object, const char* name) {
  DROVER_ASSIGN(const std::uint64_t bytes, optional_number(object, name));
  return Length(bytes);
}

template <class Time>
Result<Time> time(const json& object, const char* name) {
  static constexpr std::uint64_t kMost = std::uint64_t{1} << 53;
  DROVER_ASSIGN(const std::uint64_t count, optional_number(object, name, kMost));
  return Time(static_cast<typename Time::rep>(count));
}

// A list of objects, or nothing if there is none.
Result<json> list(const json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end()) return json::array();
  if (!found->is_array() || found->size() > kMaxItems) {
    return broken(std::string("\"") + name + "\" is not a list, or too long");
  }
  return *found;
}

Result<std::vector<std::string>> texts(const json& object, const char* name) {
  DROVER_ASSIGN(const json items, list(object, name));
  std::vector<std::string> out;
  for (const json& item : items) {
    if (!item.is_string()) return broken(std::string("\"") + name + "\" has what is not a text");
    out.push_back(item.get<std::string>());
  }
  return out;
}

Result<Phase> phase(const json& object) {
  DROVER_ASSIGN(const std::string name, mirror::get_string(object, "phase", 64));
  const std::optional<Phase> known = phase_of_name(name);
  if (!known) return broken("there is no such phase");
  return *known;
}

// Absent: of an older drover, which knew only moves.
Result<Kind> kind(const json& object) {
  if (!object.contains("kind")) return Kind::Move;
  DROVER_ASSIGN(const std::string name, mirror::get_string(object, "kind", 64));
  const std::optional<Kind> known = kind_of_name(name);
  if (!known) return broken("there is no such kind of job");
  return *known;
}

Result<DiskPlan> disk_plan(const json& object) {
  if (!object.is_object()) return broken("a disk is not an object");
  DiskPlan disk;
  DROVER_ASSIGN(disk.disk, text(object, "disk"));
  DROVER_ASSIGN(disk.source_path, text(object, "source_path"));
  DROVER_ASSIGN(disk.source_format, text(object, "source_format"));
  DROVER_ASSIGN(disk.source_block_device, mirror::get_bool(object, "source_block_device", false));
  DROVER_ASSIGN(disk.target_path, text(object, "target_path"));
  DROVER_ASSIGN(disk.target_format, text(object, "target_format"));
  DROVER_ASSIGN(disk.target_block_device, mirror::get_bool(object, "target_block_device", false));
  // What may be deleted is never guessed.
  DROVER_ASSIGN(disk.delete_source, mirror::get_bool(object, "delete_source", false));
  DROVER_ASSIGN(disk.renamed, mirror::get_bool(object, "renamed", false));
  DROVER_ASSIGN(disk.virtual_size, length(object, "size_bytes"));
  DROVER_ASSIGN(disk.allocation, length(object, "allocated_bytes"));
  return disk;
}

Result<std::vector<DiskPlan>> disk_plans_of(const json& object) {
  DROVER_ASSIGN(const json items, list(object, "disks"));
  std::vector<DiskPlan> out;
  for (const json& item : items) {
    DROVER_ASSIGN(DiskPlan disk, disk_plan(item));
    out.push_back(std::move(disk));
  }
  return out;
}

Result<memmig::Finding> finding(const json& object) {
  if (!object.is_object()) return broken("a finding is not an object");
  memmig::Finding out;
  DROVER_ASSIGN(const std::string severity, text(object, "severity"));
  out.severity = severity == "warning" ? memmig::Severity::Warning : memmig::Severity::Blocker;
  DROVER_ASSIGN(out.rule, text(object, "rule"));
  DROVER_ASSIGN(out.what, text(object, "what"));
  DROVER_ASSIGN(out.why, optional_text(object, "why"));
  DROVER_ASSIGN(out.to_do, optional_text(object, "to_do"));
  DROVER_ASSIGN(out.disk, optional_text(object, "disk"));
  return out;
}

Result<DiskProgress> disk_progress(const json& object) {
  if (!object.is_object()) return broken("a disk is not an object");
  DiskProgress disk;
  DROVER_ASSIGN(disk.disk, text(object, "disk"));
  DROVER_ASSIGN(disk.size, length(object, "size_bytes"));
  DROVER_ASSIGN(disk.data, length(object, "data_bytes"));
  DROVER_ASSIGN(disk.copied, length(object, "copied_bytes"));
  DROVER_ASSIGN(disk.dirty, length(object, "dirty_bytes"));
  return disk;
}


// What a Progress and a Summary count alike.
template <class Counted>
Status read_counts(const json& object, Counted& out) {
  DROVER_ASSIGN(out.data, length(object, "data_bytes"));
  DROVER_ASSIGN(out.wire_bytes, length(object, "wire_bytes"));
  DROVER_ASSIGN(out.saved_bytes, length(object, "saved_bytes"));
  DROVER_ASSIGN(out.mirrored_writes, optional_number(object, "mirrored_writes"));
  DROVER_ASSIGN(out.sent_again, length(object, "sent_again_bytes"));
  DROVER_ASSIGN(out.reconnects, optional_number(object, "reconnects"));
  DROVER_ASSIGN(const std::uint64_t found, optional_number(object, "found_bytes"));
  out.found = Length(found);
  DROVER_ASSIGN(out.slowdown.writes, optional_number(object, "handover_writes"));
  DROVER_ASSIGN(out.slowdown.waited, time<microseconds>(object, "handover_wait_us"));
  DROVER_ASSIGN(out.slowdown.longest, time<microseconds>(object, "handover_longest_wait_us"));
  return {};
}

// Absent (of an older drover) or null: not known.
Result<std::optional<BlackoutParts>> blackout_parts_of(const json& object) {
  const auto found = object.find("blackout");
  if (found == object.end() || found->is_null()) return std::nullopt;
  if (!found->is_object()) return broken("the blackout's parts are not an object");
  BlackoutParts parts;
  for (const BlackoutName& one : kBlackoutNames) {
    DROVER_ASSIGN(parts.*one.part, time<microseconds>(*found, one.name));
  }
  return parts;
}

Result<Summary> summary_from_json(const json& object) {
  Summary out;
  DROVER_TRY(read_counts(object, out));
  DROVER_ASSIGN(out.kind, kind(object));
  DROVER_ASSIGN(out.guest, text(object, "guest"));
  DROVER_ASSIGN(out.host, text(object, "host"));
  DROVER_ASSIGN(out.total, time<milliseconds>(object, "total_ms"));
  DROVER_ASSIGN(out.blackout, time<microseconds>(object, "blackout_us"));
  DROVER_ASSIGN(out.blackout_parts, blackout_parts_of(object));
  DROVER_ASSIGN(out.memory_bytes, length(object, "memory_bytes"));
  DROVER_ASSIGN(const json phases, list(object, "phases"));
  for (const json& item : phases) {
    if (!item.is_object()) return broken("a phase is not an object");
    DROVER_ASSIGN(const Phase which, phase(item));
    DROVER_ASSIGN(const milliseconds took, time<milliseconds>(item, "ms"));
    out.phase_times.emplace_back(which, took);
  }
  DROVER_ASSIGN(out.disks, disk_plans_of(object));
  DROVER_ASSIGN(out.verified, mirror::get_bool(object, "verified", false));
  DROVER_ASSIGN(out.damaged, optional_number(object, "damaged_chunks"));
  DROVER_ASSIGN(out.unverified, optional_number(object, "unverified_chunks"));
  DROVER_ASSIGN(out.deleted, texts(object, "deleted"));
  DROVER_ASSIGN(out.kept, texts(object, "kept"));
  DROVER_ASSIGN(out.notes, texts(object, "notes"));
  DROVER_ASSIGN(out.runner_peak_memory, length(object, "runner_peak_memory_bytes"));
  DROVER_ASSIGN(out.receiver_peak_memory, length(object, "receiver_peak_memory_bytes"));
  return out;
}

Result<JobEvent> event_from_json(const json& object) {
  DROVER_ASSIGN(const std::string kind, mirror::get_string(object, "event", 64));
  if (kind == "started") {
    DROVER_ASSIGN(const std::string id, mirror::get_string(object, "job", 64));
    return JobEvent(Started{id});
  }
  if (kind == "note") {
    DROVER_ASSIGN(std::string said, text(object, "text"));
    return JobEvent(Note{std::move(said)});
  }
  if (kind == "plan") {
    DROVER_ASSIGN(Plan plan, plan_from_json(object));
    return JobEvent(std::move(plan));
  }
  if (kind == "progress") {
    DROVER_ASSIGN(Progress progress, progress_from_json(object));
    return JobEvent(std::move(progress));
  }
  if (kind == "summary") {
    DROVER_ASSIGN(Summary summary, summary_from_json(object));
    return JobEvent(std::move(summary));
  }
  if (kind == "error") {
    DROVER_TRY(mirror::get_string(object, "code", 64));
    // A null hint is no hint.
    json plain = object;
    DROVER_ASSIGN(plain["hint"], optional_text(object, "hint"));
    return JobEvent(mirror::error_from_json(plain));
  }
  return broken("there is no such event");
}

}  // namespace

std::string_view kind_name(Kind kind) {
  switch (kind) {
    case Kind::Move: return "move";
    case Kind::Relocate: return "relocate";
  }
  return "";
}

std::optional<Kind> kind_of_name(std::string_view name) {
  for (const Kind kind : {Kind::Move, Kind::Relocate}) {
    if (kind_name(kind) == name) return kind;
  }
  return std::nullopt;
}

std::optional<Phase> phase_of_name(std::string_view name) {
  for (int i = 0; i <= static_cast<int>(Phase::Undo); ++i) {
    if (phase_name(static_cast<Phase>(i)) == name) return static_cast<Phase>(i);
  }
  return std::nullopt;
}

OrderedJson event_of(const Started& started) { return {{"event", "started"}, {"job", started.id}}; }

OrderedJson event_of(const Plan& plan) {
  std::vector<memmig::Finding> sorted = plan.findings;
  std::ranges::stable_partition(sorted, [](const memmig::Finding& finding) {
    return finding.severity == memmig::Severity::Blocker;
  });
  OrderedJson findings = OrderedJson::array();
  for (const memmig::Finding& finding : sorted) {
    const bool blocker = finding.severity == memmig::Severity::Blocker;
    findings.push_back({{"severity", blocker ? "blocker" : "warning"},
                        {"rule", finding.rule},
                        {"disk", text_or_null(finding.disk)},
                        {"what", finding.what},
                        {"why", text_or_null(finding.why)},
                        {"to_do", text_or_null(finding.to_do)}});
  }
  return {{"event", "plan"},
          {"kind", kind_name(plan.kind)},
          {"guest", plan.guest},
          {"uuid", plan.uuid},
          {"host", plan.host},
          {"memory_bytes", plan.memory.bytes()},
          {"blocked", plan.blocked()},
          {"disks", disk_plans(plan.disks)},
          {"findings", findings}};
}

OrderedJson event_of(const Progress& progress) {
  OrderedJson disks = OrderedJson::array();
  for (const DiskProgress& disk : progress.disks) {
    disks.push_back({{"disk", disk.disk},
                     {"size_bytes", disk.size.bytes()},
                     {"data_bytes", disk.data.bytes()},
                     {"copied_bytes", disk.copied.bytes()},
                     {"dirty_bytes", disk.dirty.bytes()}});
  }
  const OrderedJson time_left =
      progress.time_left ? OrderedJson(number(*progress.time_left)) : OrderedJson(nullptr);
  const OrderedJson waiting =
      progress.waiting_for.empty() ? OrderedJson(nullptr) : OrderedJson(number(progress.waiting));
  return {{"event", "progress"},
          {"phase", phase_name(progress.phase)},
          {"elapsed_ms", number(progress.elapsed)},
          {"time_left_s", time_left},
          {"data_bytes", progress.data.bytes()},
          {"copied_bytes", progress.copied.bytes()},
          {"rate_bytes_per_s", progress.rate.bytes()},
          {"mirrored_writes", progress.mirrored_writes},
          {"wire_bytes", progress.wire_bytes.bytes()},
          {"saved_bytes", progress.saved_bytes.bytes()},
          {"compression", text_or_null(progress.compression)},
          {"found_bytes", progress.found.bytes()},
          {"sent_again_bytes", progress.sent_again.bytes()},
          {"reconnects", progress.reconnects},
          {"to_verify_bytes", progress.to_verify.bytes()},
          {"handover_writes", progress.slowdown.writes},
          {"handover_wait_us", number(progress.slowdown.waited)},
          {"handover_longest_wait_us", number(progress.slowdown.longest)},
          {"memory_total_bytes", progress.memory_total.bytes()},
          {"memory_remaining_bytes", progress.memory_remaining.bytes()},
          {"waiting_for", text_or_null(progress.waiting_for)},
          {"waiting_ms", waiting},
          {"disks", disks}};
}

OrderedJson event_of(const Note& note) { return {{"event", "note"}, {"text", note.text}}; }

OrderedJson event_of(const Summary& summary) {
  OrderedJson phases = OrderedJson::array();
  for (const auto& [which, took] : summary.phase_times) {
    phases.push_back({{"phase", phase_name(which)}, {"ms", number(took)}});
  }
  return {{"event", "summary"},
          {"kind", kind_name(summary.kind)},
          {"guest", summary.guest},
          {"host", summary.host},
          {"total_ms", number(summary.total)},
          {"blackout_us", number(summary.blackout)},
          {"blackout", blackout_or_null(summary.blackout_parts)},
          {"data_bytes", summary.data.bytes()},
          {"wire_bytes", summary.wire_bytes.bytes()},
          {"saved_bytes", summary.saved_bytes.bytes()},
          {"memory_bytes", summary.memory_bytes.bytes()},
          {"mirrored_writes", summary.mirrored_writes},
          {"found_bytes", summary.found.bytes()},
          {"sent_again_bytes", summary.sent_again.bytes()},
          {"reconnects", summary.reconnects},
          {"handover_writes", summary.slowdown.writes},
          {"handover_wait_us", number(summary.slowdown.waited)},
          {"handover_longest_wait_us", number(summary.slowdown.longest)},
          {"verified", summary.verified},
          {"damaged_chunks", summary.damaged},
          {"unverified_chunks", summary.unverified},
          {"phases", phases},
          {"disks", disk_plans(summary.disks)},
          {"deleted", summary.deleted},
          {"kept", summary.kept},
          {"notes", summary.notes},
          {"runner_peak_memory_bytes", summary.runner_peak_memory.bytes()},
          {"receiver_peak_memory_bytes", summary.receiver_peak_memory.bytes()}};
}

OrderedJson event_of(const Error& error) {
  return {{"event", "error"},
          {"code", code_name(error.code)},
          {"message", error.message},
          {"hint", text_or_null(error.hint)},
          {"retryable", error.retryable}};
}

std::string to_line(const OrderedJson& json) {
  return json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

Result<Plan> plan_from_json(const json& object) {
  Plan plan;
  DROVER_ASSIGN(plan.kind, kind(object));
  DROVER_ASSIGN(plan.guest, text(object, "guest"));
  DROVER_ASSIGN(plan.uuid, text(object, "uuid"));
  DROVER_ASSIGN(plan.host, text(object, "host"));
  DROVER_ASSIGN(plan.memory, length(object, "memory_bytes"));
  DROVER_ASSIGN(plan.disks, disk_plans_of(object));
  DROVER_ASSIGN(const json findings, list(object, "findings"));
  for (const json& item : findings) {
    DROVER_ASSIGN(memmig::Finding one, finding(item));
    plan.findings.push_back(std::move(one));
  }
  return plan;
}

Result<Progress> progress_from_json(const json& object) {
  Progress out;
  DROVER_TRY(read_counts(object, out));
  DROVER_ASSIGN(out.phase, phase(object));
  DROVER_ASSIGN(out.elapsed, time<milliseconds>(object, "elapsed_ms"));
  if (const auto left = object.find("time_left_s"); left != object.end() && !left->is_null()) {
    DROVER_ASSIGN(out.time_left, time<seconds>(object, "time_left_s"));
  }
  DROVER_ASSIGN(out.compression, optional_text(object, "compression"));
  DROVER_ASSIGN(out.copied, length(object, "copied_bytes"));
  DROVER_ASSIGN(out.to_verify, length(object, "to_verify_bytes"));
  DROVER_ASSIGN(out.rate, length(object, "rate_bytes_per_s"));
  DROVER_ASSIGN(out.memory_total, length(object, "memory_total_bytes"));
  DROVER_ASSIGN(out.memory_remaining, length(object, "memory_remaining_bytes"));
  DROVER_ASSIGN(out.waiting_for, optional_text(object, "waiting_for"));
  DROVER_ASSIGN(out.waiting, time<milliseconds>(object, "waiting_ms"));
  DROVER_ASSIGN(const json disks, list(object, "disks"));
  for (const json& item : disks) {
    DROVER_ASSIGN(DiskProgress disk, disk_progress(item));
    out.disks.push_back(std::move(disk));
  }
  return out;
}

Result<JobEvent> parse_event(std::string_view line) {
  if (line.size() > kMaxEventLine) return broken("an event is too long");
  DROVER_ASSIGN(const json object, mirror::parse_object(line, "an event"));
  return event_from_json(object);
}

}  // namespace drover::job
