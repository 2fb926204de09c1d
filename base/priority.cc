// SPDX-License-Identifier: Apache-2.0
#include "base/priority.h"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

namespace drover {
namespace {

constexpr int kUrgent = -10;
constexpr int kBackground = 10;

void set_niceness(int nice) {
  (void)::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), nice);
}

}  // namespace

void come_first() {
  sched_param wanted{};
  wanted.sched_priority = 1;
  if (::sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &wanted) == 0) return;
  set_niceness(kUrgent);
}

void give_way() { set_niceness(kBackground); }

}  // namespace drover
