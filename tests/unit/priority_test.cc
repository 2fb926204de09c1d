// SPDX-License-Identifier: Apache-2.0
#include "base/priority.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <thread>

namespace drover {
namespace {

struct Priority {
  int policy = 0;
  int niceness = 0;
  int disk_class = 0;  // linux/ioprio.h: 0 none (as the CPU's), 1 real time, 2 best effort, 3 idle
  int disk_level = 0;  // 0 to 7, 7 comes last
};

Priority of_a_thread_that_calls(void (*change)()) {
  Priority seen;
  std::thread([&] {
    change();
    seen.policy = ::sched_getscheduler(0) & ~SCHED_RESET_ON_FORK;
    seen.niceness = ::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()));
    const long io = ::syscall(SYS_ioprio_get, 1, ::gettid());
    seen.disk_class = static_cast<int>(io >> 13);
    seen.disk_level = static_cast<int>(io & 7);
  }).join();
  return seen;
}

TEST(Priority, WhoComesFirstAtTheCpuComesLastAtTheDisk) {
  const Priority seen = of_a_thread_that_calls(come_first);
  EXPECT_EQ(seen.disk_class, 2) << "a real-time thread's requests hold those of guests back";
  EXPECT_EQ(seen.disk_level, 7);
  const Priority possible = of_a_thread_that_calls([] {
    sched_param wanted{};
    wanted.sched_priority = 1;
    (void)::sched_setscheduler(0, SCHED_RR, &wanted);  // not everybody may
  });
  EXPECT_EQ(seen.policy, possible.policy);
}

TEST(Priority, WhoGivesWayIsNicerAndAsksDisksAsEveryoneDoes) {
  const Priority seen = of_a_thread_that_calls(give_way);
  EXPECT_EQ(seen.policy, SCHED_OTHER);
  EXPECT_GE(seen.niceness, 10);
  EXPECT_NE(seen.disk_class, 3);
}

TEST(Priority, WhoStaysBehindTakesWhatNobodyElseWants) {
  const Priority seen = of_a_thread_that_calls(stay_behind);
  EXPECT_EQ(seen.niceness, 19);
  EXPECT_EQ(seen.disk_class, 3);
}

TEST(Priority, ThreadsThatOneComingFirstStartsDoNot) {
  int policy = -1;
  std::thread([&] {
    come_first();
    std::thread([&] { policy = ::sched_getscheduler(0); }).join();
  }).join();
  EXPECT_EQ(policy, SCHED_OTHER);
}

}  // namespace
}  // namespace drover
