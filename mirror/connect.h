// SPDX-License-Identifier: Apache-2.0
//
// Opens one connection of the link: TCP, TLS, hello and its answer. Used by Link and by tests that
// play a peer which breaks the rules afterwards.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "base/clock.h"
#include "base/result.h"
#include "mirror/session.h"
#include "mirror/socket.h"

namespace drover::mirror {

struct Endpoint {
  std::string address;
  std::uint16_t port = 0;
  LinkKey key{};
  std::chrono::milliseconds silence{kSilence};
};

// What both ends tell tune_socket() for a connection of this kind.
std::chrono::milliseconds give_up_after(ConnectionKind kind, std::chrono::milliseconds silence);

// TCP and TLS: blocks until the receiver has shown that it has the key, or the deadline. Denied for
// a wrong key.
Result<TlsSocket> reach(const Endpoint& endpoint, const Hello& hello, Instant deadline,
                        int cancel_fd = -1);
// Blocks until it has welcomed the connection, or the deadline. The receiver's refusal comes back
// as its Error. `welcome`, if given: what it said.
Status exchange_hello(TlsSocket& socket, const Endpoint& endpoint, const Hello& hello,
                      Instant deadline, nlohmann::json* welcome = nullptr);
// Both.
Result<TlsSocket> open_connection(const Endpoint& endpoint, const Hello& hello, Instant deadline,
                                  int cancel_fd = -1, nlohmann::json* welcome = nullptr);

}  // namespace drover::mirror
