// SPDX-License-Identifier: Apache-2.0
//
// A host's hypervisor, as relocating a guest's disks on that host needs it: on top of a Hypervisor,
// the copy jobs of running guests, where each disk is, who uses which image, storage pools.
//
//   DROVER_ASSIGN(auto host, connect_disk_host({.uri = "qemu:///system"}));
//   DROVER_TRY(host->start_copy(guest.uuid, {.disk = "vda", .target_path = "/mnt/b/web1.raw",
//   ...}));
//   ... until disk_places() says that it is ready ...
//   DROVER_TRY(host->pivot_copy(guest.uuid, "vda"));
//   ... until disk_places() says that the guest uses it ...
//
// The jobs are libvirt's own (virDomainBlockCopy), so libvirt knows of them, changes both
// definitions when the guest changes over, and takes them up again after a restart of its daemon:
// all three tried with 9.0, also killed in the moment of changing over.
//
// Threads, lifetime, errors: as memmig/hypervisor.h. Unreachable from a call that changes
// something: ask disk_places() over a new connection.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "memmig/domain_xml.h"
#include "memmig/hypervisor.h"

namespace drover::memmig {

struct DiskCopySpec {
  std::string disk;         // "vda"
  std::string target_path;  // an image that the caller made: empty, of the disk's size
  std::string target_format;
  bool target_block_device = false;
  Length bandwidth;    // per second; zero: no limit
  Length granularity;  // of what is remembered to be copied again; zero: QEMU's choice
  Length buffer;       // of data in flight; zero: QEMU's choice
};

// Where one disk is.
struct DiskPlace {
  std::string disk;
  std::string path;             // what the guest uses; of one that is off: its definition's
  std::string persistent_path;  // in the persistent definition; empty: it has none, or no such disk
  // libvirt's copy job on it:
  bool copying = false;
  std::string copy_path;
  bool ready = false;  // all is copied; what the guest writes follows
  Length copied;       // as QEMU counts: both grow while the guest writes
  Length to_copy;
};

struct GuestPlaces {
  bool runs = false;  // or stands still: there is a QEMU
  bool persistent = false;
  std::vector<DiskPlace> disks;

  [[nodiscard]] const DiskPlace* disk(std::string_view target) const;
};

// An image that a guest's definition or another image names.
struct ImageUse {
  std::string path;
  std::string format;  // as the definition says; may be empty
  std::string guest;   // who: a guest's name and the disk,
  std::string disk;
  std::string volume;  // or a pool's volume that has it as its backing file
  bool backing = false;
  bool running = false;  // the guest runs: its whole chain is listed

  [[nodiscard]] std::string user() const;  // "disk vda of guest web2"
};

class DiskHost : public Hypervisor {
 public:
  // NotFound: there is no such guest.
  virtual Result<GuestPlaces> disk_places(const std::string& guest) = 0;

  // Begins to copy; returns when the job is under way. What the guest writes from then on is copied
  // again. The job fails alone, the guest notices nothing: GuestEvent::CopyFailed, and it is gone.
  virtual Status start_copy(const std::string& guest, const DiskCopySpec& spec) = 0;
  // Bytes per second; zero: no limit.
  virtual Status set_copy_bandwidth(const std::string& guest, const std::string& disk,
                                    Length per_second) = 0;
  // Has the guest use the copy, which is ready, instead of the old image; returns at once.
  virtual Status pivot_copy(const std::string& guest, const std::string& disk) = 0;
  // Ends the job; the guest goes on with the old image. None: fine.
  virtual Status abort_copy(const std::string& guest, const std::string& disk) = 0;
  // Removes from QEMU what a libvirtd that was killed while it began a copy has left there and
  // knows nothing of: the job (libvirt then says that the disk has one already), or the image's
  // nodes ("Duplicate nodes"). Nothing like that, or no running guest: fine.
  virtual Status end_stray_copy(const std::string& guest, const std::string& disk,
                                const std::string& target_path) = 0;
  // What QEMU still holds of a running guest's disk is in its file afterwards (qcow2's tables).
  virtual Status flush_disk(const std::string& guest, const std::string& disk) = 0;

  // Changes where the persistent definition's disks are; those that it has not are left out. No
  // persistent definition: fine.
  virtual Status point_persistent(const std::string& guest,
                                  const std::vector<TargetDisk>& disks) = 0;

  // All images that the definitions of this host's guests name, running or not, and the backing
  // files of the volumes of active pools.
  virtual Result<std::vector<ImageUse>> image_uses() = 0;

  // Of a pool that is a directory (dir, fs, netfs) and active. NotFound; Incompatible for another
  // kind; Busy if it is not active.
  virtual Result<std::string> pool_directory(const std::string& pool) = 0;
  // Has the active pools that are these files' directories look for what is in them.
  virtual void refresh_pools(const std::vector<std::string>& paths) = 0;
};

}  // namespace drover::memmig
