// SPDX-License-Identifier: Apache-2.0
//
// What libvirt on this host says of storage: all guests' disks, pools, what the guests ask of their
// disks. It only reads; a test puts a fake in its place.
//
//   DROVER_ASSIGN(auto host, connect_storage_host("qemu:///system"));
//   DROVER_ASSIGN(std::vector<HostGuest> guests, host->guests());
//
// Threads: every method blocks, and may be called from any thread. Errors: Unreachable, Denied,
// NotFound (a pool), Io.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "memmig/hypervisor.h"

namespace drover::memmig {

struct HostGuest {
  std::string name;
  std::string uuid;
  bool running = false;  // or stands still: there is a QEMU
  // What it uses now, or will use when it starts; pool volumes as files or devices. Only what the
  // definition says of them.
  std::vector<GuestDisk> disks;
};

struct PoolFacts {
  std::string type;  // libvirt's word: "dir", "fs", "logical", ...
  bool active = false;
  std::string path;  // "/srv/images"; may be empty
};

// What a running guest has had one of its disks do since it was started here.
struct DiskIo {
  std::string guest;           // UUID
  std::string disk;            // "vda"
  std::uint64_t requests = 0;  // reads, writes, flushes: done
  std::uint64_t bytes = 0;     // read and written
  Duration time{};             // the sum of what each request took, as the guest felt it
};

class StorageHost {
 public:
  virtual ~StorageHost() = default;
  StorageHost(const StorageHost&) = delete;
  StorageHost& operator=(const StorageHost&) = delete;

  // All of them, by name.
  virtual Result<std::vector<HostGuest>> guests() = 0;
  virtual Result<PoolFacts> pool(const std::string& name) = 0;
  // Of all disks of all running guests.
  virtual Result<std::vector<DiskIo>> disk_io() = 0;

 protected:
  StorageHost() = default;
};

// A hypervisor on this host: its files are looked at. InvalidArgument for another one.
Result<std::unique_ptr<StorageHost>> connect_storage_host(const std::string& uri);

// What a pool's definition says, but for whether it is active. InvalidArgument: no pool's XML.
Result<PoolFacts> parse_pool(const std::string& xml);

}  // namespace drover::memmig
