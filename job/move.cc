// SPDX-License-Identifier: Apache-2.0
//
// The driver of job/move_machine.h: does what the machine says, and tells it what happened.
#include "job/move.h"

#include <fmt/format.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "job/blackout.h"
#include "job/checkpoint.h"
#include "job/copy_gain.h"
#include "job/copy_lead.h"
#include "job/copy_pace.h"
#include "job/event_queue.h"
#include "job/handover_tries.h"
#include "job/journal.h"
#include "job/memory_channels.h"
#include "job/move_machine.h"
#include "job/platform.h"
#include "job/prepare.h"
#include "job/progress_meter.h"
#include "job/run_move.h"
#include "memmig/domain_xml.h"
#include "mirror/bootstrap.h"
#include "mirror/endpoint_watchdog.h"
#include "mirror/engine.h"
#include "mirror/known_filter.h"
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
constexpr std::string_view kTargetKey = "target";  // "runs": the guest was resumed on it; "asked": or may have been
constexpr auto kLongestStrict = 2 * CopyGain::kStrict;  // before the memory begins
constexpr int kMostMapCalls = 4096;  // of a disk: what is not known to be empty then is compared
constexpr auto kLookInterval = 100ms;  // at progress, and at how the guest fares
constexpr auto kSettleTimeout = 60s;
constexpr auto kLibvirtGrace = 5s;
constexpr auto kCommitPatience = 120s;
constexpr int kResumeTries = 5;
constexpr int kNothingLeft = 3;           // cli/exit_codes.h: not found
constexpr auto kLibvirtPatience = 120s;   // for a libvirtd that is being restarted
constexpr auto kRemoveTimeout = 20s;
constexpr auto kSshTimeout = 30s;
constexpr auto kFlushInterval = 1s;  // while the memory moves
constexpr auto kFlushPoll = 50ms;
constexpr auto kTransitPatience = 1s;  // for the receiver's word on what the target's QEMU has taken
constexpr auto kBarrierPause = 100ms;     // before it is asked for again
constexpr auto kFlushPatience = 5s;       // what is done after a handover waits for such a flush
constexpr auto kLocateTimeout = 6s;       // of one look for the receiver while the link is down
constexpr int kMostRejoins = 20;          // in a row without a handover that began
constexpr auto kRejoinPatience = 120s;    // with what passes, and is no link
constexpr auto kRejoinPause = 1s;
constexpr int kGuardTries = 50;           // in a row
constexpr std::string_view kStateKey = "state";
// Of the present handover: "passed", or kVoid, if the source is known to have gone on since: what waits on the target
// is old then.
constexpr std::string_view kBarrierKey = "barrier";
constexpr std::string_view kVoid = "void";
constexpr std::string_view kStampsKey = "stamps";  // when the barrier was passed, of the source's images (image_stamp())
constexpr std::string_view kAutostartKey = "autostart";  // the source's guest had it, and has it no more
constexpr std::string_view kQemuKey = "qemu";  // the process whose bitmaps these are

// Of {"op":"map"}.
Result<std::vector<Extent>> decode_holes(const json& map) {
  const auto broken = [] {
    return fail(Code::Protocol, "the target's map is not a list of holes");
  };
  const auto list = map.find("holes");
  if (list == map.end() || !list->is_array()) return broken();
  std::vector<Extent> holes;
  for (const json& one : *list) {
    if (!one.is_array() || one.size() != 2) return broken();
    if (!one[0].is_number_unsigned() || !one[1].is_number_unsigned()) return broken();
    holes.push_back({Offset(one[0].get<std::uint64_t>()), Length(one[1].get<std::uint64_t>())});
  }
  return holes;
}

class Move {
 public:
  Move(Platform& platform, const MoveOptions& options, Observer& observer, Cancel& cancel,
       Prepared prepared, const JobFiles& files)
      : platform_(platform),
        options_(options),
        observer_(observer),
        cancel_(cancel),
        prepared_(std::move(prepared)),
        files_(files),
        id_(files.id),
        queue_(platform.new_event_queue()),
        meter_([&platform] { return platform.now(); }) {}

  ~Move() {
    if (migrating_) (void)source().abort_migration(uuid());
    end_memory_threads();
  }

  // A job that an earlier process has worked on first finds out where the guest is. `reason`: it is to be undone.
  MoveEnd run(std::optional<Error> reason) {
    log_info("job {}: move of {} to {}{}", id_, plan().guest, plan().host, files_.resumed ? ", resumed" : "");
    if (Status ready = open_journal(); !ready) return {fail(ready.error()), !files_.resumed};
    if (files_.resumed) {
      const bool undo = reason.has_value();
      const Error broken_off{Code::Cancelled, "the handover was broken off after the target had let go of its images",
                             "start the move again", true};
      state_ = Settling{undo ? *reason : broken_off, released_, !undo};
    }
    if (prepared_.io_at != Instant()) (void)pace_.look(prepared_.io_at, prepared_.io, Length());
    queue_->push(Begin{});
    while (!ended(state_)) {
      if (const std::optional<Event> event = queue_->wait(cancel_, kLookInterval)) handle(*event);
      keep_pace();
      say_notes();
      look_for_handover();
      look_for_strict();
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
    // Also one that fails by itself before strict mode counts.
    const auto* ended_memory = std::get_if<MigrateEnded>(&event);
    if (ended_memory != nullptr && !ended_memory->status && std::holds_alternative<MovingMemory>(state_)) {
      tries_.memory_starts();
    }
    const auto* memory = std::get_if<MovingMemory>(&state_);
    if (memory != nullptr && !memory->disks_equal && std::holds_alternative<SourceStopped>(event)) {
      observer_.note("QEMU stopped the guest although none of its memory had been taken: the guest goes on here");
      stopped_early_ = true;
    }
    const Phase before = phase_of(state_);
    Step next = step(std::move(state_), event);
    state_ = std::move(next.state);
    if (files_.state) files_.state(state_name(state_));
    if (phase_of(state_) != before) {
      meter_.enter(phase_of(state_));
      if (phase_of(state_) == Phase::Memory) tries_.memory_moves();
    }
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
    DROVER_TRY(journal_->put(kStateKey, name));
    journaled_state_ = name;
    return {};
  }

  void log_event(const Event& event) {
    std::string detail;
    if (const auto* trouble = std::get_if<Trouble>(&event)) detail = trouble->error.to_string();
    if (const auto* failed = std::get_if<HandoverFailed>(&event)) detail = failed->error.to_string();
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
      case Do::Rejoin: return rejoin();
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
    if (!files_.resumed) {
      DROVER_ASSIGN(journal_, platform_.open_journal(files_.journal, Journal::Make::IfMissing));
      return {};
    }
    auto journal = platform_.open_journal(files_.journal, Journal::Make::Never);
    if (!journal && journal.error().code == Code::Protocol) {
      // What it said must not be believed: nothing is known but what both hosts say. All is copied again.
      log_warning("{}", journal.error().to_string());
      observer_.note("the job's journal is damaged: what the target has is not known");
      journal = platform_.open_journal(files_.journal + ".new", Journal::Make::IfMissing);
    }
    if (!journal) return fail(journal.error());
    journal_ = std::move(*journal);
    DROVER_ASSIGN(const auto state, journal_->get(kStateKey));
    DROVER_ASSIGN(const auto barrier, journal_->get(kBarrierKey));
    DROVER_ASSIGN(const auto autostart, journal_->get(kAutostartKey));
    if (state) journaled_state_ = *state;
    journal_is_new_ = !state;
    source_went_on_.store(barrier == kVoid);
    barrier_journaled_ = barrier && barrier != kVoid;
    released_ = barrier.has_value();
    autostart_held_ = autostart.has_value();
    may_have_resumed_ = journal_is_new_ || journaled_state_ == "resuming" ||
                        journaled_state_ == "committing" || journaled_state_ == "committed";
    DROVER_ASSIGN(const auto target, journal_->get(kTargetKey));
    target_ran_ = target == "runs" || journaled_state_ == "committing" || journaled_state_ == "committed";
    may_have_resumed_ = may_have_resumed_ || target.has_value();
    if (files_.mutation.forget_target_ran) target_ran_ = false;
    resume_tried_ = may_have_resumed_ && (barrier_journaled_ || journal_is_new_ || target);
    // The state will be another soon.
    if (resume_tried_ && !target) DROVER_TRY(journal_->put(kTargetKey, "asked"));
    log_info("the journal says: {}{}", journaled_state_, barrier_journaled_ ? ", the barrier was passed" : "");
    return {};
  }

  // --- reserve: receiver, link, images ---

  Status reserve() {
    DROVER_ASSIGN(receiver_request_.key, platform_.new_key());
    receiver_request_.session = id_;
    receiver_request_.port = options_.target_port;
    receiver_request_.address = options_.via.empty() ? options_.target_address : options_.via.front();
    receiver_request_.resumable = true;
    receiver_started_ = true;
    // Not broken off by a cancel: then nobody would know whether a receiver is there.
    DROVER_ASSIGN(const mirror::ReceiverInfo receiver,
                  platform_.start_receiver(plan().host, receiver_request_, kSshTimeout));
    DROVER_TRY(connect(receiver));
    json disks = json::array();
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      disks.push_back({{"path", disk.target_path},
                       {"format", disk.target_format},
                       {"block_device", disk.target_block_device},
                       {"size", disk.virtual_size.bytes()},
                       {"cluster_size", disk.cluster_size.bytes()}});
    }
    DROVER_TRY(engine_->link().call({{"op", "reserve"}, {"disks", disks}}, kReserveTimeout));
    learn_what_is_there();
    queue_->push(Reserved{});
    return {};
  }

  // What the target has need not be sent. Never a reason to fail: without it everything is.
  void learn_what_is_there() {
    if (!options_.use_index) return;
    auto filter = mirror::fetch_filter(
        [this](const json& request) { return engine_->link().call(request, kControlTimeout); });
    if (!filter) return log_warning("the target's content index is not used: {}", filter.error().to_string());
    if (*filter == nullptr) return;
    log_info("the target has a content index");
    engine_->link().use_filter(std::move(*filter));
  }

  Status connect(const mirror::ReceiverInfo& receiver) {
    mirror::MirrorEngine::Options engine_options;
    engine_options.bandwidth = bandwidth();
    engine_options.max_unflushed = flush_plan().most;
    if (!files_.mutation.forget_max_slowdown)
      engine_options.arbiter.max_strict_wait = options_.max_slowdown;
    engine_options.watchdog_command = {"/proc/self/exe", std::string(mirror::kWatchdogCommand)};
    records_.emplace(*journal_);
    DROVER_ASSIGN(engine_, platform_.create_engine(engine_options, engine_events()));
    mirror::LinkOptions link;
    link.address = receiver.address;
    link.port = receiver.port;
    link.session = id_;
    link.key = receiver_request_.key;
    link.via = options_.via;
    link.partly_connected = [this](const std::vector<Error>& silent) { note_silent(silent); };
    link.lanes = options_.connections;
    link.compression = compression();
    link.give_up_after = options_.link_timeout;
    link.locate = [this, last = mirror::LinkAddress{receiver.address, receiver.port}](
                      unsigned attempt, const Error&, int cancel_fd) mutable { return locate(last, attempt, cancel_fd); };
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) link.disk_sizes.push_back(disk.virtual_size);
    DROVER_TRY(engine_->connect(link));
    linked_ = true;
    return {};
  }

  // Any thread.
  void note_silent(const std::vector<Error>& silent) {
    const std::lock_guard lock(notes_mutex_);
    for (const Error& error : silent) {
      notes_.push_back(fmt::format("the link goes on without one of its addresses: {}", error.message));
    }
    if (silent.empty()) notes_.push_back("all addresses of the link answer again");
  }
  void say_notes() {
    std::vector<std::string> notes;
    {
      const std::lock_guard lock(notes_mutex_);
      notes.swap(notes_);
    }
    for (const std::string& note : notes) observer_.note(note);
  }

  mirror::MirrorEngine::Events engine_events() {
    mirror::MirrorEngine::Events events;
    // That a handover may begin is looked at (look_for_handover()), so that one that failed just now has its pause.
    events.all_copied = [this](bool strict) {
      if (strict) queue_->push(AllCopied{true});
    };
    events.link_lost = [this](const Error& error) { queue_->push(Trouble{error}); };
    events.link_down = [this](const Error& error) {
      log_warning("the link is down: {}", error.to_string());
      link_was_down_.store(true);
      queue_->push(LinkDown{});
    };
    events.link_up = [this](const std::vector<mirror::TargetDisk>& targets) {
      log_info("the link is up again");
      const std::lock_guard lock(targets_mutex_);
      if (std::exchange(known_targets_, targets) != targets) verify_again_.store(true);
      targets_ = targets;
      queue_->push(LinkUp{});
    };
    events.strict_ended = [this](const Error& error) {
      too_slow_.store(true);
      queue_->push(HandoverFailed{error});
    };
    events.damaged = [](const std::string& disk, const Extent& extent) {
      log_error("disk {}: bytes {}+{} on the target were not what was sent; they are sent again", disk,
                extent.offset.bytes(), extent.length.bytes());
    };
    events.disk_failed = [this](const std::string& disk, const Error& error) {
      disk_failed_.store(true);
      queue_->push(Trouble{Error{error.code, "disk " + disk + ": " + error.message, error.hint,
                                 error.retryable}});
    };
    events.mirror_gone = [this](const std::string& disk, const Error& error) {
      if (mirrors_may_go_.load()) return;
      mirror_lost_.store(true);
      queue_->push(HandoverFailed{Error{error.code, "QEMU let go of the mirror of disk " + disk + ": " +
                                        error.message, "", true}});
    };
    events.touching = [this](std::size_t disk, const mirror::GroupRecord& record) {
      const Status noted = records_->put(disk, record);
      if (!noted) queue_->push(Trouble{noted.error()});
      return noted.has_value() || files_.mutation.send_unrecorded;
    };
    return events;
  }

  // On the link's thread. Its receiver may have been killed, or its host restarted: SSH knows. But first, and in
  // between, the place where it was.
  Result<mirror::LinkAddress> locate(mirror::LinkAddress& last, unsigned attempt, int cancel_fd) {
    if (undoing_.load()) return fail(Code::Cancelled, "the move is being undone");
    if (attempt < 2 || attempt % 2 == 1) return last;
    mirror::ReceiverRequest request = receiver_request_;
    request.resume = true;
    const auto receiver = platform_.start_receiver(plan().host, request, kLocateTimeout, cancel_fd);
    if (!receiver) {
      const Code code = receiver.error().code;
      if (code == Code::NotFound || code == Code::Denied || code == Code::Incompatible) return fail(receiver.error());
      return last;
    }
    if (!receiver->was_running) log_info("started the receiver on {} again", plan().host);
    return last = {receiver->address, receiver->port};
  }

  // --- attach: exports, readers, mirrors ---

  [[nodiscard]] std::string socket_path(const std::string& name) const {
    return endpoint_socket(prepared_.guest, name);
  }

  Status attach() {
    DROVER_ASSIGN(source_events_, source().subscribe(uuid(), [this](const GuestEvent& event) {
      on_source_event(event);
    }));
    DROVER_TRY(add_disks());
    DROVER_TRY(attach_mirrors());
    DROVER_TRY(know_qemu());
    DROVER_TRY(know_targets());
    engine_->start();
    queue_->push(Attached{});
    return {};
  }

  // QEMU's exports for what drover can't read itself; readers and endpoints.
  Status add_disks() {
    // From here on it is not alone.
    if (const auto io = source().disk_io(uuid())) pace_.begin(platform_.now(), *io);
    const memmig::GuestInfo& guest = prepared_.guest;
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
    return {};
  }

  Status attach_mirrors() {
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      if (!disk.mirror) continue;
      if (std::ranges::find(attached_, disk.disk) == attached_.end()) attached_.push_back(disk.disk);
      DROVER_TRY(source().attach_mirror(
          uuid(), {disk.disk, disk.source_node, socket_path(disk.disk), disk.disk, generation_}));
    }
    return {};
  }

  Status know_qemu() {
    DROVER_ASSIGN(const memmig::Attached attached, source().attached(uuid()));
    return journal_->put(kQemuKey, attached.process);
  }

  // What the target's images are, as its receiver names them.
  Result<std::vector<mirror::TargetDisk>> ask_targets() {
    DROVER_ASSIGN(const json images, engine_->link().call({{"op", "images"}}, kControlTimeout));
    DROVER_ASSIGN(std::vector<mirror::TargetDisk> targets, decode_targets(images.dump()));
    read_from_memory_.clear();
    for (const json& disk : images.at("disks")) {
      DROVER_ASSIGN(const bool reads_storage, mirror::get_bool(disk, "reads_storage", true));
      if (!reads_storage) read_from_memory_.push_back(disk.at("path"));
    }
    return targets;
  }

  Status know_targets() {
    DROVER_ASSIGN(std::vector<mirror::TargetDisk> targets, ask_targets());
    engine_->know_targets(targets);
    const std::lock_guard lock(targets_mutex_);
    known_targets_ = targets;
    targets_ = std::move(targets);
    return {};
  }

  void start_checkpoints() {
    std::vector<memmig::BitmapSpec> disks;
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      if (disk.mirror) disks.push_back({disk.disk, disk.source_node});
    }
    checkpointer_ = std::make_unique<Checkpointer>(
        platform_,
        Checkpointer::Job{
            *engine_, source(), *records_, uuid(), disks, prepared_.move_plan.disks.size(),
            generation_, flush_plan().every, [this](const Error& error) {
              queue_->push(
                  Trouble{Error{error.code, "on the target: " + error.message, error.hint, false}});
            }});
  }

  [[nodiscard]] FlushPlan flush_plan() const {
    Length data;
    for (const DiskPlan& disk : plan().disks) {
      data += disk.allocation > Length() ? std::min(disk.allocation, disk.virtual_size)
                                         : disk.virtual_size;
    }
    return plan_flushes(data);
  }

  void stop_checkpoints() {
    if (!checkpointer_) return;
    checkpointer_->stop();
    generation_ = checkpointer_->generation();
    checkpointer_.reset();
  }

  void tell_targets() {
    const std::lock_guard lock(targets_mutex_);
    if (checkpointer_ && targets_) checkpointer_->note_targets(std::move(*targets_));
    if (checkpointer_) targets_.reset();
  }

  // --- rejoin: after a fault that has passed ---

  Status rejoin() {
    if (++rejoins_ > kMostRejoins) {
      return fail(Code::Io, "the mirrors of the guest's disks break again and again");
    }
    // Whether it was passed may not be known; if so the target's images are released, and take nothing more.
    if (barrier_asked_) {
      return fail(Code::Io, "the handover failed when the target's images had been released",
                  "start the move again");
    }
    stop_checkpoints();
    if (engine_) {
      DROVER_TRY(count_handover());
      DROVER_TRY(join_again());
    } else {
      Status joined = libvirt_is_back(source());
      if (joined) joined = join_anew();
      // What an earlier process has copied is not given up because something is out of reach for now.
      if (!joined) joining_can_wait_ = passes(joined.error());
      DROVER_TRY(joined);
    }
    if (const Status set = release_autostart(); !set) log_warning("{}", set.error().to_string());
    queue_->push(Rejoined{});
    return {};
  }

  // Waits for a libvirtd that is being restarted.
  Status libvirt_is_back(memmig::Hypervisor& host) {
    const Instant deadline = platform_.now() + kLibvirtPatience;
    while (!host.alive()) {
      const Status back = host.reconnect();
      if (back) break;
      if (platform_.now() > deadline || cancel_.requested()) return back;
      platform_.sleep(500ms);
    }
    return {};
  }

  // A handover has failed: may there be another?
  Status count_handover() {
    handover_not_before_ = platform_.now() + tries_.pause();
    gain_.reset();
    lead_.reset();
    engine_->leave_strict();
    if (link_was_down_.exchange(false)) tries_.link_was_down();
    switch (tries_.failed(too_slow_.exchange(false))) {
      case HandoverTries::Verdict::Again: break;
      case HandoverTries::Verdict::TooOften:
        return fail(Code::Io, fmt::format("the handover failed {} times", HandoverTries::kMost),
                    "see the log of the job");
      case HandoverTries::Verdict::TooSlow:
        return fail(
            Code::Busy,
            fmt::format(
                "{} handovers in a row were broken off because a write of the guest's would have "
                "waited "
                "for longer than {} ms for {}: the link or the storage there stalls, or takes less "
                "than the guest writes",
                HandoverTries::kMost, options_.max_slowdown.count(), plan().host),
            "let the guest wait for longer with --max-slowdown, or move it when it writes less");
    }
    if (memory_started_) {
      engine_->link().stop_relay();
      target_events_.reset();
      target_guest_left_ = true;
    }
    source_guard_.clear();
    return {};
  }

  // This process has copied: mirrors that QEMU let go of are attached again, and what they missed is in the bitmaps.
  Status join_again() {
    const Instant deadline = platform_.now() + kRejoinPatience;
    while (true) {
      DROVER_TRY(libvirt_is_back(source()));
      Status joined = attach_again();
      if (joined || !passes(joined.error()) || cancel_.requested() || platform_.now() > deadline) return joined;
      log_warning("attaching the mirrors again: {}", joined.error().to_string());
      platform_.sleep(kRejoinPause);
    }
  }

  Status attach_again() {
    mirrors_may_go_.store(true);  // those that are replaced
    Status attached = attach_mirrors();
    mirror_lost_.store(false);
    mirrors_may_go_.store(false);
    DROVER_TRY(std::move(attached));
    DROVER_TRY(look_for_lost_mirrors());
    return copy_what_was_missed();
  }

  // One that was lost while others were still being replaced was taken for one of those.
  Status look_for_lost_mirrors() {
    DROVER_ASSIGN(const memmig::Attached there, source().attached(uuid()));
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      const bool alive = std::ranges::any_of(there.mirrors, [&](const memmig::Attached::Mirror& mirror) {
        return mirror.disk == disk.disk && mirror.alive();
      });
      if (!disk.mirror || alive) continue;
      mirror_lost_.store(true);
      queue_->push(HandoverFailed{Error{Code::Io, "QEMU let go of the mirror of disk " + disk.disk + " at once", "", true}});
    }
    return {};
  }

  Status copy_what_was_missed() {
    if (files_.mutation.forget_missed) return {};
    const auto& disks = prepared_.move_plan.disks;
    for (std::size_t i = 0; i < disks.size(); ++i) {
      if (!disks[i].mirror) continue;
      DROVER_ASSIGN(const std::vector<Extent> written, source().read_bitmaps(uuid(), disks[i].disk));
      engine_->mark_pending(i, written);
    }
    return {};
  }

  // An earlier process has copied: what the target has is in the journal, what was written since in the bitmaps.
  Status join_anew() {
    DROVER_TRY(describe_again());
    target_guest_left_ = true;  // perhaps
    DROVER_ASSIGN(const memmig::Attached left, source().attached(uuid()));
    DROVER_ASSIGN(const auto qemu, journal_->get(kQemuKey));
    bool bitmaps = qemu == left.process;
    std::uint64_t newest = 0;
    for (const memmig::PlannedDisk& disk : prepared_.move_plan.disks) {
      if (disk.mirror && left.recording(disk.disk) == nullptr) bitmaps = false;
    }
    for (const auto& bitmap : left.bitmaps) newest = std::max(newest, bitmap.generation);
    DROVER_TRY(source().detach_all(uuid(), bitmaps));
    generation_ = bitmaps ? newest : newest + 1;
    DROVER_TRY(receiver_again());
    DROVER_ASSIGN(source_events_, source().subscribe(uuid(), [this](const GuestEvent& event) {
      on_source_event(event);
    }));
    DROVER_TRY(add_disks());
    DROVER_ASSIGN(const auto targets, ask_targets());
    if (targets.size() != prepared_.move_plan.disks.size()) {
      return fail(Code::NotFound, "the target's images are gone: an undo had removed them", "start the move again");
    }
    // Records that were not synced went with this host, if it was that which ended QEMU: then no record does not
    // mean that nothing was sent.
    const bool known = ((bitmaps || files_.mutation.trust_records) && restore_records(targets)) ||
                       (files_.mutation.believe_empty_journal && journal_is_new_);
    if (!known) {
      observer_.note(std::string(bitmaps ? "nothing is known of what the target has"
                                         : "the guest's QEMU was restarted meanwhile, and what was written since is "
                                           "not known") +
                     ": all of its disks is compared, and what differs is sent");
      engine_->restore_nothing();
      for (std::size_t disk = 0; disk < targets.size(); ++disk) {
        if (const Status found = find_holes(disk); !found) {
          log_info("where the target's disks are empty is not known: {}",
                   found.error().to_string());
        }
      }
    }
    DROVER_TRY(attach_mirrors());
    DROVER_TRY(know_targets());
    if (bitmaps) DROVER_TRY(copy_what_was_missed());
    // Before the journal takes this QEMU's bitmaps for all that was missed, its records say what they don't.
    if (!known) {
      DROVER_TRY(store_records(*engine_, *records_, prepared_.move_plan.disks.size(), std::nullopt, Journal::Sync::Yes));
    }
    DROVER_TRY(know_qemu());
    engine_->start();
    return {};
  }

  // Of a disk of which nothing is known: what has a hole on both sides is not read, hashed and
  // compared.
  Status find_holes(std::size_t disk) {
    const std::uint64_t size = prepared_.move_plan.disks[disk].virtual_size.bytes();
    if (prepared_.move_plan.disks[disk].target_block_device) return {};
    std::uint64_t at = 0;
    for (int calls = 0; at < size && calls < kMostMapCalls && !cancel_.requested(); ++calls) {
      DROVER_ASSIGN(
          const json map,
          engine_->link().call({{"op", "map"}, {"disk", disk}, {"offset", at}}, kControlTimeout));
      DROVER_ASSIGN(const std::vector<Extent> holes, decode_holes(map));
      DROVER_ASSIGN(const std::uint64_t end, mirror::get_unsigned(map, "end", size));
      if (end <= at) return fail(Code::Protocol, "the target's map does not go on");
      engine_->restore_holes(disk, holes);
      at = end;
    }
    return {};
  }

  // The receiver that is there has the key of the process that died.
  Status receiver_again() {
    DROVER_TRY(platform_.stop_receiver(plan().host, id_));
    DROVER_ASSIGN(receiver_request_.key, platform_.new_key());
    receiver_request_.session = id_;
    receiver_request_.port = options_.target_port;
    receiver_request_.address = options_.via.empty() ? options_.target_address : options_.via.front();
    receiver_request_.resumable = receiver_request_.resume = true;
    receiver_started_ = true;
    DROVER_ASSIGN(const mirror::ReceiverInfo receiver,
                  platform_.start_receiver(plan().host, receiver_request_, kSshTimeout));
    DROVER_TRY(connect(receiver));
    learn_what_is_there();
    return {};
  }

  // False: there is nothing to restore. A record that is damaged costs its chunks being copied again.
  bool restore_records(const std::vector<mirror::TargetDisk>& targets) {
    const auto text = journal_->get(kTargetsKey);
    if (!text || !*text) return false;
    const auto then = decode_targets(**text);
    if (!then || then->size() != targets.size()) return false;
    const Status scanned = journal_->scan(kRecordPrefix, [&](std::string_view key, std::string_view value) -> Status {
      DROVER_ASSIGN(const auto place, parse_record_key(key));
      const auto [disk, group] = place;
      if (disk >= targets.size()) return fail(Code::Protocol, "the journal has a record of a disk that is not there");
      // An image that was made anew holds nothing, but may have been written to by now: like a damaged record.
      const bool same = (*then)[disk].id == targets[disk].id;
      const bool lost = (*then)[disk].instance != targets[disk].instance;
      const Status restored = engine_->restore(disk, {group, std::string(same ? value : std::string_view())}, lost);
      if (!restored) log_warning("disk {}, group {}: {}", disk, group, restored.error().to_string());
      return {};
    });
    if (!scanned) log_warning("reading the journal: {}", scanned.error().to_string());
    return scanned.has_value();
  }

  // Levels, not edges: what the engine said may have been said while nobody could act on it.
  void look_for_handover() {
    if (!std::holds_alternative<Copying>(state_)) return;
    if (!checkpointer_) start_checkpoints();
    tell_targets();
    const auto status = engine_->status();
    if (status.strict) engine_->leave_strict();  // told of an outage that was over when strict mode began
    // What is compared is not less afterwards; it comes to an end, whatever the guest does.
    const bool verifying = verifying_ && !verified();
    if (status.link_down || verifying || platform_.now() < handover_not_before_) {
      gain_.reset();
      lead_.reset();
      return;
    }
    const bool ready = target().ready_to_migrate();
    if (!status.copied && ready && nearly_copied(status)) return queue_->push(NearlyCopied{});
    if (!status.copied && !does_not_gain(status)) return;
    if (!verified() || !ready) return;
    if (!status.copied) note_that_writes_wait();
    handle(AllCopied{false});
  }

  struct Amount {
    Length left;
    Length copied;
  };
  static Amount amount_of(const mirror::MirrorEngine::EngineStatus& status) {
    Amount amount;
    for (const auto& disk : status.disks) {
      amount.left += disk.left;
      amount.copied += disk.counters.read_bytes;
    }
    return amount;
  }

  // The guest's QEMU on the target can be started meanwhile (job/copy_lead.h); not if all is compared first.
  bool nearly_copied(const mirror::MirrorEngine::EngineStatus& status) {
    if (stopped_early_) return false;
    const auto [left, copied] = amount_of(status);
    return (lead_.look(platform_.now(), left, copied) || options_.start_target_at_once) && (!options_.verify || summary_.verified);
  }

  // The guest writes as much as is copied, and only strict mode makes what is left less (job/copy_gain.h).
  bool does_not_gain(const mirror::MirrorEngine::EngineStatus& status) {
    const auto [left, copied] = amount_of(status);
    const CopyGain::Verdict verdict = gain_.look(platform_.now(), left, copied);
    if (verdict == CopyGain::Verdict::Refuse) {
      queue_->push(Trouble{Error{Code::Busy,
                                 fmt::format("the guest writes as fast as its disks are copied to {}, and {} are left",
                                             plan().host, format_length(left)),
                                 "move it when it writes less, over a faster link or without --bandwidth", false}});
      gain_.reset();
    }
    return verdict == CopyGain::Verdict::HandOver;
  }

  // Strict mode may have been entered with much left: the memory waits until it is as little as ever.
  void look_for_strict() {
    const auto* memory = std::get_if<MovingMemory>(&state_);
    if (memory != nullptr && !memory->strict) return end_lead();
    const bool synchronising = std::holds_alternative<Synchronising>(state_);
    if (!strict_since_ || (!synchronising && (memory == nullptr || memory->disks_equal))) return;
    const auto status = engine_->status();
    if (!status.strict) return;  // its end is on its way to us
    if (synchronising && status.copied) {
      strict_since_.reset();
      queue_->push(StrictEntered{});
    } else if (platform_.now() > *strict_since_ + kLongestStrict) {
      strict_since_.reset();
      too_slow_.store(true);
      queue_->push(HandoverFailed{Error{Code::Busy, "what was left of the disks took too long to copy", "", true}});
    }
  }

  // The guest's QEMU is being started on the target, or has been: strict mode is due when it would be without that.
  void end_lead() {
    if (!migrating_ || migrate_returned_.load()) return;  // it has failed
    const auto status = engine_->status();
    if (status.link_down || (!status.copied && !does_not_gain(status))) return;
    if (!status.copied) note_that_writes_wait();
    handle(AllCopied{false});
  }

  void note_that_writes_wait() {
    observer_.note("the guest writes as fast as they are copied: from now on its writes wait for " + plan().host +
                   ", until what is left is there");
  }

  // --verify: everything was compared, or is to be, which begins here.
  bool verified() {
    // What the target has lost since is sent again, and not what was compared.
    if (verify_again_.exchange(false)) verifying_ = summary_.verified = false;
    if (!options_.verify || summary_.verified) return true;
    if (files_.mutation.skip_verify) return summary_.verified = true;
    if (!verifying_) {
      engine_->verify();  // the checkpointer flushes what it waits for
      verifying_ = true;
      return false;
    }
    for (const auto& disk : engine_->status().disks) {
      if (disk.to_verify > Length()) return false;
    }
    summary_.verified = true;
    return true;
  }

  [[nodiscard]] Length bandwidth() const {
    return files_.bandwidth ? Length(files_.bandwidth->load()) : options_.bandwidth;
  }

  [[nodiscard]] mirror::Compression compression() const {
    return files_.compression ? files_.compression->load() : options_.compression;
  }

  void on_source_event(const GuestEvent& event) {
    log_info("source event: {} {} {}", memmig::event_name(event.kind), event.detail, event.disk);
    const auto trouble = [&](Code code, std::string what) {
      queue_->push(Trouble{Error{code, std::move(what), "", true}});
    };
    switch (event.kind) {
      case GuestEvent::Kind::CpusStopped: source_stopped_at_.store(event.received); break;
      case GuestEvent::Kind::Quiesced:
        quiesced_at_.store(event.received);
        stop_flushing_.store(true);
        mirrors_may_go_.store(true);  // QEMU ends them when it goes
        source_went_on_.store(false);
        source_went_on_and_ended_.store(false);
        queue_->push(SourceStopped{});
        break;
      case GuestEvent::Kind::Suspended:
        if (event.detail == "paused") user_paused_.store(true);
        break;
      case GuestEvent::Kind::Resumed:
        if (event.detail == "unpaused") user_paused_.store(false);
        source_went_on_.store(true);
        break;
      case GuestEvent::Kind::Stopped:
        if (event.detail == "shutdown") source_went_on_.store(true);
        if (event.detail != "migrated" && source_went_on_.load()) source_went_on_and_ended_.store(true);
        if (event.detail != "migrated") {
          trouble(Code::Cancelled, "the guest stopped during the move (" + event.detail + ")");
        }
        break;
      case GuestEvent::Kind::MirrorEnded:
        if (!mirrors_may_go_.load()) {
          mirror_lost_.store(true);
          queue_->push(HandoverFailed{Error{Code::Io, "QEMU ended the mirror of disk " + event.disk + ": " +
                                            event.detail, "", true}});
        }
        break;
      case GuestEvent::Kind::DiskError:
        trouble(Code::Io, "the guest's disk " + event.disk + " had an I/O error on the source: " +
                              event.detail);
        break;
      case GuestEvent::Kind::ConnectionLost:
        queue_->push(HandoverFailed{Error{Code::Unreachable, "the connection to the source's libvirt was lost: " +
                                          event.detail, "", true}});
        break;
      // Devices that came or went are looked at before the memory moves.
      case GuestEvent::Kind::DeviceAdded:
      case GuestEvent::Kind::DeviceRemoved:
      case GuestEvent::Kind::CopyChanged:
      case GuestEvent::Kind::CopyIoError:
      case GuestEvent::Kind::CopyFailed:
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
    if (event.kind == GuestEvent::Kind::Suspended) note_memory_there(event.received);
    if (event.kind == GuestEvent::Kind::Suspended && guarded) queue_->push(TargetSuspended{});
    if (event.kind == GuestEvent::Kind::CpusRunning) target_runs_at_.store(event.received);
    if (event.kind == GuestEvent::Kind::ConnectionLost) {
      queue_->push(HandoverFailed{Error{Code::Unreachable,
                                        "the connection to the target's libvirt was lost: " + event.detail, "",
                                        true}});
    }
  }

  // By the target's event or, should that be lost, by the end of libvirt's call.
  void note_memory_there(Instant when) {
    Instant never{};
    memory_there_at_.compare_exchange_strong(never, when);
  }

  // The guest first: the copy is as fast as its disks' latency allows (job/copy_pace.h).
  void keep_pace() {
    if (platform_.now() < next_look_) return;
    const bool before = std::holds_alternative<Reserving>(state_) || std::holds_alternative<Attaching>(state_);
    const auto* memory = std::get_if<MovingMemory>(&state_);
    const bool copying = std::holds_alternative<Copying>(state_) || (memory != nullptr && !memory->strict);
    const bool handing_over = std::holds_alternative<Synchronising>(state_) || (memory != nullptr && memory->strict);
    if (!before && !copying && !handing_over) return;
    const Instant start = platform_.now();
    next_look_ = start + kLookInterval;
    if (engine_) engine_->set_bandwidth(bandwidth());
    if (linked_ && engine_) engine_->link().set_compression(compression());
    if (handing_over) return;  // at the rate of enter_strict()
    const Result<memmig::GuestIo> io = source().disk_io(uuid());
    // A libvirt that is slow to answer is not asked all the time.
    next_look_ = platform_.now() + std::max<Duration>(kLookInterval, 10 * (platform_.now() - start));
    if (!io) return;
    Length read;
    if (copying) {
      for (const auto& disk : engine_->status().disks) read += disk.counters.read_bytes;
    }
    const Length pace = pace_.look(platform_.now(), *io, read);
    if (engine_) engine_->set_read_rate(pace);
  }

  // --- handover ---

  Status enter_strict() {
    // The guest's writes wait while much is left.
    engine_->set_read_rate(engine_->status().copied ? pace_.handover() : Length());
    gain_.reset();
    lead_.reset();
    rejoins_ = 0;
    Status entered;
    if (migrating_) entered = keep_images();
    if (entered) entered = engine_->enter_strict();
    if (!entered) {
      queue_->push(HandoverFailed{entered.error()});  // the link went down just now
      return {};
    }
    strict_since_ = platform_.now();
    if (migrating_) memory_may_move();
    look_for_strict();
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
    user_paused_.store(false);  // should the event that said so have been lost
    return {};
  }

  Status start_memory() {
    if (const Status ready = prepare_memory(); !ready) {
      // Nothing has begun there. What passes is waited for.
      if (ready.error().code != Code::Unreachable) return ready;
      queue_->push(HandoverFailed{ready.error()});
      return {};
    }
    return begin_memory();
  }

  // What needs both hosts, before anything is begun.
  Status prepare_memory() {
    if (!target().alive()) {
      DROVER_TRY(target_in_reach());
      DROVER_TRY(target().reconnect());
    }
    if (target_guest_left_) DROVER_TRY(end_target_guest());
    target_guest_left_ = false;
    DROVER_TRY(describe_again());
    if (std::get<MovingMemory>(state_).strict) DROVER_TRY(keep_images());
    return {};
  }

  // Before any memory moves: should all connections break then, the target's images may be needed to go on.
  Status keep_images() {
    DROVER_TRY(engine_->link().call({{"op", "keep"}}, kControlTimeout));
    return {};
  }

  // From the target's resume until the source is undefined, a source whose host restarts must not start the guest. libvirt
  // takes no such wish in the middle of a migration.
  Status hold_autostart() {
    if (!prepared_.guest.autostart) return {};
    DROVER_TRY(journal_->put(kAutostartKey, "held"));
    autostart_held_ = true;
    // Not what a move fails for.
    if (const Status set = source().set_autostart(uuid(), false); !set) {
      log_warning("switching the guest's autostart off: {}", set.error().to_string());
    }
    return {};
  }

  Status release_autostart() {
    if (!autostart_held_ || files_.mutation.forget_autostart) return {};
    (void)state_on(prepared_.source);  // connects again if need be
    DROVER_TRY(source().set_autostart(uuid(), true));
    autostart_held_ = false;
    Journal::Batch none;
    none.remove(kAutostartKey);
    return journal_->write(none, Journal::Sync::No);
  }

  Status begin_memory() {
    DROVER_TRY(hold_autostart());
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
    migrate.bandwidth = [this] { return bandwidth(); };
    migrate.connections = memory_channels(options_.memory_channels, prepared_.cores, bandwidth());
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
    memory_there_at_.store({});
    Journal::Batch none;
    none.remove(kBarrierKey).remove(kStampsKey);
    barrier_failed_ = false;
    barrier_journaled_ = released_ = false;
    guard_failures_ = 0;
    source_went_on_.store(false);
    DROVER_TRY(journal_->write(none, Journal::Sync::Yes));
    rejoins_ = 0;
    migrate_returned_.store(false);
    stop_flushing_.store(false);
    if (std::get<MovingMemory>(state_).strict) {
      stop_checkpoints();
      memory_may_move();
    } else if (checkpointer_) {
      checkpointer_->keep_bitmaps();
    }
    migrate.transit = [this] { return memory_transit(); };
    migrating_ = platform_.start_thread([this, migrate] {
      MigrateEnded ended;
      ended.status = source().migrate(migrate, [this](const memmig::MigrationProgress& progress) {
        meter_.memory(progress.memory_total, progress.memory_remaining);
      });
      if (ended.status) note_memory_there(platform_.now());
      migrate_returned_.store(true);
      queue_->push(std::move(ended));
    });
    return {};
  }

  // Strict mode was entered. No checkpoint is needed from now on: the target is flushed without. (One that is under way
  // is not waited for. The guest may be about to stop.)
  void memory_may_move() {
    if (checkpointer_) checkpointer_->end();
    tries_.memory_starts();
    memory_may_have_moved_ = true;
    flushing_ = platform_.start_thread([this] { keep_flushing(); });
  }

  // How far the target's QEMU is behind the source's.
  std::optional<memmig::MemoryTransit> memory_transit() {
    const auto stats = engine_->link().call({{"op", "stats"}}, kTransitPatience);
    if (!stats) return std::nullopt;
    const Length given(engine_->link().counters().memory_given);
    const auto loaded = mirror::get_unsigned(*stats, "memory_loaded");
    // An older receiver does not say: as if it were never behind.
    return memmig::MemoryTransit{given, loaded ? Length(*loaded) : given};
  }

  // Until the guest stands still: then the barrier has little left to flush, however
  // long its memory takes.
  void keep_flushing() {
    while (!stop_flushing_.load()) {
      if (!engine_->status().link_down) {
        if (const auto flushed = engine_->link().call({{"op", "flush"}}, kFlushPatience); !flushed) {
          log_warning("flushing the target: {}", flushed.error().to_string());
        }
      }
      const Instant next = platform_.now() + kFlushInterval;
      while (!stop_flushing_.load() && platform_.now() < next) platform_.sleep(kFlushPoll);
    }
  }

  // Waits for the end of libvirt's call and of a flush that is under way.
  void end_memory_threads() {
    stop_flushing_.store(true);
    migrating_.reset();
    flushing_.reset();
  }

  Status abort_memory() {
    // Nobody may be waiting for the target now, or QEMU could not drain its disks to let go of them.
    engine_->leave_strict();
    if (!migrating_) {
      // It never began (StartMemory itself failed): nobody else will say that it has ended.
      queue_->push(MigrateEnded{fail(Code::Cancelled, "the memory was not moved")});
      return {};
    }
    // QEMU answers nobody while it writes the last of the memory into a socket of which nobody takes it.
    if (stopped_early_) engine_->link().stop_relay();
    const Status aborted = source().abort_migration(uuid());
    if (!aborted) log_warning("aborting the memory: {}", aborted.error().to_string());
    // Without its connection the migration fails by itself, if it is not over yet.
    engine_->link().stop_relay();
    return {};
  }

  // libvirt's own ssh waits for as long as TCP does, two minutes and more: ours is asked first.
  Status target_in_reach() {
    if (!memmig::goes_by_ssh(target().uri())) return {};
    DROVER_TRY(platform_.run_on_target(plan().host, {.argv = {"true"}}));
    return {};
  }

  // The guest's state on one host. Over a new connection when the old one is gone: libvirt's daemon may
  // have been restarted. No thread of libvirt's call is left here.
  Result<GuestState> state_on(std::unique_ptr<memmig::Hypervisor>& host) {
    Result<GuestState> state = host->state(uuid());
    if (!state && state.error().code == Code::NotFound) return GuestState::ShutOff;
    if (state || host->alive()) return state;
    if (host == prepared_.target) DROVER_TRY(target_in_reach());
    const Status back = host->reconnect();
    if (back) log_info("connected to {} again", host->uri());
    // If only what a migration needs is not back this is answered all the same.
    state = host->state(uuid());
    if (!state && state.error().code == Code::NotFound) return GuestState::ShutOff;
    if (!state && !back) return fail(back.error());
    return state;
  }

  // After a migration that failed, or whose end nobody has told us. libvirt lets the source run again by
  // itself as a rule; where it did not, and the target can't run, it is done here. The target was not
  // resumed.
  Status settle() {
    end_memory_threads();
    if (files_.mutation.blind_settle) {
      queue_->push(Settled{Whereabouts::Source});
      return {};
    }
    const Instant start = platform_.now();
    std::string known;
    while (platform_.now() < start + kSettleTimeout) {
      const Result<GuestState> source_state = state_on(prepared_.source);
      const bool patient = !files_.resumed && platform_.now() < start + kLibvirtGrace;  // it may do it itself
      if (source_state && target_ran_) {
        // Whatever it is there by now: what it wrote there is nowhere else.
        if (*source_state == GuestState::Running) {
          return fail(Code::Held, "the guest runs on this host although it was resumed on the target");
        }
        queue_->push(Settled{Whereabouts::TargetRuns});
        return {};
      }
      // May have run there, that is; where it is off there by now, somebody has decided.
      const bool may_have_run = resume_tried_ && !files_.mutation.forget_target_ran;
      const bool here = source_state && settled_on_source(*source_state);
      if (here && !may_have_run) {
        if (settle_on_source()) return {};
        known = "on this host: " + std::string(memmig::state_name(*source_state));
        platform_.sleep(100ms);
        continue;
      }
      const Result<GuestState> target_state = state_on(prepared_.target);
      if (here && target_state && *target_state == GuestState::ShutOff && settle_on_source()) return {};
      const auto say = [](const Result<GuestState>& state) {
        return state ? std::string(memmig::state_name(*state)) : state.error().message;
      };
      known = "on this host: " + say(source_state) + "; on " + plan().host + ": " + say(target_state);
      if (here && target_state && *target_state != GuestState::ShutOff) {
        return fail(Code::Held, "the guest is on this host, and may have been resumed on the target (" + known + ")");
      }
      const bool went_on = source_went_on();
      if (target_state && *target_state == GuestState::Running) {
        // By somebody's hand, if not behind the barrier.
        if (!barrier_journaled_ || went_on) {
          return fail(Code::Held, fmt::format("the guest runs on {}, and its disks there are {}", plan().host,
                                              went_on ? "older than those here"
                                                      : "not known to be complete; if it shall stay there, remove it "
                                                        "and its images here by hand"));
        }
        queue_->push(Settled{Whereabouts::TargetRuns});
        return {};
      }
      // Behind the resume there is no way back: what stands still there may have run.
      if (may_have_resumed_ && barrier_journaled_ && !went_on && target_state && *target_state == GuestState::Paused) {
        DROVER_TRY(source_was_not_written());
        queue_->push(Settled{Whereabouts::Target});
        return {};
      }
      // It may have run there, and have been shut off since: what it wrote then is nowhere else.
      if (resume_tried_ && source_state && target_state && *target_state == GuestState::ShutOff &&
          !files_.mutation.forget_target_ran) {
        return fail(Code::Held, "the guest may have been told to run on " + plan().host +
                                    ", and is off there: whether it ran is not known (" + known + ")");
      }
      if (source_state && target_state) {
        const bool source_off = *source_state == GuestState::ShutOff;
        const bool target_off = *target_state == GuestState::ShutOff;
        if (source_off && (target_off || *target_state == GuestState::Paused)) {
          // One that went on here before it was shut off has left what waits on the target behind.
          if (target_off || went_on) {
            if (settle_on_source()) return {};
          } else {
            if (barrier_journaled_) DROVER_TRY(source_was_not_written());
            queue_->push(Settled{Whereabouts::Target});
            return {};
          }
        }
      }
      const bool may_take_back = !may_have_resumed_ || (target_state && *target_state == GuestState::ShutOff);
      if (source_state && *source_state == GuestState::Paused && !patient && may_take_back) take_back(target_state);
      platform_.sleep(100ms);  // libvirt has no event for "this is how I leave it"
    }
    return fail(Code::Held, "the handover failed, and where the guest is now is not known (" + known + ")");
  }

  // Behind the barrier that is journaled first: who resumes the job must not go forward, whatever is here by then.
  bool settle_on_source() {
    if (barrier_asked_ || released_) {
      if (const Status noted = journal_->put(kBarrierKey, kVoid); !noted) {
        log_error("{}", noted.error().to_string());
        return false;
      }
    }
    queue_->push(Settled{Whereabouts::Source});
    return true;
  }

  // Who passed the barrier may have died since, and the guest have run here while no process watched.
  Status source_was_not_written() {
    if (files_.mutation.ignore_stamps) return {};
    const auto what = [&](const std::string& why) {
      return fail(Code::Held, fmt::format("the guest stands still on {} as it was when it left this host, and {}: run it "
                                          "where its disks are right, and end it on the other host", plan().host, why));
    };
    DROVER_ASSIGN(const auto text, journal_->get(kStampsKey));
    const json stamps = json::parse(text.value_or(""), nullptr, false);
    for (const DiskPlan& disk : plan().disks) {
      const auto stamp = stamps.is_object() ? stamps.find(disk.disk) : stamps.end();
      if (!stamps.is_object() || stamp == stamps.end() || !stamp->is_string()) {
        return what("whether it ran here since is not known");
      }
      const Result<std::string> now = platform_.image_stamp(disk.source_path);
      if (!now) return what("whether it ran here since is not known (" + now.error().message + ")");
      if (*now != *stamp) return what(disk.source_path + " was written to since, or this host restarted");
    }
    return {};
  }

  Status stamp_source(Journal::Batch& batch) {
    json stamps = json::object();
    for (const DiskPlan& disk : plan().disks) {
      DROVER_ASSIGN(stamps[disk.disk], platform_.image_stamp(disk.source_path));
    }
    batch.put(kStampsKey, stamps.dump());
    return {};
  }

  // libvirt may have let it run when it took the migration for failed. Its events tell so, or writes since
  // the barrier, should the events be late or lost.
  [[nodiscard]] bool source_went_on() const {
    if (source_went_on_.load()) return true;
    return writes_at_barrier_ && engine_ && *writes_at_barrier_ != mirrored_writes();
  }

  [[nodiscard]] std::uint64_t mirrored_writes() const {
    std::uint64_t writes = 0;
    for (const auto& disk : engine_->status().disks) writes += disk.counters.guest_writes;
    return writes;
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
    if (barrier_asked_ || released_) {
      if (const Status noted = journal_->put(kBarrierKey, kVoid); !noted) return log_error("{}", noted.error().to_string());
    }
    if (const Status runs = source().resume(uuid()); !runs) {
      log_warning("resuming the source: {}", runs.error().to_string());
    }
  }

  Status pass_barrier() {
    if (!engine_) {
      return fail(Code::Held, "the guest's memory is on the target, but not all of its disks, and the process that "
                              "copied them has ended");
    }
    if (mirror_lost_.load() && !files_.mutation.forget_lost_mirror) {
      return fail(Code::Io, "QEMU let go of a disk's mirror before the guest stopped: the target misses writes");
    }
    mirrors_may_go_.store(true);
    if (barrier_failed_) platform_.sleep(kBarrierPause);
    barrier_failed_ = true;  // until it is passed
    const Instant start = platform_.now();
    Journal::Batch passed;
    // Now, that is, not when it has been passed: libvirt may let the source go on meanwhile.
    if (const Status stamped = stamp_source(passed); !stamped) log_warning("{}", stamped.error().to_string());
    if (!files_.mutation.skip_drain && !files_.mutation.skip_barrier) {
      Status drained = engine_->drain(kDrainTimeout);
      // A disk that can't be read or written won't be by asking again.
      if (!drained && disk_failed_.load()) return fail(Code::Held, drained.error().message);
      DROVER_TRY(std::move(drained));
    }
    const Instant drained = platform_.now();
    writes_at_barrier_ = mirrored_writes();
    barrier_asked_ = true;
    if (!files_.mutation.skip_barrier) {
      DROVER_ASSIGN(marks_.barrier, engine_->link().barrier(kBarrierTimeout));
    }
    marks_.drain_began = start;
    marks_.drained = drained;
    marks_.barrier_passed = platform_.now();
    log_info("barrier: drained in {} us, flushed and released in {} us",
             std::chrono::duration_cast<std::chrono::microseconds>(drained - start).count(),
             std::chrono::duration_cast<std::chrono::microseconds>(marks_.barrier_passed - drained).count());
    barrier_failed_ = false;
    passed.put(kBarrierKey, "passed");
    DROVER_TRY(journal_->write(passed, Journal::Sync::No));
    barrier_journaled_ = released_ = true;
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
    if (files_.mutation.no_guard) return {};
    std::vector<std::unique_ptr<ImageGuard>> guard;
    for (const DiskPlan& disk : plan().disks) {
      DROVER_ASSIGN(auto lock, platform_.guard_image(disk.source_path));
      guard.push_back(std::move(lock));
    }
    source_guard_ = std::move(guard);
    return {};
  }

  Status resume_target() {
    marks_.guard_began = platform_.now();
    if (const Status guarded = guard_source(); !guarded) {
      // Who has the images is looked at, and it is tried again.
      if (++guard_failures_ > kGuardTries) {
        return fail(Code::Held, "the source's images can't be guarded: " + guarded.error().message);
      }
      if (guard_failures_ > 1) platform_.sleep(kBarrierPause);
      queue_->push(SourceNotGuarded{guarded.error()});
      return {};
    }
    // The guard tells of a source that runs, not of one that went on and has ended since.
    if (source_went_on_and_ended_.load() && !resume_tried_ && !files_.mutation.forget_went_on) {
      return fail(Code::Held, "the guest went on here after it had stopped for the handover, and has ended since");
    }
    resume_tried_ = true;
    marks_.guarded = platform_.now();
    const Instant deadline = marks_.guarded + kCommitPatience;
    Status resumed = target().resume(uuid());
    if (!resumed && files_.mutation.resume_once) {
      source_guard_.clear();
      queue_->push(SourceNotGuarded{resumed.error()});
      return {};
    }
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
    DROVER_TRY(journal_->put(kTargetKey, "runs"));
    target_ran_ = true;
    queue_->push(TargetRuns{});
    return {};
  }

  // --- after ---

  Status commit() {
    end_memory_threads();
    stop_checkpoints();
    if (!barrier_journaled_ && !target_ran_ && !files_.mutation.commit_unseen) {
      return fail(Code::Held, "the target's disks are not known to be complete");
    }
    if (!files_.mutation.commit_unseen) DROVER_TRY(source_is_gone());
    DROVER_ASSIGN(const GuestState state, patient_state_on(prepared_.target));
    // Invariant 4: it must have been seen running there, now or by its event.
    if (!files_.mutation.commit_unseen && state != GuestState::Running && !target_ran_ &&
        target_runs_at_.load() == Instant()) {
      return fail(Code::Held, "the guest was resumed on the target but is " +
                                  std::string(memmig::state_name(state)) + " there");
    }
    if (state != GuestState::Running) {
      summary_.notes.push_back("the guest is " + std::string(memmig::state_name(state)) +
                               " on the target by now");
    }
    if (!files_.mutation.delete_before_journal) DROVER_TRY(journal_->put(kStateKey, "committed"));
    read_counters();
    end_receiver();  // lets go of the source's images, too
    if (prepared_.guest.autostart || autostart_held_) {
      note_if_failed("setting autostart on the target", target().set_autostart(uuid(), true));
    }
    if (options_.keep_source) {
      for (const DiskPlan& disk : plan().disks) summary_.kept.push_back(disk.source_path);
      summary_.notes.push_back(std::string("the guest's definition and disks were kept on this host, as asked: do not "
                                           "start both") +
                               (autostart_held_ ? " (its autostart is off here now)" : ""));
    } else {
      note_if_failed("removing the guest's definition here", undefine_source());
      source_guard_.clear();
      for (const DiskPlan& disk : plan().disks) delete_source(disk);
    }
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

  // A definition that stays could be started without its disks.
  Status undefine_source() {
    const Instant deadline = platform_.now() + kCommitPatience;
    while (true) {
      const Status undefined = source().undefine(uuid());
      if (undefined || platform_.now() > deadline) return undefined;
      log_warning("undefining the source: {}", undefined.error().to_string());
      platform_.sleep(500ms);
      (void)state_on(prepared_.source);  // connects again if need be
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
    if (!engine_) return;  // another process has copied
    const auto status = engine_->status();
    for (const auto& disk : status.disks) {
      summary_.data += disk.counters.read_bytes;
      summary_.mirrored_writes += disk.counters.guest_writes;
      summary_.sent_again += disk.counters.sent_again;
    }
    summary_.reconnects = status.link.reconnects;
    summary_.slowdown = slowdown_of(status);
    for (const auto& disk : status.disks) {
      summary_.damaged += disk.damaged;
      summary_.unverified += disk.unverified;
    }
    if (summary_.damaged > 0) {
      summary_.notes.push_back(fmt::format("{} on the target differed from what was sent to it: its disk or memory "
                                           "may be failing; the job's log says where",
                                           summary_.damaged == 1 ? "1 chunk" : fmt::format("{} chunks", summary_.damaged)));
    }
    for (const std::string& path : read_from_memory_) {
      if (!summary_.verified) break;
      summary_.notes.push_back(fmt::format(
          "what was read back of {} on {} came from memory: its filesystem allows nothing "
          "else",
          path, plan().host));
    }
    summary_.memory_bytes = Length(status.link.memory_bytes);
    summary_.saved_bytes = Length(status.link.bytes_saved);
    summary_.found = Length(status.link.found_bytes);
    summary_.wire_bytes = Length(status.link.bytes_sent + status.link.memory_bytes);
    if (const auto stats = engine_->link().call({{"op", "stats"}}, kControlTimeout)) {
      summary_.receiver_peak_memory = Length(mirror::get_unsigned(*stats, "peak_memory").value_or(0));
    }
  }

  void end_receiver() {
    if (!engine_) {
      if (const Status stopped = platform_.stop_receiver(plan().host, id_); !stopped) {
        log_warning("{}", stopped.error().to_string());
      }
      note_if_failed("clearing up after the receiver", clean_up_target("--keep"));
      return;
    }
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
    const bool kept = keep_partial();
    const bool partial = kept || (joining_can_wait_ && !cancel_.requested());
    undoing_.store(true);
    stop_checkpoints();
    if (engine_) {
      engine_->leave_strict();
      engine_->stop_copying();
    }
    end_memory_threads();
    mirrors_may_go_.store(true);
    // The mirrors first: from then on the guest is as it was.
    std::vector<std::string> stuck;
    if (files_.mutation.undo_keeps_mirrors) attached_.clear();
    for (const std::string& disk : attached_) {
      if (const Status gone = source().detach_mirror(uuid(), disk, partial); !gone) {
        log_warning("{}", gone.error().to_string());
        stuck.push_back(disk);
      }
    }
    if (files_.resumed && attached_.empty() && !partial) {
      collect("removing what is left of it in the guest's QEMU", source().detach_all(uuid()));
    }
    if (exporting_) collect("ending QEMU's NBD export", source().stop_exports(uuid(), socket_path("export")));
    bool runs_there = false;
    if (memory_started_ || (kept && target_guest_left_) || (files_.resumed && !partial)) {
      const Status ended = end_target_guest();
      runs_there = !ended && ended.error().code == Code::Held;
      collect("ending what is left of the guest on the target", ended);
    }
    const bool had_autostart = autostart_held_;
    collect("switching the guest's autostart on again", release_autostart());
    if (had_autostart && files_.resumed && state_on(prepared_.source).value_or(GuestState::Unknown) == GuestState::ShutOff) {
      observer_.note("the guest is off, and if this host has restarted, it was not started: its autostart was off while "
                     "its memory moved");
    }
    target_events_.reset();
    source_events_.reset();
    source_guard_.clear();
    bool removed = partial || runs_there || (!receiver_started_ && !files_.resumed);
    if (engine_) {
      if (!removed && linked_ && !engine_->status().link_down) {
        // The source runs, so even images that were to be kept are nobody's disks.
        removed =
            engine_->link().call({{"op", "remove"}, {"force", true}}, kRemoveTimeout).has_value();
      }
      engine_->stop();
      engine_.reset();
    }
    // Without its endpoint a mirror ends by itself; what is left of it can be removed then.
    for (const std::string& disk : stuck) {
      collect("detaching the mirror of " + disk, source().detach_mirror(uuid(), disk, partial));
    }
    // The receiver removes its images by itself when the link is gone; this is for one that was killed.
    if (!removed) collect("cleaning up on the target", clean_up_target("--force"));
    // One that is out of reach ends by itself, and leaves its images.
    if (partial) {
      if (const Status ended = platform_.stop_receiver(plan().host, id_); !ended) {
        log_warning("ending the receiver: {}", ended.error().to_string());
      }
    }
    partial_ = partial;
    if (!left.empty()) return fail(Code::Io, left, hint);
    queue_->push(Undone_{});
    return {};
  }

  // What was copied may stay for a resume: the journal, the images and QEMU's bitmaps are enough.
  [[nodiscard]] bool keep_partial() const {
    return options_.keep_partial && engine_ && !attached_.empty() && !memory_may_have_moved_;
  }

  // A guest that was being taken over and that libvirt has not cleared away, with its definition: the
  // pre-flight saw to it that there was none before. One that was complete when libvirt lost us it does not
  // clear away (docs/handover.md).
  Status end_target_guest() {
    DROVER_ASSIGN(const GuestState state, state_on(prepared_.target));
    // By somebody's hand: we have not resumed it, or would not be here.
    if (state == GuestState::Running) {
      return fail(Code::Held, "it runs there; it and its images were left alone");
    }
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
                    source_paths, target_paths, files_.journal);
    if (resume_tried_) {
      return Error{Code::Held, what,
                   fmt::format("the guest may have been told to run on {0}: look there (`virsh -c {1} domstate {2}`). If it "
                               "runs, or has run, the source's images are out of date: do not start it here. Once it "
                               "runs where it shall, `drover resume` goes on from there. {3}",
                               plan().host, prepared_.target->uri(), plan().guest, paths),
                   false};
    }
    return Error{Code::Held, what,
                 fmt::format("the guest was not resumed on {}; the source's images are complete; make sure that it "
                             "runs on one host only. {}",
                             plan().host, paths),
                 false};
  }

  MoveEnd finish() {
    meter_.enter(phase_of(state_));
    end_memory_threads();
    stop_checkpoints();
    source_events_.reset();
    target_events_.reset();
    const auto* undone = std::get_if<Undone>(&state_);
    if (undone != nullptr && partial_) (void)journal_->put(kStateKey, "partial");
    engine_.reset();  // its thread writes to the journal
    journal_.reset();
    if (undone != nullptr) {
      Error error = undone->reason;
      if (partial_) error.hint = fmt::format("what was copied is kept on {}: go on with `drover resume {}`, or give it "
                                             "up with `drover cancel {}`", plan().host, id_, id_);
      if (!undone->complete && error.hint.empty()) error.hint = "try again to clear up with `drover cancel " + id_ + "`";
      return {fail(std::move(error)), undone->complete && !partial_};
    }
    if (const auto* held = std::get_if<Held>(&state_)) return {fail(held_error(held->reason.message)), false};
    summary_.guest = plan().guest;
    summary_.host = plan().host;
    summary_.disks = plan().disks;
    summary_.phase_times = meter_.phase_times();
    summary_.total = meter_.elapsed();
    const Instant stopped = source_stopped_at_.load();
    Instant resumed = target_runs_at_.load();
    if (resumed == Instant()) resumed = resumed_at_;
    summary_.blackout = std::chrono::duration_cast<std::chrono::microseconds>(resumed - stopped);
    // The one that saw it stop may have been another process.
    if (stopped == Instant()) summary_.blackout = {};
    marks_.stopped = stopped;
    marks_.quiesced = quiesced_at_.load();
    marks_.memory_there = memory_there_at_.load();
    marks_.running = resumed;
    summary_.blackout_parts = blackout_parts(marks_);
    summary_.runner_peak_memory = platform_.peak_memory();
    return {std::move(summary_), true};
  }

  void report_progress(bool now_please = false) {
    if (!now_please && !meter_.due()) return;
    std::optional<std::string> down;  // why the link is
    if (engine_ && linked_) {
      const auto status = engine_->status();
      meter_.copy(status);
      if (status.link_down && !status.link_down->final) down = status.link_down->why.message;
    }
    Progress progress = meter_.progress(phase_of(state_));
    if (std::holds_alternative<Rejoining>(state_)) progress.waiting_for = "the guest's libvirt and QEMU";
    if (down) progress.waiting_for = "the link to " + plan().host + " (" + *down + ")";
    observer_.progress(progress);
  }

  Platform& platform_;
  const MoveOptions options_;
  Observer& observer_;
  Cancel& cancel_;
  Prepared prepared_;
  const JobFiles files_;
  const std::string id_;
  const std::unique_ptr<EventQueue> queue_;
  State state_ = Reserving{};
  ProgressMeter meter_;
  CopyPace pace_;
  CopyGain gain_;
  CopyLead lead_;
  std::optional<Instant> strict_since_;  // until the memory begins
  Instant next_look_{};
  Summary summary_;
  std::unique_ptr<Journal> journal_;
  bool receiver_started_ = false;
  bool linked_ = false;
  bool exporting_ = false;
  bool memory_started_ = false;         // a migration was, that is
  bool memory_may_have_moved_ = false;  // it was in strict mode then
  bool stopped_early_ = false;          // the guest, before the copy's end
  std::string journaled_state_;
  bool journal_is_new_ = false;  // begun beside a damaged one
  bool barrier_journaled_ = false;  // as passed
  bool released_ = false;           // by the target, its images: whatever became of the handover since
  bool target_ran_ = false;  // the guest, as the journal says or this process saw
  bool autostart_held_ = false;     // the source's, which had it
  bool joining_can_wait_ = false;   // for another process: something is out of reach
  bool may_have_resumed_ = false;  // an earlier process may have resumed the target
  bool partial_ = false;  // what was copied was left for a resume
  mirror::ReceiverRequest receiver_request_;
  std::uint64_t generation_ = 1;  // of the bitmaps
  int rejoins_ = 0;
  bool target_guest_left_ = false;  // of a handover that failed: ended before the next, when the target is in reach
  HandoverTries tries_;
  std::atomic<bool> too_slow_{
      false};  // the handover ended because a write would have waited for too long
  std::atomic<bool> link_was_down_{false};
  bool verifying_ = false;
  std::vector<std::string>
      read_from_memory_;  // the target's images of which --verify can't read what is stored
  Instant handover_not_before_{};
  std::mutex targets_mutex_;  // guards the next two
  std::optional<std::vector<mirror::TargetDisk>> targets_;  // not noted yet
  std::vector<mirror::TargetDisk> known_targets_;
  std::atomic<bool> verify_again_{false};
  std::mutex notes_mutex_;
  std::vector<std::string> notes_;  // not said yet
  std::vector<std::string> attached_;
  // Before the engine: its thread uses it until it ends.
  std::atomic<bool> mirrors_may_go_{false};
  std::atomic<bool> mirror_lost_{false};  // while the guest still wrote
  std::optional<RecordStore> records_;  // of engine_
  std::unique_ptr<mirror::MirrorEngine> engine_;
  std::unique_ptr<Checkpointer> checkpointer_;
  std::atomic<bool> disk_failed_{false};
  std::atomic<bool> undoing_{false};  // no receiver is started any more
  std::atomic<bool> user_paused_{false};
  std::atomic<bool> source_went_on_{false};  // since it stopped for the handover
  std::atomic<bool> source_went_on_and_ended_{false};
  std::atomic<Instant> source_stopped_at_{};
  std::atomic<Instant> quiesced_at_{};
  std::atomic<Instant> memory_there_at_{};
  std::atomic<Instant> target_runs_at_{};
  BlackoutMarks marks_;  // the job's thread's
  std::optional<std::uint64_t> writes_at_barrier_;
  Instant resumed_at_{};
  bool barrier_asked_ = false;
  bool barrier_failed_ = false;  // the last time
  bool resume_tried_ = false;
  int refusals_ = 0;
  int guard_failures_ = 0;  // in a row
  std::vector<std::unique_ptr<ImageGuard>> source_guard_;
  std::unique_ptr<Thread> migrating_;  // calls migrate()
  std::unique_ptr<Thread> flushing_;   // has the target flush meanwhile
  std::atomic<bool> migrate_returned_{false};
  std::atomic<bool> stop_flushing_{false};
  std::unique_ptr<memmig::Subscription> source_events_;
  std::unique_ptr<memmig::Subscription> target_events_;
};

}  // namespace

std::string endpoint_socket(const memmig::GuestInfo& guest, std::string_view name) {
  return fmt::format("{}/drover-{}.sock", guest.private_directory, name);
}

MoveEnd run_move(Platform& platform, const MoveOptions& options, Observer& observer, Cancel& cancel, Prepared prepared,
                 const JobFiles& files, std::optional<Error> reason) {
  Move job(platform, options, observer, cancel, std::move(prepared), files);
  return job.run(std::move(reason));
}

}  // namespace drover::job
