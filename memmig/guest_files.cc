// SPDX-License-Identifier: Apache-2.0
#include "memmig/guest_files.h"

#include <fmt/format.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

#include <algorithm>
#include <pugixml.hpp>
#include <set>
#include <sstream>
#include <utility>

#include "memmig/domain_xml.h"
#include "memmig/libvirt_support.h"
#include "memmig/relocation.h"
#include "memmig/storage_host.h"

namespace drover::memmig {

namespace {

using Connection = std::unique_ptr<virConnect, Freer<virConnectClose>>;
using Snapshot = std::unique_ptr<virDomainSnapshot, Freer<virDomainSnapshotFree>>;
using pugi::xml_document;
using pugi::xml_node;

// ---- definitions --------------------------------------------------------------------------------

Status load(const std::string& xml, xml_document& document) {
  if (document.load_string(xml.c_str(), pugi::parse_full) && document.child("domain")) return {};
  return fail(Code::InvalidArgument, "reading a guest's definition: it is none");
}

std::string text_of(const xml_node& node) {
  std::ostringstream out;
  node.print(out, "", pugi::format_raw);
  return out.str();
}

// <nvram>PATH</nvram>, or since libvirt 8.5 <nvram type='file'><source file='PATH'/></nvram>.
std::string nvram_path(const xml_node& nvram) {
  if (const auto file = nvram.child("source").attribute("file")) return file.value();
  return nvram.text().get();
}

// What relocation says of each disk that it does not take, whatever the target.
void say_what_stays(const GuestInfo& guest, std::vector<FileUse>& uses) {
  const RelocationPlan plan = plan_relocation(guest, {.directory = "/"});
  for (FileUse& use : uses) {
    if (use.kind != FileUse::Kind::Disk) continue;
    const auto found = std::ranges::find(plan.staying, use.disk, &RelocationPlan::Stays::disk);
    if (found != plan.staying.end()) use.stays = found->why;
    const GuestDisk* disk = guest.disk(use.disk);
    if (use.stays.empty() && disk != nullptr && disk->format != "raw" && disk->format != "qcow2") {
      use.stays = fmt::format("is {}: 'drover relocate' can make it qcow2", disk->format);
    }
  }
}

FileUse use_of(const GuestDisk& disk) {
  FileUse use;
  use.kind = disk.device == DiskDevice::Cdrom    ? FileUse::Kind::Medium
             : disk.device == DiskDevice::Floppy ? FileUse::Kind::Floppy
                                                 : FileUse::Kind::Disk;
  use.disk = disk.target;
  use.path = disk.path;
  use.format = disk.format;
  return use;
}

std::vector<FileUse> files_of(const GuestInfo& guest, const xml_document& document) {
  std::vector<FileUse> out;
  const std::string xml = text_of(document.child("domain"));
  for (const GuestDisk& disk : guest.disks) {
    if (disk.kind != DiskKind::File) continue;
    out.push_back(use_of(disk));
    std::vector<ChainLink> chain = disk_chain(xml, disk.target);
    for (std::size_t i = 1; i < chain.size(); ++i) {
      FileUse& use = out.emplace_back();
      use.kind = FileUse::Kind::Backing;
      use.disk = disk.target;
      use.path = std::move(chain[i].path);
    }
  }
  const auto add = [&](FileUse::Kind kind, const char* what, std::string path) {
    if (path.empty()) return;
    FileUse& use = out.emplace_back();
    use.kind = kind;
    use.disk = what;
    use.path = std::move(path);
  };
  const xml_node os = document.child("domain").child("os");
  add(FileUse::Kind::Nvram, "NVRAM", nvram_path(os.child("nvram")));
  add(FileUse::Kind::Other, "NVRAM template", guest.nvram_template);
  add(FileUse::Kind::Other, "firmware", guest.firmware_loader);
  for (const std::string& path : guest.boot_files) {
    add(FileUse::Kind::Other, "kernel or other boot file", path);
  }
  for (const xml_node device : document.child("domain").child("devices").children()) {
    const std::string_view name = device.name();
    const xml_node source = device.child("source");
    if (name == "memory") {
      add(FileUse::Kind::Other, "persistent memory", source.child("path").text().get());
    } else if (name == "filesystem") {
      add(FileUse::Kind::Other, "shared directory", source.attribute("dir").value());
      add(FileUse::Kind::Other, "shared directory", source.attribute("file").value());
    } else if (name != "disk") {
      const bool file = device.attribute("type").value() == std::string_view("file");
      if (file) add(FileUse::Kind::Other, "output file", source.attribute("path").value());
      add(FileUse::Kind::Other, "log", device.child("log").attribute("file").value());
    }
  }
  say_what_stays(guest, out);
  return out;
}

xml_node find_disk(const xml_document& document, const std::string& disk) {
  for (const xml_node node : document.child("domain").child("devices").children("disk")) {
    if (disk == node.child("target").attribute("dev").value()) return node;
  }
  return {};
}

// ---- libvirt ------------------------------------------------------------------------------------

unsigned kind_of_definition(bool live) {
  if (live) return 0;
  return VIR_DOMAIN_XML_INACTIVE;
}

class LibvirtFiles final : public GuestFiles {
 public:
  explicit LibvirtFiles(Connection connection) : connection_(std::move(connection)) {}

  Result<std::vector<FileUse>> uses() override;
  Status change_medium(const FileUse& use, const std::string& path) override;
  Status change_nvram(const FileUse& use, const std::string& path) override;

 private:
  Status add_uses(virDomainPtr domain, std::vector<FileUse>& out);
  Result<std::string> add_remembered(virDomainPtr domain, std::vector<FileUse>& out);
  Result<std::vector<FileUse>> uses_of(const std::string& xml);
  Result<std::string> path_of_volume(const std::string& pool, const std::string& volume);
  bool is_there(virDomainPtr domain);
  Result<Domain> domain_of(const FileUse& use);

  Connection connection_;
};

// Empty: it is no file.
Result<std::string> LibvirtFiles::path_of_volume(const std::string& pool_name,
                                                 const std::string& volume_name) {
  const std::string doing = fmt::format("looking for volume {} of pool {}", volume_name, pool_name);
  const Pool pool(virStoragePoolLookupByName(connection_.get(), pool_name.c_str()));
  if (!pool) {
    Error error = libvirt_error(doing);
    if (error.code == Code::NotFound) {
      error.code = Code::Incompatible;
      error.hint = "a guest names it; define the pool, or take the disk out of the guest";
    }
    return fail(std::move(error));
  }
  if (const Volume volume(virStorageVolLookupByName(pool.get(), volume_name.c_str())); volume) {
    virStorageVolInfo details{};
    if (virStorageVolGetInfo(volume.get(), &details) < 0) return libvirt_fail(doing);
    if (details.type != VIR_STORAGE_VOL_FILE) return std::string();
    const Text path(virStorageVolGetPath(volume.get()));
    if (!path) return libvirt_fail(doing);
    return std::string(path.get());
  }
  // The pool is not active, or has not seen it.
  const Text xml(virStoragePoolGetXMLDesc(pool.get(), 0));
  if (!xml) return libvirt_fail(doing);
  DROVER_ASSIGN(const PoolFacts facts, parse_pool(xml.get()));
  const bool directory = facts.type == "dir" || facts.type == "fs" || facts.type == "netfs";
  return directory ? facts.path + "/" + volume_name : std::string();
}

// Volumes of pools as the files they are.
Result<std::vector<FileUse>> LibvirtFiles::uses_of(const std::string& xml) {
  xml_document document;
  DROVER_TRY(load(xml, document));
  GuestInfo guest;
  DROVER_TRY(parse_definition(xml, guest));
  for (GuestDisk& disk : guest.disks) {
    if (disk.kind != DiskKind::Volume) continue;
    DROVER_ASSIGN(std::string path, path_of_volume(disk.pool, disk.volume));
    if (path.empty()) continue;
    disk.kind = DiskKind::File;
    disk.path = std::move(path);
  }
  return files_of(guest, document);
}

// What it has that remembers, as FileUse::remembered.
Result<std::string> LibvirtFiles::add_remembered(virDomainPtr domain, std::vector<FileUse>& out) {
  const auto add = [&](const std::string& what, const Text& xml) -> Status {
    if (!xml) return libvirt_fail("reading the " + what);
    DROVER_ASSIGN(const std::vector<std::string> paths, paths_in(xml.get()));
    for (const std::string& path : paths) {
      out.push_back({.kind = FileUse::Kind::Remembered, .disk = what, .path = path});
    }
    return {};
  };
  virDomainSnapshotPtr* list = nullptr;
  const int count = virDomainListAllSnapshots(domain, &list, 0);
  if (count < 0) return libvirt_fail("listing a guest's snapshots");
  std::vector<Snapshot> snapshots;
  for (int i = 0; i < count; ++i) snapshots.emplace_back(list[i]);
  std::free(static_cast<void*>(list));
  for (const Snapshot& snapshot : snapshots) {
    const std::string what = fmt::format("snapshot {}", virDomainSnapshotGetName(snapshot.get()));
    DROVER_TRY(add(what, Text(virDomainSnapshotGetXMLDesc(snapshot.get(), 0))));
  }
  const int saved = virDomainHasManagedSaveImage(domain, 0);
  if (saved < 0) return libvirt_fail("asking whether a guest has a saved state");
  if (saved == 1) {
    DROVER_TRY(add("saved state", Text(virDomainManagedSaveGetXMLDesc(domain, 0))));
  }
  return std::string(saved == 1 ? "a saved state" : count > 0 ? "snapshots" : "");
}

Status LibvirtFiles::add_uses(virDomainPtr domain, std::vector<FileUse>& out) {
  const int running = virDomainIsActive(domain);
  if (running < 0) return libvirt_fail("asking whether a guest runs");
  const int persistent = virDomainIsPersistent(domain);
  if (persistent < 0) return libvirt_fail("asking whether a guest persists");
  std::vector<FileUse> its;
  DROVER_ASSIGN(const std::string remembered, add_remembered(domain, its));
  for (const bool live : {true, false}) {
    if (live ? running != 1 : persistent != 1) continue;
    DROVER_ASSIGN(const std::string xml, definition_of(domain, kind_of_definition(live)));
    DROVER_ASSIGN(std::vector<FileUse> uses, uses_of(xml));
    for (FileUse& use : uses) {
      use.live = live;
      its.push_back(std::move(use));
    }
  }
  for (FileUse& use : its) {
    use.guest = virDomainGetName(domain);
    use.uuid = uuid_of(domain);
    use.running = running == 1;
    use.remembered = remembered;
    out.push_back(std::move(use));
  }
  return {};
}

bool LibvirtFiles::is_there(virDomainPtr domain) {
  return Domain(virDomainLookupByUUIDString(connection_.get(), uuid_of(domain).c_str())) != nullptr;
}

Result<std::vector<FileUse>> LibvirtFiles::uses() {
  virDomainPtr* list = nullptr;
  const int count = virConnectListAllDomains(connection_.get(), &list, 0);
  if (count < 0) return libvirt_fail("listing the guests of this host");
  std::vector<Domain> domains;
  for (int i = 0; i < count; ++i) domains.emplace_back(list[i]);
  std::free(static_cast<void*>(list));
  std::vector<FileUse> out;
  for (const Domain& domain : domains) {
    const Status added = add_uses(domain.get(), out);
    if (added) continue;
    // One that has just gone uses nothing.
    if (added.error().code == Code::NotFound && !is_there(domain.get())) continue;
    return fail(added.error());
  }
  std::ranges::stable_sort(out, {}, &FileUse::guest);
  return out;
}

Result<Domain> LibvirtFiles::domain_of(const FileUse& use) {
  Domain domain(virDomainLookupByUUIDString(connection_.get(), use.uuid.c_str()));
  if (!domain) return libvirt_fail("looking for guest " + use.guest);
  return domain;
}

Status LibvirtFiles::change_medium(const FileUse& use, const std::string& path) {
  DROVER_ASSIGN(const Domain domain, domain_of(use));
  DROVER_ASSIGN(const std::string xml, definition_of(domain.get(), kind_of_definition(use.live)));
  DROVER_ASSIGN(const std::string element, medium_element(xml, use.disk, path));
  const std::string doing =
      fmt::format("changing the medium in drive {} of guest {}", use.disk, use.guest);
  // Never by force: a guest that reads from it would read nonsense.
  if (virDomainUpdateDeviceFlags(
          domain.get(), element.c_str(),
          use.live ? VIR_DOMAIN_DEVICE_MODIFY_LIVE : VIR_DOMAIN_DEVICE_MODIFY_CONFIG) == 0) {
    return {};
  }
  Error error = libvirt_error(doing);
  if (contains(error.message, "tray") || contains(error.message, "is locked")) {
    error.code = Code::Busy;
    error.message =
        fmt::format("guest {} keeps drive {} locked, with {} in it", use.guest, use.disk, use.path);
    error.hint = "unmount it in the guest, and run the same command again";
  }
  return fail(std::move(error));
}

Status LibvirtFiles::change_nvram(const FileUse& use, const std::string& path) {
  DROVER_ASSIGN(const Domain domain, domain_of(use));
  DROVER_ASSIGN(const std::string xml,
                definition_of(domain.get(), VIR_DOMAIN_XML_INACTIVE | VIR_DOMAIN_XML_SECURE));
  DROVER_ASSIGN(const std::string changed, with_nvram(xml, path));
  const std::string doing = "changing the definition of guest " + use.guest;
  const Domain defined(virDomainDefineXMLFlags(connection_.get(), changed.c_str(), 0));
  if (!defined) return libvirt_fail(doing);
  return {};
}

}  // namespace

Result<std::vector<FileUse>> files_of_definition(const std::string& xml) {
  xml_document document;
  DROVER_TRY(load(xml, document));
  GuestInfo guest;
  DROVER_TRY(parse_definition(xml, guest));
  return files_of(guest, document);
}

Result<std::vector<std::string>> paths_in(const std::string& xml) {
  xml_document document;
  if (!document.load_string(xml.c_str())) {
    return fail(Code::InvalidArgument, "reading what a guest remembers: it is no XML");
  }
  struct Collector final : pugi::xml_tree_walker {
    bool for_each(xml_node& node) override {
      add(node.value());
      for (const auto& attribute : node.attributes()) add(attribute.value());
      return true;
    }
    void add(const char* text) {
      if (text[0] == '/') paths.insert(text);
    }
    std::set<std::string> paths;
  } collector;
  document.traverse(collector);
  return std::vector<std::string>(collector.paths.begin(), collector.paths.end());
}

Result<std::string> medium_element(const std::string& xml, const std::string& disk,
                                   const std::string& path) {
  xml_document document;
  DROVER_TRY(load(xml, document));
  xml_node node = find_disk(document, disk);
  if (!node) return fail(Code::NotFound, "there is no drive " + disk);
  // All else stays as it is: libvirt refuses to change anything but the medium.
  xml_node old = node.child("source");
  xml_node fresh = old ? node.insert_child_before("source", old)
                       : node.insert_child_before("source", node.child("target"));
  for (const xml_node label : old.children("seclabel")) fresh.append_copy(label);
  if (const auto policy = old.attribute("startupPolicy")) fresh.append_copy(policy);
  fresh.append_attribute("file").set_value(path.c_str());
  if (old) node.remove_child(old);
  while (node.remove_child("backingStore")) {
  }
  node.attribute("type").set_value("file");
  return text_of(node);
}

Result<std::string> with_nvram(const std::string& xml, const std::string& path) {
  xml_document document;
  DROVER_TRY(load(xml, document));
  xml_node nvram = document.child("domain").child("os").child("nvram");
  if (nvram_path(nvram).empty()) return fail(Code::NotFound, "the guest has no NVRAM file");
  if (auto file = nvram.child("source").attribute("file")) {
    file.set_value(path.c_str());
  } else {
    nvram.text().set(path.c_str());
  }
  return text_of(document.child("domain"));
}

Result<std::unique_ptr<GuestFiles>> connect_guest_files(const std::string& uri) {
  if (uri.find(":///") == std::string::npos || uri.find('+') < uri.find(':')) {
    return fail(Code::InvalidArgument, uri + " is not a hypervisor on this host");
  }
  virSetErrorFunc(nullptr, [](void*, virErrorPtr) {});  // libvirt prints nothing
  Connection connection(virConnectOpen(uri.c_str()));
  if (!connection) return libvirt_fail("connecting to libvirt at " + uri);
  return std::make_unique<LibvirtFiles>(std::move(connection));
}

}  // namespace drover::memmig
