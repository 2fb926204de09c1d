// SPDX-License-Identifier: Apache-2.0
//
// Text for terminals: names of guests and files, and messages of other programs, are not to be
// trusted with a terminal. Pure functions, any thread.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace drover::cli {

// `text` on one line, without anything that could move the cursor, change colours or turn the
// direction of writing: such characters and bytes that are not UTF-8 become \n, \t, \xNN or
// \u{NNNN}.
std::string printable(std::string_view text);

// The same, but new lines stay, each further line indented by `indent` spaces. Empty lines and
// white space at the ends are dropped: the messages of other programs have those.
std::string printable_lines(std::string_view text, std::size_t indent);

// How many terminal columns printable text takes: wide characters two, combining ones none.
std::size_t columns(std::string_view text);

// At most `width` columns of printable text; what was cut shows as "..." if there is room for it.
std::string clip(std::string_view text, std::size_t width);

// `text`, with spaces behind it up to `width` columns.
std::string padded(std::string text, std::size_t width);

// Escape sequences, or none.
class Style {
 public:
  explicit Style(bool colours = false) : colours_(colours) {}
  [[nodiscard]] std::string bold(const std::string& text) const { return wrap("1", text); }
  [[nodiscard]] std::string good(const std::string& text) const { return wrap("32", text); }
  [[nodiscard]] std::string warning(const std::string& text) const { return wrap("33", text); }
  [[nodiscard]] std::string bad(const std::string& text) const { return wrap("1;31", text); }

 private:
  [[nodiscard]] std::string wrap(const char* code, const std::string& text) const {
    return colours_ ? "\x1b[" + std::string(code) + "m" + text + "\x1b[0m" : text;
  }
  bool colours_;
};

}  // namespace drover::cli
