// SPDX-License-Identifier: Apache-2.0
#include "mirror/connect.h"

#include <fmt/format.h>

namespace drover::mirror {

static Status exchange_hello(TlsSocket& socket, const Hello& hello, Instant deadline) {
  DROVER_TRY(socket.handshake(deadline));
  DROVER_ASSIGN(const std::string message, encode_message(hello_to_json(hello)));
  DROVER_TRY(socket.write_all(message, deadline));
  DROVER_ASSIGN(const std::string text, socket.read_message(kMaxMessage, deadline));
  DROVER_ASSIGN(const nlohmann::json answer, parse_object(text, "the receiver's welcome"));
  if (const auto error = answer.find("error"); error != answer.end()) {
    return fail(error_from_json(*error));
  }
  return {};
}

Result<TlsSocket> open_connection(const Endpoint& endpoint, const Hello& hello, Instant deadline,
                                  int cancel_fd) {
  DROVER_ASSIGN(UniqueFd fd, connect_tcp(endpoint.address, endpoint.port, deadline, cancel_fd));
  tune_socket(fd.get(), endpoint.silence);
  DROVER_ASSIGN(
      auto tls,
      Tls::create({.role = Tls::Role::Client, .identity = hello.session, .key = endpoint.key}));
  TlsSocket socket(std::move(fd), std::move(tls));
  socket.set_cancel_fd(cancel_fd);
  if (auto status = exchange_hello(socket, hello, deadline); !status) {
    Error error = std::move(status).error();
    error.message = fmt::format("the receiver at {} port {}: {}", endpoint.address, endpoint.port,
                                error.message);
    return fail(std::move(error));
  }
  return socket;
}

}  // namespace drover::mirror
