// SPDX-License-Identifier: Apache-2.0
#include "cli/evacuate_view.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "cli/values.h"
#include "job/events.h"

namespace drover::cli {

namespace {

using job::EvacuateItem;
using job::EvacuateKind;
using job::EvacuateProposal;
using job::EvacuateStep;
using job::OrderedJson;
using Job = job::EvacuateSurvey::Job;

constexpr std::size_t kMostShown = 20;  // for people, of files that are no guest's

const EvacuateItem& item_of(const EvacuateProposal& proposal, const EvacuateStep::File& file) {
  return proposal.survey.problem.items[file.item];
}

std::vector<std::string> guests_of(const EvacuateProposal& proposal, const EvacuateStep& step) {
  std::vector<std::string> out;
  for (const EvacuateItem::User& user : item_of(proposal, step.files.front()).users) {
    if (std::ranges::find(out, user.guest) == out.end()) out.push_back(user.guest);
  }
  return out;
}

std::string joined(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + printable(word);
  return out;
}

// "web1: vda, vdb", "web1: NVRAM", "debian.iso, in web1, web2".
std::string name_of(const EvacuateProposal& proposal, const EvacuateStep& step) {
  const std::string guests = joined(guests_of(proposal, step));
  if (step.kind == EvacuateKind::Nvram) return guests + ": NVRAM";
  if (step.kind == EvacuateKind::Disk) {
    std::vector<std::string> disks;
    for (const auto& file : step.files) {
      disks.push_back(item_of(proposal, file).users.front().disk);
    }
    return guests + ": " + joined(disks);
  }
  const std::string& path = item_of(proposal, step.files.front()).path;
  const std::string name = printable(path.substr(path.rfind('/') + 1));
  return guests.empty() ? name + ", in no guest any more" : name + ", in " + guests;
}

// ---- for people ---------------------------------------------------------------------------------

std::string others_rows(const std::vector<std::string>& others) {
  if (others.empty()) return {};
  std::string out = "Not a guest's, left alone:\n";
  for (std::size_t i = 0; i < std::min(others.size(), kMostShown); ++i) {
    out += "  " + printable(others[i]) + "\n";
  }
  if (others.size() > kMostShown) {
    out += fmt::format("  and {} more\n", others.size() - kMostShown);
  }
  return out;
}

std::string stay_row(const std::string& path, const std::string& why) {
  return fmt::format("  {}\n    {}\n", printable(path), printable(why));
}

// ---- for programs -------------------------------------------------------------------------------

OrderedJson text_or_null(const std::string& text) {
  return text.empty() ? OrderedJson(nullptr) : OrderedJson(text);
}

OrderedJson message_of(const Status& status) {
  return status ? OrderedJson(nullptr) : OrderedJson(status.error().message);
}

const char* kind_name(EvacuateKind kind) {
  switch (kind) {
    case EvacuateKind::Disk: return "disks";
    case EvacuateKind::Medium: return "medium";
    case EvacuateKind::Nvram: return "nvram";
  }
  return "";
}

OrderedJson step_members(const EvacuateProposal& proposal, std::size_t number) {
  const EvacuateStep& step = proposal.plan.steps[number];
  OrderedJson files = OrderedJson::array();
  for (const auto& file : step.files) {
    const EvacuateItem& item = item_of(proposal, file);
    files.push_back({{"disk", text_or_null(step.kind == EvacuateKind::Disk ? item.users.front().disk
                                                                           : std::string())},
                     {"path", item.path},
                     {"new_path", file.path},
                     {"storage", proposal.survey.targets[file.target].name}});
  }
  return {{"number", number + 1},
          {"kind", kind_name(step.kind)},
          {"guests", guests_of(proposal, step)},
          {"bytes", step.bytes.bytes()},
          {"files", std::move(files)}};
}

}  // namespace

std::string render_evacuation(const EvacuateProposal& proposal, const Style& style) {
  const auto& [survey, plan] = proposal;
  std::string out = fmt::format("Emptying {}: {}, {}\n", printable(survey.source.name),
                                plural(plan.steps.size(), "step"), format_length(plan.bytes));
  for (std::size_t i = 0; i < survey.targets.size(); ++i) {
    out += fmt::format("  to {}, which has {} free\n", printable(survey.targets[i].name),
                       format_length(survey.problem.targets[i].free));
  }
  for (const Job& job : survey.jobs) {
    if (!job.alive) {
      out += fmt::format("First job {} goes on, which relocates disks of {}.\n", printable(job.id),
                         printable(job.guest));
    }
  }
  for (std::size_t i = 0; i < plan.steps.size(); ++i) {
    const EvacuateStep& step = plan.steps[i];
    out += fmt::format("{}{}. {}, {}\n", i == 0 ? "\n" : "", i + 1,
                       style.bold(name_of(proposal, step)), format_length(step.bytes));
    for (const auto& file : step.files) {
      out += fmt::format("     {} -> {}\n", printable(item_of(proposal, file).path),
                         printable(file.path));
    }
  }
  if (!plan.obstacles.empty()) {
    out += "\n" + style.warning("These stay where they are") + ":\n";
    for (const auto& obstacle : plan.obstacles) {
      out += stay_row(survey.problem.items[obstacle.item].path, obstacle.why);
    }
  }
  if (!survey.others.empty()) out += "\n" + others_rows(survey.others);
  for (const std::string& note : survey.notes) out += "note: " + printable(note) + "\n";
  return out;
}

std::string json_evacuation(const EvacuateProposal& proposal) {
  const auto& [survey, plan] = proposal;
  OrderedJson targets = OrderedJson::array();
  for (std::size_t i = 0; i < survey.targets.size(); ++i) {
    targets.push_back({{"storage", survey.targets[i].name},
                       {"directory", survey.targets[i].directory},
                       {"free_bytes", survey.problem.targets[i].free.bytes()}});
  }
  OrderedJson jobs = OrderedJson::array();
  for (const Job& job : survey.jobs) {
    jobs.push_back({{"job", job.id}, {"guest", job.guest}, {"alive", job.alive}});
  }
  OrderedJson steps = OrderedJson::array();
  for (std::size_t i = 0; i < plan.steps.size(); ++i) steps.push_back(step_members(proposal, i));
  OrderedJson stay = OrderedJson::array();
  for (const auto& obstacle : plan.obstacles) {
    stay.push_back({{"path", survey.problem.items[obstacle.item].path}, {"why", obstacle.why}});
  }
  return job::to_line({{"event", "evacuation"},
                       {"from", survey.source.name},
                       {"to", std::move(targets)},
                       {"jobs", std::move(jobs)},
                       {"steps", std::move(steps)},
                       {"bytes", plan.bytes.bytes()},
                       {"room", plan.room},
                       {"stay", std::move(stay)},
                       {"others", survey.others},
                       {"notes", survey.notes}});
}

std::string render_step_begins(const EvacuateProposal& proposal, std::size_t step) {
  return fmt::format("{}. {}: begins\n", step + 1, name_of(proposal, proposal.plan.steps[step]));
}

std::string render_step_ended(const EvacuateProposal& proposal, std::size_t step,
                              const Status& status, const Style& style) {
  const std::string name =
      fmt::format("{}. {}", step + 1, name_of(proposal, proposal.plan.steps[step]));
  if (status) return name + ": " + style.good("done") + "\n";
  return fmt::format("{}: {}: {}\n", name, style.bad("stays where it is"),
                     printable(status.error().to_string()));
}

std::string json_step(const EvacuateProposal& proposal, std::size_t step, const char* state,
                      const Status& status) {
  OrderedJson event = {{"event", "step"}, {"state", state}};
  event.update(step_members(proposal, step));
  event["message"] = message_of(status);
  return job::to_line(event);
}

std::string render_resume(const Job& job) {
  return fmt::format("job {} goes on, which relocates disks of {}\n", printable(job.id),
                     printable(job.guest));
}

std::string render_resumed(const Job& job, const Status& status, const Style& style) {
  if (status) return fmt::format("job {}: {}\n", printable(job.id), style.good("done"));
  return fmt::format("job {}: {}\n", printable(job.id),
                     style.bad(printable(status.error().to_string())));
}

std::string json_resume(const Job& job, const char* state, const Status& status) {
  return job::to_line({{"event", "resume"},
                       {"state", state},
                       {"job", job.id},
                       {"guest", job.guest},
                       {"message", message_of(status)}});
}

std::string render_evacuated(const job::EvacuateSummary& summary, const Style& style) {
  std::string out =
      fmt::format("\n{} done, {}", plural(summary.steps, "step"), format_length(summary.bytes));
  if (summary.resumed > 0) out += fmt::format(", {} resumed", plural(summary.resumed, "job"));
  if (summary.failed > 0) out += fmt::format("; {} failed", summary.failed);
  out += ".\n";
  if (summary.empty()) {
    out += style.good("No guest has anything on " + printable(summary.source.name) + " any more") +
           ".\n";
  } else {
    out += style.warning("Still on " + printable(summary.source.name)) + ":\n";
    for (const auto& left : summary.left) out += stay_row(left.item.path, left.why);
  }
  return out + others_rows(summary.others);
}

std::string json_evacuated(const job::EvacuateSummary& summary) {
  OrderedJson stay = OrderedJson::array();
  for (const auto& left : summary.left) {
    stay.push_back({{"path", left.item.path}, {"why", left.why}});
  }
  return job::to_line({{"event", "evacuated"},
                       {"from", summary.source.name},
                       {"empty", summary.empty()},
                       {"steps", summary.steps},
                       {"resumed", summary.resumed},
                       {"failed", summary.failed},
                       {"bytes", summary.bytes.bytes()},
                       {"stay", std::move(stay)},
                       {"others", summary.others}});
}

}  // namespace drover::cli
