// SPDX-License-Identifier: Apache-2.0
#include "memmig/libvirt_support.h"

#include <fmt/format.h>
#include <libvirt/libvirt-qemu.h>
#include <libvirt/virterror.h>

#include <array>
#include <utility>

namespace drover::memmig {

using nlohmann::json;

std::string uuid_of(virDomainPtr domain) {
  std::array<char, VIR_UUID_STRING_BUFLEN> uuid{};
  return virDomainGetUUIDString(domain, uuid.data()) == 0 ? std::string(uuid.data())
                                                          : std::string();
}

namespace {

bool connection_is_gone(const virError& error) {
  const std::string_view message = error.message == nullptr ? "" : error.message;
  if (error.code == VIR_ERR_INVALID_CONN || error.code == VIR_ERR_NO_CONNECT) return true;
  if (error.domain == VIR_FROM_RPC && error.code != VIR_ERR_AUTH_FAILED) return true;
  return contains(message, "client socket is closed") || contains(message, "Cannot recv data") ||
         contains(message, "Cannot write data") ||
         contains(message, "End of file while reading data") ||
         contains(message, "Failed to connect socket") ||
         contains(message, "unable to connect to server");
}

}  // namespace

Error libvirt_error(std::string_view doing) {
  const virError* last = virGetLastError();
  Error error;
  if (last == nullptr || last->code == VIR_ERR_OK) {
    error.message = fmt::format("{}: libvirt failed without saying why", doing);
    return error;
  }
  const std::string text = last->message == nullptr ? "" : last->message;
  error.message = fmt::format("{}: {}", doing, text);
  switch (last->code) {
    case VIR_ERR_NO_DOMAIN:
    case VIR_ERR_NO_NETWORK:
    case VIR_ERR_NO_STORAGE_POOL:
    case VIR_ERR_NO_STORAGE_VOL: error.code = Code::NotFound; break;
    case VIR_ERR_DOM_EXIST: error.code = Code::AlreadyExists; break;
    case VIR_ERR_OPERATION_TIMEOUT:
    case VIR_ERR_RESOURCE_BUSY:
      error.code = Code::Busy;
      error.retryable = true;
      break;
    case VIR_ERR_AUTH_FAILED:
    case VIR_ERR_AUTH_CANCELLED:
    case VIR_ERR_AUTH_UNAVAILABLE:
    case VIR_ERR_ACCESS_DENIED:
    case VIR_ERR_OPERATION_DENIED: error.code = Code::Denied; break;
    case VIR_ERR_OPERATION_ABORTED: error.code = Code::Cancelled; break;
    case VIR_ERR_OPERATION_INVALID: error.code = Code::Busy; break;
    case VIR_ERR_NO_SUPPORT:
    case VIR_ERR_OPERATION_UNSUPPORTED:
    case VIR_ERR_ARGUMENT_UNSUPPORTED:
    case VIR_ERR_CONFIG_UNSUPPORTED:
    case VIR_ERR_CPU_INCOMPATIBLE:
    case VIR_ERR_MIGRATE_UNSAFE: error.code = Code::Incompatible; break;
    case VIR_ERR_XML_ERROR:
    case VIR_ERR_XML_DETAIL:
    case VIR_ERR_INVALID_ARG: error.code = Code::InvalidArgument; break;
    case VIR_ERR_NO_MEMORY: error.code = Code::NoSpace; break;
    // Also what libvirt calls an internal error (a QEMU that died, for one): it is no bug of
    // drover.
    default: error.code = Code::Io; break;
  }
  if (connection_is_gone(*last)) {
    error.code = Code::Unreachable;
    error.retryable = true;
  }
  return error;
}

tl::unexpected<Error> libvirt_fail(std::string_view doing) {
  return tl::unexpected<Error>(libvirt_error(doing));
}

const json& field(const json& object, const char* name) {
  static const json kNothing;
  if (!object.is_object()) return kNothing;
  const auto found = object.find(name);
  return found == object.end() ? kNothing : *found;
}
std::string string_of(const json& object, const char* name) {
  const json& value = field(object, name);
  return value.is_string() ? value.get<std::string>() : std::string();
}
std::uint64_t number_of(const json& object, const char* name) {
  const json& value = field(object, name);
  return value.is_number_unsigned() ? value.get<std::uint64_t>() : 0;
}
bool bool_of(const json& object, const char* name) {
  const json& value = field(object, name);
  return value.is_boolean() && value.get<bool>();
}
Result<json> qmp(virDomainPtr domain, const char* command, const json& arguments,
                 std::string_view doing) {
  json request = {{"execute", command}};
  if (!arguments.empty()) request["arguments"] = arguments;
  char* raw = nullptr;
  const std::string text = request.dump(-1, ' ', false, json::error_handler_t::replace);
  if (virDomainQemuMonitorCommand(domain, text.c_str(), &raw, 0) < 0) return libvirt_fail(doing);
  const Text answer(raw);
  json parsed = json::parse(raw == nullptr ? "" : raw, nullptr, false);
  if (const json& error = field(parsed, "error"); error.is_object()) {
    const std::string kind = string_of(error, "class");
    const std::string description = string_of(error, "desc");
    Error out{Code::Io, fmt::format("{}: QEMU says: {}", doing, description), {}, false};
    if (kind == "DeviceNotFound" || contains(description, "Cannot find device") ||
        contains(description, "not found") || contains(description, "Failed to find node")) {
      out.code = Code::NotFound;
    } else if (kind == "CommandNotFound") {
      out.code = Code::Incompatible;
    } else if (contains(description, "in use") || contains(description, "already running") ||
               contains(description, "is busy")) {
      out.code = Code::Busy;
      out.retryable = true;
    }
    return fail(std::move(out));
  }
  if (!parsed.is_object() || !parsed.contains("return")) {
    return fail(Code::Internal, fmt::format("{}: QEMU's answer makes no sense", doing));
  }
  return std::move(parsed["return"]);
}

}  // namespace drover::memmig
