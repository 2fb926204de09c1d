// SPDX-License-Identifier: Apache-2.0
#include "memmig/domain_xml.h"

#include <fmt/format.h>

#include <algorithm>
#include <pugixml.hpp>
#include <sstream>

namespace drover::memmig {
namespace {

using pugi::xml_attribute;
using pugi::xml_document;
using pugi::xml_node;

Status load(const std::string& xml, xml_document& document) {
  const pugi::xml_parse_result result =
      document.load_buffer(xml.data(), xml.size(), pugi::parse_full, pugi::encoding_utf8);
  if (!result) {
    return fail(Code::InvalidArgument, fmt::format("reading a guest's definition: {} at byte {}",
                                                   result.description(), result.offset));
  }
  if (!document.child("domain")) {
    return fail(Code::InvalidArgument, "reading a guest's definition: it has no <domain>");
  }
  return {};
}

std::string text(const xml_node& node) { return node.text().get(); }
std::string attribute(const xml_node& node, const char* name) {
  return node.attribute(name).value();
}

// libvirt's memory units; KiB when none is given (libvirt: docs/formatdomain, "Memory Allocation").
Length memory_of(const xml_node& node) {
  const std::uint64_t value = node.text().as_ullong();
  const std::string unit = node.attribute("unit").as_string("KiB");
  std::uint64_t factor = 1024;
  if (unit == "b" || unit == "bytes") factor = 1;
  if (unit == "KB") factor = 1000;
  if (unit == "M" || unit == "MiB") factor = 1ULL << 20;
  if (unit == "MB") factor = 1000ULL * 1000;
  if (unit == "G" || unit == "GiB") factor = 1ULL << 30;
  if (unit == "GB") factor = 1000ULL * 1000 * 1000;
  if (unit == "T" || unit == "TiB") factor = 1ULL << 40;
  if (unit == "TB") factor = 1000ULL * 1000 * 1000 * 1000;
  return Length(value * factor);
}

DiskKind kind_of(const xml_node& disk) {
  const std::string type = attribute(disk, "type");
  const xml_node source = disk.child("source");
  if (type == "network") return DiskKind::Network;
  if (type == "dir") return DiskKind::Directory;
  if (type == "nvme") return DiskKind::Nvme;
  if (type == "vhostuser") return DiskKind::VhostUser;
  if (type == "vhostvdpa") return DiskKind::VhostVdpa;
  if (type == "volume") return source.attribute("volume") ? DiskKind::Volume : DiskKind::None;
  if (type == "block") return source.attribute("dev") ? DiskKind::Block : DiskKind::None;
  return source.attribute("file") ? DiskKind::File : DiskKind::None;
}

DiskDevice device_of(const xml_node& disk) {
  const std::string device = attribute(disk, "device");
  if (device == "cdrom") return DiskDevice::Cdrom;
  if (device == "floppy") return DiskDevice::Floppy;
  if (device == "lun") return DiskDevice::Lun;
  return DiskDevice::Disk;
}

GuestDisk parse_disk(const xml_node& node) {
  GuestDisk disk;
  const xml_node source = node.child("source");
  const xml_node driver = node.child("driver");
  const xml_node target = node.child("target");
  disk.target = attribute(target, "dev");
  disk.bus = attribute(target, "bus");
  disk.kind = kind_of(node);
  disk.device = device_of(node);
  if (disk.kind == DiskKind::File) disk.path = attribute(source, "file");
  if (disk.kind == DiskKind::Block) disk.path = attribute(source, "dev");
  if (disk.kind == DiskKind::Directory) disk.path = attribute(source, "dir");
  if (disk.kind == DiskKind::Volume) {
    disk.pool = attribute(source, "pool");
    disk.volume = attribute(source, "volume");
  }
  disk.format = attribute(driver, "type");
  // libvirt itself takes a disk without a format for raw (it does not probe).
  if (disk.format.empty() && disk.kind != DiskKind::None) disk.format = "raw";
  disk.cache = attribute(driver, "cache");
  disk.iothread = !driver.attribute("iothread").empty() || driver.child("iothreads");
  disk.copy_on_read = attribute(driver, "copy_on_read") == "on";
  disk.serial = text(node.child("serial"));
  disk.readonly = node.child("readonly") || disk.device == DiskDevice::Cdrom;
  disk.shareable = !node.child("shareable").empty();
  disk.transient = !node.child("transient").empty();
  disk.encrypted = node.child("encryption") || source.child("encryption") || disk.format == "luks";
  disk.slice = !source.child("slices").empty();
  disk.throttled = !node.child("iotune").empty() || !node.child("throttlefilters").empty();
  disk.backing_chain = !attribute(node.child("backingStore"), "type").empty();
  return disk;
}

void add_unique(std::vector<std::string>& list, std::string value) {
  if (!value.empty() && std::find(list.begin(), list.end(), value) == list.end()) {
    list.push_back(std::move(value));
  }
}

void parse_interface(const xml_node& node, GuestInfo& guest) {
  const std::string type = attribute(node, "type");
  const xml_node source = node.child("source");
  const std::string mac = attribute(node.child("mac"), "address");
  // The live definition of a network that stands for a host's bridge or device has type "bridge" or
  // "direct" and names both; what the target must have is the network, whatever it stands for there.
  if (const std::string network = attribute(source, "network"); !network.empty()) {
    add_unique(guest.networks, network);
  } else if (type == "bridge") {
    add_unique(guest.bridges, attribute(source, "bridge"));
  } else if (type == "direct") {
    add_unique(guest.interfaces, attribute(source, "dev"));
  } else if (type == "vhostuser") {
    guest.vhost_user.push_back("network card " + mac);
  } else if (type == "vdpa") {
    guest.vdpa.push_back("network card " + mac);
  } else if (type == "hostdev") {
    guest.host_devices.push_back("network card " + mac);
  }
  // user, ethernet, null, server, client, mcast, udp need nothing that could be looked for.
}

std::string describe_hostdev(const xml_node& node) {
  const std::string type = attribute(node, "type");
  const xml_node source = node.child("source");
  const xml_node address = source.child("address");
  if (type == "pci") {
    return fmt::format("PCI {:04x}:{:02x}:{:02x}.{:x}", address.attribute("domain").as_uint(),
                       address.attribute("bus").as_uint(), address.attribute("slot").as_uint(),
                       address.attribute("function").as_uint());
  }
  if (type == "usb") {
    return fmt::format("USB {}:{}", attribute(source.child("vendor"), "id"),
                       attribute(source.child("product"), "id"));
  }
  if (type == "mdev") return "mediated device " + attribute(address, "uuid");
  if (type == "scsi") return "SCSI " + attribute(source.child("adapter"), "name");
  return type.empty() ? attribute(node, "mode") : type;
}

std::string serialise(const xml_document& document) {
  std::ostringstream out;
  document.save(out, "  ", pugi::format_raw | pugi::format_no_declaration, pugi::encoding_utf8);
  return out.str();
}

void remove_all(xml_node& node, const char* name) {
  while (node.remove_child(name)) {
  }
}

void set(xml_node node, const char* name, const std::string& value) {
  xml_attribute attribute = node.attribute(name);
  if (!attribute) attribute = node.append_attribute(name);
  attribute.set_value(value.c_str());
}

void point_at(xml_node disk, const TargetDisk& target, bool live) {
  // What is in <source> beside the place: labels are the administrator's and stay; indices, slices,
  // reservations and pools belong to the old place.
  xml_node old = disk.child("source");
  xml_node fresh = old ? disk.insert_child_before("source", old)
                       : disk.insert_child_before("source", disk.child("target"));
  for (xml_node label : old.children("seclabel")) fresh.append_copy(label);
  fresh.append_attribute(target.block_device ? "dev" : "file").set_value(target.path.c_str());
  if (old) disk.remove_child(old);
  set(disk, "type", target.block_device ? "block" : "file");

  xml_node driver = disk.child("driver");
  if (!driver) {
    driver = disk.insert_child_before("driver", fresh);
    driver.append_attribute("name").set_value("qemu");
  }
  if (!target.format.empty()) {
    set(driver, "type", target.format);
    // The cache of qcow2's metadata means nothing to another format.
    if (target.format != "qcow2") remove_all(driver, "metadata_cache");
  }
  remove_all(disk, "backingStore");
  remove_all(disk, "mirror");
  // An empty <backingStore/> says that there is none: libvirt need not look into an image that is
  // still being written when it starts the target's QEMU.
  if (live) disk.insert_child_after("backingStore", fresh);
}

void take_medium_out(xml_node disk) {
  remove_all(disk, "source");
  remove_all(disk, "backingStore");
  set(disk, "type", "file");
}

}  // namespace

Status parse_definition(const std::string& xml, GuestInfo& guest) {
  xml_document document;
  DROVER_TRY(load(xml, document));
  const xml_node domain = document.child("domain");
  guest.domain_type = attribute(domain, "type");
  guest.name = text(domain.child("name"));
  guest.uuid = text(domain.child("uuid"));
  guest.memory = memory_of(domain.child("memory"));
  guest.vcpus = domain.child("vcpu").text().as_uint();

  const xml_node os = domain.child("os");
  guest.arch = attribute(os.child("type"), "arch");
  guest.machine = attribute(os.child("type"), "machine");
  guest.firmware_loader = text(os.child("loader"));
  guest.firmware_nvram = text(os.child("nvram"));
  guest.nvram_template = attribute(os.child("nvram"), "template");

  guest.boot_files.clear();
  for (const char* name : {"kernel", "initrd", "dtb"}) {
    if (std::string path = text(os.child(name)); !path.empty()) {
      guest.boot_files.push_back(std::move(path));
    }
  }
  for (const xml_node table : os.child("acpi").children("table")) {
    guest.boot_files.push_back(text(table));
  }

  if (const xml_node cpu = domain.child("cpu")) {
    guest.cpu_mode = cpu.attribute("mode").as_string("custom");
    guest.cpu_model = text(cpu.child("model"));
    std::ostringstream out;
    cpu.print(out, "", pugi::format_raw);
    guest.cpu_xml = out.str();
  }

  const xml_node devices = domain.child("devices");
  guest.emulator = text(devices.child("emulator"));
  guest.disks.clear();
  for (const xml_node node : devices.children("disk")) {
    GuestDisk disk = parse_disk(node);
    if (disk.kind == DiskKind::VhostUser) guest.vhost_user.push_back("disk " + disk.target);
    if (disk.kind == DiskKind::VhostVdpa) guest.vdpa.push_back("disk " + disk.target);
    guest.disks.push_back(std::move(disk));
  }
  for (const xml_node node : devices.children("interface")) parse_interface(node, guest);
  for (const xml_node node : devices.children("hostdev")) {
    guest.host_devices.push_back(describe_hostdev(node));
  }
  for (const xml_node node : devices.children("filesystem")) {
    guest.filesystems.push_back(attribute(node.child("target"), "dir"));
  }
  for (const xml_node node : devices.children("shmem")) {
    guest.shared_memory.push_back(attribute(node, "name"));
  }
  for (const xml_node node : devices.children("memory")) {
    const std::string model = attribute(node, "model");
    if (model == "nvdimm" || model == "virtio-pmem") {
      guest.shared_memory.push_back(model + " " + text(node.child("source").child("path")));
    }
  }
  for (const xml_node node : devices.children("tpm")) {
    const xml_node backend = node.child("backend");
    if (attribute(backend, "type") == "passthrough") {
      guest.passthrough_tpm.push_back(attribute(backend.child("device"), "path"));
    } else {
      guest.emulated_tpm = true;
    }
  }
  if (guest.uuid.empty() || guest.name.empty()) {
    return fail(Code::InvalidArgument, "reading a guest's definition: it has no name or no UUID");
  }
  return {};
}

namespace {
xml_node find_disk(const xml_document& document, std::string_view disk) {
  for (const xml_node node : document.child("domain").child("devices").children("disk")) {
    if (disk == node.child("target").attribute("dev").value()) return node;
  }
  return {};
}
}  // namespace

unsigned disk_source_index(const std::string& xml, std::string_view disk) {
  xml_document document;
  if (!load(xml, document)) return 0;
  return find_disk(document, disk).child("source").attribute("index").as_uint();
}

std::string disk_alias(const std::string& xml, std::string_view disk) {
  xml_document document;
  if (!load(xml, document)) return {};
  return attribute(find_disk(document, disk).child("alias"), "name");
}

std::optional<DiskMirror> disk_mirror(const std::string& xml, std::string_view disk) {
  xml_document document;
  if (!load(xml, document)) return std::nullopt;
  const xml_node mirror = find_disk(document, disk).child("mirror");
  if (attribute(mirror, "job") != "copy") return std::nullopt;
  DiskMirror out;
  const xml_node source = mirror.child("source");
  for (const char* name : {"file", "dev"}) {
    if (out.path.empty()) out.path = attribute(source, name);
  }
  out.ready = attribute(mirror, "ready") == "yes";
  return out;
}

std::string copy_element(const std::string& xml, const TargetDisk& copy) {
  xml_document document;
  if (!load(xml, document)) return {};
  const xml_node old = find_disk(document, copy.disk);
  if (!old) return {};
  xml_document out;
  xml_node disk = out.append_child("disk");
  set(disk, "type", copy.block_device ? "block" : "file");
  set(disk.append_child("driver"), "type", copy.format);
  xml_node source = disk.append_child("source");
  set(source, copy.block_device ? "dev" : "file", copy.path);
  for (const xml_node label : old.child("source").children("seclabel")) source.append_copy(label);
  return serialise(out);
}

std::vector<ChainLink> disk_chain(const std::string& xml, std::string_view disk) {
  std::vector<ChainLink> out;
  xml_document document;
  if (!load(xml, document)) return out;
  const xml_node top = find_disk(document, disk);
  const auto add = [&](const xml_node& source, const std::string& format) {
    std::string path = attribute(source, "file");
    if (path.empty()) path = attribute(source, "dev");
    if (!path.empty()) out.push_back({std::move(path), format});
  };
  add(top.child("source"), attribute(top.child("driver"), "type"));
  for (xml_node link = top.child("backingStore"); link; link = link.child("backingStore")) {
    add(link.child("source"), attribute(link.child("format"), "type"));
  }
  return out;
}

Result<std::string> rewrite_definition(const std::string& xml, const Rewrite& rewrite) {
  xml_document document;
  DROVER_TRY(load(xml, document));
  xml_node domain = document.child("domain");
  domain.remove_attribute("id");

  for (const TargetDisk& target : rewrite.disks) {
    const xml_node disk = find_disk(document, target.disk);
    if (disk) {
      point_at(disk, target, rewrite.live);
    } else if (rewrite.live) {
      return fail(Code::NotFound,
                  fmt::format("guest {} has no disk {}", text(domain.child("name")), target.disk));
    }
  }
  for (const std::string& name : rewrite.eject) {
    const xml_node disk = find_disk(document, name);
    if (!disk) continue;
    const DiskDevice device = device_of(disk);
    if (device != DiskDevice::Cdrom && device != DiskDevice::Floppy) {
      return fail(Code::InvalidArgument,
                  fmt::format("disk {} of guest {} has no medium that could be taken out", name,
                              text(domain.child("name"))));
    }
    take_medium_out(disk);
  }
  for (xml_node disk : domain.child("devices").children("disk")) {
    disk.child("source").remove_attribute("index");
    for (xml_node chain = disk.child("backingStore"); chain; chain = chain.child("backingStore")) {
      chain.remove_attribute("index");
      chain.child("source").remove_attribute("index");
    }
  }
  return serialise(document);
}

Result<std::string> libvirt_uri_of(const std::string& ssh_destination) {
  std::string rest = ssh_destination;
  std::string port;
  constexpr std::string_view kScheme = "ssh://";
  const bool uri = rest.starts_with(kScheme);
  if (uri) rest.erase(0, kScheme.size());
  std::string user;
  if (const auto at = rest.rfind('@'); at != std::string::npos) {
    user = rest.substr(0, at + 1);
    rest.erase(0, at + 1);
  }
  if (rest.starts_with('[')) {
    const auto end = rest.find(']');
    if (end == std::string::npos)
      rest.clear();
    else if (end + 1 < rest.size()) {
      port = rest.substr(end + 1);
      rest.resize(end + 1);
    }
  } else if (std::count(rest.begin(), rest.end(), ':') > 1) {
    rest = "[" + rest + "]";
  } else if (uri) {
    if (const auto colon = rest.find(':'); colon != std::string::npos) {
      port = rest.substr(colon);
      rest.resize(colon);
    }
  }
  const bool port_ok =
      port.empty() || (uri && port.size() > 1 && port[0] == ':' &&
                       port.find_first_not_of("0123456789", 1) == std::string::npos);
  if (rest.empty() || rest == "[]" || rest.starts_with('-') || user.starts_with('-') || !port_ok ||
      rest.find_first_of("/?# \t\n") != std::string::npos ||
      user.find_first_of("/?# \t\n") != std::string::npos) {
    return fail(Code::InvalidArgument,
                fmt::format("'{}' is not an SSH destination", ssh_destination),
                "HOST, USER@HOST or ssh://USER@HOST:PORT");
  }
  return "qemu+ssh://" + user + rest + port + "/system?no_tty=1";
}

bool goes_by_ssh(std::string_view libvirt_uri) {
  const std::string_view scheme = libvirt_uri.substr(0, libvirt_uri.find("://"));
  return scheme.ends_with("+ssh") || scheme.find("+libssh") != std::string_view::npos;
}

}  // namespace drover::memmig
