// SPDX-License-Identifier: Apache-2.0
#include "memmig/storage.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <tuple>
#include <utility>

#include "base/unique_fd.h"

namespace drover::memmig {

namespace {

// proc(5): space, tab, new line and backslash are written as \040 and so on.
std::string unescaped(const std::string& text) {
  const auto octal = [&](std::size_t at) {
    return at < text.size() && text[at] >= '0' && text[at] <= '7';
  };
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && octal(i + 1) && octal(i + 2) && octal(i + 3)) {
      out += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 +
                               (text[i + 3] - '0'));
      i += 3;
    } else {
      out += text[i];
    }
  }
  return out;
}

// The qcow2 header (QEMU's docs/interop/qcow2.txt): magic, version, offset of the backing file's
// name, which is zero if there is none.
bool names_backing_file(const std::string& path) {
  constexpr std::array<unsigned char, 4> kMagic = {'Q', 'F', 'I', 0xfb};
  constexpr std::size_t kBackingOffset = 8;
  std::array<unsigned char, 16> header{};
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0 ||
      ::pread(fd.get(), header.data(), header.size(), 0) != static_cast<ssize_t>(header.size())) {
    return false;
  }
  return std::equal(kMagic.begin(), kMagic.end(), header.begin()) &&
         std::any_of(header.begin() + kBackingOffset, header.end(),
                     [](unsigned char byte) { return byte != 0; });
}

std::string joined_name(const StorageDisk& disk) { return disk.guest + ":" + disk.disk; }

Result<Storage> look_at_storage(StorageHost& host, const std::string& name,
                                const LookAtPlace& look) {
  Storage storage;
  storage.name = name;
  storage.directory = name;
  if (name.find('/') == std::string::npos) {
    const Result<PoolFacts> pool = host.pool(name);
    if (!pool && pool.error().code == Code::NotFound) {
      return fail(
          Code::NotFound, "there is no storage pool " + name,
          "'virsh pool-list --all' shows them; a directory is written with a slash: ./" + name);
    }
    if (!pool) return fail(pool.error());
    if (pool->type != "dir" && pool->type != "fs" && pool->type != "netfs") {
      return fail(
          Code::Incompatible,
          fmt::format("storage pool {} is of type {}, not a directory of files", name, pool->type),
          "drover makes files, not volumes: name directories, or pools of type dir, fs or "
          "netfs");
    }
    if (!pool->active) {
      return fail(Code::Busy, fmt::format("storage pool {} is not active", name),
                  fmt::format("'virsh pool-start {}' first", name));
    }
    storage.pool = name;
    storage.directory = pool->path;
  }
  DROVER_ASSIGN(const FilePlace place, look(storage.directory));
  if (place.kind != FilePlace::Kind::Directory) {
    return fail(Code::InvalidArgument, storage.directory + " is neither a directory nor a pool",
                "name a directory on the storage, or a pool of libvirt's");
  }
  if (place.read_only) {
    return fail(Code::InvalidArgument,
                fmt::format("{} is on {}, which is mounted read-only", name, place.mount_point));
  }
  storage.directory = place.path;
  storage.mount_point = place.mount_point;
  storage.whole_mount = place.whole_mount;
  storage.filesystem = place.filesystem;
  storage.capacity = place.capacity;
  storage.used = place.capacity - place.free;
  return storage;
}

std::string why_it_stays(const GuestDisk& disk, const FilePlace& place) {
  if (disk.device == DiskDevice::Lun) return "it is passed through";
  if (disk.readonly) return "it is read-only";
  if (disk.shareable) return "it is shareable";
  if (disk.transient) return "it is transient";
  if (disk.slice) return "only a part of its file is the disk";
  if (disk.format != "raw" && disk.format != "qcow2") return "its format is " + disk.format;
  if (disk.backing_chain || (disk.format == "qcow2" && place.names_backing)) {
    return "it has a backing file";
  }
  return {};
}

}  // namespace

Mount find_mount(const std::string& mountinfo, std::uint64_t id) {
  std::istringstream lines(mountinfo);
  for (std::string line; std::getline(lines, line);) {
    // 36 35 98:0 /root /mnt/a rw,noatime shared:1 - ext4 /dev/sdb1 rw
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream front(line.substr(0, dash));
    std::istringstream back(line.substr(dash + 3));
    std::string parent;
    std::string device;
    Mount mount;
    if (!(front >> mount.id >> parent >> device >> mount.root >> mount.mount_point) ||
        !(back >> mount.type >> mount.source) || mount.id != id) {
      continue;
    }
    mount.mount_point = unescaped(mount.mount_point);
    mount.source = unescaped(mount.source);
    return mount;
  }
  return {};
}

bool is_whole(const Mount& mount) {
  return mount.root == "/" && (mount.type != "zfs" || mount.source.find('/') == std::string::npos);
}

std::string filesystem_key(const Mount& mount, std::uint64_t device) {
  if (mount.type == "btrfs") return "btrfs " + mount.source;
  if (mount.type == "zfs") return "zfs " + mount.source.substr(0, mount.source.find('/'));
  return fmt::format("device {}:{}", major(device), minor(device));
}

Result<FilePlace> look_at_place(const std::string& path) {
  const std::string doing = "looking at " + path;
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr),
                                                         &std::free);
  if (!real) return fail_errno(errno, doing);
  FilePlace place;
  place.path = real.get();
  struct statx status {};
  if (::statx(AT_FDCWD, place.path.c_str(), 0, STATX_BASIC_STATS | STATX_MNT_ID, &status) < 0) {
    return fail_errno(errno, doing);
  }
  struct statvfs space {};
  if (::statvfs(place.path.c_str(), &space) < 0) return fail_errno(errno, doing);
  place.kind = S_ISREG(status.stx_mode)   ? FilePlace::Kind::File
               : S_ISDIR(status.stx_mode) ? FilePlace::Kind::Directory
                                          : FilePlace::Kind::Other;
  place.device = makedev(status.stx_dev_major, status.stx_dev_minor);
  place.inode = status.stx_ino;
  constexpr std::uint64_t kStatBlock = 512;  // stat(2): whatever the filesystem's is
  place.allocated = Length(status.stx_blocks * kStatBlock);
  place.read_only = (space.f_flag & ST_RDONLY) != 0;
  // As df counts: what is free for others than root, and what is used.
  place.free = Length(space.f_bavail * space.f_frsize);
  place.capacity = place.free + Length((space.f_blocks - space.f_bfree) * space.f_frsize);

  std::ifstream file("/proc/self/mountinfo");
  const std::string mounts{std::istreambuf_iterator<char>(file), {}};
  const Mount mount = find_mount(mounts, status.stx_mnt_id);
  place.mount_point = mount.mount_point;
  place.whole_mount = is_whole(mount);
  place.filesystem = filesystem_key(mount, place.device);
  if (place.kind == FilePlace::Kind::File) place.names_backing = names_backing_file(place.path);
  return place;
}

Result<StorageReport> look_at_storages(StorageHost& host, const std::vector<std::string>& names,
                                       const LookAtPlace& look) {
  StorageReport report;
  std::map<std::string, std::size_t> by_filesystem;
  for (const std::string& name : names) {
    DROVER_ASSIGN(Storage storage, look_at_storage(host, name, look));
    const auto [known, added] =
        by_filesystem.try_emplace(storage.filesystem, report.storages.size());
    if (!added) {
      return fail(Code::InvalidArgument,
                  fmt::format("{} and {} are one storage: both are on the filesystem at {}",
                              report.storages[known->second].name, name, storage.mount_point),
                  "name each storage once");
    }
    report.storages.push_back(std::move(storage));
  }

  DROVER_ASSIGN(report.guests, host.guests());
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::size_t> by_file;
  for (const HostGuest& guest : report.guests) {
    for (const GuestDisk& disk : guest.disks) {
      if (disk.kind != DiskKind::File || disk.device == DiskDevice::Cdrom ||
          disk.device == DiskDevice::Floppy) {
        continue;
      }
      const Result<FilePlace> place = look(disk.path);
      if (!place) {
        const Result<FilePlace> parent = look(disk.path.substr(0, disk.path.rfind('/') + 1));
        if (!parent || !by_filesystem.contains(parent->filesystem)) continue;
        report.notes.push_back(
            fmt::format("disk {} of guest {}: {}", disk.target, guest.name, place.error().message));
        continue;
      }
      const auto where = by_filesystem.find(place->filesystem);
      if (where == by_filesystem.end() || place->kind != FilePlace::Kind::File) continue;
      StorageDisk it{guest.name,    guest.uuid,       disk.target,   place->path,
                     where->second, place->allocated, guest.running, why_it_stays(disk, *place)};
      const auto [first, added] =
          by_file.try_emplace({place->device, place->inode}, report.disks.size());
      if (!added) {
        // Its bytes are there once.
        report.disks[first->second].stays = joined_name(it) + " is the same file";
        it.stays = joined_name(report.disks[first->second]) + " is the same file";
        it.allocated = Length();
      }
      report.disks.push_back(std::move(it));
    }
  }
  return report;
}

std::vector<DiskLoad> loads_between(const std::vector<DiskIo>& before,
                                    const std::vector<DiskIo>& after, Duration window) {
  const double seconds = std::max(1e-9, std::chrono::duration<double>(window).count());
  std::map<std::pair<std::string, std::string>, DiskIo> earlier;
  for (const DiskIo& io : before) earlier[{io.guest, io.disk}] = io;
  std::vector<DiskLoad> out;
  for (const DiskIo& io : after) {
    DiskIo then;
    if (const auto known = earlier.find({io.guest, io.disk});
        known != earlier.end() && known->second.requests <= io.requests &&
        known->second.time <= io.time && known->second.bytes <= io.bytes) {
      then = known->second;
    }
    const std::uint64_t requests = io.requests - then.requests;
    DiskLoad load;
    load.guest = io.guest;
    load.disk = io.disk;
    load.requests = static_cast<double>(requests) / seconds;
    load.bytes = static_cast<double>(io.bytes - then.bytes) / seconds;
    if (requests > 0) load.latency = (io.time - then.time) / static_cast<std::int64_t>(requests);
    load.busy = std::chrono::duration_cast<Duration>(
        std::chrono::duration<double>(io.time - then.time) / seconds);
    out.push_back(std::move(load));
  }
  return out;
}

}  // namespace drover::memmig
