// SPDX-License-Identifier: Apache-2.0
#include "job/evacuate_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <tuple>

namespace drover::job {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

EvacuateItem disk(const std::string& guest, const std::string& name, Length bytes) {
  return {.kind = EvacuateKind::Disk,
          .path = "/mnt/a/" + guest + "-" + name + ".raw",
          .bytes = bytes,
          .users = {{guest, "uuid-of-" + guest, name}}};
}

EvacuateProblem::Target target(const std::string& name, Length free) {
  return {.name = name, .directory = name, .free = free};
}

// ---- an account of its own ----------------------------------------------------------------------

// Whether the sizes fit into the rooms in any way at all: tries all.
bool any_way(const std::vector<Length>& sizes, std::vector<Length> rooms, std::size_t at = 0) {
  if (at == sizes.size()) return true;
  for (Length& room : rooms) {
    if (room < sizes[at]) continue;
    room -= sizes[at];
    if (any_way(sizes, rooms, at + 1)) return true;
    room += sizes[at];
  }
  return false;
}

void keeps_its_promises(const EvacuateProblem& problem, const EvacuatePlan& plan) {
  std::map<std::size_t, int> seen;  // items
  std::map<std::size_t, Length> put;
  std::set<std::string> paths;
  std::map<std::string, int> steps_of_guest;
  Length all;
  for (const EvacuateStep& step : plan.steps) {
    ASSERT_FALSE(step.files.empty());
    Length bytes;
    std::set<std::string> guests;
    for (const auto& file : step.files) {
      const EvacuateItem& item = problem.items[file.item];
      ++seen[file.item];
      EXPECT_EQ(item.kind, step.kind);
      EXPECT_TRUE(item.stays.empty());
      const auto& where = problem.targets[file.target];
      EXPECT_TRUE(file.path.starts_with(where.directory + "/"));
      if (item.copy) {
        EXPECT_EQ(file.path, item.copy->path);
        EXPECT_EQ(file.target, item.copy->target);
        continue;
      }
      EXPECT_TRUE(paths.insert(file.path).second) << file.path << " twice";
      EXPECT_FALSE(where.names.contains(file.path.substr(where.directory.size() + 1)));
      put[file.target] += item.bytes;
      bytes += item.bytes;
      if (step.kind == EvacuateKind::Disk) guests.insert(item.users.front().uuid);
    }
    EXPECT_EQ(step.bytes, bytes);
    all += bytes;
    if (step.kind != EvacuateKind::Disk) {
      EXPECT_EQ(step.files.size(), 1U);
    } else {
      ASSERT_EQ(guests.size(), 1U);
      EXPECT_EQ(++steps_of_guest[*guests.begin()], 1) << "two steps of one guest's disks";
    }
  }
  EXPECT_EQ(plan.bytes, all);
  EXPECT_TRUE(std::ranges::is_sorted(plan.steps, std::greater<>(), &EvacuateStep::bytes));
  // Nothing is given back on a target, so the sum is the worst of all orders.
  for (const auto& [index, bytes] : put) {
    EXPECT_LE(bytes + problem.margin, problem.targets[index].free);
  }
  bool no_room = false;
  for (const EvacuateObstacle& obstacle : plan.obstacles) {
    ++seen[obstacle.item];
    EXPECT_FALSE(obstacle.why.empty());
    const std::string& stays = problem.items[obstacle.item].stays;
    if (!stays.empty()) {
      EXPECT_EQ(obstacle.why, stays);
    }
    no_room = no_room || stays.empty();
  }
  EXPECT_EQ(plan.room, !no_room);
  EXPECT_EQ(seen.size(), problem.items.size());
  for (const auto& [item, times] : seen) EXPECT_EQ(times, 1) << problem.items[item].path;
}

EvacuateProblem random_problem(std::mt19937& random, std::size_t most_items) {
  const auto upto = [&](std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n)(random);
  };
  EvacuateProblem problem;
  problem.margin = Length(upto(3));
  const std::size_t targets = 1 + upto(3);
  for (std::size_t i = 0; i < targets; ++i) {
    problem.targets.push_back(target("/mnt/t" + std::to_string(i), Length(upto(30))));
    if (upto(3) == 0) problem.targets.back().names = {"g0-d0.raw", "file0"};
  }
  const std::size_t items = upto(most_items);
  for (std::size_t i = 0; i < items; ++i) {
    EvacuateItem item =
        disk("g" + std::to_string(upto(3)), "d" + std::to_string(i), Length(1 + upto(14)));
    if (upto(4) == 0) {
      item.kind = upto(1) == 0 ? EvacuateKind::Medium : EvacuateKind::Nvram;
      if (upto(2) == 0) item.copy = EvacuateItem::Copy{upto(targets - 1), ""};
      if (item.copy) {
        item.copy->path =
            problem.targets[item.copy->target].directory + "/copy" + std::to_string(i);
      }
    }
    // Many have one name, in directories of their own.
    if (upto(2) == 0) item.path = "/mnt/a/" + std::to_string(i) + "/file" + std::to_string(upto(1));
    if (upto(6) == 0) item.stays = "it is pinned";
    problem.items.push_back(std::move(item));
  }
  return problem;
}

TEST(EvacuatePlan, KeepsItsPromisesAndFindsRoomWheneverThereIsAny) {
  std::size_t with_room = 0;
  std::size_t greed_is_not_enough = 0;
  constexpr std::size_t kWorlds = 20'000;
  for (unsigned seed = 0; seed < kWorlds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    EvacuateProblem problem = random_problem(random, 7);
    const EvacuatePlan plan = plan_evacuation(problem);
    keeps_its_promises(problem, plan);
    std::vector<Length> sizes;
    for (const EvacuateItem& item : problem.items) {
      if (item.stays.empty() && !item.copy) sizes.push_back(item.bytes);
    }
    std::vector<Length> rooms;
    for (const auto& where : problem.targets) {
      rooms.push_back(where.free > problem.margin ? where.free - problem.margin : Length());
    }
    EXPECT_EQ(plan.room, any_way(sizes, rooms));
    with_room += plan.room ? 1 : 0;
    problem.effort = 0;
    const EvacuatePlan greedy = plan_evacuation(problem);
    keeps_its_promises(problem, greedy);
    greed_is_not_enough += plan.room && !greedy.room ? 1 : 0;
    if (HasFailure()) return;
  }
  // Or the worlds show nothing.
  EXPECT_GT(with_room, kWorlds / 4);
  EXPECT_LT(with_room, kWorlds * 3 / 4);
  EXPECT_GT(greed_is_not_enough, 20U);
}

TEST(EvacuatePlan, KeepsItsPromisesForManyItems) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    EvacuateProblem problem = random_problem(random, 300);
    for (auto& where : problem.targets) where.free = Length(where.free.bytes() * 30);
    keeps_its_promises(problem, plan_evacuation(problem));
    if (HasFailure()) return;
  }
}

// What a plan says, as text.
std::string said(const EvacuatePlan& plan) {
  std::string out;
  for (const auto& step : plan.steps) {
    for (const auto& file : step.files) out += std::to_string(file.item) + ">" + file.path + " ";
    out += "| ";
  }
  for (const auto& obstacle : plan.obstacles) {
    out += std::to_string(obstacle.item) + ": " + obstacle.why + "; ";
  }
  return out;
}

TEST(EvacuatePlan, IsTheSameForTheSameProblem) {
  for (unsigned seed = 0; seed < 500; ++seed) {
    std::mt19937 random(seed);
    const EvacuateProblem problem = random_problem(random, 30);
    EXPECT_EQ(said(plan_evacuation(problem)), said(plan_evacuation(problem)));
  }
}

TEST(EvacuatePlan, TheLargestGoesFirstToTheTargetWithTheMostRoom) {
  EvacuateProblem problem;
  problem.items = {disk("a", "vda", 10_GiB), disk("b", "vda", 40_GiB), disk("c", "vda", 20_GiB)};
  problem.targets = {target("/mnt/b", 50_GiB), target("/mnt/c", 60_GiB)};
  const EvacuatePlan plan = plan_evacuation(problem);
  EXPECT_EQ(said(plan), "1>/mnt/c/b-vda.raw | 2>/mnt/b/c-vda.raw | 0>/mnt/b/a-vda.raw | ");
}

TEST(EvacuatePlan, TheDisksOfAGuestAreOneStep) {
  EvacuateProblem problem;
  problem.items = {disk("a", "vda", 10_GiB), disk("b", "vda", 15_GiB), disk("a", "vdb", 10_GiB)};
  problem.targets = {target("/mnt/b", 100_GiB)};
  EXPECT_EQ(said(plan_evacuation(problem)),
            "0>/mnt/b/a-vda.raw 2>/mnt/b/a-vdb.raw | 1>/mnt/b/b-vda.raw | ");
}

TEST(EvacuatePlan, SaysWhyThereIsNoRoom) {
  EvacuateProblem problem;
  problem.items = {disk("a", "vda", 10_GiB), disk("b", "vda", 1_GiB)};
  problem.targets = {target("/mnt/b", 10_GiB)};
  const EvacuatePlan plan = plan_evacuation(problem);
  EXPECT_FALSE(plan.room);
  ASSERT_EQ(plan.obstacles.size(), 1U);
  EXPECT_EQ(plan.obstacles[0].item, 0U);
  EXPECT_THAT(plan.obstacles[0].why, HasSubstr("it takes 10.0 GiB, and the most that is left is"));
  EXPECT_THAT(plan.obstacles[0].why, HasSubstr("on /mnt/b"));
}

TEST(EvacuatePlan, FilesOfOneNameGetTheirGuestsNames) {
  EvacuateProblem problem;
  for (const char* guest : {"a", "b", "c"}) {
    problem.items.push_back(disk(guest, "vda", 1_GiB));
    problem.items.back().path = std::string("/mnt/a/") + guest + "/disk.qcow2";
  }
  problem.targets = {target("/mnt/b", 10_GiB)};
  problem.targets[0].names = {"b-vda.qcow2"};
  EXPECT_EQ(said(plan_evacuation(problem)),
            "0>/mnt/b/disk.qcow2 | 1>/mnt/b/b-vda-2.qcow2 | 2>/mnt/b/c-vda.qcow2 | ");
}

TEST(EvacuatePlan, ACopyThatIsThereNeedsNoRoom) {
  EvacuateProblem problem;
  EvacuateItem iso{.kind = EvacuateKind::Medium, .path = "/mnt/a/x.iso", .bytes = 5_GiB};
  iso.users = {{"a", "uuid-of-a", "sda"}, {"b", "uuid-of-b", "sda"}};
  iso.copy = EvacuateItem::Copy{0, "/mnt/b/x.iso"};
  problem.items = {iso};
  problem.targets = {target("/mnt/b", 1_GiB)};
  const EvacuatePlan plan = plan_evacuation(problem);
  EXPECT_EQ(said(plan), "0>/mnt/b/x.iso | ");
  EXPECT_EQ(plan.bytes, Length());
  EXPECT_TRUE(plan.room);
}

TEST(EvacuatePlan, NothingToDo) {
  EvacuateProblem problem;
  problem.targets = {target("/mnt/b", 1_GiB)};
  const EvacuatePlan plan = plan_evacuation(problem);
  EXPECT_THAT(plan.steps, IsEmpty());
  EXPECT_THAT(plan.obstacles, IsEmpty());
  EXPECT_TRUE(plan.room);
}

}  // namespace
}  // namespace drover::job
