// SPDX-License-Identifier: Apache-2.0
#include "memmig/guest_files.h"

#include <fmt/format.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

#include <algorithm>
#include <pugixml.hpp>
#include <sstream>
#include <utility>

#include "memmig/domain_xml.h"
#include "memmig/libvirt_support.h"
#include "memmig/relocation.h"

namespace drover::memmig {

namespace {

using Connection = std::unique_ptr<virConnect, Freer<virConnectClose>>;
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
  Result<std::vector<FileUse>> uses_of(const std::string& xml);
  Result<Domain> domain_of(const FileUse& use);

  Connection connection_;
};

// Volumes of pools as the files they are.
Result<std::vector<FileUse>> LibvirtFiles::uses_of(const std::string& xml) {
  xml_document document;
  DROVER_TRY(load(xml, document));
  GuestInfo guest;
  DROVER_TRY(parse_definition(xml, guest));
  for (GuestDisk& disk : guest.disks) {
    if (disk.kind != DiskKind::Volume) continue;
    const Pool pool(virStoragePoolLookupByName(connection_.get(), disk.pool.c_str()));
    const Volume volume(pool ? virStorageVolLookupByName(pool.get(), disk.volume.c_str())
                             : nullptr);
    virStorageVolInfo details{};
    const Text path(volume ? virStorageVolGetPath(volume.get()) : nullptr);
    if (!path || virStorageVolGetInfo(volume.get(), &details) < 0 ||
        details.type != VIR_STORAGE_VOL_FILE) {
      continue;
    }
    disk.kind = DiskKind::File;
    disk.path = path.get();
  }
  return files_of(guest, document);
}

Status LibvirtFiles::add_uses(virDomainPtr domain, std::vector<FileUse>& out) {
  const bool running = virDomainIsActive(domain) == 1;
  std::string remembered;
  if (virDomainSnapshotNum(domain, 0) > 0) remembered = "snapshots";
  if (virDomainHasManagedSaveImage(domain, 0) == 1) remembered = "a saved state";
  for (const bool live : {true, false}) {
    if (live ? !running : virDomainIsPersistent(domain) != 1) continue;
    DROVER_ASSIGN(const std::string xml, definition_of(domain, kind_of_definition(live)));
    DROVER_ASSIGN(std::vector<FileUse> uses, uses_of(xml));
    for (FileUse& use : uses) {
      use.guest = virDomainGetName(domain);
      use.uuid = uuid_of(domain);
      use.live = live;
      use.running = running;
      use.remembered = remembered;
      out.push_back(std::move(use));
    }
  }
  return {};
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
    // One that has just gone uses nothing.
    if (!added && added.error().code != Code::NotFound) return fail(added.error());
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
