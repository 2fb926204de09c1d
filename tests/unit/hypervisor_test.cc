// SPDX-License-Identifier: Apache-2.0
//
// What can be said of the libvirt hypervisor without a hypervisor; the rest is
// tests/lab/test_memmig.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "memmig/libvirt_hypervisor.h"

namespace drover::memmig {
namespace {

using testing::HasSubstr;

TEST(LibvirtHypervisor, NoDaemonIsUnreachable) {
  for (int again = 0; again < 3; ++again) {  // the event loop starts and ends each time
    const auto hypervisor =
        connect_libvirt({.uri = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"});
    ASSERT_FALSE(hypervisor);
    EXPECT_EQ(hypervisor.error().code, Code::Unreachable) << hypervisor.error().message;
    EXPECT_THAT(hypervisor.error().message, HasSubstr("/nonexistent/libvirt-sock"));
    EXPECT_THAT(hypervisor.error().hint, HasSubstr("virsh"));
  }
}

TEST(LibvirtHypervisor, OnlyQemuWillDo) {
  const auto hypervisor = connect_libvirt({.uri = "test:///default"});
  ASSERT_FALSE(hypervisor);
  EXPECT_EQ(hypervisor.error().code, Code::Incompatible) << hypervisor.error().message;
}

TEST(LibvirtHypervisor, NonsenseUri) {
  const auto hypervisor = connect_libvirt({.uri = "no such uri"});
  ASSERT_FALSE(hypervisor);
  EXPECT_NE(hypervisor.error().message, "");
}

TEST(GuestInfo, FindsItsDisks) {
  GuestInfo guest;
  guest.disks.resize(2);
  guest.disks[0].target = "vda";
  guest.disks[1].target = "vdb";
  EXPECT_EQ(guest.disk("vdb"), &guest.disks[1]);
  EXPECT_EQ(guest.disk("vd"), nullptr);
}

TEST(Attached, NothingIsNothingAndEachPartCounts) {
  EXPECT_TRUE(Attached{}.nothing());
  Attached attached;
  attached.bitmaps.push_back({.disk = "vda", .generation = 1});
  attached.bitmaps.push_back({.disk = "vda", .generation = 2, .recording = true});
  attached.bitmaps.push_back({.disk = "vdb", .generation = 2});
  EXPECT_FALSE(attached.nothing());
  EXPECT_EQ(attached.recording("vda"), &attached.bitmaps[1]);
  EXPECT_EQ(attached.recording("vdb"), nullptr);
  Attached mirrored;
  mirrored.mirrors.push_back({.disk = "vda", .job = true});
  EXPECT_FALSE(mirrored.nothing());
  ASSERT_NE(mirrored.mirror("vda"), nullptr);
  EXPECT_FALSE(mirrored.mirror("vda")->alive()) << "its node is gone";
  EXPECT_EQ(mirrored.mirror("vdb"), nullptr);
  Attached scratch;
  scratch.scratch.emplace_back("vda");
  EXPECT_FALSE(scratch.nothing());
  Attached server;
  server.nbd_socket = "/socket";
  EXPECT_FALSE(server.nothing());
}

TEST(Names, AreComplete) {
  for (const GuestState state :
       {GuestState::Running, GuestState::Paused, GuestState::ShuttingDown, GuestState::ShutOff,
        GuestState::Crashed, GuestState::PmSuspended, GuestState::Unknown}) {
    EXPECT_NE(state_name(state), "");
  }
  EXPECT_EQ(event_name(GuestEvent::Kind::ConnectionLost), "connection-lost");
  EXPECT_EQ(kind_name(DiskKind::None), "empty drive");
  EXPECT_EQ(device_name(DiskDevice::Lun), "SCSI LUN");
}

}  // namespace
}  // namespace drover::memmig
