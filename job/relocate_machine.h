// SPDX-License-Identifier: Apache-2.0
//
// The relocation as a pure state machine: what has happened and what is seen goes in, what to do
// next comes out. No I/O, no clock, no thread; the driver is job/relocation.cc.
//
//   Making -> Copying -> Switching -> Committing -> Finished        the guest's QEMU copies
//             CopyingCold -> Pointing -^                            it is off: drover copies
//   on an error, and on the user's wish, while no disk has gone over: Undoing -> Undone
//   where a person must decide: Held, with nothing deleted
//
// A job that is resumed begins in Settling: where are the disks? Then it goes on from there.
//
// It goes by what is seen (Seen: where each disk is, what its copy does), not by what was asked
// for: libvirt may carry out a call whose answer is lost, and end a job that nobody asked to end.
// So a call that failed for want of libvirt needs no special case: the next look says what came of
// it.
//
// What can no longer change from where on:
//  - until the first disk has gone over to its new image everything can be undone, and is;
//  - from then on that disk is where it is. Should another one fail, those that went are finished,
//    and the job's end says so;
//  - old images are deleted in Committing only, when both definitions name the new ones, and that
//  was
//    journaled.
//
// Threads: none.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>
#include <variant>
#include <vector>

#include "base/result.h"
#include "job/move.h"

namespace drover::job::relocation {

// --- what has happened ---
struct Begin {};
struct Made {};  // the target images are there
struct DiskSeen {
  enum class Copy { None, Running, Ready };
  bool switched = false;  // the guest uses the new image (is off: its definition names it)
  Copy copy = Copy::None;
  std::optional<Error> failure;  // why its copy ended, as far as it is known
};
// One look at the guest. Never older than the last action.
struct Seen {
  bool exists = true;
  bool runs = false;  // or stands still
  std::vector<DiskSeen> disks;
};
struct Copied {};          // cold
struct Pointed {};         // the definition names the new images
struct Dropped {           // nothing is left of the images that are not used
  bool some_went = false;  // and some are: those disks had gone over already
};
struct Committed {};
struct CancelWished {};
// Which of its images is the newest cannot be told: it ended, or libvirt lost it, as it changed
// over.
struct Doubtful {
  Error error;
};
struct Woken {};  // something may be seen now; the machine itself has no use for it
enum class Do {
  Make,       // the images of all disks that are neither switched nor being copied, anew
  StartCopy,  // of one disk
  Pivot,      // one disk; returns at once
  CopyCold,   // the images of all disks that are not switched, anew; returns at once
  Point,      // give them their names, change the definition
  Drop,       // end the copies of the disks that are not switched, remove their images
  Commit,     // check both definitions, flush, delete the old images
};
struct Action {
  Do what = Do::Make;
  std::size_t disk = 0;  // StartCopy, Pivot
  bool operator==(const Action&) const = default;
};
struct ActionFailed {
  Action action;
  Error error;
};
using Event = std::variant<Begin, Made, Seen, Copied, Pointed, Dropped, Committed, CancelWished,
                           Doubtful, Woken, ActionFailed>;
std::string_view event_name(const Event& event);
std::string_view action_name(Do action);

// --- where it is ---
struct Settling {
  std::optional<Error> undo;  // it is to be undone, if that is still possible
};
struct Making {
  bool some_switched = false;  // before this process began; as below
};
enum class Stage { Waiting, Started, Copying, Ready, Switched };
struct Copying {
  std::vector<Stage> disks;
};
struct Switching {
  std::vector<Stage> disks;
  std::optional<std::size_t> asked;  // this disk's pivot is under way
};
struct CopyingCold {
  bool begun = false;
  bool some_switched = false;
};
struct Pointing {
  bool some_switched = false;
};
struct Committing {
  std::optional<Error> partly;  // why not all disks went
};
struct Finished {
  std::optional<Error> partly;
};
struct Undoing {
  Error reason;
};
struct Undone {
  Error reason;
  bool complete = true;  // nothing is left of it
};
struct Held {
  Error reason;
};
using State = std::variant<Settling, Making, Copying, Switching, CopyingCold, Pointing, Committing,
                           Finished, Undoing, Undone, Held>;
std::string_view state_name(const State& state);
Phase phase_of(const State& state);
// Nothing more will happen.
bool ended(const State& state);

struct Limits {
  std::size_t disks = 0;
  std::size_t parallel = 4;  // that are copied at once; those that are ready do not count
};

struct Step {
  State state;
  std::vector<Action> actions;  // in this order
};
// Every pair of state and event is answered: what makes no difference there is ignored.
Step step(State state, const Event& event, const Limits& limits);

}  // namespace drover::job::relocation
