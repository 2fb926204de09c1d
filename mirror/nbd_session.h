// SPDX-License-Identifier: Apache-2.0
//
// One client's NBD conversation, without I/O: bytes in, requests and bytes out. Pure, so that it
// can be fuzzed and fed byte by byte; NbdServer (nbd_server.h) puts it on a socket.
//
//   NbdSession session({.export_name = "vda", .size = 1_GiB});
//   for (;;) {
//     const NbdSession::Step step = session.step(unread);
//     unread = unread.subspan(step.consumed);
//     switch (step.kind) { ... Request: handle(step.request) ... NeedInput: receive more ... }
//   }
//   session.take_output(bytes);  // send them
//
// Protocol: github.com/NetworkBlockDevice/nbd, doc/proto.md. What is served: fixed newstyle
// handshake (EXPORT_NAME, GO, INFO, LIST, ABORT, STRUCTURED_REPLY; everything else is
// NBD_REP_ERR_UNSUP), then WRITE, WRITE_ZEROES, TRIM, FLUSH and DISC. READ is refused (EPERM),
// every other command too (EINVAL).
//
// Bounds: whatever the client sends, the session holds at most kMaxOptionLength bytes of an option,
// kMaxUnsent + one step's replies of output and max_in_flight requests. Payloads are never stored
// here: they stay in the caller's input.
//
// Threads: none; use from one.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/units.h"
#include "mirror/nbd_server.h"

namespace drover::mirror {

class NbdSession {
 public:
  struct Options {
    std::string export_name;
    Length size;
    // The largest write a client may send; announced as the maximum block size.
    Length max_payload = Length(std::uint64_t{1} << 20);
    // 1 to kMaxSlots.
    unsigned max_in_flight = 32;
    // Request ids of this session are at least this << kSlotBits, so that a server's next session
    // can begin where the last one ended (next_serial()) and no id is ever used twice.
    std::uint64_t first_serial = 1;
  };

  static constexpr unsigned kSlotBits = 10;
  static constexpr unsigned kMaxSlots = 1U << kSlotBits;
  // Longer options are skipped and answered with NBD_REP_ERR_TOO_BIG. An export name is at most
  // 4096 bytes, and clients ask for a handful of information types.
  static constexpr std::size_t kMaxOptionLength = 8192;
  // What a client may make us skip (an oversized option or write) before it is thrown out instead.
  static constexpr std::uint64_t kMaxSkip = std::uint64_t{64} << 20;
  // Options a client may send; QEMU and libnbd send fewer than ten.
  static constexpr unsigned kMaxOptions = 256;
  // With more than this unsent, the client does not read its replies: nothing more is parsed.
  static constexpr std::size_t kMaxUnsent = 16384;

  struct Step {
    enum class Kind {
      NeedInput,   // call again with at least `need` bytes, from the first one not consumed
      NeedOutput,  // call again after take_output()
      NeedSlot,    // max_in_flight requests are unanswered: call again after complete()
      Ready,       // the handshake is done; once; call again
      Request,     // `request` (without a Buffer; its payload lies in the input); call again
      Leaving,     // the client said goodbye: when in_flight() is 0, send the output and close
      Broken,      // the client broke the protocol, see why(): close
    };
    Kind kind = Kind::NeedInput;
    std::size_t consumed = 0;  // bytes of the input that are dealt with
    std::size_t need = 0;      // NeedInput; never more than max_payload or a request's header
    NbdRequest request;
  };

  explicit NbdSession(Options options);

  Step step(std::span<const std::byte> input);
  // Answers a request: errno_value 0 or why not. False: no such request is outstanding.
  bool complete(std::uint64_t id, int errno_value);
  // Replaces `into` by what is to be sent. Its memory is reused for further output.
  void take_output(std::vector<std::byte>& into);

  [[nodiscard]] std::size_t unsent() const { return output_.size(); }
  [[nodiscard]] unsigned in_flight() const { return in_flight_; }
  [[nodiscard]] bool ready() const { return ready_; }
  [[nodiscard]] const std::string& why() const { return why_; }
  [[nodiscard]] std::uint64_t next_serial() const { return next_serial_; }

 private:
  // --- where the conversation is; each state owns its data ---
  struct ClientFlags {};   // our greeting is sent
  struct OptionHeader {};  // between options
  struct OptionData {      // an option's data is being collected in option_data_
    std::uint32_t option = 0;
    std::uint32_t length = 0;
  };
  struct SkipOption {  // too long to look at
    std::uint32_t option = 0;
    std::uint64_t left = 0;
  };
  struct CommandHeader {};  // between commands
  struct Payload {          // a good WRITE's header is consumed
    std::uint64_t cookie = 0;
    Extent extent;
  };
  struct SkipPayload {  // the payload of a WRITE that will be refused
    std::uint64_t cookie = 0;
    std::uint64_t left = 0;
    std::uint32_t error = 0;
  };
  struct Left {};
  struct Failed {};
  using State = std::variant<ClientFlags, OptionHeader, OptionData, SkipOption, CommandHeader,
                             Payload, SkipPayload, Left, Failed>;

  struct Slot {
    std::uint64_t id = 0;  // 0: free
    std::uint64_t cookie = 0;
  };

  // Each makes one move in its state. True: go on; false: `step` says what is needed.
  using Bytes = std::span<const std::byte>;
  bool move(ClientFlags, Bytes input, Step& step);
  bool move(OptionHeader, Bytes input, Step& step);
  bool move(OptionData state, Bytes input, Step& step);
  bool move(SkipOption state, Bytes input, Step& step);
  bool move(CommandHeader, Bytes input, Step& step);
  bool move(Payload state, Bytes input, Step& step);
  bool move(SkipPayload state, Bytes input, Step& step);
  bool move(Left, Bytes input, Step& step);
  bool move(Failed, Bytes input, Step& step);

  bool broken(Step& step, std::string why);
  bool need_input(Step& step, std::size_t need);
  bool take_option(std::uint32_t option, Bytes data, Step& step);
  void take_info_or_go(std::uint32_t option, Bytes data);
  void reply_to_option(std::uint32_t option, std::uint32_t type, Bytes data = {});
  void reply_to_option(std::uint32_t option, std::uint32_t type, std::string_view text);
  bool refuse_write(std::uint64_t cookie, std::uint32_t length, std::uint32_t error, Step& step);
  void reply(std::uint64_t cookie, std::uint32_t error);
  void reply_structured_error(std::uint64_t cookie, std::uint32_t error, std::string_view text);
  bool emit(Step& step, NbdRequest::Kind kind, std::uint64_t cookie, Extent extent, Bytes payload);

  void put(Bytes bytes);
  template <class Integer>
  void put_integer(Integer value);

  const Options options_;
  State state_ = ClientFlags{};
  bool ready_ = false;
  bool fixed_newstyle_ = false;
  bool no_zeroes_ = false;
  bool structured_ = false;
  unsigned options_seen_ = 0;
  std::vector<std::byte> option_data_;
  std::vector<std::byte> output_;
  std::vector<Slot> slots_;
  std::vector<std::uint16_t> free_slots_;
  unsigned in_flight_ = 0;
  std::uint64_t next_serial_;
  std::string why_;
};

}  // namespace drover::mirror
