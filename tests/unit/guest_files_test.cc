// SPDX-License-Identifier: Apache-2.0
#include "memmig/guest_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace drover::memmig {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Kind = FileUse::Kind;

constexpr const char* kGuest = R"(<domain type='kvm'><name>web1</name><uuid>u1</uuid>
<os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes'>/usr/share/CODE.fd</loader>
<nvram template='/usr/share/VARS.fd'>/mnt/a/web1_VARS.fd</nvram><kernel>/boot/vmlinuz</kernel></os>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/mnt/a/web1.qcow2'/>
<backingStore type='file'><format type='raw'/><source file='/mnt/a/base.raw'/></backingStore>
<target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/mnt/a/shared.raw'/>
<target dev='vdb' bus='virtio'/><shareable/></disk>
<disk type='file' device='disk'><driver name='qemu' type='vmdk'/><source file='/mnt/a/x.vmdk'/>
<target dev='vdc' bus='virtio'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
<source file='/mnt/a/debian.iso' startupPolicy='optional' index='3'><seclabel model='dac' relabel='no'/></source>
<backingStore/><target dev='sda' bus='sata' tray='open'/><readonly/></disk>
<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
<disk type='file' device='floppy'><source file='/mnt/a/f.img'/><target dev='fda'/></disk>
</devices></domain>)";

TEST(GuestFiles, AreAllThatADefinitionNames) {
  const auto uses = files_of_definition(kGuest);
  ASSERT_TRUE(uses.has_value()) << uses.error().to_string();
  std::vector<std::tuple<Kind, std::string, std::string>> found;
  for (const FileUse& use : *uses) found.emplace_back(use.kind, use.disk, use.path);
  EXPECT_THAT(found,
              ElementsAre(std::tuple(Kind::Disk, "vda", "/mnt/a/web1.qcow2"),
                          std::tuple(Kind::Backing, "vda", "/mnt/a/base.raw"),
                          std::tuple(Kind::Disk, "vdb", "/mnt/a/shared.raw"),
                          std::tuple(Kind::Disk, "vdc", "/mnt/a/x.vmdk"),
                          std::tuple(Kind::Medium, "sda", "/mnt/a/debian.iso"),
                          std::tuple(Kind::Floppy, "fda", "/mnt/a/f.img"),
                          std::tuple(Kind::Nvram, "NVRAM", "/mnt/a/web1_VARS.fd"),
                          std::tuple(Kind::Other, "NVRAM template", "/usr/share/VARS.fd"),
                          std::tuple(Kind::Other, "firmware", "/usr/share/CODE.fd"),
                          std::tuple(Kind::Other, "kernel or other boot file", "/boot/vmlinuz")));
  EXPECT_EQ((*uses)[0].stays, "") << "relocation makes it one image";
  EXPECT_THAT((*uses)[2].stays, HasSubstr("is shareable"));
  EXPECT_THAT((*uses)[3].stays, HasSubstr("is vmdk"));
}

TEST(GuestFiles, MemoryDirectoriesAndOutputAreAmongThem) {
  const auto uses = files_of_definition(R"(<domain><name>a</name><uuid>u</uuid><devices>
<memory model='nvdimm'><source><path>/mnt/a/pmem.raw</path></source></memory>
<filesystem type='mount'><source dir='/mnt/a/share'/><target dir='tag'/></filesystem>
<serial type='file'><source path='/mnt/a/serial.txt'/></serial>
<serial type='pty'><source path='/dev/pts/3'/><log file='/mnt/a/log.txt'/></serial>
</devices></domain>)");
  ASSERT_TRUE(uses.has_value());
  std::vector<std::string> paths;
  for (const FileUse& use : *uses) {
    EXPECT_EQ(use.kind, Kind::Other);
    paths.push_back(use.path);
  }
  EXPECT_THAT(
      paths, ElementsAre("/mnt/a/pmem.raw", "/mnt/a/share", "/mnt/a/serial.txt", "/mnt/a/log.txt"));
}

TEST(GuestFiles, ASnapshotNamesAllPathsThatAreInIt) {
  const auto paths = paths_in(R"(<domainsnapshot><name>one</name>
<memory snapshot='external' file='/mnt/a/memory'/><domain><os><nvram>/mnt/a/v.fd</nvram></os><devices>
<disk device='cdrom'><source file='/mnt/a/debian.iso'/></disk></devices></domain></domainsnapshot>)");
  ASSERT_TRUE(paths.has_value());
  EXPECT_THAT(*paths, ElementsAre("/mnt/a/debian.iso", "/mnt/a/memory", "/mnt/a/v.fd"));
  EXPECT_FALSE(paths_in("no xml <").has_value());
}

TEST(GuestFiles, AMediumIsChangedAndNothingElseOfItsDrive) {
  const auto element = medium_element(kGuest, "sda", "/mnt/b/debian & more.iso");
  ASSERT_TRUE(element.has_value());
  EXPECT_EQ(*element,
            "<disk type=\"file\" device=\"cdrom\"><driver name=\"qemu\" type=\"raw\"/>"
            "<source startupPolicy=\"optional\" file=\"/mnt/b/debian &amp; more.iso\">"
            "<seclabel model=\"dac\" relabel=\"no\"/></source>"
            "<target dev=\"sda\" bus=\"sata\" tray=\"open\"/><readonly/></disk>");
  EXPECT_EQ(medium_element(kGuest, "sdz", "/x").error().code, Code::NotFound);
}

TEST(GuestFiles, NvramIsRenamedInBothWaysToWriteItAndItsTemplateStays) {
  const auto plain = with_nvram(kGuest, "/mnt/b/v.fd");
  ASSERT_TRUE(plain.has_value());
  EXPECT_THAT(*plain, HasSubstr("<nvram template=\"/usr/share/VARS.fd\">/mnt/b/v.fd</nvram>"));
  EXPECT_THAT(*plain, Not(HasSubstr("web1_VARS")));
  constexpr const char* kNewer = R"(<domain><name>a</name><uuid>u</uuid><os>
<nvram type='file'><source file='/mnt/a/v.fd'/></nvram></os></domain>)";
  const auto uses = files_of_definition(kNewer);
  ASSERT_TRUE(uses.has_value() && uses->size() == 1);
  EXPECT_EQ(uses->front().path, "/mnt/a/v.fd");
  EXPECT_THAT(with_nvram(kNewer, "/mnt/b/v.fd").value(),
              HasSubstr("<nvram type=\"file\"><source file=\"/mnt/b/v.fd\"/></nvram>"));
  EXPECT_FALSE(with_nvram("<domain><os/></domain>", "/x").has_value());
  EXPECT_FALSE(with_nvram("no xml", "/x").has_value());
}

}  // namespace
}  // namespace drover::memmig
