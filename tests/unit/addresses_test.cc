// SPDX-License-Identifier: Apache-2.0
//
// What is taken for a list of a target's addresses.
#include "mirror/addresses.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace drover::mirror {
namespace {

using testing::ElementsAre;

TEST(Addresses, NamesAndBothKindsOfAddresses) {
  EXPECT_THAT(*parse_addresses("hostb"), ElementsAre("hostb"));
  EXPECT_THAT(*parse_addresses("10.0.0.2,hostb-storage.example.org"),
              ElementsAre("10.0.0.2", "hostb-storage.example.org"));
  EXPECT_THAT(*parse_addresses("fd00::2,[fd00::3],fe80::1%eth0"),
              ElementsAre("fd00::2", "fd00::3", "fe80::1%eth0"));
  EXPECT_TRUE(parse_addresses("a,b,c,d,e,f,g,h"));
}

TEST(Addresses, WhatIsNoneIsRefused) {
  for (const char* bad : {"",
                          ",",
                          "a,",
                          ",a",
                          "a,,b",
                          "a b",
                          "-a",
                          ".a",
                          "a..b",
                          "a/b",
                          "host:22",
                          "10.0.0.2:22",
                          "[10.0.0.2]",
                          "[fd00::2]:22",
                          "[fd00::2",
                          "fd00::2]",
                          "300.0.0.1",
                          "10.0.0",
                          "10.0.0.2.3",
                          "1",
                          "fd00:::2",
                          "fe80::1%",
                          "fe80::1%a/b",
                          "a,b,c,d,e,f,g,h,i",
                          "h\xc3\xb6st",
                          "a;b"}) {
    const auto parsed = parse_addresses(bad);
    ASSERT_FALSE(parsed) << bad;
    EXPECT_EQ(parsed.error().code, Code::InvalidArgument);
  }
  EXPECT_FALSE(parse_addresses(std::string(254, 'a')));
  EXPECT_FALSE(parse_addresses(std::string(100000, ',')));
  EXPECT_FALSE(check_addresses({}));
}

TEST(Addresses, EachIsNamedOnce) {
  for (const char* twice : {"a,a", "Hostb,hostB", "hostb,hostb.", "10.0.0.2,b,10.0.0.2",
                            "fd00::2,fd00:0::0002", "fd00::2,[fd00::2]", "fe80::1%a,FE80::1%a"}) {
    EXPECT_FALSE(parse_addresses(twice)) << twice;
  }
  EXPECT_TRUE(parse_addresses("fe80::1%a,fe80::1%b"));
}

}  // namespace
}  // namespace drover::mirror
