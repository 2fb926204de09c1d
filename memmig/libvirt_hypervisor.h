// SPDX-License-Identifier: Apache-2.0
//
// The Hypervisor of libvirt and QEMU.
//
//   DROVER_ASSIGN(auto source, connect_libvirt({.uri = "qemu:///system"}));
//   DROVER_ASSIGN(auto target, connect_libvirt({.uri = "qemu+ssh://hostb/system?no_tty=1"}));
//
// Threads: the first connection starts libvirt's event loop on a thread of its own; the last one to
// go ends it. Everything else as memmig/hypervisor.h says. libvirt prints nothing.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "base/result.h"
#include "memmig/disk_host.h"
#include "memmig/hypervisor.h"

namespace drover::memmig {

struct ConnectOptions {
  std::string uri = "qemu:///system";
  // Local sockets that lead to the same libvirt, tried before the URI for each connection.
  std::vector<std::string> sockets;
  // A connection that has said nothing for interval * count is given up: every call under way ends
  // with Unreachable, subscriptions get ConnectionLost (not for one that only a migrate() has).
  std::chrono::seconds keepalive_interval{2};
  unsigned keepalive_count = 5;
};

// connect_libvirt(): to move guests. By SSH migrate() to that host has a connection of its own; alive() is
// false until ready_to_migrate() or reconnect() has made it.
// Unreachable, Denied (libvirt's or SSH's refusal), Incompatible (libvirt or QEMU too old).
Result<std::unique_ptr<Hypervisor>> connect_libvirt(const ConnectOptions& options);
Result<std::unique_ptr<DiskHost>> connect_disk_host(const ConnectOptions& options);

// Where libvirt's daemons listen on a host, first the one to prefer: libvirtd or virtproxyd, QEMU's own.
std::vector<std::string> libvirt_sockets();

// The oldest that drover works with.
inline constexpr std::uint64_t kOldestLibvirt = 9000000;  // 9.0.0
inline constexpr std::uint64_t kOldestQemu = 7002000;     // 7.2.0

}  // namespace drover::memmig
