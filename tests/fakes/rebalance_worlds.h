// SPDX-License-Identifier: Apache-2.0
//
// Worlds for the tests of job/rebalance_plan.h: random ones, and the check of a plan by a
// book-keeping of its own that shares nothing with the planner but the problem and the bands.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <queue>
#include <string>
#include <tuple>
#include <vector>

#include "base/random.h"
#include "job/rebalance_plan.h"

namespace drover::job::testing {

struct WorldSize {
  std::size_t least_storages = 2;
  std::size_t most_storages = 4;
  std::size_t least_disks = 3;
  std::size_t most_disks = 8;
};

// Small numbers (a capacity is hundreds), so that sums often meet; uneven fillings, so that there
// is something to do. Half of the worlds are narrow, a third by load; some have pins, enemies,
// limits.
inline RebalanceProblem random_world(std::uint64_t seed, const WorldSize& size) {
  Random random(seed);
  const auto between = [&](std::uint64_t least, std::uint64_t most) {
    return least + random.below(most - least + 1);
  };
  RebalanceProblem problem;
  problem.by = random.below(3) == 0 ? RebalanceProblem::By::Io : RebalanceProblem::By::Space;
  problem.tolerance = static_cast<double>(between(1, 15)) / 100;
  const std::size_t storages = between(size.least_storages, size.most_storages);
  const std::size_t disks = between(size.least_disks, size.most_disks);
  const std::uint64_t biggest = between(10, 100);
  std::vector<std::uint64_t> used(storages);
  for (std::size_t i = 0; i < disks; ++i) {
    RebalanceProblem::Disk disk;
    disk.guest = "g" + std::to_string(random.below(std::max<std::uint64_t>(1, disks * 2 / 3)));
    disk.target = "vd" + std::to_string(i);
    // Some storages get more than their part.
    disk.storage = std::min(random.below(storages), random.below(storages));
    const bool alike = random.below(4) == 0;  // clones of one image
    disk.allocated = Length(alike ? biggest / 2 : between(1, biggest));
    disk.load = random.below(5) == 0 ? 0 : between(1, 60);
    if (random.below(8) == 0) disk.fixed = "it is pinned";
    used[disk.storage] += disk.allocated.bytes();
    problem.disks.push_back(disk);
  }
  const bool narrow = random.below(2) == 0;
  const std::uint64_t fullest = *std::max_element(used.begin(), used.end());
  for (std::size_t i = 0; i < storages; ++i) {
    RebalanceProblem::Storage storage;
    storage.name = "s" + std::to_string(i);
    storage.other = Length(random.below(3) == 0 ? between(0, biggest) : 0);
    const std::uint64_t least = used[i] + storage.other.bytes() + 1;
    const std::uint64_t capacity =
        narrow ? between(least, least + biggest) : std::max(least, between(fullest, 2 * fullest));
    storage.capacity = Length(capacity);
    if (random.below(6) == 0) storage.fullest = Length(capacity - capacity / 10);
    problem.storages.push_back(storage);
  }
  if (random.below(4) == 0) problem.most_moves = random.below(5);
  if (random.below(3) == 0) {
    const std::uint64_t groups = between(1, 2);
    for (std::uint64_t group = 0; group < groups; ++group) {
      std::vector<std::string> guests;
      const std::uint64_t members = between(2, 3);
      for (std::uint64_t i = 0; i < members; ++i) {
        guests.push_back("g" + std::to_string(random.below(disks)));
      }
      problem.apart.push_back(guests);
    }
  }
  return problem;
}

// Where the disks are, step by step.
class Books {
 public:
  explicit Books(const RebalanceProblem& problem)
      : problem_(problem), bands_(rebalance_bands(problem)) {
    for (const auto& disk : problem.disks) {
      at.push_back(disk.storage);
      lonely_.push_back(
          std::none_of(problem.apart.begin(), problem.apart.end(), [&](const auto& group) {
            return std::find(group.begin(), group.end(), disk.guest) != group.end();
          }));
    }
  }

  std::vector<std::size_t> at;

  [[nodiscard]] std::uint64_t bytes(std::size_t storage) const {
    std::uint64_t sum = problem_.storages[storage].other.bytes();
    for (std::size_t i = 0; i < at.size(); ++i) {
      if (at[i] == storage) sum += problem_.disks[i].allocated.bytes();
    }
    return sum;
  }
  [[nodiscard]] std::uint64_t weight(std::size_t storage) const {
    if (problem_.by == RebalanceProblem::By::Space) return bytes(storage);
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < at.size(); ++i) {
      if (at[i] == storage) sum += problem_.disks[i].load;
    }
    return sum;
  }
  [[nodiscard]] std::uint64_t outside(std::size_t storage) const {
    const std::uint64_t its = weight(storage);
    const RebalanceBand& band = bands_[storage];
    return its > band.high ? its - band.high : its < band.low ? band.low - its : 0;
  }
  [[nodiscard]] bool enemies(std::size_t one, std::size_t other) const {
    const std::string& a = problem_.disks[one].guest;
    const std::string& b = problem_.disks[other].guest;
    return a != b &&
           std::any_of(problem_.apart.begin(), problem_.apart.end(), [&](const auto& group) {
             return std::find(group.begin(), group.end(), a) != group.end() &&
                    std::find(group.begin(), group.end(), b) != group.end();
           });
  }
  [[nodiscard]] bool beside_enemy(std::size_t disk, std::size_t storage) const {
    if (lonely_[disk]) return false;
    for (std::size_t i = 0; i < at.size(); ++i) {
      if (at[i] == storage && !lonely_[i] && enemies(disk, i)) return true;
    }
    return false;
  }
  [[nodiscard]] bool can_step(std::size_t disk, std::size_t storage) const {
    const auto& its = problem_.storages[storage];
    const Length fullest = its.fullest == Length() ? its.capacity : its.fullest;
    return problem_.disks[disk].fixed.empty() && at[disk] != storage &&
           bytes(storage) + problem_.disks[disk].allocated.bytes() <= fullest.bytes() &&
           !beside_enemy(disk, storage);
  }
  [[nodiscard]] bool reached() const {
    for (std::size_t i = 0; i < problem_.storages.size(); ++i) {
      if (outside(i) > 0) return false;
    }
    for (std::size_t i = 0; i < at.size(); ++i) {
      if (beside_enemy(i, at[i])) return false;
    }
    return true;
  }

 private:
  const RebalanceProblem& problem_;
  const std::vector<RebalanceBand> bands_;
  std::vector<bool> lonely_;  // of a guest in no group
};

// Every rule that a plan keeps, reached or not.
inline void expect_sound(const RebalanceProblem& problem, const RebalancePlan& plan) {
  Books books(problem);
  std::vector<std::uint64_t> before;
  for (std::size_t i = 0; i < problem.storages.size(); ++i) before.push_back(books.outside(i));
  EXPECT_EQ(plan.needed, !books.reached());
  EXPECT_LE(plan.steps.size(), problem.most_moves);
  std::uint64_t bytes = 0;
  for (const RebalanceStep& step : plan.steps) {
    ASSERT_LT(step.disk, problem.disks.size());
    EXPECT_EQ(books.at[step.disk], step.source);
    EXPECT_TRUE(books.can_step(step.disk, step.target));
    EXPECT_FALSE(step.reason.empty());
    books.at[step.disk] = step.target;
    bytes += problem.disks[step.disk].allocated.bytes();
  }
  EXPECT_EQ(plan.bytes.bytes(), bytes);
  EXPECT_EQ(plan.reached, books.reached());
  EXPECT_EQ(plan.reached, plan.obstacles.empty());
  for (std::size_t i = 0; i < problem.storages.size(); ++i) {
    EXPECT_LE(books.outside(i), before[i]) << "storage " << i << " got worse";
  }
}

// The fewest bytes with which any steps at all reach the goal, by looking at every place that the
// disks can have (Dijkstra over all of them, layer by layer where moves are limited).
struct Optimum {
  bool exists = false;
  std::uint64_t bytes = 0;
};

inline Optimum optimum_of(const RebalanceProblem& problem) {
  const std::size_t storages = problem.storages.size();
  const std::size_t disks = problem.disks.size();
  std::size_t states = 1;
  std::vector<std::size_t> digit;  // of each disk, in a state's number
  for (std::size_t i = 0; i < disks; ++i) {
    digit.push_back(states);
    states *= storages;
  }
  Books books(problem);
  std::size_t first = 0;
  for (std::size_t i = 0; i < disks; ++i) first += books.at[i] * digit[i];
  const bool limited = problem.most_moves < std::numeric_limits<std::size_t>::max();
  const std::size_t layers = limited ? problem.most_moves + 1 : 1;
  constexpr std::uint64_t kNever = std::numeric_limits<std::uint64_t>::max();
  std::vector<std::uint64_t> least(states * layers, kNever);
  using Entry = std::tuple<std::uint64_t, std::size_t, std::size_t>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> open;
  least[first] = 0;
  open.emplace(0, 0, first);
  while (!open.empty()) {
    const auto [bytes, layer, state] = open.top();
    open.pop();
    if (least[layer * states + state] < bytes) continue;
    for (std::size_t i = 0; i < disks; ++i) books.at[i] = state / digit[i] % storages;
    if (books.reached()) return {true, bytes};
    if (limited && layer == problem.most_moves) continue;
    const std::size_t next_layer = limited ? layer + 1 : 0;
    for (std::size_t i = 0; i < disks; ++i) {
      for (std::size_t target = 0; target < storages; ++target) {
        if (!books.can_step(i, target)) continue;
        const std::size_t next = state + target * digit[i] - books.at[i] * digit[i];
        const std::uint64_t its = bytes + problem.disks[i].allocated.bytes();
        std::uint64_t& known = least[next_layer * states + next];
        if (its >= known) continue;
        known = its;
        open.emplace(its, next_layer, next);
      }
    }
  }
  return {};
}

}  // namespace drover::job::testing
