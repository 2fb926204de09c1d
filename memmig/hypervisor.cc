// SPDX-License-Identifier: Apache-2.0
#include "memmig/hypervisor.h"

#include <algorithm>

#include "memmig/disk_host.h"

namespace drover::memmig {

const GuestDisk* GuestInfo::disk(std::string_view target) const {
  const auto found = std::find_if(disks.begin(), disks.end(),
                                  [&](const GuestDisk& disk) { return disk.target == target; });
  return found == disks.end() ? nullptr : &*found;
}

const Attached::Mirror* Attached::mirror(std::string_view disk) const {
  const auto found = std::find_if(mirrors.begin(), mirrors.end(),
                                  [&](const Mirror& mirror) { return mirror.disk == disk; });
  return found == mirrors.end() ? nullptr : &*found;
}

const Attached::Bitmap* Attached::recording(std::string_view disk) const {
  const auto found = std::find_if(bitmaps.begin(), bitmaps.end(), [&](const Bitmap& bitmap) {
    return bitmap.disk == disk && bitmap.recording;
  });
  return found == bitmaps.end() ? nullptr : &*found;
}

const DiskPlace* GuestPlaces::disk(std::string_view target) const {
  const auto found = std::find_if(disks.begin(), disks.end(),
                                  [&](const DiskPlace& disk) { return disk.disk == target; });
  return found == disks.end() ? nullptr : &*found;
}

std::string ImageUse::user() const {
  if (!volume.empty()) return "volume " + volume;
  return "disk " + disk + " of guest " + guest;
}

std::string_view state_name(GuestState state) {
  switch (state) {
    case GuestState::Running: return "running";
    case GuestState::Paused: return "paused";
    case GuestState::ShuttingDown: return "shutting down";
    case GuestState::ShutOff: return "shut off";
    case GuestState::Crashed: return "crashed";
    case GuestState::PmSuspended: return "sleeping";
    case GuestState::Unknown: return "in an unknown state";
  }
  return "";
}

std::string_view kind_name(DiskKind kind) {
  switch (kind) {
    case DiskKind::File: return "file";
    case DiskKind::Block: return "block device";
    case DiskKind::Network: return "network disk";
    case DiskKind::Directory: return "directory";
    case DiskKind::Nvme: return "NVMe device";
    case DiskKind::VhostUser: return "vhost-user disk";
    case DiskKind::VhostVdpa: return "vhost-vdpa disk";
    case DiskKind::Volume: return "storage pool's volume";
    case DiskKind::None: return "empty drive";
  }
  return "";
}

std::string_view device_name(DiskDevice device) {
  switch (device) {
    case DiskDevice::Disk: return "disk";
    case DiskDevice::Cdrom: return "CD-ROM";
    case DiskDevice::Floppy: return "floppy";
    case DiskDevice::Lun: return "SCSI LUN";
  }
  return "";
}

std::string_view event_name(GuestEvent::Kind kind) {
  switch (kind) {
    case GuestEvent::Kind::Suspended: return "suspended";
    case GuestEvent::Kind::Quiesced: return "quiesced";
    case GuestEvent::Kind::Resumed: return "resumed";
    case GuestEvent::Kind::CpusStopped: return "cpus-stopped";
    case GuestEvent::Kind::CpusRunning: return "cpus-running";
    case GuestEvent::Kind::Started: return "started";
    case GuestEvent::Kind::Stopped: return "stopped";
    case GuestEvent::Kind::Shutdown: return "shutdown";
    case GuestEvent::Kind::Crashed: return "crashed";
    case GuestEvent::Kind::Rebooted: return "rebooted";
    case GuestEvent::Kind::Defined: return "defined";
    case GuestEvent::Kind::Undefined: return "undefined";
    case GuestEvent::Kind::CopyChanged: return "copy-changed";
    case GuestEvent::Kind::CopyIoError: return "copy-io-error";
    case GuestEvent::Kind::CopyFailed: return "copy-failed";
    case GuestEvent::Kind::MirrorEnded: return "mirror-ended";
    case GuestEvent::Kind::DeviceAdded: return "device-added";
    case GuestEvent::Kind::DeviceRemoved: return "device-removed";
    case GuestEvent::Kind::DiskError: return "disk-error";
    case GuestEvent::Kind::ConnectionLost: return "connection-lost";
  }
  return "";
}

}  // namespace drover::memmig
