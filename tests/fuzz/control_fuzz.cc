// SPDX-License-Identifier: Apache-2.0
//
// What the receiver reads as text: messages on a connection in pieces of any size, the hello,
// errors, digests, and the job on its standard input. Input: one byte (the size of the pieces),
// then the bytes; they are taken as a stream of messages, and whole as the text of each parser.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "base/check.h"
#include "mirror/receiver.h"
#include "mirror/session.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using namespace drover;
using namespace drover::mirror;

void parse(std::string_view text) {
  const auto json = parse_object(text, "the input");
  if (json) {
    if (const auto hello = hello_from_json(*json)) {
      CHECK(check_session_id("x").has_value(), "a good id");
      const auto again = hello_from_json(nlohmann::json::parse(
          hello_to_json(*hello).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)));
      CHECK(again.has_value(), "a hello that was taken is taken again");
    }
    (void)error_from_json(*json);
    (void)LaneDigest::from_json(*json);
    (void)get_bool(*json, "force", false);
    for (const auto& [name, value] : json->items()) (void)error_from_json(value);
  }
  (void)receiver_options_from_json(text);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::size_t piece = 1 + data[0];
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  MessageReader reader(kMaxHello);
  for (std::size_t at = 0; at < text.size();) {
    const auto space = reader.space();
    CHECK(!space.empty(), "there is always room for more");
    const std::size_t count = std::min({space.size(), piece, text.size() - at});
    std::memcpy(space.data(), text.data() + at, count);
    at += count;
    auto message = reader.received(count);
    if (!message) break;
    if (*message) {
      CHECK((*message)->size() <= kMaxHello, "no message is larger than the limit");
      parse(**message);
    }
  }
  parse(text);
  return 0;
}
