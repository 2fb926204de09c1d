// SPDX-License-Identifier: Apache-2.0
//
// `drover receive` alone, for the tests that need the receiver as a process of its own.
#include <cstdlib>
#include <string_view>

#include "mirror/receiver.h"

// Arguments: as drover's. --stop looks in $DROVER_TEST_JOBS.
int main(int argc, char** argv) {
  if (argc == 4 && std::string_view(argv[2]) == "--stop") {
    const char* const jobs = std::getenv("DROVER_TEST_JOBS");
    return jobs != nullptr && drover::mirror::stop_receiver(jobs, argv[3]) ? 0 : 1;
  }
  return drover::mirror::run_receiver({});
}
