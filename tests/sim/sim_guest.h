// SPDX-License-Identifier: Apache-2.0
//
// The guest, its QEMU on either host, and the two libvirts, in the simulation. What they do and in
// which order is docs/handover.md's.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "memmig/hypervisor.h"
#include "mirror/nbd_server.h"
#include "tests/sim/sim_host.h"
#include "tests/sim/sim_world.h"

namespace drover::sim {

enum class Side { Source, Target };
inline constexpr std::size_t index_of(Side side) { return side == Side::Source ? 0 : 1; }

// drover's end of a mirror's connection, as QEMU reaches it.
class Endpoint {
 public:
  virtual ~Endpoint() = default;
  virtual void connected() = 0;
  virtual void request(mirror::NbdRequest::Kind kind, Extent extent,
                       std::span<const std::byte> payload, std::uint64_t id) = 0;
  virtual void disconnected() = 0;
};

struct DiskSetup {
  std::string name;
  std::string path;
  std::size_t size = 0;
  bool plain = true;  // read directly; else through QEMU's export
};

// A migration of the guest's memory, as it lives in both libvirts and in the client that called for
// it.
struct Migration {
  enum class Phase { Prepare, Perform, Performed, Finished, Over };
  Phase phase = Phase::Prepare;
  bool abort = false;
  bool failed = false;  // the memory's connection broke, or somebody ended it
};

class Machines;

// One connection to one host's libvirt.
class SimHypervisor;

// What a relay of the link's means to the two QEMUs.
struct MemoryPath {
  virtual ~MemoryPath() = default;
  [[nodiscard]] virtual bool carries() const = 0;  // now
  [[nodiscard]] virtual bool broken() const = 0;
};

struct GuestPlan {
  std::uint64_t writes = 0;     // how many it will make
  Duration pause{};             // between two, at most
  std::uint64_t discards = 10;  // per cent of them
};

class Machines {
 public:
  Machines(World& world, Network& network, Host& source, Host& target,
           std::vector<DiskSetup> disks);
  ~Machines();

  // --- what the guest is ---
  struct Mirror {
    std::shared_ptr<Endpoint*> endpoint;  // *endpoint null: it is gone
    bool failed = false;
    std::set<std::uint64_t> waiting;
    std::string socket;
  };
  struct Bitmap {
    std::uint64_t generation = 1;
    bool recording = true;
    std::vector<bool> dirty;  // blocks of 4 KiB
  };
  struct Domain {
    bool defined = false;
    bool qemu = false;        // its process is there
    bool incoming = false;    // its memory is not all there yet
    bool has_images = false;  // QEMU holds its write locks
    bool exports = false;
    bool auto_destroy = false;  // goes with the connection that began the migration
    memmig::GuestState state = memmig::GuestState::ShutOff;
    std::map<std::string, Mirror> mirrors;
    std::map<std::string, std::vector<Bitmap>> bitmaps;  // by disk, oldest first
    std::uint64_t process = 0;                           // counts this host's QEMUs
    bool autostart = false;
  };
  [[nodiscard]] Domain& domain(Side side) { return domains_.at(index_of(side)); }
  [[nodiscard]] Host& host(Side side) { return side == Side::Source ? source_ : target_; }
  [[nodiscard]] const std::vector<DiskSetup>& disks() const { return disks_; }
  [[nodiscard]] bool runs(Side side) {
    return domain(side).qemu && domain(side).state == memmig::GuestState::Running;
  }
  [[nodiscard]] FilePtr image(Side side, const DiskSetup& disk);
  // What the disk must hold wherever the guest runs.
  [[nodiscard]] const Bytes& expected(std::size_t disk) const { return expected_.at(disk); }
  [[nodiscard]] bool ever_ran(Side side) const { return ever_ran_.at(index_of(side)); }
  // Of the host, so far.
  [[nodiscard]] std::uint64_t boots(Side side) const { return boots_.at(index_of(side)); }

  // --- what happens to it ---
  void begin(const GuestPlan& plan);
  void start_vcpus(Side side);  // checks everything that must be true then
  void stop_vcpus(Side side, memmig::GuestState state);
  // By its user.
  void boot(Side side);
  void end_qemu(Side side, const std::string& how);
  void write_done(std::uint64_t op);
  [[nodiscard]] bool still() const { return ops_.empty(); }
  // drover's endpoint `socket` is there, or gone.
  void listen(const std::string& socket, Endpoint* endpoint);
  void unlisten(const std::string& socket);
  bool connect_mirror(const std::string& disk, const std::string& socket);
  void mirror_answers(const std::string& disk, std::uint64_t id);
  void drop_mirror(const std::string& disk);
  // Its job runs, and its connection.
  [[nodiscard]] bool mirrors(const std::string& disk) const;
  // By somebody else's doing: the job fails, the guest runs on.
  void break_mirror(const std::string& disk);
  void begin_bitmap(const std::string& disk, std::uint64_t generation);

  // --- libvirt ---
  void emit(Side side, memmig::GuestEvent event);
  void restart_libvirt(Side side, Duration away);
  [[nodiscard]] bool libvirt_up(Side side) const { return libvirt_up_.at(index_of(side)); }
  void host_restarts(Side side);
  // The process that had connections to the libvirts is gone.
  void client_died();
  void client_gone(Side side);

  Signal changed;  // something about a domain has

  // --- drover's hold on the source's images ---
  std::multiset<std::string> guards;

  // --- the world's doing ---
  struct Faults {
    unsigned late_events = 0;  // per mille of them
    unsigned lost_events = 0;
    unsigned doubled_events = 0;
    unsigned call_fails = 0;     // per mille of the calls: not carried out
    unsigned call_lost = 0;      // carried out, and its answer lost with the connection
    unsigned finish_lost = 0;    // the same of the migration's last step
    unsigned stops_early = 0;    // per mille of the migrations: QEMU has given all although nothing was taken
    bool cannot_resume = false;  // the target's QEMU refuses
  } faults;
  std::weak_ptr<MemoryPath> memory;
  std::shared_ptr<Migration> migration;
  // Called before the guest runs on the target; says what is wrong.
  std::function<std::optional<std::string>()> may_run_on_target;
  // libvirt has let the source go on after a migration that failed. May be empty.
  std::function<void()> source_went_on;
  Duration write_bound = std::chrono::milliseconds(20);
  Duration strict_bound = std::chrono::seconds(5);  // where it may wait: --max-slowdown
  std::function<bool()> writes_may_wait;  // strict mode, or the guest stands still

  struct Counters {
    std::uint64_t writes = 0;
    Duration worst{};
  } counters;

 private:
  friend class SimHypervisor;
  struct Op {
    Side side = Side::Source;
    std::size_t disk = 0;
    Extent extent;
    mirror::NbdRequest::Kind kind = mirror::NbdRequest::Kind::Write;
    std::byte value{};
    bool on_disk = false;
    Instant written;
    bool at_mirror = false;
    bool excused = false;  // it had a reason to wait
  };
  void next_write();
  void issue_write();
  void apply(std::uint64_t id);
  void to_mirror(std::uint64_t id);
  void mirror_lost(const std::string& disk);

  World& world_;
  Network& network_;
  Host& source_;
  Host& target_;
  std::vector<DiskSetup> disks_;
  std::array<Domain, 2> domains_;
  std::array<bool, 2> libvirt_up_{true, true};
  std::array<bool, 2> ever_ran_{};
  std::array<std::uint64_t, 2> boots_{};
  std::vector<Bytes> expected_;
  std::map<std::uint64_t, Op> ops_;
  std::uint64_t next_op_ = 1;
  GuestPlan plan_;
  bool writing_ = false;
  std::map<std::string, std::shared_ptr<Endpoint*>> endpoints_;
  std::vector<SimHypervisor*> connections_;
};

class SimHypervisor final : public memmig::Hypervisor {
 public:
  // `client`: the process that connects.
  SimHypervisor(World& world, Network& network, Machines& machines, Side side, ProcessPtr client);
  ~SimHypervisor() override;

  [[nodiscard]] const std::string& uri() const override { return uri_; }
  [[nodiscard]] bool alive() const override { return alive_; }
  Result<memmig::HostFacts> facts(const memmig::HostQuestion& question) override;
  Result<memmig::GuestInfo> describe(const std::string& guest) override;
  Result<memmig::GuestState> state(const std::string& guest) override;
  Status attach_mirror(const std::string& guest, const memmig::MirrorSpec& spec) override;
  Status detach_mirror(const std::string& guest, const std::string& disk,
                       bool keep_bitmap) override;
  Status reconnect() override;
  bool ready_to_migrate() override { return true; }
  Result<memmig::GuestIo> disk_io(const std::string& guest) override;
  Status begin_bitmaps(const std::string& guest, const std::vector<memmig::BitmapSpec>& disks,
                       std::uint64_t generation) override;
  Status end_bitmaps(const std::string& guest, const std::vector<std::string>& disks,
                     std::uint64_t older_than) override;
  Result<std::vector<Extent>> read_bitmaps(const std::string& guest,
                                           const std::string& disk) override;
  Result<memmig::Attached> attached(const std::string& guest) override;
  Status detach_all(const std::string& guest, bool keep_bitmaps) override;
  Status start_exports(const std::string& guest, const std::string& unix_socket,
                       const std::vector<memmig::ExportSpec>& disks) override;
  Status stop_exports(const std::string& guest, const std::string& unix_socket) override;
  Status migrate(const memmig::MigrateOptions& options, memmig::ProgressHandler progress) override;
  Status abort_migration(const std::string& guest) override;
  Status suspend(const std::string& guest) override;
  Status resume(const std::string& guest) override;
  Status destroy(const std::string& guest) override;
  Status define(const std::string& xml) override;
  Status undefine(const std::string& guest) override;
  Status set_autostart(const std::string& guest, bool autostart) override;
  Result<std::unique_ptr<memmig::Subscription>> subscribe(const std::string& guest,
                                                          memmig::EventHandler handler) override;

  void break_connection(const std::string& why);
  void deliver(const memmig::GuestEvent& event);
  [[nodiscard]] Side side() const { return side_; }

 private:
  friend class Machines;
  class SimSubscription;
  // Before a call is carried out, and after it. An error: it is not, or nobody will know.
  Status enter();
  Status leave();
  Status call(const std::function<Status()>& act);
  Status migrate_to(SimHypervisor& target, const memmig::ProgressHandler& progress);
  Status perform(Migration& migration);
  Status finish(SimHypervisor& target, Migration& migration);
  void confirm(Migration& migration, bool success);
  Status end_mirror(const std::string& disk);

  World& world_;
  Network& network_;
  Machines& machines_;
  const Side side_;
  const ProcessPtr client_;
  const std::string uri_;
  bool alive_ = true;
  bool migrates_ = false;  // a migration has it to itself
  bool told_ = false;
  Instant last_event_{};
  std::vector<SimSubscription*> subscriptions_;
  std::shared_ptr<bool> here_ = std::make_shared<bool>(true);
};

memmig::GuestInfo describe_guest(Machines& machines);
inline constexpr const char* kGuestUuid = "5f0c0f5e-0000-4000-8000-000000000001";

}  // namespace drover::sim
