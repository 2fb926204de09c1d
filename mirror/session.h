// SPDX-License-Identifier: Apache-2.0
//
// What both ends of the link agree on besides frames: the hello that opens each connection, the
// JSON messages of the control connection, the beat that shows life, the digest that proves at the
// barrier that both sides saw the same frames. docs/protocol.md has it in prose. Pure; any thread.
//
// Nothing here trusts its input: sizes, depth, types and ranges are checked before they are used.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/units.h"
#include "mirror/frame.h"
#include "mirror/tls.h"

namespace drover::mirror {

inline constexpr int kProtocolVersion = 2;
inline constexpr std::size_t kMaxMessage = std::size_t{1} << 20;
inline constexpr std::size_t kMaxHello = 16384;
inline constexpr unsigned kMaxLanes = 16;
// Nothing heard on a connection for so long: it is lost. Short enough that a half-open link does
// not hold up a job, long enough for a host that is short of CPU; slow disks are no silence (see
// the beat).
inline constexpr std::chrono::milliseconds kSilence{5000};
inline constexpr unsigned kMaxRelays = 16;  // memory connections at once
inline constexpr Length kMaxDiskSize = Length(std::uint64_t{1} << 56);

// A job's id names directories and is the TLS identity: 1 to 64 of [A-Za-z0-9._-], no dot first.
Status check_session_id(std::string_view id);

std::string key_to_hex(const LinkKey& key);
Result<LinkKey> key_from_hex(std::string_view hex);
// From the system's generator.
Result<LinkKey> random_key();

// --- the hello: the first message on each connection, from source to target ---

enum class ConnectionKind { Control, Lane, Memory };

struct Hello {
  ConnectionKind kind = ConnectionKind::Control;
  std::string session;
  std::uint64_t epoch = 1;
  // Control: what holds for the whole session (its epoch).
  unsigned lanes = 0;
  FrameLimits limits;
  std::chrono::milliseconds silence{kSilence};
  // Lane: its index.
  unsigned lane = 0;
  // Memory: where to connect to on the target; an absolute path.
  std::string path;
  bool blocks = false;  // Memory: what follows from the source comes in blocks
};
nlohmann::json hello_to_json(const Hello& hello);
// Incompatible if the version differs, Protocol for anything else that is wrong.
Result<Hello> hello_from_json(const nlohmann::json& json);

// Where the guest's memory passes, on both hosts: a directory that QEMU's user may write to.
std::string memory_socket(const std::string& session);

// --- messages: 4 bytes of length, little-endian, and that much JSON (one object) ---

// The bytes to send. InvalidArgument if it is larger than kMaxMessage.
Result<std::string> encode_message(const nlohmann::json& json);
// Parses untrusted text: an object, no deeper than 16 levels. Protocol otherwise.
Result<nlohmann::json> parse_object(std::string_view text, std::string_view what);

// Collects a message from pieces as they arrive.
class MessageReader {
 public:
  explicit MessageReader(std::size_t limit = kMaxMessage) : limit_(limit) {}
  void set_limit(std::size_t limit) { limit_ = limit; }
  // Where the next bytes go: never empty.
  std::span<std::byte> space();
  // Protocol if the message is too long. A whole message when one is complete.
  Result<std::optional<std::string>> received(std::size_t count);

 private:
  std::size_t limit_;
  std::array<std::byte, 4> head_{};
  std::size_t have_ = 0;  // of head_, then of body_
  bool in_body_ = false;
  std::size_t length_ = 0;
  std::string body_;  // grows as bytes arrive, not as the length promises
};

// {"code":"no-space","message":...,"hint":...,"retryable":...}
nlohmann::json error_to_json(const Error& error);
Error error_from_json(const nlohmann::json& json);

// Typed access to untrusted objects: Protocol if a member is missing or of another type or range.
Result<std::string> get_string(const nlohmann::json& object, const char* name,
                               std::size_t max_size = 4096);
Result<std::uint64_t> get_unsigned(const nlohmann::json& object, const char* name,
                                   std::uint64_t max = UINT64_MAX);
Result<bool> get_bool(const nlohmann::json& object, const char* name, bool otherwise);

// --- the beat: 48 bytes that a lane's target end sends when it has nothing else to say ---

std::span<const std::byte, kHeaderSize> beat();
bool is_beat(std::span<const std::byte, kHeaderSize> header);

// --- the digest of a lane ---

// Over the headers of all frames of a lane in their order; with them goes the checksum of each
// payload, so equal digests mean equal frames, all of them, in the same order.
class LaneDigest {
 public:
  void add(std::span<const std::byte, kHeaderSize> header);
  [[nodiscard]] std::uint64_t frames() const { return frames_; }
  [[nodiscard]] std::uint64_t value() const { return value_; }
  bool operator==(const LaneDigest&) const = default;

  [[nodiscard]] nlohmann::json to_json() const;
  static Result<LaneDigest> from_json(const nlohmann::json& json);

 private:
  std::uint64_t frames_ = 0;
  std::uint64_t value_ = 0;
};

}  // namespace drover::mirror
