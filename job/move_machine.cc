// SPDX-License-Identifier: Apache-2.0
#include "job/move_machine.h"

#include <array>
#include <utility>

#include "base/check.h"

namespace drover::job {
namespace {

template <class... Fs>
struct Match : Fs... {
  using Fs::operator()...;
};
template <class... Fs>
Match(Fs...) -> Match<Fs...>;

Error stopped_early() {
  return Error{Code::Busy, "QEMU stopped the guest while its disks were being copied", "", true};
}

Error cancelled() {
  return Error{Code::Cancelled, "the move was cancelled; the guest runs on where it was", "", false};
}

Step stay(State state) { return {std::move(state), {}}; }
Step undo(Error reason) { return {Undoing{std::move(reason)}, {Do::Undo}}; }
Step abort_memory(Error reason, bool go_on, bool link_down) {
  return {AbortingMemory{std::move(reason), false, go_on, link_down}, {Do::AbortMemory}};
}
Step rejoin() { return {Rejoining{}, {Do::Rejoin}}; }

Error link_down() {
  return Error{Code::Unreachable, "the link to the target was lost", "is the network between the hosts up?", true};
}

// The reason to give the move up, if the event is one.
const Error* trouble_in(const Event& event) {
  static const Error kCancelled = cancelled();
  if (const auto* failed = std::get_if<ActionFailed>(&event)) return &failed->error;
  if (const auto* trouble = std::get_if<Trouble>(&event)) return &trouble->error;
  if (std::holds_alternative<CancelWished>(event)) return &kCancelled;
  return nullptr;
}

Step on(Reserving state, const Event& event) {
  if (std::holds_alternative<Begin>(event) && !std::exchange(state.begun, true)) {
    return {state, {Do::Reserve}};
  }
  if (std::holds_alternative<Reserved>(event)) return {Attaching{}, {Do::Attach}};
  if (const Error* reason = trouble_in(event)) return undo(*reason);
  return stay(state);
}

Step on(Attaching state, const Event& event) {
  if (std::holds_alternative<Attached>(event)) return stay(Copying{});
  if (const Error* reason = trouble_in(event)) return undo(*reason);
  return stay(state);
}

Step on(Copying state, const Event& event) {
  if (std::holds_alternative<AllCopied>(event)) return {Synchronising{}, {Do::EnterStrict}};
  if (std::holds_alternative<NearlyCopied>(event)) return {MovingMemory{}, {Do::StartMemory}};
  if (std::holds_alternative<HandoverFailed>(event)) return rejoin();
  if (const Error* reason = trouble_in(event)) return undo(*reason);
  return stay(state);
}

Step on(Rejoining state, const Event& event) {
  if (std::holds_alternative<HandoverFailed>(event)) state.again = true;
  if (std::holds_alternative<Rejoined>(event)) {
    if (state.again) return rejoin();
    return stay(Copying{});
  }
  if (const Error* reason = trouble_in(event)) return undo(*reason);
  return stay(state);
}

Step on(Synchronising state, const Event& event) {
  if (const auto* copied = std::get_if<AllCopied>(&event)) state.copied |= copied->strict;
  if (std::holds_alternative<StrictEntered>(event)) {
    MovingMemory memory;
    memory.strict = true;
    memory.disks_equal = state.copied;
    return {memory, {Do::StartMemory}};
  }
  // Strict mode is over; what could not be sent meanwhile is copied.
  if (std::holds_alternative<LinkDown>(event)) return stay(Copying{});
  if (std::holds_alternative<HandoverFailed>(event)) return rejoin();
  if (const Error* reason = trouble_in(event)) return undo(*reason);
  return stay(state);
}

Step resume_if_ready(const MovingMemory& state) {
  if (!state.barrier_passed || !state.target_suspended) return stay(state);
  return {Resuming{state.migrate_ended, false}, {Do::ResumeTarget}};
}

Step settle(Error reason, bool barrier_passed, bool go_on) {
  return {Settling{std::move(reason), barrier_passed, go_on}, {Do::Settle}};
}

// libvirt's call failed: a fault that passes, or the link, is no reason to give the move up.
Step memory_ended(MovingMemory state, const MigrateEnded& ended) {
  if (!ended.status) {
    const Error& error = ended.status.error();
    return settle(error, state.barrier_passed, state.link_down || passes(error));
  }
  state.migrate_ended = true;
  state.target_suspended = true;  // what the call's return says, should the event have been lost
  if (!std::exchange(state.source_stopped, true)) return {state, {Do::PassBarrier}};
  return resume_if_ready(state);
}

// The barrier could not be passed. The guest's memory is over there and the source is gone: again when the link is
// up. Otherwise the source may still take over.
Step barrier_failed(MovingMemory state, const Error& error) {
  if (!state.migrate_ended) return abort_memory(error, passes(error), state.link_down);
  if (!passes(error)) return stay(Held{error});
  if (!state.link_down) return {state, {Do::PassBarrier}};
  state.barrier_failed = true;
  return stay(state);
}

Step on(MovingMemory state, const Event& event) {
  return std::visit(
      Match{
          [&](const SourceStopped&) -> Step {
            // Its memory is held back until its disks are equal: the guest would wait for them.
            if (!state.disks_equal) return abort_memory(stopped_early(), true, state.link_down);
            if (std::exchange(state.source_stopped, true)) return stay(state);
            return {state, {Do::PassBarrier}};
          },
          [&](const TargetSuspended&) -> Step {
            state.target_suspended = true;
            if (!std::exchange(state.source_stopped, true)) return {state, {Do::PassBarrier}};
            return resume_if_ready(state);
          },
          [&](const BarrierPassed&) -> Step {
            state.barrier_passed = true;
            return resume_if_ready(state);
          },
          [&](const MigrateEnded& ended) -> Step { return memory_ended(state, ended); },
          [&](const Settled&) { return stay(state); },
          [&](const ActionFailed& failed) -> Step { return barrier_failed(state, failed.error); },
          [&](const LinkDown&) -> Step {
            state.link_down = true;
            // After the barrier the link has done its work.
            if (state.barrier_passed || state.migrate_ended) return stay(state);
            return abort_memory(link_down(), true, true);
          },
          [&](const LinkUp&) -> Step {
            state.link_down = false;
            if (std::exchange(state.barrier_failed, false)) return {state, {Do::PassBarrier}};
            return stay(state);
          },
          [&](const HandoverFailed& failed) -> Step {
            if (state.barrier_passed || state.migrate_ended) return stay(state);
            return abort_memory(failed.error, true, state.link_down);
          },
          [&](const Trouble& trouble) -> Step {
            // After the barrier the link has done its work: what happens to it does not matter.
            if (state.barrier_passed) return stay(state);
            if (state.migrate_ended) return stay(Held{trouble.error});
            return abort_memory(trouble.error, false, state.link_down);
          },
          [&](const CancelWished&) -> Step {
            // Too late once the source has stopped: it is a matter of milliseconds now.
            if (state.source_stopped) return stay(state);
            return abort_memory(cancelled(), false, state.link_down);
          },
          [&](const Begin&) { return stay(state); },
          [&](const Reserved&) { return stay(state); },
          [&](const Attached&) { return stay(state); },
          [&](const Rejoined&) { return stay(state); },
          [&](const AllCopied& copied) -> Step {
            state.disks_equal |= copied.strict;
            if (std::exchange(state.strict, true)) return stay(state);
            return {state, {Do::EnterStrict}};
          },
          [&](const NearlyCopied&) { return stay(state); },
          [&](const StrictEntered&) { return stay(state); },
          [&](const TargetRuns&) { return stay(state); },
          [&](const SourceNotGuarded&) { return stay(state); },
          [&](const Committed&) { return stay(state); },
          [&](const Undone_&) { return stay(state); },
      },
      event);
}

// The guest's memory is on the target and its images here are complete and still: the way is forward.
Step go_forward(bool barrier_passed, bool link_down) {
  MovingMemory state;
  state.strict = state.disks_equal = state.source_stopped = state.target_suspended = state.migrate_ended = true;
  state.barrier_passed = barrier_passed;
  state.link_down = link_down;
  if (barrier_passed) return resume_if_ready(state);
  return {state, {Do::PassBarrier}};
}

Step on(AbortingMemory state, const Event& event) {
  // It may have been under way when the trouble came.
  if (std::holds_alternative<BarrierPassed>(event)) state.barrier_passed = true;
  if (std::holds_alternative<LinkDown>(event)) state.link_down = true;
  if (std::holds_alternative<LinkUp>(event)) state.link_down = false;
  if (std::holds_alternative<CancelWished>(event)) {
    state.go_on = false;
    state.reason = cancelled();
  }
  if (const auto* trouble = std::get_if<Trouble>(&event)) {
    state.go_on = false;
    state.reason = trouble->error;
  }
  const auto* ended = std::get_if<MigrateEnded>(&event);
  if (ended == nullptr) return stay(state);
  // It may have been too late to take it back.
  if (ended->status) return go_forward(state.barrier_passed, state.link_down);
  return settle(state.reason, state.barrier_passed, state.go_on);
}

Step on(Settling state, const Event& event) {
  if (std::holds_alternative<BarrierPassed>(event)) state.barrier_passed = true;
  if (std::holds_alternative<CancelWished>(event)) {
    state.go_on = false;
    state.reason = cancelled();
  }
  if (const auto* trouble = std::get_if<Trouble>(&event)) {
    state.go_on = false;
    state.reason = trouble->error;
  }
  if (std::holds_alternative<Begin>(event)) return {state, {Do::Settle}};
  if (const auto* settled = std::get_if<Settled>(&event)) {
    switch (settled->where) {
      case Whereabouts::Source:
        // Behind the barrier the target has let go of its images: they can't be written to again.
        return state.go_on && !state.barrier_passed ? rejoin() : undo(state.reason);
      case Whereabouts::Target: return go_forward(state.barrier_passed, false);
      case Whereabouts::TargetRuns:
        if (state.go_on) return {Committing{}, {Do::Commit}};
        return stay(Held{{Code::Held, "it is too late to undo the move: the guest runs on the target", "", false}});
    }
  }
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    Error error = failed->error;
    if (!state.reason.message.empty()) error.message += "; it began with: " + state.reason.message;
    return stay(Held{std::move(error)});
  }
  return stay(state);
}

Step on(Resuming state, const Event& event) {
  if (std::holds_alternative<TargetRuns>(event)) state.target_runs = true;
  // An error of libvirt's call no longer matters: the target runs, and its guard keeps the source from
  // running. The driver makes sure that the source is gone before it commits.
  if (std::holds_alternative<MigrateEnded>(event)) state.migrate_ended = true;
  if (const auto* failed = std::get_if<ActionFailed>(&event)) return stay(Held{failed->error});
  // The target was not resumed, then.
  if (const auto* busy = std::get_if<SourceNotGuarded>(&event)) return settle(busy->error, true, true);
  if (state.target_runs && state.migrate_ended) return {Committing{}, {Do::Commit}};
  return stay(state);
}

Step on(Committing state, const Event& event) {
  if (std::holds_alternative<Committed>(event)) return stay(Finished{});
  if (const auto* failed = std::get_if<ActionFailed>(&event)) return stay(Held{failed->error});
  return stay(state);
}

Step on(const Undoing& state, const Event& event) {
  if (std::holds_alternative<Undone_>(event)) return stay(Undone{state.reason, true});
  if (const auto* failed = std::get_if<ActionFailed>(&event)) {
    Error error = state.reason;
    error.message += "; and not everything could be undone: " + failed->error.message;
    if (!failed->error.hint.empty()) error.hint = failed->error.hint;
    return stay(Undone{std::move(error), false});
  }
  return stay(state);
}

Step on(Finished state, const Event&) { return stay(state); }
Step on(const Undone& state, const Event&) { return stay(state); }
Step on(const Held& state, const Event&) { return stay(state); }

}  // namespace

bool passes(const Error& error) { return error.retryable || error.code == Code::Unreachable; }

Step step(State state, const Event& event) {
  return std::visit([&](auto& now) { return on(now, event); }, state);
}

std::string_view event_name(const Event& event) {
  static constexpr std::array<std::string_view, std::variant_size_v<Event>> kNames = {
      "begin",           "reserved",     "attached",      "all-copied",  "nearly-copied", "strict-entered",
      "source-stopped",  "target-suspended", "migrate-ended", "settled", "rejoined", "link-down", "link-up", "handover-failed", "barrier-passed",
      "target-runs", "source-not-guarded", "committed",       "undone",       "action-failed", "trouble",     "cancel-wished"};
  return kNames.at(event.index());
}

std::string_view action_name(Do action) {
  switch (action) {
    case Do::Reserve: return "reserve";
    case Do::Attach: return "attach";
    case Do::Rejoin: return "rejoin";
    case Do::EnterStrict: return "enter-strict";
    case Do::StartMemory: return "start-memory";
    case Do::AbortMemory: return "abort-memory";
    case Do::Settle: return "settle";
    case Do::PassBarrier: return "pass-barrier";
    case Do::ResumeTarget: return "resume-target";
    case Do::Commit: return "commit";
    case Do::Undo: return "undo";
  }
  CHECK(false, "every action has a name");
}

std::string_view state_name(const State& state) {
  static constexpr std::array<std::string_view, std::variant_size_v<State>> kNames = {
      "reserving",       "attaching", "copying", "rejoining",   "synchronising", "moving-memory",
      "aborting-memory", "settling",  "resuming",  "committing", "finished",      "undoing",
      "undone",          "held"};
  return kNames.at(state.index());
}

Phase phase_of(const State& state) {
  return std::visit(Match{
                        [](const Reserving&) { return Phase::Reserve; },
                        [](const Attaching&) { return Phase::Attach; },
                        [](const Copying&) { return Phase::Copy; },
                        [](const Rejoining&) { return Phase::Copy; },
                        [](const Synchronising&) { return Phase::Synchronised; },
                        [](const MovingMemory& memory) {
                          if (memory.source_stopped) return Phase::Barrier;
                          if (!memory.strict) return Phase::Copy;
                          return memory.disks_equal ? Phase::Memory : Phase::Synchronised;
                        },
                        [](const AbortingMemory& aborting) { return aborting.go_on ? Phase::Copy : Phase::Undo; },
                        [](const Settling& settling) { return settling.go_on ? Phase::Copy : Phase::Undo; },
                        [](const Resuming&) { return Phase::Resume; },
                        [](const Committing&) { return Phase::Commit; },
                        [](const Finished&) { return Phase::Done; },
                        [](const Undoing&) { return Phase::Undo; },
                        [](const Undone&) { return Phase::Undo; },
                        [](const Held&) { return Phase::Barrier; },
                    },
                    state);
}

bool ended(const State& state) {
  return std::holds_alternative<Finished>(state) || std::holds_alternative<Undone>(state) ||
         std::holds_alternative<Held>(state);
}

std::string_view phase_name(Phase phase) {
  switch (phase) {
    case Phase::Plan: return "plan";
    case Phase::Reserve: return "reserve";
    case Phase::Attach: return "attach";
    case Phase::Copy: return "copy";
    case Phase::Synchronised: return "synchronised";
    case Phase::Memory: return "memory";
    case Phase::Barrier: return "barrier";
    case Phase::Resume: return "resume";
    case Phase::Switch: return "switch";
    case Phase::Commit: return "commit";
    case Phase::Done: return "done";
    case Phase::Undo: return "undo";
  }
  CHECK(false, "every phase has a name");
}

}  // namespace drover::job
