// SPDX-License-Identifier: Apache-2.0
//
// The driver of job/move_machine.h: carries out what the machine says, and tells it what happened.
// job::move() (job/move.h) is this with the real world.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "job/move.h"
#include "job/platform.h"
#include "job/prepare.h"

namespace drover::job {

// For the test that the simulation notices each missing rule; see tests/sim.
struct MoveMutation {
  bool skip_drain = false;         // the barrier does not wait for what is on its way
  bool skip_barrier = false;       // the target is resumed without the proof
  bool forget_lost_mirror = false; // a mirror that ended early does not matter
  bool no_guard = false;           // the source's images are not guarded
  bool forget_target_ran = false;  // a resumed job asks only where the guest runs now
  bool forget_autostart = false;   // it stays off on the source
  bool ignore_stamps = false;      // whether the source's images were written to since is not looked at
  bool blind_settle = false;       // after a failed migration the guest is taken to be here
  bool resume_once = false;        // a resume whose answer was lost is taken for refused
  bool commit_unseen = false;      // nobody looks whether the target runs and the source is gone
  bool delete_before_journal = false;
  bool forget_missed = false;      // what was written without a mirror is not looked up in the bitmaps
  bool trust_records = false;      // the journal is believed although QEMU was restarted
  bool send_unrecorded = false;    // also what the journal could not be told of
  bool forget_went_on = false;     // the target runs although the source went on and has ended since
  bool believe_empty_journal =
      false;                 // begun beside a damaged one, it is taken for all that is known
  bool skip_verify = false;  // --verify finds everything right at once
  bool forget_max_slowdown = false;  // writes wait for as long as they do by default
  bool undo_keeps_mirrors = false; // an undo leaves the mirrors to end by themselves
};

// The job on disk, as the runner needs it (job/job_store.h).
struct JobFiles {
  std::string id;
  std::string directory;                        // for messages
  std::string journal;                          // its directory
  bool resumed = false;                         // an earlier process has worked on it
  std::function<void(std::string_view)> state;  // is told each new state's name; may be empty
  // Bytes per second, zero: no limit; may be changed while the job runs.
  std::shared_ptr<std::atomic<std::uint64_t>> bandwidth;
  std::shared_ptr<std::atomic<mirror::Compression>> compression;  // likewise; a relocation has none
  MoveMutation mutation;
};

struct MoveEnd {
  Result<Summary> result;
  // Nothing of it is left to be done: its files may go. Otherwise it can be resumed, or cancelled.
  bool over = true;
  bool partly = false;  // an error, and something of what was asked for was done all the same
};

// Where QEMU reaches the job's endpoint of that name: a disk's, or its exports'.
std::string endpoint_socket(const memmig::GuestInfo& guest, std::string_view name);

// `undo_because`: a resumed job is undone, if that is still possible.
// Blocks until the job has ended; errors as job::move(). The plan has no blocker.
MoveEnd run_move(Platform& platform, const MoveOptions& options, Observer& observer, Cancel& cancel, Prepared prepared,
                 const JobFiles& files, std::optional<Error> undo_because = {});

}  // namespace drover::job
