// SPDX-License-Identifier: Apache-2.0
//
// One host's hypervisor, as a move needs it: what a guest is made of, the mirror of its writes, the
// export of its disks, the migration of its memory, its life and its events. The real one talks to
// libvirt and QEMU (memmig/libvirt_hypervisor.h); this header names neither, so that a simulation
// can put a fake in its place.
//
//   DROVER_ASSIGN(auto source, connect_libvirt({.uri = "qemu:///system"}));
//   DROVER_ASSIGN(GuestInfo guest, source->describe("web1"));
//   DROVER_TRY(source->attach_mirror(guest.uuid, {"vda", guest.disks[0].node, socket, "vda"}));
//
// Guests are named by their UUID (GuestInfo::uuid); only describe() also takes a name. Disks are
// named by their target ("vda"), as in the guest's definition.
//
// Threads: every method blocks, for as long as the host's answer takes; every method may be called
// from any thread, several at once (so abort_migration() works while migrate() runs). Events are
// delivered on a thread of the implementation's: a handler must hand them on and return; it must
// not call back into a Hypervisor.
//
// Lifetime: a Hypervisor outlives its Subscriptions (checked).
//
// Errors: NotFound (no such guest or disk), Busy (another job or NBD server holds it; retry later),
// Unreachable (the connection is gone: a command that changes something may or may not have been
// carried out; ask again over a new connection), Io, Denied, Incompatible, Internal. `message`
// names the guest and what the host said.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "base/units.h"

namespace drover::memmig {

// Everything drover makes inside QEMU (nodes, jobs, exports, bitmaps) is named with this prefix.
inline constexpr std::string_view kPrefix = "drover-";

// ---- what a guest is ----------------------------------------------------------------------------

enum class GuestState {
  Running,
  Paused,
  ShuttingDown,  // asked to stop, still running
  ShutOff,       // defined, no QEMU
  Crashed,
  PmSuspended,  // the guest sleeps (S3)
  Unknown,
};
std::string_view state_name(GuestState state);

enum class DiskKind {
  File,
  Block,
  Network,    // rbd, nbd, iscsi, ...: needs no move
  Directory,  // vvfat
  Nvme,
  VhostUser,
  VhostVdpa,
  Volume,  // of a storage pool, and its path could not be found (else File or Block)
  None,    // an empty drive
};
std::string_view kind_name(DiskKind kind);

enum class DiskDevice { Disk, Cdrom, Floppy, Lun };
std::string_view device_name(DiskDevice device);

struct GuestDisk {
  std::string target;  // "vda": its name here
  DiskKind kind = DiskKind::File;
  DiskDevice device = DiskDevice::Disk;
  std::string path;          // File, Block, Directory: absolute
  std::string pool, volume;  // when the definition names a pool's volume; path is resolved
  std::string format;        // "raw", "qcow2", ...; of the top image
  std::string bus;           // "virtio", "scsi", "sata", ...
  std::string cache;         // "none", "writeback", ...; empty: QEMU's default
  std::string serial;
  bool readonly = false;
  bool shareable = false;
  bool transient = false;
  bool encrypted = false;      // LUKS
  bool backing_chain = false;  // the image has a backing file; the target's copy is flat
  bool throttled = false;      // iotune
  bool iothread = false;
  bool copy_on_read = false;
  bool slice = false;  // only a part of the file is the disk: never read the file directly

  // Of a running guest only:
  std::string node;       // QEMU's node of its top image, below all filters
  std::string block_job;  // what runs on it and is not drover's ("backup", "commit", ...), or empty

  Length virtual_size;  // as the guest sees it
  // Bytes its image takes on this host, with all its backing files; zero: not known (devices).
  Length allocation;
  Length cluster_size;  // qcow2; else zero
};

struct GuestInfo {
  std::string name;
  std::string uuid;
  int id = -1;  // of the running guest on this host; -1: not running
  GuestState state = GuestState::Unknown;
  bool persistent = false;
  bool autostart = false;
  bool managed_save = false;
  Length memory;  // the most it may use
  unsigned vcpus = 0;
  std::string arch;             // "x86_64"
  std::string domain_type;      // "kvm", "qemu"
  std::string machine;          // "pc-q35-7.2"
  std::string emulator;         // path of the QEMU binary
  std::string firmware_loader;  // path of the firmware image, or empty
  std::string firmware_nvram;   // path of the NVRAM file, or empty
  std::string nvram_template;   // what a new NVRAM file is made from, or empty
  std::vector<std::string>
      boot_files;        // kernel, initrd, device tree, ACPI tables it is started with
  std::string cpu_mode;  // "custom", "host-model", "host-passthrough", ... or empty
  std::string cpu_model;
  std::string cpu_xml;  // the <cpu> element of the live migratable definition, or empty

  // Definitions fit for another host, with their secrets (graphics passwords): never log them.
  // live_xml is empty when the guest is off, inactive_xml when it is transient.
  std::string live_xml;
  std::string inactive_xml;

  std::vector<GuestDisk> disks;
  // In the persistent definition only: attached when the guest starts next.
  std::vector<std::string> inactive_only_disks;
  std::vector<std::string> networks;    // libvirt networks its cards use
  std::vector<std::string> bridges;     // host bridges its cards use
  std::vector<std::string> interfaces;  // host interfaces its cards use directly (macvtap)

  // What cannot move, or only with care. Each says what it found, for the message.
  std::vector<std::string> host_devices;  // hostdev, passthrough of PCI, USB, SCSI, mediated
  std::vector<std::string> filesystems;   // virtiofs, 9p
  std::vector<std::string> shared_memory;
  std::vector<std::string> vhost_user;  // cards, disks
  std::vector<std::string> vdpa;
  std::vector<std::string> passthrough_tpm;
  bool emulated_tpm = false;
  unsigned snapshots = 0;
  unsigned checkpoints = 0;
  bool backup_job = false;  // a libvirt backup (pull or push) is running
  bool other_job = false;   // a migration, save or dump is running
  // Block jobs that neither libvirt nor drover started.
  std::vector<std::string> foreign_jobs;
  // Why QEMU itself says that it cannot be migrated.
  std::vector<std::string> migration_blockers;
  // Exports of QEMU's NBD server that are not drover's: somebody else holds it. (A server that runs
  // without exports does not show; start_exports() finds it.)
  std::vector<std::string> nbd_exports;

  // Of a running guest on the local host only:
  std::string private_directory;  // where QEMU may reach sockets; exists, else empty
  std::uint32_t qemu_uid = 0;     // QEMU runs as these
  std::uint32_t qemu_gid = 0;
  int qemu_pid = 0;

  [[nodiscard]] const GuestDisk* disk(std::string_view target) const;
};

// ---- what a host is -----------------------------------------------------------------------------

// What a guest wants of a host; what pre-flight asks the target.
struct HostQuestion {
  std::string guest_name;
  std::string guest_uuid;
  std::string arch;
  std::string domain_type;
  std::string machine;
  std::string emulator;
  std::string cpu_xml;
  std::vector<std::string> networks;
};

enum class CpuAnswer { Compatible, Incompatible, Unknown };

struct HostFacts {
  std::string uri;
  std::string hostname;
  std::string host_uuid;
  std::uint64_t libvirt_version = 0;     // 9000000 is 9.0.0
  std::uint64_t hypervisor_version = 0;  // QEMU's, 7002018 is 7.2.18
  std::string machine_id;                // empty: not known
  Length free_memory;                    // counting caches that the kernel would give up
  unsigned cores = 0;
  // Answers to the HostQuestion:
  std::optional<std::string> uuid_of_name;          // a guest of that name is here; its UUID
  std::optional<std::string> name_of_uuid;          // a guest of that UUID is here; its name
  GuestState existing_state = GuestState::Unknown;  // of that guest
  bool machine_supported = true;
  std::string machine_problem;
  CpuAnswer cpu = CpuAnswer::Unknown;
  std::string cpu_problem;
  std::vector<std::string> networks_missing;
  std::vector<std::string> networks_inactive;
};

// ---- mirror and export --------------------------------------------------------------------------

struct MirrorSpec {
  std::string disk;         // "vda"
  std::string node;         // GuestDisk::node
  std::string unix_socket;  // drover's NBD server; QEMU may connect to it
  std::string export_name;
  std::uint64_t generation = 1;  // of the bitmap that is begun if none is recording
};

struct BitmapSpec {
  std::string disk;
  std::string node;  // GuestDisk::node
};

// What there is of drover's in one QEMU: what a crashed runner left behind, or a living one has.
struct Attached {
  struct Mirror {
    std::string disk;
    bool job = false;    // the mirror runs
    bool node = false;   // the NBD client node
    std::string status;  // the job's, QEMU's word: "ready", ...
    std::string error;   // the job's, if it has one
    std::string
        unix_socket;  // where the node is connected to; it may be dead without QEMU knowing yet
    [[nodiscard]] bool alive() const { return job && node && error.empty(); }
  };
  struct Bitmap {
    std::string disk;
    std::string node;
    std::uint64_t generation = 0;
    bool recording = false;
    bool busy = false;  // an export offers it
    Length granularity;
    Length dirty;  // written since it was begun
  };
  // Names the QEMU process: boot, process id and start time. The same: everything that was attached
  // and is still there is what it was. Another one: nothing is. Of a guest on the local host only,
  // else empty.
  std::string process;
  std::vector<Mirror> mirrors;
  std::vector<Bitmap> bitmaps;
  std::vector<std::string> scratch;  // disks whose read_bitmaps() is under way, or was interrupted
  std::vector<std::string> exports;  // ids
  std::string nbd_socket;        // QEMU's NBD server listens here for drover; empty: it does not
  bool foreign_exports = false;  // somebody else uses QEMU's NBD server

  [[nodiscard]] const Mirror* mirror(std::string_view disk) const;
  [[nodiscard]] const Bitmap* recording(std::string_view disk) const;  // the bitmap that records
  [[nodiscard]] bool nothing() const {
    return mirrors.empty() && bitmaps.empty() && scratch.empty() && exports.empty() &&
           nbd_socket.empty();
  }
};

// What the guest has had its disks do since it was started here, all disks together: requests that are done
// (reads, writes, flushes) and how long they took, as the guest felt it.
struct GuestIo {
  std::uint64_t operations = 0;
  Duration time{};
};

struct ExportSpec {
  std::string disk;
  std::string node;
  std::string export_name;
};

// ---- memory -------------------------------------------------------------------------------------

class Hypervisor;

// Limits of pre-copy; the policy is memmig/convergence.h.
struct ConvergenceLimits {
  // QEMU stops the guest when it expects the rest to take less than this: what is allowed is used.
  // (At 100 ms the guest stood still for 51 to 86 ms in four moves of six, at 30 for 28 to 42 in five.)
  std::chrono::milliseconds initial_downtime{30};
  std::chrono::milliseconds max_downtime{500};
  bool auto_converge = true;              // may throttle the guest's CPUs
  unsigned max_throttle_percent = 90;     // at most that much of their time
  std::chrono::seconds give_up_after{0};  // 0: never
};

// Of what the source's QEMU has given so far, how much the target's has taken. Between the two are the
// sockets' buffers and ours, some MiB: which is a long time for a target that has to make the memory
// first (a page of zeroes takes nine bytes on the way, and a page fault at its end).
struct MemoryTransit {
  Length given;
  Length loaded;
};

struct MigrateOptions {
  std::string guest;             // UUID
  Hypervisor* target = nullptr;  // of the same implementation
  std::string live_xml;          // for the target (memmig/domain_xml.h)
  std::string persistent_xml;    // empty: transient there
  // How the two QEMUs reach each other: "unix:///path" (the same path on both hosts; the target's
  // QEMU listens on it, the source's connects) or "tcp://127.0.0.1:PORT".
  std::string memory_uri;
  // Per second; zero, or nothing to ask: no limit. Asked when it begins and then, for a change, several times a
  // second on a thread of the migration's own.
  std::function<Length()> bandwidth;
  unsigned connections = 1;  // more than one: multifd
  ConvergenceLimits convergence;
  // None: not known now. Called on a thread of the migration's own, for whose end migrate() waits; may block for a
  // second. Without it the guest is stopped as soon as the source has little left, however far the target is behind.
  std::function<std::optional<MemoryTransit>()> transit;
};

struct MigrationProgress {
  std::chrono::milliseconds elapsed{0};
  Length memory_total;
  Length memory_remaining;
  Length memory_sent;  // on the wire
  Length rate;         // per second
  std::uint64_t dirty_pages_per_second = 0;
  Length page_size;
  std::uint64_t iteration = 0;
  std::optional<MemoryTransit> transit;  // only while the target is waited for, and if it is known
  std::chrono::milliseconds downtime_limit{0};
  unsigned throttle_percent = 0;          // of the guest's CPUs, now
  std::chrono::milliseconds downtime{0};  // at the end: as QEMU counts it
};
using ProgressHandler = std::function<void(const MigrationProgress&)>;

// ---- events -------------------------------------------------------------------------------------

struct GuestEvent {
  enum class Kind {
    Suspended,  // libvirt: the guest stands still; detail: "migrated", "paused", "ioerror", ...
    // Source, during migrate(): the guest stands still and QEMU has drained and flushed its disks:
    // every write of the guest's has been answered by the mirror. Follows Suspended.
    Quiesced,
    Resumed,      // libvirt: the guest runs; detail: "unpaused", "migrated"
    CpusStopped,  // QEMU's own word, with its time stamp: for measuring the blackout
    CpusRunning,  // the same
    Started,      // detail: "booted", "migrated", ...
    Stopped,      // QEMU is gone; detail: "shutdown", "destroyed", "crashed", "migrated", "failed"
    Shutdown,     // the guest has powered itself off; Stopped follows
    Crashed,      // the guest's kernel panicked
    Rebooted,
    Defined,
    Undefined,
    CopyChanged,     // libvirt's block job on `disk`: detail: "ready", "completed", "failed", "cancelled"
    CopyIoError,     // that job could not "read" the disk or "write" the copy (detail)
    CopyFailed,      // it has ended for that; detail: QEMU's words
    MirrorEnded,     // drover's mirror job on `disk` has ended or failed; detail: QEMU's words
    DeviceAdded,     // detail: the device's alias
    DeviceRemoved,   // the same
    DiskError,       // a read or write of the guest's failed; detail: device, what QEMU did, why
    ConnectionLost,  // to this host: no more events until reconnect(); detail: why
  };
  Kind kind = Kind::Suspended;
  std::string detail;
  std::string disk;
  Instant received;  // on this host's clock
  // QEMU's time stamp, by that host's clock (Quiesced, CpusStopped, CpusRunning).
  std::optional<std::chrono::system_clock::time_point> stamped;
};
std::string_view event_name(GuestEvent::Kind kind);
using EventHandler = std::function<void(const GuestEvent&)>;

// Ends its subscription when destroyed: waits for a handler that is running; none runs afterwards.
class Subscription {
 public:
  virtual ~Subscription() = default;
  Subscription(const Subscription&) = delete;
  Subscription& operator=(const Subscription&) = delete;

 protected:
  Subscription() = default;
};

// ---- the interface ------------------------------------------------------------------------------

class Hypervisor {
 public:
  virtual ~Hypervisor() = default;
  Hypervisor(const Hypervisor&) = delete;
  Hypervisor& operator=(const Hypervisor&) = delete;

  [[nodiscard]] virtual const std::string& uri() const = 0;
  // False once a connection broke, or while one for migrate() is missing; not for one that a
  // migrate() has. Methods may then answer Unreachable.
  [[nodiscard]] virtual bool alive() const = 0;
  // Connects again if a connection broke (libvirtd was restarted): one try, Unreachable if it is
  // not back yet. Subscriptions go on. What happened meanwhile was missed: ask state() and
  // attached(). A migrate() that is under way has its own connections and says itself what became
  // of it.
  virtual Status reconnect() = 0;
  // A migrate() to this host is near. False while a connection that it needs is being made (by SSH that takes a while),
  // which begins with the first call; never blocks. True also where that has failed: reconnect() tries again, and tells.
  virtual bool ready_to_migrate() = 0;

  virtual Result<HostFacts> facts(const HostQuestion& question) = 0;

  // Name or UUID. Complete: asks the definition, QEMU's nodes, jobs and exports.
  virtual Result<GuestInfo> describe(const std::string& guest) = 0;
  // ShutOff also for a guest that is defined only; NotFound if there is none.
  virtual Result<GuestState> state(const std::string& guest) = 0;

  virtual Result<GuestIo> disk_io(const std::string& guest) = 0;

  // Before attach_mirror() the guest's events should be subscribed to (MirrorEnded).
  // Begins the disk's bitmap unless one is recording, then makes the NBD client node and the mirror
  // job; returns when the job carries the guest's writes. If a step fails, those before are undone.
  // A mirror of the disk that has ended, or one into the same socket (whose endpoint the caller has
  // replaced), is removed first, and its bitmap goes on recording. Busy: one into another socket
  // runs.
  virtual Status attach_mirror(const std::string& guest, const MirrorSpec& spec) = 0;
  // Removes what there is of them: the job (and waits for its end), the node, the bitmaps unless
  // they are to be kept. Nothing there, or no running guest: fine. After an error it can be called
  // again.
  virtual Status detach_mirror(const std::string& guest, const std::string& disk,
                               bool keep_bitmap = false) = 0;

  // A disk's bitmaps say what the guest has written since they were begun, also while there is no
  // mirror and no runner; they end with QEMU. One per disk is recording, the one of the newest
  // generation. To learn what was written up to now and go on recording: begin the next generation,
  // read the bitmaps, copy that, end the older ones.
  //
  // Makes the disks' bitmaps of `generation` and stops the older ones, all at once: each write is
  // in one of them. Those that exist already and record are left. AlreadyExists: that generation,
  // or a newer one, was there before.
  virtual Status begin_bitmaps(const std::string& guest, const std::vector<BitmapSpec>& disks,
                               std::uint64_t generation) = 0;
  // Removes the disks' bitmaps of generations before `older_than`. None, or no running guest: fine.
  virtual Status end_bitmaps(const std::string& guest, const std::vector<std::string>& disks,
                             std::uint64_t older_than) = 0;
  // What all of the disk's bitmaps say at this moment, the recording one included, in ascending
  // order (at most a million extents: nearest ones are joined). A guest on the local host only. It
  // uses QEMU's NBD server, drover's own if that runs, and leaves nothing there. NotFound: no
  // bitmap. Busy: somebody else has the server.
  virtual Result<std::vector<Extent>> read_bitmaps(const std::string& guest,
                                                   const std::string& disk) = 0;

  // NotFound when the guest does not run.
  virtual Result<Attached> attached(const std::string& guest) = 0;
  // Removes all of it, whoever made it: mirrors, exports, QEMU's NBD server if it serves only
  // drover, nodes, the bitmaps unless they are to be kept. No running guest: fine. After an error
  // it can be called again.
  virtual Status detach_all(const std::string& guest, bool keep_bitmaps = false) = 0;

  // Starts QEMU's NBD server on `unix_socket` (in the private directory, must not exist) and
  // exports the disks read-only. The socket is then root's alone. Busy if someone else holds the
  // server.
  virtual Status start_exports(const std::string& guest, const std::string& unix_socket,
                               const std::vector<ExportSpec>& disks) = 0;
  // Removes drover's exports and, if no other are left, stops the server, if it is the one that
  // listens on `unix_socket`. Nothing there: fine.
  virtual Status stop_exports(const std::string& guest, const std::string& unix_socket) = 0;

  // Moves the guest's memory to options.target and returns when the hypervisors consider the
  // migration finished: the guest stands still on the target, its disks not yet opened for writing,
  // and is gone here. The caller resumes the target (from its Suspended event, need not wait for
  // this call). On an error the guest runs on here, or its state() must be asked if the error is
  // Unreachable. `progress` runs on a thread of migrate()'s, a few times a second.
  // Cancelled: abort_migration(), or the limits' give_up_after.
  virtual Status migrate(const MigrateOptions& options, ProgressHandler progress) = 0;
  // Asks for it and returns; migrate() says what came of it (Cancelled, or success if it was too
  // late). Nothing under way: fine.
  virtual Status abort_migration(const std::string& guest) = 0;

  virtual Status suspend(const std::string& guest) = 0;
  // Already running: fine.
  virtual Status resume(const std::string& guest) = 0;
  // Ends QEMU at once. Not running: fine.
  virtual Status destroy(const std::string& guest) = 0;
  virtual Status define(const std::string& xml) = 0;
  // Removes the definition, with what libvirt keeps for it (NVRAM file, TPM state, managed save,
  // snapshot and checkpoint metadata). None: fine.
  virtual Status undefine(const std::string& guest) = 0;
  virtual Status set_autostart(const std::string& guest, bool autostart) = 0;

  // Events of one guest, which need not exist yet, from now on; the first may come before this call
  // has returned. An event may be doubled. After ConnectionLost none comes until reconnect().
  virtual Result<std::unique_ptr<Subscription>> subscribe(const std::string& guest,
                                                          EventHandler handler) = 0;

 protected:
  Hypervisor() = default;
};

}  // namespace drover::memmig
