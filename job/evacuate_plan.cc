// SPDX-License-Identifier: Apache-2.0
#include "job/evacuate_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

namespace drover::job {

namespace {

constexpr std::size_t kNowhere = static_cast<std::size_t>(-1);

std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }

class Planner {
 public:
  explicit Planner(const EvacuateProblem& problem)
      : problem_(problem), places_(problem.items.size(), kNowhere) {
    for (const auto& target : problem.targets) {
      left_.push_back(target.free > problem.margin ? target.free - problem.margin : Length());
      names_.push_back(target.names);
    }
  }

  EvacuatePlan plan() {
    choose();
    if (!place_greedily(places_)) {
      std::vector<std::size_t> found(problem_.items.size(), kNowhere);
      std::uint64_t effort = problem_.effort;
      if (search(0, left_, found, effort)) places_ = std::move(found);
    }
    make_steps();
    return std::move(plan_);
  }

 private:
  // What has to be given a place, the largest first.
  void choose() {
    for (std::size_t i = 0; i < problem_.items.size(); ++i) {
      const EvacuateItem& item = problem_.items[i];
      if (item.stays.empty() && !item.copy) order_.push_back(i);
    }
    std::ranges::sort(order_, [&](std::size_t a, std::size_t b) {
      const EvacuateItem& one = problem_.items[a];
      const EvacuateItem& other = problem_.items[b];
      return one.bytes != other.bytes ? one.bytes > other.bytes : one.path < other.path;
    });
  }

  // The targets, that with the most left first.
  static std::vector<std::size_t> by_room(const std::vector<Length>& left) {
    std::vector<std::size_t> out(left.size());
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = i;
    std::ranges::stable_sort(out, [&](std::size_t a, std::size_t b) { return left[a] > left[b]; });
    return out;
  }

  // False: some have found no room; the others have their places.
  bool place_greedily(std::vector<std::size_t>& places) const {
    std::vector<Length> left = left_;
    bool all = true;
    for (const std::size_t item : order_) {
      const Length bytes = problem_.items[item].bytes;
      const std::vector<std::size_t> targets = by_room(left);
      if (targets.empty() || left[targets.front()] < bytes) {
        all = false;
        continue;
      }
      places[item] = targets.front();
      left[targets.front()] -= bytes;
    }
    return all;
  }

  // All of them, from order_[at] on, in all ways; each target's room only once where it is the
  // same.
  bool search(std::size_t at, const std::vector<Length>& left, std::vector<std::size_t>& places,
              std::uint64_t& effort) const {
    if (at == order_.size()) return true;
    const Length bytes = problem_.items[order_[at]].bytes;
    std::optional<Length> tried;
    for (const std::size_t target : by_room(left)) {
      if (left[target] < bytes || effort == 0) return false;
      if (tried == left[target]) continue;
      tried = left[target];
      --effort;
      std::vector<Length> rest = left;
      rest[target] -= bytes;
      places[order_[at]] = target;
      if (search(at + 1, rest, places, effort)) return true;
    }
    return false;
  }

  // Its own name; if that is taken, one with the guest's and the disk's.
  std::string new_path(std::size_t target, const EvacuateItem& item) {
    std::set<std::string>& names = names_[target];
    const std::string name = name_of(item.path);
    const std::size_t dot = name.rfind('.');
    const bool has_ending = dot != std::string::npos && dot != 0;
    const std::string ending = has_ending ? name.substr(dot) : "";
    const EvacuateItem::User user = item.users.empty() ? EvacuateItem::User{} : item.users.front();
    const std::string by_guest = user.guest + (user.disk.empty() ? "" : "-" + user.disk);
    std::string chosen = name;
    for (unsigned i = 1; !names.insert(chosen).second; ++i) {
      chosen = (i == 1 ? by_guest : fmt::format("{}-{}", by_guest, i)) + ending;
    }
    return problem_.targets[target].directory + "/" + chosen;
  }

  void make_steps() {
    std::map<std::string, std::size_t> of_guest;  // to the step of its disks
    for (std::size_t i = 0; i < problem_.items.size(); ++i) {
      const EvacuateItem& item = problem_.items[i];
      if (!item.stays.empty()) {
        plan_.obstacles.push_back({i, item.stays});
        continue;
      }
      if (!item.copy && places_[i] == kNowhere) {
        plan_.obstacles.push_back({i, no_room(item)});
        plan_.room = false;
        continue;
      }
      std::size_t step = plan_.steps.size();
      if (item.kind == EvacuateKind::Disk) {
        step = of_guest.try_emplace(item.users.front().uuid, step).first->second;
      }
      if (step == plan_.steps.size()) plan_.steps.push_back({item.kind, {}, {}});
      const std::size_t target = item.copy ? item.copy->target : places_[i];
      plan_.steps[step].files.push_back(
          {i, target, item.copy ? item.copy->path : new_path(target, item)});
      if (!item.copy) plan_.steps[step].bytes += item.bytes;
      if (!item.copy) plan_.bytes += item.bytes;
    }
    std::ranges::stable_sort(plan_.steps, std::greater<>(), &EvacuateStep::bytes);
  }

  [[nodiscard]] std::string no_room(const EvacuateItem& item) const {
    std::vector<Length> left = left_;
    for (std::size_t i = 0; i < places_.size(); ++i) {
      if (places_[i] != kNowhere) left[places_[i]] -= problem_.items[i].bytes;
    }
    const auto most = std::ranges::max_element(left);
    const auto target = static_cast<std::size_t>(most - left.begin());
    return fmt::format(
        "there is no room for it: it takes {}, and the most that is left is {} on {}",
        format_length(item.bytes), format_length(*most), problem_.targets[target].name);
  }

  const EvacuateProblem& problem_;
  std::vector<Length> left_;                  // of the targets, for our files
  std::vector<std::set<std::string>> names_;  // and what is taken there
  std::vector<std::size_t> order_;
  std::vector<std::size_t> places_;  // target, by item
  EvacuatePlan plan_;
};

}  // namespace

EvacuatePlan plan_evacuation(const EvacuateProblem& problem) { return Planner(problem).plan(); }

}  // namespace drover::job
