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
