// SPDX-License-Identifier: Apache-2.0
#include "mirror/known_filter.h"

#include <gnutls/gnutls.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "mirror/session.h"

namespace drover::mirror {
namespace {

// With its base64 (a third more) well below the longest message.
constexpr std::size_t kPart = std::size_t{512} << 10;

struct Datum {
  gnutls_datum_t datum{};
  Datum() = default;
  ~Datum() { gnutls_free(datum.data); }
  Datum(const Datum&) = delete;
  Datum& operator=(const Datum&) = delete;
};

gnutls_datum_t view(const void* data, std::size_t size) {
  return {static_cast<unsigned char*>(const_cast<void*>(data)), static_cast<unsigned>(size)};
}

std::string to_base64(std::span<const std::byte> bytes) {
  const gnutls_datum_t in = view(bytes.data(), bytes.size());
  Datum out;
  const int failed = gnutls_base64_encode2(&in, &out.datum);
  CHECK(failed == 0, "what is in memory can be encoded");
  return {reinterpret_cast<const char*>(out.datum.data), out.datum.size};
}

Status add_base64(const std::string& text, std::vector<std::byte>& to) {
  const gnutls_datum_t in = view(text.data(), text.size());
  Datum out;
  if (text.empty() || gnutls_base64_decode2(&in, &out.datum) != 0 || out.datum.size == 0) {
    return fail(Code::Protocol, "a part of the target's index can't be read");
  }
  const auto* const bytes = reinterpret_cast<const std::byte*>(out.datum.data);
  to.insert(to.end(), bytes, bytes + out.datum.size);
  return {};
}

}  // namespace

Result<nlohmann::json> filter_part(const PieceFilter* filter, const nlohmann::json& request) {
  DROVER_ASSIGN(const std::uint64_t offset, get_unsigned(request, "offset"));
  if (filter == nullptr) return nlohmann::json{{"piece", kPiece.bytes()}, {"size", 0U}};
  const std::span<const std::byte> bytes = filter->bytes();
  if (offset >= bytes.size()) return fail(Code::Protocol, "the index's filter ends before that");
  const auto part = bytes.subspan(offset, std::min<std::size_t>(kPart, bytes.size() - offset));
  return nlohmann::json{{"piece", kPiece.bytes()},
                        {"size", bytes.size()},
                        {"probes", filter->probes()},
                        {"data", to_base64(part)}};
}

Result<std::shared_ptr<const PieceFilter>> fetch_filter(
    const std::function<Result<nlohmann::json>(const nlohmann::json& request)>& call) {
  std::shared_ptr<const PieceFilter> none;
  std::vector<std::byte> bytes;
  while (true) {
    const auto part = call({{"op", "index"}, {"offset", bytes.size()}});
    if (!part && part.error().code == Code::InvalidArgument) return none;
    if (!part) return fail(part.error());
    DROVER_ASSIGN(const std::uint64_t piece, get_unsigned(*part, "piece"));
    DROVER_ASSIGN(const std::uint64_t size, get_unsigned(*part, "size", PieceFilter::kMaxBytes));
    if (size == 0 || piece != kPiece.bytes()) return none;
    DROVER_ASSIGN(const std::uint64_t probes, get_unsigned(*part, "probes"));
    DROVER_ASSIGN(const std::string data, get_string(*part, "data", kMaxMessage));
    const std::size_t before = bytes.size();
    DROVER_TRY(add_base64(data, bytes));
    if (bytes.size() < size && bytes.size() - before < kPart) {
      return fail(Code::Protocol, "the target sends its index in parts that are too small");
    }
    if (bytes.size() > size)
      return fail(Code::Protocol, "the target's index is longer than it says");
    if (bytes.size() < size) continue;
    DROVER_ASSIGN(PieceFilter filter, PieceFilter::from_bytes(std::move(bytes), probes));
    return std::make_shared<const PieceFilter>(std::move(filter));
  }
}

}  // namespace drover::mirror
