// SPDX-License-Identifier: Apache-2.0
#include "base/priority.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace drover {
namespace {

constexpr int kUrgent = -10;
constexpr int kBackground = 10;
constexpr int kLast = 19;

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

void stay_behind() {
  set_niceness(kLast);
  // linux/ioprio.h: IOPRIO_WHO_PROCESS, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT. glibc has no wrapper.
  constexpr int kOfAThread = 1;
  constexpr int kIdleClass = 3 << 13;
  (void)::syscall(SYS_ioprio_set, kOfAThread, ::gettid(), kIdleClass);
}

}  // namespace drover
