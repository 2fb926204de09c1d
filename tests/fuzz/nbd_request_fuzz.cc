// SPDX-License-Identifier: Apache-2.0
//
// Anything a client may say after a good handshake.
#include "tests/fuzz/nbd_conversation.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace drover::mirror;
  const FuzzInput input = read_input(data, size);
  Bytes client = handshake((input.choice & 1) != 0);
  client.insert(client.end(), input.client.begin(), input.client.end());
  check_any_pace(input.options, client);
  return 0;
}
