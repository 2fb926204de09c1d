// SPDX-License-Identifier: Apache-2.0
//
// Anything a client may say instead of a handshake, or after one.
#include "tests/fuzz/nbd_conversation.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace drover::mirror;
  const FuzzInput input = read_input(data, size);
  check_any_pace(input.options, input.client);
  return 0;
}
