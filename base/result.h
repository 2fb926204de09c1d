// SPDX-License-Identifier: Apache-2.0
//
// Errors are values. A function that can fail returns Result<T>; no exception crosses a library's
// boundary.
//
//   Result<int> open_image(const std::string& path) {
//     int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
//     if (fd < 0) return fail_errno(errno, "opening the source image " + path);
//     return fd;
//   }
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include <tl/expected.hpp>

namespace drover {

// The class of an error: what a caller may decide on. The command line maps each to one exit
// code (cli/exit_codes.h).
enum class Code {
  InvalidArgument,  // the user's or a file's input makes no sense
  NotFound,         // guest, host, file, pool, disk: does not exist
  AlreadyExists,    // a file that would have been overwritten, a job for the same guest
  Denied,           // permissions, wrong key
  NoSpace,          // disk or memory
  Unreachable,      // a host, port or daemon does not answer; the connection broke
  Protocol,         // a peer sent what it must not
  Incompatible,     // versions, CPU, machine type, unsupported kind of disk
  Busy,             // somebody else holds it: block job, NBD server, lock
  Io,               // a disk's read or write failed
  Cancelled,        // the user asked for it
  Blocked,          // pre-flight found something that stops the move
  Internal,         // a bug, or a library that broke its contract
  Held,             // a job stopped half-way, nothing is lost: `drover resume` or a person must go on
};

// "not-found" and so on; for --json and logs.
std::string_view code_name(Code code);

struct Error {
  Code code = Code::Internal;
  // One sentence: what was being done to what, and why it failed.
  std::string message;
  // What the user can do about it; may be empty.
  std::string hint;
  // Whether doing the same again later can help without anybody changing anything.
  bool retryable = false;

  // "message (hint)"
  [[nodiscard]] std::string to_string() const;
};

template <class T>
using Result = tl::expected<T, Error>;
using Status = Result<void>;

// return fail(Code::NotFound, "no guest is named web1", "virsh list --all shows the guests");
[[nodiscard]] inline tl::unexpected<Error> fail(Code code, std::string message,
                                                std::string hint = {}) {
  return tl::unexpected<Error>(Error{code, std::move(message), std::move(hint), false});
}
[[nodiscard]] inline tl::unexpected<Error> fail(Error error) {
  return tl::unexpected<Error>(std::move(error));
}

// An Error from errno: "doing: No such file or directory"; the code follows from errno.
[[nodiscard]] Error error_from_errno(int errno_value, std::string_view doing);
[[nodiscard]] inline tl::unexpected<Error> fail_errno(int errno_value, std::string_view doing) {
  return tl::unexpected<Error>(error_from_errno(errno_value, doing));
}

}  // namespace drover

// Hands an error up; for a Status or any Result whose value is not needed.
#define DROVER_TRY(expression)                                                 \
  do {                                                                         \
    if (auto drover_try_result = (expression); !drover_try_result) {           \
      return ::tl::unexpected<::drover::Error>(                                \
          std::move(drover_try_result).error());                               \
    }                                                                          \
  } while (false)

// DROVER_ASSIGN(auto image, open_image(path)): the value, or hands the error up.
#define DROVER_CONCAT_(a, b) a##b
#define DROVER_CONCAT(a, b) DROVER_CONCAT_(a, b)
#define DROVER_ASSIGN(declaration, expression) \
  DROVER_ASSIGN_(DROVER_CONCAT(drover_assign_, __LINE__), declaration, expression)
#define DROVER_ASSIGN_(temporary, declaration, expression)                    \
  auto temporary = (expression);                                              \
  if (!temporary) {                                                           \
    return ::tl::unexpected<::drover::Error>(std::move(temporary).error());   \
  }                                                                           \
  declaration = std::move(*temporary)
