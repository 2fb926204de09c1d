// SPDX-License-Identifier: Apache-2.0
#include "job/job_store.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "base/check.h"
#include "base/log.h"
#include "job/memory_channels.h"
#include "mirror/addresses.h"
#include "mirror/session.h"

namespace drover::job {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;

constexpr std::size_t kLargestFile = std::size_t{4} << 20;
constexpr std::size_t kLargestHistory = std::size_t{64} << 20;
constexpr std::uint64_t kLastSecond = std::uint64_t{1} << 40;
constexpr mode_t kOwnerOnly = 0700;
constexpr const char* kRecordFile = "/job.json";
constexpr const char* kLockFile = "/lock";

// --- files ---

Result<std::string> read_file(const std::string& path, std::size_t limit) {
  const std::string doing = "reading " + path;
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd) return fail_errno(errno, doing);
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return fail_errno(errno, doing);
  if (!S_ISREG(status.st_mode)) return fail(Code::Io, doing + ": it is not a file");
  std::string text;
  std::array<char, 65536> piece{};
  for (;;) {
    const ssize_t got = ::read(fd.get(), piece.data(), piece.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno(errno, doing);
    if (got == 0) return text;
    text.append(piece.data(), static_cast<std::size_t>(got));
    if (text.size() > limit) return fail(Code::Io, doing + ": it is too large");
  }
}

Status write_whole(int fd, std::string_view text, const std::string& doing) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return fail_errno(errno, doing);
    text.remove_prefix(static_cast<std::size_t>(written));
  }
  return {};
}

enum class Sync { Yes, No };

// The file has all of the text, or is as it was.
Status replace_file(const std::string& path, std::string_view text, Sync sync) {
  const std::string doing = "writing " + path;
  const std::string fresh = path + ".new";
  const UniqueFd fd(::open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW,
                           S_IRUSR | S_IWUSR));
  if (!fd) return fail_errno(errno, doing);
  DROVER_TRY(write_whole(fd.get(), text, doing));
  if (sync == Sync::Yes && ::fsync(fd.get()) != 0) return fail_errno(errno, doing);
  if (::rename(fresh.c_str(), path.c_str()) != 0) return fail_errno(errno, doing);
  return {};
}

Status sync_directory(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd || ::fsync(fd.get()) != 0) return fail_errno(errno, "writing the directory " + path);
  return {};
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

// One process at a time makes, removes or records jobs.
Result<UniqueFd> lock_state(const JobPlaces& places) {
  std::error_code error;
  std::filesystem::create_directories(places.state, error);
  const std::string doing = "using " + places.state;
  UniqueFd fd(::open(places.state.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return fail_errno(errno, doing);
  while (::flock(fd.get(), LOCK_EX) != 0) {
    if (errno != EINTR) return fail_errno(errno, doing);
  }
  return fd;
}

// --- a job's lock: of the open file, so that asking whether it is held never takes it ---

struct flock whole_file(short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return lock;
}

bool held_by_another(int fd) {
  struct flock lock = whole_file(F_WRLCK);
  return ::fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

pid_t pid_in(int fd) {
  std::array<char, 32> text{};
  const ssize_t got = ::pread(fd, text.data(), text.size() - 1, 0);
  if (got <= 0) return 0;
  const long pid = std::strtol(text.data(), nullptr, 10);
  return pid > 0 && pid <= 1L << 30 ? static_cast<pid_t>(pid) : 0;
}

Error busy_error(const std::string& id, pid_t pid) {
  return {Code::Busy,
          fmt::format("job {} is at work already{}", id,
                      pid > 0 ? fmt::format(", in process {}", pid) : ""),
          fmt::format("`drover watch {0}` shows it, `drover cancel {0}` undoes it", id), false};
}

Result<UniqueFd> take_lock(const std::string& directory, const std::string& id) {
  const std::string path = directory + kLockFile;
  const std::string doing = "locking job " + id;
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, S_IRUSR | S_IWUSR));
  if (!fd) return fail_errno(errno, doing);
  struct flock lock = whole_file(F_WRLCK);
  if (::fcntl(fd.get(), F_OFD_SETLK, &lock) != 0) {
    if (errno == EAGAIN || errno == EACCES) return fail(busy_error(id, pid_in(fd.get())));
    return fail_errno(errno, doing);
  }
  // It may have ended, and its directory gone, between the two.
  struct stat ours {};
  struct stat there {};
  if (::fstat(fd.get(), &ours) != 0) return fail_errno(errno, doing);
  if (::stat(path.c_str(), &there) != 0 || ours.st_ino != there.st_ino) {
    return fail(Code::NotFound, "job " + id + " has just ended");
  }
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::ftruncate(fd.get(), 0) != 0 ||
      ::pwrite(fd.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return fail_errno(errno, doing);
  }
  return fd;
}

// --- JSON ---

tl::unexpected<Error> broken(const std::string& what) { return fail(Code::Protocol, what); }

std::uint64_t seconds_of(WallTime time) {
  const auto count =
      std::chrono::duration_cast<std::chrono::seconds>(time.time_since_epoch()).count();
  return count < 0 ? 0 : static_cast<std::uint64_t>(count);
}

Result<WallTime> wall_time(const json& object, const char* name) {
  DROVER_ASSIGN(const std::uint64_t seconds, mirror::get_unsigned(object, name, kLastSecond));
  return WallTime(std::chrono::seconds(seconds));
}

Result<bool> required_bool(const json& object, const char* name) {
  if (!object.contains(name)) return broken(fmt::format("\"{}\" is not true or false", name));
  return mirror::get_bool(object, name, false);
}

Result<json> member(const json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end() || !found->is_object()) {
    return broken(fmt::format("\"{}\" is not an object", name));
  }
  return *found;
}

Result<std::map<std::string, std::string>> text_map(const json& object, const char* name) {
  DROVER_ASSIGN(const json members, member(object, name));
  std::map<std::string, std::string> out;
  for (const auto& [key, value] : members.items()) {
    if (!value.is_string()) return broken(fmt::format("\"{}\" has what is not a text", name));
    out.emplace(key, value.get<std::string>());
  }
  return out;
}

json options_to_json(const MoveOptions& options) {
  return {{"guest", options.guest},
          {"host", options.host},
          {"disk_paths", json(options.disk_paths)},
          {"source_uri", options.source_uri},
          {"target_uri", options.target_uri},
          {"target_address", options.target_address},
          {"target_port", options.target_port},
          {"via", fmt::format("{}", fmt::join(options.via, ","))},
          {"compression", mirror::compression_name(options.compression)},
          {"keep_source", options.keep_source},
          {"bandwidth", options.bandwidth.bytes()},
          {"max_downtime_ms", static_cast<std::uint64_t>(options.max_downtime.count())},
          {"connections", options.connections},
          {"memory_channels", options.memory_channels},
          {"keep_partial", options.keep_partial},
          {"max_slowdown_ms", static_cast<std::uint64_t>(options.max_slowdown.count())},
          {"verify", options.verify},
          {"use_index", options.use_index},
          {"link_timeout_ms", static_cast<std::uint64_t>(options.link_timeout.count())},
          {"hold_barrier_file", options.hold_barrier_file}};
}

Result<MoveOptions> options_from_json(const json& object) {
  static constexpr std::uint64_t kMostMilliseconds = std::uint64_t{1} << 40;
  MoveOptions out;
  DROVER_ASSIGN(out.guest, mirror::get_string(object, "guest"));
  DROVER_ASSIGN(out.host, mirror::get_string(object, "host"));
  DROVER_ASSIGN(out.disk_paths, text_map(object, "disk_paths"));
  DROVER_ASSIGN(out.source_uri, mirror::get_string(object, "source_uri"));
  DROVER_ASSIGN(out.target_uri, mirror::get_string(object, "target_uri"));
  DROVER_ASSIGN(out.target_address, mirror::get_string(object, "target_address"));
  DROVER_ASSIGN(const auto port, mirror::get_unsigned(object, "target_port", UINT16_MAX));
  out.target_port = static_cast<std::uint16_t>(port);
  DROVER_ASSIGN(const std::string via, mirror::get_string(object, "via"));
  if (!via.empty()) {
    DROVER_ASSIGN(out.via, mirror::parse_addresses(via));
  }
  DROVER_ASSIGN(const std::string compression, mirror::get_string(object, "compression", 64));
  DROVER_ASSIGN(out.compression, mirror::parse_compression(compression));
  DROVER_ASSIGN(out.keep_source, required_bool(object, "keep_source"));
  DROVER_ASSIGN(const auto bandwidth, mirror::get_unsigned(object, "bandwidth"));
  out.bandwidth = Length(bandwidth);
  DROVER_ASSIGN(const auto downtime,
                mirror::get_unsigned(object, "max_downtime_ms", kMostMilliseconds));
  out.max_downtime = milliseconds(downtime);
  DROVER_ASSIGN(const auto lanes, mirror::get_unsigned(object, "connections", mirror::kMaxLanes));
  if (lanes == 0) return broken("no connections");
  out.connections = static_cast<unsigned>(lanes);
  DROVER_ASSIGN(const auto channels,
                mirror::get_unsigned(object, "memory_channels", kMostMemoryChannels));
  out.memory_channels = static_cast<unsigned>(channels);
  DROVER_ASSIGN(out.keep_partial, required_bool(object, "keep_partial"));
  DROVER_ASSIGN(const auto slowdown,
                mirror::get_unsigned(object, "max_slowdown_ms", kMostMilliseconds));
  out.max_slowdown = milliseconds(slowdown);
  DROVER_ASSIGN(out.verify, required_bool(object, "verify"));
  DROVER_ASSIGN(out.use_index, required_bool(object, "use_index"));
  DROVER_ASSIGN(const auto timeout,
                mirror::get_unsigned(object, "link_timeout_ms", kMostMilliseconds));
  out.link_timeout = milliseconds(timeout);
  DROVER_ASSIGN(out.hold_barrier_file, mirror::get_string(object, "hold_barrier_file"));
  return out;
}

Result<std::vector<std::string>> text_list(const json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end() || !found->is_array()) {
    return broken(fmt::format("\"{}\" is not a list", name));
  }
  std::vector<std::string> out;
  for (const json& item : *found) {
    if (!item.is_string()) return broken(fmt::format("\"{}\" has what is not a text", name));
    out.push_back(item.get<std::string>());
  }
  return out;
}

json options_to_json(const RelocateOptions& options) {
  return {{"guest", options.guest},
          {"directory", options.directory},
          {"pool", options.pool},
          {"places", json(options.places)},
          {"disks", options.disks},
          {"format", options.format},
          {"uri", options.uri},
          {"keep_source", options.keep_source},
          {"bandwidth", options.bandwidth.bytes()},
          {"parallel", options.parallel}};
}

Result<RelocateOptions> relocation_from_json(const json& object) {
  static constexpr std::uint64_t kMostParallel = 1000;
  RelocateOptions out;
  DROVER_ASSIGN(out.guest, mirror::get_string(object, "guest"));
  DROVER_ASSIGN(out.directory, mirror::get_string(object, "directory"));
  DROVER_ASSIGN(out.pool, mirror::get_string(object, "pool"));
  DROVER_ASSIGN(out.places, text_map(object, "places"));
  DROVER_ASSIGN(out.disks, text_list(object, "disks"));
  DROVER_ASSIGN(out.format, mirror::get_string(object, "format"));
  DROVER_ASSIGN(out.uri, mirror::get_string(object, "uri"));
  DROVER_ASSIGN(out.keep_source, required_bool(object, "keep_source"));
  DROVER_ASSIGN(const auto bandwidth, mirror::get_unsigned(object, "bandwidth"));
  out.bandwidth = Length(bandwidth);
  DROVER_ASSIGN(const auto parallel, mirror::get_unsigned(object, "parallel", kMostParallel));
  if (parallel == 0) return broken("no disk at once");
  out.parallel = static_cast<unsigned>(parallel);
  return out;
}

// A file's error as a job's: which file, and what becomes of it.
Error damage(const std::string& id, const std::string& directory, const Error& error) {
  return {
      error.code == Code::Incompatible ? Code::Incompatible : Code::Io,
      fmt::format("job {}: {}", id, error.message),
      error.hint.empty()
          ? fmt::format("nothing is deleted for that: see {0} and the job's log; when neither host "
                        "needs it any more (`drover receive --cleanup {1}` on the target), {0} can "
                        "be removed",
                        directory, id)
          : error.hint,
      false};
}

Result<JobRecord> read_record(const std::string& directory, const std::string& id) {
  const auto bad = [&](const Error& error) {
    return fail(
        damage(id, directory,
               {error.code, "its job.json can't be used: " + error.message, error.hint, false}));
  };
  const Result<std::string> text = read_file(directory + kRecordFile, kLargestFile);
  if (!text) return bad(text.error());
  const Result<json> object = mirror::parse_object(*text, "what is in it");
  if (!object) return bad(object.error());
  Result<JobRecord> record = JobRecord::from_json(*object);
  if (!record) return bad(record.error());
  if (record->id != id) return bad({Code::Protocol, "it is another job's", "", false});
  return record;
}

Result<JobStatus> read_status(const std::string& path) {
  DROVER_ASSIGN(const std::string text, read_file(path, kLargestFile));
  DROVER_ASSIGN(const json object, mirror::parse_object(text, "what is in it"));
  return JobStatus::from_json(object);
}

// The directory is on its way: being made, or being removed. Hidden names are no jobs.
std::string passing_name(const std::string& id) { return "." + id; }

// What processes that were killed while they made or removed a job have left. Needs the state's
// lock.
void sweep(const std::string& jobs) {
  std::error_code error;
  std::vector<std::filesystem::path> gone;
  for (std::filesystem::directory_iterator at(jobs, error), end; !error && at != end;
       at.increment(error)) {
    if (at->path().filename().string().starts_with('.')) gone.push_back(at->path());
  }
  for (const auto& path : gone) std::filesystem::remove_all(path, error);
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> out;
  for (std::size_t start = 0; start < text.size();) {
    const std::size_t end = std::min(text.find('\n', start), text.size());
    if (end > start) out.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return out;
}

// Needs the state's lock.
Status add_to_history(const JobPlaces& places, const HistoryEntry& entry) {
  std::vector<std::string> lines;
  if (exists(places.history())) {
    const Result<std::string> text = read_file(places.history(), kLargestHistory);
    // One that can't be read must not keep others from being recorded: it makes way.
    if (text) {
      lines = lines_of(*text);
    } else {
      ::rename(places.history().c_str(), (places.history() + ".damaged").c_str());
    }
  }
  lines.push_back(to_line(entry.to_json()));
  const std::size_t first =
      lines.size() > JobStore::kMostHistory ? lines.size() - JobStore::kMostHistory : 0;
  std::string text;
  for (std::size_t i = first; i < lines.size(); ++i) text += lines[i] + "\n";
  return replace_file(places.history(), text, Sync::Yes);
}

}  // namespace

// --- JobRecord, JobStatus, HistoryEntry ---

json JobRecord::to_json() const {
  return {{"version", kVersion},
          {"id", id},
          {"kind", kind_name(kind())},
          {"options", relocation ? options_to_json(*relocation) : options_to_json(options)},
          {"plan", event_of(plan)},
          {"created_at", seconds_of(created)},
          {"pid", static_cast<std::uint64_t>(pid)},
          {"state", json(state)}};
}

Result<JobRecord> JobRecord::from_json(const json& json) {
  DROVER_ASSIGN(const std::uint64_t version, mirror::get_unsigned(json, "version"));
  if (version != kVersion) {
    return fail(Code::Incompatible,
                fmt::format("it has version {}, this drover {} knows {}", version, DROVER_VERSION,
                            kVersion),
                "use the drover that began it");
  }
  JobRecord out;
  DROVER_ASSIGN(out.id, mirror::get_string(json, "id", 64));
  DROVER_TRY(mirror::check_session_id(out.id));
  DROVER_ASSIGN(const std::string kind, mirror::get_string(json, "kind", 64));
  DROVER_ASSIGN(const auto options, member(json, "options"));
  if (kind == kind_name(Kind::Relocate)) {
    DROVER_ASSIGN(out.relocation, relocation_from_json(options));
  } else if (kind == kind_name(Kind::Move)) {
    DROVER_ASSIGN(out.options, options_from_json(options));
  } else {
    return fail(Code::Incompatible, "it is a job of a kind that this drover does not know: " + kind,
                "use the drover that began it");
  }
  DROVER_ASSIGN(const auto plan, member(json, "plan"));
  DROVER_ASSIGN(out.plan, plan_from_json(plan));
  DROVER_ASSIGN(out.created, wall_time(json, "created_at"));
  DROVER_ASSIGN(const auto pid, mirror::get_unsigned(json, "pid", std::uint64_t{1} << 30));
  out.pid = static_cast<pid_t>(pid);
  DROVER_ASSIGN(out.state, text_map(json, "state"));
  return out;
}

json JobStatus::to_json() const {
  return {{"state", state},
          {"progress", event_of(progress)},
          {"last_error", last_error ? mirror::error_to_json(*last_error) : json(nullptr)},
          {"updated_at", seconds_of(updated)}};
}

Result<JobStatus> JobStatus::from_json(const json& json) {
  JobStatus out;
  DROVER_ASSIGN(out.state, mirror::get_string(json, "state"));
  DROVER_ASSIGN(const auto progress, member(json, "progress"));
  DROVER_ASSIGN(out.progress, progress_from_json(progress));
  const auto error = json.find("last_error");
  if (error != json.end() && !error->is_null()) out.last_error = mirror::error_from_json(*error);
  DROVER_ASSIGN(out.updated, wall_time(json, "updated_at"));
  return out;
}

std::string_view outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::Moved: return "moved";
    case Outcome::Undone: return "undone";
    case Outcome::Partly: return "partly";
  }
  return "";
}

OrderedJson HistoryEntry::to_json() const {
  return {{"job", id},
          {"kind", kind},
          {"guest", guest},
          {"uuid", uuid},
          {"host", host},
          {"outcome", outcome_name(outcome)},
          {"created_at", seconds_of(created)},
          {"ended_at", seconds_of(ended)},
          {"reason", reason ? event_of(*reason) : OrderedJson(nullptr)},
          {"summary", summary ? event_of(*summary) : OrderedJson(nullptr)}};
}

Result<HistoryEntry> HistoryEntry::from_json(const json& json) {
  HistoryEntry out;
  DROVER_ASSIGN(out.id, mirror::get_string(json, "job", 64));
  DROVER_ASSIGN(out.kind, mirror::get_string(json, "kind", 64));
  DROVER_ASSIGN(out.guest, mirror::get_string(json, "guest"));
  DROVER_ASSIGN(out.uuid, mirror::get_string(json, "uuid"));
  DROVER_ASSIGN(out.host, mirror::get_string(json, "host"));
  DROVER_ASSIGN(const std::string outcome, mirror::get_string(json, "outcome", 64));
  out.outcome = Outcome::Undone;
  for (const Outcome known : {Outcome::Moved, Outcome::Partly}) {
    if (outcome == outcome_name(known)) out.outcome = known;
  }
  DROVER_ASSIGN(out.created, wall_time(json, "created_at"));
  DROVER_ASSIGN(out.ended, wall_time(json, "ended_at"));
  const auto event = [&](const char* name) -> Result<std::optional<JobEvent>> {
    const auto found = json.find(name);
    if (found == json.end() || found->is_null()) return std::nullopt;
    DROVER_ASSIGN(JobEvent parsed, parse_event(found->dump()));
    return std::optional<JobEvent>(std::move(parsed));
  };
  DROVER_ASSIGN(const auto reason, event("reason"));
  if (reason) {
    const auto* error = std::get_if<Error>(&*reason);
    if (error == nullptr) return broken("\"reason\" is no error");
    out.reason = *error;
  }
  DROVER_ASSIGN(const auto summary, event("summary"));
  if (summary) {
    const auto* moved = std::get_if<Summary>(&*summary);
    if (moved == nullptr) return broken("\"summary\" is none");
    out.summary = *moved;
  }
  return out;
}

// --- StatusWriter ---

void StatusWriter::progress(const Progress& progress) {
  bool at_once = false;
  {
    const std::lock_guard lock(mutex_);
    at_once = status_.progress.phase != progress.phase ||
              status_.progress.waiting_for != progress.waiting_for;
    status_.progress = progress;
  }
  changed(at_once);
}

void StatusWriter::state(std::string_view name) {
  {
    const std::lock_guard lock(mutex_);
    if (status_.state == name) return;
    status_.state = name;
  }
  changed(true);
}

void StatusWriter::error(std::optional<Error> error) {
  {
    const std::lock_guard lock(mutex_);
    status_.last_error = std::move(error);
  }
  changed(true);
}

void StatusWriter::changed(bool at_once) {
  pending_ = true;
  if (at_once || now() >= written_ + kInterval) flush();
}

void StatusWriter::flush() {
  if (!pending_) return;
  pending_ = false;
  written_ = now();
  json object;
  {
    const std::lock_guard lock(mutex_);
    status_.updated = std::chrono::system_clock::now();
    object = status_.to_json();
  }
  const std::string text = object.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
  const Status written = replace_file(path_, text, Sync::No);
  // A directory that is gone is a job's that has ended.
  const bool failed = !written && written.error().code != Code::NotFound;
  if (failed && !complained_) log_warning("{}", written.error().to_string());
  complained_ = failed;
}

JobStatus StatusWriter::current() const {
  const std::lock_guard lock(mutex_);
  JobStatus status = status_;
  status.updated = std::chrono::system_clock::now();
  return status;
}

// --- Job ---

Status Job::finish(const Ending& ending) {
  DROVER_ASSIGN(const UniqueFd state, lock_state(places_));
  const HistoryEntry entry{.id = record_.id,
                           .kind = std::string(kind_name(record_.kind())),
                           .guest = record_.plan.guest,
                           .uuid = record_.plan.uuid,
                           .host = record_.plan.host,
                           .outcome = ending.outcome,
                           .created = record_.created,
                           .ended = std::chrono::system_clock::now(),
                           .reason = ending.reason,
                           .summary = ending.summary};
  if (const Status added = add_to_history(places_, entry); !added) {
    log_warning("the history: {}", added.error().to_string());
  }
  // At once, so that nobody sees half a job.
  const std::string passing = places_.jobs() + "/" + passing_name(record_.id);
  if (::rename(directory_.c_str(), passing.c_str()) != 0) {
    return fail_errno(errno, "removing " + directory_);
  }
  std::error_code error;
  std::filesystem::remove_all(passing, error);
  if (error) return fail_errno(error.value(), "removing " + passing);
  ::rmdir(places_.jobs().c_str());  // only if no other job is there
  return {};
}

// --- JobStore ---

Status JobStore::check_no_job(const Plan& plan) const {
  DROVER_ASSIGN(const std::vector<JobView> others, list());
  for (const JobView& other : others) {
    if (!other.record || other.record->plan.uuid != plan.uuid) continue;
    return fail(
        Code::AlreadyExists, fmt::format("guest {} has a job already: {}", plan.guest, other.id),
        other.alive
            ? fmt::format("`drover watch {0}` shows it, `drover cancel {0}` undoes it", other.id)
            : fmt::format("its process has ended: `drover resume {0}` goes on with it, "
                          "`drover cancel {0}` undoes it",
                          other.id));
  }
  return {};
}

Result<std::unique_ptr<Job>> JobStore::create(JobRecord record) const {
  DROVER_ASSIGN(const UniqueFd state, lock_state(places_));
  DROVER_TRY(check_no_job(record.plan));
  if (record.id.empty()) record.id = new_job_id(record.plan.guest);
  DROVER_TRY(mirror::check_session_id(record.id));
  record.created = std::chrono::system_clock::now();
  record.pid = ::getpid();

  const std::string directory = places_.jobs() + "/" + record.id;
  const std::string passing = places_.jobs() + "/" + passing_name(record.id);
  const std::string doing = "making the job's directory " + directory;
  if (exists(directory)) return fail_errno(EEXIST, doing);
  // Whoever ended the last job, or received one, removes the directory of all when it is empty.
  static constexpr int kTries = 10;
  for (int i = 1;; ++i) {
    if (::mkdir(places_.jobs().c_str(), kOwnerOnly) != 0 && errno != EEXIST) {
      return fail_errno(errno, doing);
    }
    sweep(places_.jobs());
    if (::mkdir(passing.c_str(), kOwnerOnly) == 0) break;
    if (errno != ENOENT || i == kTries) return fail_errno(errno, doing);
  }
  std::error_code ignored;
  std::filesystem::create_directories(places_.logs, ignored);

  const auto fill = [&]() -> Result<UniqueFd> {
    DROVER_ASSIGN(UniqueFd lock, take_lock(passing, record.id));
    DROVER_TRY(replace_file(
        passing + kRecordFile,
        record.to_json().dump(-1, ' ', false, json::error_handler_t::replace) + "\n", Sync::Yes));
    DROVER_TRY(sync_directory(passing));
    if (::rename(passing.c_str(), directory.c_str()) != 0) return fail_errno(errno, doing);
    DROVER_TRY(sync_directory(places_.jobs()));
    return lock;
  };
  Result<UniqueFd> lock = fill();
  if (!lock) {
    std::filesystem::remove_all(passing, ignored);
    std::filesystem::remove_all(directory, ignored);
    return fail(lock.error());
  }
  return std::unique_ptr<Job>(new Job(places_, directory, std::move(record), std::move(*lock)));
}

Result<std::unique_ptr<Job>> JobStore::open(const std::string& id) const {
  DROVER_ASSIGN(const JobView view, look(id));
  DROVER_ASSIGN(UniqueFd lock, take_lock(view.directory, id));
  DROVER_ASSIGN(JobRecord record, read_record(view.directory, id));
  return std::unique_ptr<Job>(new Job(places_, view.directory, std::move(record), std::move(lock)));
}

Result<JobPause> JobStore::pause() const {
  DROVER_ASSIGN(UniqueFd state, lock_state(places_));
  return JobPause(*this, std::move(state));
}

Status JobPause::guest(const std::string& uuid) {
  DROVER_ASSIGN(const std::vector<JobView> jobs, store_->list());
  for (const JobView& job : jobs) {
    if (!job.record || job.record->plan.uuid != uuid || stopped_.contains(job.id)) continue;
    if (job.alive) return fail(busy_error(job.id, job.pid));
    DROVER_ASSIGN(stopped_[job.id], store_->open(job.id));
  }
  return {};
}

Result<JobView> JobStore::look(const std::string& id) const {
  const auto unknown = [&] {
    return fail(Code::NotFound, "there is no job " + id,
                "`drover jobs` lists them, `drover history` those that have ended");
  };
  if (!mirror::check_session_id(id)) return unknown();
  JobView view;
  view.id = id;
  view.directory = places_.jobs() + "/" + id;
  // The directory may also be a receiver's, for a job of another host.
  const UniqueFd lock(
      ::open((view.directory + kLockFile).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!lock) {
    if (errno == EACCES) return fail_errno(errno, "looking at job " + id);
    if (!exists(view.directory + kRecordFile)) return unknown();
  } else if (held_by_another(lock.get())) {
    view.alive = true;
    view.pid = pid_in(lock.get());
  }
  if (auto record = read_record(view.directory, id)) {
    view.record = std::move(*record);
  } else {
    view.damaged = record.error().message;
  }
  const std::string status_path = view.directory + "/status.json";
  if (exists(status_path)) {
    if (auto status = read_status(status_path)) {
      view.status = std::move(*status);
    } else if (view.damaged.empty()) {
      view.damaged =
          fmt::format("job {}: its status.json can't be used: {}", id, status.error().message);
    }
  }
  // It may have ended while we looked.
  if (!view.record && !exists(view.directory)) return unknown();
  return view;
}

Result<std::vector<JobView>> JobStore::list() const {
  std::vector<JobView> out;
  std::error_code error;
  std::vector<std::string> ids;
  for (std::filesystem::directory_iterator at(places_.jobs(), error), end; !error && at != end;
       at.increment(error)) {
    ids.push_back(at->path().filename().string());
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    return fail_errno(error.value(), "reading " + places_.jobs());
  }
  std::ranges::sort(ids);
  for (const std::string& id : ids) {
    Result<JobView> view = look(id);
    if (view) {
      out.push_back(std::move(*view));
    } else if (view.error().code != Code::NotFound) {
      return fail(view.error());
    }
  }
  return out;
}

Result<JobView> JobStore::find(const std::string& id_or_guest) const {
  if (auto view = look(id_or_guest); view || view.error().code != Code::NotFound) return view;
  DROVER_ASSIGN(std::vector<JobView> all, list());
  std::vector<JobView> matches;
  std::string ids;
  for (JobView& view : all) {
    if (!view.record) continue;
    const Plan& plan = view.record->plan;
    if (plan.guest != id_or_guest && plan.uuid != id_or_guest) continue;
    ids += (ids.empty() ? "" : ", ") + view.id;
    matches.push_back(std::move(view));
  }
  if (matches.size() == 1) return std::move(matches.front());
  if (matches.empty()) {
    return fail(Code::NotFound,
                "there is no job " + id_or_guest + ", nor one of a guest of that name",
                "`drover jobs` lists them, `drover history` those that have ended");
  }
  return fail(Code::InvalidArgument, "there are several jobs of " + id_or_guest,
              "name one of " + ids);
}

Result<History> JobStore::history() const {
  History out;
  Result<std::string> text = read_file(places_.history(), kLargestHistory);
  if (!text && text.error().code == Code::NotFound) return out;
  if (!text) return fail(text.error());
  for (const std::string& line : lines_of(*text)) {
    Result<HistoryEntry> entry = fail(Code::Protocol, "");
    if (const auto object = mirror::parse_object(line, "a line of the history")) {
      entry = HistoryEntry::from_json(*object);
    }
    if (entry) {
      out.entries.push_back(std::move(*entry));
    } else {
      ++out.damaged;
    }
  }
  return out;
}

std::string new_job_id(const std::string& guest) {
  static constexpr std::size_t kMostOfName = 40;
  std::string id;
  for (const char c : guest) {
    const bool plain = std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_';
    id += plain ? c : '-';
  }
  id.resize(std::min(id.size(), kMostOfName));
  std::array<unsigned char, 4> random{};
  CHECK(::getrandom(random.data(), random.size(), 0) == static_cast<ssize_t>(random.size()),
        "the kernel has random bytes");
  return fmt::format("{}-{:02x}{:02x}{:02x}{:02x}", id, random[0], random[1], random[2], random[3]);
}

}  // namespace drover::job
