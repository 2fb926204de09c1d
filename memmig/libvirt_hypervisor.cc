// SPDX-License-Identifier: Apache-2.0
#include "memmig/libvirt_hypervisor.h"

#include <dirent.h>
#include <fmt/format.h>
#include <libvirt/libvirt-qemu.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <pugixml.hpp>
#include <sstream>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "memmig/convergence.h"
#include "memmig/dirty_bitmap.h"
#include "memmig/domain_xml.h"
#include "memmig/libvirt_disks.h"
#include "memmig/libvirt_support.h"

namespace drover::memmig {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;

// QEMU answers these commands in milliseconds; a job's end may wait for a disk.
constexpr std::chrono::seconds kMirrorReady{10};
constexpr std::chrono::seconds kMirrorEnd{30};
constexpr std::chrono::seconds kExportEnd{10};
// In case the event that is waited for is lost.
constexpr milliseconds kRecheck{500};
constexpr milliseconds kStatisticsInterval{200};
constexpr milliseconds kSoon{50};
constexpr int kDefaultDowntime = 300;  // ms, QEMU's
constexpr const char* kPrivateParent = "/var/lib/libvirt/qemu";
constexpr const char* kPidDirectory = "/run/libvirt/qemu";

std::string drover_name(const std::string& disk) { return std::string(kPrefix) + disk; }
std::string filter_name(const std::string& disk) { return std::string(kPrefix) + "top-" + disk; }
// The node, bitmap and export that exist while the bitmaps of a disk are read.
std::string scratch_name(const std::string& disk) {
  return std::string(kPrefix) + "bitmap-" + disk;
}
bool is_drovers(std::string_view name) { return name.starts_with(kPrefix); }

// ---- the event loop -----------------------------------------------------------------------------

// libvirt's event loop can be registered once in a process and never unregistered; the thread that
// runs it lives as long as there are connections.
class EventLoop {
 public:
  static Result<std::shared_ptr<EventLoop>> get() {
    static std::mutex mutex;
    static std::weak_ptr<EventLoop> current;
    static bool registered = false;
    const std::lock_guard lock(mutex);
    if (auto loop = current.lock()) return loop;
    if (!registered) {
      virSetErrorFunc(nullptr, [](void*, virErrorPtr) {});
      if (virInitialize() < 0 || virEventRegisterDefaultImpl() < 0) {
        return libvirt_fail("starting libvirt's event loop");
      }
      registered = true;
    }
    auto loop = std::make_shared<EventLoop>();
    current = loop;
    return loop;
  }

  EventLoop()
      : timer_(virEventAddTimeout(
            -1, [](int, void*) {}, nullptr, nullptr)) {
    CHECK(timer_ >= 0, "libvirt's default event loop takes timers");
    thread_ = std::thread([this] {
      while (!stopping_) virEventRunDefaultImpl();
      // What was deregistered and closed just before is let go of in these rounds; the timer is
      // always due, so none of them waits.
      for (int round = 0; round < 4; ++round) virEventRunDefaultImpl();
      virEventRemoveTimeout(timer_);
    });
  }
  ~EventLoop() {
    stopping_ = true;
    virEventUpdateTimeout(timer_, 0);
    thread_.join();
  }
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;

 private:
  int timer_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// ---- events -------------------------------------------------------------------------------------

// Hands the connection's events to its subscriptions, also those of the next connection when one
// broke. Shared with libvirt's callbacks, which may run a last time while a connection closes.
class Hub {
 public:
  using Epoch = std::uint64_t;  // counts connections

  struct Entry {
    std::string guest;
    EventHandler handler;
    std::mutex running;  // held while the handler runs
    bool ended = false;  // under running
  };

  void add(std::shared_ptr<Entry> entry) {
    const std::lock_guard lock(mutex_);
    entries_.push_back(std::move(entry));
  }
  void remove(const std::shared_ptr<Entry>& entry) {
    {
      const std::lock_guard lock(mutex_);
      std::erase(entries_, entry);
    }
    const std::lock_guard lock(entry->running);
    entry->ended = true;
  }
  [[nodiscard]] bool empty() const {
    const std::lock_guard lock(mutex_);
    return entries_.empty();
  }

  // An empty guest: for every subscription.
  void deliver(const std::string& guest, const GuestEvent& event) {
    std::vector<std::shared_ptr<Entry>> matching;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& entry : entries_) {
        if (guest.empty() || entry->guest == guest) matching.push_back(entry);
      }
    }
    for (const auto& entry : matching) {
      const std::lock_guard lock(entry->running);
      if (!entry->ended) entry->handler(event);
    }
  }

  // A connection is being made; its events may come from now on.
  Epoch opening() {
    const std::lock_guard lock(mutex_);
    broken_ = false;
    return ++epoch_;
  }
  // It works. False: it has broken already.
  bool opened() {
    const std::lock_guard lock(mutex_);
    lost_ = broken_;
    return !lost_;
  }
  // That connection is gone. Told once, and not if it never worked.
  void lost(Epoch epoch, const std::string& why) {
    {
      const std::lock_guard lock(mutex_);
      if (epoch != epoch_) return;
      broken_ = true;
      if (lost_) return;
      lost_ = true;
      ++qemu_events_;
    }
    changed_.notify_all();
    deliver({}, {GuestEvent::Kind::ConnectionLost, why, {}, now(), {}});
  }
  [[nodiscard]] bool is_lost() const {
    const std::lock_guard lock(mutex_);
    return lost_;
  }

  // A count that grows with each of QEMU's events, of whichever guest, to wait for the next one.
  void count_qemu_event() {
    {
      const std::lock_guard lock(mutex_);
      ++qemu_events_;
    }
    changed_.notify_all();
  }
  [[nodiscard]] std::uint64_t qemu_events() const {
    const std::lock_guard lock(mutex_);
    return qemu_events_;
  }
  void wait_beyond(std::uint64_t seen, Instant deadline) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline, [&] { return qemu_events_ != seen; });
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Entry>> entries_;
  std::uint64_t qemu_events_ = 0;
  Epoch epoch_ = 0;
  bool broken_ = false;  // the newest connection
  bool lost_ = true;     // there is no connection
};

using HubHandle = std::shared_ptr<Hub>;

class HubSubscription final : public Subscription {
 public:
  HubSubscription(HubHandle hub, std::shared_ptr<Hub::Entry> entry)
      : hub_(std::move(hub)), entry_(std::move(entry)) {}
  ~HubSubscription() override { hub_->remove(entry_); }

 private:
  HubHandle hub_;
  std::shared_ptr<Hub::Entry> entry_;
};

// What libvirt's callbacks are given.
struct Registration {
  HubHandle hub;
  Hub::Epoch epoch;
};
Hub& hub_of(void* opaque) { return *static_cast<Registration*>(opaque)->hub; }
void free_registration(void* opaque) { delete static_cast<Registration*>(opaque); }

template <std::size_t N>
std::string word(const std::array<const char*, N>& words, int index) {
  return index >= 0 && static_cast<std::size_t>(index) < N ? words[static_cast<std::size_t>(index)]
                                                           : std::to_string(index);
}

int on_lifecycle(virConnectPtr, virDomainPtr domain, int event, int detail, void* opaque) {
  GuestEvent out;
  out.received = now();
  switch (event) {
    case VIR_DOMAIN_EVENT_DEFINED: out.kind = GuestEvent::Kind::Defined; break;
    case VIR_DOMAIN_EVENT_UNDEFINED: out.kind = GuestEvent::Kind::Undefined; break;
    case VIR_DOMAIN_EVENT_STARTED:
      out.kind = GuestEvent::Kind::Started;
      out.detail =
          word(std::to_array<const char*>({"booted", "migrated", "restored", "snapshot", "wakeup"}),
               detail);
      break;
    case VIR_DOMAIN_EVENT_SUSPENDED:
      out.kind = GuestEvent::Kind::Suspended;
      out.detail =
          word(std::to_array<const char*>({"paused", "migrated", "ioerror", "watchdog", "restored",
                                           "snapshot", "api-error", "postcopy", "postcopy-failed"}),
               detail);
      break;
    case VIR_DOMAIN_EVENT_RESUMED:
      out.kind = GuestEvent::Kind::Resumed;
      out.detail = word(std::to_array<const char*>(
                            {"unpaused", "migrated", "snapshot", "postcopy", "postcopy-failed"}),
                        detail);
      break;
    case VIR_DOMAIN_EVENT_STOPPED:
      out.kind = GuestEvent::Kind::Stopped;
      out.detail = word(std::to_array<const char*>({"shutdown", "destroyed", "crashed", "migrated",
                                                    "saved", "failed", "snapshot"}),
                        detail);
      break;
    case VIR_DOMAIN_EVENT_SHUTDOWN:
      out.kind = GuestEvent::Kind::Shutdown;
      out.detail = word(std::to_array<const char*>({"finished", "guest", "host"}), detail);
      break;
    case VIR_DOMAIN_EVENT_CRASHED: out.kind = GuestEvent::Kind::Crashed; break;
    default: return 0;
  }
  hub_of(opaque).deliver(uuid_of(domain), out);
  return 0;
}

void on_reboot(virConnectPtr, virDomainPtr domain, void* opaque) {
  hub_of(opaque).deliver(uuid_of(domain), {GuestEvent::Kind::Rebooted, {}, {}, now(), {}});
}

void on_disk_error(virConnectPtr, virDomainPtr domain, const char* path, const char* alias,
                   int action, const char* reason, void* opaque) {
  const std::string did = word(
      std::to_array<const char*>({"ignored", "guest paused", "reported to the guest"}), action);
  hub_of(opaque).deliver(
      uuid_of(domain),
      {GuestEvent::Kind::DiskError,
       fmt::format("{} {}: {} {}", alias == nullptr ? "" : alias, path == nullptr ? "" : path, did,
                   reason == nullptr ? "" : reason),
       {},
       now(),
       {}});
}

void on_device_added(virConnectPtr, virDomainPtr domain, const char* alias, void* opaque) {
  hub_of(opaque).deliver(uuid_of(domain), {GuestEvent::Kind::DeviceAdded, alias, {}, now(), {}});
}
void on_device_removed(virConnectPtr, virDomainPtr domain, const char* alias, void* opaque) {
  hub_of(opaque).deliver(uuid_of(domain), {GuestEvent::Kind::DeviceRemoved, alias, {}, now(), {}});
}

void on_block_job(virConnectPtr, virDomainPtr domain, const char* disk, int type, int status,
                  void* opaque) {
  if (type != VIR_DOMAIN_BLOCK_JOB_TYPE_COPY) return;
  hub_of(opaque).deliver(
      uuid_of(domain),
      {GuestEvent::Kind::CopyChanged,
       word(std::to_array<const char*>({"completed", "failed", "cancelled", "ready"}), status),
       disk == nullptr ? "" : disk,
       now(),
       {}});
}

// What is asked of QEMU's own events.
constexpr const char* kQemuEvents =
    "^(STOP|RESUME|MIGRATION|JOB_STATUS_CHANGE|BLOCK_JOB_.*|BLOCK_EXPORT_DELETED)$";

void on_qemu_event(virConnectPtr, virDomainPtr domain, const char* name, long long seconds,
                   unsigned int micros, const char* details, void* opaque) {
  Hub& hub = hub_of(opaque);
  hub.count_qemu_event();
  const std::string_view event = name == nullptr ? "" : name;
  const json data = details == nullptr ? json() : json::parse(details, nullptr, false);
  GuestEvent out;
  out.received = now();
  out.stamped = std::chrono::system_clock::time_point(
      std::chrono::duration_cast<std::chrono::system_clock::duration>(
          std::chrono::seconds(seconds) + std::chrono::microseconds(micros)));
  if (event == "STOP") {
    out.kind = GuestEvent::Kind::CpusStopped;
  } else if (event == "RESUME") {
    out.kind = GuestEvent::Kind::CpusRunning;
  } else if (event == "MIGRATION") {
    // libvirt always has QEMU pause before the switchover: by then vm_stop() has stopped the CPUs,
    // drained and flushed (QEMU 7.2: migration_completion(), migration_maybe_pause()).
    if (string_of(data, "status") != "pre-switchover") return;
    out.kind = GuestEvent::Kind::Quiesced;
  } else if (event == "BLOCK_JOB_COMPLETED" || event == "BLOCK_JOB_CANCELLED" ||
             event == "BLOCK_JOB_ERROR") {
    const std::string job = string_of(data, "device");
    if (const std::string copied = disk_of_copy_job(job); !copied.empty()) {
      out.disk = copied;
      const bool io_error = event == "BLOCK_JOB_ERROR";
      out.kind = io_error ? GuestEvent::Kind::CopyIoError : GuestEvent::Kind::CopyFailed;
      out.detail = string_of(data, io_error ? "operation" : "error");
      if (!out.detail.empty()) hub.deliver(uuid_of(domain), out);
      return;
    }
    if (!is_drovers(job)) return;
    out.kind = GuestEvent::Kind::MirrorEnded;
    out.disk = job.substr(kPrefix.size());
    out.detail = event == "BLOCK_JOB_ERROR" ? string_of(data, "operation") + " error"
                                            : string_of(data, "error");
    if (out.detail.empty()) out.detail = event == "BLOCK_JOB_CANCELLED" ? "cancelled" : "completed";
  } else {
    return;
  }
  hub.deliver(uuid_of(domain), out);
}

void on_close(virConnectPtr, int reason, void* opaque) {
  const auto& registration = *static_cast<Registration*>(opaque);
  registration.hub->lost(
      registration.epoch,
      word(std::to_array<const char*>(
               {"input/output error", "closed by the host", "no answer to keepalive", "closed"}),
           reason));
}

// One connection with its registered callbacks. Whoever uses it holds it: reconnect() may put
// another in its place meanwhile.
class Connected {
 public:
  static Result<std::shared_ptr<Connected>> open(const ConnectOptions& options,
                                                 const HubHandle& hub);
  ~Connected();
  Connected(const Connected&) = delete;
  Connected& operator=(const Connected&) = delete;

  [[nodiscard]] virConnectPtr get() const { return connection_.get(); }
  [[nodiscard]] Hub::Epoch epoch() const { return epoch_; }

 private:
  Connected(Connection connection, Hub::Epoch epoch)
      : connection_(std::move(connection)), epoch_(epoch) {}
  Status watch(const ConnectOptions& options, const HubHandle& hub);

  Connection connection_;
  const Hub::Epoch epoch_;
  std::vector<int> callbacks_;
  int qemu_callback_ = -1;
  bool close_callback_ = false;
};

Result<Connection> open_connection(const ConnectOptions& options) {
  Connection connection;
  for (const std::string& socket : options.sockets) {
    connection.reset(virConnectOpen(("qemu+unix:///system?socket=" + socket).c_str()));
    if (connection) break;
    log_info("libvirt at {} is not reached by {}: {}", options.uri, socket, libvirt_error("connecting").message);
  }
  if (!connection) connection.reset(virConnectOpen(options.uri.c_str()));
  if (!connection) {
    Error error = libvirt_error("connecting to libvirt at " + options.uri);
    if (contains(error.message, "Permission denied") ||
        contains(error.message, "Host key verification failed")) {
      error.code = Code::Denied;
      error.retryable = false;
      error.hint = "root must be able to log in there by SSH without a question being asked";
    } else if (error.code == Code::Unreachable || error.code == Code::Io) {
      error.code = Code::Unreachable;
      error.hint = "is libvirtd running there? 'virsh -c " + options.uri + " list' must work";
    }
    return fail(std::move(error));
  }
  // 1: the other side has no keepalive; a local socket does not need it.
  if (virConnectSetKeepAlive(connection.get(), static_cast<int>(options.keepalive_interval.count()),
                             options.keepalive_count) < 0) {
    return libvirt_fail("watching " + options.uri);
  }
  return connection;
}

// A connection to a target by SSH that waits for a migration, which then has it to itself: SSH takes
// a while, or minutes where the link is down, and nobody can take that back.
class WaitingConnection : public std::enable_shared_from_this<WaitingConnection> {
 public:
  WaitingConnection(ConnectOptions options, std::shared_ptr<EventLoop> loop)
      : options_(std::move(options)), loop_(std::move(loop)) {}

  // Makes it, on a thread that nobody has to wait for. Not if that is under way already.
  std::future<Status> make() {
    auto made = std::make_shared<std::promise<Status>>();
    {
      const std::lock_guard lock(mutex_);
      if (std::exchange(making_, true)) {
        made->set_value(fail(slow()));
        return made->get_future();
      }
    }
    std::thread([self = shared_from_this(), loop = loop_, made]() mutable {
      auto opened = open_connection(self->options_);
      Status status;
      if (!opened) status = fail(opened.error());
      Connection connection = opened ? std::move(*opened) : nullptr;
      {
        const std::lock_guard lock(self->mutex_);
        self->making_ = false;
        if (connection || !self->works()) std::swap(self->waiting_, connection);
      }
      connection.reset();  // what it replaces: closing may take a while, and nobody waits for it
      self.reset();  // and a connection that nobody wants, while there is an event loop
      made->set_value(std::move(status));
    }).detach();
    return made->get_future();
  }
  // Has been made, or could not be. If nobody has tried yet it begins.
  bool tried() {
    {
      const std::lock_guard lock(mutex_);
      if (making_) return false;
      if (std::exchange(began_, true)) return true;
    }
    (void)make();
    return false;
  }
  // What became of it. Not much longer than the first connection took.
  Status made(std::future<Status> making) const {
    if (making.wait_for(kPatience) == std::future_status::ready) return making.get();
    return fail(slow());
  }
  // There is none that works, and no migration has it.
  [[nodiscard]] bool missing() const {
    const std::lock_guard lock(mutex_);
    return !taken_ && !works();
  }
  [[nodiscard]] bool taken() const {
    const std::lock_guard lock(mutex_);
    return taken_;
  }
  Result<Connection> take() {
    const std::lock_guard lock(mutex_);
    if (!works()) {
      return fail(Error{Code::Unreachable, "the connection to " + options_.uri + " is gone", "", true});
    }
    taken_ = true;
    return std::move(waiting_);
  }
  void put_back(Connection connection) {
    const std::lock_guard lock(mutex_);
    taken_ = false;
    std::swap(waiting_, connection);
  }

 private:
  static constexpr std::chrono::seconds kPatience{10};
  bool works() const { return waiting_ && virConnectIsAlive(waiting_.get()) == 1; }
  Error slow() const {
    return {Code::Unreachable, "the second connection to " + options_.uri + " takes much longer than the first",
            "a move needs two: does something there limit SSH logins (MaxStartups, a firewall)?", true};
  }

  const ConnectOptions options_;
  const std::shared_ptr<EventLoop> loop_;
  mutable std::mutex mutex_;
  bool making_ = false;
  bool began_ = false;  // tried()
  bool taken_ = false;
  Connection waiting_;  // goes first
};

Result<std::shared_ptr<Connected>> Connected::open(const ConnectOptions& options,
                                                   const HubHandle& hub) {
  DROVER_ASSIGN(Connection connection, open_connection(options));
  std::shared_ptr<Connected> connected(new Connected(std::move(connection), hub->opening()));
  DROVER_TRY(connected->watch(options, hub));
  if (!hub->opened()) {
    return fail(Code::Unreachable, "the connection to " + options.uri + " broke at once");
  }
  return connected;
}

Connected::~Connected() {
  if (close_callback_) virConnectUnregisterCloseCallback(get(), on_close);
  for (const int id : callbacks_) virConnectDomainEventDeregisterAny(get(), id);
  if (qemu_callback_ >= 0) virConnectDomainQemuMonitorEventDeregister(get(), qemu_callback_);
}

Status Connected::watch(const ConnectOptions& options, const HubHandle& hub) {
  const std::string doing = "watching " + options.uri;
  const auto opaque = [&] { return new Registration{hub, epoch_}; };
  const auto add = [&](int event, auto callback) {
    Registration* handle = opaque();
    const int id = virConnectDomainEventRegisterAny(get(), nullptr, event,
                                                    VIR_DOMAIN_EVENT_CALLBACK(callback), handle,
                                                    free_registration);
    if (id < 0) {
      delete handle;
      return false;
    }
    callbacks_.push_back(id);
    return true;
  };
  if (!add(VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle) ||
      !add(VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot) ||
      !add(VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, on_disk_error) ||
      !add(VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, on_block_job) ||
      !add(VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, on_device_added) ||
      !add(VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, on_device_removed)) {
    return libvirt_fail(doing);
  }
  Registration* handle = opaque();
  qemu_callback_ = virConnectDomainQemuMonitorEventRegister(
      get(), nullptr, kQemuEvents, on_qemu_event, handle, free_registration,
      VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX);
  if (qemu_callback_ < 0) {
    delete handle;
    return libvirt_fail(doing);
  }
  handle = opaque();
  if (virConnectRegisterCloseCallback(get(), on_close, handle, free_registration) < 0) {
    delete handle;
    return libvirt_fail(doing);
  }
  close_callback_ = true;
  return {};
}

// ---- the hypervisor -----------------------------------------------------------------------------

class LibvirtHypervisor final : public DiskHost {
 public:
  LibvirtHypervisor(std::shared_ptr<EventLoop> loop, HubHandle hub,
                    std::shared_ptr<Connected> connection, ConnectOptions options)
      : loop_(std::move(loop)),
        options_(std::move(options)),
        uri_(options_.uri),
        local_(uri_.find(":///") != std::string::npos && !contains(uri_, "+")),
        hub_(std::move(hub)),
        connection_(std::move(connection)) {}
  ~LibvirtHypervisor() override;

  // migrate() to this host takes it.
  void set_waiting(std::shared_ptr<WaitingConnection> waiting) { waiting_ = std::move(waiting); }

  const std::string& uri() const override { return uri_; }
  bool alive() const override {
    return connected() && !(waiting_ && waiting_->missing());
  }
  Status reconnect() override;
  bool ready_to_migrate() override;

  Result<HostFacts> facts(const HostQuestion& question) override;
  Result<GuestInfo> describe(const std::string& guest) override;
  Result<GuestState> state(const std::string& guest) override;
  Result<GuestIo> disk_io(const std::string& guest) override;
  Status attach_mirror(const std::string& guest, const MirrorSpec& spec) override;
  Status detach_mirror(const std::string& guest, const std::string& disk,
                       bool keep_bitmap) override;
  Status begin_bitmaps(const std::string& guest, const std::vector<BitmapSpec>& disks,
                       std::uint64_t generation) override;
  Status end_bitmaps(const std::string& guest, const std::vector<std::string>& disks,
                     std::uint64_t older_than) override;
  Result<std::vector<Extent>> read_bitmaps(const std::string& guest,
                                           const std::string& disk) override;
  Result<Attached> attached(const std::string& guest) override;
  Status detach_all(const std::string& guest, bool keep_bitmaps) override;
  Status start_exports(const std::string& guest, const std::string& unix_socket,
                       const std::vector<ExportSpec>& disks) override;
  Status stop_exports(const std::string& guest, const std::string& unix_socket) override;
  Status migrate(const MigrateOptions& options, ProgressHandler progress) override;
  Status abort_migration(const std::string& guest) override;
  Status suspend(const std::string& guest) override;
  Status resume(const std::string& guest) override;
  Status destroy(const std::string& guest) override;
  Status define(const std::string& xml) override;
  Status undefine(const std::string& guest) override;
  Status set_autostart(const std::string& guest, bool autostart) override;
  Result<std::unique_ptr<Subscription>> subscribe(const std::string& guest,
                                                  EventHandler handler) override;

  Result<GuestPlaces> disk_places(const std::string& guest) override;
  Status start_copy(const std::string& guest, const DiskCopySpec& spec) override;
  Status set_copy_bandwidth(const std::string& guest, const std::string& disk,
                            Length per_second) override;
  Status pivot_copy(const std::string& guest, const std::string& disk) override;
  Status abort_copy(const std::string& guest, const std::string& disk) override;
  Status end_stray_copy(const std::string& guest, const std::string& disk,
                        const std::string& target_path) override;
  Status flush_disk(const std::string& guest, const std::string& disk) override;
  Status point_persistent(const std::string& guest, const std::vector<TargetDisk>& disks) override;
  Result<std::vector<ImageUse>> image_uses() override;
  Result<std::string> pool_directory(const std::string& pool) override;
  void refresh_pools(const std::vector<std::string>& paths) override;

 private:
  struct Migration {
    std::mutex mutex;
    std::condition_variable changed;
    bool finished = false;
    bool abort = false;
    std::string gave_up;
    milliseconds downtime{};  // the limit in force
    Length bandwidth;         // the same; not the mutex's: the watcher's alone while it runs
  };

  Result<Domain> find(const std::string& guest) const;
  Result<Domain> find_running(const std::string& guest) const;
  Result<Domain> find_over(virConnectPtr connection, const std::string& guest) const;
  Result<Domain> find_running_over(virConnectPtr connection, const std::string& guest) const;
  Status wait_for(std::chrono::seconds limit, const std::string& what,
                  const std::function<Result<bool>()>& done) const;
  void resolve_volumes(GuestInfo& info) const;
  Status describe_running(virDomainPtr domain, const std::string& live, GuestInfo& info) const;
  void describe_process(GuestInfo& info) const;
  Result<Attached> look(virDomainPtr domain) const;
  Result<std::string> root_node(virDomainPtr domain, const std::string& disk,
                                const std::string& doing) const;
  Status begin(virDomainPtr domain, const std::vector<BitmapSpec>& disks,
               std::uint64_t generation) const;
  Status end_mirror(virDomainPtr domain, const Attached::Mirror& mirror) const;
  Status remove_bitmap(virDomainPtr domain, const Attached::Bitmap& bitmap) const;
  Result<std::optional<std::string>> job_status(virDomainPtr domain, const std::string& job) const;
  Status in_running(const std::string& guest, const std::function<Status(virDomainPtr)>& act) const;
  Status end_exports(virDomainPtr domain, const std::vector<std::string>& ids) const;
  Status detach(virDomainPtr domain, const std::string& disk, bool keep_bitmap) const;
  Result<std::vector<Extent>> read_union(virDomainPtr domain, const std::string& disk,
                                         const json& sources, Length size, Length granularity,
                                         const std::string& socket, const std::string& doing) const;
  Status end_reading(virDomainPtr domain, const std::string& disk) const;
  Result<Length> node_size(virDomainPtr domain, const std::string& node,
                           const std::string& doing) const;
  [[nodiscard]] bool connected() const {
    return !hub_->is_lost() && virConnectIsAlive(connection()->get()) == 1;
  }
  std::optional<MigrationProgress> statistics(virDomainPtr domain, bool completed) const;
  Status migrate_with(Migration& migration, LibvirtHypervisor& target,
                      const MigrateOptions& options, const ProgressHandler& progress);
  Status migrate_over(virConnectPtr source, virConnectPtr target, const std::string& target_uri,
                      Migration& migration, const MigrateOptions& options,
                      const ProgressHandler& progress);
  void watch(const MigrateOptions& options, const ProgressHandler& progress,
             Migration& migration) const;
  std::chrono::milliseconds steer(virDomainPtr domain, Convergence& convergence, std::chrono::milliseconds& allowed,
                                  const MigrateOptions& options, const ProgressHandler& progress,
                                  Migration& migration) const;

  [[nodiscard]] std::shared_ptr<Connected> connection() const {
    const std::lock_guard lock(connection_mutex_);
    return connection_;
  }

  std::shared_ptr<EventLoop> loop_;  // goes last
  const ConnectOptions options_;
  const std::string uri_;
  const bool local_;
  HubHandle hub_;
  mutable std::mutex connection_mutex_;
  std::shared_ptr<Connected> connection_;
  std::shared_ptr<WaitingConnection> waiting_;  // null: not by SSH
  std::mutex reconnecting_;
  std::mutex bitmaps_mutex_;  // one read_bitmaps() at a time: it uses QEMU's only NBD server
  std::mutex migrations_mutex_;
  std::map<std::string, std::shared_ptr<Migration>> migrations_;  // by guest
};

LibvirtHypervisor::~LibvirtHypervisor() {
  CHECK(hub_->empty(), "a Hypervisor outlives its subscriptions");
}

Status LibvirtHypervisor::reconnect() {
  const std::lock_guard one_at_a_time(reconnecting_);
  if (alive()) return {};
  const bool lost = !connected();
  // What broke the one will have broken the other.
  std::future<Status> second;
  if (waiting_ && !waiting_->taken() && (lost || waiting_->missing())) {
    second = waiting_->make();
  }
  if (lost) {
    // Who was not told yet.
    hub_->lost(connection()->epoch(), "the connection is dead");
    DROVER_ASSIGN(auto opened, Connected::open(options_, hub_));
    const std::lock_guard lock(connection_mutex_);
    connection_ = std::move(opened);
  }
  return second.valid() ? waiting_->made(std::move(second)) : Status();
}

bool LibvirtHypervisor::ready_to_migrate() {
  if (!waiting_ || !connected() || !waiting_->missing()) return true;
  return waiting_->tried();
}

Result<Domain> LibvirtHypervisor::find(const std::string& guest) const {
  return find_over(connection()->get(), guest);
}

Result<Domain> LibvirtHypervisor::find_running(const std::string& guest) const {
  return find_running_over(connection()->get(), guest);
}

Result<Domain> LibvirtHypervisor::find_over(virConnectPtr connection,
                                            const std::string& guest) const {
  virResetLastError();
  Domain domain(virDomainLookupByUUIDString(connection, guest.c_str()));
  if (!domain) domain.reset(virDomainLookupByName(connection, guest.c_str()));
  if (domain) return domain;
  Error error = libvirt_error(fmt::format("looking for guest {} on {}", guest, uri_));
  if (error.code == Code::NotFound) {
    error.message = fmt::format("no guest is named {} on {}", guest, uri_);
    error.hint = fmt::format("'virsh -c {} list --all' shows the guests", uri_);
  }
  return fail(std::move(error));
}

Result<Domain> LibvirtHypervisor::find_running_over(virConnectPtr connection,
                                                    const std::string& guest) const {
  DROVER_ASSIGN(Domain domain, find_over(connection, guest));
  if (virDomainIsActive(domain.get()) != 1) {
    return fail(Code::NotFound, fmt::format("guest {} is not running on {}", guest, uri_));
  }
  return domain;
}

// Waits for `done`, asking again at each of QEMU's events.
Status LibvirtHypervisor::wait_for(std::chrono::seconds limit, const std::string& what,
                                   const std::function<Result<bool>()>& done) const {
  const Instant deadline = now() + limit;
  for (;;) {
    const std::uint64_t seen = hub_->qemu_events();
    DROVER_ASSIGN(const bool is_done, done());
    if (is_done) return {};
    if (now() >= deadline) {
      Error error{Code::Busy,
                  fmt::format("{} has not happened within {} s", what, limit.count()),
                  {},
                  true};
      return fail(std::move(error));
    }
    hub_->wait_beyond(seen, std::min<Instant>(deadline, now() + kRecheck));
  }
}

// ---- hosts --------------------------------------------------------------------------------------

Result<HostFacts> LibvirtHypervisor::facts(const HostQuestion& question) {
  HostFacts facts;
  facts.uri = uri_;
  const std::string doing = "asking " + uri_;
  const Text hostname(virConnectGetHostname(connection()->get()));
  if (!hostname) return libvirt_fail(doing);
  facts.hostname = hostname.get();
  unsigned long version = 0;
  if (virConnectGetLibVersion(connection()->get(), &version) < 0) return libvirt_fail(doing);
  facts.libvirt_version = version;
  if (virConnectGetVersion(connection()->get(), &version) == 0) facts.hypervisor_version = version;

  const Text capabilities(virConnectGetCapabilities(connection()->get()));
  if (!capabilities) return libvirt_fail(doing);
  pugi::xml_document document;
  if (document.load_string(capabilities.get())) {
    facts.host_uuid = document.child("capabilities").child("host").child("uuid").text().get();
  }
  virNodeInfo node{};
  if (virNodeGetInfo(connection()->get(), &node) == 0) facts.cores = node.cpus;

  int count = 0;
  if (virNodeGetMemoryStats(connection()->get(), VIR_NODE_MEMORY_STATS_ALL_CELLS, nullptr, &count,
                            0) == 0 &&
      count > 0) {
    std::vector<virNodeMemoryStats> stats(static_cast<std::size_t>(count));
    if (virNodeGetMemoryStats(connection()->get(), VIR_NODE_MEMORY_STATS_ALL_CELLS, stats.data(),
                              &count, 0) == 0) {
      for (const virNodeMemoryStats& stat : stats) {
        const std::string_view name = std::begin(stat.field);
        if (name == VIR_NODE_MEMORY_STATS_FREE || name == VIR_NODE_MEMORY_STATS_BUFFERS ||
            name == VIR_NODE_MEMORY_STATS_CACHED) {
          facts.free_memory += Length(stat.value * 1024);
        }
      }
    }
  }

  if (!question.guest_name.empty()) {
    const Domain same_name(virDomainLookupByName(connection()->get(), question.guest_name.c_str()));
    if (same_name) facts.uuid_of_name = uuid_of(same_name.get());
  }
  if (!question.guest_uuid.empty()) {
    const Domain same_uuid(
        virDomainLookupByUUIDString(connection()->get(), question.guest_uuid.c_str()));
    if (same_uuid) facts.name_of_uuid = virDomainGetName(same_uuid.get());
  }
  if (facts.name_of_uuid || facts.uuid_of_name) {
    if (auto existing = state(facts.name_of_uuid ? question.guest_uuid : question.guest_name)) {
      facts.existing_state = *existing;
    }
  }

  if (!question.machine.empty()) {
    const Text domain_capabilities(
        virConnectGetDomainCapabilities(connection()->get(), nullptr, question.arch.c_str(),
                                        question.machine.c_str(), question.domain_type.c_str(), 0));
    if (!domain_capabilities) {
      Error error = libvirt_error(doing);
      if (error.code == Code::Unreachable) return fail(std::move(error));
      const virError* last = virGetLastError();
      facts.machine_supported = false;
      facts.machine_problem = last != nullptr && last->message != nullptr ? last->message : "";
    }
  }

  if (!question.cpu_xml.empty()) {
    const int answer = virConnectCompareHypervisorCPU(
        connection()->get(), nullptr, question.arch.c_str(),
        question.machine.empty() ? nullptr : question.machine.c_str(), question.domain_type.c_str(),
        question.cpu_xml.c_str(), VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE);
    if (answer == VIR_CPU_COMPARE_IDENTICAL || answer == VIR_CPU_COMPARE_SUPERSET) {
      facts.cpu = CpuAnswer::Compatible;
    } else {
      const virError* last = virGetLastError();
      facts.cpu_problem =
          last != nullptr && last->message != nullptr ? last->message : "the CPU is not compatible";
      facts.cpu = last != nullptr && last->code == VIR_ERR_CPU_INCOMPATIBLE
                      ? CpuAnswer::Incompatible
                      : CpuAnswer::Unknown;
      if (answer == VIR_CPU_COMPARE_INCOMPATIBLE) facts.cpu = CpuAnswer::Incompatible;
    }
  }

  for (const std::string& name : question.networks) {
    const Network network(virNetworkLookupByName(connection()->get(), name.c_str()));
    if (!network) {
      facts.networks_missing.push_back(name);
    } else if (virNetworkIsActive(network.get()) != 1) {
      facts.networks_inactive.push_back(name);
    }
  }
  if (!connected()) return fail(Code::Unreachable, "the connection to " + uri_ + " is gone");
  return facts;
}

// ---- guests -------------------------------------------------------------------------------------

Result<GuestState> LibvirtHypervisor::state(const std::string& guest) {
  DROVER_ASSIGN(const Domain domain, find(guest));
  int state = 0;
  if (virDomainGetState(domain.get(), &state, nullptr, 0) < 0) {
    return libvirt_fail("asking for the state of guest " + guest);
  }
  switch (state) {
    case VIR_DOMAIN_RUNNING:
    case VIR_DOMAIN_BLOCKED: return GuestState::Running;
    case VIR_DOMAIN_PAUSED: return GuestState::Paused;
    case VIR_DOMAIN_SHUTDOWN: return GuestState::ShuttingDown;
    case VIR_DOMAIN_SHUTOFF: return GuestState::ShutOff;
    case VIR_DOMAIN_CRASHED: return GuestState::Crashed;
    case VIR_DOMAIN_PMSUSPENDED: return GuestState::PmSuspended;
    default: return GuestState::Unknown;
  }
}

Result<GuestIo> LibvirtHypervisor::disk_io(const std::string& guest) {
  DROVER_ASSIGN(const Domain domain, find(guest));
  constexpr const char* kAllDisks = "";
  constexpr int kMost = 16;  // what libvirt answers at most (REMOTE_DOMAIN_BLOCK_STATS_PARAMETERS_MAX)
  std::array<virTypedParameter, kMost> fields{};
  int count = kMost;
  if (virDomainBlockStatsFlags(domain.get(), kAllDisks, fields.data(), &count, 0) < 0) {
    return libvirt_fail("reading the disk statistics of guest " + guest);
  }
  const auto field = [&](const char* name) -> std::int64_t {
    long long value = 0;
    // Absent: 0 stays. Times are in nanoseconds.
    virTypedParamsGetLLong(fields.data(), count, name, &value);
    return value;
  };
  GuestIo io;
  io.operations = static_cast<std::uint64_t>(field(VIR_DOMAIN_BLOCK_STATS_READ_REQ) +
                                             field(VIR_DOMAIN_BLOCK_STATS_WRITE_REQ) +
                                             field(VIR_DOMAIN_BLOCK_STATS_FLUSH_REQ));
  io.time = std::chrono::nanoseconds(field(VIR_DOMAIN_BLOCK_STATS_READ_TOTAL_TIMES) +
                                     field(VIR_DOMAIN_BLOCK_STATS_WRITE_TOTAL_TIMES) +
                                     field(VIR_DOMAIN_BLOCK_STATS_FLUSH_TOTAL_TIMES));
  return io;
}

void LibvirtHypervisor::resolve_volumes(GuestInfo& info) const {
  for (GuestDisk& disk : info.disks) {
    if (disk.kind != DiskKind::Volume) continue;
    const Pool pool(virStoragePoolLookupByName(connection()->get(), disk.pool.c_str()));
    const Volume volume(pool ? virStorageVolLookupByName(pool.get(), disk.volume.c_str())
                             : nullptr);
    virStorageVolInfo details{};
    if (!volume || virStorageVolGetInfo(volume.get(), &details) < 0) continue;
    const Text path(virStorageVolGetPath(volume.get()));
    if (!path) continue;
    switch (details.type) {
      case VIR_STORAGE_VOL_FILE: disk.kind = DiskKind::File; break;
      case VIR_STORAGE_VOL_BLOCK: disk.kind = DiskKind::Block; break;
      case VIR_STORAGE_VOL_DIR: disk.kind = DiskKind::Directory; break;
      default: disk.kind = DiskKind::Network; break;
    }
    disk.path = path.get();
  }
}

void LibvirtHypervisor::describe_process(GuestInfo& info) const {
  // The directory's name ends in a form of the guest's name that libvirt shortens; the number is
  // unique.
  const std::string begin = fmt::format("domain-{}-", info.id);
  if (DIR* directory = ::opendir(kPrivateParent)) {
    while (const dirent* entry = ::readdir(directory)) {
      const std::string_view name = std::begin(entry->d_name);
      if (!name.starts_with(begin)) continue;
      const std::string path = fmt::format("{}/{}", kPrivateParent, name);
      struct stat status {};
      if (::lstat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode)) {
        info.private_directory = path;
      }
    }
    ::closedir(directory);
  }
  std::ifstream file(fmt::format("{}/{}.pid", kPidDirectory, info.name));
  int pid = 0;
  struct stat status {};
  if (file >> pid && pid > 0 && ::stat(fmt::format("/proc/{}", pid).c_str(), &status) == 0) {
    info.qemu_pid = pid;
    info.qemu_uid = status.st_uid;
    info.qemu_gid = status.st_gid;
  }
}

// What QEMU calls the top of the disk of that device; a filter, if there is one. Empty: not found.
std::string top_node(const json& devices, const std::string& alias) {
  for (const json& device : devices) {
    const std::string qdev = string_of(device, "qdev");
    if (!alias.empty() && (qdev == alias || contains(qdev, "/" + alias + "/"))) {
      return string_of(field(device, "inserted"), "node-name");
    }
  }
  return {};
}

// The bytes that an image and its backing files take.
Length chain_allocation(const json& image) {
  Length sum;
  const json* link = &image;
  while (link->is_object()) {
    sum += Length(number_of(*link, "actual-size"));
    link = &field(*link, "backing-image");
  }
  return sum;
}

Status LibvirtHypervisor::describe_running(virDomainPtr domain, const std::string& live,
                                           GuestInfo& info) const {
  const std::string doing = "looking at guest " + info.name;
  DROVER_ASSIGN(const json nodes, qmp(domain, "query-named-block-nodes", doing));
  DROVER_ASSIGN(const json devices, qmp(domain, "query-block", doing));
  DROVER_ASSIGN(const json jobs, qmp(domain, "query-block-jobs", doing));
  DROVER_ASSIGN(const json exports, qmp(domain, "query-block-exports", doing));
  DROVER_ASSIGN(const json migration, qmp(domain, "query-migrate", doing));

  const auto find_node = [&](const std::string& name) -> const json& {
    static const json kNothing;
    for (const json& node : nodes) {
      if (string_of(node, "node-name") == name) return node;
    }
    return kNothing;
  };

  std::vector<std::string> matched_jobs;
  for (GuestDisk& disk : info.disks) {
    if (disk.kind == DiskKind::None) continue;
    // libvirt's names first: what query-block calls the top may be a filter (drover's own mirror,
    // copy-on-read).
    if (const unsigned index = disk_source_index(live, disk.target); index != 0) {
      for (const char* layer : {"format", "storage"}) {
        const std::string name = fmt::format("libvirt-{}-{}", index, layer);
        if (find_node(name).is_object()) {
          disk.node = name;
          break;
        }
      }
    }
    if (disk.node.empty()) {
      const std::string name = top_node(devices, disk_alias(live, disk.target));
      if (!is_drovers(name)) disk.node = name;
    }
    const json& image = field(find_node(disk.node), "image");
    disk.virtual_size = Length(number_of(image, "virtual-size"));
    disk.allocation = chain_allocation(image);
    if (disk.format == "qcow2") disk.cluster_size = Length(number_of(image, "cluster-size"));
    if (!string_of(image, "backing-filename").empty()) disk.backing_chain = true;
    if (bool_of(image, "encrypted")) disk.encrypted = true;

    virDomainBlockJobInfo job{};
    if (virDomainGetBlockJobInfo(domain, disk.target.c_str(), &job, 0) == 1) {
      disk.block_job = word(std::to_array<const char*>(
                                {"unknown", "pull", "copy", "commit", "active commit", "backup"}),
                            job.type);
    }
    for (const json& entry : jobs) {
      const std::string name = string_of(entry, "device");
      if (!is_drovers(name) && contains(name, "-" + disk.target + "-")) {
        matched_jobs.push_back(name);
        if (disk.block_job.empty()) disk.block_job = string_of(entry, "type");
      }
    }
  }
  for (const json& entry : jobs) {
    const std::string name = string_of(entry, "device");
    if (!is_drovers(name) &&
        std::find(matched_jobs.begin(), matched_jobs.end(), name) == matched_jobs.end()) {
      info.foreign_jobs.push_back(string_of(entry, "type") + " job " + name);
    }
  }
  for (const json& entry : exports) {
    const std::string name = string_of(entry, "id");
    if (string_of(entry, "type") == "nbd" && !is_drovers(name)) info.nbd_exports.push_back(name);
  }
  if (const json& reasons = field(migration, "blocked-reasons"); reasons.is_array()) {
    for (const json& reason : reasons) {
      if (reason.is_string()) info.migration_blockers.push_back(reason.get<std::string>());
    }
  }

  const Text backup(virDomainBackupGetXMLDesc(domain, 0));
  info.backup_job = backup != nullptr;
  virDomainJobInfo job{};
  info.other_job =
      virDomainGetJobInfo(domain, &job) == 0 && job.type != VIR_DOMAIN_JOB_NONE && !info.backup_job;
  return {};
}

Result<GuestInfo> LibvirtHypervisor::describe(const std::string& guest) {
  DROVER_ASSIGN(const Domain domain, find(guest));
  GuestInfo info;
  DROVER_ASSIGN(info.state, state(uuid_of(domain.get())));
  const bool running = virDomainIsActive(domain.get()) == 1;
  info.persistent = virDomainIsPersistent(domain.get()) == 1;

  constexpr unsigned kMigratable = VIR_DOMAIN_XML_SECURE | VIR_DOMAIN_XML_MIGRATABLE;
  if (info.persistent) {
    DROVER_ASSIGN(info.inactive_xml,
                  definition_of(domain.get(), kMigratable | VIR_DOMAIN_XML_INACTIVE));
  }
  std::string live;
  if (running) {
    DROVER_ASSIGN(live, definition_of(domain.get(), 0));
    DROVER_ASSIGN(info.live_xml, definition_of(domain.get(), kMigratable));
  }
  DROVER_TRY(parse_definition(running ? live : info.inactive_xml, info));
  if (running) {
    GuestInfo migratable;
    DROVER_TRY(parse_definition(info.live_xml, migratable));
    info.cpu_xml = migratable.cpu_xml;
    if (info.persistent) {
      GuestInfo inactive;
      DROVER_TRY(parse_definition(info.inactive_xml, inactive));
      for (const GuestDisk& disk : inactive.disks) {
        if (info.disk(disk.target) == nullptr && disk.kind != DiskKind::None) {
          info.inactive_only_disks.push_back(disk.target);
        }
      }
    }
  }
  resolve_volumes(info);

  int autostart = 0;
  if (info.persistent && virDomainGetAutostart(domain.get(), &autostart) == 0) {
    info.autostart = autostart != 0;
  }
  info.managed_save = virDomainHasManagedSaveImage(domain.get(), 0) == 1;
  if (const int count = virDomainSnapshotNum(domain.get(), 0); count > 0) {
    info.snapshots = static_cast<unsigned>(count);
  }
  if (const int count = virDomainListAllCheckpoints(domain.get(), nullptr, 0); count > 0) {
    info.checkpoints = static_cast<unsigned>(count);
  }
  if (running) {
    info.id = static_cast<int>(virDomainGetID(domain.get()));
    DROVER_TRY(describe_running(domain.get(), live, info));
    if (local_) describe_process(info);
  } else {
    for (GuestDisk& disk : info.disks) {
      virDomainBlockInfo sizes{};
      if (disk.kind != DiskKind::None &&
          virDomainGetBlockInfo(domain.get(), disk.target.c_str(), &sizes, 0) == 0) {
        disk.virtual_size = Length(sizes.capacity);
        disk.allocation = Length(sizes.allocation);
      }
    }
  }
  return info;
}

// ---- mirror -------------------------------------------------------------------------------------

// Where a mirror goes: above the filters that libvirt may have put on the image (copy-on-read,
// throttling). QEMU takes nothing below ("Need a root block node").
Result<std::string> LibvirtHypervisor::root_node(virDomainPtr domain, const std::string& disk,
                                                 const std::string& doing) const {
  DROVER_ASSIGN(const std::string live, definition_of(domain, 0));
  DROVER_ASSIGN(const json devices, qmp(domain, "query-block", doing));
  return top_node(devices, disk_alias(live, disk));
}

// The parameter `socket` of an NBD node's file name ("nbd+unix:///vda?socket=/path").
std::string nbd_socket_of(const std::string& file) {
  constexpr std::string_view kParameter = "?socket=";
  const std::size_t at = file.find(kParameter);
  return at == std::string::npos ? std::string() : file.substr(at + kParameter.size());
}

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Boot, process and start time: never the same for two processes.
std::string process_identity(int pid) {
  constexpr int kStartTime = 20;  // proc(5): field 22 of stat, counted from behind the name
  const std::string stat = text_of(fmt::format("/proc/{}/stat", pid));
  std::istringstream fields(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));
  std::string start;
  for (int i = 0; i < kStartTime && fields >> start; ++i) {
  }
  std::string boot = text_of("/proc/sys/kernel/random/boot_id");
  boot.resize(std::min(boot.size(), boot.find('\n')));
  return fields ? fmt::format("{} {} {}", boot, pid, start) : std::string();
}

// Where that process listens, of the unix sockets whose path begins with `prefix`. Empty: nowhere.
// (QEMU has no query for its NBD server.)
std::string listening_socket(int pid, const std::string& prefix) {
  constexpr unsigned long kAccepting = 1UL << 16;  // __SO_ACCEPTCON
  std::ifstream table(fmt::format("/proc/{}/net/unix", pid));
  std::map<std::string, std::string> sockets;  // path, by how /proc names the descriptor
  for (std::string line; std::getline(table, line);) {
    std::istringstream fields(line);
    std::string number, references, protocol, flags, type, state, inode, path;
    fields >> number >> references >> protocol >> flags >> type >> state >> inode >> std::ws;
    std::getline(fields, path);  // it may have blanks
    if (!fields || !path.starts_with(prefix)) continue;
    if ((std::strtoul(flags.c_str(), nullptr, 16) & kAccepting) == 0) continue;
    sockets.emplace(fmt::format("socket:[{}]", inode), path);
  }
  if (sockets.empty()) return {};
  std::error_code error;
  for (std::filesystem::directory_iterator entry(fmt::format("/proc/{}/fd", pid), error), end;
       !error && entry != end; entry.increment(error)) {
    std::error_code ignored;
    const auto found = sockets.find(std::filesystem::read_symlink(entry->path(), ignored).string());
    if (found != sockets.end()) return found->second;
  }
  return {};
}

Result<Attached> LibvirtHypervisor::look(virDomainPtr domain) const {
  const std::string doing =
      fmt::format("looking for what drover has in guest {}", virDomainGetName(domain));
  Attached attached;
  const auto mirror = [&](const std::string& name) -> Attached::Mirror& {
    const std::string disk = name.substr(kPrefix.size());
    for (Attached::Mirror& each : attached.mirrors) {
      if (each.disk == disk) return each;
    }
    attached.mirrors.push_back({.disk = disk});
    return attached.mirrors.back();
  };
  DROVER_ASSIGN(const json jobs, qmp(domain, "query-block-jobs", doing));
  for (const json& job : jobs) {
    const std::string name = string_of(job, "device");
    if (!is_drovers(name)) continue;
    Attached::Mirror& one = mirror(name);
    one.job = true;
    one.status = string_of(job, "status");
    one.error = string_of(job, "error");
  }
  DROVER_ASSIGN(const json nodes, qmp(domain, "query-named-block-nodes", {{"flat", true}}, doing));
  for (const json& node : nodes) {
    const std::string node_name = string_of(node, "node-name");
    if (is_drovers(node_name)) {
      // The filter comes and goes with its job.
      if (node_name.starts_with(filter_name(""))) continue;
      if (node_name.starts_with(scratch_name(""))) {
        attached.scratch.push_back(node_name.substr(scratch_name("").size()));
        continue;
      }
      Attached::Mirror& one = mirror(node_name);
      one.node = true;
      one.unix_socket = nbd_socket_of(string_of(node, "file"));
      continue;
    }
    const json& bitmaps = field(node, "dirty-bitmaps");
    if (!bitmaps.is_array()) continue;
    for (const json& bitmap : bitmaps) {
      const auto name = parse_bitmap_name(string_of(bitmap, "name"));
      if (!name) continue;
      attached.bitmaps.push_back({.disk = name->disk,
                                  .node = node_name,
                                  .generation = name->generation,
                                  .recording = bool_of(bitmap, "recording"),
                                  .busy = bool_of(bitmap, "busy"),
                                  .granularity = Length(number_of(bitmap, "granularity")),
                                  .dirty = Length(number_of(bitmap, "count"))});
    }
  }
  DROVER_ASSIGN(const json exports, qmp(domain, "query-block-exports", doing));
  for (const json& entry : exports) {
    const std::string id = string_of(entry, "id");
    if (is_drovers(id)) {
      attached.exports.push_back(id);
    } else if (string_of(entry, "type") == "nbd") {
      attached.foreign_exports = true;
    }
  }
  if (local_) {
    GuestInfo info;
    info.name = virDomainGetName(domain);
    info.id = static_cast<int>(virDomainGetID(domain));
    describe_process(info);
    if (info.qemu_pid > 0) {
      attached.process = process_identity(info.qemu_pid);
      if (!info.private_directory.empty()) {
        attached.nbd_socket =
            listening_socket(info.qemu_pid, fmt::format("{}/{}", info.private_directory, kPrefix));
      }
    }
  }
  return attached;
}

Result<Attached> LibvirtHypervisor::attached(const std::string& guest) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  return look(domain.get());
}

Status LibvirtHypervisor::attach_mirror(const std::string& guest, const MirrorSpec& spec) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  const std::string name = drover_name(spec.disk);
  const std::string doing =
      fmt::format("mirroring disk {} of guest {}", spec.disk, virDomainGetName(domain.get()));
  DROVER_ASSIGN(const Attached before, look(domain.get()));
  if (const Attached::Mirror* mirror = before.mirror(spec.disk); mirror != nullptr) {
    if (mirror->job && mirror->node && mirror->unix_socket != spec.unix_socket) {
      return fail(Code::Busy, fmt::format("{}: a mirror of drover's is on it already", doing),
                  "'drover jobs' shows the job it belongs to");
    }
    DROVER_TRY(end_mirror(domain.get(), *mirror));
  }
  DROVER_ASSIGN(std::string root, root_node(domain.get(), spec.disk, doing));
  if (root.empty()) root = spec.node;
  // Bitmaps that are there already are kept for what they say.
  const bool recording = before.recording(spec.disk) != nullptr;
  const auto undo = [&](Error error) -> Status {
    if (auto undone = detach(domain.get(), spec.disk, recording); !undone) {
      log_warning("{}: undoing it after an error: {}", doing, undone.error().message);
    }
    return fail(std::move(error));
  };
  if (!recording) {
    DROVER_TRY(begin(domain.get(), {{spec.disk, spec.node}}, spec.generation));
  }
  // No reconnect: a mirror whose endpoint is gone must end, so that the guest's writes do not wait
  // for it. Discards are passed on: what they leave on the source has to be copied again.
  if (auto added = qmp(domain.get(), "blockdev-add",
                       {{"driver", "nbd"},
                        {"node-name", name},
                        {"server", {{"type", "unix"}, {"path", spec.unix_socket}}},
                        {"export", spec.export_name},
                        {"reconnect-delay", 0},
                        {"discard", "unmap"}},
                       doing);
      !added) {
    return undo(std::move(added).error());
  }
  if (auto started = qmp(domain.get(), "blockdev-mirror",
                         {{"job-id", name},
                          {"device", root},
                          {"target", name},
                          {"filter-node-name", filter_name(spec.disk)},
                          {"sync", "none"},
                          {"copy-mode", "write-blocking"},
                          {"on-source-error", "report"},
                          {"on-target-error", "report"}},
                         doing);
      !started) {
    return undo(std::move(started).error());
  }
  auto ready = wait_for(kMirrorReady, doing, [&]() -> Result<bool> {
    DROVER_ASSIGN(const auto status, job_status(domain.get(), name));
    if (!status) {
      return fail(Code::Io, doing + ": QEMU has ended the job at once",
                  "QEMU's log in /var/log/libvirt/qemu may say why");
    }
    return *status == "ready";
  });
  if (!ready) return undo(std::move(ready).error());
  return {};
}

// None: there is no such job.
Result<std::optional<std::string>> LibvirtHypervisor::job_status(virDomainPtr domain,
                                                                 const std::string& job) const {
  DROVER_ASSIGN(const json jobs, qmp(domain, "query-block-jobs", "asking for block jobs"));
  for (const json& entry : jobs) {
    if (string_of(entry, "device") == job) return std::optional(string_of(entry, "status"));
  }
  return std::optional<std::string>();
}

// What was to be removed may be gone already.
Status gone_is_fine(Result<json> result) {
  if (result || result.error().code == Code::NotFound) return {};
  return fail(std::move(result).error());
}

// The job, and waits for its end; the node.
Status LibvirtHypervisor::end_mirror(virDomainPtr domain, const Attached::Mirror& mirror) const {
  const std::string name = drover_name(mirror.disk);
  const std::string doing = fmt::format("ending the mirror of disk {} of guest {}", mirror.disk,
                                        virDomainGetName(domain));
  if (mirror.job) {
    // Never with "force": QEMU (7.2, and later ones) then frees what the guest's mirrored writes
    // that are still under way go on using (mirror_run() frees in_flight_bitmap before it drains),
    // and crashes. Without it the job drains first. That needs an endpoint that answers; one that
    // is gone ends the job by itself.
    if (mirror.status == "concluded") {
      DROVER_TRY(gone_is_fine(qmp(domain, "job-dismiss", {{"id", name}}, doing)));
    } else {
      DROVER_TRY(gone_is_fine(qmp(domain, "block-job-cancel", {{"device", name}}, doing)));
    }
    DROVER_TRY(wait_for(kMirrorEnd, doing, [&]() -> Result<bool> {
      DROVER_ASSIGN(const auto status, job_status(domain, name));
      return !status;
    }));
  }
  if (mirror.node) {
    DROVER_TRY(gone_is_fine(qmp(domain, "blockdev-del", {{"node-name", name}}, doing)));
  }
  return {};
}

Status LibvirtHypervisor::detach(virDomainPtr domain, const std::string& disk,
                                 bool keep_bitmap) const {
  DROVER_ASSIGN(const Attached attached, look(domain));
  if (const Attached::Mirror* mirror = attached.mirror(disk); mirror != nullptr) {
    DROVER_TRY(end_mirror(domain, *mirror));
  }
  if (keep_bitmap) return {};
  for (const Attached::Bitmap& bitmap : attached.bitmaps) {
    if (bitmap.disk == disk) DROVER_TRY(remove_bitmap(domain, bitmap));
  }
  return {};
}

Status LibvirtHypervisor::detach_mirror(const std::string& guest, const std::string& disk,
                                        bool keep_bitmap) {
  return in_running(guest, [&](virDomainPtr domain) { return detach(domain, disk, keep_bitmap); });
}

// Does nothing when the guest does not run, which is what its end would have brought about.
Status LibvirtHypervisor::in_running(const std::string& guest,
                                     const std::function<Status(virDomainPtr)>& act) const {
  auto domain = find_running(guest);
  if (!domain) {
    if (domain.error().code == Code::NotFound) return {};
    return fail(std::move(domain).error());
  }
  auto done = act(domain->get());
  // QEMU may have gone meanwhile, with all that was in it.
  if (!done && virDomainIsActive(domain->get()) == 0) return {};
  return done;
}

Status LibvirtHypervisor::detach_all(const std::string& guest, bool keep_bitmaps) {
  return in_running(guest, [&](virDomainPtr domain) -> Status {
    const std::lock_guard lock(bitmaps_mutex_);
    DROVER_ASSIGN(const Attached attached, look(domain));
    const std::string doing =
        fmt::format("removing what drover has in guest {}", virDomainGetName(domain));
    DROVER_TRY(end_exports(domain, attached.exports));
    if (!attached.nbd_socket.empty() && !attached.foreign_exports) {
      DROVER_TRY(qmp(domain, "nbd-server-stop", doing));
    }
    for (const Attached::Mirror& mirror : attached.mirrors) DROVER_TRY(end_mirror(domain, mirror));
    for (const std::string& disk : attached.scratch) DROVER_TRY(end_reading(domain, disk));
    if (keep_bitmaps) return {};
    for (const Attached::Bitmap& bitmap : attached.bitmaps) {
      DROVER_TRY(remove_bitmap(domain, bitmap));
    }
    return {};
  });
}

// ---- bitmaps ------------------------------------------------------------------------------------

Status LibvirtHypervisor::begin_bitmaps(const std::string& guest,
                                        const std::vector<BitmapSpec>& disks,
                                        std::uint64_t generation) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  return begin(domain.get(), disks, generation);
}

Status LibvirtHypervisor::begin(virDomainPtr domain, const std::vector<BitmapSpec>& disks,
                                std::uint64_t generation) const {
  const std::string doing =
      fmt::format("recording the writes of guest {}", virDomainGetName(domain));
  DROVER_ASSIGN(const Attached attached, look(domain));
  json add = json::array();
  json disable = json::array();
  for (const BitmapSpec& disk : disks) {
    DROVER_ASSIGN(const Length size, node_size(domain, disk.node, doing));
    bool there = false;
    for (const Attached::Bitmap& bitmap : attached.bitmaps) {
      if (bitmap.disk != disk.disk) continue;
      if (bitmap.generation == generation && bitmap.recording) {
        there = true;
      } else if (bitmap.generation >= generation) {
        return fail(Code::AlreadyExists,
                    fmt::format("{}: disk {} has bitmaps up to generation {} already", doing,
                                disk.disk, bitmap.generation));
      } else if (bitmap.recording) {
        disable.push_back(
            {{"type", "block-dirty-bitmap-disable"},
             {"data",
              {{"node", bitmap.node}, {"name", bitmap_name(disk.disk, bitmap.generation)}}}});
      }
    }
    if (there) continue;
    add.push_back({{"type", "block-dirty-bitmap-add"},
                   {"data",
                    {{"node", disk.node},
                     {"name", bitmap_name(disk.disk, generation)},
                     {"granularity", bitmap_granularity(size).bytes()},
                     {"persistent", false}}}});
  }
  // In this order: QEMU carries the actions out one after the other, and a disk with an iothread
  // may complete a write in between.
  for (json& action : disable) add.push_back(std::move(action));
  if (add.empty()) return {};
  DROVER_TRY(qmp(domain, "transaction", {{"actions", std::move(add)}}, doing));
  return {};
}

Status LibvirtHypervisor::remove_bitmap(virDomainPtr domain, const Attached::Bitmap& bitmap) const {
  const std::string name = bitmap_name(bitmap.disk, bitmap.generation);
  return gone_is_fine(
      qmp(domain, "block-dirty-bitmap-remove", {{"node", bitmap.node}, {"name", name}},
          fmt::format("removing the dirty bitmap {} of guest {}", name, virDomainGetName(domain))));
}

Status LibvirtHypervisor::end_bitmaps(const std::string& guest,
                                      const std::vector<std::string>& disks,
                                      std::uint64_t older_than) {
  return in_running(guest, [&](virDomainPtr domain) -> Status {
    DROVER_ASSIGN(const Attached attached, look(domain));
    for (const Attached::Bitmap& bitmap : attached.bitmaps) {
      if (bitmap.generation < older_than &&
          std::find(disks.begin(), disks.end(), bitmap.disk) != disks.end()) {
        DROVER_TRY(remove_bitmap(domain, bitmap));
      }
    }
    return {};
  });
}

// An export's end is not at once: its clients are told first.
Status LibvirtHypervisor::end_exports(virDomainPtr domain,
                                      const std::vector<std::string>& ids) const {
  const std::string doing = fmt::format("ending exports of guest {}", virDomainGetName(domain));
  for (const std::string& id : ids) {
    DROVER_TRY(
        gone_is_fine(qmp(domain, "block-export-del", {{"id", id}, {"mode", "hard"}}, doing)));
  }
  if (ids.empty()) return {};
  return wait_for(kExportEnd, doing, [&]() -> Result<bool> {
    DROVER_ASSIGN(const json exports, qmp(domain, "query-block-exports", doing));
    return std::none_of(exports.begin(), exports.end(), [&](const json& entry) {
      return std::find(ids.begin(), ids.end(), string_of(entry, "id")) != ids.end();
    });
  });
}

Result<std::vector<Extent>> LibvirtHypervisor::read_bitmaps(const std::string& guest,
                                                            const std::string& disk) {
  if (!local_) {
    return fail(Code::InvalidArgument, "dirty bitmaps can be read only on the guest's own host");
  }
  const std::lock_guard lock(bitmaps_mutex_);
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  DROVER_ASSIGN(const Attached attached, look(domain.get()));
  const std::string doing = fmt::format("reading the dirty bitmaps of disk {} of guest {}", disk,
                                        virDomainGetName(domain.get()));
  DROVER_TRY(end_reading(domain.get(), disk));  // what an interrupted one left
  json sources = json::array();
  std::string node;
  Length granularity;
  for (const Attached::Bitmap& bitmap : attached.bitmaps) {
    if (bitmap.disk != disk) continue;
    node = bitmap.node;
    granularity = bitmap.granularity;
    sources.push_back({{"node", node}, {"name", bitmap_name(disk, bitmap.generation)}});
  }
  if (sources.empty()) return fail(Code::NotFound, doing + ": there is none");
  DROVER_ASSIGN(const Length size, node_size(domain.get(), node, doing));

  std::string socket = attached.nbd_socket;
  const bool start_server = socket.empty();
  if (start_server) {
    GuestInfo info;
    info.name = virDomainGetName(domain.get());
    info.id = static_cast<int>(virDomainGetID(domain.get()));
    describe_process(info);
    socket = fmt::format("{}/{}bitmap.sock", info.private_directory, kPrefix);
    ::unlink(socket.c_str());  // nobody listens there
    DROVER_TRY(start_exports(guest, socket, {}));
  }
  auto read = read_union(domain.get(), disk, sources, size, granularity, socket, doing);
  // All of it is removed in any case; the first error is the one to be told.
  auto ended = end_reading(domain.get(), disk);
  if (start_server) {
    if (auto stopped = stop_exports(guest, socket); !stopped && ended) ended = stopped;
  }
  if (!read) return read;
  DROVER_TRY(ended);
  return read;
}

// Merges the bitmaps into one on a node without content, offers that and reads it. Not on the
// disk's own node: QEMU (7.2.22) ends with an assertion (nbd_blockdev_client_closed()) when a
// client leaves an export whose node is in an iothread, and this process may be killed at any
// moment.
Result<std::vector<Extent>> LibvirtHypervisor::read_union(
    virDomainPtr domain, const std::string& disk, const json& sources, Length size,
    Length granularity, const std::string& socket, const std::string& doing) const {
  const std::string name = scratch_name(disk);
  DROVER_TRY(qmp(domain, "blockdev-add",
                 {{"driver", "null-co"}, {"node-name", name}, {"size", size.bytes()}}, doing));
  const json actions = {{{"type", "block-dirty-bitmap-add"},
                         {"data",
                          {{"node", name},
                           {"name", name},
                           {"granularity", granularity.bytes()},
                           {"persistent", false},
                           {"disabled", true}}}},
                        {{"type", "block-dirty-bitmap-merge"},
                         {"data", {{"node", name}, {"target", name}, {"bitmaps", sources}}}}};
  DROVER_TRY(qmp(domain, "transaction", {{"actions", actions}}, doing));
  DROVER_TRY(qmp(domain, "block-export-add",
                 {{"type", "nbd"},
                  {"id", name},
                  {"node-name", name},
                  {"name", name},
                  {"writable", false},
                  {"bitmaps", json::array({name})}},
                 doing));
  return read_bitmap_export(socket, name, name);
}

// Whatever of it is there. The node takes its bitmap along.
Status LibvirtHypervisor::end_reading(virDomainPtr domain, const std::string& disk) const {
  const std::string name = scratch_name(disk);
  DROVER_TRY(end_exports(domain, {name}));
  return gone_is_fine(
      qmp(domain, "blockdev-del", {{"node-name", name}},
          fmt::format("removing the node {} of guest {}", name, virDomainGetName(domain))));
}

Result<Length> LibvirtHypervisor::node_size(virDomainPtr domain, const std::string& node,
                                            const std::string& doing) const {
  DROVER_ASSIGN(const json nodes, qmp(domain, "query-named-block-nodes", {{"flat", true}}, doing));
  for (const json& each : nodes) {
    if (string_of(each, "node-name") == node) {
      return Length(number_of(field(each, "image"), "virtual-size"));
    }
  }
  return fail(Code::NotFound, fmt::format("{}: there is no node {}", doing, node));
}

// ---- exports ------------------------------------------------------------------------------------

Status LibvirtHypervisor::start_exports(const std::string& guest, const std::string& unix_socket,
                                        const std::vector<ExportSpec>& disks) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  const std::string doing =
      fmt::format("exporting the disks of guest {}", virDomainGetName(domain.get()));
  if (struct stat status{}; ::lstat(unix_socket.c_str(), &status) == 0) {
    return fail(Code::AlreadyExists, fmt::format("{}: {} is there already", doing, unix_socket));
  }
  DROVER_ASSIGN(const json exports, qmp(domain.get(), "query-block-exports", doing));
  if (!exports.empty()) {
    return fail(Code::Busy,
                fmt::format("{}: QEMU's NBD server is in use: it exports {} ({})", doing,
                            string_of(exports[0], "id"), string_of(exports[0], "node-name")),
                "a backup may be running; try again when it is done");
  }
  auto started = qmp(domain.get(), "nbd-server-start",
                     {{"addr", {{"type", "unix"}, {"data", {{"path", unix_socket}}}}}}, doing);
  if (!started) {
    Error error = std::move(started).error();
    if (error.code == Code::Busy) {
      error.message = fmt::format("{}: QEMU's NBD server is in use by somebody else", doing);
      error.hint = "a backup may be running; 'virsh backup-dumpxml' shows libvirt's";
    }
    return fail(std::move(error));
  }
  const auto undo = [&](Error error) -> Status {
    if (auto stopped = stop_exports(guest, unix_socket); !stopped) {
      log_warning("{}: undoing it after an error: {}", doing, stopped.error().message);
    }
    return fail(std::move(error));
  };
  // QEMU made the socket as its own user; the directory it is in is QEMU's and root's alone, so
  // nobody else came first.
  if (::chown(unix_socket.c_str(), 0, 0) < 0 || ::chmod(unix_socket.c_str(), 0600) < 0) {
    return undo(error_from_errno(errno, doing + ": " + unix_socket));
  }
  for (const ExportSpec& disk : disks) {
    const json arguments = {{"type", "nbd"},
                            {"id", drover_name(disk.disk)},
                            {"node-name", disk.node},
                            {"name", disk.export_name},
                            {"writable", false}};
    if (auto added = qmp(domain.get(), "block-export-add", arguments, doing); !added) {
      return undo(std::move(added).error());
    }
  }
  return {};
}

// QEMU ends the connections, not the clients: the other way round QEMU (7.2.22) ends with an
// assertion when the disk has an iothread (see read_union()). So the exports go before the server.
Status LibvirtHypervisor::stop_exports(const std::string& guest, const std::string& unix_socket) {
  return in_running(guest, [&](virDomainPtr domain) -> Status {
    const std::string doing =
        fmt::format("ending the exports of guest {}", virDomainGetName(domain));
    DROVER_ASSIGN(const json exports, qmp(domain, "query-block-exports", doing));
    bool foreign = false;
    std::vector<std::string> ours;
    for (const json& entry : exports) {
      const std::string id = string_of(entry, "id");
      if (is_drovers(id)) {
        ours.push_back(id);
      } else {
        foreign = true;
      }
    }
    DROVER_TRY(end_exports(domain, ours));
    if (foreign) return {};
    // QEMU has no query for its server, but it makes the socket when it starts it and removes it
    // when it stops it.
    if (struct stat found{}; ::lstat(unix_socket.c_str(), &found) != 0) return {};
    auto stopped = qmp(domain, "nbd-server-stop", doing);
    if (!stopped && !contains(stopped.error().message, "not running")) {
      return fail(std::move(stopped).error());
    }
    return {};
  });
}

// ---- memory -------------------------------------------------------------------------------------

std::optional<MigrationProgress> LibvirtHypervisor::statistics(virDomainPtr domain,
                                                               bool completed) const {
  int type = 0;
  int count = 0;
  virTypedParameterPtr parameters = nullptr;
  if (virDomainGetJobStats(domain, &type, &parameters, &count,
                           completed ? VIR_DOMAIN_JOB_STATS_COMPLETED : 0) < 0) {
    return {};
  }
  const auto number = [&](const char* name) {
    unsigned long long value = 0;
    virTypedParamsGetULLong(parameters, count, name, &value);
    return static_cast<std::uint64_t>(value);
  };
  MigrationProgress progress;
  progress.elapsed = milliseconds(number(VIR_DOMAIN_JOB_TIME_ELAPSED));
  progress.memory_total = Length(number(VIR_DOMAIN_JOB_MEMORY_TOTAL));
  progress.memory_remaining = Length(number(VIR_DOMAIN_JOB_MEMORY_REMAINING));
  progress.memory_sent = Length(number(VIR_DOMAIN_JOB_MEMORY_PROCESSED));
  progress.rate = Length(number(VIR_DOMAIN_JOB_MEMORY_BPS));
  progress.dirty_pages_per_second = number(VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE);
  progress.page_size = Length(number(VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE));
  progress.iteration = number(VIR_DOMAIN_JOB_MEMORY_ITERATION);
  progress.downtime = milliseconds(number(VIR_DOMAIN_JOB_DOWNTIME));
  int throttle = 0;
  if (virTypedParamsGetInt(parameters, count, VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE, &throttle) ==
          1 &&
      throttle > 0) {
    progress.throttle_percent = static_cast<unsigned>(throttle);
  }
  virTypedParamsFree(parameters, count);
  if (type == VIR_DOMAIN_JOB_NONE) return {};
  return progress;
}

Convergence first_convergence(const MigrateOptions& options) {
  return Convergence(options.convergence, options.transit != nullptr);
}

// What QEMU is allowed when the migration begins.
milliseconds first_downtime(const MigrateOptions& options) { return first_convergence(options).downtime(); }

Length bandwidth_of(const MigrateOptions& options) { return options.bandwidth ? options.bandwidth() : Length(); }

// Until the migration has ended. Over a connection of this thread's own, which may break without
// breaking the migration.
void LibvirtHypervisor::watch(const MigrateOptions& options, const ProgressHandler& progress,
                              Migration& migration) const {
  Convergence convergence = first_convergence(options);
  milliseconds allowed = first_downtime(options);  // QEMU knows of that
  Connection connection;
  Domain domain;
  std::unique_lock lock(migration.mutex);
  while (!migration.finished) {
    lock.unlock();
    if (!domain || virConnectIsAlive(connection.get()) != 1) {
      domain.reset();
      auto opened = open_connection(options_);
      if (!opened) log_info("watching the migration: {}", opened.error().to_string());
      connection = opened ? std::move(*opened) : nullptr;
      if (connection) {
        domain.reset(virDomainLookupByUUIDString(connection.get(), options.guest.c_str()));
      }
    }
    const milliseconds pause =
        domain ? steer(domain.get(), convergence, allowed, options, progress, migration)
               : kStatisticsInterval;
    lock.lock();
    if (!migration.finished) migration.changed.wait_for(lock, pause);
  }
}

// Reads the statistics, reports them and does what the convergence policy says. How long until the next time.
milliseconds LibvirtHypervisor::steer(virDomainPtr domain, Convergence& convergence, milliseconds& allowed,
                                      const MigrateOptions& options, const ProgressHandler& progress,
                                      Migration& migration) const {
  const std::string doing = "steering the migration";
  bool abort = false;
  {
    const std::lock_guard lock(migration.mutex);
    abort = migration.abort;
  }
  if (abort) virDomainAbortJob(domain);  // again: the first may have come before the job
  auto statistic = statistics(domain, false);
  if (!statistic || statistic->memory_total.bytes() == 0) return kSoon;
  // Not by virDomainMigrateSetMaxSpeed(): that is in MiB, and libvirt keeps it for the guest's next migration.
  if (const Length limit = bandwidth_of(options); limit != migration.bandwidth) {
    constexpr std::uint64_t kNoLimit = std::numeric_limits<std::int64_t>::max() >> 20 << 20;  // libvirt's
    json wanted = {{"max-bandwidth", limit.bytes() == 0 ? kNoLimit : limit.bytes()}};
    if (options.convergence.auto_converge) wanted["max-cpu-throttle"] = 1;
    if (auto set = qmp(domain, "migrate-set-parameters", wanted, doing); !set) {
      log_warning("{}", set.error().message);
    } else {
      log_info("bandwidth of the memory: {}", limit.bytes() == 0 ? "no limit" : format_length(limit) + "/s");
      migration.bandwidth = limit;
      convergence = first_convergence(options);  // what was tried at another speed says nothing
    }
  }
  const bool waited = convergence.waiting();
  const bool all_sent = statistic->iteration > 1;  // once
  if (waited && all_sent) statistic->transit = options.transit();
  for (const ConvergenceAction& action : convergence.step(now(), *statistic)) {
    if (const auto* downtime = std::get_if<SetDowntime>(&action)) {
      if (!waited) {
        log_info("memory does not converge: downtime of {} ms allowed", downtime->value.count());
      } else if (const auto& transit = statistic->transit) {
        log_info("the target has loaded {} of the {} that were sent: downtime of {} ms allowed",
                 format_length(transit->loaded), format_length(transit->given), downtime->value.count());
      } else {
        log_info("the target does not say what it has loaded: downtime of {} ms allowed", downtime->value.count());
      }
    } else if (const auto* throttle = std::get_if<SetThrottle>(&action)) {
      log_info("memory does not converge: guest may be slowed by {} %", throttle->max_percent);
      if (auto set = qmp(domain, "migrate-set-parameters",
                         {{"max-cpu-throttle", throttle->max_percent}}, doing);
          !set) {
        log_warning("{}", set.error().message);
      }
    } else if (const auto* give_up = std::get_if<GiveUp>(&action)) {
      const std::lock_guard lock(migration.mutex);
      migration.gave_up = give_up->why;
      migration.abort = true;
    }
  }
  // Tried until it works: with as little as QEMU is allowed while the target is behind a migration may never end.
  const milliseconds downtime = convergence.downtime();
  if (downtime != allowed &&
      virDomainMigrateSetMaxDowntime(domain, static_cast<unsigned long long>(downtime.count()), 0) == 0) {
    allowed = downtime;
  }
  {
    const std::lock_guard lock(migration.mutex);
    migration.downtime = convergence.downtime();
  }
  statistic->downtime_limit = convergence.downtime();
  if (progress) progress(*statistic);
  const bool soon_sent = statistic->memory_remaining.bytes() < statistic->memory_total.bytes() / 8;
  const bool hurry = downtime != allowed || (convergence.waiting() && (all_sent || soon_sent));
  return hurry ? kSoon : kStatisticsInterval;
}

class Parameters {
 public:
  Parameters() = default;
  ~Parameters() { virTypedParamsFree(list_, count_); }
  Parameters(const Parameters&) = delete;
  Parameters& operator=(const Parameters&) = delete;
  void add(const char* name, const std::string& value) {
    virTypedParamsAddString(&list_, &count_, &capacity_, name, value.c_str());
  }
  void add(const char* name, unsigned long long value) {
    virTypedParamsAddULLong(&list_, &count_, &capacity_, name, value);
  }
  void add(const char* name, int value) {
    virTypedParamsAddInt(&list_, &count_, &capacity_, name, value);
  }
  [[nodiscard]] virTypedParameterPtr list() const { return list_; }
  [[nodiscard]] unsigned count() const { return static_cast<unsigned>(count_); }

 private:
  virTypedParameterPtr list_ = nullptr;
  int count_ = 0;
  int capacity_ = 0;
};

Status LibvirtHypervisor::migrate(const MigrateOptions& options, ProgressHandler progress) {
  auto* target = dynamic_cast<LibvirtHypervisor*>(options.target);
  CHECK(target != nullptr, "both hypervisors are of one implementation");
  // From here on it can be aborted.
  auto migration = std::make_shared<Migration>();
  {
    const std::lock_guard lock(migrations_mutex_);
    if (!migrations_.emplace(options.guest, migration).second) {
      return fail(Code::Busy, "guest " + options.guest + " is being moved already");
    }
  }
  const Status migrated = migrate_with(*migration, *target, options, progress);
  const std::lock_guard lock(migrations_mutex_);
  migrations_.erase(options.guest);
  return migrated;
}

Status LibvirtHypervisor::migrate_with(Migration& migration, LibvirtHypervisor& target,
                                       const MigrateOptions& options,
                                       const ProgressHandler& progress) {
  // Nobody else calls over these: libvirt's client (9.0) can crash where the keepalive of a
  // connection fails while two threads wait for answers over it (CVE-2024-4418), and a migration
  // waits long.
  DROVER_ASSIGN(const Connection here, open_connection(options_));
  DROVER_ASSIGN(Connection there,
                target.waiting_ ? target.waiting_->take() : open_connection(target.options_));
  const Status migrated =
      migrate_over(here.get(), there.get(), target.uri_, migration, options, progress);
  if (target.waiting_) target.waiting_->put_back(std::move(there));
  return migrated;
}

Status LibvirtHypervisor::migrate_over(virConnectPtr source, virConnectPtr target,
                                       const std::string& target_uri, Migration& migration,
                                       const MigrateOptions& options,
                                       const ProgressHandler& progress) {
  DROVER_ASSIGN(const Domain domain, find_running_over(source, options.guest));
  const std::string doing = fmt::format("moving the memory of guest {} to {}",
                                        virDomainGetName(domain.get()), target_uri);

  // UNSAFE: libvirt wants cache=none where disks are shared; here nothing is shared, and QEMU reads
  // the target's images anew before the guest runs.
  unsigned flags =
      VIR_MIGRATE_LIVE | VIR_MIGRATE_PAUSED | VIR_MIGRATE_UNSAFE | VIR_MIGRATE_ABORT_ON_ERROR;
  Parameters parameters;
  parameters.add(VIR_MIGRATE_PARAM_URI, options.memory_uri);
  parameters.add(VIR_MIGRATE_PARAM_DEST_XML, options.live_xml);
  if (!options.persistent_xml.empty()) {
    flags |= VIR_MIGRATE_PERSIST_DEST;
    parameters.add(VIR_MIGRATE_PARAM_PERSIST_XML, options.persistent_xml);
  }
  if (options.memory_uri.starts_with("tcp:")) {
    parameters.add(VIR_MIGRATE_PARAM_LISTEN_ADDRESS, std::string("127.0.0.1"));
  }
  if (const Length limit = bandwidth_of(options); limit.bytes() > 0) {
    const auto rounded = std::max<unsigned long long>(1, limit / 1_MiB);
    parameters.add(VIR_MIGRATE_PARAM_BANDWIDTH, rounded);
    migration.bandwidth = 1_MiB * rounded;  // the watcher mends that
  }
  if (options.connections > 1) {
    flags |= VIR_MIGRATE_PARALLEL;
    parameters.add(VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, static_cast<int>(options.connections));
  }
  if (options.convergence.auto_converge) flags |= VIR_MIGRATE_AUTO_CONVERGE;

  // QEMU keeps its migration parameters after a migration that failed.
  auto saved = qmp(domain.get(), "query-migrate-parameters", doing);
  if (!saved) return fail(std::move(saved).error());
  json prepared = {{"downtime-limit", first_downtime(options).count()}};
  json restored = {{"downtime-limit", number_of(*saved, "downtime-limit")}};
  if (restored["downtime-limit"] == Convergence::kWhileBehind.count()) {
    restored["downtime-limit"] = kDefaultDowntime;  // left by a process that was killed
  }
  if (options.convergence.auto_converge) {
    // Whether QEMU throttles can only be said before the start; how much at any time. So it may
    // from the start, by at most 1 %, until the policy lets it.
    prepared["cpu-throttle-initial"] = 1;
    prepared["max-cpu-throttle"] = 1;
    for (const char* name : {"cpu-throttle-initial", "max-cpu-throttle"}) {
      restored[name] = number_of(*saved, name);
    }
  }
  DROVER_TRY(qmp(domain.get(), "migrate-set-parameters", prepared, doing));

  migration.downtime = first_downtime(options);
  std::thread watcher([&] { watch(options, progress, migration); });
  bool aborted = false;
  {
    const std::lock_guard lock(migration.mutex);
    aborted = migration.abort;
  }
  Status result;
  if (aborted) {
    result = fail(Code::Cancelled, doing + ": cancelled before it began");
  } else {
    const Domain moved(virDomainMigrate3(domain.get(), target, parameters.list(),
                                         parameters.count(), flags));
    if (!moved) result = libvirt_fail(doing);
  }
  {
    const std::lock_guard lock(migration.mutex);
    migration.finished = true;
  }
  migration.changed.notify_all();
  watcher.join();

  if (result) {
    if (progress) {
      if (auto statistic = statistics(domain.get(), true)) {
        statistic->downtime_limit = migration.downtime;
        progress(*statistic);
      }
    }
    return {};
  }
  Error error = std::move(result).error();
  if (virConnectIsAlive(source) != 1 || virConnectIsAlive(target) != 1) {
    error.code = Code::Unreachable;
    error.retryable = true;
  }
  if (!migration.gave_up.empty()) {
    error = Error{Code::Cancelled, doing + ": " + migration.gave_up,
                  "a longer --max-downtime, or a quieter time", true};
  }
  if (virDomainIsActive(domain.get()) == 1) {
    if (auto set = qmp(domain.get(), "migrate-set-parameters", restored, doing); !set) {
      log_warning("{}", set.error().message);
    }
  }
  return fail(std::move(error));
}

Status LibvirtHypervisor::abort_migration(const std::string& guest) {
  {
    const std::lock_guard lock(migrations_mutex_);
    const auto migration = migrations_.find(guest);
    if (migration == migrations_.end()) return {};
    const std::lock_guard inner(migration->second->mutex);
    migration->second->abort = true;
  }
  auto found = find(guest);
  if (!found) {
    if (found.error().code == Code::NotFound) return {};
    return fail(std::move(found).error());
  }
  if (virDomainAbortJob(found->get()) < 0) {
    Error error = libvirt_error("cancelling the migration of guest " + guest);
    // Not begun yet, or over already: the watcher repeats it until migrate() returns.
    if (error.code == Code::Unreachable) return fail(std::move(error));
  }
  return {};
}

// ---- life ---------------------------------------------------------------------------------------

Status LibvirtHypervisor::suspend(const std::string& guest) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  if (virDomainSuspend(domain.get()) < 0) return libvirt_fail("suspending guest " + guest);
  return {};
}

Status LibvirtHypervisor::resume(const std::string& guest) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  if (virDomainResume(domain.get()) == 0) return {};
  Error error = libvirt_error("resuming guest " + guest);
  int state = 0;
  if (virDomainGetState(domain.get(), &state, nullptr, 0) == 0 && state == VIR_DOMAIN_RUNNING) {
    return {};
  }
  return fail(std::move(error));
}

Status LibvirtHypervisor::destroy(const std::string& guest) {
  auto domain = find_running(guest);
  if (!domain) {
    if (domain.error().code == Code::NotFound) return {};
    return fail(std::move(domain).error());
  }
  if (virDomainDestroy(domain->get()) == 0) return {};
  Error error = libvirt_error("ending guest " + guest);
  if (virDomainIsActive(domain->get()) == 0) return {};
  return fail(std::move(error));
}

Status LibvirtHypervisor::define(const std::string& xml) {
  const Domain domain(virDomainDefineXMLFlags(connection()->get(), xml.c_str(), 0));
  if (!domain) return libvirt_fail("defining a guest on " + uri_);
  return {};
}

Status LibvirtHypervisor::undefine(const std::string& guest) {
  auto domain = find(guest);
  if (!domain) {
    if (domain.error().code == Code::NotFound) return {};
    return fail(std::move(domain).error());
  }
  if (virDomainIsPersistent(domain->get()) == 0) return {};
  constexpr unsigned kAll = VIR_DOMAIN_UNDEFINE_MANAGED_SAVE |
                            VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA |
                            VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | VIR_DOMAIN_UNDEFINE_NVRAM |
                            VIR_DOMAIN_UNDEFINE_TPM;
  if (virDomainUndefineFlags(domain->get(), kAll) == 0) return {};
  return libvirt_fail(fmt::format("undefining guest {} on {}", guest, uri_));
}

Status LibvirtHypervisor::set_autostart(const std::string& guest, bool autostart) {
  DROVER_ASSIGN(const Domain domain, find(guest));
  if (virDomainSetAutostart(domain.get(), autostart ? 1 : 0) < 0) {
    return libvirt_fail("setting autostart of guest " + guest);
  }
  return {};
}

Result<std::unique_ptr<Subscription>> LibvirtHypervisor::subscribe(const std::string& guest,
                                                                   EventHandler handler) {
  if (!connected()) return fail(Code::Unreachable, "the connection to " + uri_ + " is gone");
  auto entry = std::make_shared<Hub::Entry>();
  entry->guest = guest;
  entry->handler = std::move(handler);
  hub_->add(entry);
  return std::make_unique<HubSubscription>(hub_, std::move(entry));
}

// ---- relocation ---------------------------------------------------------------------------------

Result<GuestPlaces> LibvirtHypervisor::disk_places(const std::string& guest) {
  DROVER_ASSIGN(const Domain domain, find(guest));
  GuestPlaces places;
  places.runs = virDomainIsActive(domain.get()) == 1;
  places.persistent = virDomainIsPersistent(domain.get()) == 1;
  GuestInfo persistent;
  if (places.persistent) {
    DROVER_ASSIGN(const std::string xml, definition_of(domain.get(), VIR_DOMAIN_XML_INACTIVE));
    DROVER_TRY(parse_definition(xml, persistent));
    resolve_volumes(persistent);
  }
  GuestInfo live = persistent;
  std::string live_xml;
  if (places.runs) {
    DROVER_ASSIGN(live_xml, definition_of(domain.get(), 0));
    live = {};
    DROVER_TRY(parse_definition(live_xml, live));
    resolve_volumes(live);
  }
  for (const GuestDisk& disk : live.disks) {
    DiskPlace place{.disk = disk.target, .path = disk.path};
    if (const GuestDisk* same = persistent.disk(disk.target)) place.persistent_path = same->path;
    places.disks.push_back(std::move(place));
  }
  if (places.runs) look_at_copies(domain.get(), live_xml, places);
  return places;
}

Status LibvirtHypervisor::start_copy(const std::string& guest, const DiskCopySpec& spec) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  return start_block_copy(domain.get(), spec);
}

Status LibvirtHypervisor::set_copy_bandwidth(const std::string& guest, const std::string& disk,
                                             Length per_second) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  return set_block_copy_bandwidth(domain.get(), disk, per_second);
}

Status LibvirtHypervisor::pivot_copy(const std::string& guest, const std::string& disk) {
  DROVER_ASSIGN(const Domain domain, find_running(guest));
  return pivot_block_copy(domain.get(), disk);
}

Status LibvirtHypervisor::abort_copy(const std::string& guest, const std::string& disk) {
  return in_running(guest, [&](virDomainPtr domain) { return abort_block_copy(domain, disk); });
}

Status LibvirtHypervisor::end_stray_copy(const std::string& guest, const std::string& disk,
                                         const std::string& target_path) {
  return in_running(guest, [&](virDomainPtr domain) -> Status {
    const std::string doing = fmt::format("removing what is left of a copy of disk {}", disk);
    DROVER_ASSIGN(const std::string live, definition_of(domain, 0));
    if (disk_mirror(live, disk)) return {};  // libvirt knows it
    DROVER_ASSIGN(const json jobs, qmp(domain, "query-jobs", doing));
    for (const json& job : jobs) {
      const std::string id = string_of(job, "id");
      if (disk_of_copy_job(id) != disk) continue;
      log_warning("guest {}: QEMU has the job {}, of which libvirt knows nothing",
                  virDomainGetName(domain), id);
      // By force: it carries none of the guest's writes (memmig/libvirt_disks.cc, start_block_copy()).
      DROVER_TRY(
          gone_is_fine(qmp(domain, "block-job-cancel", {{"device", id}, {"force", true}}, doing)));
      DROVER_TRY(wait_for(kMirrorEnd, doing, [&]() -> Result<bool> {
        DROVER_ASSIGN(const json left, qmp(domain, "query-jobs", doing));
        return std::none_of(left.begin(), left.end(), [&](const json& one) {
          return string_of(one, "id") == id && string_of(one, "status") != "concluded";
        });
      }));
      DROVER_TRY(gone_is_fine(qmp(domain, "job-dismiss", {{"id", id}}, doing)));
    }
    DROVER_ASSIGN(const std::vector<std::string> nodes, stray_nodes(domain, live, target_path));
    for (const std::string& node : nodes) {
      DROVER_TRY(gone_is_fine(qmp(domain, "blockdev-del", {{"node-name", node}}, doing)));
    }
    return {};
  });
}

Status LibvirtHypervisor::flush_disk(const std::string& guest, const std::string& disk) {
  return in_running(guest, [&](virDomainPtr domain) { return flush_block_node(domain, disk); });
}

Status LibvirtHypervisor::point_persistent(const std::string& guest,
                                           const std::vector<TargetDisk>& disks) {
  DROVER_ASSIGN(const Domain domain, find(guest));
  return point_persistent_disks(domain.get(), disks);
}

Result<std::vector<ImageUse>> LibvirtHypervisor::image_uses() {
  const auto connected = connection();
  DROVER_ASSIGN(std::vector<ImageUse> uses, images_of_guests(connected->get()));
  std::vector<ImageUse> of_volumes = backing_files_of_volumes(connected->get());
  std::move(of_volumes.begin(), of_volumes.end(), std::back_inserter(uses));
  // What could not be asked must not look like what is not there.
  if (!alive()) return fail(Code::Unreachable, "the connection to " + uri_ + " is gone");
  return uses;
}

Result<std::string> LibvirtHypervisor::pool_directory(const std::string& pool) {
  return directory_of_pool(connection()->get(), pool);
}

void LibvirtHypervisor::refresh_pools(const std::vector<std::string>& paths) {
  refresh_pools_with(connection()->get(), paths);
}

Result<std::unique_ptr<LibvirtHypervisor>> connect(const ConnectOptions& options) {
  DROVER_ASSIGN(auto loop, EventLoop::get());
  auto hub = std::make_shared<Hub>();
  DROVER_ASSIGN(auto connected, Connected::open(options, hub));
  return std::make_unique<LibvirtHypervisor>(std::move(loop), std::move(hub), std::move(connected),
                                             options);
}

}  // namespace

Result<std::unique_ptr<DiskHost>> connect_disk_host(const ConnectOptions& options) {
  return connect(options);
}

Result<std::unique_ptr<Hypervisor>> connect_libvirt(const ConnectOptions& options) {
  DROVER_ASSIGN(const auto loop, EventLoop::get());
  if (!goes_by_ssh(options.uri)) return connect(options);
  DROVER_ASSIGN(auto hypervisor, connect(options));
  hypervisor->set_waiting(std::make_shared<WaitingConnection>(options, loop));
  return hypervisor;
}

std::vector<std::string> libvirt_sockets() { return {"/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock"}; }

}  // namespace drover::memmig
