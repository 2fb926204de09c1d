// SPDX-License-Identifier: Apache-2.0
//
// Domain XML: what a guest's definition says, and the definition it gets on the target. Pure
// functions on text.
//
//   GuestInfo guest;
//   DROVER_TRY(parse_definition(xml, guest));
//   DROVER_ASSIGN(auto live, rewrite_definition(guest.live_xml, {.disks = {{"vda",
//   "/srv/web1.raw"}},
//                                                                .live = true}));
//
// Threads: any. Errors: InvalidArgument (not XML, not a domain), NotFound (a disk that is not
// there).
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "memmig/hypervisor.h"

namespace drover::memmig {

// Fills what the definition says into `guest`: all that is not of a running guest, and
// live_xml/inactive_xml not. Fields that it says nothing about are left alone.
Status parse_definition(const std::string& xml, GuestInfo& guest);

// The number that libvirt gave a disk's top image in a live definition (its nodes in QEMU are named
// "libvirt-N-format" and "libvirt-N-storage"); 0 if there is none.
unsigned disk_source_index(const std::string& xml, std::string_view disk);
// The alias of the disk's device in a live definition ("virtio-disk0"), or empty.
std::string disk_alias(const std::string& xml, std::string_view disk);

// The copy job on a disk, as a live definition shows it; absent: there is none.
struct DiskMirror {
  std::string path;
  bool ready = false;
};
std::optional<DiskMirror> disk_mirror(const std::string& xml, std::string_view disk);
// The <disk> element for a copy of the disk at that place, with the labels that the administrator
// gave the present one. Empty: there is no such disk.
struct TargetDisk;
std::string copy_element(const std::string& xml, const TargetDisk& copy);

// The paths of a disk's image and of its backing files, the top one first, with their formats.
struct ChainLink {
  std::string path;
  std::string format;
};
std::vector<ChainLink> disk_chain(const std::string& xml, std::string_view disk);

// Where a disk lies on the target.
struct TargetDisk {
  std::string disk;  // "vda"
  std::string path;
  std::string format;  // empty: as it is
  bool block_device = false;
};

struct Rewrite {
  // A disk of the definition that is not named here stays as it is (read-only media that are on
  // both hosts). One that is named here must be in a live definition; in a persistent one it may be
  // missing (hot-plugged).
  std::vector<TargetDisk> disks;
  // CD-ROM and floppy drives whose medium is taken out.
  std::vector<std::string> eject;
  // True for the definition that migrates with the guest, false for the one that persists.
  bool live = false;
};

// The definition for the target: paths, types and formats of its disks changed, backing chains
// flattened (the target's images have none), libvirt's run-time numbers dropped. All else is
// as it was: what the guest sees may not change while it runs.
Result<std::string> rewrite_definition(const std::string& xml, const Rewrite& rewrite);

// The libvirt URI for an SSH destination: "hostb", "root@hostb", "ssh://root@hostb:2222",
// "[fd00::2]", "fd00::2" -> "qemu+ssh://.../system?no_tty=1" (libvirt's ssh never asks anything).
Result<std::string> libvirt_uri_of(const std::string& ssh_destination);
// "qemu+ssh://...", "qemu+libssh2://...".
bool goes_by_ssh(std::string_view libvirt_uri);

}  // namespace drover::memmig
