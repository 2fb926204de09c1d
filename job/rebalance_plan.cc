// SPDX-License-Identifier: Apache-2.0
#include "job/rebalance_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "job/rebalance_search.h"

namespace drover::job {

namespace {

using rebalance::Amount;
using rebalance::Draft;
using rebalance::Hop;
using rebalance::Layout;
using rebalance::World;
using By = RebalanceProblem::By;

// Sums of all bytes and loads stay below it, so that nothing overflows.
constexpr std::uint64_t kMost = std::uint64_t{1} << 61;

std::string name_of(const RebalanceProblem::Disk& disk) { return disk.guest + ":" + disk.target; }

std::uint64_t weight_of(const RebalanceProblem& problem, const RebalanceProblem::Disk& disk) {
  return problem.by == By::Space ? disk.allocated.bytes() : disk.load;
}

Status check(const RebalanceProblem& problem) {
  const auto bad = [](std::string message) {
    return fail(Code::InvalidArgument, std::move(message));
  };
  if (problem.storages.size() < 2) return bad("there are no two storages to balance");
  if (!(problem.tolerance >= 0 && problem.tolerance <= 1)) {
    return bad("the tolerance is not between 0 and 1");
  }
  std::uint64_t sum = 0;
  const auto add = [&](std::uint64_t amount) {
    sum += std::min(amount, kMost);
    return sum < kMost;
  };
  for (const RebalanceProblem::Storage& storage : problem.storages) {
    if (storage.capacity == Length()) return bad("storage " + storage.name + " has no capacity");
    if (storage.fullest > storage.capacity) {
      return bad("storage " + storage.name + " is to be filled beyond its capacity");
    }
    if (!add(storage.capacity.bytes()) || !add(storage.other.bytes())) {
      return bad("storage " + storage.name + " is too large to count");
    }
  }
  for (const RebalanceProblem::Disk& disk : problem.disks) {
    if (disk.storage >= problem.storages.size()) {
      return bad("disk " + name_of(disk) + " is on a storage that is not there");
    }
    if (!add(disk.allocated.bytes()) || !add(disk.load)) {
      return bad("disk " + name_of(disk) + " is too large to count");
    }
  }
  return {};
}

// What is even or not: by storage its weight, and what a share of one would be.
struct Measure {
  std::vector<std::uint64_t> weight;
  std::vector<std::uint64_t> whole;
  double mean = 0;
};

Measure measure(const RebalanceProblem& problem) {
  Measure out;
  std::uint64_t all = 0;
  for (const RebalanceProblem::Storage& storage : problem.storages) {
    out.weight.push_back(problem.by == By::Space ? storage.other.bytes() : 0);
  }
  for (const RebalanceProblem::Disk& disk : problem.disks) {
    out.weight[disk.storage] += weight_of(problem, disk);
  }
  for (const std::uint64_t weight : out.weight) all += weight;
  double wholes = 0;
  for (const RebalanceProblem::Storage& storage : problem.storages) {
    out.whole.push_back(problem.by == By::Space ? storage.capacity.bytes()
                                                : std::max<std::uint64_t>(1, all));
    wholes += static_cast<double>(out.whole.back());
  }
  out.mean = static_cast<double>(all) / wholes;
  return out;
}

double share(Amount weight, std::uint64_t whole) {
  return static_cast<double>(weight) / static_cast<double>(whole);
}

// Guests get numbers only if they are to be kept apart from others that have disks here.
void add_enemies(const RebalanceProblem& problem, World& world) {
  std::map<std::string, std::vector<std::size_t>> disks_of;
  for (std::size_t i = 0; i < problem.disks.size(); ++i) {
    disks_of[problem.disks[i].guest].push_back(i);
  }
  std::map<std::string, std::size_t> numbers;
  for (const auto& group : problem.apart) {
    for (const std::string& guest : group) {
      if (disks_of.contains(guest) && numbers.try_emplace(guest, numbers.size()).second) {
        for (const std::size_t disk : disks_of[guest]) world.disks[disk].guest = numbers[guest];
      }
    }
  }
  world.enemies.resize(numbers.size());
  for (const auto& group : problem.apart) {
    for (const std::string& one : group) {
      for (const std::string& other : group) {
        if (one == other || !numbers.contains(one) || !numbers.contains(other)) continue;
        auto& enemies = world.enemies[numbers[one]];
        if (std::find(enemies.begin(), enemies.end(), numbers[other]) == enemies.end()) {
          enemies.push_back(numbers[other]);
        }
      }
    }
  }
}

World world_of(const RebalanceProblem& problem, const Measure& measured) {
  World world;
  world.most_moves = problem.most_moves;
  const std::vector<RebalanceBand> bands = rebalance_bands(problem);
  for (std::size_t i = 0; i < problem.storages.size(); ++i) {
    const RebalanceProblem::Storage& its = problem.storages[i];
    const Length fullest = its.fullest == Length() ? its.capacity : its.fullest;
    World::Storage storage;
    storage.weight = static_cast<Amount>(measured.weight[i]);
    storage.bytes = static_cast<Amount>(its.other.bytes());
    storage.low = static_cast<Amount>(bands[i].low);
    storage.high = static_cast<Amount>(bands[i].high);
    storage.fullest = static_cast<Amount>(fullest.bytes());
    world.storages.push_back(storage);
  }
  for (const RebalanceProblem::Disk& its : problem.disks) {
    World::Disk disk;
    disk.home = its.storage;
    disk.bytes = static_cast<Amount>(its.allocated.bytes());
    disk.weight = static_cast<Amount>(weight_of(problem, its));
    disk.fixed = !its.fixed.empty();
    world.storages[disk.home].bytes += disk.bytes;
    world.disks.push_back(disk);
  }
  add_enemies(problem, world);
  return world;
}

// ---- words --------------------------------------------------------------------------------------

std::string percent(double share) { return fmt::format("{:.1f} %", share * 100); }

std::string points(double difference) { return fmt::format("{:.1f} points", difference * 100); }

// Two guests that are to be kept apart and have disks on one storage, or nothing.
std::string clash_at(const RebalanceProblem& problem, const World& world, const Layout& layout,
                     std::size_t storage, std::size_t disk) {
  for (std::size_t other = 0; other < world.disks.size(); ++other) {
    if (layout.at(other) != storage || world.disks[other].guest == World::kNobody) continue;
    const auto& enemies = world.enemies[world.disks[disk].guest];
    if (std::find(enemies.begin(), enemies.end(), world.disks[other].guest) != enemies.end()) {
      return problem.disks[other].guest;
    }
  }
  return {};
}

class Narrator {
 public:
  Narrator(const RebalanceProblem& problem, const World& world, const Measure& measured)
      : problem_(problem), world_(world), measured_(measured) {}

  [[nodiscard]] RebalancePlan tell(const Draft& draft) const;

 private:
  [[nodiscard]] std::string reason(const Layout& before, const std::vector<Hop>& hops,
                                   std::size_t at) const;
  [[nodiscard]] std::vector<std::string> obstacles(const Layout& end, std::size_t moves,
                                                   bool proven) const;
  [[nodiscard]] std::vector<double> shares(const Layout& layout) const;
  [[nodiscard]] const std::string& storage(std::size_t i) const {
    return problem_.storages[i].name;
  }
  [[nodiscard]] double share_at(const Layout& layout, std::size_t i) const {
    return share(layout.weight(i), measured_.whole[i]);
  }
  [[nodiscard]] const char* holds() const {
    return problem_.by == By::Space ? "is filled to" : "carries";
  }
  [[nodiscard]] std::string how_far(const Layout& layout, std::size_t i) const;
  [[nodiscard]] std::string why_outside(const Layout& end, std::size_t i) const;
  // Has the guest a disk there that can't move?
  [[nodiscard]] bool stuck(const Layout& end, std::size_t i, const std::string& guest) const {
    for (std::size_t disk = 0; disk < world_.disks.size(); ++disk) {
      if (problem_.disks[disk].guest == guest && end.at(disk) == i && world_.disks[disk].fixed) {
        return true;
      }
    }
    return false;
  }

  const RebalanceProblem& problem_;
  const World& world_;
  const Measure& measured_;
};

// "/mnt/a is filled to 90.0 %, 23.3 points above the mean"
std::string Narrator::how_far(const Layout& layout, std::size_t i) const {
  const double its = share_at(layout, i);
  return fmt::format("{} {} {}, {} {} the mean of {}", storage(i), holds(), percent(its),
                     points(std::abs(its - measured_.mean)),
                     its < measured_.mean ? "below" : "above", percent(measured_.mean));
}

std::string Narrator::reason(const Layout& before, const std::vector<Hop>& hops,
                             std::size_t at) const {
  const Hop& hop = hops[at];
  for (std::size_t later = at + 1; later < hops.size(); ++later) {
    if (hops[later].disk == hop.disk) {
      return fmt::format("{} makes room only for a while: it goes on to {} in step {}",
                         name_of(problem_.disks[hop.disk]), storage(hops[later].target), later + 1);
    }
  }
  if (world_.disks[hop.disk].guest != World::kNobody) {
    if (const std::string enemy = clash_at(problem_, world_, before, hop.source, hop.disk);
        !enemy.empty()) {
      return fmt::format("{} and {}, which are to be kept apart, are both on {}",
                         problem_.disks[hop.disk].guest, enemy, storage(hop.source));
    }
  }
  const World::Storage& source = world_.storages[hop.source];
  const World::Storage& target = world_.storages[hop.target];
  if (before.weight(hop.source) > source.high) return how_far(before, hop.source);
  if (before.weight(hop.target) < target.low) return how_far(before, hop.target);
  for (std::size_t later = at + 1; later < hops.size(); ++later) {
    if (hops[later].target == hop.source) {
      return fmt::format("it makes room on {} for {}, which comes in step {}", storage(hop.source),
                         name_of(problem_.disks[hops[later].disk]), later + 1);
    }
  }
  return fmt::format("{} took more than it is to keep in an earlier step", storage(hop.source));
}

std::string Narrator::why_outside(const Layout& end, std::size_t i) const {
  const World::Storage& limits = world_.storages[i];
  Amount movable = 0;
  Amount smallest = 0;
  Amount other = end.weight(i);
  for (std::size_t disk = 0; disk < world_.disks.size(); ++disk) {
    const World::Disk& it = world_.disks[disk];
    if (end.at(disk) != i) continue;
    other -= it.weight;
    if (it.fixed || it.weight == 0) continue;
    movable += it.weight;
    if (smallest == 0 || it.weight < smallest) smallest = it.weight;
  }
  if (end.weight(i) > limits.high) {
    if (other > limits.high) return "what is not a disk of a guest takes more than that alone";
    if (end.weight(i) - movable > limits.high) {
      return "its disks that can't move, and what is not a disk, take more than that alone";
    }
    bool room = false;
    for (std::size_t disk = 0; disk < world_.disks.size() && !room; ++disk) {
      if (end.at(disk) != i || world_.disks[disk].weight == 0) continue;
      for (std::size_t target = 0; target < world_.storages.size() && !room; ++target) {
        room = end.can_step(disk, target);
      }
    }
    if (!room) return "none of its disks may go to, or has room on, any of the other storages";
    return "moving any of its disks would put another storage further outside the tolerance, or "
           "fill it, and so would exchanging them";
  }
  return "no disk fits into what it may still take without putting another storage further "
         "outside the tolerance";
}

std::vector<std::string> Narrator::obstacles(const Layout& end, std::size_t moves,
                                             bool proven) const {
  std::vector<std::string> out;
  if (moves >= problem_.most_moves) {
    out.push_back(fmt::format("it takes more than the {} move{} that are allowed", moves,
                              moves == 1 ? "" : "s"));
  }
  for (std::size_t i = 0; i < world_.storages.size(); ++i) {
    if (end.outside(i) == 0) continue;
    out.push_back(how_far(end, i) +
                  (moves >= problem_.most_moves ? "" : ": " + why_outside(end, i)));
  }
  std::map<std::pair<std::size_t, std::string>, std::string> together;
  for (std::size_t disk = 0; disk < world_.disks.size(); ++disk) {
    if (world_.disks[disk].guest == World::kNobody) continue;
    const std::string enemy = clash_at(problem_, world_, end, end.at(disk), disk);
    const std::string& guest = problem_.disks[disk].guest;
    if (!enemy.empty() && guest < enemy) together.try_emplace({end.at(disk), guest}, enemy);
  }
  for (const auto& [where, enemy] : together) {
    out.push_back(
        fmt::format("{} and {}, which are to be kept apart, stay together on {}{}", where.second,
                    enemy, storage(where.first),
                    stuck(end, where.first, where.second) && stuck(end, where.first, enemy)
                        ? ": each has a disk there that can't move"
                        : ""));
  }
  if (proven) {
    out.emplace_back("no arrangement of the disks that can move is within the tolerance");
  }
  return out;
}

std::vector<double> Narrator::shares(const Layout& layout) const {
  std::vector<double> out;
  for (std::size_t i = 0; i < world_.storages.size(); ++i) out.push_back(share_at(layout, i));
  return out;
}

RebalancePlan Narrator::tell(const Draft& draft) const {
  RebalancePlan plan;
  plan.mean = measured_.mean;
  Layout layout(world_);
  plan.needed = !layout.reached();
  plan.before = shares(layout);
  for (std::size_t i = 0; i < draft.hops.size(); ++i) {
    const Hop& hop = draft.hops[i];
    RebalanceStep step;
    step.disk = hop.disk;
    step.source = hop.source;
    step.target = hop.target;
    step.bytes = problem_.disks[hop.disk].allocated;
    step.source_before = share_at(layout, hop.source);
    step.target_before = share_at(layout, hop.target);
    step.reason = reason(layout, draft.hops, i);
    layout.put(hop.disk, hop.target);
    step.source_after = share_at(layout, hop.source);
    step.target_after = share_at(layout, hop.target);
    step.target_free = Length(
        static_cast<std::uint64_t>(world_.storages[hop.target].fullest - layout.bytes(hop.target)));
    plan.bytes += step.bytes;
    plan.steps.push_back(std::move(step));
  }
  plan.after = shares(layout);
  plan.reached = layout.reached();
  plan.proven = draft.proven;
  if (!plan.reached) plan.obstacles = obstacles(layout, plan.steps.size(), draft.proven);
  return plan;
}

}  // namespace

std::vector<RebalanceBand> rebalance_bands(const RebalanceProblem& problem) {
  const Measure measured = measure(problem);
  std::vector<RebalanceBand> out;
  for (const std::uint64_t whole : measured.whole) {
    const auto size = static_cast<double>(whole);
    const double low = std::ceil((measured.mean - problem.tolerance) * size);
    const double high = std::floor((measured.mean + problem.tolerance) * size);
    out.push_back({static_cast<std::uint64_t>(std::max(0.0, low)),
                   static_cast<std::uint64_t>(std::max(0.0, high))});
  }
  return out;
}

Result<RebalancePlan> plan_rebalance(const RebalanceProblem& problem) {
  DROVER_TRY(check(problem));
  const Measure measured = measure(problem);
  const World world = world_of(problem, measured);
  const Draft draft = rebalance::search(world, problem.effort);
  return Narrator(problem, world, measured).tell(draft);
}

Result<RebalancePlan> assess_moves(const RebalanceProblem& problem,
                                   const std::vector<RebalanceWish>& moves) {
  DROVER_TRY(check(problem));
  const Measure measured = measure(problem);
  const World world = world_of(problem, measured);
  Draft draft;
  Layout layout(world);
  for (const RebalanceWish& wish : moves) {
    const std::string what = fmt::format("{} to {}", name_of(problem.disks[wish.disk]),
                                         problem.storages[wish.target].name);
    if (!layout.can_step(wish.disk, wish.target)) {
      return fail(Code::Blocked, what + " has no room there, or may not be moved there");
    }
    draft.hops.push_back({wish.disk, layout.at(wish.disk), wish.target});
    layout.put(wish.disk, wish.target);
  }
  for (std::size_t i = 0; i < world.storages.size(); ++i) {
    if (layout.outside(i) > world.storages[i].outside(world.storages[i].weight)) {
      return fail(Code::Blocked, problem.storages[i].name + " would be worse off than it is");
    }
  }
  return Narrator(problem, world, measured).tell(draft);
}

}  // namespace drover::job
