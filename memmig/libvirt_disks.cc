// SPDX-License-Identifier: Apache-2.0
#include "memmig/libvirt_disks.h"

#include <fmt/format.h>

#include <filesystem>
#include <pugixml.hpp>
#include <set>
#include <utility>

#include "base/log.h"
#include "memmig/libvirt_support.h"

namespace drover::memmig {

using nlohmann::json;

namespace {

// Before the call that may fail: each of libvirt's calls forgets the last one's error.
std::string doing_to(virDomainPtr domain, const char* what, const std::string& disk) {
  return fmt::format("{} disk {} of guest {}", what, disk, virDomainGetName(domain));
}

// Lists of libvirt's handles, each freed with its list.
template <auto List, auto Free, class Handle>
std::vector<std::unique_ptr<Handle, Freer<Free>>> all_of(virConnectPtr connection, unsigned flags) {
  std::vector<std::unique_ptr<Handle, Freer<Free>>> out;
  Handle** list = nullptr;
  const int count = List(connection, &list, flags);
  for (int i = 0; i < count; ++i) out.emplace_back(list[i]);
  std::free(list);
  return out;
}

std::vector<Pool> active_pools(virConnectPtr connection) {
  return all_of<virConnectListAllStoragePools, virStoragePoolFree, virStoragePool>(
      connection, VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE);
}

struct PoolPlace {
  std::string kind;
  std::string directory;
};

PoolPlace place_of(virStoragePoolPtr pool) {
  const Text xml(virStoragePoolGetXMLDesc(pool, 0));
  pugi::xml_document document;
  if (!xml || !document.load_string(xml.get())) return {};
  const pugi::xml_node root = document.child("pool");
  return {root.attribute("type").value(), root.child("target").child("path").text().get()};
}

bool is_directory_pool(const std::string& kind) {
  return kind == "dir" || kind == "fs" || kind == "netfs";
}

}  // namespace

std::string disk_of_copy_job(std::string_view job) {
  constexpr std::string_view kBegin = "copy-";
  if (!job.starts_with(kBegin)) return {};
  const std::size_t end = job.find("-libvirt-");
  if (end == std::string_view::npos) return {};
  return std::string(job.substr(kBegin.size(), end - kBegin.size()));
}

void look_at_copies(virDomainPtr domain, const std::string& live, GuestPlaces& places) {
  for (DiskPlace& place : places.disks) {
    const auto mirror = disk_mirror(live, place.disk);
    if (!mirror) continue;
    place.copying = true;
    place.copy_path = mirror->path;
    place.ready = mirror->ready;
    virDomainBlockJobInfo job{};
    // It may have ended meanwhile.
    if (virDomainGetBlockJobInfo(domain, place.disk.c_str(), &job, 0) == 1) {
      place.copied = Length(job.cur);
      place.to_copy = Length(job.end);
    }
  }
}

Status start_block_copy(virDomainPtr domain, const DiskCopySpec& spec) {
  const std::string doing = doing_to(domain, "copying", spec.disk);
  DROVER_ASSIGN(const std::string live, definition_of(domain, 0));
  const std::string element = copy_element(
      live, {spec.disk, spec.target_path, spec.target_format, spec.target_block_device});
  if (element.empty()) return fail(Code::NotFound, doing + ": it has no such disk");
  virTypedParameterPtr parameters = nullptr;
  int count = 0;
  int capacity = 0;
  const auto add = [&](const char* name, Length value) {
    if (value == Length()) return;
    virTypedParamsAddULLong(&parameters, &count, &capacity, name, value.bytes());
  };
  add(VIR_DOMAIN_BLOCK_COPY_BANDWIDTH, spec.bandwidth);
  add(VIR_DOMAIN_BLOCK_COPY_BUF_SIZE, spec.buffer);
  if (spec.granularity != Length()) {
    virTypedParamsAddUInt(&parameters, &count, &capacity, VIR_DOMAIN_BLOCK_COPY_GRANULARITY,
                          static_cast<unsigned>(spec.granularity.bytes()));
  }
  // Not SYNCHRONOUS_WRITES: a mirror that carries the guest's writes must not be cancelled by force
  // (memmig/libvirt_hypervisor.cc, end_mirror()), which is how libvirt cancels.
  const unsigned flags = VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB;
  Status begun;
  if (virDomainBlockCopy(domain, spec.disk.c_str(), element.c_str(), parameters, count, flags) <
      0) {
    begun = libvirt_fail(doing);
  }
  virTypedParamsFree(parameters, count);
  return begun;
}

Status set_block_copy_bandwidth(virDomainPtr domain, const std::string& disk, Length per_second) {
  const std::string doing = doing_to(domain, "limiting the copy of", disk);
  if (virDomainBlockJobSetSpeed(domain, disk.c_str(), per_second.bytes(),
                                VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES) == 0) {
    return {};
  }
  return libvirt_fail(doing);
}

Status pivot_block_copy(virDomainPtr domain, const std::string& disk) {
  constexpr unsigned kFlags = VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT | VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC;
  const std::string doing = doing_to(domain, "switching", disk);
  if (virDomainBlockJobAbort(domain, disk.c_str(), kFlags) == 0) return {};
  return libvirt_fail(doing);
}

Status abort_block_copy(virDomainPtr domain, const std::string& disk) {
  const std::string doing = doing_to(domain, "ending the copy of", disk);
  if (virDomainBlockJobAbort(domain, disk.c_str(), 0) == 0) return {};
  Error error = libvirt_error(doing);
  if (error.code == Code::Unreachable) return fail(std::move(error));
  // It may have ended by itself.
  DROVER_ASSIGN(const std::string live, definition_of(domain, 0));
  if (!disk_mirror(live, disk)) return {};
  return fail(std::move(error));
}

Result<std::vector<std::string>> stray_nodes(virDomainPtr domain, const std::string& live,
                                             const std::string& path) {
  constexpr std::string_view kBegin = "libvirt-";
  DROVER_ASSIGN(const json nodes, qmp(domain, "query-named-block-nodes", {{"flat", true}},
                                      "looking for what is left of a copy into " + path));
  std::vector<std::string> out;
  for (const char* layer : {"-format", "-storage"}) {
    for (const json& node : nodes) {
      const std::string name = string_of(node, "node-name");
      if (string_of(node, "file") != path || !name.starts_with(kBegin) || !name.ends_with(layer)) {
        continue;
      }
      const std::string index = name.substr(kBegin.size(), name.rfind('-') - kBegin.size());
      if (!contains(live, fmt::format("index='{}'", index))) out.push_back(name);
    }
  }
  return out;
}

// QEMU has no command for it that is meant for programs. This one is a debugging aid that has been
// there since 1.2, and does what the guest's own flush does.
Status flush_block_node(virDomainPtr domain, const std::string& disk) {
  const std::string doing = doing_to(domain, "flushing", disk);
  DROVER_ASSIGN(const std::string live, definition_of(domain, 0));
  const unsigned index = disk_source_index(live, disk);
  if (index == 0) return fail(Code::NotFound, doing + ": it was not found in QEMU");
  DROVER_ASSIGN(const json nodes, qmp(domain, "query-named-block-nodes", {{"flat", true}}, doing));
  for (const char* layer : {"format", "storage"}) {
    const std::string name = fmt::format("libvirt-{}-{}", index, layer);
    for (const json& node : nodes) {
      if (string_of(node, "node-name") != name) continue;
      DROVER_ASSIGN(const json said,
                    qmp(domain, "human-monitor-command",
                        {{"command-line", fmt::format("qemu-io {} \"flush\"", name)}}, doing));
      const std::string words = said.is_string() ? said.get<std::string>() : "";
      if (!words.empty()) return fail(Code::Io, fmt::format("{}: QEMU says: {}", doing, words));
      return {};
    }
  }
  return fail(Code::NotFound, doing + ": it was not found in QEMU");
}

Status point_persistent_disks(virDomainPtr domain, const std::vector<TargetDisk>& disks) {
  if (virDomainIsPersistent(domain) != 1) return {};
  DROVER_ASSIGN(const std::string xml,
                definition_of(domain, VIR_DOMAIN_XML_INACTIVE | VIR_DOMAIN_XML_SECURE));
  DROVER_ASSIGN(const std::string changed, rewrite_definition(xml, {.disks = disks}));
  const std::string doing =
      std::string("changing the definition of guest ") + virDomainGetName(domain);
  const Domain defined(virDomainDefineXMLFlags(virDomainGetConnect(domain), changed.c_str(), 0));
  if (!defined) return libvirt_fail(doing);
  return {};
}

Result<std::vector<ImageUse>> images_of_guests(virConnectPtr connection) {
  std::vector<ImageUse> out;
  const auto domains = all_of<virConnectListAllDomains, virDomainFree, virDomain>(connection, 0);
  if (domains.empty() && virConnectIsAlive(connection) != 1) {
    return libvirt_fail("listing the guests of this host");
  }
  for (const Domain& domain : domains) {
    const std::string name = virDomainGetName(domain.get());
    const auto add_all = [&](unsigned flags, bool running) -> Status {
      DROVER_ASSIGN(const std::string xml, definition_of(domain.get(), flags));
      GuestInfo info;
      DROVER_TRY(parse_definition(xml, info));
      for (const GuestDisk& disk : info.disks) {
        bool backing = false;
        for (ChainLink& link : disk_chain(xml, disk.target)) {
          out.push_back({.path = std::move(link.path),
                         .format = std::move(link.format),
                         .guest = name,
                         .disk = disk.target,
                         .backing = std::exchange(backing, true),
                         .running = running});
        }
        if (disk.kind != DiskKind::Volume) continue;
        const Pool pool(virStoragePoolLookupByName(connection, disk.pool.c_str()));
        const Volume volume(pool ? virStorageVolLookupByName(pool.get(), disk.volume.c_str())
                                 : nullptr);
        const Text path(volume ? virStorageVolGetPath(volume.get()) : nullptr);
        if (path) {
          out.push_back({.path = path.get(),
                         .format = disk.format,
                         .guest = name,
                         .disk = disk.target,
                         .running = running});
        }
      }
      return {};
    };
    Status added;
    if (virDomainIsActive(domain.get()) == 1) added = add_all(0, true);
    if (added && virDomainIsPersistent(domain.get()) == 1) {
      added = add_all(VIR_DOMAIN_XML_INACTIVE, false);
    }
    // A guest that has just gone uses nothing.
    if (!added && added.error().code != Code::NotFound) return fail(added.error());
  }
  return out;
}

std::vector<ImageUse> backing_files_of_volumes(virConnectPtr connection) {
  std::vector<ImageUse> out;
  for (const Pool& pool : active_pools(connection)) {
    virStorageVolPtr* list = nullptr;
    const int count = virStoragePoolListAllVolumes(pool.get(), &list, 0);
    for (int i = 0; i < count; ++i) {
      const Volume volume(list[i]);
      const Text xml(virStorageVolGetXMLDesc(volume.get(), 0));
      pugi::xml_document document;
      if (!xml || !document.load_string(xml.get())) continue;
      const pugi::xml_node backing = document.child("volume").child("backingStore");
      const std::string path = backing.child("path").text().get();
      if (path.empty()) continue;
      out.push_back({.path = path,
                     .format = backing.child("format").attribute("type").value(),
                     .volume = fmt::format("{} of pool {}", virStorageVolGetName(volume.get()),
                                           virStoragePoolGetName(pool.get())),
                     .backing = true});
    }
    std::free(list);
  }
  return out;
}

Result<std::string> directory_of_pool(virConnectPtr connection, const std::string& name) {
  const std::string doing = "looking at storage pool " + name;
  const Pool pool(virStoragePoolLookupByName(connection, name.c_str()));
  if (!pool) {
    Error error = libvirt_error(doing);
    if (error.code == Code::NotFound) {
      error.message = "there is no storage pool " + name;
      error.hint = "'virsh pool-list --all' shows them; a directory begins with a slash";
    }
    return fail(std::move(error));
  }
  const PoolPlace place = place_of(pool.get());
  if (!is_directory_pool(place.kind) || place.directory.empty()) {
    return fail(
        Code::Incompatible,
        fmt::format("storage pool {} is of type {}, not a directory of files", name, place.kind),
        "create the volumes there, and name them: TARGET=/dev/...");
  }
  if (virStoragePoolIsActive(pool.get()) != 1) {
    return fail(Code::Busy, fmt::format("storage pool {} is not active", name),
                fmt::format("'virsh pool-start {}' first", name));
  }
  return place.directory;
}

void refresh_pools_with(virConnectPtr connection, const std::vector<std::string>& paths) {
  std::set<std::string> directories;
  for (const std::string& path : paths) {
    directories.insert(std::filesystem::path(path).parent_path().lexically_normal().string());
  }
  for (const Pool& pool : active_pools(connection)) {
    const PoolPlace place = place_of(pool.get());
    if (!is_directory_pool(place.kind)) continue;
    std::string directory = std::filesystem::path(place.directory).lexically_normal().string();
    while (directory.size() > 1 && directory.ends_with('/')) directory.pop_back();
    if (!directories.contains(directory)) continue;
    if (virStoragePoolRefresh(pool.get(), 0) < 0) {
      log_warning("{}", libvirt_error("refreshing a storage pool").message);
    }
  }
}

}  // namespace drover::memmig
