// SPDX-License-Identifier: Apache-2.0
#include "base/units.h"

#include <gtest/gtest.h>

namespace drover {
namespace {

TEST(ParseLength, ReadsBinaryMultiples) {
  EXPECT_EQ(parse_length("1000")->bytes(), 1000U);
  EXPECT_EQ(parse_length("1K")->bytes(), 1024U);
  EXPECT_EQ(parse_length("1.5GiB")->bytes(), 1536U << 20);
  EXPECT_EQ(parse_length("100mb")->bytes(), 100U << 20);
}

TEST(ParseLength, RefusesWhatIsNotASizeAndSaysWhy) {
  for (const char* text : {"", "x", "-1", "1Q", "1Kx", "9999999P", "nan"}) {
    const auto result = parse_length(text);
    ASSERT_FALSE(result.has_value()) << text;
    EXPECT_EQ(result.error().code, Code::InvalidArgument);
    EXPECT_NE(result.error().message.find(text), std::string::npos);
  }
}

TEST(FormatLength, UsesTheLargestUnitThatFits) {
  EXPECT_EQ(format_length(Length(512)), "512 B");
  EXPECT_EQ(format_length(3_GiB), "3.0 GiB");
}

TEST(Widen, RoundsOutwards) {
  EXPECT_EQ(widen({Offset(513), Length(1)}, Length(512)), (Extent{Offset(512), Length(512)}));
  EXPECT_EQ(widen({Offset(511), Length(2)}, Length(512)), (Extent{Offset(0), Length(1024)}));
}

}  // namespace
}  // namespace drover
