// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/move_sim.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "tests/sim/sim_guest.h"
#include "tests/sim/sim_host.h"
#include "tests/sim/sim_runner.h"
#include "tests/sim/sim_world.h"

namespace drover::sim {
namespace {

using namespace std::chrono_literals;
using memmig::GuestEvent;
using memmig::GuestState;

constexpr std::uint64_t kMaxSteps = 300000;
constexpr auto kEnough = std::chrono::minutes(2);     // of faults
constexpr auto kPatience = std::chrono::minutes(60);  // after everything has healed

enum class Fault {
  Cut,
  Reset,
  Slow,
  KillReceiver,
  RestartTarget,
  KillRunner,
  RestartSource,
  SourceStall,
  TargetStall,
  ReadErrors,
  WriteErrors,
  Full,
  RestartSourceLibvirt,
  RestartTargetLibvirt,
  Cancel,
  PauseGuest,
  StopGuest,
  JournalFails,
  LoseMirror,
  kCount,
};

const char* name_of(Fault fault) {
  static constexpr std::array<const char*, static_cast<std::size_t>(Fault::kCount)> kNames = {
      "cut",
      "reset",
      "slow",
      "kill receiver",
      "restart target",
      "kill runner",
      "restart source",
      "source stalls",
      "target stalls",
      "read errors",
      "write errors",
      "target full",
      "restart source's libvirt",
      "restart target's libvirt",
      "cancel",
      "pause guest",
      "stop guest",
      "journal fails",
      "mirror breaks"};
  return kNames.at(static_cast<std::size_t>(fault));
}

thread_local World* the_world = nullptr;

class MoveSim final : public job::Observer {
 public:
  MoveSim(std::uint64_t seed, const MoveSimOptions& options);
  ~MoveSim() override { the_world = nullptr; }
  std::optional<std::string> run(MoveSimStats* stats);

  // job::Observer
  void started(const std::string&) override {}
  void planned(const job::Plan&) override {}
  void progress(const job::Progress& progress) override;
  void note(const std::string&) override {}

 private:
  static std::vector<DiskSetup> draw_disks(World& world, Host& source, const EngineSetup& engine);
  static EngineSetup draw_engine(World& world, const MoveSimOptions& options);
  struct Planned {
    Fault fault = Fault::Cut;
    std::optional<job::Phase> phase;  // when the job gets there, and a while; else at a step
    std::uint64_t step = 0;
    Duration later{};
    Duration lasts{};
    bool struck = false;
  };
  void draw_faults();
  void change_other_images(std::uint64_t times);
  void strike(const Planned& planned);
  void hit(Fault fault, Duration lasts);
  void set_for(bool& flag, Duration lasts);
  void start_runner();
  void run_job();
  void resume_job();
  void ended(job::MoveEnd end);
  void go_on();
  job::Prepared prepare();
  void unpause();
  void nobody_watches();
  void kill_runner();
  void heal();
  void check_end();
  void check_moved();
  void check_undone();
  void check_kept();
  void check_source_whole(const char* when);
  std::optional<std::string> may_run_on_target();
  std::optional<std::string> may_remove(const std::string& path);
  // By nobody's fault but its user's or its host's.
  [[nodiscard]] bool guest_is_off() const {
    return user_stopped_ || source_restarted_ || memory_lost_;
  }
  [[nodiscard]] bool committed() const;

  const MoveSimOptions options_;
  const std::uint64_t seed_;
  World world_;
  Network network_{world_};
  Host source_{"source"};
  Host target_{"target"};
  EngineSetup engine_;
  Machines machines_;
  SimTarget receivers_;
  Surroundings around_;
  ProcessPtr runner_ = std::make_shared<Process>("runner");
  std::unique_ptr<SimPlatform> platform_;
  job::MoveOptions move_options_;
  std::unique_ptr<job::Cancel> cancel_;
  job::Plan plan_;
  unsigned attempts_ = 0;
  bool over_ = false;
  bool healed_ = false;
  bool may_go_on_ = true;
  Fiber* main_ = nullptr;
  std::optional<Result<job::Summary>> outcome_;  // of the last process that came to an end
  std::vector<Planned> faults_;
  std::uint64_t faults_hit_ = 0;
  bool noise_ = false;  // libvirt's calls and events go wrong now and then
  Instant healed_at_{};
  bool user_stopped_ = false;
  bool user_paused_ = false;
  bool source_restarted_ = false;
  bool memory_lost_ = false;  // with the target's host
  bool cannot_resume_ = false;
  bool slow_handover_ = false;  // the guest writes in it, and the target is slow
  bool receiver_killed_ = false;
  FilePtr strangers_;  // a file on the target that is not the job's
  Bytes strangers_content_;
  job::Phase phase_ = job::Phase::Plan;
  bool journal_damaged_ = false;
  bool autostart_ = false;
  std::uint64_t kept_ = 0;  // processes that left a part for the next one
  Random user_;  // of what the guest's user does while no runner is there
};

EngineSetup MoveSim::draw_engine(World& world, const MoveSimOptions& options) {
  Random& random = world.random;
  EngineSetup engine;
  engine.chunk_size = Length(std::uint64_t{4096} << random.below(3));
  engine.handover_rest = Length(random.below(3) * 8192);
  if (random.one_in(2)) engine.arbiter.touch_span = std::uint64_t{1} << random.below(3);
  engine.arbiter.max_forwarded = Length(random.one_in(3) ? engine.chunk_size.bytes() : 1U << 20);
  engine.arbiter.strict_window = Length(random.one_in(2) ? random.below(8192) : 1U << 20);
  if (random.one_in(3)) engine.arbiter.max_lag = std::chrono::milliseconds(1 + random.below(20));
  engine.arbiter.mutation = options.arbiter;
  if (random.one_in(3)) engine.max_unflushed = engine.chunk_size * (1 + random.below(4));
  if (random.one_in(2)) engine.arbiter.verify_tries = 1 + static_cast<unsigned>(random.below(3));
  if (random.one_in(3)) engine.arbiter.max_doubts = 1;
  if (random.one_in(4)) engine.encode.encoding = mirror::Encoding::Lz4;
  return engine;
}

std::vector<DiskSetup> MoveSim::draw_disks(World& world, Host& source, const EngineSetup& engine) {
  Random& random = world.random;
  std::vector<DiskSetup> disks;
  const std::uint64_t count = random.one_in(3) ? 2 : 1;
  for (std::uint64_t i = 0; i < count; ++i) {
    DiskSetup disk;
    disk.name = i == 0 ? "vda" : "vdb";
    disk.path = "/images/" + disk.name;
    const std::uint64_t chunk = engine.chunk_size.bytes();
    disk.size = std::min<std::uint64_t>(chunk * (1 + random.below(8)), 64U << 10);
    if (random.one_in(3)) disk.size -= 512 * random.below(8);
    disk.plain = !random.one_in(3);
    const FilePtr file = new_file(disk.size);
    for (std::size_t at = 0; at < disk.size; at += 4096) {
      if (random.one_in(3)) continue;
      const Bytes block(std::min<std::size_t>(4096, disk.size - at),
                        static_cast<std::byte>(1 + random.below(255)));
      file->write(at, block);
    }
    file->sync();
    source.files[disk.path] = file;
    disks.push_back(disk);
  }
  return disks;
}

MoveSim::MoveSim(std::uint64_t seed, const MoveSimOptions& options)
    : options_(options),
      seed_(seed),
      world_(seed, options.trace),
      engine_(draw_engine(world_, options)),
      machines_(world_, network_, source_, target_, draw_disks(world_, source_, engine_)),
      receivers_(world_, network_, target_, options.target),
      around_{.world = world_,
              .network = network_,
              .source = source_,
              .target = target_,
              .machines = machines_,
              .receivers = receivers_,
              .engine = engine_,
              .journals = {},
              .journal_fails = false,
              .may_remove = {},
              .strict = {},
              .link = nullptr},
      user_(seed + 2) {
  the_world = &world_;
  machines_.may_run_on_target = [this] { return may_run_on_target(); };
  machines_.writes_may_wait = [this] {
    return (around_.strict && around_.strict()) || !machines_.runs(Side::Source);
  };
  around_.may_remove = [this](const std::string& path) { return may_remove(path); };
  move_options_.guest = "web1";
  move_options_.host = "hostb";
  move_options_.target_uri = "qemu+ssh://hostb/system";
  move_options_.connections = 1 + static_cast<unsigned>(world_.random.below(3));
  if (world_.random.one_in(2)) {
    move_options_.max_slowdown = std::chrono::milliseconds(10 + world_.random.below(190));
  }
  slow_handover_ = world_.random.one_in(8);
  machines_.strict_bound = move_options_.max_slowdown;
  if (world_.random.one_in(3)) {
    move_options_.verify = true;
    if (world_.random.one_in(2)) target_.corrupts = static_cast<unsigned>(world_.random.below(300));
  }
  if (world_.random.one_in(3)) {
    receivers_.content = std::make_unique<SimContent>(
        world_.random, machines_.image(Side::Source, machines_.disks().front())->content, 4_KiB);
    move_options_.use_index = !world_.random.one_in(8);
    change_other_images(world_.random.below(10));
  }
  machines_.domain(Side::Source).autostart = autostart_ = user_.one_in(2);
  move_options_.keep_partial = user_.one_in(3);
  draw_faults();
}

// Guests that run on the target write to them.
void MoveSim::change_other_images(std::uint64_t times) {
  if (times == 0) return;
  world_.after(world_.between(0us, 100ms), [this, times] {
    receivers_.content->change();
    change_other_images(times - 1);
  });
}

// --- the faults ---

void MoveSim::draw_faults() {
  Random& random = world_.random;
  const std::uint64_t mood = random.below(8);
  const std::uint64_t count = mood == 0 ? 0 : mood < 5 ? 1 : mood < 7 ? 2 : 3;
  for (std::uint64_t i = 0; i < count; ++i) {
    Planned one;
    one.fault = static_cast<Fault>(random.below(static_cast<std::uint64_t>(Fault::kCount)));
    if (random.one_in(2)) {
      one.step = random.below(1500);
    } else {
      static constexpr std::array kPhases = {
          job::Phase::Reserve, job::Phase::Attach,  job::Phase::Copy,   job::Phase::Synchronised,
          job::Phase::Memory,  job::Phase::Barrier, job::Phase::Resume, job::Phase::Commit};
      one.phase = kPhases.at(random.below(kPhases.size()));
      one.later = random.one_in(2) ? world_.between(0us, 3ms) : world_.between(0us, 60ms);
    }
    switch (random.below(4)) {
      case 0: one.lasts = world_.between(100us, 5ms); break;
      case 1: one.lasts = world_.between(5ms, 800ms); break;
      case 2: one.lasts = world_.between(1s, 12s); break;
      default: one.lasts = world_.between(12s, 90s); break;
    }
    faults_.push_back(one);
  }
  // Something for which writes wait, when they may.
  if (slow_handover_) {
    Planned one;
    one.fault = random.one_in(2) ? Fault::TargetStall : Fault::Cut;
    one.phase = random.one_in(2) ? job::Phase::Synchronised : job::Phase::Memory;
    one.later = world_.between(0us, 20ms);
    one.lasts = world_.between(300ms, 8s);
    faults_.push_back(one);
    engine_.arbiter.strict_window = Length(random.below(2) * 4096);
  }
  if (mood != 0 && random.one_in(3)) {
    noise_ = true;
    Machines::Faults& faults = machines_.faults;
    if (random.one_in(2)) faults.late_events = static_cast<unsigned>(random.below(300));
    if (random.one_in(2)) faults.doubled_events = static_cast<unsigned>(random.below(300));
    if (random.one_in(2)) faults.lost_events = static_cast<unsigned>(random.below(200));
    if (random.one_in(2)) faults.call_fails = static_cast<unsigned>(random.below(60));
    if (random.one_in(2)) faults.call_lost = static_cast<unsigned>(random.below(60));
    if (random.one_in(2)) faults.finish_lost = static_cast<unsigned>(random.below(1000));
    if (random.one_in(4)) faults.stops_early = static_cast<unsigned>(random.below(1000));
  }
  // What chance alone brings together in two seeds of a million: the last step of a migration is lost
  // with the network, and the source's host restarts after it went on.
  if (mood != 0 && Random(seed_ + 1).one_in(16)) {
    noise_ = true;
    machines_.faults.finish_lost = 700;
    machines_.source_went_on = [this, struck = false]() mutable {
      if (std::exchange(struck, true)) return;
      hit(Fault::Cut, world_.between(5s, 60s));
      // Not at once: what libvirt does by itself is not in the journal in the same moment.
      world_.after(world_.between(100ms, 3s), [this] {
        if (!healed_) hit(Fault::RestartSource, 1s);
      });
    };
  }
  if (mood != 0 && random.one_in(20)) cannot_resume_ = machines_.faults.cannot_resume = true;
  if (random.one_in(4)) network_.set_delay(world_.between(300us, 20ms));
  if (mood != 0 && random.one_in(20)) {
    strangers_ = new_file(8192);
    strangers_->write(0, Bytes(8192, std::byte{0x77}));
    strangers_->sync();
    strangers_content_ = strangers_->content;
    const std::string path = machines_.disks().back().path;
    target_.files[path] = strangers_;
  }
}

void MoveSim::progress(const job::Progress& progress) {
  if (world_.dead() || progress.phase == phase_) return;
  phase_ = progress.phase;
  world_.trace("phase {}", job::phase_name(phase_));
  for (Planned& planned : faults_) {
    if (planned.phase == phase_ && !std::exchange(planned.struck, true)) strike(planned);
  }
}

void MoveSim::strike(const Planned& planned) {
  world_.after(planned.later, [this, planned] { hit(planned.fault, planned.lasts); });
}

void MoveSim::set_for(bool& flag, Duration lasts) {
  flag = true;
  world_.after(lasts, [&flag] { flag = false; });
}

void MoveSim::hit(Fault fault, Duration lasts) {
  if (over_) return;
  ++faults_hit_;
  world_.trace("FAULT {} for {} us", name_of(fault),
               std::chrono::duration_cast<std::chrono::microseconds>(lasts).count());
  healed_at_ = std::max(healed_at_, world_.now() + lasts);
  const Duration away = std::min<Duration>(lasts, 15s);
  switch (fault) {
    case Fault::Cut:
      network_.set_cut(true);
      world_.after(lasts, [this] { network_.set_cut(false); });
      return;
    case Fault::Reset:
      if (around_.link != nullptr) around_.link->reset("connection reset by peer");
      return;
    case Fault::Slow:
      network_.set_delay(200ms);
      world_.after(lasts, [this] { network_.set_delay(300us); });
      return;
    case Fault::KillReceiver: receiver_killed_ = true; return receivers_.kill_receivers();
    case Fault::RestartTarget:
      // A guest that runs there would be lost with its host, whoever had brought it there.
      if (machines_.ever_ran(Side::Target)) return;
      receiver_killed_ = true;
      // libvirt ends the source once it has heard that the target has it all.
      memory_lost_ = memory_lost_ || (machines_.domain(Side::Target).qemu &&
                                      !machines_.domain(Side::Target).incoming);
      receivers_.host_restarts();
      machines_.host_restarts(Side::Target);
      return;
    case Fault::KillRunner: return kill_runner();
    case Fault::RestartSource:
      if (machines_.ever_ran(Side::Target)) return;
      source_restarted_ = true;
      kill_runner();
      for (auto& [directory, journal] : around_.journals) journal.written = journal.synced;
      machines_.host_restarts(Side::Source);
      // Its user starts it again, if it does not wait on the target.
      if (world_.random.one_in(2)) {
        world_.after(30s, [this] {
          const Machines::Domain& there = machines_.domain(Side::Target);
          Machines::Domain& here = machines_.domain(Side::Source);
          if (there.qemu || here.qemu || !here.defined || machines_.ever_ran(Side::Target)) return;
          world_.trace("its user starts the guest again");
          source_restarted_ = false;
          machines_.boot(Side::Source);
        });
      }
      return;
    case Fault::SourceStall: return set_for(source_.stalled, away);
    case Fault::TargetStall: return set_for(target_.stalled, lasts);
    case Fault::ReadErrors: return set_for(source_.read_errors, lasts);
    case Fault::WriteErrors: return set_for(target_.write_errors, lasts);
    case Fault::Full: return set_for(target_.full, lasts);
    case Fault::RestartSourceLibvirt: return machines_.restart_libvirt(Side::Source, away);
    case Fault::RestartTargetLibvirt: return machines_.restart_libvirt(Side::Target, away);
    case Fault::Cancel: return cancel_->request();
    case Fault::PauseGuest: {
      if (!machines_.runs(Side::Source)) return;
      machines_.stop_vcpus(Side::Source, GuestState::Paused);
      user_paused_ = true;
      GuestEvent event;
      event.kind = GuestEvent::Kind::Suspended;
      event.detail = "paused";
      machines_.emit(Side::Source, event);
      world_.after(lasts, [this] { unpause(); });
      return;
    }
    case Fault::StopGuest:
      for (const Side side : {Side::Source, Side::Target}) {
        if (!machines_.runs(side)) continue;
        user_stopped_ = true;
        machines_.end_qemu(side, "shutdown");
      }
      return;
    case Fault::JournalFails: return set_for(around_.journal_fails, away);
    case Fault::LoseMirror: return machines_.break_mirror(machines_.disks().front().name);
    case Fault::kCount: break;
  }
}

// Its user lets the guest go on.
void MoveSim::unpause() {
  const Machines::Domain& here = machines_.domain(Side::Source);
  if (!here.qemu || here.state != GuestState::Paused || machines_.ever_ran(Side::Target)) {
    user_paused_ = false;
    return;
  }
  // Not while libvirt has it stand still for a migration: then he tries again.
  const auto& migration = machines_.migration;
  const bool migrates = migration && migration->phase != Migration::Phase::Over;
  if (migrates || !here.has_images || !machines_.guards.empty()) {
    world_.after(1s, [this] { unpause(); });
    return;
  }
  user_paused_ = false;
  machines_.start_vcpus(Side::Source);
  GuestEvent event;
  event.kind = GuestEvent::Kind::Resumed;
  event.detail = "unpaused";
  machines_.emit(Side::Source, event);
}

// The guest stands still or is off on the source, and its user, or the host's autostart, has it run. Later it may be
// shut down.
void MoveSim::nobody_watches() {
  if (!user_.one_in(4)) return;
  world_.after(std::chrono::milliseconds(100 + user_.below(800)), [this] {
    Machines::Domain& here = machines_.domain(Side::Source);
    const auto& migration = machines_.migration;
    const bool migrates = migration && migration->phase != Migration::Phase::Over;
    const bool watched = runner_->alive && !outcome_;
    if (watched || machines_.ever_ran(Side::Target) || migrates || !machines_.guards.empty()) return;
    if (here.qemu && here.state == GuestState::Paused && here.has_images && !user_paused_) {
      machines_.start_vcpus(Side::Source);
      GuestEvent event;
      event.kind = GuestEvent::Kind::Resumed;
      event.detail = "unpaused";
      machines_.emit(Side::Source, event);
    } else if (!here.qemu && here.defined) {
      source_restarted_ = false;
      machines_.boot(Side::Source);
    } else {
      return;
    }
    ++faults_hit_;
    world_.trace("its user has the guest run");
    if (!user_.one_in(2)) return;
    world_.after(std::chrono::milliseconds(20 + user_.below(3000)), [this] {
      if (!machines_.runs(Side::Source)) return;
      world_.trace("its user shuts the guest down");
      user_stopped_ = true;
      machines_.end_qemu(Side::Source, "shutdown");
    });
  });
}

void MoveSim::kill_runner() {
  if (!runner_->alive || outcome_ || over_) return;
  world_.trace("the runner is killed in phase {}", job::phase_name(phase_));
  world_.kill(runner_);
  machines_.client_died();
  if (world_.random.one_in(8)) {
    world_.trace("the job's journal is damaged");
    journal_damaged_ = true;
    for (auto& [directory, journal] : around_.journals) journal.damaged = true;
  }
}

void MoveSim::heal() {
  if (std::exchange(healed_, true)) return;
  world_.trace("all heals");
  network_.set_cut(false);
  machines_.faults = {};
  machines_.source_went_on = nullptr;
  around_.journal_fails = false;
  source_.read_errors = source_.stalled = false;
  target_.write_errors = target_.full = target_.stalled = false;
}

// --- the job ---

job::Prepared MoveSim::prepare() {
  job::Prepared prepared;
  prepared.guest = describe_guest(machines_);
  prepared.plan.guest = prepared.guest.name;
  prepared.plan.uuid = prepared.guest.uuid;
  prepared.plan.host = move_options_.host;
  for (const DiskSetup& disk : machines_.disks()) {
    memmig::PlannedDisk planned;
    planned.disk = disk.name;
    planned.source_path = planned.target_path = disk.path;
    planned.source_format = planned.target_format = disk.plain ? "raw" : "qcow2";
    planned.source_plain = disk.plain;
    planned.virtual_size = Length(disk.size);
    prepared.move_plan.disks.push_back(planned);
    job::DiskPlan shown;
    shown.disk = disk.name;
    shown.source_path = shown.target_path = disk.path;
    shown.source_format = shown.target_format = planned.source_format;
    shown.virtual_size = planned.virtual_size;
    shown.delete_source = true;
    prepared.plan.disks.push_back(shown);
  }
  prepared.source =
      std::make_unique<SimHypervisor>(world_, network_, machines_, Side::Source, runner_);
  prepared.target =
      std::make_unique<SimHypervisor>(world_, network_, machines_, Side::Target, runner_);
  return prepared;
}

job::JobFiles files_of(const job::MoveMutation& mutation, bool resumed) {
  job::JobFiles files;
  files.id = "web1-1";
  files.directory = "/jobs/web1-1";
  files.journal = "/jobs/web1-1/journal";
  files.resumed = resumed;
  files.mutation = mutation;
  return files;
}

void MoveSim::ended(job::MoveEnd end) {
  if (world_.dead()) return;
  world_.trace("the job says: {}{}", end.result ? "moved" : end.result.error().to_string(),
               end.over ? "" : " (it can be gone on with)");
  over_ = end.over;
  outcome_ = std::move(end.result);
  if (!*outcome_ && outcome_->error().hint.starts_with("what was copied is kept")) check_kept();
}

// What was copied is kept for a resume, and nothing but what that needs is left.
void MoveSim::check_kept() {
  ++kept_;
  check_source_whole("after an undo that keeps what was copied");
  if (machines_.ever_ran(Side::Target)) world_.violate("kept for a resume, although the target has run");
  if (outcome_->error().message.find("not everything could be undone") != std::string::npos) return;
  // One that could not even join what an earlier process has left leaves that as it is.
  if (attempts_ > 1 && outcome_->error().code != Code::Cancelled) return;
  const Machines::Domain& here = machines_.domain(Side::Source);
  if (here.autostart != autostart_ && !journal_damaged_) {
    world_.violate("kept for a resume, but the guest's autostart is not what it was");
  }
  for (const DiskSetup& disk : machines_.disks()) {
    if (machines_.image(Side::Target, disk) == nullptr) {
      world_.violate("kept for a resume, but the target's image of " + disk.name + " is gone");
    }
  }
  if (!here.mirrors.empty() || here.exports) {
    world_.violate("kept for a resume, but QEMU still has drover's mirror or export");
  }
  const Machines::Domain& there = machines_.domain(Side::Target);
  if (there.qemu || there.defined) {
    world_.violate("kept for a resume, but the guest is still there on the target");
  }
}

void MoveSim::run_job() {
  job::Prepared prepared = prepare();
  plan_ = prepared.plan;
  ended(job::run_move(*platform_, move_options_, *this, *cancel_, std::move(prepared),
                      files_of(options_.job, false)));
}

// `drover resume`, or `drover cancel`.
void MoveSim::resume_job() {
  auto prepared = job::prepare_again(*platform_, move_options_, plan_);
  if (!prepared) return ended({fail(prepared.error()), false});
  std::optional<Error> undo;
  if (world_.random.one_in(4)) undo = Error{Code::Cancelled, "the move was cancelled", "", false};
  world_.trace("the job is gone on with{}", undo ? ", to be undone" : "");
  ended(job::run_move(*platform_, move_options_, *this, *cancel_, std::move(*prepared),
                      files_of(options_.job, true), undo));
}

void MoveSim::start_runner() {
  outcome_.reset();
  runner_ = std::make_shared<Process>("runner");
  cancel_ = std::make_unique<job::Cancel>();
  platform_ = std::make_unique<SimPlatform>(around_, runner_);
  const bool first = attempts_++ == 0;
  main_ = world_.start(runner_, [this, first] { first ? run_job() : resume_job(); });
}

// The runner is dead, or has left the job for somebody to go on with.
void MoveSim::go_on() {
  constexpr unsigned kMostAttempts = 8;
  if (over_ || attempts_ >= kMostAttempts || around_.journals.empty()) {
    may_go_on_ = false;
    return;
  }
  start_runner();
}

// --- what must be true ---

// Invariants 1 and 5, and of 4 what makes the target's images good enough to be the only ones.
std::optional<std::string> MoveSim::may_run_on_target() {
  for (std::size_t i = 0; i < machines_.disks().size(); ++i) {
    const DiskSetup& disk = machines_.disks()[i];
    const FilePtr image = machines_.image(Side::Target, disk);
    if (image == nullptr) return "the target runs without its image of " + disk.name;
    const auto [at, other] = std::ranges::mismatch(machines_.expected(i), image->content);
    if (at != machines_.expected(i).end()) {
      return fmt::format(
          "invariant 1: byte {} of {} differs when the target runs: {:02x}, not {:02x}",
          at - machines_.expected(i).begin(), disk.name, static_cast<unsigned>(*other),
          static_cast<unsigned>(*at));
    }
    if (!image->all_synced())
      return "invariant 5: the target runs on an image that was not flushed: " + disk.name;
  }
  return std::nullopt;
}

bool MoveSim::committed() const {
  return std::ranges::any_of(around_.journals, [](const auto& one) {
    const auto found = one.second.synced.find("state");
    return found != one.second.synced.end() && found->second == "committed";
  });
}

std::optional<std::string> MoveSim::may_remove(const std::string& path) {
  if (!machines_.ever_ran(Side::Target))
    return "invariant 4: " + path + " is deleted, and the target never ran";
  if (!committed()) return "invariant 4: " + path + " is deleted before that was journaled";
  if (machines_.domain(Side::Source).qemu)
    return "invariant 4: " + path + " is deleted under its guest";
  return std::nullopt;
}

// --- the end ---

void MoveSim::check_source_whole(const char* when) {
  for (std::size_t i = 0; i < machines_.disks().size(); ++i) {
    const DiskSetup& disk = machines_.disks()[i];
    const FilePtr image = machines_.image(Side::Source, disk);
    if (image == nullptr)
      return world_.violate(fmt::format("invariant 4: {} is gone {}", disk.path, when));
    if (!machines_.ever_ran(Side::Target) && image->content != machines_.expected(i)) {
      world_.violate(
          fmt::format("invariant 3: {} is not what the guest has written {}", disk.path, when));
    }
  }
}

void MoveSim::check_moved() {
  if (!machines_.runs(Side::Target) && !(user_stopped_ && machines_.ever_ran(Side::Target)))
    world_.violate("moved, but the guest does not run on the target");
  if (machines_.domain(Side::Source).qemu || machines_.domain(Side::Source).defined) {
    world_.violate("moved, but the guest is still there on the source");
  }
  for (std::size_t i = 0; i < machines_.disks().size(); ++i) {
    const DiskSetup& disk = machines_.disks()[i];
    const FilePtr image = machines_.image(Side::Target, disk);
    if (image == nullptr || image->content != machines_.expected(i)) {
      world_.violate("moved, but acknowledged writes are missing on " + disk.name);
    }
    if (machines_.image(Side::Source, disk) != nullptr)
      world_.violate("moved, but " + disk.path + " is still there");
  }
  const auto& notes = (*outcome_)->notes;
  const bool autostart_failed = std::ranges::any_of(notes, [](const std::string& note) {
    return note.find("autostart on the target") != std::string::npos;
  });
  if (machines_.domain(Side::Target).autostart != autostart_ && !autostart_failed && !journal_damaged_) {
    world_.violate("moved, but the guest's autostart is not what it was");
  }
  const bool said_so = std::ranges::any_of(notes, [](const std::string& note) {
    return note.find("clearing up after the receiver") != std::string::npos;
  });
  // One that is killed between its goodbye and its end leaves its record, and nobody hears of it.
  if (!said_so && !receiver_killed_ && !receivers_.nothing_left()) {
    world_.violate("moved, but a receiver or its record is left on the target");
  }
}

void MoveSim::check_undone() {
  check_source_whole("after an undo");
  if (machines_.ever_ran(Side::Target)) world_.violate("undone, although the target has run");
  if (!guest_is_off() && !machines_.runs(Side::Source) && !user_paused_) {
    world_.violate("undone, but the guest does not run on the source");
  }
  const bool said_so =
      outcome_->error().message.find("not everything could be undone") != std::string::npos;
  if (said_so) return;
  if (machines_.domain(Side::Source).autostart != autostart_ && !journal_damaged_) {
    world_.violate("undone, but the guest's autostart is not what it was");
  }
  const Machines::Domain& there = machines_.domain(Side::Target);
  if (there.qemu || there.defined)
    world_.violate("undone, but the guest is still there on the target");
  for (const auto& [path, file] : target_.files) {
    if (file->of_the_job) world_.violate("undone, but " + path + " is still there on the target");
  }
  if (receiver_killed_ ? !receivers_.no_image_left() : !receivers_.nothing_left())
    world_.violate("undone, but a receiver or its record is left on the target");
  const Machines::Domain& here = machines_.domain(Side::Source);
  const bool bitmap =
      std::ranges::any_of(here.bitmaps, [](const auto& one) { return !one.second.empty(); });
  if (!here.mirrors.empty() || here.exports || bitmap) {
    world_.violate("undone, but QEMU still has drover's mirror, bitmap or export");
  }
}

void MoveSim::check_end() {
  if (strangers_ != nullptr) {
    const std::string path = machines_.disks().back().path;
    const auto found = target_.files.find(path);
    if (found == target_.files.end() || found->second != strangers_ ||
        strangers_->content != strangers_content_) {
      world_.violate("invariant 8: " + path + " on the target was not the job's, and was changed");
    }
  }
  if (!outcome_) {
    // Killed each time, or before there was anything to go on with.
    check_source_whole("after the runner's death");
    return;
  }
  if (*outcome_) return check_moved();
  if (!over_) {
    if (faults_hit_ == 0 && !noise_ && !cannot_resume_) world_.violate("held without any fault");
    if (!committed()) check_source_whole("although the job is held");
    for (const DiskSetup& disk : machines_.disks()) {
      if (machines_.image(Side::Target, disk) == nullptr && !machines_.runs(Side::Source) &&
          !guest_is_off()) {
        world_.violate("held, and the target's image of " + disk.name + " is gone");
      }
    }
    return;
  }
  if (faults_hit_ == 0 && !noise_ && strangers_ == nullptr) {
    world_.violate("undone without any fault: " + outcome_->error().message);
  }
  check_undone();
}

std::optional<std::string> MoveSim::run(MoveSimStats* stats) {
  GuestPlan plan;
  plan.writes = slow_handover_ ? 400 : world_.random.below(90);
  plan.pause = world_.random.one_in(4) ? Duration(300us) : world_.between(100us, 4ms);
  if (slow_handover_) plan.pause = 20ms;
  plan.discards = world_.random.one_in(4) ? 60 : 10;
  machines_.begin(plan);
  healed_at_ = world_.now();
  start_runner();
  std::vector<Planned> by_step;
  std::ranges::copy_if(faults_, std::back_inserter(by_step),
                       [](const Planned& one) { return !one.phase; });
  // When a runner has ended: what comes next, and when.
  Instant next = Instant::max();
  bool resting = false;
  while (!world_.violation() && world_.step()) {
    if (world_.steps() > kMaxSteps) world_.violate("it does not come to an end");
    std::erase_if(by_step, [this](const Planned& one) {
      if (one.step > world_.steps()) return false;
      strike(one);
      return true;
    });
    const bool gone = outcome_ || !runner_->alive;
    if (!gone) {
      if (world_.now() > healed_at_ + kEnough) heal();
      if (world_.now() > healed_at_ + kPatience) world_.violate("it does not come to an end");
      continue;
    }
    if (next == Instant::max()) {
      // When the job is over, the rest of the world comes to rest: silences are noticed, receivers
      // end.
      resting = over_ || !may_go_on_;
      if (resting) heal();
      next =
          std::max(healed_at_, world_.now()) + (resting ? Duration(2min) : world_.between(1s, 40s));
      if (!resting) nobody_watches();
      // Nothing else may be left to happen.
      world_.at(next, [] {});
    }
    if (world_.now() < next) continue;
    if (resting) break;
    heal();
    next = Instant::max();
    go_on();
  }
  if (!world_.violation()) check_end();
  if (stats != nullptr) {
    ++stats->seeds;
    stats->steps += world_.steps();
    stats->guest_writes += machines_.counters.writes;
    stats->faults += faults_hit_;
    stats->resumed += attempts_ - 1;
    stats->kept += kept_;
    if (!outcome_) {
      ++stats->killed;
    } else if (*outcome_) {
      ++stats->moved;
    } else if (!over_) {
      ++stats->held;
    } else {
      ++stats->undone;
    }
    stats->worst_write_us =
        std::max(stats->worst_write_us,
                 static_cast<std::uint64_t>(
                     std::chrono::duration_cast<std::chrono::microseconds>(machines_.counters.worst)
                         .count()));
  }
  // Take it apart.
  if (runner_->alive) world_.kill(runner_);
  receivers_.kill_receivers();
  network_.clear();
  world_.clear();
  return world_.violation();
}

}  // namespace

MoveSimStats& MoveSimStats::operator+=(const MoveSimStats& other) {
  seeds += other.seeds;
  steps += other.steps;
  guest_writes += other.guest_writes;
  faults += other.faults;
  moved += other.moved;
  undone += other.undone;
  held += other.held;
  killed += other.killed;
  resumed += other.resumed;
  kept += other.kept;
  worst_write_us = std::max(worst_write_us, other.worst_write_us);
  return *this;
}

std::optional<std::string> run_move_sim(std::uint64_t seed, const MoveSimOptions& options,
                                        MoveSimStats* stats) {
  static const bool log_is_ours = [] {
    log_to([](LogLevel, std::string_view text) {
      if (the_world != nullptr) the_world->trace("log: {}", text);
    });
    return true;
  }();
  CHECK(log_is_ours, "the log goes to the trace");
  MoveSim sim(seed, options);
  return sim.run(stats);
}

}  // namespace drover::sim
