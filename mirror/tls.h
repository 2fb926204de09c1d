// SPDX-License-Identifier: Apache-2.0
//
// TLS 1.3 with an external pre-shared key (GnuTLS), without I/O of its own: bytes from the peer go
// in, bytes for the peer come out. Who owns the socket decides how they travel (poll, io_uring, a
// test's memory).
//
//   DROVER_ASSIGN(auto tls, Tls::create({.role = Tls::Role::Client, .identity = id, .key = key}));
//   ... recv(fd, tls->input_space()); tls->input_received(n); ... tls->handshake() ...
//   tls->write(bytes); tls->flush(); send(fd, tls->output()); tls->output_sent(n);
//
// Only TLS 1.3, only PSK with an ephemeral key exchange (X25519 or P-256; a key that leaks later
// opens nothing recorded before), AES-128-GCM, and ChaCha20 for processors without AES. (AES-256 in
// TLS 1.3 means SHA-384, which the SHA-256 of an external key rules out: RFC 8446, 4.2.11.) Who
// does not have the key fails the handshake; nothing that was sent before its end is acted upon.
//
// Records: write() packs what it gets into full records of 16 KiB, taking large pieces from where
// they lie. Traffic keys are replaced by GnuTLS itself every 2^24 records.
//
// Threads: a session belongs to one thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"

namespace drover::mirror {

using LinkKey = std::array<std::byte, 32>;

class Tls {
 public:
  enum class Role { Client, Server };
  struct Options {
    Role role = Role::Client;
    std::string identity;  // which key: the job's id. The server takes no other.
    LinkKey key{};
  };

  static Result<std::unique_ptr<Tls>> create(const Options& options);
  ~Tls();
  Tls(const Tls&) = delete;
  Tls& operator=(const Tls&) = delete;

  // A new session has 64 KiB of buffers. Called with more once the peer is known.
  void grow_buffers(std::size_t input, std::size_t output);

  // True: done. False: more must be received (after output() was sent). Denied when the peer does
  // not have the key (as far as that can be told), Protocol when it does not speak TLS 1.3 with
  // PSK.
  Result<bool> handshake();

  // --- from the peer ---
  // Where to receive to; never empty as long as read() is called until it returns 0.
  [[nodiscard]] std::span<std::byte> input_space();
  void input_received(std::size_t count);
  void input_ended();  // the socket's end of file
  // Decrypted bytes; 0: nothing more until further input, or closed(). Unreachable when the
  // connection ended without a goodbye, Protocol when what came is not the peer's.
  Result<std::size_t> read(std::span<std::byte> out);
  [[nodiscard]] bool closed() const { return closed_; }  // the peer has said goodbye

  // --- to the peer ---
  // How much of `data` was taken: less than all when output() must be sent first. Bytes may be held
  // back until flush() or until a record is full.
  Result<std::size_t> write(std::span<const std::byte> data);
  // False: output() must be sent first; call again.
  Result<bool> flush();
  // Says goodbye: no more will be written (the other direction stays open). As flush().
  Result<bool> close();
  [[nodiscard]] std::span<const std::byte> output() const;
  void output_sent(std::size_t count);
  // Bytes taken by write() that are not in output() yet.
  [[nodiscard]] bool unflushed() const { return pending_size_ > 0; }

  // Replaces the sending key now (it happens by itself every 2^24 records).
  Status rekey();

 private:
  struct Session;
  friend struct Session;
  struct Bytes {  // [begin, end) of memory is in use
    std::unique_ptr<std::byte[]> memory;
    std::size_t size = 0;
    std::size_t begin = 0;
    std::size_t end = 0;
    void grow(std::size_t new_size);
    [[nodiscard]] std::size_t used() const { return end - begin; }
    void drop(std::size_t count);
  };

  Tls() = default;
  [[nodiscard]] bool room_for_record();
  Status seal(std::span<const std::byte> data);
  Error error_from(long rc, const char* doing) const;

  std::unique_ptr<Session> session_;
  Bytes in_;
  Bytes out_;
  std::unique_ptr<std::byte[]> pending_;  // plain bytes that do not fill a record yet
  std::size_t pending_size_ = 0;
  std::size_t handshake_input_ = 0;
  bool input_ended_ = false;
  bool closed_ = false;
  bool said_goodbye_ = false;
  bool established_ = false;
};

}  // namespace drover::mirror
