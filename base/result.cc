// SPDX-License-Identifier: Apache-2.0
#include "base/result.h"

#include <cerrno>
#include <system_error>

namespace drover {

std::string_view code_name(Code code) {
  switch (code) {
    case Code::InvalidArgument: return "invalid-argument";
    case Code::NotFound: return "not-found";
    case Code::AlreadyExists: return "already-exists";
    case Code::Denied: return "denied";
    case Code::NoSpace: return "no-space";
    case Code::Unreachable: return "unreachable";
    case Code::Protocol: return "protocol";
    case Code::Incompatible: return "incompatible";
    case Code::Busy: return "busy";
    case Code::Io: return "io";
    case Code::Cancelled: return "cancelled";
    case Code::Blocked: return "blocked";
    case Code::Internal: return "internal";
    case Code::Held: return "held";
  }
  return "internal";
}

std::string Error::to_string() const {
  return hint.empty() ? message : message + " (" + hint + ")";
}

static Code code_from_errno(int errno_value) {
  switch (errno_value) {
    case EINVAL:
    case ENAMETOOLONG:
    case ENOTDIR:
    case EISDIR: return Code::InvalidArgument;
    case ENOENT:
    case ENODEV:
    case ENXIO: return Code::NotFound;
    case EEXIST: return Code::AlreadyExists;
    case EACCES:
    case EPERM:
    case EROFS: return Code::Denied;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case ENOMEM: return Code::NoSpace;
    case ECONNREFUSED:
    case ECONNRESET:
    case ECONNABORTED:
    case EPIPE:
    case ETIMEDOUT:
    case EHOSTUNREACH:
    case ENETUNREACH:
    case EHOSTDOWN:
    case ENETDOWN: return Code::Unreachable;
    case EBUSY:
    case EAGAIN:
    case ETXTBSY: return Code::Busy;
    case ECANCELED: return Code::Cancelled;
    case EOPNOTSUPP:
    case ENOSYS: return Code::Incompatible;
    case EPROTO:
    case EBADMSG: return Code::Protocol;
    default: return Code::Io;
  }
}

Error error_from_errno(int errno_value, std::string_view doing) {
  Error error;
  error.code = code_from_errno(errno_value);
  error.message =
      std::string(doing) + ": " + std::error_code(errno_value, std::generic_category()).message();
  error.retryable = error.code == Code::Unreachable || error.code == Code::Busy;
  return error;
}

}  // namespace drover
