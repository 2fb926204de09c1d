// SPDX-License-Identifier: Apache-2.0
//
// What all that talks to libvirt has in common: handles that free themselves, its errors as ours,
// QEMU's answers read without exceptions. Internal to memmig.
//
// Threads: any; libvirt keeps an error for the thread that got it.
#pragma once

#include <libvirt/libvirt.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/result.h"

namespace drover::memmig {

// ---- libvirt's handles --------------------------------------------------------------------------

template <auto Free>
struct Freer {
  template <class T>
  void operator()(T* object) const {
    static_cast<void>(Free(object));
  }
};
using Connection = std::unique_ptr<virConnect, Freer<virConnectClose>>;
using Domain = std::unique_ptr<virDomain, Freer<virDomainFree>>;
using Network = std::unique_ptr<virNetwork, Freer<virNetworkFree>>;
using Pool = std::unique_ptr<virStoragePool, Freer<virStoragePoolFree>>;
using Volume = std::unique_ptr<virStorageVol, Freer<virStorageVolFree>>;
using Text = std::unique_ptr<char, Freer<std::free>>;

std::string uuid_of(virDomainPtr domain);

inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// ---- errors -------------------------------------------------------------------------------------

// From the calling thread's last libvirt error. Every call of libvirt's forgets it, also those that
// look harmless (virDomainGetName): make `doing` before the call that may fail.
Error libvirt_error(std::string_view doing);
tl::unexpected<Error> libvirt_fail(std::string_view doing);

// The definition with these VIR_DOMAIN_XML_ flags.
Result<std::string> definition_of(virDomainPtr domain, unsigned flags);

// ---- QEMU ---------------------------------------------------------------------------------------

// A field of an object; null if there is none, or if it is no object.
const nlohmann::json& field(const nlohmann::json& object, const char* name);
std::string string_of(const nlohmann::json& object, const char* name);
std::uint64_t number_of(const nlohmann::json& object, const char* name);
bool bool_of(const nlohmann::json& object, const char* name);

// A command of QEMU's monitor and what it returned. Errors: NotFound, Busy and Incompatible where
// QEMU's words say so, else Io; libvirt's own.
Result<nlohmann::json> qmp(virDomainPtr domain, const char* command,
                           const nlohmann::json& arguments, std::string_view doing);
inline Result<nlohmann::json> qmp(virDomainPtr domain, const char* command,
                                  std::string_view doing) {
  return qmp(domain, command, nlohmann::json::object(), doing);
}

}  // namespace drover::memmig
