// SPDX-License-Identifier: Apache-2.0
#include "mirror/tls.h"

#include <gnutls/gnutls.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace drover::mirror {

namespace {

constexpr const char* kPriority =
    "NONE:+VERS-TLS1.3:+AES-128-GCM:+CHACHA20-POLY1305:+AEAD:+ECDHE-PSK:+DHE-PSK:"
    "+GROUP-X25519:+GROUP-SECP256R1:+SIGN-ALL";
constexpr std::size_t kRecord = 16384;
// A sealed record (5 bytes of header, one of type, 16 of tag), a key update and a goodbye before
// it.
constexpr std::size_t kSealedRoom = kRecord + 256;
constexpr std::size_t kFirstBuffer = std::size_t{32} << 10;
// What a peer without the key can make us hold: the largest handshake message, and all that it sends
// before its handshake is done (an honest one sends less than 1 KiB, and a hello behind it).
constexpr std::size_t kMaxHandshake = 8192;
constexpr std::size_t kMaxHandshakeInput = std::size_t{48} << 10;

}  // namespace

struct Tls::Session {
  gnutls_session_t handle = nullptr;
  gnutls_psk_client_credentials_t client = nullptr;
  gnutls_psk_server_credentials_t server = nullptr;
  std::string identity;
  LinkKey key{};

  ~Session() {
    if (handle != nullptr) gnutls_deinit(handle);
    if (client != nullptr) gnutls_psk_free_client_credentials(client);
    if (server != nullptr) gnutls_psk_free_server_credentials(server);
    gnutls_memset(key.data(), 0, key.size());
  }

  static ssize_t push(gnutls_transport_ptr_t self, const giovec_t* pieces, int count) {
    Bytes& out = static_cast<Tls*>(self)->out_;
    std::size_t total = 0;
    for (int i = 0; i < count; ++i) total += pieces[i].iov_len;
    if (out.size - out.end < total) {
      errno = EAGAIN;
      return -1;
    }
    for (int i = 0; i < count; ++i) {
      std::memcpy(out.memory.get() + out.end, pieces[i].iov_base, pieces[i].iov_len);
      out.end += pieces[i].iov_len;
    }
    return static_cast<ssize_t>(total);
  }

  static ssize_t pull(gnutls_transport_ptr_t self, void* to, size_t wanted) {
    Tls& tls = *static_cast<Tls*>(self);
    const std::size_t count = std::min(wanted, tls.in_.used());
    if (count == 0) {
      if (tls.input_ended_) return 0;
      errno = EAGAIN;
      return -1;
    }
    std::memcpy(to, tls.in_.memory.get() + tls.in_.begin, count);
    tls.in_.drop(count);
    return static_cast<ssize_t>(count);
  }

  static int pull_timeout(gnutls_transport_ptr_t self, unsigned) {
    return static_cast<Tls*>(self)->in_.used() > 0 ? 1 : 0;
  }

  static int find_key(gnutls_session_t session, const char* identity, gnutls_datum_t* out) {
    const auto* tls = static_cast<const Tls*>(gnutls_session_get_ptr(session));
    const Session& self = *tls->session_;
    if (self.identity != identity) return -1;
    out->data = static_cast<unsigned char*>(gnutls_malloc(self.key.size()));
    if (out->data == nullptr) return -1;
    std::memcpy(out->data, self.key.data(), self.key.size());
    out->size = static_cast<unsigned>(self.key.size());
    return 0;
  }
};

void Tls::Bytes::grow(std::size_t new_size) {
  if (new_size <= size) return;
  auto larger = std::make_unique_for_overwrite<std::byte[]>(new_size);
  if (used() > 0) std::memcpy(larger.get(), memory.get() + begin, used());
  end = used();
  begin = 0;
  memory = std::move(larger);
  size = new_size;
}

void Tls::Bytes::drop(std::size_t count) {
  begin += count;
  if (begin == end) begin = end = 0;
}

Result<std::unique_ptr<Tls>> Tls::create(const Options& options) {
  std::unique_ptr<Tls> tls(new Tls);
  tls->session_ = std::make_unique<Session>();
  Session& session = *tls->session_;
  session.identity = options.identity;
  session.key = options.key;
  tls->in_.grow(kFirstBuffer);
  tls->out_.grow(2 * kSealedRoom);
  tls->pending_ = std::make_unique_for_overwrite<std::byte[]>(kRecord);

  const bool client = options.role == Role::Client;
  const unsigned flags = GNUTLS_NONBLOCK | GNUTLS_NO_TICKETS | GNUTLS_NO_SIGNAL;
  int rc = gnutls_init(&session.handle, flags | (client ? GNUTLS_CLIENT : GNUTLS_SERVER));
  if (rc < 0) return fail(tls->error_from(rc, "setting up TLS"));
  const char* where = nullptr;
  rc = gnutls_priority_set_direct(session.handle, kPriority, &where);
  if (rc < 0) return fail(tls->error_from(rc, "choosing TLS 1.3 with a pre-shared key"));
  if (client) {
    rc = gnutls_psk_allocate_client_credentials(&session.client);
    if (rc < 0) return fail(tls->error_from(rc, "setting up TLS"));
    const gnutls_datum_t key{reinterpret_cast<unsigned char*>(session.key.data()),
                             static_cast<unsigned>(session.key.size())};
    rc = gnutls_psk_set_client_credentials(session.client, session.identity.c_str(), &key,
                                           GNUTLS_PSK_KEY_RAW);
    if (rc < 0) return fail(tls->error_from(rc, "setting the session's key"));
    rc = gnutls_credentials_set(session.handle, GNUTLS_CRD_PSK, session.client);
  } else {
    rc = gnutls_psk_allocate_server_credentials(&session.server);
    if (rc < 0) return fail(tls->error_from(rc, "setting up TLS"));
    gnutls_psk_set_server_credentials_function(session.server, &Session::find_key);
    rc = gnutls_credentials_set(session.handle, GNUTLS_CRD_PSK, session.server);
  }
  if (rc < 0) return fail(tls->error_from(rc, "setting up TLS"));
  gnutls_handshake_set_max_packet_length(session.handle, kMaxHandshake);
  gnutls_session_set_ptr(session.handle, tls.get());
  gnutls_transport_set_ptr(session.handle, tls.get());
  gnutls_transport_set_vec_push_function(session.handle, &Session::push);
  gnutls_transport_set_pull_function(session.handle, &Session::pull);
  gnutls_transport_set_pull_timeout_function(session.handle, &Session::pull_timeout);
  return tls;
}

Tls::~Tls() = default;

void Tls::grow_buffers(std::size_t input, std::size_t output) {
  in_.grow(input);
  out_.grow(std::max(output, 2 * kSealedRoom));
}

Error Tls::error_from(long rc, const char* doing) const {
  const int code = static_cast<int>(rc);
  Error error;
  std::string why = gnutls_strerror(code);
  switch (code) {
    case GNUTLS_E_PREMATURE_TERMINATION:
    case GNUTLS_E_PULL_ERROR:
    case GNUTLS_E_PUSH_ERROR:
      error.code = Code::Unreachable;
      error.retryable = true;
      why = "the connection was closed by the other side";
      break;
    case GNUTLS_E_FATAL_ALERT_RECEIVED:
      // Before the end of the handshake the peer's alert is its answer to our key.
      error.code = established_ ? Code::Protocol : Code::Denied;
      why = established_ ? "the other side reported an error: "
                         : "the other side does not accept the session's key: ";
      if (const char* name = gnutls_alert_get_name(gnutls_alert_get(session_->handle))) why += name;
      break;
    case GNUTLS_E_MEMORY_ERROR: error.code = Code::NoSpace; break;
    case GNUTLS_E_UNEXPECTED_PACKET_LENGTH:
    case GNUTLS_E_RECORD_OVERFLOW:
    case GNUTLS_E_UNSUPPORTED_VERSION_PACKET:
    case GNUTLS_E_UNEXPECTED_PACKET:
    case GNUTLS_E_UNEXPECTED_HANDSHAKE_PACKET:
    case GNUTLS_E_HANDSHAKE_TOO_LARGE: error.code = Code::Protocol; break;
    default: error.code = established_ ? Code::Protocol : Code::Denied; break;
  }
  error.message = std::string(doing) + ": " + why;
  return error;
}

Result<bool> Tls::handshake() {
  CHECK(!established_, "a handshake is done once");
  if (handshake_input_ > kMaxHandshakeInput) {
    return fail(Code::Protocol, "the TLS handshake: the other side talks without end");
  }
  int rc = 0;
  do {
    rc = gnutls_handshake(session_->handle);
    if (rc == GNUTLS_E_AGAIN) return false;
  } while (rc < 0 && gnutls_error_is_fatal(rc) == 0);
  if (rc < 0) {
    // Tells the peer why; best effort, the caller sends what is in output() if it wants to.
    gnutls_alert_send_appropriate(session_->handle, rc);
    return fail(error_from(rc, "the TLS handshake"));
  }
  established_ = true;
  return true;
}

std::span<std::byte> Tls::input_space() {
  if (in_.size - in_.end < in_.size / 2 && in_.begin > 0) {
    std::memmove(in_.memory.get(), in_.memory.get() + in_.begin, in_.used());
    in_.end = in_.used();
    in_.begin = 0;
  }
  return {in_.memory.get() + in_.end, in_.size - in_.end};
}

void Tls::input_received(std::size_t count) {
  CHECK(count <= in_.size - in_.end, "no more was received than there was space");
  in_.end += count;
  if (!established_) handshake_input_ += count;
}

void Tls::input_ended() { input_ended_ = true; }

Result<std::size_t> Tls::read(std::span<std::byte> out) {
  CHECK(established_ && !out.empty(), "read() comes after the handshake and wants something");
  if (closed_) return 0;
  std::size_t total = 0;
  while (total < out.size()) {
    const ssize_t rc = gnutls_record_recv(session_->handle, out.data() + total, out.size() - total);
    if (rc > 0) {
      total += static_cast<std::size_t>(rc);
      continue;
    }
    if (rc == GNUTLS_E_AGAIN) break;
    if (rc == GNUTLS_E_INTERRUPTED) continue;
    if (rc == 0) {
      closed_ = true;
      break;
    }
    if (total > 0) break;  // the error comes again
    return fail(error_from(rc, "reading from the link"));
  }
  return total;
}

bool Tls::room_for_record() {
  if (out_.begin == out_.end) out_.begin = out_.end = 0;
  return out_.size - out_.end >= kSealedRoom;
}

Status Tls::seal(std::span<const std::byte> data) {
  ssize_t rc = 0;
  do {
    rc = gnutls_record_send(session_->handle, data.data(), data.size());
  } while (rc == GNUTLS_E_INTERRUPTED);
  CHECK(rc != GNUTLS_E_AGAIN, "there was room for a whole record");
  if (rc < 0) return fail(error_from(rc, "writing to the link"));
  CHECK(static_cast<std::size_t>(rc) == data.size(), "a record is taken whole");
  return {};
}

Result<std::size_t> Tls::write(std::span<const std::byte> data) {
  CHECK(established_ && !said_goodbye_, "write() comes between handshake and close()");
  std::size_t taken = 0;
  while (taken < data.size()) {
    if (pending_size_ == kRecord) {
      if (!room_for_record()) break;
      DROVER_TRY(seal({pending_.get(), kRecord}));
      pending_size_ = 0;
    }
    const std::size_t left = data.size() - taken;
    if (pending_size_ == 0 && left >= kRecord) {
      if (!room_for_record()) break;
      DROVER_TRY(seal(data.subspan(taken, kRecord)));
      taken += kRecord;
      continue;
    }
    const std::size_t count = std::min(kRecord - pending_size_, left);
    std::memcpy(pending_.get() + pending_size_, data.data() + taken, count);
    pending_size_ += count;
    taken += count;
  }
  return taken;
}

Result<bool> Tls::flush() {
  if (pending_size_ == 0) return true;
  if (!room_for_record()) return false;
  DROVER_TRY(seal({pending_.get(), pending_size_}));
  pending_size_ = 0;
  return true;
}

Result<bool> Tls::close() {
  if (said_goodbye_) return true;
  DROVER_ASSIGN(const bool flushed, flush());
  if (!flushed || !room_for_record()) return false;
  const int rc = gnutls_bye(session_->handle, GNUTLS_SHUT_WR);
  if (rc < 0) return fail(error_from(rc, "closing the link"));
  said_goodbye_ = true;
  return true;
}

std::span<const std::byte> Tls::output() const {
  return {out_.memory.get() + out_.begin, out_.used()};
}

void Tls::output_sent(std::size_t count) {
  CHECK(count <= out_.used(), "no more was sent than there was");
  out_.drop(count);
}

Status Tls::rekey() {
  if (!room_for_record()) return fail(Code::Busy, "replacing the link's key: send first");
  const int rc = gnutls_session_key_update(session_->handle, 0);
  if (rc < 0) return fail(error_from(rc, "replacing the link's key"));
  return {};
}

}  // namespace drover::mirror
