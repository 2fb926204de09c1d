// SPDX-License-Identifier: Apache-2.0
#include "memmig/dirty_bitmap.h"

#include <fmt/format.h>
#include <libnbd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "memmig/hypervisor.h"

namespace drover::memmig {
namespace {

constexpr Length kFine = 4_KiB;
constexpr Length kCoarse = 64_KiB;
// One question asks for so much of the disk: the most that NBD's 32 bits can say, aligned.
constexpr std::uint64_t kAsked = (std::uint64_t{1} << 32) - (std::uint64_t{1} << 20);
// QEMU looks at its memory only.
constexpr std::chrono::seconds kAnswer{30};
constexpr std::uint32_t kDirty = 1;  // the flag of qemu:dirty-bitmap

Length bitmap_size(Length disk_size, Length granularity) {
  return Length(disk_size.bytes() / granularity.bytes() / 8);
}

struct HandleCloser {
  void operator()(nbd_handle* handle) const { nbd_close(handle); }
};
using Handle = std::unique_ptr<nbd_handle, HandleCloser>;

Error nbd_error(Code code, std::string_view doing) {
  const char* said = nbd_get_error();
  return {code, fmt::format("{}: {}", doing, said == nullptr ? "" : said), {}, false};
}

// Lets libnbd work until `done` says so.
template <class Done>
Status wait_until(nbd_handle* handle, const std::string& doing, const Done& done) {
  const Instant deadline = now() + kAnswer;
  for (;;) {
    if (const int answer = done(); answer < 0) {
      return fail(nbd_error(Code::Io, doing));
    } else if (answer > 0) {
      return {};
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now());
    if (left.count() <= 0) return fail(Code::Unreachable, doing + ": no answer");
    if (nbd_poll(handle, static_cast<int>(left.count())) < 0) {
      return fail(nbd_error(Code::Unreachable, doing));
    }
  }
}

// What an answer is collected into.
struct Answer {
  ExtentUnion* found;
  std::uint64_t end;      // of the disk
  std::uint64_t covered;  // up to here
};

int extents_arrived(void* user, const char* /*context*/, std::uint64_t offset,
                    std::uint32_t* entries, std::size_t count, int* /*error*/) {
  auto& answer = *static_cast<Answer*>(user);
  for (std::size_t i = 0; i + 1 < count && offset < answer.end; i += 2) {
    const std::uint64_t length = std::min<std::uint64_t>(entries[i], answer.end - offset);
    if ((entries[i + 1] & kDirty) != 0 && length > 0) {
      answer.found->add({Offset(offset), Length(length)});
    }
    offset += length;
  }
  answer.covered = offset;
  return 0;
}

}  // namespace

std::string bitmap_name(std::string_view disk, std::uint64_t generation) {
  return fmt::format("{}{}-{}", kPrefix, disk, generation);
}

std::optional<BitmapName> parse_bitmap_name(std::string_view name) {
  if (!name.starts_with(kPrefix)) return {};
  name.remove_prefix(kPrefix.size());
  const std::size_t dash = name.rfind('-');
  if (dash == std::string_view::npos || dash == 0) return {};
  BitmapName parsed{std::string(name.substr(0, dash))};
  const std::string_view last = name.substr(dash + 1);
  const auto [end, error] =
      std::from_chars(last.data(), last.data() + last.size(), parsed.generation);
  if (error != std::errc() || end != last.data() + last.size()) return {};
  return parsed;
}

Length bitmap_granularity(Length disk_size) {
  if (bitmap_size(disk_size, kFine) <= kFineBitmap) return kFine;
  Length granularity = kCoarse;
  while (bitmap_size(disk_size, granularity) > kCoarseBitmap) granularity = granularity * 2;
  return granularity;
}

void ExtentUnion::add(const Extent& extent) {
  if (!extents_.empty()) {
    Extent& last = extents_.back();
    CHECK(extent.offset >= last.end(), "extents come in ascending order");
    if ((extent.offset - last.end()).bytes() <= gap_) {
      last.length = extent.end() - last.offset;
      return;
    }
  }
  extents_.push_back(extent);
  if (extents_.size() > max_) coarsen();
}

// To half of what is allowed, so that it does not have to be done again at once.
void ExtentUnion::coarsen() {
  while (extents_.size() > max_ / 2 && extents_.size() > 1) {
    gap_ = std::max<std::uint64_t>(gap_ * 2, kFine.bytes());
    std::size_t kept = 0;
    for (std::size_t i = 1; i < extents_.size(); ++i) {
      Extent& last = extents_[kept];
      if ((extents_[i].offset - last.end()).bytes() <= gap_) {
        last.length = extents_[i].end() - last.offset;
      } else {
        extents_[++kept] = extents_[i];
      }
    }
    extents_.resize(kept + 1);
  }
}

Result<std::vector<Extent>> read_bitmap_export(const std::string& unix_socket,
                                               const std::string& export_name,
                                               const std::string& bitmap) {
  const std::string doing = fmt::format("reading the dirty bitmap {}", bitmap);
  const std::string context = "qemu:dirty-bitmap:" + bitmap;
  const Handle nbd(nbd_create());
  if (!nbd || nbd_add_meta_context(nbd.get(), context.c_str()) < 0 ||
      nbd_set_export_name(nbd.get(), export_name.c_str()) < 0) {
    return fail(nbd_error(Code::Internal, doing));
  }
  if (nbd_aio_connect_unix(nbd.get(), unix_socket.c_str()) < 0) {
    return fail(nbd_error(Code::Unreachable, doing));
  }
  DROVER_TRY(wait_until(nbd.get(), doing, [&] {
    if (nbd_aio_is_dead(nbd.get()) == 1 || nbd_aio_is_closed(nbd.get()) == 1) return -1;
    return nbd_aio_is_ready(nbd.get());
  }));
  if (nbd_can_meta_context(nbd.get(), context.c_str()) != 1) {
    return fail(Code::NotFound, doing + ": QEMU does not offer it");
  }
  const std::int64_t size = nbd_get_size(nbd.get());
  if (size < 0) return fail(nbd_error(Code::Io, doing));

  ExtentUnion found;
  Answer answer{&found, static_cast<std::uint64_t>(size), 0};
  while (answer.covered < answer.end) {
    const std::uint64_t offset = answer.covered;
    const std::uint64_t asked = std::min(kAsked, answer.end - offset);
    const std::int64_t cookie = nbd_aio_block_status(
        nbd.get(), asked, offset, {.callback = extents_arrived, .user_data = &answer},
        NBD_NULL_COMPLETION, 0);
    if (cookie < 0) return fail(nbd_error(Code::Io, doing));
    DROVER_TRY(wait_until(nbd.get(), doing, [&] {
      return nbd_aio_command_completed(nbd.get(), static_cast<std::uint64_t>(cookie));
    }));
    if (answer.covered <= offset) {
      return fail(Code::Protocol, doing + ": QEMU's answer says nothing");
    }
  }
  return found.take();
}

}  // namespace drover::memmig
