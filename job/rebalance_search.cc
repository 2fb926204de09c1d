// SPDX-License-Identifier: Apache-2.0
#include "job/rebalance_search.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <queue>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "base/check.h"

namespace drover::job::rebalance {

// ---- the layout ---------------------------------------------------------------------------------

Layout::Layout(const World& world)
    : world_(&world), guests_(world.storages.size(), std::vector<Amount>(world.enemies.size())) {
  for (const World::Storage& storage : world.storages) {
    weight_.push_back(storage.weight);
    bytes_.push_back(storage.bytes);
    excess_ += storage.outside(storage.weight);
  }
  for (const World::Disk& disk : world.disks) {
    at_.push_back(disk.home);
    if (disk.guest != World::kNobody) ++guests_[disk.home][disk.guest];
  }
  Amount twice = 0;
  for (std::size_t storage = 0; storage < guests_.size(); ++storage) {
    for (std::size_t guest = 0; guest < world.enemies.size(); ++guest) {
      twice += clashes_of(guest, storage);
    }
  }
  clashes_ = twice / 2;
}

// To part two guests at least the fewer disks of the two have to go.
Amount Layout::clashes_of(std::size_t guest, std::size_t storage) const {
  const std::vector<Amount>& here = guests_[storage];
  Amount sum = 0;
  for (const std::size_t enemy : world_->enemies[guest]) sum += std::min(here[guest], here[enemy]);
  return sum;
}

bool Layout::beside_enemy(std::size_t disk, std::size_t storage) const {
  const std::size_t guest = world_->disks[disk].guest;
  if (guest == World::kNobody) return false;
  const auto& enemies = world_->enemies[guest];
  return std::any_of(enemies.begin(), enemies.end(),
                     [&](std::size_t enemy) { return guests_[storage][enemy] > 0; });
}

void Layout::put(std::size_t disk, std::size_t storage) {
  const World::Disk& it = world_->disks[disk];
  const std::size_t source = at_[disk];
  if (source == storage) return;
  if (source == it.home) {
    cost_ += it.bytes;
    ++moves_;
  } else if (storage == it.home) {
    cost_ -= it.bytes;
    --moves_;
  }
  excess_ -= outside(source) + outside(storage);
  weight_[source] -= it.weight;
  weight_[storage] += it.weight;
  bytes_[source] -= it.bytes;
  bytes_[storage] += it.bytes;
  excess_ += outside(source) + outside(storage);
  if (it.guest != World::kNobody) {
    clashes_ -= clashes_of(it.guest, source) + clashes_of(it.guest, storage);
    --guests_[source][it.guest];
    ++guests_[storage][it.guest];
    clashes_ += clashes_of(it.guest, source) + clashes_of(it.guest, storage);
  }
  at_[disk] = storage;
}

bool Layout::can_step(std::size_t disk, std::size_t storage) const {
  const World::Disk& it = world_->disks[disk];
  return !it.fixed && at_[disk] != storage &&
         bytes_[storage] + it.bytes <= world_->storages[storage].fullest &&
         !beside_enemy(disk, storage);
}

Amount Layout::gain(std::size_t disk, std::size_t storage) const {
  const std::size_t source = at_[disk];
  const Amount weight = world_->disks[disk].weight;
  return outside(source) - world_->storages[source].outside(weight_[source] - weight) +
         outside(storage) - world_->storages[storage].outside(weight_[storage] + weight);
}

namespace {

// ---- the order of steps -------------------------------------------------------------------------

struct Sequence {
  std::vector<Hop> hops;
  std::vector<std::size_t> blocked;  // disks that could not get to where they are to be
};

// What is better is smaller: clashes, excess, cost, moves.
using Score = std::tuple<Amount, Amount, Amount, std::size_t>;

Score score(const Layout& layout) {
  return {layout.clashes(), layout.excess(), layout.cost(), layout.moves()};
}

std::vector<std::size_t> moved_disks(const World& world, const Layout& layout) {
  std::vector<std::size_t> out;
  for (std::size_t disk = 0; disk < world.disks.size(); ++disk) {
    if (layout.moved(disk)) out.push_back(disk);
  }
  return out;
}

// Always the step that helps most: who stops in the middle has the best of it.
Sequence greedy_order(const World& world, const Layout& goal) {
  Layout now(world);
  Sequence out;
  out.blocked = moved_disks(world, goal);
  while (!out.blocked.empty()) {
    std::size_t best = out.blocked.size();
    std::tuple<Amount, Amount> best_gain;
    for (std::size_t i = 0; i < out.blocked.size(); ++i) {
      const std::size_t disk = out.blocked[i];
      if (!now.can_step(disk, goal.at(disk))) continue;
      const std::tuple<Amount, Amount> gain = {now.gain(disk, goal.at(disk)),
                                               world.disks[disk].bytes};
      if (best == out.blocked.size() || gain > best_gain) {
        best = i;
        best_gain = gain;
      }
    }
    if (best == out.blocked.size()) return out;
    const std::size_t disk = out.blocked[best];
    out.hops.push_back({disk, now.at(disk), goal.at(disk)});
    now.put(disk, goal.at(disk));
    out.blocked.erase(out.blocked.begin() + static_cast<std::ptrdiff_t>(best));
  }
  return out;
}

// An order of few steps, if there is one: tries all, each set of steps done only once.
class OrderSearch {
 public:
  static constexpr std::size_t kMostSteps = 20;
  static constexpr std::size_t kMostSets = 20'000;

  OrderSearch(const World& world, const Layout& goal)
      : goal_(goal), now_(world), disks_(moved_disks(world, goal)) {}

  std::optional<std::vector<Hop>> run() {
    if (disks_.size() > kMostSteps || !try_from(0)) return std::nullopt;
    return hops_;
  }

 private:
  bool try_from(std::uint32_t done) {
    if (hops_.size() == disks_.size()) return true;
    if (dead_.size() >= kMostSets || dead_.contains(done)) return false;
    for (std::size_t i = 0; i < disks_.size(); ++i) {
      const std::size_t disk = disks_[i];
      const std::size_t target = goal_.at(disk);
      const std::uint32_t bit = std::uint32_t{1} << i;
      if ((done & bit) != 0 || !now_.can_step(disk, target)) continue;
      const std::size_t source = now_.at(disk);
      hops_.push_back({disk, source, target});
      now_.put(disk, target);
      if (try_from(done | bit)) return true;
      now_.put(disk, source);
      hops_.pop_back();
    }
    dead_.insert(done);
    return false;
  }

  const Layout& goal_;
  Layout now_;
  std::vector<std::size_t> disks_;
  std::vector<Hop> hops_;
  std::unordered_set<std::uint32_t> dead_;
};

Sequence order(const World& world, const Layout& goal) {
  Sequence greedy = greedy_order(world, goal);
  if (greedy.blocked.empty()) return greedy;
  if (auto found = OrderSearch(world, goal).run()) return {std::move(*found), {}};
  return greedy;
}

// ---- the exact search ---------------------------------------------------------------------------

// Which of some disks to move where, so that the goal is reached with the fewest bytes: branch and
// bound over sets of moves. The other disks stay where they are in the layout.
class ExactSearch {
 public:
  struct Part {
    std::size_t disk = 0;
    std::vector<std::size_t> targets;  // its home is not one of them
  };
  // What a found layout has to be cheaper than, or as cheap with fewer moves.
  struct Bound {
    Amount cost = std::numeric_limits<Amount>::max();
    std::size_t moves = 0;
  };
  // Whether a layout that reaches the goal is good; if not, the search goes on below it.
  using Accept = std::function<bool(const Layout&)>;

  // Puts the parts' disks home. `most`: how many storages it may look at, in all.
  ExactSearch(const World& world, Layout& layout, std::vector<Part> parts, std::uint64_t most);

  // The best layout that was found, or nothing; in any case the layout's disks are home again.
  std::optional<std::vector<std::size_t>> run(Bound bound, Accept accept);
  // Nothing was left out for want of `most`.
  [[nodiscard]] bool complete() const { return work_ < most_; }
  [[nodiscard]] std::uint64_t work() const { return work_; }

 private:
  // What the parts from one on could still do to a storage.
  struct Rest {
    Amount weight = 0;
    Amount bytes = 0;
    Amount smallest = std::numeric_limits<Amount>::max();
    double ratio = 0;  // the most weight per byte
  };
  [[nodiscard]] const Rest& rest(std::size_t part, std::size_t touched) const {
    return rest_[part * (touched_.size() + 1) + touched];
  }
  // The fewest further bytes with which the parts from `part` on can reach the goal; nothing: they
  // can't. Zero: it is reached, but for clashes.
  std::optional<Amount> further(std::size_t part);
  void descend(std::size_t part, std::size_t last_target);
  [[nodiscard]] bool cheaper(Amount cost, std::size_t moves) const {
    return cost < bound_.cost || (cost == bound_.cost && moves < bound_.moves);
  }

  const World& world_;
  Layout& layout_;
  std::vector<Part> parts_;
  std::vector<bool> twin_;  // as the part before it
  std::vector<std::size_t> touched_;
  std::vector<Rest> rest_;
  std::uint64_t most_;
  std::uint64_t work_ = 0;
  Bound bound_;
  Accept accept_;
  std::optional<std::vector<std::size_t>> best_;
};

ExactSearch::ExactSearch(const World& world, Layout& layout, std::vector<Part> parts,
                         std::uint64_t most)
    : world_(world), layout_(layout), parts_(std::move(parts)), most_(most) {
  std::vector<bool> seen(world.storages.size());
  const auto touch = [&](std::size_t storage) {
    if (!seen[storage]) touched_.push_back(storage);
    seen[storage] = true;
  };
  for (const Part& part : parts_) {
    touch(layout.at(part.disk));
    touch(world.disks[part.disk].home);
    for (const std::size_t target : part.targets) touch(target);
    layout.put(part.disk, world.disks[part.disk].home);
  }
  // What is outside elsewhere nobody here can help.
  for (std::size_t storage = 0; storage < world.storages.size(); ++storage) {
    if (layout.outside(storage) > 0) touch(storage);
  }
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const World::Disk& disk = world.disks[parts_[i].disk];
    const bool same = i > 0 && [&] {
      const World::Disk& before = world.disks[parts_[i - 1].disk];
      return before.home == disk.home && before.bytes == disk.bytes &&
             before.weight == disk.weight && before.guest == disk.guest &&
             parts_[i - 1].targets == parts_[i].targets;
    }();
    twin_.push_back(same);
  }
  const std::size_t width = touched_.size() + 1;  // the last is for all together
  rest_.resize((parts_.size() + 1) * width);
  for (std::size_t i = parts_.size(); i-- > 0;) {
    std::copy_n(rest_.begin() + static_cast<std::ptrdiff_t>((i + 1) * width), width,
                rest_.begin() + static_cast<std::ptrdiff_t>(i * width));
    const World::Disk& disk = world.disks[parts_[i].disk];
    const auto home = static_cast<std::size_t>(
        std::find(touched_.begin(), touched_.end(), disk.home) - touched_.begin());
    for (const std::size_t which : {home, touched_.size()}) {
      Rest& its = rest_[i * width + which];
      its.weight += disk.weight;
      its.bytes += disk.bytes;
      its.smallest = std::min(its.smallest, disk.bytes);
      const double ratio = disk.bytes == 0
                               ? std::numeric_limits<double>::infinity()
                               : static_cast<double>(disk.weight) / static_cast<double>(disk.bytes);
      its.ratio = std::max(its.ratio, ratio);
    }
  }
}

// Bytes that carry at least `weight`, where none carries more than `ratio`.
Amount bytes_for(Amount weight, double ratio) {
  // Rounding of either division must not make a bound of one that is none.
  constexpr double kSure = 1.0 - 1e-12;
  return static_cast<Amount>(static_cast<double>(weight) / ratio * kSure);
}

std::optional<Amount> ExactSearch::further(std::size_t part) {
  work_ += touched_.size();
  const Rest& all = rest(part, touched_.size());
  Amount leaving = 0;
  Amount missing = 0;
  for (std::size_t i = 0; i < touched_.size(); ++i) {
    const std::size_t storage = touched_[i];
    const World::Storage& limits = world_.storages[storage];
    const Rest& here = rest(part, i);
    const Amount weight = layout_.weight(storage);
    Amount its = 0;
    if (weight > limits.high) {
      const Amount need = weight - limits.high;
      if (here.weight < need) return std::nullopt;
      its = std::max(here.smallest, bytes_for(need, here.ratio));
    } else if (weight < limits.low) {
      const Amount need = limits.low - weight;
      if (all.weight - here.weight < need) return std::nullopt;
      missing += need;
    }
    if (const Amount need = layout_.bytes(storage) - limits.most_bytes(); need > 0) {
      if (here.bytes < need) return std::nullopt;
      its = std::max({its, here.smallest, need});
    }
    leaving += its;
  }
  if (missing > 0) {
    leaving = std::max({leaving, all.smallest, bytes_for(missing, all.ratio)});
  }
  return leaving;
}

void ExactSearch::descend(std::size_t part, std::size_t last_target) {
  if (layout_.reached() && cheaper(layout_.cost(), layout_.moves())) {
    const bool fits = std::all_of(touched_.begin(), touched_.end(), [&](std::size_t storage) {
      return layout_.bytes(storage) <= world_.storages[storage].most_bytes();
    });
    if (fits && accept_(layout_)) {
      bound_ = {layout_.cost(), layout_.moves()};
      best_.emplace();
      for (const Part& each : parts_) best_->push_back(layout_.at(each.disk));
      return;  // more moves only cost more
    }
  }
  if (layout_.moves() >= world_.most_moves) return;
  for (std::size_t next = part; next < parts_.size(); ++next) {
    // Those before it stay; the more of them stay the less can the rest do.
    const std::optional<Amount> least = further(next);
    if (!least || !cheaper(layout_.cost() + *least, layout_.moves() + 1) || !complete()) return;
    if (twin_[next] && next > part) continue;  // its twin would have done as well
    const std::size_t disk = parts_[next].disk;
    const auto& targets = parts_[next].targets;
    for (std::size_t i = twin_[next] ? last_target : 0; i < targets.size(); ++i) {
      layout_.put(disk, targets[i]);
      if (cheaper(layout_.cost(), layout_.moves())) descend(next + 1, i);
      layout_.put(disk, world_.disks[disk].home);
    }
  }
}

std::optional<std::vector<std::size_t>> ExactSearch::run(Bound bound, Accept accept) {
  bound_ = bound;
  accept_ = std::move(accept);
  descend(0, 0);
  return best_;
}

// ---- by way of a third storage ------------------------------------------------------------------

// The cheapest steps where space is so short that disks have to go by way of another storage: A*
// over layouts, for few disks.
class DetourSearch {
 public:
  DetourSearch(const World& world, std::uint64_t most) : world_(world), most_(most) {
    for (std::size_t disk = 0; disk < world.disks.size(); ++disk) {
      const World::Disk& it = world.disks[disk];
      if (it.fixed) continue;
      disks_.push_back(disk);
      if (it.bytes > 0) {
        ratio_ = std::max(ratio_, static_cast<double>(it.weight) / static_cast<double>(it.bytes));
      } else if (it.weight > 0) {
        ratio_ = std::numeric_limits<double>::infinity();
      }
    }
  }

  std::optional<std::vector<Hop>> run(ExactSearch::Bound bound);
  [[nodiscard]] bool complete() const { return nodes_.size() < most_; }

 private:
  using Where = std::u16string;  // of each of disks_, as a key that hashes
  struct Node {
    Where at;
    Amount cost = 0;
    std::size_t moves = 0;
    std::size_t parent = 0;
    Hop hop;
  };
  [[nodiscard]] Amount least(const Layout& layout) const;
  [[nodiscard]] std::vector<Hop> path(std::size_t node) const;
  void go_to(Layout& layout, const Where& at) const {
    for (std::size_t i = 0; i < disks_.size(); ++i) layout.put(disks_[i], at[i]);
  }

  const World& world_;
  const std::uint64_t most_;
  std::vector<std::size_t> disks_;
  double ratio_ = 0;
  std::vector<Node> nodes_;
};

// One move takes at most its weight from what is above, and adds at most that to what is below.
Amount DetourSearch::least(const Layout& layout) const {
  Amount above = 0;
  Amount below = 0;
  for (std::size_t storage = 0; storage < world_.storages.size(); ++storage) {
    const World::Storage& limits = world_.storages[storage];
    above += std::max<Amount>(0, layout.weight(storage) - limits.high);
    below += std::max<Amount>(0, limits.low - layout.weight(storage));
  }
  return std::max(above, below) == 0 ? 0 : bytes_for(std::max(above, below), ratio_);
}

std::vector<Hop> DetourSearch::path(std::size_t node) const {
  std::vector<Hop> hops;
  for (; node != 0; node = nodes_[node].parent) hops.push_back(nodes_[node].hop);
  std::reverse(hops.begin(), hops.end());
  return hops;
}

std::optional<std::vector<Hop>> DetourSearch::run(ExactSearch::Bound bound) {
  if (ratio_ == 0 || world_.storages.size() > std::numeric_limits<char16_t>::max()) {
    return std::nullopt;
  }
  const bool counts_moves = world_.most_moves < std::numeric_limits<std::size_t>::max();
  Layout layout(world_);
  Node first;
  for (const std::size_t disk : disks_) {
    first.at.push_back(static_cast<char16_t>(world_.disks[disk].home));
  }
  nodes_.push_back(std::move(first));
  using Entry = std::tuple<Amount, std::size_t, std::size_t>;  // estimate, moves, node
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> open;
  open.emplace(least(layout), 0, 0);
  // Where disks are (and with how many moves, if those are limited): for how many bytes.
  const auto key = [&](const Where& at, std::size_t moves) {
    return counts_moves ? at + static_cast<char16_t>(moves) : at;
  };
  std::unordered_map<Where, std::pair<Amount, std::size_t>> reached_for;
  while (!open.empty()) {
    const std::size_t from = std::get<2>(open.top());
    open.pop();
    const Where at = nodes_[from].at;
    const Amount cost = nodes_[from].cost;
    const std::size_t moves = nodes_[from].moves;
    if (const auto known = reached_for.find(key(at, moves));
        known != reached_for.end() && known->second < std::pair(cost, moves)) {
      continue;
    }
    go_to(layout, at);
    if (layout.reached()) return path(from);
    if (moves >= world_.most_moves) continue;
    for (std::size_t i = 0; i < disks_.size(); ++i) {
      const std::size_t disk = disks_[i];
      const std::size_t source = at[i];
      for (std::size_t target = 0; target < world_.storages.size(); ++target) {
        if (!layout.can_step(disk, target)) continue;
        Node next{at, cost + world_.disks[disk].bytes, moves + 1, from, {disk, source, target}};
        next.at[i] = static_cast<char16_t>(target);
        layout.put(disk, target);
        const Amount estimate = next.cost + least(layout);
        layout.put(disk, source);
        if (estimate > bound.cost || (estimate == bound.cost && next.moves >= bound.moves)) {
          continue;
        }
        const auto [known, added] =
            reached_for.try_emplace(key(next.at, next.moves), next.cost, next.moves);
        if (!added) {
          if (known->second <= std::pair(next.cost, next.moves)) continue;
          known->second = {next.cost, next.moves};
        }
        if (!complete()) return std::nullopt;
        open.emplace(estimate, next.moves, nodes_.size());
        nodes_.push_back(std::move(next));
      }
    }
  }
  return std::nullopt;
}

// An exact search over some disks and storages of a larger world, all else staying where it is.
struct Neighbourhood {
  std::vector<std::size_t> disks;
  std::vector<std::size_t> storages;
};

// Puts the disks as is cheapest below `bound`; false: there is nothing, and all is as it was.
bool rearrange(const World& world, Layout& layout, Neighbourhood where, ExactSearch::Bound bound,
               std::uint64_t most, std::uint64_t& work) {
  std::stable_sort(where.disks.begin(), where.disks.end(), [&](std::size_t a, std::size_t b) {
    return std::pair(world.disks[a].home, -world.disks[a].bytes) <
           std::pair(world.disks[b].home, -world.disks[b].bytes);
  });
  std::vector<ExactSearch::Part> parts;
  std::vector<std::size_t> before;
  for (const std::size_t disk : where.disks) {
    ExactSearch::Part part{disk, {}};
    for (const std::size_t storage : where.storages) {
      if (storage != world.disks[disk].home) part.targets.push_back(storage);
    }
    parts.push_back(std::move(part));
    before.push_back(layout.at(disk));
  }
  ExactSearch search(world, layout, std::move(parts), most);
  const auto found = search.run(bound, [](const Layout&) { return true; });
  work += search.work();
  const std::vector<std::size_t>& now = found ? *found : before;
  for (std::size_t i = 0; i < where.disks.size(); ++i) layout.put(where.disks[i], now[i]);
  return found.has_value();
}

// The same disks at the same places, in a world that differs in what it asks for.
Layout in_world(const World& world, const Layout& layout) {
  Layout out(world);
  for (std::size_t disk = 0; disk < world.disks.size(); ++disk) out.put(disk, layout.at(disk));
  return out;
}

// The world with the tolerance as wide as the layout needs it: what a layout that is as near to the
// goal as can be is improved within.
World as_wide_as(const World& world, const Layout& layout) {
  World wider = world;
  for (std::size_t i = 0; i < world.storages.size(); ++i) {
    wider.storages[i].low = std::min(world.storages[i].low, layout.weight(i));
    wider.storages[i].high = std::max(world.storages[i].high, layout.weight(i));
  }
  return wider;
}

// ---- the descent --------------------------------------------------------------------------------

// The disks of each storage that can move, in order of weight and of weight per byte, so that those
// that matter are found without looking at all.
class Shelves {
  struct Lighter {
    const World& world;
    bool operator()(std::size_t a, std::size_t b) const {
      return std::pair(world.disks[a].weight, a) < std::pair(world.disks[b].weight, b);
    }
  };
  struct Worthier {
    const World& world;
    [[nodiscard]] double worth(std::size_t disk) const {
      return static_cast<double>(world.disks[disk].weight) /
             static_cast<double>(std::max<Amount>(1, world.disks[disk].bytes));
    }
    bool operator()(std::size_t a, std::size_t b) const {
      return std::pair(worth(b), a) < std::pair(worth(a), b);
    }
  };

 public:
  Shelves(const World& world, const Layout& layout)
      : world_(world), by_weight_(world.storages.size()), by_worth_(world.storages.size()) {
    for (std::size_t disk = 0; disk < world.disks.size(); ++disk) {
      if (world.disks[disk].fixed || world.disks[disk].weight == 0) continue;
      by_weight_[layout.at(disk)].push_back(disk);
      by_worth_[layout.at(disk)].push_back(disk);
    }
    for (auto& shelf : by_weight_) std::sort(shelf.begin(), shelf.end(), Lighter{world_});
    for (auto& shelf : by_worth_) std::sort(shelf.begin(), shelf.end(), Worthier{world_});
  }

  void move(std::size_t disk, std::size_t source, std::size_t target) {
    if (world_.disks[disk].weight == 0) return;
    move_between(by_weight_[source], by_weight_[target], disk, Lighter{world_});
    move_between(by_worth_[source], by_worth_[target], disk, Worthier{world_});
  }

  [[nodiscard]] const std::vector<std::size_t>& at(std::size_t storage) const {
    return by_weight_[storage];
  }

  // Adds the disks whose weights are nearest to `weight`, so many on either side of it.
  void add_around(std::size_t storage, Amount weight, std::size_t count,
                  std::vector<std::size_t>& out) const {
    const auto& shelf = by_weight_[storage];
    const auto middle = std::partition_point(shelf.begin(), shelf.end(), [&](std::size_t disk) {
      return world_.disks[disk].weight <= weight;
    });
    const auto below =
        std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(count), middle - shelf.begin());
    const auto above =
        std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(count), shelf.end() - middle);
    out.insert(out.end(), middle - below, middle + above);
  }
  // Adds those that carry the most weight per byte.
  void add_worthiest(std::size_t storage, std::size_t count, std::vector<std::size_t>& out) const {
    const auto& shelf = by_worth_[storage];
    const auto most = std::min(count, shelf.size());
    out.insert(out.end(), shelf.begin(), shelf.begin() + static_cast<std::ptrdiff_t>(most));
  }

 private:
  using Shelf = std::vector<std::size_t>;

  template <class Before>
  static void move_between(Shelf& source, Shelf& target, std::size_t disk, const Before& before) {
    source.erase(std::lower_bound(source.begin(), source.end(), disk, before));
    target.insert(std::lower_bound(target.begin(), target.end(), disk, before), disk);
  }

  const World& world_;
  std::vector<Shelf> by_weight_;
  std::vector<Shelf> by_worth_;
};

// Changes that each bring the layout nearer to the goal, until none does: single moves first, then
// exchanges of two disks, then whatever an exact search finds for a storage and some others.
class Descent {
 public:
  enum class Prefer { FewBytes, FewMoves };

  Descent(const World& world, Layout& layout, Prefer prefer, const RebalanceEffort& effort)
      : world_(world), layout_(layout), prefer_(prefer), effort_(effort), shelves_(world, layout) {}

  void run() {
    while (layout_.clashes() > 0 && (part_enemies() || exchange_enemies())) {
    }
    while (layout_.excess() > 0 && (move_one() || exchange() || rearrange_worst())) {
    }
  }

 private:
  using Move = std::pair<std::size_t, std::size_t>;  // disk, target
  // A pair of disks, and what exchanging them is worth.
  struct Exchange {
    std::size_t one = 0;
    std::size_t other = 0;
    std::tuple<Amount, double> worth;
  };

  [[nodiscard]] bool exhausted() const { return work_ >= effort_.descent; }
  [[nodiscard]] bool stays_within(std::size_t storage, Amount weight) const {
    const World::Storage& limits = world_.storages[storage];
    return weight >= limits.floor() && weight <= limits.ceiling();
  }
  // Is allowed, and makes no storage worse than it was at the beginning.
  [[nodiscard]] bool may(std::size_t disk, std::size_t target) const {
    const std::size_t source = layout_.at(disk);
    const Amount weight = world_.disks[disk].weight;
    return (layout_.moved(disk) || layout_.moves() < world_.most_moves) &&
           layout_.can_step(disk, target) &&
           stays_within(source, layout_.weight(source) - weight) &&
           stays_within(target, layout_.weight(target) + weight);
  }
  [[nodiscard]] std::vector<std::size_t> worst_first() const;
  [[nodiscard]] std::vector<std::size_t> beside_enemies() const;
  bool part_enemies();
  bool exchange_enemies();
  bool move_one();
  bool exchange();
  void put(std::size_t disk, std::size_t target) {
    shelves_.move(disk, layout_.at(disk), target);
    layout_.put(disk, target);
  }
  [[nodiscard]] std::vector<std::size_t> to_give(std::size_t giver, std::size_t taker) const;
  void consider(std::size_t one, std::size_t other, std::optional<Exchange>& best);
  bool carry_out(const std::optional<Exchange>& exchange);
  bool rearrange_worst();
  bool rearrange_around(std::size_t worst, std::size_t turn);

  const World& world_;
  Layout& layout_;
  const Prefer prefer_;
  const RebalanceEffort& effort_;
  Shelves shelves_;
  std::uint64_t work_ = 0;
};

std::vector<std::size_t> Descent::worst_first() const {
  std::vector<std::size_t> out;
  for (std::size_t storage = 0; storage < world_.storages.size(); ++storage) {
    if (layout_.outside(storage) > 0) out.push_back(storage);
  }
  std::stable_sort(out.begin(), out.end(), [&](std::size_t a, std::size_t b) {
    return layout_.outside(a) > layout_.outside(b);
  });
  return out;
}

// Small ones first.
std::vector<std::size_t> Descent::beside_enemies() const {
  std::vector<std::size_t> out;
  for (std::size_t disk = 0; disk < world_.disks.size(); ++disk) {
    if (!world_.disks[disk].fixed && layout_.beside_enemy(disk, layout_.at(disk))) {
      out.push_back(disk);
    }
  }
  std::stable_sort(out.begin(), out.end(), [&](std::size_t a, std::size_t b) {
    return world_.disks[a].bytes < world_.disks[b].bytes;
  });
  return out;
}

bool Descent::part_enemies() {
  for (const std::size_t disk : beside_enemies()) {
    const std::size_t source = layout_.at(disk);
    const Amount clashes = layout_.clashes();
    std::optional<std::size_t> best;
    Score best_score;
    for (std::size_t target = 0; target < world_.storages.size() && !exhausted(); ++target) {
      ++work_;
      if (!may(disk, target)) continue;
      layout_.put(disk, target);
      if (const Score its = score(layout_);
          layout_.clashes() < clashes && (!best || its < best_score)) {
        best_score = its;
        best = target;
      }
      layout_.put(disk, source);
    }
    if (best) {
      put(disk, *best);
      return true;
    }
  }
  return false;
}

bool Descent::exchange_enemies() {
  for (const std::size_t one : beside_enemies()) {
    std::optional<Exchange> best;
    for (std::size_t other = 0; other < world_.disks.size() && !exhausted(); ++other) {
      consider(one, other, best);
    }
    if (carry_out(best)) return true;
  }
  return false;
}

bool Descent::move_one() {
  for (const std::size_t worst : worst_first()) {
    const bool above = layout_.weight(worst) > world_.storages[worst].high;
    std::optional<Move> best;
    std::tuple<double, Amount> best_worth;
    const auto look_at = [&](std::size_t disk, std::size_t target) {
      ++work_;
      const Amount gain = layout_.gain(disk, target);
      if (gain <= 0 || !may(disk, target)) return;
      // One that is not at home has been paid for.
      const Amount price = !layout_.moved(disk) ? world_.disks[disk].bytes : 0;
      const double worth = prefer_ == Prefer::FewMoves || price == 0
                               ? std::numeric_limits<double>::max()
                               : static_cast<double>(gain) / static_cast<double>(price);
      if (const std::tuple its = {worth, gain}; !best || its > best_worth) {
        best = {disk, target};
        best_worth = its;
      }
    };
    for (std::size_t other = 0; other < world_.storages.size() && !exhausted(); ++other) {
      if (other == worst) continue;
      const std::size_t giver = above ? worst : other;
      const std::size_t taker = above ? other : worst;
      for (const std::size_t disk : to_give(giver, taker)) look_at(disk, taker);
    }
    if (best) {
      put(best->first, best->second);
      return true;
    }
  }
  return false;
}

// Of few all; of many those that come near to what the one has too much of and the other lacks, and
// those that cost least.
std::vector<std::size_t> Descent::to_give(std::size_t giver, std::size_t taker) const {
  constexpr std::size_t kFew = 64;
  constexpr std::size_t kAround = 3;
  constexpr std::size_t kWorthiest = 8;
  if (shelves_.at(giver).size() <= kFew) return shelves_.at(giver);
  const World::Storage& from = world_.storages[giver];
  const World::Storage& to = world_.storages[taker];
  std::vector<std::size_t> out;
  for (const Amount weight : {layout_.weight(giver) - from.high, layout_.weight(giver) - from.low,
                              to.low - layout_.weight(taker), to.high - layout_.weight(taker),
                              to.fullest - layout_.bytes(taker)}) {
    if (weight > 0) shelves_.add_around(giver, weight, kAround, out);
  }
  shelves_.add_worthiest(giver, kWorthiest, out);
  return out;
}

bool Descent::exchange() {
  // Of each other storage those disks are tried that just make up the difference, so many.
  constexpr std::size_t kAround = 4;
  for (const std::size_t worst : worst_first()) {
    const World::Storage& limits = world_.storages[worst];
    const Amount weight = layout_.weight(worst);
    const Amount more = weight > limits.high ? limits.high - weight : limits.low - weight;
    std::optional<Exchange> best;
    std::vector<std::size_t> others;
    for (const std::size_t one : shelves_.at(worst)) {
      for (std::size_t other = 0; other < world_.storages.size() && !exhausted(); ++other) {
        if (other == worst) continue;
        others.clear();
        shelves_.add_around(other, world_.disks[one].weight + more, kAround, others);
        for (const std::size_t disk : others) consider(one, disk, best);
      }
    }
    if (carry_out(best)) return true;
  }
  return false;
}

void Descent::consider(std::size_t one, std::size_t other, std::optional<Exchange>& best) {
  ++work_;
  const std::size_t here = layout_.at(one);
  const std::size_t there = layout_.at(other);
  if (here == there || world_.disks[one].fixed || world_.disks[other].fixed) return;
  const Amount more = world_.disks[other].weight - world_.disks[one].weight;
  const Amount gain = layout_.outside(here) + layout_.outside(there) -
                      world_.storages[here].outside(layout_.weight(here) + more) -
                      world_.storages[there].outside(layout_.weight(there) - more);
  if ((layout_.clashes() == 0 && gain <= 0) || !stays_within(here, layout_.weight(here) + more) ||
      !stays_within(there, layout_.weight(there) - more)) {
    return;
  }
  const Score before = score(layout_);
  layout_.put(one, there);
  layout_.put(other, here);
  const Score after = score(layout_);
  const Amount price = std::max<Amount>(1, std::get<2>(after) - std::get<2>(before));
  const Exchange its{one,
                     other,
                     {std::get<0>(before) - std::get<0>(after),
                      static_cast<double>(gain) / static_cast<double>(price)}};
  if (after < before && layout_.moves() <= world_.most_moves &&
      layout_.bytes(here) <= world_.storages[here].most_bytes() &&
      layout_.bytes(there) <= world_.storages[there].most_bytes() &&
      (!best || its.worth > best->worth)) {
    best = its;
  }
  layout_.put(other, there);
  layout_.put(one, here);
}

bool Descent::carry_out(const std::optional<Exchange>& exchange) {
  if (!exchange) return false;
  const std::size_t here = layout_.at(exchange->one);
  const std::size_t there = layout_.at(exchange->other);
  put(exchange->one, there);
  put(exchange->other, here);
  return true;
}

// One storage is to come within the tolerance, the others may not become worse.
bool Descent::rearrange_worst() {
  constexpr std::size_t kTurns = 6;
  for (const std::size_t worst : worst_first()) {
    for (std::size_t turn = 0; turn < kTurns && !exhausted(); ++turn) {
      if (rearrange_around(worst, turn)) return true;
    }
  }
  return false;
}

// Each turn tries it with other partners.
bool Descent::rearrange_around(std::size_t worst, std::size_t turn) {
  constexpr std::size_t kPartners = 3;
  constexpr std::size_t kMostOwn = 4;
  constexpr std::size_t kMostOthers = 3;
  constexpr std::size_t kMostLighter = 2;

  World limits = as_wide_as(world_, layout_);
  limits.storages[worst].low = world_.storages[worst].low;
  limits.storages[worst].high = world_.storages[worst].high;
  Layout layout = in_world(limits, layout_);
  if (layout.clashes() > 0) return false;

  // Who can take what this one has too much of, or give what it lacks.
  const bool above = layout_.weight(worst) > world_.storages[worst].high;
  std::vector<std::size_t> partners;
  for (std::size_t storage = 0; storage < world_.storages.size(); ++storage) {
    if (storage != worst) partners.push_back(storage);
  }
  const auto room = [&](std::size_t storage) {
    const World::Storage& its = world_.storages[storage];
    return above ? its.high - layout_.weight(storage) : layout_.weight(storage) - its.low;
  };
  std::stable_sort(partners.begin(), partners.end(),
                   [&](std::size_t a, std::size_t b) { return room(a) > room(b); });
  std::rotate(partners.begin(),
              partners.begin() + static_cast<std::ptrdiff_t>(turn % partners.size()),
              partners.end());
  if (partners.size() > kPartners) partners.resize(kPartners);

  Neighbourhood where;
  where.storages = partners;
  where.storages.push_back(worst);
  for (const std::size_t storage : where.storages) {
    std::vector<std::size_t> disks;
    for (std::size_t disk = 0; disk < world_.disks.size(); ++disk) {
      const World::Disk& it = world_.disks[disk];
      if (layout_.at(disk) == storage && !it.fixed && it.weight > 0) disks.push_back(disk);
    }
    std::stable_sort(disks.begin(), disks.end(), [&](std::size_t a, std::size_t b) {
      return world_.disks[a].weight > world_.disks[b].weight;
    });
    // The heaviest, which decide, and of the others some of all weights, different in each turn.
    const std::size_t heaviest = std::min(disks.size(), storage == worst ? kMostOwn : kMostOthers);
    const std::size_t stride = std::max<std::size_t>(1, (disks.size() - heaviest) / kMostLighter);
    for (std::size_t i = 0; i < heaviest; ++i) where.disks.push_back(disks[i]);
    for (std::size_t i = heaviest + turn % stride; i < disks.size(); i += stride) {
      where.disks.push_back(disks[i]);
    }
  }
  if (!rearrange(limits, layout, std::move(where), {}, effort_.neighbourhood, work_)) return false;
  layout = in_world(world_, layout);
  const bool better = score(layout) < score(layout_);
  if (better) {
    for (std::size_t disk = 0; disk < world_.disks.size(); ++disk) {
      if (layout_.at(disk) != layout.at(disk)) put(disk, layout.at(disk));
    }
  }
  return better;
}

// ---- improvement --------------------------------------------------------------------------------

// Looks for fewer bytes around each move, by exact searches over the disks of a few storages.
class Improvement {
 public:
  Improvement(const World& world, Layout& layout, const RebalanceEffort& effort)
      : world_(world), layout_(layout), effort_(effort), at_home_(world.storages.size()) {
    for (std::size_t disk = 0; disk < world.disks.size(); ++disk) {
      if (!world.disks[disk].fixed) at_home_[world.disks[disk].home].push_back(disk);
    }
    for (auto& disks : at_home_) {
      std::stable_sort(disks.begin(), disks.end(), [&](std::size_t a, std::size_t b) {
        return world.disks[a].bytes < world.disks[b].bytes;
      });
    }
  }

  void run() {
    constexpr int kMostPasses = 8;
    for (int pass = 0; pass < kMostPasses; ++pass) {
      std::vector<std::size_t> moved = moved_disks(world_, layout_);
      std::stable_sort(moved.begin(), moved.end(), [&](std::size_t a, std::size_t b) {
        return world_.disks[a].bytes > world_.disks[b].bytes;
      });
      bool better = false;
      for (const std::size_t disk : moved) {
        if (work_ >= effort_.improvement) return;
        if (layout_.moved(disk) && around(disk)) better = true;
      }
      if (!better) return;
    }
  }

 private:
  static constexpr std::size_t kMostMoved = 6;
  static constexpr std::size_t kMostCandidates = 5;
  static constexpr std::size_t kMostReturning = 2;

  bool around(std::size_t disk);
  [[nodiscard]] std::vector<std::size_t> places(std::size_t disk) const;
  [[nodiscard]] std::vector<std::size_t> candidates(std::size_t disk,
                                                    const std::vector<std::size_t>& where) const;

  const World& world_;
  Layout& layout_;
  const RebalanceEffort& effort_;
  std::vector<std::vector<std::size_t>> at_home_;  // movable disks by home, small ones first
  std::uint64_t work_ = 0;
};

// The two storages of a move, the one that these exchange most disks with, and the one with most
// room.
std::vector<std::size_t> Improvement::places(std::size_t disk) const {
  const std::size_t home = world_.disks[disk].home;
  const std::size_t target = layout_.at(disk);
  std::vector<Amount> exchanged(world_.storages.size());
  for (const std::size_t end : {home, target}) {
    for (const std::size_t other : at_home_[end]) {
      if (layout_.moved(other)) ++exchanged[layout_.at(other)];
    }
  }
  std::vector<std::size_t> out = {home, target};
  const auto add_best = [&](const auto& worth) {
    std::optional<std::size_t> best;
    for (std::size_t i = 0; i < world_.storages.size(); ++i) {
      if (std::find(out.begin(), out.end(), i) != out.end() || worth(i) <= 0) continue;
      if (!best || worth(i) > worth(*best)) best = i;
    }
    if (best) out.push_back(*best);
  };
  add_best([&](std::size_t i) { return exchanged[i]; });
  add_best([&](std::size_t i) { return world_.storages[i].high - layout_.weight(i); });
  return out;
}

std::vector<std::size_t> Improvement::candidates(std::size_t disk,
                                                 const std::vector<std::size_t>& where) const {
  const std::size_t home = world_.disks[disk].home;
  const std::size_t target = layout_.at(disk);
  const auto inside = [&](std::size_t storage) {
    return std::find(where.begin(), where.end(), storage) != where.end();
  };
  std::vector<std::size_t> out = {disk};
  const auto add = [&](std::size_t other) {
    if (std::find(out.begin(), out.end(), other) == out.end()) out.push_back(other);
  };
  // Moves that go with it.
  for (const std::size_t place : where) {
    for (const std::size_t other : at_home_[place]) {
      if (out.size() >= kMostMoved) break;
      if (layout_.moved(other) && inside(layout_.at(other))) add(other);
    }
  }
  // What could go instead, alone or two together: just heavy enough, and of all sizes.
  const Amount spare =
      std::max<Amount>(0, std::min(world_.storages[home].high - layout_.weight(home),
                                   layout_.weight(target) - world_.storages[target].low));
  const Amount enough = world_.disks[disk].weight - spare;
  std::vector<std::size_t> cheaper;
  for (const std::size_t other : at_home_[home]) {
    if (!layout_.moved(other) && world_.disks[other].bytes < world_.disks[disk].bytes) {
      cheaper.push_back(other);
    }
  }
  std::size_t added = 0;
  for (const std::size_t other : cheaper) {
    if (added == kMostCandidates) break;
    if (world_.disks[other].weight < enough) continue;
    add(other);
    ++added;
  }
  for (std::size_t i = 0; i < kMostCandidates && !cheaper.empty(); ++i) {
    add(cheaper[i * (cheaper.size() - 1) / (kMostCandidates - 1)]);
  }
  // And what could come back for one that is too big.
  added = 0;
  for (const std::size_t other : at_home_[target]) {
    if (added == kMostReturning) break;
    if (layout_.moved(other) || world_.disks[other].weight == 0) continue;
    add(other);
    ++added;
  }
  return out;
}

bool Improvement::around(std::size_t disk) {
  const std::vector<std::size_t> where = places(disk);
  return rearrange(world_, layout_, {candidates(disk, where), where},
                   {layout_.cost(), layout_.moves()}, effort_.neighbourhood, work_);
}

// ---- all together -------------------------------------------------------------------------------

Amount bytes_of(const World& world, const std::vector<Hop>& hops) {
  Amount sum = 0;
  for (const Hop& hop : hops) sum += world.disks[hop.disk].bytes;
  return sum;
}

// As many of the first steps as leave nothing worse than at the beginning, and most of it well.
std::vector<Hop> best_beginning(const World& world, const std::vector<Hop>& hops) {
  Layout layout(world);
  std::size_t best = 0;
  std::pair<Amount, Amount> best_left = {layout.clashes(), layout.excess()};
  for (std::size_t i = 0; i < hops.size(); ++i) {
    layout.put(hops[i].disk, hops[i].target);
    bool worse = false;
    for (std::size_t storage = 0; storage < world.storages.size(); ++storage) {
      const World::Storage& limits = world.storages[storage];
      worse = worse || layout.weight(storage) < limits.floor() ||
              layout.weight(storage) > limits.ceiling();
    }
    const std::pair<Amount, Amount> left = {layout.clashes(), layout.excess()};
    if (!worse && left < best_left) {
      best = i + 1;
      best_left = left;
    }
  }
  return {hops.begin(), hops.begin() + static_cast<std::ptrdiff_t>(best)};
}

Layout first_layout(const World& world, const RebalanceEffort& effort) {
  std::optional<Layout> best;
  for (const Descent::Prefer prefer : {Descent::Prefer::FewBytes, Descent::Prefer::FewMoves}) {
    Layout layout(world);
    Descent(world, layout, prefer, effort).run();
    const World wider = as_wide_as(world, layout);
    Layout improved = in_world(wider, layout);
    if (improved.reached()) Improvement(wider, improved, effort).run();
    layout = in_world(world, improved);
    if (!best || score(layout) < score(*best)) best = std::move(layout);
  }
  return *best;
}

// A first plan: good, not proven.
Draft first_draft(const World& world, const RebalanceEffort& effort) {
  // Disks whose moves can't be put into an order stay in the next try.
  constexpr int kMostTries = 4;
  World tried = world;
  std::vector<Hop> best;
  std::pair<Amount, Amount> best_left = {std::numeric_limits<Amount>::max(), 0};
  for (int i = 0; i < kMostTries; ++i) {
    const Layout goal = first_layout(tried, effort);
    const Sequence sequence = order(tried, goal);
    std::vector<Hop> hops =
        sequence.blocked.empty() ? sequence.hops : best_beginning(world, sequence.hops);
    Layout end(world);
    for (const Hop& hop : hops) end.put(hop.disk, hop.target);
    if (const std::pair left = {end.clashes(), end.excess()}; left < best_left) {
      best = std::move(hops);
      best_left = left;
    }
    if (sequence.blocked.empty()) break;
    for (const std::size_t disk : sequence.blocked) tried.disks[disk].fixed = true;
  }
  return {std::move(best), best_left == std::pair<Amount, Amount>(0, 0), false};
}

std::vector<ExactSearch::Part> all_parts(const World& world) {
  std::vector<std::size_t> disks;
  for (std::size_t disk = 0; disk < world.disks.size(); ++disk) {
    if (!world.disks[disk].fixed) disks.push_back(disk);
  }
  // What has to leave comes first, and large before small: that is what decides.
  const auto rank = [&](std::size_t disk) {
    const World::Disk& it = world.disks[disk];
    const World::Storage& home = world.storages[it.home];
    return std::tuple(-(home.weight - home.high), it.home, -it.bytes, it.weight, it.guest);
  };
  std::stable_sort(disks.begin(), disks.end(),
                   [&](std::size_t a, std::size_t b) { return rank(a) < rank(b); });
  std::vector<ExactSearch::Part> parts;
  for (const std::size_t disk : disks) {
    ExactSearch::Part part{disk, {}};
    for (std::size_t storage = 0; storage < world.storages.size(); ++storage) {
      if (storage != world.disks[disk].home) part.targets.push_back(storage);
    }
    parts.push_back(std::move(part));
  }
  return parts;
}

}  // namespace

Draft search(const World& world, const RebalanceEffort& effort) {
  // Beyond that the exact search would use up its effort without coming anywhere.
  constexpr std::size_t kMostExact = 400;

  Layout layout(world);
  if (layout.reached()) return {{}, true, true};
  Draft draft = first_draft(world, effort);
  std::vector<ExactSearch::Part> parts = all_parts(world);
  if (parts.size() > kMostExact) return draft;

  ExactSearch::Bound bound;
  if (draft.reached) bound = {bytes_of(world, draft.hops), draft.hops.size()};
  bool without_order = false;
  std::vector<Hop> hops;
  ExactSearch exact(world, layout, std::move(parts), effort.exact);
  const auto found = exact.run(bound, [&](const Layout& goal) {
    Sequence sequence = order(world, goal);
    without_order = without_order || !sequence.blocked.empty();
    if (!sequence.blocked.empty()) return false;
    hops = std::move(sequence.hops);
    return true;
  });
  if (found) {
    bound = {bytes_of(world, hops), hops.size()};
    draft = {std::move(hops), true, false};
  }
  draft.proven = exact.complete();
  if (without_order) {
    DetourSearch detours(world, effort.detours);
    if (auto steps = detours.run(bound)) draft = {std::move(*steps), true, draft.proven};
    draft.proven = draft.proven && detours.complete();
  }
  return draft;
}

}  // namespace drover::job::rebalance
