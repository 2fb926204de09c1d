// SPDX-License-Identifier: Apache-2.0
//
// How urgent a thread is on a host whose CPUs and disks may all be busy, with guests not least. These
// change the calling thread only, do not fail, and do as much as the process is allowed to.
#pragma once

namespace drover {

// For a thread that guests wait for, and that does little: real time (SCHED_RR, the lowest priority
// of it), else niceness -10. What it asks of disks comes last of what is not idle.
void come_first();

// For a thread that moves much and that nobody waits for: niceness 10. It still gets a tenth of a
// busy CPU.
void give_way();

// For a thread that reads whole disks when they have nothing else to do: niceness 19, and of the
// disks what nobody else wants (where their scheduler knows of that).
void stay_behind();

}  // namespace drover
