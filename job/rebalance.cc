// SPDX-License-Identifier: Apache-2.0
#include "job/rebalance.h"

#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "base/clock.h"
#include "memmig/preflight.h"

namespace drover::job {

namespace {

using memmig::DiskLoad;
using memmig::HostGuest;
using memmig::StorageDisk;
using memmig::StorageReport;
using By = RebalanceProblem::By;

// By io a storage is not filled beyond that: a full one would stop its guests.
constexpr std::uint64_t kFullestByIo = 95;  // of a hundred

Error cancelled() { return {Code::Cancelled, "rebalancing was cancelled", {}, false}; }

// ---- the problem --------------------------------------------------------------------------------

const HostGuest* find_guest(const StorageReport& report, const std::string& name) {
  const auto found = std::find_if(
      report.guests.begin(), report.guests.end(),
      [&](const HostGuest& guest) { return guest.name == name || guest.uuid == name; });
  return found == report.guests.end() ? nullptr : &*found;
}

Result<const HostGuest*> guest_named(const StorageReport& report, const std::string& name) {
  if (const HostGuest* guest = find_guest(report, name)) return guest;
  return fail(Code::NotFound, "no guest is named " + name,
              "'virsh list --all' shows the guests of this host");
}

// What this process has learnt of disks that could not be moved, by UUID and disk.
using Stuck = std::map<std::pair<std::string, std::string>, std::string>;

Status add_pins(const RebalanceOptions& options, const StorageReport& report,
                RebalanceProblem& problem) {
  for (const auto& pin : options.pins) {
    const std::string& disk = pin.second;
    DROVER_ASSIGN(const HostGuest* guest, guest_named(report, pin.first));
    const bool known = std::any_of(guest->disks.begin(), guest->disks.end(),
                                   [&](const auto& its) { return its.target == disk; });
    if (!known) {
      return fail(Code::NotFound, fmt::format("guest {} has no disk {}", guest->name, disk),
                  fmt::format("'virsh domblklist {}' shows its disks", guest->name));
    }
    for (std::size_t i = 0; i < report.disks.size(); ++i) {
      if (report.disks[i].uuid == guest->uuid && report.disks[i].disk == disk) {
        problem.disks[i].fixed = "it is pinned";
      }
    }
  }
  return {};
}

Status add_apart(const RebalanceOptions& options, const StorageReport& report,
                 RebalanceProblem& problem) {
  for (const auto& group : options.apart) {
    std::vector<std::string> guests;
    for (const std::string& name : group) {
      DROVER_ASSIGN(const HostGuest* guest, guest_named(report, name));
      guests.push_back(guest->name);
    }
    problem.apart.push_back(std::move(guests));
  }
  return {};
}

Result<RebalanceProblem> problem_of(const RebalanceOptions& options, const StorageReport& report,
                                    const std::vector<DiskLoad>& loads, const Stuck& stuck) {
  RebalanceProblem problem;
  problem.by = options.by;
  problem.tolerance = options.tolerance;
  std::vector<Length> disks(report.storages.size());
  for (std::size_t i = 0; i < report.disks.size(); ++i) {
    const StorageDisk& its = report.disks[i];
    RebalanceProblem::Disk disk{its.guest, its.disk, its.storage, its.allocated, 0, its.stays};
    if (!loads.empty()) disk.load = static_cast<std::uint64_t>(loads[i].busy.count());
    if (const auto why = stuck.find({its.uuid, its.disk}); why != stuck.end()) {
      disk.fixed = why->second;
    }
    disks[its.storage] += its.allocated;
    problem.disks.push_back(std::move(disk));
  }
  for (std::size_t i = 0; i < report.storages.size(); ++i) {
    const memmig::Storage& its = report.storages[i];
    RebalanceProblem::Storage storage;
    storage.name = its.name;
    storage.capacity = its.capacity;
    storage.other = its.used > disks[i] ? its.used - disks[i] : Length();
    // What a relocation's pre-flight asks for beside the data has to be left over.
    Length fullest = its.capacity;
    if (options.by == By::Io) fullest = Length(its.capacity.bytes() / 100 * kFullestByIo);
    storage.fullest = fullest > memmig::kSpaceMargin ? fullest - memmig::kSpaceMargin : Length(1);
    problem.storages.push_back(std::move(storage));
  }
  DROVER_TRY(add_pins(options, report, problem));
  DROVER_TRY(add_apart(options, report, problem));
  return problem;
}

// ---- looking and planning -----------------------------------------------------------------------

RebalanceMove move_of(const StorageReport& report, const RebalanceStep& step) {
  const StorageDisk& disk = report.disks[step.disk];
  const memmig::Storage& target = report.storages[step.target];
  return {disk.guest,  disk.uuid,        disk.disk, disk.path, report.storages[step.source].name,
          target.name, target.directory, step.bytes};
}

class Session {
 public:
  Session(const RebalanceOptions& options, RebalanceWorld& world, Cancel& cancel)
      : options_(options), world_(world), cancel_(cancel) {}

  // The world as it is, with the problem but without a plan.
  Result<RebalanceProposal> look(std::size_t most_moves);
  Result<RebalanceProposal> propose(std::size_t most_moves);
  Status plan(RebalanceProposal& proposal);
  void give_up_on(const RebalanceMove& move, const std::string& why) {
    stuck_[{move.uuid, move.disk}] = why;
  }

 private:
  using Asked = std::tuple<std::string, std::string, std::string>;  // UUID, disk, target
  // The first move of the plan that can't begin, and why; asked once each.
  Result<std::optional<std::pair<RebalanceMove, std::string>>> first_blocked(
      const std::vector<RebalanceMove>& moves);

  const RebalanceOptions& options_;
  RebalanceWorld& world_;
  Cancel& cancel_;
  Stuck stuck_;
  std::set<Asked> good_;
};

Result<RebalanceProposal> Session::look(std::size_t most_moves) {
  RebalanceProposal out;
  std::vector<DiskLoad> loads;
  if (options_.by == By::Io) {
    DROVER_ASSIGN(loads, world_.loads(options_.window, cancel_));
  }
  DROVER_ASSIGN(out.report, world_.look(options_.storages));
  if (out.report.disks.empty()) {
    return fail(Code::NotFound, "no disk of a guest is on any of these storages",
                "'virsh domblklist VM' shows where a guest's disks are");
  }
  if (options_.by == By::Io) {
    std::map<std::pair<std::string, std::string>, const DiskLoad*> by_disk;
    for (const DiskLoad& load : loads) by_disk[{load.guest, load.disk}] = &load;
    for (const StorageDisk& disk : out.report.disks) {
      const auto load = by_disk.find({disk.uuid, disk.disk});
      out.loads.push_back(load == by_disk.end() ? DiskLoad{disk.uuid, disk.disk} : *load->second);
    }
  }
  DROVER_ASSIGN(out.problem, problem_of(options_, out.report, out.loads, stuck_));
  out.problem.most_moves = most_moves;
  return out;
}

Result<std::optional<std::pair<RebalanceMove, std::string>>> Session::first_blocked(
    const std::vector<RebalanceMove>& moves) {
  // Each takes a look at all guests; a plan of hundreds is checked again as it goes on.
  constexpr std::size_t kMostChecked = 32;
  for (std::size_t i = 0; i < std::min(kMostChecked, moves.size()); ++i) {
    const RebalanceMove& move = moves[i];
    const Asked asked = {move.uuid, move.disk, move.target};
    if (good_.contains(asked)) continue;
    const Status status = world_.check(move, cancel_);
    if (status) {
      good_.insert(asked);
    } else if (status.error().code == Code::Blocked) {
      return std::pair(move, status.error().message);
    } else {
      return fail(status.error());
    }
  }
  return std::nullopt;
}

Status Session::plan(RebalanceProposal& proposal) {
  for (;;) {
    DROVER_ASSIGN(proposal.plan, plan_rebalance(proposal.problem));
    proposal.moves.clear();
    for (const RebalanceStep& step : proposal.plan.steps) {
      proposal.moves.push_back(move_of(proposal.report, step));
    }
    DROVER_ASSIGN(const auto blocked, first_blocked(proposal.moves));
    if (!blocked) return {};
    const auto& [move, why] = *blocked;
    proposal.report.notes.push_back(
        fmt::format("disk {} of guest {} stays where it is: {}", move.disk, move.guest, why));
    give_up_on(move, why);  // one less that can move: this ends
    for (std::size_t i = 0; i < proposal.report.disks.size(); ++i) {
      const StorageDisk& disk = proposal.report.disks[i];
      if (disk.uuid == move.uuid && disk.disk == move.disk) proposal.problem.disks[i].fixed = why;
    }
  }
}

Result<RebalanceProposal> Session::propose(std::size_t most_moves) {
  DROVER_ASSIGN(RebalanceProposal out, look(most_moves));
  DROVER_TRY(plan(out));
  return out;
}

// ---- carrying out -------------------------------------------------------------------------------

// What is left of a plan, in the world as it is now.
Result<RebalancePlan> assess(const RebalanceProposal& now, const RebalanceMove* begin,
                             const RebalanceMove* end) {
  std::vector<RebalanceWish> wishes;
  std::map<std::pair<std::string, std::string>, std::string> at;
  for (const RebalanceMove* move = begin; move != end; ++move) {
    const std::string name = move->guest + ":" + move->disk;
    const auto disk = std::find_if(
        now.report.disks.begin(), now.report.disks.end(),
        [&](const auto& its) { return its.uuid == move->uuid && its.disk == move->disk; });
    if (disk == now.report.disks.end()) {
      return fail(Code::Blocked, name + " is on none of the storages any more");
    }
    auto& place = at.try_emplace({move->uuid, move->disk}, now.report.storages[disk->storage].name)
                      .first->second;
    if (place != move->source) {
      return fail(Code::Blocked, fmt::format("{} is not on {} any more", name, move->source));
    }
    place = move->target;
    const auto target = std::find_if(now.report.storages.begin(), now.report.storages.end(),
                                     [&](const auto& its) { return its.name == move->target; });
    wishes.push_back({static_cast<std::size_t>(disk - now.report.disks.begin()),
                      static_cast<std::size_t>(target - now.report.storages.begin())});
  }
  return assess_moves(now.problem, wishes);
}

// Why the rest of a plan is not to be followed; empty: it is.
std::string why_not_on(const RebalanceProposal& now, const RebalanceProposal& plan,
                       std::size_t done) {
  const RebalanceMove* const moves = plan.moves.data();
  const Result<RebalancePlan> rest = assess(now, moves + done, moves + plan.moves.size());
  if (!rest) return rest.error().message;
  if (plan.plan.reached && !rest->reached) {
    return "the moves that are left would not be enough: " + rest->obstacles.front();
  }
  return {};
}

bool ends_all(Code code) {
  return code == Code::Cancelled || code == Code::Unreachable || code == Code::Denied ||
         code == Code::Held || code == Code::Internal;
}

// A world that changes all the time is not followed for ever.
std::size_t limit(const RebalanceOptions& options, std::size_t planned) {
  constexpr std::size_t kMore = 8;
  return std::min(options.most_moves, 2 * planned + kMore);
}

class RealWorld final : public RebalanceWorld {
 public:
  RealWorld(std::string uri, RebalanceMover mover)
      : uri_(std::move(uri)), mover_(std::move(mover)) {}

  Result<StorageReport> look(const std::vector<std::string>& storages) override {
    // A new connection each time: moves take hours, and libvirtd may be restarted meanwhile.
    DROVER_ASSIGN(const auto host, memmig::connect_storage_host(uri_));
    return memmig::look_at_storages(*host, storages);
  }

  Result<std::vector<DiskLoad>> loads(std::chrono::milliseconds window, Cancel& cancel) override {
    DROVER_ASSIGN(const auto host, memmig::connect_storage_host(uri_));
    const Instant begin = now();
    DROVER_ASSIGN(const auto before, host->disk_io());
    for (auto left = window; left.count() > 0;
         left = window - std::chrono::duration_cast<std::chrono::milliseconds>(now() - begin)) {
      pollfd stop{cancel.fd(), POLLIN, 0};
      ::poll(&stop, 1, static_cast<int>(left.count()));
      if (cancel.requested()) return fail(cancelled());
    }
    DROVER_ASSIGN(const auto after, host->disk_io());
    return memmig::loads_between(before, after, now() - begin);
  }

  Status check(const RebalanceMove& move, Cancel& cancel) override {
    return mover_.check(move, cancel);
  }
  Status carry_out(const RebalanceMove& move, Observer& observer, Cancel& cancel) override {
    return mover_.carry_out(move, observer, cancel);
  }

 private:
  const std::string uri_;
  const RebalanceMover mover_;
};

}  // namespace

std::unique_ptr<RebalanceWorld> real_rebalance_world(const std::string& uri, RebalanceMover mover) {
  return std::make_unique<RealWorld>(uri, std::move(mover));
}

Result<RebalanceProposal> propose_rebalance(const RebalanceOptions& options, RebalanceWorld& world,
                                            Cancel& cancel) {
  return Session(options, world, cancel).propose(options.most_moves);
}

Result<RebalanceSummary> rebalance(const RebalanceOptions& options, RebalanceWorld& world,
                                   RebalanceObserver& observer, Cancel& cancel) {
  Session session(options, world, cancel);
  DROVER_ASSIGN(RebalanceProposal plan, session.propose(options.most_moves));
  observer.proposed(plan, "");
  RebalanceSummary summary;
  const std::size_t most = limit(options, plan.moves.size());
  std::size_t done = 0;   // of this plan
  std::size_t tried = 0;  // moves, of all plans
  while (done < plan.moves.size() && tried < most) {
    if (cancel.requested()) return fail(cancelled());
    const RebalanceMove& move = plan.moves[done];
    observer.begins(++tried, move);
    const Status status = world.carry_out(move, observer.of_move(), cancel);
    observer.ended(tried, move, status);
    std::string why;
    if (status) {
      ++done;
      ++summary.moves;
      summary.bytes += move.bytes;
    } else if (ends_all(status.error().code)) {
      return fail(status.error());
    } else {
      ++summary.failed;
      session.give_up_on(move, status.error().message);
      why = fmt::format("{}:{} could not be moved", move.guest, move.disk);
    }
    DROVER_ASSIGN(RebalanceProposal now, session.look(most - tried));
    if (why.empty() && done < plan.moves.size()) why = why_not_on(now, plan, done);
    if (why.empty() && done < plan.moves.size()) continue;
    // All was done, or it is not to go on: what is there to do now?
    DROVER_TRY(session.plan(now));
    if (why.empty() && !now.moves.empty()) why = "the storages have changed meanwhile";
    plan = std::move(now);
    done = 0;
    if (!why.empty()) observer.proposed(plan, why);
  }
  summary.reached = plan.plan.reached && plan.moves.empty();
  summary.last = std::move(plan);
  return summary;
}

}  // namespace drover::job
