// A fiber: a function with a stack of its own, which can stop in its middle and be gone on with.
//
// ucontext starts one; after that setjmp and longjmp go back and forth, which takes no system call, as swapcontext would.
// ThreadSanitizer is told of every switch and takes each fiber for a thread, ordered with others by acquire and release alone.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <new>

extern "C" {  // of ThreadSanitizer's runtime; null where it is not loaded
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace emulated {

inline bool watched() { return __tsan_create_fiber != nullptr; }
inline void acquire(void* address) {
  if (watched()) __tsan_acquire(address);
}
inline void release(void* address) {
  if (watched()) __tsan_release(address);
}

class Fiber {
 public:
  using Function = void (*)();

  // `run` is called on the fiber's stack and must not return.
  explicit Fiber(Function run) : run_(run) {
    void* memory =
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = memory;
    if (watched()) own_context_ = __tsan_create_fiber(0);
  }
  ~Fiber() {
    if (watched()) __tsan_destroy_fiber(own_context_);
    munmap(stack_, stack_bytes);
  }
  Fiber(const Fiber&) = delete;

  // Runs it from where it stopped until it stops.
  void go_on() {
    if (_setjmp(caller_) != 0) return;
    if (watched()) {
      caller_context_ = __tsan_get_current_fiber();
      __tsan_switch_to_fiber(own_context_, no_order);
    }
    if (begun_) _longjmp(here_, 1);
    begun_ = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack_, start.uc_stack.ss_size = stack_bytes;
    start.uc_link = nullptr;
    makecontext(&start, run_, 0);
    setcontext(&start);
  }

  // Called on its own stack.
  void stop() {
    if (_setjmp(here_) != 0) return;
    if (watched()) __tsan_switch_to_fiber(caller_context_, no_order);
    _longjmp(caller_, 1);
  }

 private:
  static constexpr size_t stack_bytes = 256 << 10;
  static constexpr unsigned no_order = 1;  // __tsan_switch_to_fiber_no_sync

  Function run_;
  bool begun_ = false;
  jmp_buf here_, caller_;
  void *stack_, *own_context_ = nullptr, *caller_context_ = nullptr;
};

}  // namespace emulated
