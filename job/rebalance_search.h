// SPDX-License-Identifier: Apache-2.0
//
// The inside of job/rebalance_plan.h: disks as numbers, and the searches for which of them to move
// where. In its terms a disk has *bytes* (what moving it costs and the space it takes) and a
// *weight* (what is to be even: bytes again, or load); a storage is to end with a weight within
// [low, high].
//
//   Draft draft = search(world, effort);    // moves in an order in which they can be carried out
//
// How: a greedy descent gives a first layout; exact searches around each of its moves make that
// cheaper; an exact search of the whole follows, which finds and proves the optimum where the world
// is small. All are bounded by counts of what they look at.
//
// Threads: any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "job/rebalance_plan.h"

namespace drover::job::rebalance {

using Amount = std::int64_t;  // bytes or load

struct World {
  struct Storage {
    Amount weight = 0;  // at the beginning
    Amount bytes = 0;
    Amount low = 0;  // what it is to end with
    Amount high = 0;
    Amount fullest = 0;  // bytes that a step may fill it to

    [[nodiscard]] Amount outside(Amount now) const {
      return now > high ? now - high : now < low ? low - now : 0;
    }
    // No layout goes beyond these: it would be worse than the beginning.
    [[nodiscard]] Amount floor() const { return weight < low ? weight : low; }
    [[nodiscard]] Amount ceiling() const { return weight > high ? weight : high; }
    [[nodiscard]] Amount most_bytes() const { return bytes > fullest ? bytes : fullest; }
  };
  struct Disk {
    std::size_t home = 0;
    Amount bytes = 0;
    Amount weight = 0;
    std::size_t guest = kNobody;  // only of guests that are kept apart from others
    bool fixed = false;
  };
  static constexpr std::size_t kNobody = static_cast<std::size_t>(-1);

  std::vector<Storage> storages;
  std::vector<Disk> disks;
  std::vector<std::vector<std::size_t>> enemies;  // by guest
  std::size_t most_moves = 0;
};

// Where each disk is, with all sums kept.
class Layout {
 public:
  explicit Layout(const World& world);

  void put(std::size_t disk, std::size_t storage);
  [[nodiscard]] std::size_t at(std::size_t disk) const { return at_[disk]; }
  [[nodiscard]] bool moved(std::size_t disk) const { return at_[disk] != world_->disks[disk].home; }
  [[nodiscard]] Amount weight(std::size_t storage) const { return weight_[storage]; }
  [[nodiscard]] Amount bytes(std::size_t storage) const { return bytes_[storage]; }
  [[nodiscard]] Amount outside(std::size_t storage) const {
    return world_->storages[storage].outside(weight_[storage]);
  }
  [[nodiscard]] Amount cost() const { return cost_; }  // bytes of the disks that are not at home
  [[nodiscard]] std::size_t moves() const { return moves_; }
  [[nodiscard]] Amount excess() const { return excess_; }    // the sum of outside()
  [[nodiscard]] Amount clashes() const { return clashes_; }  // disks too near to an enemy's
  [[nodiscard]] bool beside_enemy(std::size_t disk, std::size_t storage) const;
  [[nodiscard]] bool reached() const { return excess_ == 0 && clashes_ == 0; }

  // May `disk` be copied to `storage` now?
  [[nodiscard]] bool can_step(std::size_t disk, std::size_t storage) const;
  // By how much the excess would fall.
  [[nodiscard]] Amount gain(std::size_t disk, std::size_t storage) const;

 private:
  [[nodiscard]] Amount clashes_of(std::size_t guest, std::size_t storage) const;

  const World* world_;
  std::vector<std::size_t> at_;
  std::vector<Amount> weight_;
  std::vector<Amount> bytes_;
  std::vector<std::vector<Amount>> guests_;  // by storage, by guest: disks there
  Amount cost_ = 0;
  Amount excess_ = 0;
  Amount clashes_ = 0;
  std::size_t moves_ = 0;
};

struct Hop {
  std::size_t disk = 0;
  std::size_t source = 0;
  std::size_t target = 0;
};

struct Draft {
  std::vector<Hop> hops;
  bool reached = false;  // the goal, after all hops
  bool proven = false;   // nothing cheaper reaches it; if not reached: nothing does
};

Draft search(const World& world, const RebalanceEffort& effort);

}  // namespace drover::job::rebalance
