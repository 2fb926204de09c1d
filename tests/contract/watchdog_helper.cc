// SPDX-License-Identifier: Apache-2.0
//
// For endpoint_watchdog_test:
//   watchdog_helper runner WATCHED FORGOTTEN    a process that is watched, with two inherited
//   sockets, of
//                                               which it forgets one; prints its watchdog's process
//                                               id, each time it has a new one
//   watchdog_helper guard MILLISECONDS          the watchdog
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <string_view>

#include "mirror/endpoint_watchdog.h"

namespace {

using namespace drover;

int run(int watched, int forgotten) {
  auto loop = Loop::create();
  if (!loop) return 1;
  auto watchdog = mirror::EndpointWatchdog::start(
      **loop, {.command = {"/proc/self/exe", "guard"}, .limit = std::chrono::seconds(1)});
  if (!watchdog) return 1;
  (*watchdog)->watch(watched);
  (*watchdog)->watch(forgotten);
  (*watchdog)->forget(forgotten);
  pid_t told = -1;
  const std::function<void()> tell = [&] {
    if (const pid_t pid = (*watchdog)->pid(); pid != told) {
      told = pid;
      std::printf("%d\n", pid);
      std::fflush(stdout);
    }
    (*loop)->at(now() + std::chrono::milliseconds(10), tell);
  };
  tell();
  (*loop)->run();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "guard") {
    return mirror::run_endpoint_watchdog({argv + 2, argv + argc});
  }
  return argc == 4 ? run(std::atoi(argv[2]), std::atoi(argv[3])) : 2;
}
