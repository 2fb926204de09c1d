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

// linux/ioprio.h. glibc has no wrapper.
constexpr int kBestEffort = 2;
constexpr int kIdle = 3;
constexpr int kLowest = 7;

void set_disk_priority(int io_class, int level) {
  constexpr int kOfAThread = 1;
  constexpr int kClassShift = 13;
  (void)::syscall(SYS_ioprio_set, kOfAThread, ::gettid(), (io_class << kClassShift) | level);
}

}  // namespace

void come_first() {
  // First at the CPU, not at the disks: the kernel takes a real-time thread's requests for
  // real-time requests, and mq-deadline issues nobody else's while one of those is under way.
  set_disk_priority(kBestEffort, kLowest);
  sched_param wanted{};
  wanted.sched_priority = 1;
  if (::sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &wanted) == 0) return;
  set_niceness(kUrgent);
}

void give_way() { set_niceness(kBackground); }

void stay_behind() {
  set_niceness(kLast);
  set_disk_priority(kIdle, 0);
}

}  // namespace drover
