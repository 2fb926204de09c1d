// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <utility>
#include <vector>

#include "base/check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace drover::sim {
namespace {

constexpr std::size_t kStackSize = std::size_t{512} << 10;  // touched as far as it is used

thread_local Fiber* running = nullptr;
thread_local ucontext_t outside;
#if defined(__SANITIZE_ADDRESS__)
thread_local const void* outside_stack = nullptr;
thread_local std::size_t outside_size = 0;
#endif

}  // namespace

struct Fiber::Stack {
  Stack()
      : memory(::mmap(nullptr, kStackSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    CHECK(memory != MAP_FAILED, "there is memory for a stack");
  }
  ~Stack() { ::munmap(memory, kStackSize); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  static std::vector<std::unique_ptr<Stack>>& pool() {
    static thread_local std::vector<std::unique_ptr<Stack>> stacks;
    return stacks;
  }

  void* memory;
  ucontext_t context{};
};

Fiber::Fiber(std::function<void()> run) : run_(std::move(run)) {
  auto& pool = Stack::pool();
  if (pool.empty()) {
    stack_ = std::make_unique<Stack>();
  } else {
    stack_ = std::move(pool.back());
    pool.pop_back();
  }
  ::getcontext(&stack_->context);
  stack_->context.uc_stack.ss_sp = stack_->memory;
  stack_->context.uc_stack.ss_size = kStackSize;
  stack_->context.uc_link = nullptr;
  ::makecontext(&stack_->context, &Fiber::entry, 0);
}

Fiber::~Fiber() {
  CHECK(ended_, "a fiber runs to its end");
  Stack::pool().push_back(std::move(stack_));
}

Fiber* Fiber::current() { return running; }

void Fiber::entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &outside_stack, &outside_size);
#endif
  Fiber* const self = running;
  self->run_();
  self->run_ = nullptr;
  self->ended_ = true;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, outside_stack, outside_size);
#endif
  ::setcontext(&outside);
}

void Fiber::resume() {
  CHECK(running == nullptr, "fibers are resumed from outside of any");
  CHECK(!ended_, "a fiber that has ended does not go on");
  running = this;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_->memory, kStackSize);
#endif
  ::swapcontext(&outside, &stack_->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::suspend() {
  Fiber* const self = running;
  CHECK(self != nullptr, "only a fiber gives way");
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, outside_stack, outside_size);
#endif
  ::swapcontext(&self->stack_->context, &outside);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &outside_stack, &outside_size);
#endif
}

}  // namespace drover::sim
