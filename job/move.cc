// SPDX-License-Identifier: Apache-2.0
//
// The driver of job/move_machine.h: does what the machine says, and tells it what happened.
#include "job/move.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/inotify.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "job/copy_pace.h"
#include "job/event_queue.h"
#include "job/journal.h"
#include "job/move_machine.h"
#include "job/platform.h"
#include "job/prepare.h"
#include "job/progress_meter.h"
#include "job/run_move.h"
#include "memmig/domain_xml.h"
#include "mirror/bootstrap.h"
#include "mirror/endpoint_watchdog.h"
#include "mirror/engine.h"
#include "mirror/session.h"

namespace drover::job {
namespace {

using namespace std::chrono_literals;
using memmig::GuestEvent;
using memmig::GuestState;
using nlohmann::json;

constexpr auto kReserveTimeout = 60s;
constexpr auto kDrainTimeout = 20s;
constexpr auto kBarrierTimeout = 60s;
constexpr auto kControlTimeout = 10s;
constexpr auto kLookInterval = 100ms;  // at progress, and at how the guest fares
constexpr auto kSettleTimeout = 60s;
constexpr auto kLibvirtGrace = 5s;
constexpr auto kCommitPatience = 120s;
constexpr int kResumeTries = 5;
constexpr int kNothingLeft = 3;  // cli/exit_codes.h: not found
constexpr const char* kJobsDirectory = "/var/lib/drover/jobs";

class Move {
 public:
  Move(Platform& platform, const MoveOptions& options, Observer& observer, Cancel& cancel,
       Prepared prepared)
      : platform_(platform),
        options_(options),
        observer_(observer),
        cancel_(cancel),
        prepared_(std::move(prepared)),
        id_(platform.new_job_id(prepared_.guest.name)),
        directory_(std::string(kJobsDirectory) + "/" + id_),
        queue_(platform.new_event_queue()),
        meter_([&platform] { return platform.now(); }) {}

  ~Move() {
    if (migrating_) (void)source().abort_migration(uuid());
    migrating_.reset();
  }

  Result<Summary> run() {
    Status ready = platform_.make_job_directory(directory_, id_);
    if (ready) {
      log_info("job {}: move of {} to {}", id_, plan().guest, plan().host);
      ready = open_journal();
    }
    if (!ready) {
      platform_.remove_job_directory(directory_);
      return fail(ready.error());
    }
    if (prepared_.io_at != Instant()) (void)pace_.look(prepared_.io_at, prepared_.io, Length());
    queue_->push(Begin{});
    while (!ended(state_)) {
      if (const std::optional<Event> event = queue_->wait(cancel_, kLookInterval)) handle(*event);
      keep_pace();
      report_progress();
    }
    return finish();
  }

 private:
  // One thing of a guest's on one host, for messages.
  [[nodiscard]] const Plan& plan() const { return prepared_.plan; }
  [[nodiscard]] memmig::Hypervisor& source() { return *prepared_.source; }
  [[nodiscard]] memmig::Hypervisor& target() { return *prepared_.target; }
  [[nodiscard]] const std::string& uuid() const { return prepared_.guest.uuid; }

  // --- the machine ---

  void handle(const Event& event) {
    log_event(event);
    const Phase before = phase_of(state_);
    Step next = step(std::move(state_), event);
    state_ = std::move(next.state);
    if (phase_of(state_) != before) meter_.enter(phase_of(state_));
    report_progress(true);
    for (const Do action : next.actions) {
      log_info("{}: {}", state_name(state_), action_name(action));
      if (Status status = journal_state(); !status && may_still_fail()) {
        queue_->push(ActionFailed{status.error()});
        continue;
      }
      if (Status status = carry_out(action); !status) {
        log_error("{} failed: {}", action_name(action), status.error().to_string());
        queue_->push(ActionFailed{status.error()});
      }
    }
  }

  // What is about to be done is on stable storage first. Not twice: the guest may be waiting.
  Status journal_state() {
    const std::string_view name = state_name(state_);
    if (name == journaled_state_) return {};
    DROVER_TRY(journal_->put("state", name));
    journaled_state_ = name;
    return {};
  }

  void log_event(const Event& event) {
    std::string detail;
    if (const auto* trouble = std::get_if<Trouble>(&event)) detail = trouble->error.to_string();
    if (const auto* busy = std::get_if<SourceNotGuarded>(&event)) detail = busy->error.to_string();
    if (const auto* failed = std::get_if<ActionFailed>(&event)) detail = failed->error.to_string();
    if (const auto* ended = std::get_if<MigrateEnded>(&event); ended != nullptr && !ended->status) {
      detail = ended->status.error().to_string();
    }
    log_info("{}: {} {}", state_name(state_), event_name(event), detail);
  }

  // A journal that can't be written ends a move that can be undone, and nothing else.
  [[nodiscard]] bool may_still_fail() const {
    return !std::holds_alternative<Undoing>(state_) &&
           !std::holds_alternative<AbortingMemory>(state_) && !std::holds_alternative<Settling>(state_);
  }

  Status carry_out(Do action) {
    switch (action) {
      case Do::Reserve: return reserve();
      case Do::Attach: return attach();
      case Do::EnterStrict: return enter_strict();
      case Do::StartMemory: return start_memory();
      case Do::AbortMemory: return abort_memory();
      case Do::Settle: return settle();
      case Do::PassBarrier: return pass_barrier();
      case Do::ResumeTarget: return resume_target();
      case Do::Commit: return commit();
      case Do::Undo: return undo();
    }
    CHECK(false, "every action is carried out");
  }

  // --- before ---

  Status open_journal() {
    DROVER_ASSIGN(journal_, platform_.open_journal(directory_ + "/journal"));
    json job = {{"version", 1},       {"kind", "move"},        {"guest", plan().guest},
                {"uuid", plan().uuid}, {"host", plan().host}, {"keep_source", options_.keep_source}};
    for (const DiskPlan& disk : plan().disks) {
      job["disks"].push_back({{"disk", disk.disk},
                              {"source", disk.source_path},
                              {"target", disk.target_path},
                              {"format", disk.target_format},
                              {"delete_source", disk.delete_source},
                              {"size", disk.virtual_size.bytes()}});
    }
    return journal_->put("job", job.dump());
  }

  // --- reserve: receiver, link, images ---

  Status reserve() {
    DROVER_ASSIGN(const mirror::LinkKey key, platform_.new_key());
    mirror::ReceiverRequest request;
    request.session = id_;
    request.key = key;
    request.port = options_.target_port;
    request.address = options_.target_address;
    receiver_started_ = true;
    // Not broken off by a cancel: then nobody would know whether a receiver is there.
    DROVER_ASSIGN(const mirror::ReceiverInfo receiver,
                  platform_.start_receiver(plan().host, request));

    mirror::MirrorEngine::Options engine_options;
    engine_options.bandwidth = options_.bandwidth;
    engine_options.watchdog_command = {"/proc/self/exe", std::string(mirror::kWatchdogCommand)};
    mirror::MirrorEngine::Events events;
    events.all_copied = [this](bool strict) { queue_->push(AllCopied{strict}); };
    events.link_lost = events.link_down = events.strict_ended = [this](const Error& error) {
      queue_->push(Trouble{error});
    };
    events.link_up = [](const std::vector<mirror::TargetDisk>&) {};
    events.disk_failed = [this](const std::string& disk, const Error& error) {
      queue_->push(Trouble{Error{error.code, "disk " + disk + ": " + error.message, error.hint,
                                 error.retryable}});
    };
    events.mirror_gone = [this](const std::string& disk, const Error& error) {
      if (mirrors_may_go_.load()) return;
      mirror_lost_.store(true);
      queue_->push(Trouble{Error{error.code, "QEMU let go of the mirror of disk " + disk + ": " +
                                 error.message, "", true}});
    };
    DROVER_ASSIGN(engine_, platform_.create_engine(engine_options, events));

    mirror::LinkOptions link;
    link.address = receiver.address;
    link.port = receiver.port;
    link.session = id_;
    link.key = key;
    link.lanes = options_.connections;
    json disks = json::array();
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      link.disk_sizes.push_back(disk.virtual_size);
      disks.push_back({{"path", disk.target_path},
                       {"format", disk.target_format},
                       {"block_device", disk.target_block_device},
                       {"size", disk.virtual_size.bytes()},
                       {"cluster_size", disk.cluster_size.bytes()}});
    }
    DROVER_TRY(engine_->connect(link));
    linked_ = true;
    DROVER_TRY(engine_->link().call({{"op", "reserve"}, {"disks", disks}}, kReserveTimeout));
    queue_->push(Reserved{});
    return {};
  }

  // --- attach: exports, readers, mirrors ---

  [[nodiscard]] std::string socket_path(const std::string& name) const {
    return prepared_.guest.private_directory + "/drover-" + name + ".sock";
  }

  Status attach() {
    const memmig::GuestInfo& guest = prepared_.guest;
    DROVER_ASSIGN(source_events_, source().subscribe(uuid(), [this](const GuestEvent& event) {
      on_source_event(event);
    }));
    std::vector<memmig::ExportSpec> exports;
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      if (!disk.source_plain) exports.push_back({disk.disk, disk.source_node, disk.disk});
    }
    if (!exports.empty()) {
      exporting_ = true;
      DROVER_TRY(source().start_exports(uuid(), socket_path("export"), exports));
    }
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      mirror::MirrorEngine::Disk one;
      one.name = disk.disk;
      one.size = disk.virtual_size;
      if (disk.source_plain) {
        one.source = blockcopy::RawSource{disk.source_path, disk.virtual_size};
      } else {
        one.source = blockcopy::NbdSource{socket_path("export"), disk.disk, 4};
      }
      if (disk.mirror) {
        one.server.emplace();
        one.server->socket_path = socket_path(disk.disk);
        one.server->socket_uid = static_cast<int>(guest.qemu_uid);
        one.server->socket_gid = static_cast<int>(guest.qemu_gid);
        one.server->export_name = disk.disk;
        one.server->size = disk.virtual_size;
      }
      one.target_initially_zero = !disk.target_block_device;
      DROVER_TRY(engine_->add_disk(one));
    }
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      if (!disk.mirror) continue;
      attached_.push_back(disk.disk);
      DROVER_TRY(source().attach_mirror(
          uuid(), {disk.disk, disk.source_node, socket_path(disk.disk), disk.disk}));
    }
    engine_->start();
    queue_->push(Attached{});
    return {};
  }

  void on_source_event(const GuestEvent& event) {
    log_info("source event: {} {} {}", memmig::event_name(event.kind), event.detail, event.disk);
    const auto trouble = [&](Code code, std::string what) {
      queue_->push(Trouble{Error{code, std::move(what), "", true}});
    };
    switch (event.kind) {
      case GuestEvent::Kind::CpusStopped: source_stopped_at_.store(event.received); break;
      case GuestEvent::Kind::Quiesced:
        mirrors_may_go_.store(true);  // QEMU ends them when it goes
        queue_->push(SourceStopped{});
        break;
      case GuestEvent::Kind::Suspended:
        if (event.detail == "paused") user_paused_.store(true);
        break;
      case GuestEvent::Kind::Resumed:
        if (event.detail == "unpaused") user_paused_.store(false);
        break;
      case GuestEvent::Kind::Stopped:
        if (event.detail != "migrated") {
          trouble(Code::Cancelled, "the guest stopped during the move (" + event.detail + ")");
        }
        break;
      case GuestEvent::Kind::MirrorEnded:
        if (!mirrors_may_go_.load()) {
          mirror_lost_.store(true);
          trouble(Code::Io, "QEMU ended the mirror of disk " + event.disk + ": " + event.detail);
        }
        break;
      case GuestEvent::Kind::DiskError:
        trouble(Code::Io, "the guest's disk " + event.disk + " had an I/O error on the source: " +
                              event.detail);
        break;
      case GuestEvent::Kind::ConnectionLost:
        trouble(Code::Unreachable, "the connection to the source's libvirt was lost: " + event.detail);
        break;
      // Devices that came or went are looked at before the memory moves.
      case GuestEvent::Kind::DeviceAdded:
      case GuestEvent::Kind::DeviceRemoved:
      case GuestEvent::Kind::CpusRunning:
      case GuestEvent::Kind::Started:
      case GuestEvent::Kind::Shutdown:
      case GuestEvent::Kind::Crashed:
      case GuestEvent::Kind::Rebooted:
      case GuestEvent::Kind::Defined:
      case GuestEvent::Kind::Undefined: break;
    }
  }

  void on_target_event(const GuestEvent& event) {
    log_info("target event: {} {}", memmig::event_name(event.kind), event.detail);
    // Without an image that could be guarded the source might still run: then migrate() must have said
    // that it is over (which the machine takes for this event).
    const bool guarded = !plan().disks.empty();
    if (event.kind == GuestEvent::Kind::Suspended && guarded) queue_->push(TargetSuspended{});
    if (event.kind == GuestEvent::Kind::CpusRunning) target_runs_at_.store(event.received);
    if (event.kind == GuestEvent::Kind::ConnectionLost) {
      queue_->push(Trouble{Error{Code::Unreachable,
                                 "the connection to the target's libvirt was lost: " + event.detail, "",
                                 true}});
    }
  }

  // The guest first: the copy is as fast as its disks' latency allows (job/copy_pace.h). Up to the handover,
  // of which little is left then.
  void keep_pace() {
    const bool before = std::holds_alternative<Reserving>(state_) || std::holds_alternative<Attaching>(state_);
    if ((!before && !std::holds_alternative<Copying>(state_)) || platform_.now() < next_look_) return;
    const Instant start = platform_.now();
    const Result<memmig::GuestIo> io = source().disk_io(uuid());
    // A libvirt that is slow to answer is not asked all the time.
    next_look_ = platform_.now() + std::max<Duration>(kLookInterval, 10 * (platform_.now() - start));
    if (!io) return;
    Length read;
    if (!before) {
      for (const auto& disk : engine_->status().disks) read += disk.counters.read_bytes;
    }
    const Length pace = pace_.look(platform_.now(), *io, read);
    if (!engine_) return;
    const bool limited = options_.bandwidth > Length() && (pace == Length() || options_.bandwidth < pace);
    engine_->set_bandwidth(limited ? options_.bandwidth : pace);
  }

  // --- handover ---

  Status enter_strict() {
    engine_->set_bandwidth(options_.bandwidth);
    DROVER_TRY(engine_->enter_strict());
    queue_->push(StrictEntered{});
    return {};
  }

  // The definition that goes to the target is that of now: devices may have come and gone. Disks may not.
  Status describe_again() {
    DROVER_ASSIGN(memmig::GuestInfo guest, source().describe(uuid()));
    const auto same = [](const memmig::GuestDisk& a, const memmig::GuestDisk& b) {
      return a.target == b.target && a.path == b.path && a.virtual_size == b.virtual_size;
    };
    if (!std::ranges::equal(guest.disks, prepared_.guest.disks, same)) {
      return fail(Code::Busy, "the guest's disks were changed during the move",
                  "start the move again: it takes them as they are now");
    }
    if (guest.state != GuestState::Running) {
      return fail(Code::Busy,
                  "the guest is " + std::string(memmig::state_name(guest.state)) +
                      " by now, and a guest that stands still is not moved",
                  "start the move again when it runs");
    }
    prepared_.guest = std::move(guest);
    return {};
  }

  Status start_memory() {
    DROVER_TRY(describe_again());
    // Should all connections break now, the target's images may be needed to go on.
    DROVER_TRY(engine_->link().call({{"op", "keep"}}, kControlTimeout));
    const memmig::GuestInfo& guest = prepared_.guest;
    memmig::MigrateOptions migrate;
    migrate.guest = uuid();
    migrate.target = prepared_.target.get();
    DROVER_ASSIGN(migrate.live_xml,
                  memmig::rewrite_definition(guest.live_xml,
                                             memmig::rewrite_of(prepared_.move_plan, true)));
    if (!guest.inactive_xml.empty()) {
      DROVER_ASSIGN(migrate.persistent_xml,
                    memmig::rewrite_definition(guest.inactive_xml,
                                               memmig::rewrite_of(prepared_.move_plan, false)));
    }
    migrate.memory_uri = "unix://" + mirror::memory_socket(id_);
    migrate.bandwidth = options_.bandwidth;
    migrate.convergence.max_downtime = options_.max_downtime;
    migrate.convergence.initial_downtime =
        std::min(migrate.convergence.initial_downtime, options_.max_downtime);
    DROVER_ASSIGN(target_events_, target().subscribe(uuid(), [this](const GuestEvent& event) {
      on_target_event(event);
    }));
    DROVER_TRY(engine_->link().start_relay({.unix_path = mirror::memory_socket(id_),
                                            .gated = true,
                                            .mode = 0600,
                                            .uid = static_cast<int>(guest.qemu_uid),
                                            .gid = static_cast<int>(guest.qemu_gid)}));
    memory_started_ = true;
    migrating_ = platform_.start_thread([this, migrate] {
      MigrateEnded ended;
      ended.status = source().migrate(migrate, [this](const memmig::MigrationProgress& progress) {
        meter_.memory(progress.memory_total, progress.memory_remaining);
      });
      queue_->push(std::move(ended));
    });
    // While libvirt starts QEMU there: then the barrier has little left to flush.
    if (const auto flushed = engine_->link().call({{"op", "flush"}}, kReserveTimeout); !flushed) {
      log_warning("flushing the target: {}", flushed.error().to_string());
    }
    return {};
  }

  Status abort_memory() {
    // Nobody may be waiting for the target now, or QEMU could not drain its disks to let go of them.
    engine_->leave_strict();
    if (!migrating_) {
      // It never began (StartMemory itself failed): nobody else will say that it has ended.
      queue_->push(MigrateEnded{fail(Code::Cancelled, "the memory was not moved")});
      return {};
    }
    const Status aborted = source().abort_migration(uuid());
    if (!aborted) log_warning("aborting the memory: {}", aborted.error().to_string());
    // Without its connection the migration fails by itself, if it is not over yet.
    engine_->link().stop_relay();
    return {};
  }

  // The guest's state on one host. Over a new connection when the old one is gone: libvirt's daemon may
  // have been restarted. No thread of libvirt's call is left here.
  Result<GuestState> state_on(std::unique_ptr<memmig::Hypervisor>& host) {
    Result<GuestState> state = host->state(uuid());
    if (!state && state.error().code == Code::NotFound) return GuestState::ShutOff;
    if (state || host->alive()) return state;
    DROVER_ASSIGN(auto fresh, platform_.connect_libvirt(host->uri()));
    log_info("connected to {} again", host->uri());
    retired_.push_back(std::exchange(host, std::move(fresh)));
    state = host->state(uuid());
    if (!state && state.error().code == Code::NotFound) return GuestState::ShutOff;
    return state;
  }

  // After a migration that failed, or whose end nobody has told us. libvirt lets the source run again by
  // itself as a rule; where it did not, and the target can't run, it is done here. The target was not
  // resumed.
  Status settle() {
    migrating_.reset();
    const Instant start = platform_.now();
    std::string known;
    while (platform_.now() < start + kSettleTimeout) {
      const Result<GuestState> source_state = state_on(prepared_.source);
      const bool patient = platform_.now() < start + kLibvirtGrace;  // it may be about to do it itself
      if (source_state && settled_on_source(*source_state)) {
        queue_->push(Settled{Whereabouts::Source});
        return {};
      }
      const Result<GuestState> target_state = state_on(prepared_.target);
      const auto say = [](const Result<GuestState>& state) {
        return state ? std::string(memmig::state_name(*state)) : state.error().message;
      };
      known = "on this host: " + say(source_state) + "; on " + plan().host + ": " + say(target_state);
      if (source_state && target_state) {
        const bool source_off = *source_state == GuestState::ShutOff;
        const bool target_off = *target_state == GuestState::ShutOff;
        if (source_off && (target_off || *target_state == GuestState::Paused)) {
          queue_->push(Settled{target_off ? Whereabouts::Source : Whereabouts::Target});
          return {};
        }
      }
      if (source_state && *source_state == GuestState::Paused && !patient) take_back(target_state);
      platform_.sleep(100ms);  // libvirt has no event for "this is how I leave it"
    }
    return fail(Code::Held, "the handover failed, and where the guest is now is not known (" + known + ")");
  }

  [[nodiscard]] bool settled_on_source(GuestState state) const {
    return state == GuestState::Running || state == GuestState::ShuttingDown ||
           state == GuestState::PmSuspended || state == GuestState::Crashed ||
           (state == GuestState::Paused && user_paused_.load());
  }

  // The source stands still with complete images, and the target was never resumed.
  void take_back(const Result<GuestState>& target_state) {
    if (target_state && *target_state != GuestState::ShutOff) {
      if (const Status gone = end_target_guest(); !gone) {
        log_warning("ending the guest that waits on the target: {}", gone.error().to_string());
        return;
      }
    }
    if (const Status runs = source().resume(uuid()); !runs) {
      log_warning("resuming the source: {}", runs.error().to_string());
    }
  }

  Status pass_barrier() {
    if (mirror_lost_.load()) {
      return fail(Code::Io, "QEMU let go of a disk's mirror before the guest stopped: the target misses writes");
    }
    mirrors_may_go_.store(true);
    const Instant start = platform_.now();
    DROVER_TRY(engine_->drain(kDrainTimeout));
    const Instant drained = platform_.now();
    DROVER_TRY(engine_->link().barrier(kBarrierTimeout));
    log_info("barrier: drained in {} us, flushed and released in {} us",
             std::chrono::duration_cast<std::chrono::microseconds>(drained - start).count(),
             std::chrono::duration_cast<std::chrono::microseconds>(platform_.now() - drained).count());
    if (!options_.hold_barrier_file.empty()) hold_barrier();
    queue_->push(BarrierPassed{});
    return {};
  }

  // Test switch: creates the file, and waits until somebody has removed it.
  void hold_barrier() {
    const std::string& path = options_.hold_barrier_file;
    const UniqueFd watch(::inotify_init1(IN_CLOEXEC));
    std::ofstream(path).flush();
    if (::inotify_add_watch(watch.get(), path.c_str(), IN_DELETE_SELF | IN_ATTRIB) < 0) return;
    std::array<char, 4096> events{};
    while (::access(path.c_str(), F_OK) == 0) {
      if (::read(watch.get(), events.data(), events.size()) < 0) return;
    }
  }

  // All of the source's images or none: a guard that is held keeps the source from resuming, which it may
  // have to if this fails.
  Status guard_source() {
    std::vector<std::unique_ptr<ImageGuard>> guard;
    for (const DiskPlan& disk : plan().disks) {
      DROVER_ASSIGN(auto lock, platform_.guard_image(disk.source_path));
      guard.push_back(std::move(lock));
    }
    source_guard_ = std::move(guard);
    return {};
  }

  Status resume_target() {
    if (const Status guarded = guard_source(); !guarded) {
      queue_->push(SourceNotGuarded{guarded.error()});
      return {};
    }
    resume_tried_ = true;
    const Instant deadline = platform_.now() + kCommitPatience;
    Status resumed = target().resume(uuid());
    while (!resumed) {
      log_warning("resuming the target: {}", resumed.error().to_string());
      // Its answer may have been lost, or libvirt be restarting there.
      const Result<GuestState> state = state_on(prepared_.target);
      if (state && *state == GuestState::Running) break;
      // Not for want of libvirt: QEMU itself refuses, and somebody must find out why.
      const bool refused = state.has_value() && ++refusals_ >= kResumeTries;
      if (refused || platform_.now() > deadline) {
        return fail(Code::Held, "the guest could not be resumed on the target: " + resumed.error().message);
      }
      platform_.sleep(200ms);
      resumed = target().resume(uuid());
    }
    resumed_at_ = platform_.now();
    DROVER_TRY(journal_->put("target", "runs"));
    queue_->push(TargetRuns{});
    return {};
  }

  // --- after ---

  Status commit() {
    migrating_.reset();
    DROVER_TRY(source_is_gone());
    DROVER_ASSIGN(const GuestState state, patient_state_on(prepared_.target));
    // Invariant 4: it must have been seen running there, now or by its event.
    if (state != GuestState::Running && target_runs_at_.load() == Instant()) {
      return fail(Code::Held, "the guest was resumed on the target but is " +
                                  std::string(memmig::state_name(state)) + " there");
    }
    if (state != GuestState::Running) {
      summary_.notes.push_back("the guest is " + std::string(memmig::state_name(state)) +
                               " on the target by now");
    }
    DROVER_TRY(journal_->put("state", "committed"));
    read_counters();
    if (prepared_.guest.autostart) {
      note_if_failed("setting autostart on the target", target().set_autostart(uuid(), true));
    }
    if (options_.keep_source) {
      for (const DiskPlan& disk : plan().disks) summary_.kept.push_back(disk.source_path);
      summary_.notes.push_back("the guest's definition and disks were kept on this host, as asked: "
                               "do not start both");
    } else {
      note_if_failed("removing the guest's definition here", source().undefine(uuid()));
      source_guard_.clear();
      for (const DiskPlan& disk : plan().disks) delete_source(disk);
    }
    end_receiver();
    queue_->push(Committed{});
    return {};
  }

  // Waits for a libvirt that does not answer.
  Result<GuestState> patient_state_on(std::unique_ptr<memmig::Hypervisor>& host) {
    const Instant deadline = platform_.now() + kCommitPatience;
    while (true) {
      Result<GuestState> state = state_on(host);
      if (state) return state;
      if (platform_.now() > deadline) {
        return fail(Code::Held, "the guest runs on " + plan().host +
                                    ", but that could not be confirmed: " + state.error().message);
      }
      log_warning("asking {}: {}", host->uri(), state.error().to_string());
      platform_.sleep(500ms);
    }
  }

  // Invariant 6: what is about to be deleted must not run.
  Status source_is_gone() {
    for (int tries = 0; tries < 50; ++tries) {
      DROVER_ASSIGN(const GuestState state, patient_state_on(prepared_.source));
      if (state == GuestState::ShutOff) return {};
      if (state == GuestState::Running) {
        return fail(Code::Held, "the guest runs on this host although it was resumed on the target");
      }
      if (tries == 10) {
        // Paused, after a handover that libvirt did not see through: its guest lives on the target.
        DROVER_TRY(source().destroy(uuid()));
      }
      platform_.sleep(100ms);
    }
    return fail(Code::Held, "libvirt does not end the stopped guest on this host");
  }

  void delete_source(const DiskPlan& disk) {
    if (!disk.delete_source) {
      summary_.kept.push_back(disk.source_path);
      return;
    }
    if (const Status removed = platform_.remove_image(disk.source_path); !removed) {
      summary_.kept.push_back(disk.source_path);
      summary_.notes.push_back(removed.error().message);
      return;
    }
    summary_.deleted.push_back(disk.source_path);
  }

  void note_if_failed(const std::string& doing, const Status& status) {
    if (!status) summary_.notes.push_back(doing + " failed: " + status.error().to_string());
  }

  void read_counters() {
    const auto status = engine_->status();
    for (const auto& disk : status.disks) {
      summary_.data += disk.counters.read_bytes;
      summary_.mirrored_writes += disk.counters.guest_writes;
    }
    summary_.memory_bytes = Length(status.link.memory_bytes);
    summary_.wire_bytes = Length(status.link.bytes_sent + status.link.memory_bytes);
    if (const auto stats = engine_->link().call({{"op", "stats"}}, kControlTimeout)) {
      summary_.receiver_peak_memory = Length(stats->value("peak_memory", std::uint64_t{0}));
    }
  }

  void end_receiver() {
    engine_->link().stop_relay();
    const auto finished = engine_->link().call({{"op", "finish"}}, kControlTimeout);
    engine_->stop();
    engine_.reset();
    if (finished) return;
    log_warning("the receiver did not say goodbye: {}", finished.error().to_string());
    note_if_failed("clearing up after the receiver, which has died", clean_up_target("--keep"));
  }

  // --- undo ---

  Status undo() {
    std::string left;
    std::string hint = "see the log of the job";
    const auto collect = [&](const std::string& doing, const Status& status) {
      if (status) return;
      left += (left.empty() ? "" : "; ") + doing + ": " + status.error().message;
      if (!status.error().hint.empty()) hint = status.error().hint;
    };
    if (engine_) {
      engine_->leave_strict();
      engine_->stop_copying();
    }
    migrating_.reset();
    mirrors_may_go_.store(true);
    // The mirrors first: from then on the guest is as it was.
    std::vector<std::string> stuck;
    for (const std::string& disk : attached_) {
      if (const Status gone = source().detach_mirror(uuid(), disk); !gone) {
        log_warning("{}", gone.error().to_string());
        stuck.push_back(disk);
      }
    }
    if (exporting_) collect("ending QEMU's NBD export", source().stop_exports(uuid(), socket_path("export")));
    if (memory_started_) collect("ending what is left of the guest on the target", end_target_guest());
    target_events_.reset();
    source_events_.reset();
    source_guard_.clear();
    bool removed = !receiver_started_;
    if (engine_) {
      if (linked_) {
        // The source runs, so even images that were to be kept are nobody's disks.
        removed =
            engine_->link().call({{"op", "remove"}, {"force", true}}, kReserveTimeout).has_value();
      }
      engine_->stop();
      engine_.reset();
    }
    // Without its endpoint a mirror ends by itself; what is left of it can be removed then.
    for (const std::string& disk : stuck) {
      collect("detaching the mirror of " + disk, source().detach_mirror(uuid(), disk));
    }
    // The receiver removes its images by itself when the link is gone; this is for one that was killed.
    if (!removed) collect("cleaning up on the target", clean_up_target("--force"));
    if (!left.empty()) return fail(Code::Io, left, hint);
    queue_->push(Undone_{});
    return {};
  }

  // A guest that was being taken over and that libvirt has not cleared away, with its definition: the
  // pre-flight saw to it that there was none before. A libvirt that has lost us clears it away itself.
  Status end_target_guest() {
    if (!target().alive()) return {};
    DROVER_ASSIGN(const GuestState state, state_on(prepared_.target));
    if (state != GuestState::ShutOff) DROVER_TRY(target().destroy(uuid()));
    return target().undefine(uuid());
  }

  // For a receiver that did not end in order. `images`: what becomes of those of a handover.
  Status clean_up_target(const std::string& images) {
    const std::string hint = "when " + options_.host + " is in reach, run `drover receive --cleanup " + id_ +
                             " " + images + "` on " + options_.host;
    const auto result =
        platform_.run_on_target(plan().host, {.argv = {"drover", "receive", "--cleanup", id_, images}});
    if (!result) return fail(Code::Unreachable, result.error().message, hint);
    // It may have gone in order, only later than we asked.
    if (result->exit_code == 0 || result->exit_code == kNothingLeft) return {};
    return fail(Code::Io, result->err.empty() ? result->out : result->err, hint);
  }

  // --- the end ---

  // What holds where, and that nothing was deleted.
  Error held_error(const std::string& what) {
    std::string source_paths;
    std::string target_paths;
    for (const DiskPlan& disk : plan().disks) {
      source_paths += (source_paths.empty() ? "" : ", ") + disk.source_path;
      target_paths += (target_paths.empty() ? "" : ", ") + disk.target_path;
    }
    const std::string paths =
        fmt::format("nothing was deleted: the source's images are {}, the target's are {}; the job's journal is {}",
                    source_paths, target_paths, directory_);
    if (resume_tried_) {
      return Error{Code::Held, what,
                   fmt::format("the guest was told to run on {0}: look there (`virsh -c {1} domstate {2}`). If it "
                               "runs, or has run, the source's images are out of date: do not start it here. {3}",
                               plan().host, prepared_.target->uri(), plan().guest, paths),
                   false};
    }
    return Error{Code::Held, what,
                 fmt::format("the guest was not resumed on {}; the source's images are complete; make sure that it "
                             "runs on one host only. {}",
                             plan().host, paths),
                 false};
  }

  Result<Summary> finish() {
    meter_.enter(phase_of(state_));
    migrating_.reset();
    source_events_.reset();
    target_events_.reset();
    journal_.reset();
    if (const auto* undone = std::get_if<Undone>(&state_)) {
      if (undone->complete) platform_.remove_job_directory(directory_);
      return fail(undone->reason);
    }
    if (const auto* held = std::get_if<Held>(&state_)) {
      engine_.reset();
      return fail(held_error(held->reason.message));
    }
    platform_.remove_job_directory(directory_);
    summary_.guest = plan().guest;
    summary_.host = plan().host;
    summary_.disks = plan().disks;
    summary_.phase_times = meter_.phase_times();
    summary_.total = meter_.elapsed();
    const Instant stopped = source_stopped_at_.load();
    Instant resumed = target_runs_at_.load();
    if (resumed == Instant()) resumed = resumed_at_;
    summary_.blackout = std::chrono::duration_cast<std::chrono::microseconds>(resumed - stopped);
    summary_.runner_peak_memory = platform_.peak_memory();
    return summary_;
  }

  void report_progress(bool now_please = false) {
    if (!now_please && !meter_.due()) return;
    if (engine_ && linked_) meter_.copy(engine_->status());
    observer_.progress(meter_.progress(phase_of(state_)));
  }

  Platform& platform_;
  const MoveOptions options_;
  Observer& observer_;
  Cancel& cancel_;
  Prepared prepared_;
  std::vector<std::unique_ptr<memmig::Hypervisor>> retired_;  // connections that broke
  const std::string id_;
  const std::string directory_;
  const std::unique_ptr<EventQueue> queue_;
  State state_ = Reserving{};
  ProgressMeter meter_;
  CopyPace pace_;
  Instant next_look_{};
  Summary summary_;
  std::unique_ptr<Journal> journal_;
  bool receiver_started_ = false;
  bool linked_ = false;
  bool exporting_ = false;
  bool memory_started_ = false;
  std::string journaled_state_;
  std::vector<std::string> attached_;
  // Before the engine: its thread uses it until it ends.
  std::atomic<bool> mirrors_may_go_{false};
  std::atomic<bool> mirror_lost_{false};  // while the guest still wrote
  std::unique_ptr<mirror::MirrorEngine> engine_;
  std::atomic<bool> user_paused_{false};
  std::atomic<Instant> source_stopped_at_{};
  std::atomic<Instant> target_runs_at_{};
  Instant resumed_at_{};
  bool resume_tried_ = false;
  int refusals_ = 0;
  std::vector<std::unique_ptr<ImageGuard>> source_guard_;
  std::unique_ptr<Thread> migrating_;  // calls migrate()
  std::unique_ptr<memmig::Subscription> source_events_;
  std::unique_ptr<memmig::Subscription> target_events_;
};

}  // namespace

bool Plan::blocked() const {
  return std::ranges::any_of(findings, [](const memmig::Finding& finding) {
    return finding.severity == memmig::Severity::Blocker;
  });
}

Result<Plan> plan_move(const MoveOptions& options, Cancel& cancel) {
  const auto platform = real_platform();
  DROVER_ASSIGN(Prepared prepared, prepare(*platform, options, cancel));
  return std::move(prepared.plan);
}

Result<Summary> move(const MoveOptions& options, Observer& observer, Cancel& cancel) {
  const auto platform = real_platform();
  DROVER_ASSIGN(Prepared prepared, prepare(*platform, options, cancel));
  observer.planned(prepared.plan);
  if (prepared.plan.blocked()) {
    return fail(Code::Blocked, "guest " + prepared.plan.guest + " can't be moved to " + options.host +
                                   " as things are; nothing was changed",
                "see what stops it above");
  }
  if (cancel.requested()) return fail(Code::Cancelled, "cancelled; nothing was changed");
  return run_move(*platform, options, observer, cancel, std::move(prepared));
}

Result<Summary> run_move(Platform& platform, const MoveOptions& options, Observer& observer,
                         Cancel& cancel, Prepared prepared) {
  Move job(platform, options, observer, cancel, std::move(prepared));
  return job.run();
}

}  // namespace drover::job
