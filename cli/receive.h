// SPDX-License-Identifier: Apache-2.0
//
// `drover receive`: the target's side of a move, of its pre-flight and of clearing up after one
// that was killed. drover starts it over SSH and reads what it prints.
//
//   receive({.mode = ReceiveCommand::Mode::Probe});   // -> the exit code
//
// Threads: call it from a process's only thread. Blocks on standard input.
#pragma once

#include "cli/command_line.h"

namespace drover::cli {

int receive(const ReceiveCommand& command);

}  // namespace drover::cli
