// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "cli/text.h"
#include "cli/values.h"

namespace drover::cli {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(ParseRate, CountsBytesBy1024) {
  EXPECT_EQ(parse_rate("100M")->bytes(), 100ULL << 20);
  EXPECT_EQ(parse_rate("100m")->bytes(), 100ULL << 20);
  EXPECT_EQ(parse_rate("1.5G")->bytes(), 1536ULL << 20);
  EXPECT_EQ(parse_rate("100MB")->bytes(), 100ULL << 20);
  EXPECT_EQ(parse_rate("100MiB/s")->bytes(), 100ULL << 20);
  EXPECT_EQ(parse_rate("512K/s")->bytes(), 512ULL << 10);
  EXPECT_EQ(parse_rate("1000000")->bytes(), 1000000U);
  EXPECT_EQ(parse_rate("1000000B/s")->bytes(), 1000000U);
  EXPECT_EQ(parse_rate("2T")->bytes(), 2ULL << 40);
}

TEST(ParseRate, CountsBitsBy1000) {
  EXPECT_EQ(parse_rate("1gbit")->bytes(), 125'000'000U);
  EXPECT_EQ(parse_rate("1Gbit/s")->bytes(), 125'000'000U);
  EXPECT_EQ(parse_rate("800mbit")->bytes(), 100'000'000U);
  EXPECT_EQ(parse_rate("2.5Gbit")->bytes(), 312'500'000U);
  EXPECT_EQ(parse_rate("8000000bit")->bytes(), 1'000'000U);
}

TEST(ParseRate, NoneIsNoLimit) {
  EXPECT_EQ(parse_rate("none")->bytes(), 0U);
  EXPECT_EQ(format_rate_setting(*parse_rate("none")), "none");
}

TEST(ParseRate, RefusesWhatIsNotARate) {
  for (const char* text :
       {"",    "M",     "x",      "-1M",    "+1M",   "1e6",    "0x10M", ".5M",
        "5.M", "1X",    "1MM",    "1 M",    " 1M",   "1M ",    "1M/h",  "inf",
        "nan", "1MiBs", "1mxbit", "1kgbit", "1ibit", "99999T", "1,5G",  "1M/s/s"}) {
    const auto result = parse_rate(text);
    ASSERT_FALSE(result.has_value()) << text;
    EXPECT_EQ(result.error().code, Code::InvalidArgument) << text;
    EXPECT_NE(result.error().message.find("'" + std::string(text) + "'"), std::string::npos)
        << text;
    EXPECT_FALSE(result.error().hint.empty()) << text;
  }
}

TEST(ParseRate, RefusesWhatCouldBeBitsOrBytes) {
  for (const char* text : {"100Mb", "100mb", "1Gb/s", "1000b"}) {
    const auto result = parse_rate(text);
    ASSERT_FALSE(result.has_value()) << text;
    EXPECT_EQ(result.error().message, "'" + std::string(text) + "' is not clear: bits or bytes?");
  }
}

TEST(ParseRate, RefusesALimitThatMustBeAMistake) {
  // virsh's --bandwidth 100 means MiB per second.
  EXPECT_EQ(parse_rate("100").error().message,
            "'100' is less than the smallest rate, 64.0 KiB per second");
  EXPECT_EQ(parse_rate("0").error().hint, "none means no limit");
  EXPECT_TRUE(parse_rate("64K").has_value());
}

TEST(FormatRateSetting, IsReadBackAsTheSame) {
  for (const char* text : {"64K", "100M", "3G", "1T", "100000001", "none"}) {
    EXPECT_EQ(format_rate_setting(*parse_rate(text)), text);
  }
}

TEST(ParseTime, NeedsAUnit) {
  EXPECT_EQ(*parse_time("300ms"), milliseconds(300));
  EXPECT_EQ(*parse_time("0.5s"), milliseconds(500));
  EXPECT_EQ(*parse_time("2s"), milliseconds(2000));
  EXPECT_EQ(*parse_time("1.5min"), milliseconds(90'000));
  EXPECT_EQ(*parse_time("0ms"), milliseconds(0));
  EXPECT_EQ(parse_time("300").error().message, "'300' has no unit");
}

TEST(ParseTime, RefusesWhatIsNotATime) {
  for (const char* text : {"", "ms", "-1s", "1h", "1 s", "1sec", "1S", "0x1s", "1e3ms", "0.5ms",
                           "2h", "3601s", "61min", "nan", "1ms "}) {
    const auto result = parse_time(text);
    ASSERT_FALSE(result.has_value()) << text;
    EXPECT_EQ(result.error().code, Code::InvalidArgument) << text;
  }
}

TEST(FormatTime, IsReadBackAsTheSame) {
  for (const char* text : {"500ms", "2s", "1ms", "0ms", "1500ms"}) {
    EXPECT_EQ(format_time(*parse_time(text)), text);
  }
}

TEST(ParseCount, TakesDigitsWithinTheRange) {
  EXPECT_EQ(*parse_count("16", {1, 16}), 16U);
  for (const char* text :
       {"", "0", "17", "-1", "+1", "1x", " 1", "0x1", "1.0", "99999999999999999999999"}) {
    const auto result = parse_count(text, {1, 16});
    ASSERT_FALSE(result.has_value()) << text;
    EXPECT_EQ(result.error().hint, "give a number from 1 to 16");
  }
}

TEST(ParseDisk, SplitsAtTheFirstEqualsSign) {
  EXPECT_EQ(*parse_disk("vda=/srv/a=b.raw"),
            std::pair(std::string("vda"), std::string("/srv/a=b.raw")));
  for (const char* text :
       {"", "vda", "=/x", "vda=", "vda=x.raw", "vda=./x", "/dev/vda=/x", "vda=/srv/"}) {
    EXPECT_FALSE(parse_disk(text).has_value()) << text;
  }
}

TEST(CheckHost, TakesWhatSshTakesAndNoOption) {
  for (const char* host : {"hostb", "root@hostb", "192.0.2.7", "2001:db8::7", "[::1]",
                           "h_1.example.org", "ssh://root@hostb:2222"}) {
    EXPECT_TRUE(check_host(host).has_value()) << host;
  }
  for (const char* host :
       {"", "-oProxyCommand=x", "host b", "a\nb", "qemu+ssh://hostb/system", "a/b"}) {
    EXPECT_FALSE(check_host(host).has_value()) << host;
  }
}

TEST(Format, ForPeople) {
  EXPECT_EQ(format_rate(110_MiB), "110.0 MiB/s");
  EXPECT_EQ(format_clock(seconds(25)), "0:25");
  EXPECT_EQ(format_clock(seconds(3599)), "59:59");
  EXPECT_EQ(format_clock(seconds(3722)), "1:02:02");
  EXPECT_EQ(format_clock(seconds(-1)), "0:00");
  EXPECT_EQ(format_span(milliseconds(61)), "61 ms");
  EXPECT_EQ(format_span(milliseconds(999)), "999 ms");
  EXPECT_EQ(format_span(milliseconds(59'999)), "59.9 s");
  EXPECT_EQ(format_span(milliseconds(60'000)), "1:00");
  EXPECT_EQ(format_count(0), "0");
  EXPECT_EQ(format_count(999), "999");
  EXPECT_EQ(format_count(1234567), "1,234,567");
  EXPECT_EQ(plural(0, "disk"), "no disks");
  EXPECT_EQ(plural(1, "disk"), "1 disk");
  EXPECT_EQ(plural(1200, "disk"), "1,200 disks");
}

TEST(Printable, EscapesWhatATerminalWouldObey) {
  EXPECT_EQ(printable("web1"), "web1");
  EXPECT_EQ(printable("a\x1b[2Jb"), "a\\x1b[2Jb");
  EXPECT_EQ(printable("a\nb\tc\rd"), "a\\nb\\tc\\x0dd");
  EXPECT_EQ(printable(std::string_view("a\0b", 3)), "a\\x00b");
  EXPECT_EQ(printable("\x7f"), "\\x7f");
  EXPECT_EQ(printable("\xc2\x9b"
                      "2J"),
            "\\u{009b}2J");  // a C1 control: CSI
  EXPECT_EQ(printable("a\xe2\x80\xae"
                      "b"),
            "a\\u{202e}b");  // right to left
  EXPECT_EQ(printable("gr\xc3\xbc\xc3\x9f"), "gr\xc3\xbc\xc3\x9f");
  EXPECT_EQ(printable("\xff\xc3"), "\\xff\\xc3");           // not UTF-8
  EXPECT_EQ(printable("\xc0\xaf"), "\\xc0\\xaf");           // overlong
  EXPECT_EQ(printable("\xed\xa0\x80"), "\\xed\\xa0\\x80");  // surrogate
}

TEST(PrintableLines, KeepsLinesAndIndentsThem) {
  EXPECT_EQ(printable_lines("a\nb\r\n\n  c\n", 2), "a\n  b\n    c");
  EXPECT_EQ(printable_lines("\x1b[31mred\n", 2), "\\x1b[31mred");
  EXPECT_EQ(printable_lines("", 2), "");
}

TEST(Clip, CountsColumnsNotBytes) {
  EXPECT_EQ(columns("gr\xc3\xbc\xc3\x9f"), 4U);
  EXPECT_EQ(columns("\xe4\xbd\xa0\xe5\xa5\xbd"), 4U);  // two wide characters
  EXPECT_EQ(columns("e\xcc\x81"), 1U);                 // e and a combining accent
  EXPECT_EQ(clip("0123456789", 10), "0123456789");
  EXPECT_EQ(clip("0123456789", 9), "012345...");
  EXPECT_EQ(clip("0123456789", 3), "012");
  EXPECT_EQ(clip("0123456789", 0), "");
  EXPECT_EQ(clip("\xe4\xbd\xa0\xe5\xa5\xbd", 3), "\xe4\xbd\xa0");  // never half a character
  EXPECT_EQ(padded("ab", 4), "ab  ");
  EXPECT_EQ(padded("abcdef", 4), "abcdef");
}

}  // namespace
}  // namespace drover::cli
