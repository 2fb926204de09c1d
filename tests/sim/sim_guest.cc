// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_guest.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace drover::sim {

using namespace std::chrono_literals;
using memmig::GuestEvent;
using memmig::GuestState;
using Kind = mirror::NbdRequest::Kind;

constexpr std::size_t kSector = 512;
constexpr std::size_t kMaxInFlight = 6;

// --- the guest ---

Machines::Machines(World& world, Network& network, Host& source, Host& target,
                   std::vector<DiskSetup> disks)
    : changed(world),
      world_(world),
      network_(network),
      source_(source),
      target_(target),
      disks_(std::move(disks)) {
  for (const DiskSetup& disk : disks_) expected_.push_back(source_.files.at(disk.path)->content);
}

Machines::~Machines() = default;

FilePtr Machines::image(Side side, const DiskSetup& disk) {
  const auto found = host(side).files.find(disk.path);
  return found == host(side).files.end() ? nullptr : found->second;
}

void Machines::begin(const GuestPlan& plan) {
  plan_ = plan;
  Domain& here = domain(Side::Source);
  here.defined = here.qemu = here.has_images = true;
  here.state = GuestState::Running;
  ever_ran_[0] = true;
  next_write();
}

void Machines::next_write() {
  if (writing_ || plan_.writes == 0) return;
  writing_ = true;
  world_.after(world_.between(20us, plan_.pause), [this] {
    writing_ = false;
    if (!runs(Side::Source) && !runs(Side::Target)) return;  // start_vcpus() goes on
    issue_write();
    next_write();
  });
}

void Machines::issue_write() {
  if (ops_.size() >= kMaxInFlight) return;
  Op op;
  op.side = runs(Side::Source) ? Side::Source : Side::Target;
  op.disk = world_.random.below(disks_.size());
  const std::size_t sectors = disks_[op.disk].size / kSector;
  std::size_t length = 1 + world_.random.below(12);
  if (world_.random.one_in(12)) length = 1 + world_.random.below(sectors);
  length = std::min(length, sectors);
  const std::size_t at = world_.random.below(sectors - length + 1);
  op.extent = {Offset(at * kSector), Length(length * kSector)};
  // QEMU makes overlapping requests wait for each other.
  for (const auto& [id, other] : ops_) {
    if (other.disk == op.disk && overlap(other.extent, op.extent)) return;
  }
  --plan_.writes;
  const std::uint64_t id = next_op_++;
  const std::uint64_t kind = world_.random.below(100);
  op.kind = kind < plan_.discards        ? Kind::Discard
            : kind < plan_.discards + 20 ? Kind::Zero
                                         : Kind::Write;
  op.value = op.kind == Kind::Write ? static_cast<std::byte>(1 + id % 255) : std::byte{0};
  // Of a discard the device makes what it likes: here zeroes, or nothing.
  if (op.kind == Kind::Discard && world_.random.one_in(2)) op.value = std::byte{0xff};
  ops_.emplace(id, op);
  ++counters.writes;
  world_.after(world_.between(30us, 300us), [this, id] { apply(id); });
}

// The write is complete on the disk; then QEMU's mirror sends it on.
void Machines::apply(std::uint64_t id) {
  const auto found = ops_.find(id);
  if (found == ops_.end()) return;  // its QEMU is gone
  Op& op = found->second;
  const DiskSetup& disk = disks_[op.disk];
  const FilePtr file = image(op.side, disk);
  if (file == nullptr)
    return world_.violate("the guest's image of " + disk.name + " is gone under it");
  const bool ignored = op.kind == Kind::Discard && op.value == std::byte{0xff};
  if (!ignored) {
    const Bytes content(op.extent.length.bytes(), op.value);
    file->write(op.extent.offset.bytes(), content);
    std::ranges::copy(content, expected_[op.disk].begin() +
                                   static_cast<std::ptrdiff_t>(op.extent.offset.bytes()));
    if (op.side == Side::Source) file->sync();
  }
  for (Bitmap& bitmap : domain(op.side).bitmaps[disk.name]) {
    if (!bitmap.recording) continue;
    const std::size_t last = (op.extent.end().bytes() - 1) / 4096;
    for (std::size_t b = op.extent.offset.bytes() / 4096; b <= last; ++b) bitmap.dirty[b] = true;
  }
  op.on_disk = true;
  op.written = world_.now();
  if (op.side == Side::Target) return write_done(id);
  world_.after(world_.between(10us, 60us), [this, id] { to_mirror(id); });
}

void Machines::to_mirror(std::uint64_t id) {
  const auto found = ops_.find(id);
  if (found == ops_.end()) return;
  Op& op = found->second;
  const DiskSetup& disk = disks_[op.disk];
  const auto mirror = domain(Side::Source).mirrors.find(disk.name);
  if (mirror == domain(Side::Source).mirrors.end() || mirror->second.failed) return write_done(id);
  if (*mirror->second.endpoint == nullptr) {
    mirror_lost(disk.name);
    return write_done(id);
  }
  op.at_mirror = true;
  op.excused = writes_may_wait && writes_may_wait();
  mirror->second.waiting.insert(id);
  const Bytes payload(op.kind == Kind::Write ? op.extent.length.bytes() : 0, op.value);
  (*mirror->second.endpoint)->request(op.kind, op.extent, payload, id);
}

void Machines::mirror_answers(const std::string& disk, std::uint64_t id) {
  const auto mirror = domain(Side::Source).mirrors.find(disk);
  if (mirror == domain(Side::Source).mirrors.end() || mirror->second.waiting.erase(id) == 0) return;
  world_.after(world_.between(10us, 40us), [this, id] { write_done(id); });
}

void Machines::write_done(std::uint64_t id) {
  const auto found = ops_.find(id);
  if (found == ops_.end()) return;
  const Op& op = found->second;
  const Duration delay = world_.now() - op.written;
  const bool excused = op.excused || (writes_may_wait && writes_may_wait());
  if (op.at_mirror && delay > strict_bound + write_bound) {
    world_.violate(
        fmt::format("a guest's write waited {} us, longer than it may in the handover",
                    std::chrono::duration_cast<std::chrono::microseconds>(delay).count()));
  }
  if (!excused) {
    counters.worst = std::max(counters.worst, delay);
    if (delay > write_bound) {
      world_.violate(
          fmt::format("invariant 2: a guest's write waited {} us",
                      std::chrono::duration_cast<std::chrono::microseconds>(delay).count()));
    }
  }
  ops_.erase(found);
  if (ops_.empty()) changed.notify();
}

void Machines::start_vcpus(Side side) {
  Domain& here = domain(side);
  if (here.state == GuestState::Running) return;
  const Side other = side == Side::Source ? Side::Target : Side::Source;
  if (runs(other)) world_.violate("invariant 6: the guest runs on both hosts");
  if (side == Side::Source && ever_ran_[1]) {
    world_.violate("invariant 6: the source runs again although the target has run");
  }
  if (side == Side::Target && may_run_on_target) {
    if (const auto wrong = may_run_on_target()) world_.violate(*wrong);
  }
  for (const auto& [path, file] : host(side).files) (void)path;
  here.has_images = true;
  here.state = GuestState::Running;
  ever_ran_[index_of(side)] = true;
  world_.trace("the guest runs on the {}", host(side).name);
  changed.notify();
  next_write();
}

void Machines::stop_vcpus(Side side, GuestState state) {
  domain(side).state = state;
  world_.trace("the guest stands still on the {}", host(side).name);
  changed.notify();
}

void Machines::boot(Side side) {
  Domain& here = domain(side);
  here.qemu = true;
  here.state = GuestState::Paused;
  start_vcpus(side);
}

void Machines::end_qemu(Side side, const std::string& how) {
  Domain& here = domain(side);
  if (!here.qemu) return;
  world_.trace("QEMU ends on the {} ({})", host(side).name, how);
  std::erase_if(ops_, [&](const auto& op) { return op.second.side == side; });
  std::vector<std::string> names;
  for (const auto& [disk, mirror] : here.mirrors) names.push_back(disk);
  for (const std::string& name : names) drop_mirror(name);
  const bool defined = here.defined;
  const std::uint64_t process = here.process;
  const bool autostart = here.autostart;
  here = {};
  here.defined = defined;
  here.autostart = autostart;
  here.process = process + 1;
  GuestEvent event;
  event.kind = GuestEvent::Kind::Stopped;
  event.detail = how;
  emit(side, event);
  if (migration && migration->phase != Migration::Phase::Over) {
    const bool over = side == Side::Target ? migration->phase < Migration::Phase::Finished
                                           : migration->phase <= Migration::Phase::Perform;
    if (over) migration->failed = true;
  }
  changed.notify();
}

// --- the mirror's socket ---

void Machines::listen(const std::string& socket, Endpoint* endpoint) {
  endpoints_[socket] = std::make_shared<Endpoint*>(endpoint);
}

void Machines::unlisten(const std::string& socket) {
  const auto found = endpoints_.find(socket);
  if (found == endpoints_.end()) return;
  const auto endpoint = found->second;
  *endpoint = nullptr;
  endpoints_.erase(found);
  // QEMU notices that its connection is closed.
  world_.after(world_.between(50us, 500us), [this, endpoint] {
    for (auto& [disk, mirror] : domain(Side::Source).mirrors) {
      if (mirror.endpoint == endpoint && !mirror.failed) return mirror_lost(disk);
    }
  });
}

bool Machines::connect_mirror(const std::string& disk, const std::string& socket) {
  const auto found = endpoints_.find(socket);
  if (found == endpoints_.end()) return false;
  Mirror& mirror = domain(Side::Source).mirrors[disk];
  mirror = {};
  mirror.endpoint = found->second;
  mirror.socket = socket;
  (*mirror.endpoint)->connected();
  return true;
}

void Machines::begin_bitmap(const std::string& disk, std::uint64_t generation) {
  auto& bitmaps = domain(Side::Source).bitmaps[disk];
  for (Bitmap& bitmap : bitmaps) bitmap.recording = false;
  const auto setup = std::ranges::find(disks_, disk, &DiskSetup::name);
  bitmaps.push_back({generation, true, std::vector<bool>((setup->size + 4095) / 4096)});
}

// QEMU lets go of a mirror whose endpoint is gone: the guest's writes are complete without it.
void Machines::mirror_lost(const std::string& disk) {
  Mirror& mirror = domain(Side::Source).mirrors.at(disk);
  mirror.failed = true;
  for (const std::uint64_t id : std::exchange(mirror.waiting, {})) write_done(id);
  GuestEvent event;
  event.kind = GuestEvent::Kind::MirrorEnded;
  event.disk = disk;
  event.detail = "Connection reset by peer";
  emit(Side::Source, event);
}

bool Machines::mirrors(const std::string& disk) const {
  const auto& mirrors = domains_[index_of(Side::Source)].mirrors;
  const auto found = mirrors.find(disk);
  return found != mirrors.end() && !found->second.failed && *found->second.endpoint != nullptr;
}

void Machines::break_mirror(const std::string& disk) {
  const auto found = domain(Side::Source).mirrors.find(disk);
  if (found == domain(Side::Source).mirrors.end() || found->second.failed) return;
  const auto endpoint = found->second.endpoint;
  mirror_lost(disk);
  world_.after(world_.between(20us, 100us), [endpoint] {
    if (*endpoint != nullptr) (*endpoint)->disconnected();
  });
}

void Machines::drop_mirror(const std::string& disk) {
  auto& mirrors = domain(Side::Source).mirrors;
  const auto found = mirrors.find(disk);
  if (found == mirrors.end()) return;
  const auto endpoint = found->second.endpoint;
  for (const std::uint64_t id : std::exchange(found->second.waiting, {})) write_done(id);
  mirrors.erase(found);
  world_.after(world_.between(20us, 100us), [endpoint] {
    if (*endpoint != nullptr) (*endpoint)->disconnected();
  });
}

// --- libvirt ---

void Machines::emit(Side side, GuestEvent event) {
  for (SimHypervisor* connection : connections_) {
    if (connection->side() != side || !connection->alive()) continue;
    if (!libvirt_up(side)) continue;
    // Those that a user's own doing is known by are not lost alone.
    const bool of_the_user =
        event.detail == "paused" || event.detail == "unpaused" || event.detail == "shutdown";
    if (!of_the_user && world_.chance(faults.lost_events)) {
      world_.trace("event lost: {} {}", memmig::event_name(event.kind), event.detail);
      continue;
    }
    connection->deliver(event);
    if (world_.chance(faults.doubled_events)) connection->deliver(event);
  }
}

void Machines::restart_libvirt(Side side, Duration away) {
  if (!libvirt_up(side)) return;
  world_.trace("libvirt on the {} restarts", host(side).name);
  libvirt_up_[index_of(side)] = false;
  // What it had begun it takes back when it is there again; QEMU lives on meanwhile.
  const bool was_performing = migration && migration->phase == Migration::Phase::Perform;
  const bool unfinished = migration && migration->phase < Migration::Phase::Finished;
  if (side == Side::Source && was_performing) migration->failed = true;
  for (SimHypervisor* connection : std::vector(connections_)) {
    if (connection->side() == side) connection->break_connection("libvirt restarts");
  }
  world_.after(away, [this, side, was_performing, unfinished] {
    libvirt_up_[index_of(side)] = true;
    world_.trace("libvirt on the {} is back", host(side).name);
    Domain& here = domain(side);
    if (side == Side::Target && unfinished && here.qemu && here.incoming) end_qemu(side, "failed");
    if (side == Side::Source && was_performing && here.qemu && here.state == GuestState::Paused &&
        here.has_images && guards.empty()) {
      start_vcpus(side);
    }
    changed.notify();
  });
}

void Machines::host_restarts(Side side) {
  world_.trace("the {} restarts", host(side).name);
  ++boots_.at(index_of(side));
  for (SimHypervisor* connection : std::vector(connections_)) {
    if (connection->side() == side) connection->break_connection("the host is gone");
  }
  end_qemu(side, "crashed");
  restart_libvirt(side, 20s);
}

// A libvirt whose client is gone.
void Machines::client_died() {
  if (!migration || migration->phase == Migration::Phase::Over) return;
  const auto gone = std::exchange(migration, nullptr);
  const Migration::Phase phase = std::exchange(gone->phase, Migration::Phase::Over);
  // "Auto destroy": what is half there goes with the connection that began it.
  if (phase < Migration::Phase::Finished && domain(Side::Target).auto_destroy) {
    world_.after(world_.between(1ms, 20ms), [this] {
      if (domain(Side::Target).auto_destroy) end_qemu(Side::Target, "destroyed");
    });
  }
  // During Perform the source's libvirt cancels and lets the guest run; afterwards it leaves it
  // paused.
  if (phase == Migration::Phase::Perform) {
    world_.after(world_.between(1ms, 20ms), [this] {
      const Domain& here = domain(Side::Source);
      if (here.qemu && here.state == GuestState::Paused && here.has_images)
        start_vcpus(Side::Source);
    });
  }
}

void Machines::client_gone(Side side) {
  if (side != Side::Target || !migration) return;
  if (migration->phase < Migration::Phase::Finished && domain(Side::Target).auto_destroy) {
    end_qemu(Side::Target, "destroyed");
  }
}

// --- one connection ---

class SimHypervisor::SimSubscription final : public memmig::Subscription {
 public:
  SimSubscription(SimHypervisor& connection, memmig::EventHandler handler)
      : handler_(std::move(handler)), connection_(connection) {
    connection_.subscriptions_.push_back(this);
  }
  ~SimSubscription() override { std::erase(connection_.subscriptions_, this); }
  memmig::EventHandler handler_;

 private:
  SimHypervisor& connection_;
};

SimHypervisor::SimHypervisor(World& world, Network& network, Machines& machines, Side side,
                             ProcessPtr client)
    : world_(world),
      network_(network),
      machines_(machines),
      side_(side),
      client_(std::move(client)),
      uri_(side == Side::Source ? "qemu:///system" : "qemu+ssh://hostb/system") {
  machines_.connections_.push_back(this);
}

SimHypervisor::~SimHypervisor() {
  *here_ = false;
  CHECK(subscriptions_.empty(), "a hypervisor outlives its subscriptions");
  std::erase(machines_.connections_, this);
}

void SimHypervisor::deliver(const GuestEvent& event) {
  Duration late = world_.between(50us, 500us);
  if (world_.chance(machines_.faults.late_events)) late = world_.between(1ms, 800ms);
  last_event_ = std::max(world_.now() + late, last_event_ + 1us);
  const auto give = [this, here = here_, event] {
    if (!*here || !client_->alive || !alive_) return;
    GuestEvent told = event;
    told.received = world_.now();
    for (SimSubscription* subscription : std::vector(subscriptions_)) subscription->handler_(told);
  };
  world_.at(last_event_, [this, here = here_, give] {
    if (!*here) return;
    if (side_ == Side::Target && network_.cut()) {
      // It comes with the next packet that comes through: after the cut, if the connection lives.
      world_.after(50ms, [this, here, give] {
        if (*here && !network_.cut()) give();
      });
      return;
    }
    give();
  });
}

void SimHypervisor::break_connection(const std::string& why) {
  if (!alive_) return;
  alive_ = false;
  world_.trace("connection to libvirt on the {} is lost: {}", machines_.host(side_).name, why);
  if (migrates_) machines_.client_gone(side_);
  world_.after(world_.between(50us, 500us), [this, here = here_, why] {
    if (!*here || !client_->alive || std::exchange(told_, true)) return;
    GuestEvent event;
    event.kind = GuestEvent::Kind::ConnectionLost;
    event.detail = why;
    event.received = world_.now();
    for (SimSubscription* subscription : std::vector(subscriptions_)) subscription->handler_(event);
  });
  machines_.changed.notify();
}

Status SimHypervisor::enter() {
  constexpr auto kKeepalive = 30s;
  const auto gone = [&] {
    return fail(Code::Unreachable,
                "libvirt on the " + machines_.host(side_).name + " does not answer");
  };
  if (world_.dead() || !alive_) return gone();
  if (side_ == Side::Target && network_.cut()) {
    const Instant deadline = world_.now() + kKeepalive;
    while (alive_ && network_.cut() && world_.now() < deadline) {
      world_.wait(network_.changed, deadline);
    }
    if (network_.cut()) break_connection("keepalive timeout");
  }
  world_.sleep(world_.between(100us, 900us) +
               (side_ == Side::Target ? network_.delay() : Duration(0)));
  if (world_.dead() || !alive_) return gone();
  if (!machines_.libvirt_up(side_)) {
    break_connection("libvirt is away");
    return gone();
  }
  if (world_.chance(machines_.faults.call_fails)) {
    world_.trace("a call to libvirt on the {} fails", machines_.host(side_).name);
    return fail(Code::Busy, "cannot acquire state change lock");
  }
  return {};
}

Status SimHypervisor::leave() {
  if (world_.dead()) return fail(Code::Unreachable, "dead");
  if (alive_ && world_.chance(machines_.faults.call_lost)) break_connection("the answer was lost");
  world_.sleep(world_.between(50us, 300us));
  if (!alive_) return fail(Code::Unreachable, "the connection to libvirt broke");
  return {};
}

Status SimHypervisor::call(const std::function<Status()>& act) {
  DROVER_TRY(enter());
  const Status done = act();
  DROVER_TRY(leave());
  return done;
}

Result<memmig::HostFacts> SimHypervisor::facts(const memmig::HostQuestion&) {
  return memmig::HostFacts{};
}

Result<memmig::GuestInfo> SimHypervisor::describe(const std::string&) {
  memmig::GuestInfo info;
  DROVER_TRY(call([&]() -> Status {
    const Machines::Domain& domain = machines_.domain(side_);
    if (!domain.qemu && !domain.defined) return fail(Code::NotFound, "no such guest");
    info = describe_guest(machines_);
    return {};
  }));
  return info;
}

Result<GuestState> SimHypervisor::state(const std::string&) {
  GuestState state = GuestState::Unknown;
  DROVER_TRY(call([&]() -> Status {
    const Machines::Domain& domain = machines_.domain(side_);
    if (!domain.qemu && !domain.defined) return fail(Code::NotFound, "no such guest");
    state = domain.qemu ? domain.state : GuestState::ShutOff;
    return {};
  }));
  return state;
}

Status SimHypervisor::attach_mirror(const std::string&, const memmig::MirrorSpec& spec) {
  return call([&]() -> Status {
    if (!machines_.domain(side_).qemu) return fail(Code::NotFound, "the guest does not run");
    Machines::Domain& domain = machines_.domain(side_);
    const auto old = domain.mirrors.find(spec.disk);
    if (old != domain.mirrors.end()) {
      if (!old->second.failed && old->second.socket != spec.unix_socket) {
        return fail(Code::Busy, "another mirror runs");
      }
      machines_.drop_mirror(spec.disk);
    }
    const auto& bitmaps = domain.bitmaps[spec.disk];
    const bool records =
        std::ranges::any_of(bitmaps, [](const auto& one) { return one.recording; });
    if (!machines_.connect_mirror(spec.disk, spec.unix_socket))
      return fail(Code::Io, "connection refused");
    if (!records) machines_.begin_bitmap(spec.disk, spec.generation);
    return {};
  });
}

Status SimHypervisor::detach_mirror(const std::string&, const std::string& disk, bool keep_bitmap) {
  DROVER_TRY(enter());
  DROVER_TRY(end_mirror(disk));
  if (!keep_bitmap) machines_.domain(Side::Source).bitmaps.erase(disk);
  return leave();
}

Status SimHypervisor::end_mirror(const std::string& disk) {
  // The job ends once its requests are answered.
  const Instant deadline = world_.now() + 30s;
  while (true) {
    const auto& mirrors = machines_.domain(Side::Source).mirrors;
    const auto found = mirrors.find(disk);
    if (found == mirrors.end() || found->second.waiting.empty()) break;
    if (world_.now() >= deadline) return fail(Code::Busy, "the mirror job does not end");
    world_.sleep(1ms);
  }
  machines_.drop_mirror(disk);
  return {};
}

Status SimHypervisor::detach_all(const std::string&, bool keep_bitmaps) {
  DROVER_TRY(enter());
  for (const DiskSetup& disk : machines_.disks()) DROVER_TRY(end_mirror(disk.name));
  Machines::Domain& domain = machines_.domain(side_);
  domain.exports = false;
  if (!keep_bitmaps) domain.bitmaps.clear();
  return leave();
}

Status SimHypervisor::reconnect() {
  if (alive_) return {};
  if (world_.dead()) return fail(Code::Unreachable, "dead");
  world_.sleep(world_.between(1ms, 10ms));
  if (!machines_.libvirt_up(side_) || (side_ == Side::Target && network_.cut())) {
    return fail(Code::Unreachable, "libvirt does not answer");
  }
  alive_ = true;
  told_ = false;
  return {};
}

Result<memmig::GuestIo> SimHypervisor::disk_io(const std::string&) {
  memmig::GuestIo io;
  DROVER_TRY(call([&]() -> Status {
    if (!machines_.domain(side_).qemu) return fail(Code::NotFound, "the guest does not run");
    io.operations = machines_.counters.writes;
    io.time = machines_.counters.writes * 200us;
    return {};
  }));
  return io;
}

// --- bitmaps ---

Status SimHypervisor::begin_bitmaps(const std::string&,
                                    const std::vector<memmig::BitmapSpec>& disks,
                                    std::uint64_t generation) {
  return call([&]() -> Status {
    Machines::Domain& domain = machines_.domain(side_);
    if (!domain.qemu) return fail(Code::NotFound, "the guest does not run");
    for (const memmig::BitmapSpec& disk : disks) {
      for (const auto& bitmap : domain.bitmaps[disk.disk]) {
        if (bitmap.generation >= generation && !bitmap.recording) {
          return fail(Code::AlreadyExists, "that generation was there before");
        }
      }
    }
    for (const memmig::BitmapSpec& disk : disks) {
      const auto& bitmaps = domain.bitmaps[disk.disk];
      const bool there = !bitmaps.empty() && bitmaps.back().generation == generation;
      if (!there) machines_.begin_bitmap(disk.disk, generation);
    }
    return {};
  });
}

Status SimHypervisor::end_bitmaps(const std::string&, const std::vector<std::string>& disks,
                                  std::uint64_t older_than) {
  return call([&]() -> Status {
    for (const std::string& disk : disks) {
      std::erase_if(machines_.domain(side_).bitmaps[disk],
                    [&](const auto& bitmap) { return bitmap.generation < older_than; });
    }
    return {};
  });
}

Result<std::vector<Extent>> SimHypervisor::read_bitmaps(const std::string&,
                                                        const std::string& disk) {
  std::vector<Extent> extents;
  DROVER_TRY(call([&]() -> Status {
    const auto& bitmaps = machines_.domain(side_).bitmaps[disk];
    if (bitmaps.empty()) return fail(Code::NotFound, "there is no bitmap");
    const auto setup = std::ranges::find(machines_.disks(), disk, &DiskSetup::name);
    for (std::size_t at = 0; at < setup->size; at += 4096) {
      const bool dirty =
          std::ranges::any_of(bitmaps, [&](const auto& bitmap) { return bitmap.dirty[at / 4096]; });
      if (dirty)
        extents.push_back({Offset(at), Length(std::min<std::size_t>(4096, setup->size - at))});
    }
    return {};
  }));
  return extents;
}

Result<memmig::Attached> SimHypervisor::attached(const std::string&) {
  memmig::Attached all;
  DROVER_TRY(call([&]() -> Status {
    const Machines::Domain& domain = machines_.domain(side_);
    if (!domain.qemu) return fail(Code::NotFound, "the guest does not run");
    all.process = "qemu-" + std::to_string(domain.process);
    for (const auto& [disk, mirror] : domain.mirrors) {
      memmig::Attached::Mirror one;
      one.disk = disk;
      one.job = one.node = true;
      one.status = "ready";
      one.unix_socket = mirror.socket;
      if (mirror.failed) one.error = "Connection reset by peer";
      all.mirrors.push_back(one);
    }
    for (const auto& [disk, bitmaps] : domain.bitmaps) {
      for (const auto& bitmap : bitmaps) {
        memmig::Attached::Bitmap one;
        one.disk = disk;
        one.node = "libvirt-" + disk + "-format";
        one.generation = bitmap.generation;
        one.recording = bitmap.recording;
        one.granularity = 4_KiB;
        one.dirty = 4_KiB * static_cast<std::uint64_t>(std::ranges::count(bitmap.dirty, true));
        all.bitmaps.push_back(one);
      }
    }
    if (domain.exports) all.nbd_socket = "/run/guest/drover-export.sock";
    return {};
  }));
  return all;
}

Status SimHypervisor::start_exports(const std::string&, const std::string&,
                                    const std::vector<memmig::ExportSpec>&) {
  return call([&]() -> Status {
    if (!machines_.domain(side_).qemu) return fail(Code::NotFound, "the guest does not run");
    machines_.domain(side_).exports = true;
    return {};
  });
}

Status SimHypervisor::stop_exports(const std::string&, const std::string&) {
  return call([&]() -> Status {
    machines_.domain(side_).exports = false;
    return {};
  });
}

// --- the migration: five steps, driven by this client ---

Status SimHypervisor::migrate(const memmig::MigrateOptions& options,
                              memmig::ProgressHandler progress) {
  const auto& to = dynamic_cast<const SimHypervisor&>(*options.target);
  // As the real one: over connections that break for themselves.
  SimHypervisor source(world_, network_, machines_, side_, client_);
  SimHypervisor target(world_, network_, machines_, to.side_, client_);
  source.migrates_ = target.migrates_ = true;
  return source.migrate_to(target, progress);
}

Status SimHypervisor::migrate_to(SimHypervisor& target, const memmig::ProgressHandler& progress) {
  DROVER_TRY(enter());
  const auto migration = std::make_shared<Migration>();
  machines_.migration = migration;
  const auto over = [&](Status status) {
    if (!world_.dead()) migration->phase = Migration::Phase::Over;
    return status;
  };
  if (!machines_.runs(side_)) return over(fail(Code::Busy, "domain is not running"));
  // Prepare.
  if (const Status prepared = target.call([&]() -> Status {
        Machines::Domain& there = machines_.domain(Side::Target);
        if (there.qemu) return fail(Code::AlreadyExists, "domain is already active");
        there.qemu = there.incoming = there.auto_destroy = true;
        there.state = GuestState::Paused;
        GuestEvent event;
        event.kind = GuestEvent::Kind::Started;
        event.detail = "migrated";
        machines_.emit(Side::Target, event);
        return {};
      });
      !prepared) {
    // The target may have begun although nobody heard of it.
    if (!world_.dead()) machines_.end_qemu(Side::Target, "destroyed");
    return over(prepared);
  }
  if (progress) progress({.memory_total = 64_MiB, .memory_remaining = 32_MiB});
  Status performed = perform(*migration);
  if (world_.dead()) return fail(Code::Unreachable, "dead");
  if (!performed) {
    if (target.alive()) (void)target.enter();
    machines_.end_qemu(Side::Target, "failed");
    if (alive_) confirm(*migration, false);
    return over(performed);
  }
  migration->phase = Migration::Phase::Performed;
  Status finished = finish(target, *migration);
  if (world_.dead()) return fail(Code::Unreachable, "dead");
  if (!alive_) return over(fail(Code::Unreachable, "the connection to libvirt broke"));
  world_.sleep(world_.between(100us, 2ms));
  if (!alive_) return over(fail(Code::Unreachable, "the connection to libvirt broke"));
  if (!machines_.libvirt_up(side_)) {
    break_connection("libvirt is away");
    return over(fail(Code::Unreachable, "the connection to libvirt broke"));
  }
  confirm(*migration, finished.has_value());
  // libvirt looks every now and then whether QEMU has gone.
  world_.sleep(world_.between(1ms, 200ms));
  return over(finished);
}

// Pre-copy, then the guest stops, is drained, and its device state goes over.
Status SimHypervisor::perform(Migration& migration) {
  migration.phase = Migration::Phase::Perform;
  Machines::Domain& here = machines_.domain(side_);
  const auto broken = [&]() -> Status {
    if (migration.abort) return fail(Code::Cancelled, "migration was cancelled");
    const auto path = machines_.memory.lock();
    if (migration.failed || !path || path->broken() || !here.qemu) {
      return fail(Code::Io, "operation failed: migration out job: unexpectedly failed");
    }
    if (!alive_) return fail(Code::Unreachable, "the connection to libvirt broke");
    return {};
  };
  bool early = world_.chance(machines_.faults.stops_early);
  const auto carry = [&](unsigned pieces) -> Status {
    for (unsigned i = 0; i < pieces;) {
      DROVER_TRY(broken());
      world_.sleep(world_.between(200us, 2ms));
      const auto path = machines_.memory.lock();
      if (path && path->carries()) ++i;
      if (path && !path->carries() && std::exchange(early, false)) return {};
      if (path && !path->carries()) world_.sleep(network_.cut() ? 200ms : 5ms);
      if (!alive_) return fail(Code::Unreachable, "the connection to libvirt broke");
    }
    return broken();
  };
  DROVER_TRY(carry(1 + static_cast<unsigned>(world_.random.below(8))));
  if (here.state != GuestState::Running) return fail(Code::Busy, "domain is not running");
  machines_.stop_vcpus(side_, GuestState::Paused);
  GuestEvent event;
  event.kind = GuestEvent::Kind::CpusStopped;
  machines_.emit(side_, event);
  event.kind = GuestEvent::Kind::Suspended;
  event.detail = "migrated";
  machines_.emit(side_, event);
  while (!machines_.still()) {
    if (const Status well = broken(); !well) return well;
    world_.wait(machines_.changed, world_.now() + 5ms);
  }
  event.kind = GuestEvent::Kind::Quiesced;
  event.detail.clear();
  machines_.emit(side_, event);
  DROVER_TRY(carry(1 + static_cast<unsigned>(world_.random.below(4))));
  here.has_images = false;  // inactivated: its locks are dropped
  return {};
}

Status SimHypervisor::finish(SimHypervisor& target, Migration& migration) {
  if (const Status entered = target.enter(); !entered) {
    // Nobody there will go on with it: "auto destroy", or we do it.
    if (!world_.dead()) machines_.end_qemu(Side::Target, "destroyed");
    return entered;
  }
  Machines::Domain& there = machines_.domain(Side::Target);
  if (!there.qemu) return fail(Code::Io, "the guest is gone on the target");
  world_.sleep(world_.between(100us, 3ms));
  if (world_.dead()) return fail(Code::Unreachable, "dead");
  if (!there.qemu) return fail(Code::Io, "the guest is gone on the target");
  there.incoming = there.auto_destroy = false;
  there.defined = true;
  migration.phase = Migration::Phase::Finished;
  GuestEvent event;
  event.kind = GuestEvent::Kind::Defined;
  machines_.emit(Side::Target, event);
  event.kind = GuestEvent::Kind::Suspended;
  event.detail = "paused";
  machines_.emit(Side::Target, event);
  world_.sleep(world_.between(100us, 5ms));
  if (world_.chance(machines_.faults.finish_lost)) target.break_connection("the answer was lost");
  if (!target.alive())
    return fail(Code::Unreachable, "the connection to the target's libvirt broke");
  return {};
}

// What the client tells the source at the end.
void SimHypervisor::confirm(Migration&, bool success) {
  Machines::Domain& here = machines_.domain(side_);
  if (!here.qemu) return;
  if (success) return machines_.end_qemu(side_, "migrated");
  if (here.state != GuestState::Paused) return;
  // To resume it QEMU needs its images' locks.
  if (!machines_.guards.empty()) {
    world_.trace("libvirt would resume the source, but its images are guarded");
    return;
  }
  machines_.start_vcpus(side_);
  GuestEvent event;
  event.kind = GuestEvent::Kind::Resumed;
  event.detail = "migrated";
  machines_.emit(side_, event);
  if (machines_.source_went_on) machines_.source_went_on();
}

Status SimHypervisor::abort_migration(const std::string&) {
  return call([&]() -> Status {
    const auto& migration = machines_.migration;
    if (migration && migration->phase <= Migration::Phase::Perform) migration->abort = true;
    return {};
  });
}

// --- life ---

Status SimHypervisor::suspend(const std::string&) {
  return call([&]() -> Status {
    if (machines_.runs(side_)) machines_.stop_vcpus(side_, GuestState::Paused);
    return {};
  });
}

Status SimHypervisor::resume(const std::string&) {
  return call([&]() -> Status {
    Machines::Domain& here = machines_.domain(side_);
    if (!here.qemu) return fail(Code::NotFound, "domain is not running");
    if (here.state == GuestState::Running) return {};
    if (here.incoming) return fail(Code::Busy, "cannot acquire state change lock");
    const auto& migration = machines_.migration;
    if (side_ == Side::Source && migration && migration->phase == Migration::Phase::Perform) {
      return fail(Code::Busy, "cannot acquire state change lock");
    }
    if (side_ == Side::Source && !machines_.guards.empty()) {
      return fail(Code::Io, "Failed to get \"write\" lock");
    }
    if (side_ == Side::Target && machines_.faults.cannot_resume) {
      return fail(Code::Io, "Failed to get \"write\" lock");
    }
    for (const DiskSetup& disk : machines_.disks()) {
      if (machines_.image(side_, disk) == nullptr)
        return fail(Code::Io, "no such file: " + disk.path);
    }
    machines_.start_vcpus(side_);
    GuestEvent event;
    event.kind = GuestEvent::Kind::CpusRunning;
    machines_.emit(side_, event);
    event.kind = GuestEvent::Kind::Resumed;
    event.detail = "unpaused";
    machines_.emit(side_, event);
    return {};
  });
}

Status SimHypervisor::destroy(const std::string&) {
  return call([&]() -> Status {
    if (machines_.runs(side_)) world_.violate("a guest that runs is destroyed");
    machines_.end_qemu(side_, "destroyed");
    return {};
  });
}

Status SimHypervisor::define(const std::string&) {
  return call([&]() -> Status {
    machines_.domain(side_).defined = true;
    return {};
  });
}

Status SimHypervisor::undefine(const std::string&) {
  return call([&]() -> Status {
    const Side other = side_ == Side::Source ? Side::Target : Side::Source;
    if (!machines_.domain(other).qemu && !machines_.domain(other).defined) {
      world_.violate("the guest's only definition is removed");
    }
    machines_.domain(side_).defined = false;
    return {};
  });
}

Status SimHypervisor::set_autostart(const std::string&, bool autostart) {
  return call([&]() -> Status {
    machines_.domain(side_).autostart = autostart;
    return {};
  });
}

Result<std::unique_ptr<memmig::Subscription>> SimHypervisor::subscribe(
    const std::string&, memmig::EventHandler handler) {
  DROVER_TRY(enter());
  return std::make_unique<SimSubscription>(*this, std::move(handler));
}

memmig::GuestInfo describe_guest(Machines& machines) {
  memmig::GuestInfo info;
  info.name = "web1";
  info.uuid = kGuestUuid;
  info.id = 1;
  info.state = machines.domain(Side::Source).state;
  info.persistent = true;
  info.autostart = machines.domain(Side::Source).autostart;
  info.memory = 64_MiB;
  info.private_directory = "/run/guest";
  std::string disks;
  for (const DiskSetup& disk : machines.disks()) {
    memmig::GuestDisk one;
    one.target = disk.name;
    one.path = disk.path;
    one.format = disk.plain ? "raw" : "qcow2";
    one.node = "libvirt-" + disk.name + "-format";
    one.virtual_size = Length(disk.size);
    info.disks.push_back(one);
    disks += "<disk type='file' device='disk'><driver name='qemu' type='" + one.format +
             "'/><source file='" + disk.path + "'/><target dev='" + disk.name +
             "' bus='virtio'/></disk>";
  }
  info.live_xml = "<domain type='kvm'><name>web1</name><devices>" + disks + "</devices></domain>";
  info.inactive_xml = info.live_xml;
  return info;
}

}  // namespace drover::sim
