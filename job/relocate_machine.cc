// SPDX-License-Identifier: Apache-2.0
#include "job/relocate_machine.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"

namespace drover::job::relocation {
namespace {

Error cancelled() {
  return Error{Code::Cancelled,
               "the relocation was cancelled; the guest's disks are where they were", "", false};
}

Error guest_is_gone() {
  return Error{Code::NotFound, "the guest has ended, and there is no definition of it", "", false};
}

Error copy_is_gone(const DiskSeen& disk) {
  return disk.failure.value_or(Error{Code::Io, "libvirt's copy job has ended, and nobody said why",
                                     "see libvirt's log, and QEMU's in /var/log/libvirt/qemu",
                                     false});
}

Step stay(State state) { return {std::move(state), {}}; }
Step commit(std::optional<Error> partly = {}) {
  return {Committing{std::move(partly)}, {{Do::Commit}}};
}

bool passes(const Error& error) { return error.retryable || error.code == Code::Unreachable; }

bool any_switched(const std::vector<Stage>& disks) {
  return std::ranges::find(disks, Stage::Switched) != disks.end();
}
bool all_switched(const std::vector<Stage>& disks) {
  return std::ranges::all_of(disks, [](Stage stage) { return stage == Stage::Switched; });
}

// What went over stays, the rest is undone.
Step give_up(Error reason, bool some_switched) {
  if (some_switched) return {Committing{std::move(reason)}, {{Do::Drop}, {Do::Commit}}};
  return {Undoing{std::move(reason)}, {{Do::Drop}}};
}

// It was shut off, or was off when the job was resumed. What QEMU has copied is worth nothing then.
Step go_cold(const std::vector<Stage>& disks) {
  return {CopyingCold{true, any_switched(disks)}, {{Do::CopyCold}}};
}

Stage next_stage(Stage before, const DiskSeen& seen) {
  if (seen.switched) return Stage::Switched;
  switch (seen.copy) {
    case DiskSeen::Copy::None: return before;
    case DiskSeen::Copy::Running: return Stage::Copying;
    case DiskSeen::Copy::Ready: return Stage::Ready;
  }
  return before;
}

// The first disk whose copy was there, or was begun, and is not there now.
const DiskSeen* lost_copy(const std::vector<Stage>& before, const Seen& seen) {
  for (std::size_t i = 0; i < before.size(); ++i) {
    const DiskSeen& disk = seen.disks[i];
    if (disk.switched || disk.copy != DiskSeen::Copy::None) continue;
    if (before[i] == Stage::Started || before[i] == Stage::Copying || before[i] == Stage::Ready) {
      return &disk;
    }
  }
  return nullptr;
}

void advance(std::vector<Stage>& disks, const Seen& seen) {
  for (std::size_t i = 0; i < disks.size(); ++i) disks[i] = next_stage(disks[i], seen.disks[i]);
}

// The next disk goes over, or it is done.
Step switch_next(Switching state) {
  if (all_switched(state.disks)) return commit();
  for (std::size_t i = 0; i < state.disks.size(); ++i) {
    if (state.disks[i] == Stage::Switched) continue;
    state.asked = i;
    return {std::move(state), {{Do::Pivot, i}}};
  }
  return stay(std::move(state));
}

Step on(Settling state, const Event& event, const Limits& limits) {
  if (std::holds_alternative<CancelWished>(event)) {
    state.undo = cancelled();
    return stay(std::move(state));
  }
  if (const auto* doubtful = std::get_if<Doubtful>(&event)) {
    return state.undo ? give_up(*state.undo, false) : stay(Held{doubtful->error});
  }
  const auto* seen = std::get_if<Seen>(&event);
  if (seen == nullptr) return stay(std::move(state));
  if (!seen->exists) return give_up(state.undo.value_or(guest_is_gone()), false);
  std::vector<Stage> disks(limits.disks, Stage::Waiting);
  advance(disks, *seen);
  if (all_switched(disks)) return commit();
  // Of a job that has begun to change over the rest follows: all disks or none.
  if (state.undo && !any_switched(disks)) return give_up(*state.undo, false);
  if (!seen->runs) return go_cold(disks);
  return {Making{any_switched(disks)}, {{Do::Make}}};
}

Step on(Making state, const Event& event, const Limits& limits) {
  if (std::holds_alternative<Begin>(event)) return {state, {{Do::Make}}};
  if (std::holds_alternative<Made>(event)) {
    return stay(Copying{std::vector<Stage>(limits.disks, Stage::Waiting)});
  }
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    return give_up(failed->error, state.some_switched);
  }
  if (std::holds_alternative<CancelWished>(event) && !state.some_switched) {
    return give_up(cancelled(), false);
  }
  return stay(state);
}

Step on_seen(Copying state, const Seen& seen, const Limits& limits) {
  if (!seen.exists) return give_up(guest_is_gone(), any_switched(state.disks));
  if (!seen.runs) {
    advance(state.disks, seen);
    return all_switched(state.disks) ? commit() : go_cold(state.disks);
  }
  const DiskSeen* const lost = lost_copy(state.disks, seen);
  advance(state.disks, seen);
  if (lost != nullptr) return give_up(copy_is_gone(*lost), any_switched(state.disks));
  const bool all_ready = std::ranges::all_of(
      state.disks, [](Stage stage) { return stage == Stage::Ready || stage == Stage::Switched; });
  if (all_ready) return switch_next(Switching{std::move(state.disks), std::nullopt});
  auto running = static_cast<std::size_t>(std::ranges::count_if(
      state.disks, [](Stage stage) { return stage == Stage::Started || stage == Stage::Copying; }));
  std::vector<Action> actions;
  for (std::size_t i = 0; i < state.disks.size() && running < limits.parallel; ++i) {
    if (state.disks[i] != Stage::Waiting) continue;
    state.disks[i] = Stage::Started;
    actions.push_back({Do::StartCopy, i});
    ++running;
  }
  return {std::move(state), std::move(actions)};
}

Step on(Copying state, const Event& event, const Limits& limits) {
  if (const auto* seen = std::get_if<Seen>(&event)) {
    return on_seen(std::move(state), *seen, limits);
  }
  if (const auto* doubtful = std::get_if<Doubtful>(&event)) return stay(Held{doubtful->error});
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    if (!passes(failed->error)) return give_up(failed->error, any_switched(state.disks));
    // Whether it has begun all the same, the next look says.
    if (failed->action.what == Do::StartCopy) state.disks[failed->action.disk] = Stage::Waiting;
    return stay(std::move(state));
  }
  if (std::holds_alternative<CancelWished>(event) && !any_switched(state.disks)) {
    return give_up(cancelled(), false);
  }
  return stay(std::move(state));
}

Step on(Switching state, const Event& event, const Limits& /*limits*/) {
  if (const auto* doubtful = std::get_if<Doubtful>(&event)) return stay(Held{doubtful->error});
  if (const auto* seen = std::get_if<Seen>(&event)) {
    if (!seen->exists) return commit(guest_is_gone());
    const DiskSeen* const lost = lost_copy(state.disks, *seen);
    advance(state.disks, *seen);
    if (all_switched(state.disks)) return commit();
    if (!seen->runs) return go_cold(state.disks);
    if (lost != nullptr) return give_up(copy_is_gone(*lost), any_switched(state.disks));
    if (state.asked && state.disks[*state.asked] != Stage::Switched) return stay(std::move(state));
    return switch_next(std::move(state));
  }
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    if (!passes(failed->error)) return give_up(failed->error, any_switched(state.disks));
    state.asked.reset();  // again, if the next look says that it was not carried out
    return stay(std::move(state));
  }
  return stay(std::move(state));
}

Step on(CopyingCold state, const Event& event, const Limits& /*limits*/) {
  if (std::holds_alternative<Begin>(event) && !std::exchange(state.begun, true)) {
    return {state, {{Do::CopyCold}}};
  }
  if (std::holds_alternative<Copied>(event)) {
    return {Pointing{state.some_switched}, {{Do::Point}}};
  }
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    return give_up(failed->error, state.some_switched);
  }
  if (std::holds_alternative<CancelWished>(event) && !state.some_switched) {
    return give_up(cancelled(), false);
  }
  return stay(state);
}

Step on(Pointing state, const Event& event, const Limits& /*limits*/) {
  if (std::holds_alternative<Pointed>(event)) return commit();
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    // Nobody knows whether the definition was changed: both images stay.
    if (passes(failed->error)) return stay(Held{failed->error});
    return give_up(failed->error, state.some_switched);
  }
  return stay(state);
}

Step on(Committing state, const Event& event, const Limits& /*limits*/) {
  if (std::holds_alternative<Committed>(event)) return stay(Finished{std::move(state.partly)});
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    if (failed->action.what == Do::Commit) return stay(Held{failed->error});
    // What could not be dropped stays; that the disks which went are finished matters more.
    if (state.partly) state.partly->message += "; " + failed->error.message;
  }
  return stay(std::move(state));
}

Step on(Undoing state, const Event& event, const Limits& /*limits*/) {
  if (const auto* dropped = std::get_if<Dropped>(&event)) {
    if (dropped->some_went) return commit(std::move(state.reason));
    return stay(Undone{std::move(state.reason), true});
  }
  const auto* failed = std::get_if<ActionFailed>(&event);
  if (failed != nullptr && failed->action.what == Do::Drop) {
    Error reason = std::move(state.reason);
    reason.message += "; clearing up: " + failed->error.message;
    return stay(Undone{std::move(reason), false});
  }
  return stay(std::move(state));
}

Step on(Finished state, const Event& /*event*/, const Limits& /*limits*/) {
  return stay(std::move(state));
}
Step on(Undone state, const Event& /*event*/, const Limits& /*limits*/) {
  return stay(std::move(state));
}
Step on(Held state, const Event& /*event*/, const Limits& /*limits*/) {
  return stay(std::move(state));
}

}  // namespace

Step step(State state, const Event& event, const Limits& limits) {
  if (const auto* seen = std::get_if<Seen>(&event); seen != nullptr && seen->exists) {
    CHECK(seen->disks.size() == limits.disks, "every disk is looked at");
  }
  return std::visit([&](auto&& now) { return on(std::move(now), event, limits); },
                    std::move(state));
}

std::string_view event_name(const Event& event) {
  static constexpr auto kNames = std::to_array<std::string_view>(
      {"begin", "made", "seen", "copied", "pointed", "dropped", "committed", "cancel-wished",
       "doubtful", "woken", "action-failed"});
  static_assert(kNames.size() == std::variant_size_v<Event>);
  return kNames[event.index()];
}

std::string_view action_name(Do action) {
  switch (action) {
    case Do::Make: return "make";
    case Do::StartCopy: return "start-copy";
    case Do::Pivot: return "pivot";
    case Do::CopyCold: return "copy-cold";
    case Do::Point: return "point";
    case Do::Drop: return "drop";
    case Do::Commit: return "commit";
  }
  return "";
}

std::string_view state_name(const State& state) {
  static constexpr auto kNames = std::to_array<std::string_view>(
      {"settling", "making", "copying", "switching", "copying-cold", "pointing", "committing",
       "finished", "undoing", "undone", "held"});
  static_assert(kNames.size() == std::variant_size_v<State>);
  return kNames[state.index()];
}

Phase phase_of(const State& state) {
  static constexpr auto kPhases = std::to_array<Phase>(
      {Phase::Reserve, Phase::Reserve, Phase::Copy, Phase::Switch, Phase::Copy, Phase::Switch,
       Phase::Commit, Phase::Done, Phase::Undo, Phase::Undo, Phase::Commit});
  static_assert(kPhases.size() == std::variant_size_v<State>);
  return kPhases[state.index()];
}

bool ended(const State& state) {
  return std::holds_alternative<Finished>(state) || std::holds_alternative<Undone>(state) ||
         std::holds_alternative<Held>(state);
}

}  // namespace drover::job::relocation
