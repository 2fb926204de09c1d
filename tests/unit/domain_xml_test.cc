// SPDX-License-Identifier: Apache-2.0
//
// The samples in tests/data/domains are libvirt's own words (9.0): "rich" was defined and dumped,
// "chain" is a guest that ran, seen live, migratable (as the target gets it) and inactive.
#include "memmig/domain_xml.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <pugixml.hpp>
#include <sstream>
#include <string>

namespace drover::memmig {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

std::string sample(const std::string& name) {
  std::ifstream file(std::string(DROVER_TEST_DATA) + "/domains/" + name + ".xml");
  EXPECT_TRUE(file) << name;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

GuestInfo parsed(const std::string& xml) {
  GuestInfo guest;
  const Status status = parse_definition(xml, guest);
  EXPECT_TRUE(status) << status.error().message;
  return guest;
}

std::string rewritten(const std::string& xml, const Rewrite& rewrite) {
  auto result = rewrite_definition(xml, rewrite);
  EXPECT_TRUE(result) << result.error().message;
  return result.value_or("");
}

// The <disk> element as text, without its address.
std::string disk_text(const std::string& xml, const char* target) {
  pugi::xml_document document;
  EXPECT_TRUE(document.load_string(xml.c_str()));
  for (pugi::xml_node disk : document.child("domain").child("devices").children("disk")) {
    if (disk.child("target").attribute("dev").value() != std::string_view(target)) continue;
    disk.remove_child("address");
    std::ostringstream out;
    disk.print(out, "", pugi::format_raw);
    return out.str();
  }
  return {};
}

// Everything but the disks.
std::string without_disks(const std::string& xml) {
  pugi::xml_document document;
  EXPECT_TRUE(document.load_string(xml.c_str()));
  pugi::xml_node devices = document.child("domain").child("devices");
  while (devices.remove_child("disk")) {
  }
  document.child("domain").remove_attribute("id");
  std::ostringstream out;
  document.save(out, "", pugi::format_raw | pugi::format_no_declaration);
  return out.str();
}

std::string wrap(const std::string& devices, const std::string& more = "") {
  return "<domain type='kvm'><name>x</name><uuid>00000000-0000-4000-8000-000000000001</uuid>" +
         more + "<devices>" + devices + "</devices></domain>";
}

constexpr const char* kCopied = R"(<domain type='kvm'><name>web1</name>
<uuid>00000000-0000-4000-8000-000000000001</uuid><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
 <source file='/mnt/a/web1.qcow2' index='1'><seclabel model='dac' relabel='no'/></source>
 <backingStore type='file' index='3'><format type='raw'/><source file='/mnt/a/base.raw'/>
  <backingStore/></backingStore>
 <mirror type='file' file='/mnt/b/web1.qcow2' format='qcow2' job='copy' ready='yes'>
  <format type='qcow2'/><source file='/mnt/b/web1.qcow2' index='5'/></mirror>
 <target dev='vda' bus='virtio'/></disk>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg0/x'/>
 <mirror type='file' job='active-commit'><source file='/x'/></mirror>
 <target dev='vdb' bus='virtio'/></disk></devices></domain>)";

TEST(DomainXml, SeesTheCopyOfADisk) {
  const auto mirror = disk_mirror(kCopied, "vda");
  ASSERT_TRUE(mirror.has_value());
  EXPECT_EQ(mirror->path, "/mnt/b/web1.qcow2");
  EXPECT_TRUE(mirror->ready);
  EXPECT_FALSE(disk_mirror(kCopied, "vdb").has_value()) << "a job of another kind";
  EXPECT_FALSE(disk_mirror(kCopied, "vdc").has_value());
}

TEST(DomainXml, TheElementForACopyHasThePlaceAndTheLabels) {
  EXPECT_EQ(copy_element(kCopied, {"vda", "/mnt/b/a&b.raw", "raw", false}),
            "<disk type=\"file\"><driver type=\"raw\"/><source file=\"/mnt/b/a&amp;b.raw\">"
            "<seclabel model=\"dac\" relabel=\"no\"/></source></disk>");
  EXPECT_EQ(copy_element(kCopied, {"vdb", "/dev/vg0/y", "raw", true}),
            "<disk type=\"block\"><driver type=\"raw\"/><source dev=\"/dev/vg0/y\"/></disk>");
  EXPECT_EQ(copy_element(kCopied, {"vdc", "/x", "raw", false}), "");
}

TEST(DomainXml, ListsADisksChain) {
  const auto chain = disk_chain(kCopied, "vda");
  ASSERT_EQ(chain.size(), 2U);
  EXPECT_EQ(chain[0].path, "/mnt/a/web1.qcow2");
  EXPECT_EQ(chain[1].path, "/mnt/a/base.raw");
  EXPECT_EQ(chain[1].format, "raw");
  EXPECT_EQ(disk_chain(kCopied, "vdb").at(0).path, "/dev/vg0/x");
}

TEST(DomainXml, ReadsTheGuest) {
  const GuestInfo guest = parsed(sample("rich-inactive"));
  EXPECT_EQ(guest.name, "rich");
  EXPECT_EQ(guest.uuid, "3c1f3a5e-6d57-4f6e-9a25-0d0a3c1e7b11");
  EXPECT_EQ(guest.memory, 2_GiB);
  EXPECT_EQ(guest.vcpus, 3U);
  EXPECT_EQ(guest.domain_type, "qemu");
  EXPECT_EQ(guest.arch, "x86_64");
  EXPECT_EQ(guest.machine, "pc-q35-7.2");
  EXPECT_EQ(guest.emulator, "/usr/bin/qemu-system-x86_64");
  EXPECT_EQ(guest.firmware_loader, "/usr/share/OVMF/OVMF_CODE_4M.fd");
  EXPECT_EQ(guest.firmware_nvram, "/var/lib/libvirt/qemu/nvram/rich_VARS.fd");
  EXPECT_EQ(guest.nvram_template, "/usr/share/OVMF/OVMF_VARS_4M.fd");
  EXPECT_EQ(guest.cpu_mode, "host-model");
  EXPECT_THAT(guest.cpu_xml, HasSubstr("<cpu mode=\"host-model\""));
}

TEST(DomainXml, ReadsTheDisks) {
  const GuestInfo guest = parsed(sample("rich-inactive"));
  const GuestDisk* disk = guest.disk("vda");
  ASSERT_NE(disk, nullptr);
  EXPECT_EQ(disk->kind, DiskKind::File);
  EXPECT_EQ(disk->device, DiskDevice::Disk);
  EXPECT_EQ(disk->path, "/var/lib/libvirt/images/rich & famous.qcow2");
  EXPECT_EQ(disk->format, "qcow2");
  EXPECT_EQ(disk->bus, "virtio");
  EXPECT_EQ(disk->cache, "none");
  EXPECT_EQ(disk->serial, "S-1");
  EXPECT_TRUE(disk->throttled);
  EXPECT_TRUE(disk->iothread);
  EXPECT_FALSE(disk->readonly || disk->shareable || disk->transient || disk->encrypted ||
               disk->backing_chain || disk->slice);

  EXPECT_EQ(guest.disk("vdb")->kind, DiskKind::Block);
  EXPECT_EQ(guest.disk("vdb")->path, "/dev/vg0/rich");
  EXPECT_EQ(guest.disk("sda")->kind, DiskKind::Volume);
  EXPECT_EQ(guest.disk("sda")->pool, "default");
  EXPECT_EQ(guest.disk("sda")->volume, "rich-3.raw");
  EXPECT_TRUE(guest.disk("sda")->shareable);
  EXPECT_EQ(guest.disk("vdc")->kind, DiskKind::Network);
  EXPECT_EQ(guest.disk("sdb")->device, DiskDevice::Lun);
  EXPECT_TRUE(guest.disk("vdd")->encrypted);
  EXPECT_TRUE(guest.disk("vde")->slice);
  EXPECT_TRUE(guest.disk("vde")->readonly);
  EXPECT_EQ(guest.disk("sdc")->device, DiskDevice::Cdrom);
  EXPECT_EQ(guest.disk("sdc")->path, "/srv/iso/cloud-init.iso");
  EXPECT_TRUE(guest.disk("sdc")->readonly);
  EXPECT_EQ(guest.disk("sdd")->kind, DiskKind::None);
  EXPECT_EQ(guest.disk("vdz"), nullptr);
}

TEST(DomainXml, ReadsWhatCannotMove) {
  const GuestInfo guest = parsed(sample("rich-inactive"));
  EXPECT_THAT(guest.networks, ElementsAre("default"));
  EXPECT_THAT(guest.bridges, ElementsAre("br0"));  // once, though two cards are on it
  EXPECT_THAT(guest.interfaces, ElementsAre("eno1"));
  EXPECT_THAT(guest.host_devices, ElementsAre("PCI 0000:3b:00.1", "USB 0x1234:0xabcd"));
  EXPECT_THAT(guest.filesystems, ElementsAre("share"));
  EXPECT_THAT(guest.shared_memory, ElementsAre("ivsh"));
  EXPECT_FALSE(guest.emulated_tpm);
}

TEST(DomainXml, ReadsRareDevices) {
  const GuestInfo guest = parsed(wrap(
      "<disk type='vhostuser' device='disk'><target dev='vda'/></disk>"
      "<disk type='vhostvdpa' device='disk'><target dev='vdb'/></disk>"
      "<disk type='nvme' device='disk'><target dev='vdc'/></disk>"
      "<disk type='dir' device='floppy'><source dir='/x'/><target dev='fda'/></disk>"
      "<disk type='file' device='disk'><source file='/t'/><target dev='vdd'/><transient/></disk>"
      "<disk type='file' device='disk'><driver type='raw'/><source file='/l'/><target dev='vde'/>"
      "<encryption format='luks'/></disk>"
      "<interface type='vhostuser'><mac address='52:54:00:00:00:09'/></interface>"
      "<interface type='vdpa'><mac address='52:54:00:00:00:0a'/></interface>"
      "<interface type='hostdev'><mac address='52:54:00:00:00:0b'/></interface>"
      "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
      "<tpm model='tpm-crb'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
      "<memory model='nvdimm'><source><path>/pm</path></source></memory>"
      "<memory model='dimm'/>",
      "<memory unit='MB'>100</memory><os><kernel>/k</kernel><initrd>/i</initrd></os>"));
  EXPECT_EQ(guest.disk("vda")->kind, DiskKind::VhostUser);
  EXPECT_EQ(guest.disk("vdb")->kind, DiskKind::VhostVdpa);
  EXPECT_EQ(guest.disk("vdc")->kind, DiskKind::Nvme);
  EXPECT_EQ(guest.disk("fda")->kind, DiskKind::Directory);
  EXPECT_TRUE(guest.disk("vdd")->transient);
  EXPECT_EQ(guest.disk("vdd")->format, "raw");  // what libvirt takes it for when nothing is said
  EXPECT_TRUE(guest.disk("vde")->encrypted);
  EXPECT_THAT(guest.vhost_user, ElementsAre("disk vda", "network card 52:54:00:00:00:09"));
  EXPECT_THAT(guest.vdpa, ElementsAre("disk vdb", "network card 52:54:00:00:00:0a"));
  EXPECT_THAT(guest.host_devices, ElementsAre("network card 52:54:00:00:00:0b"));
  EXPECT_THAT(guest.passthrough_tpm, ElementsAre("/dev/tpm0"));
  EXPECT_TRUE(guest.emulated_tpm);
  EXPECT_THAT(guest.shared_memory, ElementsAre("nvdimm /pm"));
  EXPECT_EQ(guest.memory, Length(100'000'000));
  EXPECT_THAT(guest.boot_files, ElementsAre("/k", "/i"));
}

TEST(DomainXml, ReadsARunningGuest) {
  const std::string live = sample("chain-live");
  const GuestInfo guest = parsed(live);
  EXPECT_TRUE(guest.disk("vda")->backing_chain);
  EXPECT_FALSE(guest.disk("vdb")->backing_chain);
  EXPECT_TRUE(guest.disk("vdb")->copy_on_read);
  EXPECT_EQ(disk_source_index(live, "vda"), 6U);
  EXPECT_EQ(disk_source_index(live, "vdc"), 4U);
  EXPECT_EQ(disk_source_index(live, "sdb"), 0U);  // empty
  EXPECT_EQ(disk_source_index(live, "vdz"), 0U);
  EXPECT_EQ(disk_alias(live, "vda"), "virtio-disk0");
  EXPECT_EQ(disk_alias(live, "sda"), "sata0-0-0");
}

TEST(DomainXml, RefusesWhatIsNotADefinition) {
  GuestInfo guest;
  for (const char* text : {"", "<", "no", "<domain><name>x</name>", "<network/>", "<domain/>"}) {
    const Status status = parse_definition(text, guest);
    ASSERT_FALSE(status) << text;
    EXPECT_EQ(status.error().code, Code::InvalidArgument);
    EXPECT_EQ(disk_source_index(text, "vda"), 0U);
  }
  EXPECT_FALSE(rewrite_definition("<", {}));
}

TEST(DomainXml, LiveDefinitionHasTheTargetsPathsAndNoChain) {
  const std::string xml = rewritten(
      sample("chain-migratable"),
      {.disks = {{"vda", "/new/a b.qcow2", "qcow2", false}, {"vdb", "/new/v1.raw", "raw", false}},
       .live = true});
  EXPECT_EQ(disk_text(xml, "vda"),
            "<disk type=\"file\" device=\"disk\"><driver name=\"qemu\" type=\"qcow2\"/>"
            "<source file=\"/new/a b.qcow2\"/><backingStore/><target dev=\"vda\" bus=\"virtio\"/>"
            "</disk>");
  // A pool's volume becomes a file: the target need not have the pool.
  EXPECT_EQ(disk_text(xml, "vdb"),
            "<disk type=\"file\" device=\"disk\">"
            "<driver name=\"qemu\" type=\"raw\" copy_on_read=\"on\"/>"
            "<source file=\"/new/v1.raw\"/><backingStore/><target dev=\"vdb\" bus=\"virtio\"/>"
            "</disk>");
  // Nothing else is touched: what the guest sees may not change.
  EXPECT_EQ(without_disks(xml), without_disks(sample("chain-migratable")));
  EXPECT_EQ(disk_text(xml, "sda"), disk_text(sample("chain-migratable"), "sda"));
  EXPECT_EQ(disk_text(xml, "sdb"), disk_text(sample("chain-migratable"), "sdb"));
}

TEST(DomainXml, ChainAndNumbersOfALiveDefinitionAreDropped) {
  const std::string xml = rewritten(
      sample("chain-live"), {.disks = {{"vda", "/new/vda.qcow2", "", false}}, .live = true});
  EXPECT_THAT(disk_text(xml, "vda"), HasSubstr("<source file=\"/new/vda.qcow2\"/><backingStore/>"));
  EXPECT_THAT(xml, Not(HasSubstr("mid.qcow2")));
  EXPECT_THAT(disk_text(xml, "vda"), Not(HasSubstr("index=")));
  EXPECT_THAT(disk_text(xml, "vdc"), Not(HasSubstr("index=")));
  EXPECT_THAT(xml, Not(HasSubstr("<domain type=\"qemu\" id=")));
}

TEST(DomainXml, PersistentDefinitionKeepsNoMarkOfTheChain) {
  const std::string xml =
      rewritten(sample("chain-inactive"), {.disks = {{"vda", "/new/vda.qcow2", "qcow2", false},
                                                     {"vdq", "/hot/plugged.raw", "raw", false}}});
  EXPECT_THAT(disk_text(xml, "vda"), Not(HasSubstr("backingStore")));
  EXPECT_THAT(disk_text(xml, "vda"), HasSubstr("/new/vda.qcow2"));
  EXPECT_THAT(xml, HasSubstr("hunter2"));  // secrets move too
}

TEST(DomainXml, FileBecomesDeviceAndDeviceBecomesFile) {
  const std::string xml =
      rewritten(sample("rich-inactive"), {.disks = {{"vda", "/dev/vg1/rich", "raw", true},
                                                    {"vdb", "/srv/rich-b.qcow2", "qcow2", false}}});
  const std::string vda = disk_text(xml, "vda");
  EXPECT_THAT(vda, HasSubstr("<disk type=\"block\""));
  EXPECT_THAT(vda, HasSubstr("<source dev=\"/dev/vg1/rich\">"));
  EXPECT_THAT(
      vda, HasSubstr("type=\"raw\" cache=\"none\" io=\"native\" discard=\"unmap\" iothread=\"1\""));
  EXPECT_THAT(vda, Not(HasSubstr("metadata_cache")));
  EXPECT_THAT(vda, HasSubstr("<seclabel"));  // the administrator's
  EXPECT_THAT(vda, HasSubstr("<iotune>"));
  EXPECT_THAT(vda, HasSubstr("<serial>S-1</serial>"));
  const std::string vdb = disk_text(xml, "vdb");
  EXPECT_THAT(vdb, HasSubstr("<disk type=\"file\""));
  EXPECT_THAT(vdb, HasSubstr("<source file=\"/srv/rich-b.qcow2\"/>"));
  EXPECT_THAT(vdb, HasSubstr("type=\"qcow2\""));
  EXPECT_EQ(without_disks(xml), without_disks(sample("rich-inactive")));
  EXPECT_THAT(xml, HasSubstr("keep &amp; carry &lt;this&gt;"));
}

TEST(DomainXml, SliceGoesWithItsFile) {
  const std::string xml = rewritten(
      sample("chain-migratable"), {.disks = {{"vdd", "/new/vdd.raw", "raw", false}}, .live = true});
  EXPECT_THAT(disk_text(xml, "vdd"), Not(HasSubstr("slice")));
}

TEST(DomainXml, MediumIsTakenOut) {
  const std::string xml = rewritten(sample("chain-migratable"), {.eject = {"sda"}, .live = true});
  EXPECT_EQ(disk_text(xml, "sda"),
            "<disk type=\"file\" device=\"cdrom\"><driver name=\"qemu\" type=\"raw\"/>"
            "<target dev=\"sda\" bus=\"sata\"/><readonly/></disk>");
  const auto wrong = rewrite_definition(sample("chain-migratable"), {.eject = {"vda"}});
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.error().code, Code::InvalidArgument);
}

TEST(DomainXml, DiskWithoutADriverGetsOne) {
  const std::string xml = rewritten(wrap("<disk type='file' device='disk'><source "
                                         "file='/a'/><target dev='vda' bus='virtio'/></disk>"),
                                    {.disks = {{"vda", "/b", "qcow2", false}}, .live = true});
  EXPECT_EQ(disk_text(xml, "vda"),
            "<disk type=\"file\" device=\"disk\"><driver name=\"qemu\" type=\"qcow2\"/>"
            "<source file=\"/b\"/><backingStore/><target dev=\"vda\" bus=\"virtio\"/></disk>");
}

TEST(DomainXml, DiskThatIsNotThereIsAnErrorInALiveDefinition) {
  const Rewrite rewrite{.disks = {{"vdz", "/x", "raw", false}}, .live = true};
  const auto result = rewrite_definition(sample("chain-migratable"), rewrite);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().code, Code::NotFound);
  EXPECT_THAT(result.error().message, HasSubstr("vdz"));
}

TEST(DomainXml, PathsAreQuoted) {
  const std::string xml = rewritten(
      sample("chain-migratable"), {.disks = {{"vda", "/a\"'<&>/b", "qcow2", false}}, .live = true});
  EXPECT_EQ(parsed(xml).disk("vda")->path, "/a\"'<&>/b");
}

TEST(LibvirtUri, GoesBySsh) {
  for (const char* uri : {"qemu+ssh://hostb/system?no_tty=1", "qemu+libssh://h/system", "qemu+libssh2://h/system"}) {
    EXPECT_TRUE(goes_by_ssh(uri)) << uri;
  }
  for (const char* uri : {"qemu:///system", "qemu+tls://ssh/system", "qemu+unix:///system?socket=/run/+ssh", ""}) {
    EXPECT_FALSE(goes_by_ssh(uri)) << uri;
  }
}

TEST(LibvirtUri, OfAnSshDestination) {
  const auto uri = [](const std::string& host) { return libvirt_uri_of(host).value_or("-"); };
  EXPECT_EQ(uri("hostb"), "qemu+ssh://hostb/system?no_tty=1");
  EXPECT_EQ(uri("root@host.example"), "qemu+ssh://root@host.example/system?no_tty=1");
  EXPECT_EQ(uri("ssh://root@hostb:2222"), "qemu+ssh://root@hostb:2222/system?no_tty=1");
  EXPECT_EQ(uri("192.0.2.7"), "qemu+ssh://192.0.2.7/system?no_tty=1");
  EXPECT_EQ(uri("fd00::2"), "qemu+ssh://[fd00::2]/system?no_tty=1");
  EXPECT_EQ(uri("root@[fd00::2]"), "qemu+ssh://root@[fd00::2]/system?no_tty=1");
  EXPECT_EQ(uri("ssh://[fd00::2]:22"), "qemu+ssh://[fd00::2]:22/system?no_tty=1");
  for (const char* wrong :
       {"", "-oProxyCommand=x", "a b", "host/../x", "host?x=y", "host#x", "ssh://", "ssh://h:port",
        "ssh://h:", "[fd00::2", "root@", "-x@host", "[]", "[fd00::2]x"}) {
    EXPECT_EQ(uri(wrong), "-") << wrong;
  }
}

}  // namespace
}  // namespace drover::memmig
