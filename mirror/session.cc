// SPDX-License-Identifier: Apache-2.0
#include "mirror/session.h"

#include <fmt/format.h>
#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"

namespace drover::mirror {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

namespace {

constexpr std::size_t kMaxDepth = 16;
constexpr std::size_t kMaxErrorText = 4096;
constexpr std::size_t kMaxUnixPath = 107;
constexpr std::uint32_t kBeatMagic = 0x42565244;  // "DRVB"
constexpr std::uint64_t kMaxSilence = 3600 * 1000;

auto broken(const std::string& why) {
  return fail(Code::Protocol, "the peer sent a message that breaks the protocol: " + why);
}

constexpr std::array<Code, 13> kCodes = {
    Code::InvalidArgument, Code::NotFound, Code::AlreadyExists, Code::Denied, Code::NoSpace,
    Code::Unreachable,     Code::Protocol, Code::Incompatible,  Code::Busy,   Code::Io,
    Code::Cancelled,       Code::Blocked,  Code::Internal};

// Parsing JSON of n bytes can cost many times n of memory if it nests: bound that first.
bool too_deep(std::string_view text) {
  std::size_t depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) return true;
    } else if ((c == ']' || c == '}') && depth > 0) {
      --depth;
    }
  }
  return false;
}

std::string cut(const std::string& text) {
  return text.size() <= kMaxErrorText ? text : text.substr(0, kMaxErrorText) + "...";
}

const char* kind_name(ConnectionKind kind) {
  switch (kind) {
    case ConnectionKind::Control: return "control";
    case ConnectionKind::Lane: return "lane";
    case ConnectionKind::Memory: return "memory";
  }
  return "control";
}

Status read_limits(const nlohmann::json& json, Hello& hello) {
  DROVER_ASSIGN(const std::uint64_t lanes, get_unsigned(json, "lanes", kMaxLanes));
  if (lanes == 0) return broken("a session without lanes");
  hello.lanes = static_cast<unsigned>(lanes);
  DROVER_ASSIGN(const std::uint64_t chunk, get_unsigned(json, "chunk_size", kMaxChunk.bytes()));
  if (chunk < kBlock.bytes() || !std::has_single_bit(chunk))
    return broken("a chunk size that no session has");
  hello.limits.chunk_size = Length(chunk);
  DROVER_ASSIGN(const std::uint64_t silence, get_unsigned(json, "silence_ms", kMaxSilence));
  if (silence == 0) return broken("a silence of nothing");
  hello.silence = std::chrono::milliseconds(silence);
  const auto disks = json.find("disks");
  if (disks == json.end() || !disks->is_array() || disks->size() > kMaxDisks) {
    return broken(fmt::format("\"disks\" is not an array of at most {}", kMaxDisks));
  }
  for (const nlohmann::json& size : *disks) {
    if (!size.is_number_unsigned() || size.get<std::uint64_t>() > kMaxDiskSize.bytes()) {
      return broken("a disk's size that no disk has");
    }
    hello.limits.disk_sizes.emplace_back(size.get<std::uint64_t>());
  }
  return {};
}

}  // namespace

Status check_session_id(std::string_view id) {
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  if (id.empty() || id.size() > 64 || id.front() == '.' || !std::ranges::all_of(id, allowed)) {
    return fail(Code::InvalidArgument,
                "a job's id is 1 to 64 letters, digits, dots, dashes and underscores");
  }
  return {};
}

std::string key_to_hex(const LinkKey& key) {
  std::string hex;
  for (const std::byte b : key) hex += fmt::format("{:02x}", static_cast<unsigned>(b));
  return hex;
}

Result<LinkKey> key_from_hex(std::string_view hex) {
  const auto digit = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
  };
  LinkKey key{};
  if (hex.size() != 2 * key.size()) {
    return fail(Code::InvalidArgument, "the session's key is not 64 hexadecimal digits");
  }
  for (std::size_t i = 0; i < key.size(); ++i) {
    const int high = digit(hex[2 * i]);
    const int low = digit(hex[2 * i + 1]);
    if (high < 0 || low < 0) {
      return fail(Code::InvalidArgument, "the session's key is not 64 hexadecimal digits");
    }
    key.at(i) = static_cast<std::byte>(high * 16 + low);
  }
  return key;
}

Result<LinkKey> random_key() {
  LinkKey key{};
  const int rc = gnutls_rnd(GNUTLS_RND_KEY, key.data(), key.size());
  if (rc < 0) return fail(Code::Internal, std::string("making a key: ") + gnutls_strerror(rc));
  return key;
}

nlohmann::json hello_to_json(const Hello& hello) {
  nlohmann::json json = {{"protocol", kProtocolVersion},
                         {"version", DROVER_VERSION},
                         {"session", hello.session},
                         {"epoch", hello.epoch},
                         {"kind", kind_name(hello.kind)}};
  switch (hello.kind) {
    case ConnectionKind::Control: {
      json["lanes"] = hello.lanes;
      json["chunk_size"] = hello.limits.chunk_size.bytes();
      json["silence_ms"] = static_cast<std::uint64_t>(hello.silence.count());
      nlohmann::json disks = nlohmann::json::array();
      for (const Length size : hello.limits.disk_sizes) disks.push_back(size.bytes());
      json["disks"] = std::move(disks);
      break;
    }
    case ConnectionKind::Lane: json["lane"] = hello.lane; break;
    case ConnectionKind::Memory:
      json["path"] = hello.path;
      json["blocks"] = hello.blocks;
      break;
  }
  return json;
}

Result<Hello> hello_from_json(const nlohmann::json& json) {
  DROVER_ASSIGN(const std::uint64_t protocol, get_unsigned(json, "protocol"));
  if (protocol != kProtocolVersion) {
    return fail(Code::Incompatible,
                fmt::format("the other side speaks protocol {}, this drover {} speaks {}", protocol,
                            DROVER_VERSION, kProtocolVersion),
                "install the same version of drover on both hosts");
  }
  Hello hello;
  DROVER_ASSIGN(hello.session, get_string(json, "session", 64));
  DROVER_ASSIGN(hello.epoch, get_unsigned(json, "epoch"));
  if (hello.epoch == 0) return broken("epochs begin at 1");
  DROVER_ASSIGN(const std::string kind, get_string(json, "kind", 16));
  if (kind == "control") {
    hello.kind = ConnectionKind::Control;
    DROVER_TRY(read_limits(json, hello));
  } else if (kind == "lane") {
    hello.kind = ConnectionKind::Lane;
    DROVER_ASSIGN(const std::uint64_t lane, get_unsigned(json, "lane", kMaxLanes - 1));
    hello.lane = static_cast<unsigned>(lane);
  } else if (kind == "memory") {
    hello.kind = ConnectionKind::Memory;
    DROVER_ASSIGN(hello.path, get_string(json, "path", kMaxUnixPath));
    if (hello.path.empty() || hello.path.front() != '/' ||
        hello.path.find('\0') != std::string::npos) {
      return broken("a path that is not absolute");
    }
    DROVER_ASSIGN(hello.blocks, get_bool(json, "blocks", false));
  } else {
    return broken("a connection of an unknown kind");
  }
  return hello;
}

std::string memory_socket(const std::string& session) {
  return "/var/lib/libvirt/qemu/drover-" + session + ".sock";
}

Result<std::string> encode_message(const nlohmann::json& json) {
  const std::string text = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMaxMessage) {
    return fail(Code::InvalidArgument, "a message of more than 1 MiB is not sent");
  }
  const auto length = static_cast<std::uint32_t>(text.size());
  std::string out(sizeof length, '\0');
  std::memcpy(out.data(), &length, sizeof length);
  return out + text;
}

Result<nlohmann::json> parse_object(std::string_view text, std::string_view what) {
  if (too_deep(text)) return fail(Code::Protocol, fmt::format("{} nests too deeply", what));
  nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  if (json.is_discarded() || !json.is_object()) {
    return fail(Code::Protocol, fmt::format("{} is not a JSON object", what));
  }
  return json;
}

std::span<std::byte> MessageReader::space() {
  if (!in_body_) return std::span(head_).subspan(have_);
  constexpr std::size_t kStep = 16384;
  const std::size_t want = std::min(length_, have_ + kStep);
  if (body_.size() < want) body_.resize(want);
  return std::as_writable_bytes(std::span(body_)).subspan(have_);
}

Result<std::optional<std::string>> MessageReader::received(std::size_t count) {
  have_ += count;
  if (!in_body_) {
    CHECK(have_ <= head_.size(), "no more was received than there was space");
    if (have_ < head_.size()) return std::nullopt;
    std::uint32_t length = 0;
    std::memcpy(&length, head_.data(), sizeof length);
    if (length == 0 || length > limit_) {
      return broken(fmt::format("a message of {} bytes", length));
    }
    length_ = length;
    in_body_ = true;
    have_ = 0;
    return std::nullopt;
  }
  CHECK(have_ <= body_.size(), "no more was received than there was space");
  if (have_ < length_) return std::nullopt;
  std::optional<std::string> whole(std::move(body_));
  body_.clear();
  in_body_ = false;
  have_ = 0;
  return whole;
}

nlohmann::json error_to_json(const Error& error) {
  return {{"code", code_name(error.code)},
          {"message", cut(error.message)},
          {"hint", cut(error.hint)},
          {"retryable", error.retryable}};
}

Error error_from_json(const nlohmann::json& json) {
  Error error;
  error.code = Code::Protocol;
  error.message = "the other side reported an error that can't be read";
  if (!json.is_object()) return error;
  if (auto message = get_string(json, "message", kMaxErrorText + 3)) error.message = *message;
  if (auto hint = get_string(json, "hint", kMaxErrorText + 3)) error.hint = *hint;
  if (auto retryable = get_bool(json, "retryable", false)) error.retryable = *retryable;
  if (auto name = get_string(json, "code", 64)) {
    for (const Code code : kCodes) {
      if (*name == code_name(code)) error.code = code;
    }
  }
  return error;
}

Result<std::string> get_string(const nlohmann::json& object, const char* name,
                               std::size_t max_size) {
  const auto found = object.find(name);
  if (found == object.end() || !found->is_string()) {
    return broken(fmt::format("\"{}\" is not a string", name));
  }
  const auto& text = found->get_ref<const std::string&>();
  if (text.size() > max_size) return broken(fmt::format("\"{}\" is too long", name));
  return text;
}

Result<std::uint64_t> get_unsigned(const nlohmann::json& object, const char* name,
                                   std::uint64_t max) {
  const auto found = object.find(name);
  if (found == object.end() || !found->is_number_unsigned()) {
    return broken(fmt::format("\"{}\" is not a number", name));
  }
  const auto value = found->get<std::uint64_t>();
  if (value > max) return broken(fmt::format("\"{}\" is more than {}", name, max));
  return value;
}

Result<bool> get_bool(const nlohmann::json& object, const char* name, bool otherwise) {
  const auto found = object.find(name);
  if (found == object.end()) return otherwise;
  if (!found->is_boolean()) return broken(fmt::format("\"{}\" is not true or false", name));
  return found->get<bool>();
}

static constexpr std::array<std::byte, kHeaderSize> make_beat() {
  std::array<std::byte, kHeaderSize> bytes{};
  for (std::size_t i = 0; i < sizeof kBeatMagic; ++i) {
    bytes.at(i) = static_cast<std::byte>(kBeatMagic >> (8 * i));
  }
  return bytes;
}
static constexpr std::array<std::byte, kHeaderSize> kBeat = make_beat();

std::span<const std::byte, kHeaderSize> beat() { return kBeat; }

bool is_beat(std::span<const std::byte, kHeaderSize> header) {
  return std::ranges::equal(header, kBeat);
}

void LaneDigest::add(std::span<const std::byte, kHeaderSize> header) {
  ++frames_;
  value_ = XXH3_64bits_withSeed(header.data(), header.size(), value_);
}

nlohmann::json LaneDigest::to_json() const { return {{"frames", frames_}, {"digest", value_}}; }

Result<LaneDigest> LaneDigest::from_json(const nlohmann::json& json) {
  if (!json.is_object()) return broken("a lane's digest is not an object");
  LaneDigest digest;
  DROVER_ASSIGN(digest.frames_, get_unsigned(json, "frames"));
  DROVER_ASSIGN(digest.value_, get_unsigned(json, "digest"));
  return digest;
}

}  // namespace drover::mirror
