// SPDX-License-Identifier: Apache-2.0
//
// What the NBD fuzz targets share: a conversation with a session in which everything that must hold
// for any client is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "mirror/nbd_session.h"

namespace drover::mirror {

using Bytes = std::vector<std::byte>;

struct Request {
  NbdRequest::Kind kind;
  Extent extent;
  Bytes payload;
  bool operator==(const Request&) const = default;
};

struct Conversation {
  std::vector<Request> requests;
  Bytes output;
  bool ready = false;
  bool ended = false;  // by either side
  bool operator==(const Conversation&) const = default;
};

struct ConversationOptions {
  NbdSession::Options session;
  // How the client's bytes arrive and when requests are answered; 0: in one piece, at once.
  std::uint64_t pace = 0;
};

inline void check_request(const NbdRequest& request, const NbdSession::Options& options) {
  const std::uint64_t size = options.size.bytes();
  const std::uint64_t offset = request.extent.offset.bytes();
  const std::uint64_t length = request.extent.length.bytes();
  CHECK(offset <= size && length <= size - offset, "a request lies within the export");
  CHECK(request.id != 0, "a request has a name");
  switch (request.kind) {
    case NbdRequest::Kind::Write:
      CHECK(length > 0 && length <= options.max_payload.bytes(), "a write is not too long");
      CHECK(request.payload.size() == length, "a write brings its bytes");
      break;
    case NbdRequest::Kind::Zero:
    case NbdRequest::Kind::Discard:
      CHECK(length > 0 && request.payload.empty(), "zeroing has a range and no bytes");
      break;
    case NbdRequest::Kind::Flush:
      CHECK(length == 0 && request.payload.empty(), "a flush has neither range nor bytes");
      break;
  }
}

inline Conversation converse(const ConversationOptions& options,
                             std::span<const std::byte> client) {
  Conversation result;
  NbdSession session(options.session);
  Random random(options.pace);
  const bool at_once = options.pace == 0;
  std::vector<std::uint64_t> unanswered;
  Bytes taken;
  std::size_t begin = 0;                          // what the session has not consumed
  std::size_t end = at_once ? client.size() : 0;  // what has arrived

  const auto take_output = [&] {
    session.take_output(taken);
    result.output.insert(result.output.end(), taken.begin(), taken.end());
    CHECK(session.unsent() == 0, "what was taken is not kept");
  };
  const auto answer_one = [&] {
    const std::size_t nth = random.below(unanswered.size());
    const std::uint64_t id = unanswered[nth];
    unanswered.erase(unanswered.begin() + static_cast<std::ptrdiff_t>(nth));
    CHECK(session.complete(id, 0), "an outstanding request can be answered");
    CHECK(!session.complete(id, 0), "once");
  };

  // Ends: each turn consumes, answers, or lets more arrive; the bound is a bound on all of them.
  for (std::size_t turns = 0;; ++turns) {
    CHECK(turns < 16 * (client.size() + 64), "a conversation ends");
    NbdSession::Step step = session.step(client.subspan(begin, end - begin));
    CHECK(step.consumed <= end - begin, "no more is consumed than arrived");
    begin += step.consumed;
    CHECK(session.in_flight() <= options.session.max_in_flight, "max_in_flight is a maximum");
    CHECK(session.unsent() <= NbdSession::kMaxUnsent + 65536, "output is bounded");
    switch (step.kind) {
      case NbdSession::Step::Kind::NeedInput: {
        CHECK(step.need > 0, "nothing is not needed");
        CHECK(step.need > end - begin, "what is needed is not there yet");
        CHECK(step.need <= std::max<std::uint64_t>(options.session.max_payload.bytes(), 28),
              "no more is needed than fits a buffer");
        if (end == client.size()) {
          while (!unanswered.empty()) answer_one();
          take_output();
          return result;
        }
        end += 1 +
               random.below(std::min<std::size_t>(client.size() - end, random.one_in(2) ? 3 : 400));
        break;
      }
      case NbdSession::Step::Kind::NeedOutput:
        CHECK(session.unsent() > NbdSession::kMaxUnsent, "there is output to take");
        take_output();
        break;
      case NbdSession::Step::Kind::NeedSlot:
        CHECK(!unanswered.empty(), "there are requests to answer");
        answer_one();
        break;
      case NbdSession::Step::Kind::Ready:
        CHECK(!result.ready, "a handshake ends once");
        result.ready = true;
        break;
      case NbdSession::Step::Kind::Request: {
        CHECK(result.ready, "no requests before the handshake is done");
        check_request(step.request, options.session);
        result.requests.push_back(
            {step.request.kind, step.request.extent,
             Bytes(step.request.payload.begin(), step.request.payload.end())});
        unanswered.push_back(step.request.id);
        if (at_once) answer_one();
        break;
      }
      case NbdSession::Step::Kind::Leaving:
      case NbdSession::Step::Kind::Broken:
        while (!unanswered.empty()) answer_one();
        CHECK(session.in_flight() == 0, "everything is answered");
        take_output();
        result.ended = true;
        return result;
    }
    if (!at_once) {
      if (random.one_in(4)) take_output();
      while (!unanswered.empty() && random.one_in(3)) answer_one();
    }
  }
}

// The client's bytes in one piece and in many: the same requests, and the same amount of output
// (the answers may come in another order).
inline void check_any_pace(const ConversationOptions& options, std::span<const std::byte> client) {
  ConversationOptions in_one_piece = options;
  in_one_piece.pace = 0;
  const Conversation whole = converse(in_one_piece, client);
  const Conversation paced = converse(options, client);
  CHECK(whole.requests == paced.requests, "the requests do not depend on how the bytes arrive");
  CHECK(whole.ready == paced.ready && whole.ended == paced.ended, "nor does where it ends");
  CHECK(whole.output.size() == paced.output.size(), "nor do the answers");
}

// From the greeting to the transmission phase.
inline Bytes handshake(bool structured) {
  Bytes bytes;
  const auto put = [&](std::uint64_t value, unsigned size) {
    for (unsigned byte = size; byte > 0; --byte) {
      bytes.push_back(static_cast<std::byte>(value >> (8 * (byte - 1))));
    }
  };
  constexpr std::uint64_t kOptionMagic = 0x49484156454f5054;
  put(3, 4);
  if (structured) {
    put(kOptionMagic, 8);
    put(8, 4);
    put(0, 4);
  }
  put(kOptionMagic, 8);
  put(7, 4);
  put(9, 4);
  put(3, 4);
  for (const char c : {'v', 'd', 'a'}) put(static_cast<std::uint64_t>(c), 1);
  put(0, 2);
  return bytes;
}

// The first bytes of an input choose the session's limits and the pace; the others are the
// client's.
struct FuzzInput {
  ConversationOptions options;
  std::uint8_t choice = 0;
  std::span<const std::byte> client;
};

inline FuzzInput read_input(const std::uint8_t* data, std::size_t size) {
  FuzzInput input;
  input.options.session.export_name = "vda";
  input.options.session.max_payload = Length(4096);
  if (size < 4) return input;
  input.choice = data[0];
  input.options.session.max_in_flight = 1U + data[1] % 8;
  input.options.session.size = Length(std::uint64_t{data[2]} << 9);
  input.options.pace = 1U + data[3];
  input.client = std::as_bytes(std::span(data + 4, size - 4));
  return input;
}

}  // namespace drover::mirror
