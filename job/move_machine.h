// SPDX-License-Identifier: Apache-2.0
//
// The move as a pure state machine: what has happened goes in, what to do next comes out. No I/O, no
// clock, no thread; the driver is job/move.cc.
//
//   Reserving -> Attaching -> Copying -> Synchronising -> MovingMemory -> Resuming -> Committing -> Finished
//       |            |          |  ^ |          |          ^    |             |
//       |            |          |  | +----------|----------+    |             |
//       |            |          |  +--Rejoining-+---------------+             |
//       +------------+----------+---------------+---------------+             |
//                              v                               |             |
//       (AbortingMemory -> Settling ->) Undoing -> Undone      +--> Held <---+
//
// A job that is resumed begins in Settling: where is the guest? Then it goes on from there.
//
// What passes (the link is down, QEMU let go of a mirror, the target did not keep up) is no reason to give the
// move up: it goes back to Copying, by way of Rejoining where something has to be made anew.
//
// Copying goes straight to MovingMemory where its end is near: the target's QEMU is started meanwhile, and strict mode
// is entered from there. Until then none of the memory moves.
//
// What can no longer change from where on:
//  - until MovingMemory everything can be undone, and is, on any error and on the user's wish;
//  - in MovingMemory, once the source has stopped for good, there is no way back: its images are
//    complete and still, and this process sends from them whatever is missing. Where a person has to
//    decide, the job is Held, with nothing deleted on either side;
//  - the target is resumed only after the barrier (invariant 5), the source is deleted only after the
//    target was seen running and that was journaled (invariant 4).
//
// Threads: none.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/result.h"
#include "job/move.h"

namespace drover::job {

// --- what has happened ---
struct Begin {};
struct Reserved {};       // images, receiver, link are there
struct Attached {};       // the mirrors carry the guest's writes, copying has begun
struct AllCopied {        // strict: nothing is left to copy on any disk; else: so little that the handover
  bool strict = false;    // may begin
};
struct NearlyCopied {};     // what is left takes no longer than starting the guest's QEMU on the target
struct StrictEntered {};
struct SourceStopped {};    // for the handover: drained, every write answered
struct TargetSuspended {};  // memory is over there, the target guest stands still
struct MigrateEnded {       // libvirt's call has returned
  Status status;
};
// Where the guest is after a migration that failed.
enum class Whereabouts {
  Source,  // it runs there, or was shut off there: its images there are the truth
  Target,  // gone on the source, stands still on the target: the migration was complete all the same
  TargetRuns,  // it was resumed there
};
struct Settled {
  Whereabouts where = Whereabouts::Source;
};
struct Rejoined {};         // receiver, link and mirrors are there again, what was missed is known
struct LinkDown {};         // the link tries to come up again by itself
struct LinkUp {};
struct HandoverFailed {     // what the handover rests on is gone for now: strict mode, a mirror
  Error error;
};
struct BarrierPassed {};
struct TargetRuns {};
struct SourceNotGuarded {   // somebody has its images open again: perhaps libvirt has resumed it
  Error error;
};
struct Committed {};
struct Undone_ {};        // the undo has done all it could
struct ActionFailed {     // the action under way did not succeed
  Error error;
};
struct Trouble {          // link lost, disk error, mirror gone, guest gone
  Error error;
};
struct CancelWished {};

using Event = std::variant<Begin, Reserved, Attached, AllCopied, NearlyCopied, StrictEntered, SourceStopped,
                           TargetSuspended, MigrateEnded, Settled, Rejoined, LinkDown, LinkUp, HandoverFailed, BarrierPassed, TargetRuns,
                           SourceNotGuarded, Committed, Undone_, ActionFailed, Trouble, CancelWished>;
std::string_view event_name(const Event& event);

// --- what to do ---
enum class Do {
  Reserve,
  Attach,
  Rejoin,        // whatever is missing of receiver, link and mirrors, and what the mirrors missed
  EnterStrict,
  StartMemory,   // returns at once; MigrateEnded comes later. The engine lets the memory pass only while
                 // the disks are equal, in strict mode
  AbortMemory,   // returns at once
  Settle,        // find out where the guest is, and make the source run if it can only be there
  PassBarrier,   // drain, prove, flush, release
  ResumeTarget,  // guard the source's images, then resume
  Commit,        // journal it, then undefine and delete the source, end the receiver
  Undo,
};
std::string_view action_name(Do action);

// --- where it is ---
struct Reserving {
  bool begun = false;
};
struct Attaching {};
struct Copying {};
struct Rejoining {
  bool again = false;   // a mirror was lost again, meanwhile
};
struct Synchronising {
  bool copied = false;  // strictly
};
struct MovingMemory {
  bool strict = false;          // or told to be
  bool disks_equal = false;
  bool source_stopped = false;
  bool barrier_passed = false;
  bool target_suspended = false;
  bool migrate_ended = false;
  bool link_down = false;
  bool barrier_failed = false;  // for want of the link: again when it is up
};
struct AbortingMemory {
  Error reason;
  bool barrier_passed = false;
  bool go_on = false;  // the move is not given up: it goes back to copying
  bool link_down = false;
};
struct Settling {
  Error reason;
  bool barrier_passed = false;
  bool go_on = false;
};
struct Resuming {
  bool migrate_ended = false;
  bool target_runs = false;
};
struct Committing {};
struct Finished {};
struct Undoing {
  Error reason;
};
struct Undone {
  Error reason;
  bool complete = true;  // nothing is left of the move on either host
};
struct Held {
  Error reason;
};
using State =
    std::variant<Reserving, Attaching, Copying, Rejoining, Synchronising, MovingMemory, AbortingMemory, Settling,
                 Resuming, Committing, Finished, Undoing, Undone, Held>;
std::string_view state_name(const State& state);
Phase phase_of(const State& state);
// What an action failed for is out of reach only for now.
bool passes(const Error& error);
// Nothing more will happen.
bool ended(const State& state);

struct Step {
  State state;
  std::vector<Do> actions;  // in this order
};
// Every pair of state and event is answered: what makes no difference there is ignored.
Step step(State state, const Event& event);

}  // namespace drover::job
