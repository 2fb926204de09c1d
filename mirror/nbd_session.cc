// SPDX-License-Identifier: Apache-2.0
#include "mirror/nbd_session.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace drover::mirror {
namespace {

// --- numbers of doc/proto.md ---
constexpr std::uint64_t kGreetingMagic = 0x4e42444d41474943;  // "NBDMAGIC"
constexpr std::uint64_t kOptionMagic = 0x49484156454f5054;    // "IHAVEOPT"
constexpr std::uint64_t kOptionReplyMagic = 0x3e889045565a9;
constexpr std::uint32_t kRequestMagic = 0x25609513;
constexpr std::uint32_t kSimpleReplyMagic = 0x67446698;
constexpr std::uint32_t kStructuredReplyMagic = 0x668e33ef;

constexpr std::uint16_t kFlagFixedNewstyle = 1 << 0;  // the same bits from both sides
constexpr std::uint16_t kFlagNoZeroes = 1 << 1;

constexpr std::uint32_t kOptExportName = 1;
constexpr std::uint32_t kOptAbort = 2;
constexpr std::uint32_t kOptList = 3;
constexpr std::uint32_t kOptInfo = 6;
constexpr std::uint32_t kOptGo = 7;
constexpr std::uint32_t kOptStructuredReply = 8;

constexpr std::uint32_t kRepAck = 1;
constexpr std::uint32_t kRepServer = 2;
constexpr std::uint32_t kRepInfo = 3;
constexpr std::uint32_t kRepErrUnsup = 0x80000001;
constexpr std::uint32_t kRepErrInvalid = 0x80000003;
constexpr std::uint32_t kRepErrUnknown = 0x80000006;
constexpr std::uint32_t kRepErrTooBig = 0x80000009;

constexpr std::uint16_t kInfoExport = 0;
constexpr std::uint16_t kInfoName = 1;
constexpr std::uint16_t kInfoBlockSize = 3;

// FAST_ZERO: a client that sends it wants an error rather than zeroing that is slower than writing
// would be. Ours is a frame without payload at most, so every zeroing is fast. Without the flag
// QEMU's client answers such requests (BDRV_REQ_NO_FALLBACK) with ENOTSUP itself, and that would
// end the mirror job. No CAN_MULTI_CONN: one client. No SEND_DF, SEND_CACHE: nothing is read.
constexpr std::uint16_t kTransmissionFlags = 1 << 0      // HAS_FLAGS
                                             | 1 << 2    // SEND_FLUSH
                                             | 1 << 3    // SEND_FUA
                                             | 1 << 5    // SEND_TRIM
                                             | 1 << 6    // SEND_WRITE_ZEROES
                                             | 1 << 11;  // SEND_FAST_ZERO

constexpr std::uint16_t kCommandRead = 0;
constexpr std::uint16_t kCommandWrite = 1;
constexpr std::uint16_t kCommandDisconnect = 2;
constexpr std::uint16_t kCommandFlush = 3;
constexpr std::uint16_t kCommandTrim = 4;
constexpr std::uint16_t kCommandWriteZeroes = 6;
constexpr std::uint16_t kCommandBlockStatus = 7;

constexpr std::uint16_t kCommandFlagFua = 1 << 0;
constexpr std::uint16_t kCommandFlagNoHole = 1 << 1;
constexpr std::uint16_t kCommandFlagFastZero = 1 << 4;

constexpr std::uint32_t kErrorPerm = 1;
constexpr std::uint32_t kErrorIo = 5;
constexpr std::uint32_t kErrorNoMemory = 12;
constexpr std::uint32_t kErrorInvalid = 22;
constexpr std::uint32_t kErrorNoSpace = 28;
constexpr std::uint32_t kErrorOverflow = 75;
constexpr std::uint32_t kErrorNotSupported = 95;
constexpr std::uint32_t kErrorShutdown = 108;

constexpr std::uint16_t kReplyFlagDone = 1 << 0;
constexpr std::uint16_t kReplyTypeError = (1 << 15) + 1;

constexpr std::size_t kOptionHeaderSize = 16;
constexpr std::size_t kRequestSize = 28;

// What the client may align to. 1: QEMU sends a guest's write as it is; with more it would have to
// read what surrounds an unaligned one, and we have nothing to read from. Preferred: a page.
constexpr std::uint32_t kMinimumBlock = 1;
constexpr std::uint32_t kPreferredBlock = 4096;

template <class Integer>
constexpr Integer swap_bytes(Integer value) {
  if constexpr (sizeof value == 8) {
    return __builtin_bswap64(value);
  } else if constexpr (sizeof value == 4) {
    return __builtin_bswap32(value);
  } else {
    return __builtin_bswap16(value);
  }
}
static_assert(std::endian::native == std::endian::little, "drover runs on x86-64");

template <class Integer>
Integer get(std::span<const std::byte> bytes, std::size_t at) {
  CHECK(at + sizeof(Integer) <= bytes.size(), "a field outside its message");
  Integer value = 0;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return swap_bytes(value);
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::uint32_t nbd_error(int errno_value) {
  switch (errno_value) {
    case 0: return 0;
    case EPERM:
    case EACCES:
    case EROFS: return kErrorPerm;
    case ENOMEM: return kErrorNoMemory;
    case EINVAL: return kErrorInvalid;
    case ENOSPC:
    case EDQUOT:
    case EFBIG: return kErrorNoSpace;
    case EOVERFLOW: return kErrorOverflow;
    case ENOTSUP: return kErrorNotSupported;
    case ESHUTDOWN: return kErrorShutdown;
    default: return kErrorIo;
  }
}

}  // namespace

NbdSession::NbdSession(Options options)
    : options_(std::move(options)), next_serial_(options_.first_serial) {
  CHECK(options_.max_in_flight >= 1 && options_.max_in_flight <= kMaxSlots,
        "a session has 1 to kMaxSlots requests in flight");
  CHECK(options_.max_payload.bytes() >= kRequestSize && options_.max_payload.bytes() <= 0xffffffffU,
        "the maximum block size is a 32-bit number");
  CHECK(next_serial_ > 0, "id 0 names no request");
  slots_.resize(options_.max_in_flight);
  for (unsigned slot = options_.max_in_flight; slot > 0; --slot) {
    free_slots_.push_back(static_cast<std::uint16_t>(slot - 1));
  }
  put_integer(kGreetingMagic);
  put_integer(kOptionMagic);
  put_integer(static_cast<std::uint16_t>(kFlagFixedNewstyle | kFlagNoZeroes));
}

NbdSession::Step NbdSession::step(std::span<const std::byte> input) {
  Step step;
  // Every move that goes on consumes input or changes the state, so this ends.
  while (std::visit([&](auto state) { return move(state, input.subspan(step.consumed), step); },
                    state_)) {
  }
  CHECK(step.consumed <= input.size(), "more was consumed than was there");
  return step;
}

bool NbdSession::complete(std::uint64_t id, int errno_value) {
  const std::size_t slot = id & (kMaxSlots - 1);
  if (id == 0 || slot >= slots_.size() || slots_[slot].id != id) return false;
  reply(slots_[slot].cookie, nbd_error(errno_value));
  slots_[slot].id = 0;
  free_slots_.push_back(static_cast<std::uint16_t>(slot));
  CHECK(in_flight_ > 0, "a request was outstanding");
  --in_flight_;
  return true;
}

void NbdSession::take_output(std::vector<std::byte>& into) {
  into.clear();
  std::swap(into, output_);
}

// --- handshake ---

bool NbdSession::move(ClientFlags, Bytes input, Step& step) {
  if (input.size() < 4) return need_input(step, 4);
  const auto flags = get<std::uint32_t>(input, 0);
  step.consumed += 4;
  if ((flags & ~std::uint32_t{kFlagFixedNewstyle | kFlagNoZeroes}) != 0) {
    return broken(step, fmt::format("it set unknown handshake flags ({:#x})", flags));
  }
  fixed_newstyle_ = (flags & kFlagFixedNewstyle) != 0;
  no_zeroes_ = (flags & kFlagNoZeroes) != 0;
  state_ = OptionHeader{};
  return true;
}

bool NbdSession::move(OptionHeader, Bytes input, Step& step) {
  if (output_.size() > kMaxUnsent) {
    step.kind = Step::Kind::NeedOutput;
    return false;
  }
  if (input.size() < kOptionHeaderSize) return need_input(step, kOptionHeaderSize);
  const auto magic = get<std::uint64_t>(input, 0);
  const auto option = get<std::uint32_t>(input, 8);
  const auto length = get<std::uint32_t>(input, 12);
  step.consumed += kOptionHeaderSize;
  if (magic != kOptionMagic) return broken(step, "an option did not begin with its magic number");
  if (++options_seen_ > kMaxOptions) return broken(step, "it sent options without end");
  if (length > kMaxSkip) {
    return broken(step, fmt::format("option {} announced {} bytes", option, length));
  }
  if (length > kMaxOptionLength) {
    state_ = SkipOption{.option = option, .left = length};
  } else {
    option_data_.clear();
    state_ = OptionData{.option = option, .length = length};
  }
  return true;
}

bool NbdSession::move(OptionData state, Bytes input, Step& step) {
  const std::size_t missing = state.length - option_data_.size();
  const std::size_t taken = std::min(missing, input.size());
  option_data_.insert(option_data_.end(), input.begin(),
                      input.begin() + static_cast<std::ptrdiff_t>(taken));
  step.consumed += taken;
  if (taken < missing) return need_input(step, 1);
  return take_option(state.option, option_data_, step);
}

bool NbdSession::move(SkipOption state, Bytes input, Step& step) {
  const std::size_t taken = std::min<std::uint64_t>(state.left, input.size());
  step.consumed += taken;
  state.left -= taken;
  state_ = state;
  if (state.left > 0) return need_input(step, 1);
  // EXPORT_NAME has no way to say no.
  if (state.option == kOptExportName) return broken(step, "it asked for an endless export name");
  reply_to_option(state.option, kRepErrTooBig);
  state_ = OptionHeader{};
  return true;
}

bool NbdSession::take_option(std::uint32_t option, Bytes data, Step& step) {
  state_ = OptionHeader{};
  switch (option) {
    case kOptExportName: {
      if (as_text(data) != options_.export_name) {
        return broken(step, "it asked for an export that does not exist");
      }
      put_integer(options_.size.bytes());
      put_integer(kTransmissionFlags);
      if (!no_zeroes_) output_.resize(output_.size() + 124);
      break;
    }
    case kOptGo:
    case kOptInfo: {
      take_info_or_go(option, data);
      if (!ready_) return true;
      break;
    }
    case kOptList: {
      if (!data.empty()) {
        reply_to_option(option, kRepErrInvalid, "LIST takes no data");
        return true;
      }
      std::vector<std::byte> entry(4);
      const auto length = swap_bytes(static_cast<std::uint32_t>(options_.export_name.size()));
      std::memcpy(entry.data(), &length, 4);
      const Bytes name = as_bytes(options_.export_name);
      entry.insert(entry.end(), name.begin(), name.end());
      reply_to_option(option, kRepServer, entry);
      reply_to_option(option, kRepAck);
      return true;
    }
    case kOptStructuredReply: {
      if (!data.empty()) {
        reply_to_option(option, kRepErrInvalid, "STRUCTURED_REPLY takes no data");
        return true;
      }
      structured_ = true;
      reply_to_option(option, kRepAck);
      return true;
    }
    case kOptAbort: {
      reply_to_option(option, kRepAck);
      state_ = Left{};
      return true;
    }
    default: {
      // Without fixed newstyle the client would not understand the refusal.
      if (!fixed_newstyle_) return broken(step, fmt::format("it sent unknown option {}", option));
      reply_to_option(option, kRepErrUnsup);
      return true;
    }
  }
  ready_ = true;
  state_ = CommandHeader{};
  step.kind = Step::Kind::Ready;
  return false;
}

// Data: length of the name, the name, count of information types, the types.
void NbdSession::take_info_or_go(std::uint32_t option, Bytes data) {
  const auto malformed = [&] {
    reply_to_option(option, kRepErrInvalid, "the option's lengths contradict each other");
  };
  if (data.size() < 6) return malformed();
  const std::size_t name_length = get<std::uint32_t>(data, 0);
  if (name_length > data.size() - 6) return malformed();
  const std::size_t count = get<std::uint16_t>(data, 4 + name_length);
  if (data.size() != 6 + name_length + 2 * count) return malformed();
  if (as_text(data.subspan(4, name_length)) != options_.export_name) {
    reply_to_option(option, kRepErrUnknown, "there is no such export");
    return;
  }
  bool wants_name = false;
  for (std::size_t i = 0; i < count; ++i) {
    wants_name |= get<std::uint16_t>(data, 6 + name_length + 2 * i) == kInfoName;
  }

  const auto info_header = [&](std::size_t length) {
    put_integer(kOptionReplyMagic);
    put_integer(option);
    put_integer(kRepInfo);
    put_integer(static_cast<std::uint32_t>(length));
  };
  info_header(12);
  put_integer(kInfoExport);
  put_integer(options_.size.bytes());
  put_integer(kTransmissionFlags);
  // Sent whether asked for or not: it is the only way to tell a client our maximum.
  info_header(14);
  put_integer(kInfoBlockSize);
  put_integer(kMinimumBlock);
  put_integer(kPreferredBlock);
  put_integer(static_cast<std::uint32_t>(options_.max_payload.bytes()));
  if (wants_name) {
    info_header(2 + options_.export_name.size());
    put_integer(kInfoName);
    put(as_bytes(options_.export_name));
  }
  reply_to_option(option, kRepAck);
  ready_ = option == kOptGo;
}

void NbdSession::reply_to_option(std::uint32_t option, std::uint32_t type, Bytes data) {
  put_integer(kOptionReplyMagic);
  put_integer(option);
  put_integer(type);
  put_integer(static_cast<std::uint32_t>(data.size()));
  put(data);
}

void NbdSession::reply_to_option(std::uint32_t option, std::uint32_t type, std::string_view text) {
  reply_to_option(option, type, as_bytes(text));
}

// --- transmission ---

bool NbdSession::move(CommandHeader, Bytes input, Step& step) {
  if (output_.size() > kMaxUnsent) {
    step.kind = Step::Kind::NeedOutput;
    return false;
  }
  if (in_flight_ == options_.max_in_flight) {
    step.kind = Step::Kind::NeedSlot;
    return false;
  }
  if (input.size() < kRequestSize) return need_input(step, kRequestSize);
  const auto magic = get<std::uint32_t>(input, 0);
  const auto flags = get<std::uint16_t>(input, 4);
  const auto command = get<std::uint16_t>(input, 6);
  const auto cookie = get<std::uint64_t>(input, 8);
  const auto offset = get<std::uint64_t>(input, 16);
  const auto length = get<std::uint32_t>(input, 24);
  step.consumed += kRequestSize;
  if (magic != kRequestMagic) {
    return broken(step, "a request did not begin with its magic number");
  }

  // `offset + length` may overflow.
  const std::uint64_t size = options_.size.bytes();
  const bool inside = offset <= size && length <= size - offset;
  const Extent extent{Offset(offset), Length(length)};

  switch (command) {
    case kCommandWrite: {
      if ((flags & ~kCommandFlagFua) != 0 || length > options_.max_payload.bytes()) {
        return refuse_write(cookie, length, kErrorInvalid, step);
      }
      if (!inside) return refuse_write(cookie, length, kErrorNoSpace, step);
      if (length == 0) break;
      state_ = Payload{.cookie = cookie, .extent = extent};
      return true;
    }
    case kCommandWriteZeroes: {
      // NO_HOLE is taken and ignored: it is about allocation, which is the target's decision ("thin
      // stays thin"), and what is read back is the same.
      constexpr std::uint16_t known = kCommandFlagFua | kCommandFlagNoHole | kCommandFlagFastZero;
      if ((flags & ~known) != 0) {
        reply(cookie, kErrorInvalid);
        return true;
      }
      if (!inside) {
        reply(cookie, kErrorNoSpace);
        return true;
      }
      if (length == 0) break;
      return emit(step, NbdRequest::Kind::Zero, cookie, extent, {});
    }
    case kCommandTrim: {
      if ((flags & ~kCommandFlagFua) != 0 || !inside) {
        reply(cookie, kErrorInvalid);
        return true;
      }
      if (length == 0) break;
      return emit(step, NbdRequest::Kind::Discard, cookie, extent, {});
    }
    case kCommandFlush: {
      if ((flags & ~kCommandFlagFua) != 0 || offset != 0 || length != 0) {
        reply(cookie, kErrorInvalid);
        return true;
      }
      return emit(step, NbdRequest::Kind::Flush, cookie, {}, {});
    }
    case kCommandDisconnect: {
      state_ = Left{};
      return true;
    }
    case kCommandRead: {
      // A read's answer is structured if that was negotiated, also when it is an error.
      if (structured_) {
        reply_structured_error(cookie, kErrorPerm, "this export can only be written");
      } else {
        reply(cookie, kErrorPerm);
      }
      return true;
    }
    case kCommandBlockStatus: {
      if (structured_) {
        reply_structured_error(cookie, kErrorInvalid, "no metadata context was negotiated");
      } else {
        reply(cookie, kErrorInvalid);
      }
      return true;
    }
    default: {
      reply(cookie, kErrorInvalid);
      return true;
    }
  }
  // Nothing to be done (length 0, and allowed): done.
  reply(cookie, 0);
  return true;
}

bool NbdSession::refuse_write(std::uint64_t cookie, std::uint32_t length, std::uint32_t error,
                              Step& step) {
  if (length > kMaxSkip) {
    return broken(step, fmt::format("it sent a write of {} bytes, {} are allowed", length,
                                    options_.max_payload.bytes()));
  }
  state_ = SkipPayload{.cookie = cookie, .left = length, .error = error};
  return true;
}

bool NbdSession::move(Payload state, Bytes input, Step& step) {
  const std::size_t length = state.extent.length.bytes();
  if (input.size() < length) return need_input(step, length);
  step.consumed += length;
  state_ = CommandHeader{};
  return emit(step, NbdRequest::Kind::Write, state.cookie, state.extent, input.first(length));
}

bool NbdSession::move(SkipPayload state, Bytes input, Step& step) {
  const std::size_t taken = std::min<std::uint64_t>(state.left, input.size());
  step.consumed += taken;
  state.left -= taken;
  state_ = state;
  if (state.left > 0) return need_input(step, 1);
  reply(state.cookie, state.error);
  state_ = CommandHeader{};
  return true;
}

bool NbdSession::emit(Step& step, NbdRequest::Kind kind, std::uint64_t cookie, Extent extent,
                      Bytes payload) {
  CHECK(!free_slots_.empty(), "a slot was there before the request was read");
  const std::uint16_t slot = free_slots_.back();
  free_slots_.pop_back();
  const std::uint64_t id = (next_serial_++ << kSlotBits) | slot;
  slots_[slot] = Slot{.id = id, .cookie = cookie};
  ++in_flight_;
  step.kind = Step::Kind::Request;
  step.request.kind = kind;
  step.request.extent = extent;
  step.request.id = id;
  step.request.payload = payload;
  return false;
}

void NbdSession::reply(std::uint64_t cookie, std::uint32_t error) {
  put_integer(kSimpleReplyMagic);
  put_integer(error);
  put_integer(cookie);
}

void NbdSession::reply_structured_error(std::uint64_t cookie, std::uint32_t error,
                                        std::string_view text) {
  put_integer(kStructuredReplyMagic);
  put_integer(kReplyFlagDone);
  put_integer(kReplyTypeError);
  put_integer(cookie);
  put_integer(static_cast<std::uint32_t>(6 + text.size()));
  put_integer(error);
  put_integer(static_cast<std::uint16_t>(text.size()));
  put(as_bytes(text));
}

// --- the end ---

bool NbdSession::move(Left, Bytes input, Step& step) {
  step.consumed += input.size();
  step.kind = Step::Kind::Leaving;
  return false;
}

bool NbdSession::move(Failed, Bytes input, Step& step) {
  step.consumed += input.size();
  step.kind = Step::Kind::Broken;
  return false;
}

bool NbdSession::broken(Step& step, std::string why) {
  why_ = std::move(why);
  state_ = Failed{};
  step.kind = Step::Kind::Broken;
  return false;
}

bool NbdSession::need_input(Step& step, std::size_t need) {
  step.kind = Step::Kind::NeedInput;
  step.need = need;
  return false;
}

void NbdSession::put(Bytes bytes) { output_.insert(output_.end(), bytes.begin(), bytes.end()); }

template <class Integer>
void NbdSession::put_integer(Integer value) {
  const Integer wire = swap_bytes(value);
  put(std::as_bytes(std::span(&wire, 1)));
}

}  // namespace drover::mirror
