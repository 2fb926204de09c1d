// SPDX-License-Identifier: Apache-2.0
//
// CHECK: for what only a bug in drover can cause. On in release builds too: an engine that has
// lost its bearings must stop before it writes anywhere. What a user, a peer, a file or the
// kernel can cause is an Error (base/result.h), never a CHECK.
#pragma once

namespace drover {

// Prints where and what to standard error and aborts. Any thread.
[[noreturn]] void check_failed(const char* file, int line, const char* condition,
                               const char* why);

}  // namespace drover

#define CHECK(condition, why)                                             \
  do {                                                                    \
    if (!(condition)) [[unlikely]] {                                      \
      ::drover::check_failed(__FILE__, __LINE__, #condition, why);        \
    }                                                                     \
  } while (false)
