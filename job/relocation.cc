// SPDX-License-Identifier: Apache-2.0
//
// The driver of job/relocate_machine.h.
#include "memmig/relocation.h"

#include <fmt/format.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "blockcopy/image_file.h"
#include "job/cold_copy.h"
#include "job/inbox.h"
#include "job/journal.h"
#include "job/new_images.h"
#include "job/progress_meter.h"
#include "job/relocate_machine.h"
#include "job/run_relocation.h"
#include "memmig/image_lock.h"

namespace drover::job {
namespace relocation {
namespace {

using namespace std::chrono_literals;
using memmig::DiskPlace;
using memmig::GuestEvent;
using memmig::GuestPlaces;

constexpr auto kLookInterval = 250ms;    // without an event
constexpr auto kLibvirtPatience = 120s;  // for a libvirtd that is being restarted
constexpr auto kPatientPause = 500ms;
constexpr auto kLetGoPatience = 10s;
constexpr auto kLetGoPause = 50ms;
constexpr auto kFailurePatience = 1s;  // for QEMU's word on why a copy ended
// Of data that QEMU has in flight for a disk. Measured on a machine whose disk is the limit, 2 GiB:
// 16 MiB (QEMU's own choice), 4, 2 and 1 took 3.6, 3.8, 3.5 and 4.0 s, while the guest's writes
// took 75, 22, 4 and 1.5 ms on the average (into XFS; into ext4 4, 3, 2.8 and 1.7): they stand in
// the same queue.
constexpr Length kCopyBuffer = 2_MiB;
constexpr Length kFull = 4_MiB;          // less is left on a filesystem that is full
constexpr Length kThickMargin = 64_MiB;  // a copy that takes more than that more is worth a word
constexpr std::string_view kStateKey = "state";

class Relocation {
 public:
  Relocation(const RelocateOptions& options, Observer& observer, Cancel& cancel,
             PreparedRelocation prepared, const JobFiles& files)
      : options_(options),
        observer_(observer),
        cancel_(cancel),
        prepared_(std::move(prepared)),
        files_(files),
        limits_{prepared_.plan.disks.size(), std::max(1U, options.parallel)} {}

  MoveEnd run(std::optional<Error> undo_because) {
    log_info("job {}: relocation of {}{}", files_.id, plan().guest,
             files_.resumed ? ", resumed" : "");
    if (Status ready = open_journal(); !ready) return {fail(ready.error()), !files_.resumed};
    if (files_.resumed) {
      state_ = Settling{std::move(undo_because)};
    } else if (memmig::copied_live(prepared_.guest)) {
      state_ = Making{};
    } else {
      state_ = CopyingCold{};
    }
    meter_.enter(phase_of(state_));
    for (const DiskPlan& disk : disks()) {
      shown_.push_back({.disk = disk.disk, .size = disk.virtual_size});
    }
    subscribe();
    inbox_.push(Begin{});
    while (!ended(state_)) {
      if (const auto event = inbox_.wait(cancel_, time_to_look(), CancelWished{})) handle(*event);
      look();
      share_bandwidth();
      report_progress();
    }
    return finish();
  }

 private:
  [[nodiscard]] const Plan& plan() const { return prepared_.plan; }
  [[nodiscard]] const std::vector<DiskPlan>& disks() const { return prepared_.plan.disks; }
  [[nodiscard]] memmig::DiskHost& host() { return *prepared_.host; }
  [[nodiscard]] const std::string& uuid() const { return prepared_.guest.uuid; }

  // --- the machine ---

  void handle(const Event& event) {
    log_event(event);
    const Phase before = phase_of(state_);
    Step next = step(std::move(state_), event, limits_);
    state_ = std::move(next.state);
    if (files_.state) files_.state(state_name(state_));
    if (phase_of(state_) != before) {
      meter_.enter(phase_of(state_));
      report_progress(true);
    }
    for (const Action& action : next.actions) {
      log_info("{}: {}", state_name(state_), action_name(action.what));
      Status status = journal_state();
      // One that can't be written ends what can be undone, and keeps nobody from undoing it.
      if (status || std::holds_alternative<Undoing>(state_)) status = carry_out(action);
      if (status) continue;
      // Whatever libvirt says of a connection that breaks under a call.
      if (!host().alive()) {
        status.error().code = Code::Unreachable;
        status.error().retryable = true;
      }
      log_error("{} failed: {}", action_name(action.what), status.error().to_string());
      inbox_.push(ActionFailed{action, status.error()});
    }
  }

  void log_event(const Event& event) {
    if (std::holds_alternative<Seen>(event) || std::holds_alternative<Woken>(event))
      return;  // too many
    const auto* failed = std::get_if<ActionFailed>(&event);
    log_info("{}: {} {}", state_name(state_), event_name(event),
             failed != nullptr ? failed->error.to_string() : "");
  }

  Status carry_out(const Action& action) {
    switch (action.what) {
      case Do::Make: return make();
      case Do::StartCopy: return start_copy(action.disk);
      case Do::Pivot: return pivot(action.disk);
      case Do::CopyCold: return copy_cold();
      case Do::Point: return point();
      case Do::Drop: return drop();
      case Do::Commit: return commit();
    }
    CHECK(false, "every action is carried out");
  }

  // --- the journal ---

  Status open_journal() {
    // A job that was killed in its first moment has none yet, and has done nothing.
    DROVER_ASSIGN(journal_, Journal::open(files_.journal, Journal::Make::IfMissing));
    images_ = std::make_unique<NewImages>(
        *journal_, NewImages::Options{.job = files_.id, .work_directory = files_.directory});
    DROVER_ASSIGN(const auto state, journal_->get(kStateKey));
    journaled_state_ = state.value_or("");
    if (state) {
      log_info("the journal says: {}", journaled_state_);
      for (const DiskPlan& disk : disks()) {
        DROVER_ASSIGN(const auto asked, journal_->get(asked_key(disk.disk)));
        if (asked) asked_.insert(disk.disk);
      }
      return {};
    }
    for (const DiskPlan& disk : disks()) DROVER_TRY(images_->note_source(disk));
    return {};
  }

  // That disk was told to go over.
  static std::string asked_key(const std::string& disk) { return "asked/" + disk; }

  // What is about to be done is on stable storage first.
  Status journal_state() {
    const std::string_view name = state_name(state_);
    if (name == journaled_state_) return {};
    DROVER_TRY(journal_->put(kStateKey, name));
    journaled_state_ = name;
    return {};
  }

  // --- libvirt ---

  void subscribe() {
    auto events = host().subscribe(uuid(), [this](const GuestEvent& event) { on_event(event); });
    // Without events it goes more slowly.
    if (events) {
      events_ = std::move(*events);
    } else {
      log_warning("{}", events.error().to_string());
    }
  }

  // On a thread of the hypervisor's.
  void on_event(const GuestEvent& event) {
    const std::lock_guard lock(events_mutex_);
    if (event.kind == GuestEvent::Kind::CopyIoError) io_errors_[event.disk] = event.detail;
    if (event.kind == GuestEvent::Kind::CopyFailed) failures_[event.disk] = event.detail;
    const bool look_now =
        event.kind == GuestEvent::Kind::CopyChanged || event.kind == GuestEvent::Kind::CopyFailed ||
        event.kind == GuestEvent::Kind::Stopped || event.kind == GuestEvent::Kind::Started;
    if (!look_now) return;
    look_now_.store(true);
    inbox_.push(Woken{});
  }

  // Does it over a new connection if the old one is gone, for a while.
  template <class Call>
  auto patiently(Call call) -> decltype(call()) {
    const Instant deadline = now() + kLibvirtPatience;
    for (;;) {
      auto result = call();
      if (result || result.error().code != Code::Unreachable || now() > deadline) return result;
      log_warning("{}", result.error().to_string());
      (void)reconnect();
      report_progress();
      std::this_thread::sleep_for(kPatientPause);
    }
  }

  bool reconnect() {
    if (host().alive()) return true;
    waiting_for_ = "libvirt on this host";
    if (!host().reconnect()) return false;
    reconnected_ = true;
    log_info("connected to {} again", host().uri());
    waiting_for_.clear();
    return true;
  }

  // --- looking ---

  [[nodiscard]] bool looks() const {
    return std::holds_alternative<Settling>(state_) || std::holds_alternative<Copying>(state_) ||
           std::holds_alternative<Switching>(state_);
  }

  [[nodiscard]] std::chrono::milliseconds time_to_look() const {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(next_look_ - now());
    return std::clamp(left, 1ms, std::chrono::milliseconds(kLookInterval));
  }

  void look() {
    if (!looks()) {
      next_look_ = now() + kLookInterval;
      return;
    }
    if (!look_now_.exchange(false) && now() < next_look_) return;
    next_look_ = now() + kLookInterval;
    if (!reconnect()) return;
    auto places = host().disk_places(uuid());
    if (!places && places.error().code == Code::NotFound) {
      handle(Seen{.exists = false});
      look_soon();
      return;
    }
    if (!places) {
      log_warning("{}", places.error().to_string());
      return;
    }
    places_ = std::move(*places);
    if (const auto doubt = doubtful()) {
      handle(Doubtful{*doubt});
      return;
    }
    Seen seen{.exists = true, .runs = places_.runs};
    for (std::size_t i = 0; i < disks().size(); ++i) {
      const std::optional<DiskSeen> disk = see(i);
      if (!disk) return;  // look again soon
      seen.disks.push_back(*disk);
    }
    const std::string_view before = state_name(state_);
    handle(seen);
    if (state_name(state_) != before) look_soon();
  }

  // It was told to go over, its libvirt was away meanwhile, and now it is off. libvirt that sees
  // both happen has them in its definition; else nobody knows which came first.
  [[nodiscard]] bool doubtful(const DiskPlan& disk) const {
    const DiskPlace* place = places_.disk(disk.disk);
    return reconnected_ && !places_.runs && asked_.contains(disk.disk) && place != nullptr &&
           place->persistent_path != disk.target_path;
  }

  [[nodiscard]] std::optional<Error> doubtful() const {
    for (const DiskPlan& disk : disks()) {
      if (!doubtful(disk)) continue;
      const bool lost = !unused(disk.source_path) || !unused(disk.target_path);
      const std::string newest = !unused(disk.target_path) ? "the QEMU uses " + disk.target_path
                                 : !unused(disk.source_path)
                                     ? "the QEMU uses " + disk.source_path
                                     : "which of " + disk.source_path + " and " + disk.target_path +
                                           " is newer is not known";
      return Error{Code::Held,
                   fmt::format("{} while disk {} changed over: {}",
                               lost ? "libvirt has lost the guest, whose QEMU still runs,"
                                    : "libvirt was away and the guest ended",
                               disk.disk, newest),
                   "", false};
    }
    return std::nullopt;
  }

  void look_soon() { look_now_.store(true); }

  // None: QEMU's word on why its copy ended may be on its way.
  std::optional<DiskSeen> see(std::size_t index) {
    const DiskPlan& disk = disks()[index];
    const DiskPlace* place = places_.disk(disk.disk);
    DiskSeen seen;
    if (place == nullptr) return seen;
    const std::string& path = places_.runs ? place->path : place->persistent_path;
    seen.switched = path == disk.target_path;
    if (!seen.switched && place->copying && place->copy_path == disk.target_path) {
      seen.copy = place->ready ? DiskSeen::Copy::Ready : DiskSeen::Copy::Running;
    }
    show(index, place->copying ? place->copied : Length(),
         place->copying ? place->to_copy : Length(), seen.switched);
    if (seen.copy != DiskSeen::Copy::None) {
      started_.insert(index);  // also if another process began it
      gone_since_.erase(index);
    }
    const bool begun = started_.contains(index) || asked_.contains(disk.disk);
    if (seen.switched || seen.copy != DiskSeen::Copy::None || !begun) return seen;
    seen.failure = why_ended(disk);
    if (seen.failure) return seen;
    const auto [since, fresh] = gone_since_.emplace(index, now());
    if (now() < since->second + kFailurePatience) return std::nullopt;
    seen.failure = guessed_failure(disk);
    return seen;
  }

  std::optional<Error> why_ended(const DiskPlan& disk) {
    const std::lock_guard lock(events_mutex_);
    const auto failure = failures_.find(disk.disk);
    if (failure == failures_.end()) return std::nullopt;
    const bool reading = io_errors_[disk.disk] == "read";
    const std::string& path = reading ? disk.source_path : disk.target_path;
    const bool full = failure->second.find("No space left") != std::string::npos;
    return Error{full ? Code::NoSpace : Code::Io,
                 fmt::format("disk {}: {} {}: {}", disk.disk, reading ? "reading" : "writing", path,
                             failure->second),
                 "the guest goes on with the old image", false};
  }

  // Its end came while nobody could listen.
  static std::optional<Error> guessed_failure(const DiskPlan& disk) {
    struct statvfs space {};
    if (disk.target_block_device || ::statvfs(disk.target_path.c_str(), &space) != 0) {
      return std::nullopt;
    }
    if (Length(static_cast<std::uint64_t>(space.f_bavail) * space.f_frsize) >= kFull) {
      return std::nullopt;
    }
    return Error{Code::NoSpace,
                 fmt::format("disk {}: the filesystem of {} is full", disk.disk, disk.target_path),
                 "the guest goes on with the old image", false};
  }

  // --- the guest's QEMU copies ---

  // Neither gone over nor being copied, when last looked at.
  [[nodiscard]] bool untouched(std::size_t index) const {
    const DiskPlan& disk = disks()[index];
    const DiskPlace* place = places_.disk(disk.disk);
    if (place == nullptr) return true;
    if (place->path == disk.target_path) return false;
    return !(place->copying && place->copy_path == disk.target_path);
  }

  Status make() {
    for (std::size_t i = 0; i < disks().size(); ++i) {
      if (!untouched(i)) continue;
      DROVER_TRY(images_->remove(disks()[i]));  // what an earlier process made
      if (Status made = images_->make(disks()[i], cluster_size(disks()[i])); !made) {
        return fail(images_->in_its_own_name(disks()[i], std::move(made).error()));
      }
    }
    inbox_.push(Made{});
    look_soon();
    return {};
  }

  [[nodiscard]] Length cluster_size(const DiskPlan& disk) const {
    const memmig::GuestDisk* info = prepared_.guest.disk(disk.disk);
    const bool same = info != nullptr && disk.source_format == disk.target_format;
    return same ? info->cluster_size : Length();
  }

  Status start_copy(std::size_t index) {
    const DiskPlan& disk = disks()[index];
    {
      const std::lock_guard lock(events_mutex_);
      io_errors_.erase(disk.disk);
      failures_.erase(disk.disk);
    }
    gone_since_.erase(index);
    if (asked_.erase(disk.disk) != 0) {
      DROVER_TRY(
          journal_->write(Journal::Batch().remove(asked_key(disk.disk)), Journal::Sync::Yes));
    }
    DROVER_TRY(host().end_stray_copy(uuid(), disk.disk, disk.target_path));
    const Length share = bandwidth_share(1);
    DROVER_TRY(
        unless_off(host().start_copy(uuid(), {.disk = disk.disk,
                                              .target_path = disk.target_path,
                                              .target_format = disk.target_format,
                                              .target_block_device = disk.target_block_device,
                                              .bandwidth = share,
                                              .buffer = kCopyBuffer})));
    started_.insert(index);
    given_[index] = share;
    look_soon();
    return {};
  }

  Status pivot(std::size_t index) {
    // A limit would make the guest's last writes slow to follow.
    const std::string& disk = disks()[index].disk;
    DROVER_TRY(journal_->put(asked_key(disk), "1"));
    asked_.insert(disk);
    reconnected_ = false;
    DROVER_TRY(unless_off(host().set_copy_bandwidth(uuid(), disk, Length())));
    DROVER_TRY(unless_off(host().pivot_copy(uuid(), disk)));
    look_soon();
    return {};
  }

  // A guest that was just shut off is no error: the next look sees it.
  Status unless_off(Status done) {
    if (done || done.error().code != Code::NotFound) return done;
    const auto state = host().state(uuid());
    if (!state || *state != memmig::GuestState::ShutOff) return done;
    Error passing = std::move(done).error();
    passing.retryable = true;
    return fail(std::move(passing));
  }

  // --- bandwidth ---

  // Each disk's part, when `more` are about to begin.
  [[nodiscard]] Length bandwidth_share(std::size_t more) const {
    const std::uint64_t limit = files_.bandwidth ? files_.bandwidth->load() : 0;
    if (limit == 0) return {};
    const std::size_t sharing = std::max<std::size_t>(copying_now().size() + more, 1);
    return Length(std::max<std::uint64_t>(limit / sharing, 1));
  }

  [[nodiscard]] std::vector<std::size_t> copying_now() const {
    std::vector<std::size_t> out;
    const auto* copying = std::get_if<Copying>(&state_);
    if (copying == nullptr) return out;
    for (std::size_t i = 0; i < copying->disks.size(); ++i) {
      if (copying->disks[i] == Stage::Copying) out.push_back(i);
    }
    return out;
  }

  void share_bandwidth() {
    const Length share = bandwidth_share(0);
    for (const std::size_t index : copying_now()) {
      const auto given = given_.find(index);
      if (given != given_.end() && given->second == share) continue;
      if (const Status set = host().set_copy_bandwidth(uuid(), disks()[index].disk, share); !set) {
        log_debug("{}", set.error().to_string());
        continue;
      }
      given_[index] = share;
    }
  }

  // --- the guest is off: drover copies ---

  Status copy_cold() {
    cold_.reset();
    events_.reset();
    // It may have run until now, and libvirt may still be at work on its end.
    DROVER_ASSIGN(const GuestPlaces places, patiently([&] { return host().disk_places(uuid()); }));
    places_ = places;
    cold_indices_.clear();
    std::vector<ColdCopy::Disk> cold;
    for (std::size_t i = 0; i < disks().size(); ++i) {
      const DiskPlan& disk = disks()[i];
      const DiskPlace* place = places_.disk(disk.disk);
      if (place != nullptr && place->persistent_path == disk.target_path) {
        show(i, {}, {}, true);
        continue;
      }
      const memmig::GuestDisk* info = prepared_.guest.disk(disk.disk);
      const bool flat = info != nullptr && !info->backing_chain;
      const bool same_format = disk.source_format == disk.target_format;
      cold.push_back({.plan = disk,
                      .cluster_size = cluster_size(disk),
                      .plain = disk.source_format == "raw" && flat,
                      .clone = options_.keep_source && flat && same_format &&
                               !disk.source_block_device && !disk.target_block_device});
      cold_indices_.push_back(i);
    }
    cold_ = std::make_unique<ColdCopy>(
        *images_, std::move(cold),
        ColdCopy::Options{.work_directory = files_.directory,
                          .bandwidth =
                              [bandwidth = files_.bandwidth] {
                                return bandwidth ? Length(bandwidth->load()) : Length();
                              },
                          .done =
                              [this](const Status& done) {
                                if (done) {
                                  inbox_.push(Copied{});
                                } else {
                                  inbox_.push(ActionFailed{{Do::CopyCold}, done.error()});
                                }
                              }});
    return {};
  }

  Status point() {
    std::vector<memmig::TargetDisk> targets;
    for (const std::size_t index : cold_indices_) {
      const DiskPlan& disk = disks()[index];
      DROVER_TRY(images_->publish(disk));
      targets.push_back(
          {disk.disk, disk.target_path, disk.target_format, disk.target_block_device});
    }
    DROVER_TRY(patiently([&] { return host().point_persistent(uuid(), targets); }));
    inbox_.push(Pointed{});
    return {};
  }

  // --- the end ---

  // What went over all the same stays: a pivot that an earlier process asked for may come before
  // the abort.
  Status drop() {
    cold_.reset();
    DROVER_TRY(end_copies());
    Status dropped;
    bool some_went = false;
    for (const DiskPlan& disk : disks()) {
      const DiskPlace* place = places_.disk(disk.disk);
      if (place != nullptr &&
          (place->path == disk.target_path || place->persistent_path == disk.target_path)) {
        some_went = true;
        continue;
      }
      if (doubtful(disk)) {
        observer_.note("both images of " + disk.disk + " were kept: " + disk.source_path + " and " +
                       disk.target_path);
        continue;
      }
      // libvirt may have lost a guest that it takes for off; its QEMU may use the new image.
      Status one =
          patiently([&] { return host().end_stray_copy(uuid(), disk.disk, disk.target_path); });
      if (one) one = let_go(disk.target_path);
      if (one) one = images_->remove(disk);
      if (!one && dropped) dropped = std::move(one);
    }
    if (dropped) inbox_.push(Dropped{some_went});
    return dropped;
  }

  // Until none is left. One that is about to finish can't be ended, and is waited for.
  Status end_copies() {
    const Instant deadline = now() + kLetGoPatience;
    for (Status ended;; std::this_thread::sleep_for(kLetGoPause)) {
      auto places = patiently([&] { return host().disk_places(uuid()); });
      if (!places && places.error().code == Code::NotFound) places = GuestPlaces{};
      DROVER_ASSIGN(places_, std::move(places));
      bool copying = false;
      for (const DiskPlan& disk : disks()) {
        const DiskPlace* place = places_.disk(disk.disk);
        if (place == nullptr || !place->copying || place->copy_path != disk.target_path) continue;
        copying = true;
        ended = patiently([&] { return host().abort_copy(uuid(), disk.disk); });
      }
      if (!copying) return {};
      if (now() > deadline) {
        return ended ? fail(Code::Busy, "libvirt does not end its copy job", "try again") : ended;
      }
    }
  }

  Status commit() {
    DROVER_TRY(definitions_agree());
    std::vector<bool> durable;
    for (const DiskPlan& disk : disks()) durable.push_back(switched(disk) && make_durable(disk));
    const auto uses = patiently([&] { return all_image_uses(host()); });
    if (!uses) note("who uses the old images could not be found out: " + uses.error().message);
    DROVER_TRY(journal_->put(kStateKey, "committed"));
    for (std::size_t i = 0; i < disks().size(); ++i) {
      const DiskPlan& disk = disks()[i];
      if (!switched(disk)) continue;
      gone_over_.push_back(disk);
      if (durable[i] && uses) {
        delete_source(disk, *uses);
      } else {
        summary_.kept.push_back(disk.source_path);
      }
    }
    cold_.reset();  // it holds the old images' locks
    deleted_.clear();
    std::vector<std::string> paths;
    for (const DiskPlan& disk : gone_over_) {
      paths.push_back(disk.source_path);
      paths.push_back(disk.target_path);
    }
    host().refresh_pools(paths);
    inbox_.push(Committed{});
    return {};
  }

  [[nodiscard]] bool switched(const DiskPlan& disk) const {
    const DiskPlace* place = places_.disk(disk.disk);
    return place != nullptr && place->path == disk.target_path;
  }

  // libvirt changes both when a disk goes over, where both named the same; it is looked at, and put
  // right.
  Status definitions_agree() {
    for (bool again = false;; again = true) {
      auto places = patiently([&] { return host().disk_places(uuid()); });
      if (!places && places.error().code == Code::NotFound) {
        note("the guest has ended, and there is no definition of it");
        places_ = {};
        return {};
      }
      DROVER_ASSIGN(places_, std::move(places));
      std::vector<memmig::TargetDisk> wrong;
      for (const DiskPlan& disk : disks()) {
        const DiskPlace* place = places_.disk(disk.disk);
        if (place == nullptr || place->path != disk.target_path) continue;
        if (place->persistent_path.empty() || place->persistent_path == disk.target_path) continue;
        wrong.push_back(
            {disk.disk, disk.target_path, disk.target_format, disk.target_block_device});
      }
      if (wrong.empty()) return {};
      if (again) {
        return fail(Code::Held,
                    "the persistent definition of the guest still names the old images");
      }
      DROVER_TRY(patiently([&] { return host().point_persistent(uuid(), wrong); }));
    }
  }

  // No QEMU writes to it, whatever libvirt says.
  static Status unused(const std::string& path) {
    const auto lock = memmig::lock_image(path);
    if (lock || lock.error().code == Code::NotFound) return {};
    return fail(lock.error());
  }

  // The same of a copy that has ended just now: QEMU closes its image a moment later.
  static Status let_go(const std::string& path) {
    const Instant deadline = now() + kLetGoPatience;
    for (;;) {
      Status free = unused(path);
      if (free || free.error().code != Code::Busy || now() > deadline) return free;
      std::this_thread::sleep_for(kLetGoPause);
    }
  }

  // Nobody else may hold the only copy of what is deleted next.
  bool make_durable(const DiskPlan& disk) {
    Status done;
    if (places_.runs) {
      done = patiently([&] { return host().flush_disk(uuid(), disk.disk); });
    } else {
      done = unused(disk.target_path);
    }
    if (done) done = blockcopy::sync_file(disk.target_path);
    if (!done) note("the old image of " + disk.disk + " was kept: " + done.error().message);
    return done.has_value();
  }

  void delete_source(const DiskPlan& disk, const std::vector<memmig::ImageUse>& uses) {
    note_growth(disk);
    const Status deleted = try_to_delete(disk, uses);
    if (deleted) {
      summary_.deleted.push_back(disk.source_path);
      return;
    }
    summary_.kept.push_back(disk.source_path);
    if (!deleted.error().message.empty()) {
      note(disk.source_path + " was kept: " + deleted.error().message);
    }
  }

  Status try_to_delete(const DiskPlan& disk, const std::vector<memmig::ImageUse>& uses) {
    if (!disk.delete_source || disk.source_block_device) return fail(Code::Denied, "");
    const std::string user =
        memmig::other_user(uses, disk.source_path, plan().guest, disk.disk, blockcopy::same_file);
    if (!user.empty()) return fail(Code::Busy, "it is used by " + user);
    // One that was renamed is the guest's own disk now.
    if (!disk.renamed) DROVER_TRY(unused(disk.source_path));
    DROVER_ASSIGN(blockcopy::UnlinkedFile gone, images_->remove_source(disk));
    deleted_.push_back(std::move(gone));
    return {};
  }

  void note_growth(const DiskPlan& disk) {
    if (disk.renamed || disk.target_block_device || disk.source_block_device) return;
    const auto before = blockcopy::allocated(disk.source_path);
    const auto after = blockcopy::allocated(disk.target_path);
    if (!before || !after || disk.source_format != disk.target_format) return;
    const memmig::GuestDisk* info = prepared_.guest.disk(disk.disk);
    if (info != nullptr && info->backing_chain) return;
    if (*after > *before + *before + kThickMargin) {
      note(fmt::format(
          "{} takes {}, the old image took {}: this libvirt and QEMU do not keep it thin",
          disk.target_path, format_length(*after), format_length(*before)));
    }
  }

  void note(const std::string& text) { summary_.notes.push_back(text); }

  MoveEnd finish() {
    report_progress(true);
    cold_.reset();
    events_.reset();
    images_.reset();
    journal_.reset();
    if (const auto* undone = std::get_if<Undone>(&state_)) {
      Error error = undone->reason;
      if (!undone->complete) error.hint = "clear up with `drover cancel " + files_.id + "`";
      return {fail(std::move(error)), undone->complete};
    }
    if (const auto* held = std::get_if<Held>(&state_)) {
      return {
          fail(Code::Held, held->reason.message,
               fmt::format("nothing was deleted, and the guest must not be started before that is "
                           "clear; `drover resume {}` looks again",
                           files_.id)),
          false};
    }
    if (const auto& partly = std::get<Finished>(state_).partly)
      return {partly_done(*partly), true, true};
    summary_.kind = Kind::Relocate;
    summary_.guest = plan().guest;
    summary_.host = plan().host;
    summary_.disks = gone_over_;
    for (const DiskProgress& disk : shown_) summary_.data += disk.data;
    summary_.phase_times = meter_.phase_times();
    summary_.total = meter_.elapsed();
    return {std::move(summary_), true};
  }

  [[nodiscard]] Result<Summary> partly_done(const Error& why) const {
    std::string went;
    for (const DiskPlan& disk : gone_over_) {
      went += fmt::format("{}{} is {} now", went.empty() ? "" : ", ", disk.disk, disk.target_path);
    }
    return fail(Error{why.code, why.message + " (" + went + "; the others are where they were)",
                      why.hint, false});
  }

  // `done`: it has gone over.
  void show(std::size_t index, Length copied, Length data, bool done) {
    DiskProgress& shown = shown_[index];
    shown.data = std::max(shown.data, data);
    shown.copied = done ? shown.data : std::min(copied, shown.data);
    shown.dirty = !done && data > copied ? data - copied : Length();
  }

  void report_progress(bool now_please = false) {
    if (!now_please && !meter_.due()) return;
    if (cold_) {
      const std::vector<DiskProgress> cold = cold_->progress();
      for (std::size_t i = 0; i < cold.size(); ++i) {
        show(cold_indices_[i], cold[i].copied, cold[i].data, false);
      }
    }
    meter_.disks(shown_);
    Progress progress = meter_.progress(phase_of(state_));
    progress.waiting_for = waiting_for_;
    observer_.progress(progress);
  }

  const RelocateOptions options_;
  Observer& observer_;
  Cancel& cancel_;
  PreparedRelocation prepared_;
  const JobFiles files_;
  const Limits limits_;
  State state_;
  Inbox<Event> inbox_;
  ProgressMeter meter_{[] { return now(); }};
  std::vector<DiskProgress> shown_;
  Summary summary_;
  std::unique_ptr<Journal> journal_;
  std::string journaled_state_;
  std::unique_ptr<NewImages> images_;
  GuestPlaces places_;  // when last looked
  Instant next_look_{};
  std::atomic<bool> look_now_{false};
  std::string waiting_for_;
  std::set<std::string> asked_;                // disks that were told to go over
  bool reconnected_ = true;                    // libvirt may have been away since then
  std::set<std::size_t> started_;              // copies that were there
  std::map<std::size_t, Instant> gone_since_;  // those that are gone, unexplained
  std::map<std::size_t, Length> given_;        // their limits
  std::vector<std::size_t> cold_indices_;      // of what cold_ copies
  std::vector<DiskPlan> gone_over_;
  std::mutex events_mutex_;  // guards the next two, by disk
  std::map<std::string, std::string> io_errors_;
  std::map<std::string, std::string> failures_;
  std::unique_ptr<ColdCopy> cold_;
  std::vector<blockcopy::UnlinkedFile> deleted_;
  std::unique_ptr<memmig::Subscription> events_;
};

}  // namespace
}  // namespace relocation

MoveEnd run_relocation(const RelocateOptions& options, Observer& observer, Cancel& cancel,
                       PreparedRelocation prepared, const JobFiles& files,
                       std::optional<Error> undo_because) {
  relocation::Relocation job(options, observer, cancel, std::move(prepared), files);
  return job.run(std::move(undo_because));
}

}  // namespace drover::job
