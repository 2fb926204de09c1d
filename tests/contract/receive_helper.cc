// SPDX-License-Identifier: Apache-2.0
//
// `drover receive` alone, for the tests that need the receiver as a process of its own.
#include "mirror/receiver.h"

int main() { return drover::mirror::run_receiver({}); }
