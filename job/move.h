// SPDX-License-Identifier: Apache-2.0
//
// The main job: move a running guest, disks and memory, to another host. What the command line calls.
//
//   job::MoveOptions options{.guest = "web1", .host = "hostb"};
//   job::Cancel cancel;
//   Result<job::Summary> summary = job::move(options, observer, cancel);
//
// Threads: move() and plan_move() block until the job has ended; they may be called from any thread,
// one per job. The observer is called from threads of the job's, one call at a time; it must return
// soon. Cancel::request() may be called from any thread and from a signal handler.
//
// Errors: Blocked when the plan has a blocker (Plan::findings say which; the observer got the plan);
// Cancelled when the user asked; otherwise what went wrong. After an error before the barrier nothing is
// left of the move on either host and the guest runs on; where that is not so, the message says what
// holds where and what to do (Held: it stopped half-way, with nothing deleted).
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "memmig/preflight.h"
#include "mirror/compression.h"

namespace drover::job {

struct MoveOptions {
  std::string guest;  // name or UUID
  std::string host;   // an SSH destination
  std::map<std::string, std::string> disk_paths;  // "vda" -> absolute path on the target
  std::string source_uri = "qemu:///system";
  std::string target_uri;      // empty: qemu+ssh://HOST/system
  std::string target_address;  // for the link; empty: where SSH goes
  std::vector<std::string> via;  // instead: several, over which the link's connections are spread
  std::uint16_t target_port = 0;  // the receiver listens on it; 0: any
  bool keep_source = false;    // the disks' files and the definition stay (the guest is off here)
  Length bandwidth;            // per second, for the disks' copy and the memory; zero: no limit
  std::chrono::milliseconds max_downtime{500};
  unsigned connections = 2;    // data connections of the link
  unsigned memory_channels = 0;  // connections of the guest's memory, 1 to 8; 0: job/memory_channels.h says
  mirror::Compression compression;  // of what goes over it
  bool keep_partial = false;   // after a cancel or a failure the target's images stay for a resume
  // In the handover a guest's write waits for the target when the link is slower than the guest writes; one that would
  // wait for longer ends that handover. 10 ms to 1 min.
  std::chrono::milliseconds max_slowdown{5000};
  // Before the handover all that the target has is read back, past its caches where its filesystem can, and
  // compared with the source.
  bool verify = false;
  // What the target has already, of other images, is not sent (mirror/content_index.h).
  bool use_index = true;
  std::chrono::milliseconds link_timeout{0};  // without a link for so long it is undone; 0: never
  // Test switch: at the barrier, when both sides are equal and still, this file is created and the job
  // waits until it is gone.
  // For tests: the guest's QEMU is started on the target as soon as copying has begun (job/copy_lead.h).
  bool start_target_at_once = false;
  std::string hold_barrier_file;
};

enum class Phase {
  Plan,
  Reserve,
  Attach,
  Copy,
  Synchronised,
  Memory,
  Barrier,
  Resume,
  Switch,  // of a relocation: the guest goes over to the new images
  Commit,
  Done,
  Undo,
};
std::string_view phase_name(Phase phase);  // "plan", "reserve", ...
std::optional<Phase> phase_of_name(std::string_view name);

// What kind of job: the plan and the summary say it.
enum class Kind { Move, Relocate };
std::string_view kind_name(Kind kind);  // "move", "relocate"
std::optional<Kind> kind_of_name(std::string_view name);

struct DiskPlan {
  std::string disk;  // "vda"
  std::string source_path;
  std::string source_format;
  bool source_block_device = false;
  std::string target_path;
  std::string target_format;
  bool target_block_device = false;
  bool delete_source = false;  // after Commit
  bool renamed = false;        // Relocate: the same file gets another name, nothing is copied
  Length virtual_size;
  Length allocation;  // what it takes on the source; zero: not known
};

struct Plan {
  Kind kind = Kind::Move;
  std::string guest;
  std::string uuid;
  std::string host;  // Relocate: the directory or pool, or "other places"
  Length memory;
  std::vector<DiskPlan> disks;  // those that move
  std::vector<memmig::Finding> findings;
  [[nodiscard]] bool blocked() const;
};

struct DiskProgress {
  std::string disk;
  Length size;         // as the guest sees it
  Length data;         // of it, what has to be copied (holes are not); 0 until that is known
  Length copied;       // of it, what the target has acknowledged; never falls
  Length dirty;        // to be copied (again), now
};

// The guest's writes during the handover, when they may wait for the target.
struct Slowdown {
  std::uint64_t writes = 0;
  std::chrono::microseconds waited{0};   // all of them together
  std::chrono::microseconds longest{0};  // one of them
  bool operator==(const Slowdown&) const = default;
};

struct Progress {
  Phase phase = Phase::Plan;
  std::chrono::milliseconds elapsed{0};  // since the job began
  std::vector<DiskProgress> disks;
  Length data;    // of all disks
  Length copied;
  Length rate;    // per second, over the last seconds
  std::optional<std::chrono::seconds> time_left;  // of the present phase; absent: not known
  std::uint64_t mirrored_writes = 0;  // the guest's writes that came through the mirror
  Length wire_bytes;                  // sent to the target so far, memory included
  Length saved_bytes;                 // not sent, thanks to compression
  std::string compression;            // what it is at now: "none", "lz4", "zstd:1"; empty: there is no link
  Length memory_total;                // Memory: what QEMU says
  Length memory_remaining;
  std::string waiting_for;            // what holds it up, for people; empty: nothing
  std::chrono::milliseconds waiting{0};  // for how long (job/broadcast.h fills it in)
  Length to_verify;             // of all disks, not compared yet; zero: nothing (any more)
  Slowdown slowdown;
  Length sent_again;            // of what the target had acknowledged or been sent before
  std::uint64_t reconnects = 0;
  Length found;                 // what was not sent because the target had it of other images
};

// Where the time went while the guest ran nowhere. It is quiesce, then the longer of disks and memory, which go on at
// the same time, then wait, guard and resume.
struct BlackoutParts {
  std::chrono::microseconds quiesce{0};  // QEMU drains the stopped guest's disks
  std::chrono::microseconds disks{0};    // until the barrier is passed:
  std::chrono::microseconds drain{0};    //   the target answers what is on its way
  std::chrono::microseconds barrier{0};  //   its proof, flush and release are asked for and answered; on the target:
  std::chrono::microseconds compare{0};
  std::chrono::microseconds flush{0};
  std::chrono::microseconds release{0};
  std::chrono::microseconds memory{0};   // until the target's QEMU has all memory and devices, and libvirt says so
  std::chrono::microseconds wait{0};     // until drover acts on the later of both
  std::chrono::microseconds guard{0};    // the source's images are locked
  std::chrono::microseconds resume{0};   // from the command until the guest runs
  bool operator==(const BlackoutParts&) const = default;
};

struct Summary {
  Kind kind = Kind::Move;
  std::string guest;
  std::string host;
  std::vector<DiskPlan> disks;
  Length data;           // read from the source's disks
  Length wire_bytes;     // sent, memory included
  Length memory_bytes;   // of it
  Length saved_bytes;    // not sent, thanks to compression
  std::uint64_t mirrored_writes = 0;
  std::vector<std::pair<Phase, std::chrono::milliseconds>> phase_times;  // in their order
  std::chrono::milliseconds total{0};
  // Guest stopped on the source to guest running on the target, by this host's clock.
  std::chrono::microseconds blackout{0};
  std::optional<BlackoutParts> blackout_parts;  // none: another process saw a part of it
  std::vector<std::string> deleted;  // source files
  std::vector<std::string> kept;     // and those that were left, with why in the notes
  std::vector<std::string> notes;    // what the user should know
  bool verified = false;             // all was read back and compared before the handover
  std::uint64_t damaged = 0;         // chunks that differed, and were sent again
  std::uint64_t unverified = 0;      // chunks that the guest wrote too often to tell
  Slowdown slowdown;                 // as in Progress
  Length sent_again;                 // as in Progress
  std::uint64_t reconnects = 0;
  Length found;                      // as in Progress
  Length runner_peak_memory;         // resident, of the two agents
  Length receiver_peak_memory;
};

class Observer {
 public:
  virtual ~Observer() = default;
  // The job is on disk under this id: it can be watched, cancelled and, should it be killed, resumed.
  virtual void started(const std::string& id) = 0;
  virtual void planned(const Plan& plan) = 0;
  virtual void progress(const Progress& progress) = 0;  // a few times a second, and at each new phase
  virtual void note(const std::string& text) = 0;       // something the user should know now
};

class Cancel {
 public:
  // Async-signal-safe. Before the barrier the job is undone; later it is finished.
  void request();
  [[nodiscard]] bool requested() const { return requested_.load(); }
  // A descriptor that becomes readable with the request (an eventfd).
  [[nodiscard]] int fd() const { return fd_; }
  Cancel();
  ~Cancel();
  Cancel(const Cancel&) = delete;
  Cancel& operator=(const Cancel&) = delete;

 private:
  std::atomic<bool> requested_{false};
  int fd_ = -1;
};

// Examines both hosts and says what a move would do and what would stop it; changes nothing.
// `drover check` and `--dry-run`.
Result<Plan> plan_move(const MoveOptions& options, Cancel& cancel);

Result<Summary> move(const MoveOptions& options, Observer& observer, Cancel& cancel);

// Goes on with a job whose process has ended. NotFound; Busy if its process lives. What the observer
// and Cancel do is as with move().
Result<Summary> resume(const std::string& id, Observer& observer, Cancel& cancel);

// Undoes a job whose process has ended: afterwards nothing is left of it on either host and the guest
// runs here. NotFound; Busy if its process lives; Held if it is too late for that.
Status cancel(const std::string& id, Observer& observer, Cancel& cancel);

}  // namespace drover::job
