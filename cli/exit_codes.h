// SPDX-License-Identifier: Apache-2.0
//
// What drover's exit code says. docs/drover.1 lists the same numbers; a test compares them.
//
//   return exit_code(error.code);
#pragma once

#include "base/result.h"

namespace drover::cli {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;    // a disk, a peer or a program failed; the move was undone
inline constexpr int kExitUsage = 2;     // the command line or a file makes no sense
inline constexpr int kExitNotFound = 3;  // guest, host, disk, file: does not exist
inline constexpr int kExitBlocked = 4;   // pre-flight found what stops the move
inline constexpr int kExitUnreachable = 5;   // host or daemon does not answer, or the link broke
inline constexpr int kExitDenied = 6;        // permissions, keys, not root
inline constexpr int kExitInTheWay = 7;      // a file already there, or somebody else holds it
inline constexpr int kExitNoSpace = 8;       // disk or memory
inline constexpr int kExitIncompatible = 9;  // versions, CPU, kind of disk
inline constexpr int kExitHeld = 10;         // stopped half-way, nothing lost: see what it says
inline constexpr int kExitLeft = 11;         // the job goes on without this command
inline constexpr int kExitInternal = 70;     // a bug in drover
inline constexpr int kExitCancelled = 130;   // Ctrl-C, SIGTERM, terminal closed; undone

constexpr int exit_code(Code code) {
  switch (code) {
    case Code::InvalidArgument: return kExitUsage;
    case Code::NotFound: return kExitNotFound;
    case Code::AlreadyExists:
    case Code::Busy: return kExitInTheWay;
    case Code::Denied: return kExitDenied;
    case Code::NoSpace: return kExitNoSpace;
    case Code::Unreachable: return kExitUnreachable;
    case Code::Incompatible: return kExitIncompatible;
    case Code::Protocol:
    case Code::Io: return kExitFailed;
    case Code::Cancelled: return kExitCancelled;
    case Code::Blocked: return kExitBlocked;
    case Code::Held: return kExitHeld;
    case Code::Internal: return kExitInternal;
  }
  return kExitInternal;
}

}  // namespace drover::cli
