// SPDX-License-Identifier: Apache-2.0
//
// Simulation of one disk's mirror, from the guest's write to the target's bytes: the real
// DiskMirror, Arbiter, frame codec and Applier, with a fake QEMU, fake disks, a fake network and a
// virtual clock, all driven by one seed. A byte model decides.
//
// The fault model:
//  - A guest's write reaches the source first, in two halves with time between them, and is sent to
//    the mirror only then (as QEMU does); up to 16 are in flight, those that overlap wait for each
//    other. A discard leaves zeroes, the old bytes, or some of each.
//  - A copy read is torn: its parts see the source at different moments between issue and
//  completion.
//    What is said of holes may be older than the answer, and may stop early.
//  - Frames keep their order on a lane and have none between lanes; a lane may be slow, or lost
//  with
//    what it carried (a prefix arrives), and comes back after what had arrived has been applied.
//  - The target's writes land in any order, in parts, between issue and completion.
//  - The target's disk tells what was written from what is synced: a flush syncs, some is synced at
//  any
//    time; a restart loses all lanes and, sector by sector, some of what was not synced.
//  - The runner dies: its mirror and arbiter go, its lanes are lost. QEMU goes on with its dirty
//  bitmaps (set
//    when a write is on the source). Another runner restores what the journal holds (some records
//    damaged), marks what the bitmaps say, and goes on. The driver alternates bitmaps and stores
//    records as mirror/arbiter.h says.
//  - Lanes may be down for long, while the guest writes.
//  - In some runs the target has other images with some of the disk's content (tests/sim/sim_content.h):
//    what is copied for the first time is offered then.
//  - The target's disk is damaged once, here and there, when all is copied; then all of it is verified.
//  - Time jumps, so that writes on their way are given up.
// Then everything heals, the handover's strict mode begins, the guest stops, and the run must end
// with the target equal to the source, byte for byte.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "mirror/apply.h"
#include "mirror/arbiter.h"

namespace drover::sim {

struct MirrorSimOptions {
  mirror::Arbiter::Options::Mutation mutation;  // rules to switch off
  mirror::Applier::Options applier;
  bool trace = false;  // print each step to standard output
};

struct MirrorSimStats {
  std::uint64_t steps = 0;
  std::uint64_t guest_writes = 0;
  std::uint64_t forwarded = 0;
  std::uint64_t copies = 0;
  std::uint64_t expired = 0;
  std::uint64_t lanes_lost = 0;
  std::uint64_t crashes = 0;    // of the runner
  std::uint64_t restarts = 0;   // of the target
  std::uint64_t rotations = 0;  // of QEMU's bitmaps
  std::uint64_t damaged = 0;    // chunks that verification found
  std::uint64_t offers = 0;
  std::uint64_t not_found = 0;  // offers of which something was not found

  MirrorSimStats& operator+=(const MirrorSimStats& other);
};

// Runs one seed to its end. The violation it found, or nothing. Same seed, same run, always.
std::optional<std::string> run_mirror_sim(std::uint64_t seed, const MirrorSimOptions& options,
                                          MirrorSimStats* stats = nullptr);

}  // namespace drover::sim
