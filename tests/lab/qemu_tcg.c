// SPDX-License-Identifier: Apache-2.0
// Loaded into the lab's QEMUs (LD_PRELOAD): keeps the memory of emulated (TCG) guests whole in a migration.
//
// A vCPU of an emulated guest marks a page dirty only at its first write since the page got its TLB entry, or since
// the last sync of the dirty bitmap, which resets the entries. QEMU (7.2) looks whether a page is dirty before it takes
// the TLB's lock, and under it makes an entry that lets the page be written unmarked (accel/tcg/cputlb.c:
// tlb_set_page_full, notdirty_write). A sync in between clears the page's bit and finds no such entry to reset: the
// vCPU then writes to a page that is never marked, and the target keeps an old one. And for a RAM block whose size is a
// multiple of 256 KiB a sync resets no entry at all (before 8.2.2; "physmem: Fix migration dirty bitmap coherency with
// TCG memory access").
//
// So here each vCPU flushes its TLB after each sync, before a page is sent: what it writes then is marked anew. QEMU's
// own memory_global_after_dirty_log_sync() makes each vCPU end what it is executing, at just that place; it is replaced.
// KVM guests have no such TLB and are not touched.

#ifndef __x86_64__
#error "written for x86-64, as the lab's guests are"
#endif
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct CPUState CPUState;
typedef union { unsigned long target_ptr; } RunOnCpuData;  // QEMU's run_on_cpu_data: 8 bytes, by value

// QEMU exports them for its modules.
static CPUState *(*qemu_get_cpu)(int index);
static void (*run_on_cpu)(CPUState *cpu, void (*work)(CPUState *, RunOnCpuData), RunOnCpuData data);
static void (*tlb_flush)(CPUState *cpu);
static const bool *tcg_allowed;

static void flush(CPUState *cpu, RunOnCpuData data) {
  (void)data;
  tlb_flush(cpu);
}

static void after_sync(void) {
  if (!*tcg_allowed) return;
  CPUState *cpu;
  for (int i = 0; (cpu = qemu_get_cpu(i)) != NULL; i++) run_on_cpu(cpu, flush, (RunOnCpuData){0});
}

__attribute__((constructor)) static void replace(void) {
  unsigned char *replaced = dlsym(RTLD_DEFAULT, "memory_global_after_dirty_log_sync");
  if (replaced == NULL) return;  // libvirtd, or what else it starts
  qemu_get_cpu = dlsym(RTLD_DEFAULT, "qemu_get_cpu");
  run_on_cpu = dlsym(RTLD_DEFAULT, "run_on_cpu");
  tlb_flush = dlsym(RTLD_DEFAULT, "tlb_flush");
  tcg_allowed = dlsym(RTLD_DEFAULT, "tcg_allowed");
  // mov $after_sync, %rax; jmp *%rax
  unsigned char jump[12] = {0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};
  void (*const to)(void) = after_sync;
  memcpy(jump + 2, &to, sizeof to);
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t begin = (uintptr_t)replaced & ~(page - 1);
  const size_t size = (uintptr_t)replaced + sizeof jump - begin;
  if (!qemu_get_cpu || !run_on_cpu || !tlb_flush || !tcg_allowed ||
      mprotect((void *)begin, size, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
    fputs("tests/lab/qemu_tcg.c does not fit this QEMU: its guests would lose memory in a migration\n", stderr);
    _exit(1);
  }
  memcpy(replaced, jump, sizeof jump);
  (void)mprotect((void *)begin, size, PROT_READ | PROT_EXEC);
}
