// SPDX-License-Identifier: Apache-2.0
//
// Simulation of a whole move, driven by one seed: the real job driver and its state machine (job/),
// the real EngineCore, DiskMirror, Arbiter, LaneQueue, frame codec, lane digest and Applier
// (mirror/), on one virtual clock; fakes for QEMU and the guest, both libvirts, the network, the
// receiver, disks and journal. What is checked are the invariants of a move, at the moment when
// they matter.
//
// The fault model:
//  - The guest writes, zeroes and discards until the end, up to six requests at once, wherever it
//    runs. A write is complete on the source's disk first, then goes to the mirror, and is answered
//    when that has answered (or has broken), in the handover within --max-slowdown. Its user may
//    pause it, let it go on, or switch it off. Somebody may end a mirror.
//  - Reads of the source are torn. Storage on either host stalls, or fails to read or write, for a
//    while; the target's gets full. What the target has written is not on stable storage until it
//    is flushed: a host that restarts keeps any part of the rest.
//  - In some runs the target has other images with some of the disk's content, and an index of them
//    (tests/sim/sim_content.h); in others its receiver does not know what an index is.
//  - The network is cut for microseconds to minutes: what was sent waits, as in TCP's buffers.
//    Silence is noticed by either side after its time. All connections of the link may be reset.
//    Messages keep their order on a connection, and have none between connections. SSH and the
//    target's libvirt share the fate.
//  - Calls to libvirt fail (nothing was done), or their answer is lost with the connection (it was
//    done). Events come late, twice, or not at all. libvirt restarts on either host: its
//    connections break, a migration in its hands is taken back or left as docs/handover.md says.
//    The last step of a migration may succeed on the target without the source's side hearing of
//    it. The target's QEMU may refuse to resume. In some runs that last step is lost with the
//    network, libvirt lets the source go on, and then the source's host restarts.
//  - Receiver, target host, runner and source host are killed at any step. The runner's fibers
//    unwind, but nothing that they do on the way reaches anybody; what it held (locks, sockets,
//    connections) is let go of. A source that has restarted may have its guest started again.
//  - The user cancels, in some runs with --keep-partial. The job's journal can't be written for a
//    while, or is damaged when the runner is killed.
//  - Up to the moment when --verify begins, the target's storage may not keep what is written to
//  it, and say nothing:
//    then no block of the images may differ when the target runs. (What is damaged later nobody
//    looks at again.)
// Then everything heals. A job whose process is dead, or that says that it can be gone on with, is
// resumed or cancelled by a further process, up to seven times, and must come to its end: moved,
// undone, or held with nothing deleted.
//
// Not played: several jobs, block devices, qcow2's own metadata, the pre-flight, TLS and its
// handshakes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "job/run_move.h"
#include "mirror/arbiter.h"
#include "tests/sim/sim_target.h"

namespace drover::sim {

struct MoveSimOptions {
  job::MoveMutation job;  // rules to switch off
  TargetMutation target;
  mirror::Arbiter::Options::Mutation arbiter;
  bool trace = false;  // print what happens to standard output
};

struct MoveSimStats {
  std::uint64_t seeds = 0;
  std::uint64_t steps = 0;
  std::uint64_t guest_writes = 0;
  std::uint64_t faults = 0;
  std::uint64_t moved = 0;
  std::uint64_t undone = 0;
  std::uint64_t held = 0;
  std::uint64_t killed = 0;   // the runner died, and there was nothing to go on with
  std::uint64_t resumed = 0;  // further processes
  std::uint64_t kept = 0;     // undone but for what was copied, which a further process goes on with
  std::uint64_t worst_write_us = 0;

  MoveSimStats& operator+=(const MoveSimStats& other);
};

// Runs one seed to its end. The violation it found, or nothing. Same seed, same run, always.
std::optional<std::string> run_move_sim(std::uint64_t seed, const MoveSimOptions& options,
                                        MoveSimStats* stats = nullptr);

}  // namespace drover::sim
