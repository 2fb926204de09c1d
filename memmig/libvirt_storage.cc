// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>

#include <algorithm>
#include <pugixml.hpp>
#include <utility>

#include "memmig/domain_xml.h"
#include "memmig/libvirt_support.h"
#include "memmig/storage_host.h"

namespace drover::memmig {

namespace {

using Connection = std::unique_ptr<virConnect, Freer<virConnectClose>>;

class LibvirtStorage final : public StorageHost {
 public:
  explicit LibvirtStorage(Connection connection) : connection_(std::move(connection)) {}

  Result<std::vector<HostGuest>> guests() override;
  Result<PoolFacts> pool(const std::string& name) override;
  Result<std::vector<DiskIo>> disk_io() override;

 private:
  Result<HostGuest> guest_of(virDomainPtr domain);
  void resolve_volumes(std::vector<GuestDisk>& disks);

  Connection connection_;
};

// A volume whose path can't be found stays a volume.
void LibvirtStorage::resolve_volumes(std::vector<GuestDisk>& disks) {
  for (GuestDisk& disk : disks) {
    if (disk.kind != DiskKind::Volume) continue;
    const Pool pool(virStoragePoolLookupByName(connection_.get(), disk.pool.c_str()));
    const Volume volume(pool ? virStorageVolLookupByName(pool.get(), disk.volume.c_str())
                             : nullptr);
    virStorageVolInfo details{};
    const Text path(volume ? virStorageVolGetPath(volume.get()) : nullptr);
    if (!path || virStorageVolGetInfo(volume.get(), &details) < 0) continue;
    if (details.type == VIR_STORAGE_VOL_FILE) disk.kind = DiskKind::File;
    if (details.type == VIR_STORAGE_VOL_BLOCK) disk.kind = DiskKind::Block;
    disk.path = path.get();
  }
}

Result<HostGuest> LibvirtStorage::guest_of(virDomainPtr domain) {
  // Without a flag: of a running guest what it uses now.
  const Text xml(virDomainGetXMLDesc(domain, 0));
  if (!xml) {
    return libvirt_fail(
        fmt::format("reading the definition of guest {}", virDomainGetName(domain)));
  }
  GuestInfo info;
  DROVER_TRY(parse_definition(xml.get(), info));
  HostGuest guest;
  guest.name = info.name;
  guest.uuid = info.uuid;
  guest.running = virDomainIsActive(domain) == 1;
  guest.disks = std::move(info.disks);
  resolve_volumes(guest.disks);
  return guest;
}

Result<std::vector<HostGuest>> LibvirtStorage::guests() {
  virDomainPtr* list = nullptr;
  const int count = virConnectListAllDomains(connection_.get(), &list, 0);
  if (count < 0) return libvirt_fail("listing the guests of this host");
  std::vector<Domain> domains;
  domains.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) domains.emplace_back(list[i]);
  std::free(static_cast<void*>(list));

  std::vector<HostGuest> out;
  for (const Domain& domain : domains) {
    Result<HostGuest> guest = guest_of(domain.get());
    if (!guest && guest.error().code == Code::NotFound) continue;  // it has just gone
    if (!guest) return fail(guest.error());
    out.push_back(std::move(*guest));
  }
  std::sort(out.begin(), out.end(),
            [](const HostGuest& a, const HostGuest& b) { return a.name < b.name; });
  return out;
}

Result<PoolFacts> LibvirtStorage::pool(const std::string& name) {
  const std::string doing = "looking at storage pool " + name;
  const Pool pool(virStoragePoolLookupByName(connection_.get(), name.c_str()));
  if (!pool) return libvirt_fail(doing);
  const Text xml(virStoragePoolGetXMLDesc(pool.get(), 0));
  if (!xml) return libvirt_fail(doing);
  DROVER_ASSIGN(PoolFacts facts, parse_pool(xml.get()));
  facts.active = virStoragePoolIsActive(pool.get()) == 1;
  return facts;
}

std::uint64_t number(const virDomainStatsRecord& record, unsigned disk, const char* field) {
  const std::string name = fmt::format("block.{}.{}", disk, field);
  unsigned long long value = 0;
  // Absent: 0 stays.
  virTypedParamsGetULLong(record.params, record.nparams, name.c_str(), &value);
  return value;
}

Result<std::vector<DiskIo>> LibvirtStorage::disk_io() {
  virDomainStatsRecordPtr* records = nullptr;
  const int count = virConnectGetAllDomainStats(
      connection_.get(), VIR_DOMAIN_STATS_BLOCK, &records,
      VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING | VIR_CONNECT_GET_ALL_DOMAINS_STATS_PAUSED);
  if (count < 0) return libvirt_fail("reading the disk statistics of the guests");
  const std::unique_ptr<virDomainStatsRecordPtr, Freer<virDomainStatsRecordListFree>> owner(
      records);
  std::vector<DiskIo> out;
  for (int i = 0; i < count; ++i) {
    const virDomainStatsRecord& record = *records[i];
    unsigned disks = 0;
    virTypedParamsGetUInt(record.params, record.nparams, "block.count", &disks);
    for (unsigned disk = 0; disk < disks; ++disk) {
      const char* name = nullptr;
      const std::string field = fmt::format("block.{}.name", disk);
      if (virTypedParamsGetString(record.params, record.nparams, field.c_str(), &name) != 1) {
        continue;
      }
      DiskIo io;
      io.guest = uuid_of(record.dom);
      io.disk = name;
      io.requests = number(record, disk, "rd.reqs") + number(record, disk, "wr.reqs") +
                    number(record, disk, "fl.reqs");
      io.bytes = number(record, disk, "rd.bytes") + number(record, disk, "wr.bytes");
      io.time = std::chrono::nanoseconds(number(record, disk, "rd.times") +
                                         number(record, disk, "wr.times") +
                                         number(record, disk, "fl.times"));
      out.push_back(std::move(io));
    }
  }
  return out;
}

}  // namespace

Result<PoolFacts> parse_pool(const std::string& xml) {
  pugi::xml_document document;
  if (!document.load_string(xml.c_str()) || !document.child("pool")) {
    return fail(Code::InvalidArgument, "reading a storage pool's definition: it is none");
  }
  const pugi::xml_node pool = document.child("pool");
  PoolFacts facts;
  facts.type = pool.attribute("type").as_string();
  facts.path = pool.child("target").child("path").text().as_string();
  return facts;
}

Result<std::unique_ptr<StorageHost>> connect_storage_host(const std::string& uri) {
  if (uri.find(":///") == std::string::npos || uri.find('+') < uri.find(':')) {
    return fail(Code::InvalidArgument, uri + " is not a hypervisor on this host");
  }
  virSetErrorFunc(nullptr, [](void*, virErrorPtr) {});  // libvirt prints nothing
  Connection connection(virConnectOpen(uri.c_str()));
  if (!connection) {
    Error error = libvirt_error("connecting to libvirt at " + uri);
    if (error.code == Code::Unreachable) {
      error.hint = "is libvirtd running? 'virsh -c " + uri + " list' must work";
    }
    return fail(std::move(error));
  }
  return std::make_unique<LibvirtStorage>(std::move(connection));
}

}  // namespace drover::memmig
