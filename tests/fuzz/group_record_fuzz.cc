// SPDX-License-Identifier: Apache-2.0
//
// What a journal may hand back as a record. Input: one byte (bit 0: put the right checksum, so that
// mutations get behind it), then the record. What decodes is of the right length, its masks name
// blocks that exist, and an arbiter that takes it offers only such blocks to be copied.
#include <xxhash.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "base/check.h"
#include "mirror/arbiter.h"
#include "mirror/frame.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace drover;
  using namespace drover::mirror;
  if (size < 1 + sizeof(std::uint64_t)) return 0;
  std::string bytes(data + 1, data + size);
  if ((data[0] & 1) != 0) {
    const std::size_t body = bytes.size() - sizeof(std::uint64_t);
    const std::uint64_t checksum = XXH3_64bits(bytes.data(), body);
    std::memcpy(bytes.data() + body, &checksum, sizeof checksum);
  }
  Arbiter::Options options;
  options.disk_size = 6_MiB + Length(5000);
  Arbiter arbiter(options);
  const bool good = arbiter.restore(0, bytes, (data[0] & 2) != 0).has_value();
  CHECK(arbiter.summary().left <= options.disk_size, "no more is left than there is");
  if (!good) CHECK(arbiter.summary().left == options.disk_size, "nothing of it is believed");
  Actions actions;
  while (const auto ticket = arbiter.start_copy(Instant())) {
    CHECK(ticket->extent.length > Length() && ticket->wanted > Length(), "something is wanted");
    CHECK(ticket->extent.end() <= Offset(options.disk_size.bytes()), "it lies on the disk");
    if (!arbiter.copy_read(ticket->id, actions)) break;
    arbiter.copy_acked(ticket->id);
  }
  CHECK(arbiter.synchronised() && arbiter.summary().left == Length(), "all of it can be copied");
  if (good) {
    Arbiter again(options);
    CHECK(again.restore(0, arbiter.take_record(0).bytes, false).has_value(),
          "what is written can be read");
  }
  return 0;
}
