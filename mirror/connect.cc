// SPDX-License-Identifier: Apache-2.0
#include "mirror/connect.h"

#include <fmt/format.h>

#include <algorithm>

namespace drover::mirror {

static constexpr std::chrono::milliseconds kMemoryPatience{60000};

std::chrono::milliseconds give_up_after(ConnectionKind kind, std::chrono::milliseconds silence) {
  switch (kind) {
    case ConnectionKind::Control: return silence;
    case ConnectionKind::Lane: return std::chrono::milliseconds(0);
    // A target's QEMU that takes nothing for a while is no dead peer.
    case ConnectionKind::Memory: return std::max(6 * silence, kMemoryPatience);
  }
  return silence;
}

static Error said_by(const Endpoint& endpoint, Error error) {
  error.message =
      fmt::format("the receiver at {} port {}: {}", endpoint.address, endpoint.port, error.message);
  return error;
}

Result<TlsSocket> reach(const Endpoint& endpoint, const Hello& hello, Instant deadline,
                        int cancel_fd) {
  DROVER_ASSIGN(UniqueFd fd, connect_tcp(endpoint.address, endpoint.port, deadline, cancel_fd));
  tune_socket(fd.get(), give_up_after(hello.kind, endpoint.silence));
  DROVER_ASSIGN(
      auto tls,
      Tls::create({.role = Tls::Role::Client, .identity = hello.session, .key = endpoint.key}));
  TlsSocket socket(std::move(fd), std::move(tls));
  socket.set_cancel_fd(cancel_fd);
  if (auto status = socket.handshake(deadline); !status) {
    return fail(said_by(endpoint, std::move(status).error()));
  }
  return socket;
}

static Status exchange(TlsSocket& socket, const Hello& hello, Instant deadline,
                       nlohmann::json* welcome) {
  DROVER_ASSIGN(const std::string message, encode_message(hello_to_json(hello)));
  DROVER_TRY(socket.write_all(message, deadline));
  DROVER_ASSIGN(const std::string text, socket.read_message(kMaxMessage, deadline));
  DROVER_ASSIGN(nlohmann::json answer, parse_object(text, "the receiver's welcome"));
  if (const auto error = answer.find("error"); error != answer.end()) {
    return fail(error_from_json(*error));
  }
  if (welcome != nullptr) *welcome = std::move(answer);
  return {};
}

Status exchange_hello(TlsSocket& socket, const Endpoint& endpoint, const Hello& hello,
                      Instant deadline, nlohmann::json* welcome) {
  auto status = exchange(socket, hello, deadline, welcome);
  if (!status) return fail(said_by(endpoint, std::move(status).error()));
  return status;
}

Result<TlsSocket> open_connection(const Endpoint& endpoint, const Hello& hello, Instant deadline,
                                  int cancel_fd, nlohmann::json* welcome) {
  DROVER_ASSIGN(TlsSocket socket, reach(endpoint, hello, deadline, cancel_fd));
  DROVER_TRY(exchange_hello(socket, endpoint, hello, deadline, welcome));
  return socket;
}

}  // namespace drover::mirror
