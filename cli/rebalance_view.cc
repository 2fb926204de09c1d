// SPDX-License-Identifier: Apache-2.0
#include "cli/rebalance_view.h"

#include <fmt/format.h>

#include <algorithm>

#include "cli/values.h"
#include "job/events.h"

namespace drover::cli {

namespace {

using job::OrderedJson;
using job::RebalanceMove;
using job::RebalancePlan;
using job::RebalanceProblem;
using job::RebalanceProposal;

std::string percent(double share) { return fmt::format("{:.1f} %", share * 100); }

std::string points(double difference) { return fmt::format("{:.1f} points", difference * 100); }

bool by_io(const RebalanceProposal& proposal) {
  return proposal.problem.by == RebalanceProblem::By::Io;
}

std::string disk_name(const RebalanceMove& move) {
  return printable(move.guest) + ":" + printable(move.disk);
}

std::string way(const RebalanceMove& move) {
  return printable(move.source) + " -> " + printable(move.target);
}

// ---- for people ---------------------------------------------------------------------------------

std::string title(const RebalanceProposal& proposal) {
  return fmt::format("{} by {}: the mean is {}, and each is to be within {} of it\n",
                     plural(proposal.report.storages.size(), "storage"),
                     by_io(proposal) ? "io" : "space", percent(proposal.plan.mean),
                     points(proposal.problem.tolerance));
}

std::string storage_rows(const RebalanceProposal& proposal) {
  std::size_t width = 0;
  for (const auto& storage : proposal.report.storages) {
    width = std::max(width, columns(printable(storage.name)));
  }
  std::string out;
  for (std::size_t i = 0; i < proposal.report.storages.size(); ++i) {
    const memmig::Storage& storage = proposal.report.storages[i];
    std::string name = padded(printable(storage.name), width);
    const std::string used =
        fmt::format("{} of {}", format_length(storage.used), format_length(storage.capacity));
    out += fmt::format("  {}  {:>24}  {:>7}", name, used, percent(proposal.plan.before[i]));
    if (!proposal.moves.empty()) out += " -> " + percent(proposal.plan.after[i]);
    out += "\n";
  }
  return out;
}

std::string load_text(const memmig::DiskLoad& load) {
  return fmt::format("     {:.0f} requests/s of {:.1f} ms each, {}\n", load.requests,
                     std::chrono::duration<double, std::milli>(load.latency).count(),
                     format_rate(Length(static_cast<std::uint64_t>(load.bytes))));
}

std::string move_rows(const RebalanceProposal& proposal, const Style& style) {
  std::string out;
  for (std::size_t i = 0; i < proposal.moves.size(); ++i) {
    const RebalanceMove& move = proposal.moves[i];
    const job::RebalanceStep& step = proposal.plan.steps[i];
    out += fmt::format("  {}. {}, {}, {}\n", i + 1, style.bold(disk_name(move)),
                       format_length(move.bytes), way(move));
    if (by_io(proposal)) out += load_text(proposal.loads[step.disk]);
    out += "     " + printable(step.reason) + "\n";
    out +=
        fmt::format("     then {} is at {}, {} at {}\n", printable(move.source),
                    percent(step.source_after), printable(move.target), percent(step.target_after));
  }
  return out;
}

std::string obstacle_rows(const RebalancePlan& plan, const Style& style) {
  if (plan.reached) return {};
  std::string out = style.warning("The tolerance is not reached") + ":\n";
  for (const std::string& obstacle : plan.obstacles) out += "  " + printable(obstacle) + "\n";
  return out;
}

// ---- for programs -------------------------------------------------------------------------------

OrderedJson text_or_null(const std::string& text) {
  return text.empty() ? OrderedJson(nullptr) : OrderedJson(text);
}

OrderedJson storages(const RebalanceProposal& proposal) {
  OrderedJson out = OrderedJson::array();
  for (std::size_t i = 0; i < proposal.report.storages.size(); ++i) {
    const memmig::Storage& storage = proposal.report.storages[i];
    out.push_back({{"storage", storage.name},
                   {"directory", storage.directory},
                   {"pool", text_or_null(storage.pool)},
                   {"mount_point", storage.mount_point},
                   {"capacity_bytes", storage.capacity.bytes()},
                   {"used_bytes", storage.used.bytes()},
                   {"share", proposal.plan.before[i]},
                   {"share_after", proposal.plan.after[i]}});
  }
  return out;
}

OrderedJson disks(const RebalanceProposal& proposal) {
  OrderedJson out = OrderedJson::array();
  for (std::size_t i = 0; i < proposal.report.disks.size(); ++i) {
    const memmig::StorageDisk& disk = proposal.report.disks[i];
    OrderedJson its = {{"guest", disk.guest},
                       {"uuid", disk.uuid},
                       {"disk", disk.disk},
                       {"path", disk.path},
                       {"storage", proposal.report.storages[disk.storage].name},
                       {"allocated_bytes", disk.allocated.bytes()},
                       {"stays", text_or_null(proposal.problem.disks[i].fixed)},
                       {"load", nullptr}};
    if (by_io(proposal)) {
      const memmig::DiskLoad& load = proposal.loads[i];
      its["load"] = {
          {"requests_per_second", load.requests},
          {"bytes_per_second", load.bytes},
          {"latency_us", std::chrono::duration<double, std::micro>(load.latency).count()},
          {"busy", std::chrono::duration<double>(load.busy).count()}};
    }
    out.push_back(std::move(its));
  }
  return out;
}

OrderedJson moves(const RebalanceProposal& proposal) {
  OrderedJson out = OrderedJson::array();
  for (std::size_t i = 0; i < proposal.moves.size(); ++i) {
    const RebalanceMove& move = proposal.moves[i];
    const job::RebalanceStep& step = proposal.plan.steps[i];
    out.push_back({{"guest", move.guest},
                   {"uuid", move.uuid},
                   {"disk", move.disk},
                   {"source", move.source},
                   {"target", move.target},
                   {"bytes", move.bytes.bytes()},
                   {"reason", step.reason},
                   {"source_share", step.source_before},
                   {"source_share_after", step.source_after},
                   {"target_share", step.target_before},
                   {"target_share_after", step.target_after},
                   {"target_free_bytes", step.target_free.bytes()}});
  }
  return out;
}

OrderedJson move_event(const MoveView& view, const char* state) {
  return {{"event", "move"},
          {"number", view.number},
          {"state", state},
          {"guest", view.move.guest},
          {"uuid", view.move.uuid},
          {"disk", view.move.disk},
          {"source", view.move.source},
          {"target", view.move.target},
          {"bytes", view.move.bytes.bytes()}};
}

}  // namespace

std::string render_proposal(const RebalanceProposal& proposal, const std::string& why,
                            const Style& style) {
  std::string out;
  if (!why.empty()) {
    out += "\n" + style.warning("Planning again") + ": " + printable(why) + "\n";
  }
  out += title(proposal) + "\n" + storage_rows(proposal) + "\n";
  for (const std::string& note : proposal.report.notes) out += "note: " + printable(note) + "\n";
  if (!proposal.moves.empty()) {
    out += fmt::format("{}, {}:\n\n", plural(proposal.moves.size(), "move"),
                       format_length(proposal.plan.bytes));
    out += move_rows(proposal, style) + "\n";
  } else if (!proposal.plan.needed) {
    out += style.good("Nothing is to be moved.") + "\n";
  } else {
    out += "No move makes it better.\n";
  }
  if (proposal.plan.needed && proposal.plan.reached && proposal.plan.proven) {
    out += "Fewer bytes would not do.\n";
  }
  return out + obstacle_rows(proposal.plan, style);
}

std::string json_proposal(const RebalanceProposal& proposal, const std::string& why) {
  const RebalancePlan& plan = proposal.plan;
  return job::to_line({{"event", "proposal"},
                       {"why", text_or_null(why)},
                       {"by", by_io(proposal) ? "io" : "space"},
                       {"tolerance", proposal.problem.tolerance},
                       {"mean", plan.mean},
                       {"needed", plan.needed},
                       {"reached", plan.reached},
                       {"proven", plan.proven},
                       {"bytes", plan.bytes.bytes()},
                       {"storages", storages(proposal)},
                       {"disks", disks(proposal)},
                       {"moves", moves(proposal)},
                       {"obstacles", plan.obstacles},
                       {"notes", proposal.report.notes}});
}

std::string render_begin(const MoveView& view, const Style& style) {
  return fmt::format("\n{}. {}, {}, {}\n", view.number, style.bold(disk_name(view.move)),
                     format_length(view.move.bytes), way(view.move));
}

std::string json_begin(const MoveView& view) { return job::to_line(move_event(view, "begun")); }

std::string render_end(const MoveView& view, const Status& status, const Style& style) {
  if (status) return fmt::format("   {}\n", style.good("done"));
  return fmt::format("   {}: {}\n", style.bad(disk_name(view.move) + " stays where it is"),
                     printable(status.error().to_string()));
}

std::string json_end(const MoveView& view, const Status& status) {
  OrderedJson event = move_event(view, status ? "done" : "failed");
  event["message"] = status ? OrderedJson(nullptr) : OrderedJson(status.error().message);
  return job::to_line(event);
}

std::string render_rebalanced(const job::RebalanceSummary& summary, const Style& style) {
  const RebalanceProposal& last = summary.last;
  std::string out =
      fmt::format("\n{} done, {}", plural(summary.moves, "move"), format_length(summary.bytes));
  if (summary.failed > 0) out += fmt::format("; {} failed", plural(summary.failed, "move"));
  out += ".\n\n" + storage_rows(last) + "\n";
  if (summary.reached) {
    return out +
           style.good(fmt::format("Each is within {} of the mean of {}",
                                  points(last.problem.tolerance), percent(last.plan.mean))) +
           ".\n";
  }
  return out + obstacle_rows(last.plan, style);
}

std::string json_rebalanced(const job::RebalanceSummary& summary) {
  return job::to_line({{"event", "rebalanced"},
                       {"reached", summary.reached},
                       {"moves", summary.moves},
                       {"failed", summary.failed},
                       {"bytes", summary.bytes.bytes()},
                       {"mean", summary.last.plan.mean},
                       {"storages", storages(summary.last)},
                       {"obstacles", summary.last.plan.obstacles}});
}

}  // namespace drover::cli
