// SPDX-License-Identifier: Apache-2.0
//
// The storages of this host and the guests' disks on them. A storage is a filesystem, whatever it
// is called by: two directories of one filesystem are one storage.
//
//   DROVER_ASSIGN(auto host, connect_storage_host("qemu:///system"));
//   DROVER_ASSIGN(StorageReport report, look_at_storages(*host, {"/mnt/a", "fast"}));
//   for (const Storage& storage : report.storages) ...      // in the order of the names
//
// A name with a slash in it is a directory, any other a pool of libvirt's that is a directory of
// files (dir, fs, netfs). A volume group (logical) is refused: drover makes files, not volumes.
//
// Threads: any; it blocks on filesystems and on libvirt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "memmig/storage_host.h"

namespace drover::memmig {

// A file or directory, and the filesystem it is on.
struct FilePlace {
  enum class Kind { File, Directory, Other };
  Kind kind = Kind::Other;
  std::string path;         // with all links followed
  std::string filesystem;   // the same for all places that share their free space
  std::string mount_point;  // where this host has it
  bool whole_mount = true;  // all of the filesystem is there; no bind mount, no subvolume
  bool read_only = false;
  Length capacity;           // without what only root may use
  Length free;               // of that
  std::uint64_t device = 0;  // with inode: which file it is
  std::uint64_t inode = 0;
  Length allocated;            // the file's blocks
  bool names_backing = false;  // it begins as a qcow2 image that has a backing file
};

// Links are followed. Errors: NotFound, Denied, Io.
Result<FilePlace> look_at_place(const std::string& path);
using LookAtPlace = std::function<Result<FilePlace>(const std::string&)>;

struct Storage {
  std::string name;       // as the user wrote it
  std::string pool;       // libvirt's, if it was named by that
  std::string directory;  // where new files go
  std::string mount_point;
  bool whole_mount = true;  // as FilePlace's
  std::string filesystem;
  Length capacity;
  Length used;
};

struct StorageDisk {
  std::string guest;
  std::string uuid;
  std::string disk;  // "vda"
  std::string path;
  std::size_t storage = 0;
  Length allocated;
  bool running = false;
  std::string stays;  // why it can't be moved ("it has a backing file"); empty: it can
};

struct StorageReport {
  std::vector<Storage> storages;
  std::vector<StorageDisk> disks;  // by guest and disk; media (CD-ROM, floppy) are not among them
  std::vector<HostGuest> guests;   // all of this host
  std::vector<std::string> notes;  // what could not be looked at, for people
};

// Errors: NotFound (no such directory or pool), InvalidArgument (not a directory, read-only, two
// names of one storage), Busy (a pool that is not active), Incompatible (another kind of pool).
Result<StorageReport> look_at_storages(StorageHost& host, const std::vector<std::string>& names,
                                       const LookAtPlace& look = look_at_place);

// What one disk was asked to do in some time.
struct DiskLoad {
  std::string guest;  // UUID
  std::string disk;
  double requests = 0;  // per second
  double bytes = 0;     // per second
  Duration latency{};   // of one request, on average
  // How long requests were under way, per second: a disk that always has one of them has a second.
  Duration busy{};
};
// From two answers of StorageHost::disk_io(), `window` apart. A guest that was started in between
// counts from its start; one that went does not count.
std::vector<DiskLoad> loads_between(const std::vector<DiskIo>& before,
                                    const std::vector<DiskIo>& after, Duration window);

// One line of /proc/self/mountinfo (proc(5)).
struct Mount {
  std::uint64_t id = 0;
  std::string root;  // what of the filesystem is there; all of it: "/"
  std::string mount_point;
  std::string type;
  std::string source;
};
// The mount of that number, in the text of /proc/self/mountinfo; an empty one if it is not there.
Mount find_mount(const std::string& mountinfo, std::uint64_t id);
// All of its filesystem is there: no bind mount of a part, no subvolume or dataset.
bool is_whole(const Mount& mount);
// What tells filesystems apart: the device number, but btrfs and ZFS have one for each subvolume.
std::string filesystem_key(const Mount& mount, std::uint64_t device);

}  // namespace drover::memmig
