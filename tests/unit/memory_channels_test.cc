// SPDX-License-Identifier: Apache-2.0
//
// How many connections the guest's memory takes (job/memory_channels.h).
#include "job/memory_channels.h"

#include <gtest/gtest.h>

namespace drover::job {
namespace {

TEST(MemoryChannels, AreAsManyAsWereAskedFor) {
  EXPECT_EQ(memory_channels(1, 64, Length()), 1U);
  EXPECT_EQ(memory_channels(5, 2, 100_MiB), 5U);
  EXPECT_EQ(memory_channels(100, 2, Length()), kMostMemoryChannels);
}

TEST(MemoryChannels, OfItselfAreMoreOnlyWhereThereAreCoresAndNoLimit) {
  EXPECT_EQ(memory_channels(0, 2, Length()), 1U);
  EXPECT_EQ(memory_channels(0, 7, Length()), 1U);
  EXPECT_EQ(memory_channels(0, 8, Length()), 2U);
  EXPECT_EQ(memory_channels(0, 64, 100_MiB), 1U) << "one connection carries what is allowed";
  EXPECT_EQ(memory_channels(0, 0, Length()), 1U) << "the cores are not known";
}

}  // namespace
}  // namespace drover::job
