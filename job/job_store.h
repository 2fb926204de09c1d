// SPDX-License-Identifier: Apache-2.0
//
// Jobs on disk: STATE/jobs/ID/ has one job, as long as it isn't finished or undone:
//
//   job.json      what was asked for and planned; written once, on stable storage before anything
//   else lock          held (flock) as long as a process works on the job; its process id journal/
//   what the job has decided and copied (job/journal.h) status.json   how far it was about a second
//   ago; not synced, for people control.sock  the way to the process that works on it
//   (job/control.h)
//
// and LOGS/ID.log. When a job ends its directory goes and a line is added to STATE/history.jsonl.
// The link's key is in none of these: a resumed job makes a new one.
//
// The runner:
//
//   JobStore store;                                      // or JobStore(places), for tests
//   DROVER_ASSIGN(auto job, store.create({.options = options, .plan = plan}));
//   DROVER_TRY(log_to_file(job->log_path()));
//   DROVER_ASSIGN(auto journal, Journal::open(job->journal_directory()));
//   StatusWriter status(job->status_path());
//   ...                                                  // see job/broadcast.h
//   job->finish({.outcome = Outcome::Moved});            // or leave it: it can be resumed
//
//   DROVER_ASSIGN(auto job, store.open(id));             // resume: Busy if its process lives
//
// Threads: a JobStore may be used on any, also at once; a Job and a StatusWriter belong to one at a
// time (StatusWriter::current() may be called from any). Calls block on the disk.
//
// Errors: NotFound, Busy, AlreadyExists; Io for a job whose files are damaged (they are never
// deleted for that); Incompatible for one that a newer drover wrote.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "job/events.h"
#include "job/move.h"
#include "job/relocate.h"

namespace drover::job {

using WallTime = std::chrono::system_clock::time_point;  // for people: never to measure with

// job.json.
struct JobRecord {
  static constexpr std::uint64_t kVersion = 1;
  std::string id;  // 1 to 64 of [A-Za-z0-9._-], no dot first; create() makes it when it is empty
  MoveOptions options;                        // of a move
  std::optional<RelocateOptions> relocation;  // there: it is a relocation
  Plan plan;                                  // guest, uuid, host, disks
  WallTime created{};                         // create() fills in this and the next
  pid_t pid = 0;                              // of the process that began it
  std::map<std::string, std::string> state;   // whatever else the job has to find again

  [[nodiscard]] Kind kind() const { return relocation ? Kind::Relocate : Kind::Move; }
  [[nodiscard]] nlohmann::json to_json() const;
  // Strict: a member that is missing or of a wrong type or range is Protocol, a newer version
  // Incompatible. Members that are not known are ignored.
  static Result<JobRecord> from_json(const nlohmann::json& json);
};

// status.json.
struct JobStatus {
  std::string state;  // the state machine's name for it; may be empty
  Progress progress;
  std::optional<Error> last_error;  // what went wrong last, though the job goes on
  WallTime updated{};

  [[nodiscard]] nlohmann::json to_json() const;
  static Result<JobStatus> from_json(const nlohmann::json& json);
};

// Keeps status.json: written when the phase, the state, the error or what is waited for changes,
// and else about once a second. A file that can't be written is logged once; the job doesn't depend
// on it.
class StatusWriter {
 public:
  static constexpr Duration kInterval = std::chrono::seconds(1);

  explicit StatusWriter(std::string path) : path_(std::move(path)) {}
  void progress(const Progress& progress);
  void state(std::string_view name);
  void error(std::optional<Error> error);
  // Writes what has not been written.
  void flush();
  // What it would be told now; for `status` on the control socket.
  [[nodiscard]] JobStatus current() const;

 private:
  void changed(bool at_once);

  const std::string path_;
  mutable std::mutex mutex_;  // guards status_
  JobStatus status_;
  Instant written_{};
  bool pending_ = false;
  bool complained_ = false;
};

// Partly: a relocation some of whose disks went.
enum class Outcome { Moved, Undone, Partly };
std::string_view outcome_name(Outcome outcome);

// One line of history.jsonl.
struct HistoryEntry {
  std::string id;
  std::string kind;
  std::string guest;
  std::string uuid;
  std::string host;
  Outcome outcome = Outcome::Moved;
  WallTime created{};
  WallTime ended{};
  std::optional<Error> reason;     // Undone: why
  std::optional<Summary> summary;  // Moved

  [[nodiscard]] OrderedJson to_json() const;
  static Result<HistoryEntry> from_json(const nlohmann::json& json);
};

// How a job ended, for its line in the history.
struct Ending {
  Outcome outcome = Outcome::Moved;
  std::optional<Error> reason;
  std::optional<Summary> summary;
};

struct JobPlaces {
  std::string state = "/var/lib/drover";
  std::string logs = "/var/log/drover";
  [[nodiscard]] std::string jobs() const { return state + "/jobs"; }
  [[nodiscard]] std::string history() const { return state + "/history.jsonl"; }
};

// A job that this process works on: its lock is held until this goes.
class Job {
 public:
  [[nodiscard]] const JobRecord& record() const { return record_; }
  [[nodiscard]] const std::string& id() const { return record_.id; }
  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] std::string journal_directory() const { return directory_ + "/journal"; }
  [[nodiscard]] std::string status_path() const { return directory_ + "/status.json"; }
  [[nodiscard]] std::string control_socket() const { return directory_ + "/control.sock"; }
  [[nodiscard]] std::string log_path() const { return places_.logs + "/" + record_.id + ".log"; }

  // The job is over: a line in the history, and the directory goes. Close the journal and the
  // control socket before. An error of the history is logged: it keeps no job.
  Status finish(const Ending& ending);

  // Releases the lock; leaves the files, for a resume.
  ~Job() = default;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

 private:
  friend class JobStore;
  Job(JobPlaces places, std::string directory, JobRecord record, UniqueFd lock)
      : places_(std::move(places)),
        directory_(std::move(directory)),
        record_(std::move(record)),
        lock_(std::move(lock)) {}

  const JobPlaces places_;
  const std::string directory_;
  const JobRecord record_;
  UniqueFd lock_;
};

class JobStore;

// While it lives no job begins or ends on this host: for what is quick.
class JobPause {
 public:
  // Nor is a job of this guest at work, or taken up again. Busy: one is.
  Status guest(const std::string& uuid);

 private:
  friend class JobStore;
  JobPause(const JobStore& store, UniqueFd state) : store_(&store), state_(std::move(state)) {}
  const JobStore* store_;
  UniqueFd state_;
  std::map<std::string, std::unique_ptr<Job>> stopped_;  // by their ids
};

// What can be seen of a job from outside.
struct JobView {
  std::string id;
  std::string directory;
  bool alive = false;               // a process holds its lock
  pid_t pid = 0;                    // that process; 0: none, or not known
  std::optional<JobRecord> record;  // absent: damaged says why
  std::optional<JobStatus> status;  // absent: none was written yet, or it can't be read
  std::string damaged;              // for people; empty: nothing is
};

struct History {
  std::vector<HistoryEntry> entries;  // the oldest first
  std::size_t damaged = 0;            // lines that can't be read
};

class JobStore {
 public:
  static constexpr std::size_t kMostHistory = 1000;

  explicit JobStore(JobPlaces places = {}) : places_(std::move(places)) {}
  [[nodiscard]] const JobPlaces& places() const { return places_; }

  // AlreadyExists, with what can be done, if the guest has a job already.
  Status check_no_job(const Plan& plan) const;
  // Makes the job's directory and takes its lock. Errors: check_no_job().
  Result<std::unique_ptr<Job>> create(JobRecord record) const;
  // Takes the lock of a job that nobody works on.
  Result<std::unique_ptr<Job>> open(const std::string& id) const;

  // Waits for whoever else does that. The store outlives it.
  Result<JobPause> pause() const;

  Result<JobView> look(const std::string& id) const;
  // By their ids' order. A job that can't be read is in it, and says so.
  Result<std::vector<JobView>> list() const;
  // The job with this id, or the only one of the guest with this name or UUID. NotFound;
  // InvalidArgument if there are several.
  Result<JobView> find(const std::string& id_or_guest) const;

  Result<History> history() const;

 private:
  JobPlaces places_;
};

// "web1-1f3a5c77": the guest's name as far as it goes into a file's name, and four random bytes.
std::string new_job_id(const std::string& guest);

}  // namespace drover::job
