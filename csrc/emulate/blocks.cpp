// Launches on the host. Blocks run one after the other; the threads of a block are fibers, and one runs until it has to wait
// for others: at a shuffle, at a barrier, at its end.
//
// MIXUPE_EMULATED_ORDER is the order of blocks and of the threads' turns: "forward", "reverse", or a number that seeds
// a random one; with "none" no block runs, and what is left of a call is the host's share. A result that depends on it is a race. Under ThreadSanitizer the reads and writes of the kernels are
// watched: threads of a block are ordered by barriers alone, blocks of a launch by nothing.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr int warp_size = 32, most_threads = 1024;

// Where threads wait for one another. It opens when all who are expected have come, and is then ready for the next time:
// some may come again before others have left. So what belongs to one time has two places, taken in turn.
struct Meeting {
  const char* name;
  int arrived = 0;
  unsigned opened = 0;

  int place() const { return opened % 2; }
  void open() { arrived = 0, ++opened; }
};

struct Warp {
  Meeting shuffle{"a shuffle"};
  unsigned words[2][warp_size];
  Meeting barrier{"__syncwarp"};
  char ordered[2];
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  bool done = false, synchronized = false;
  const Meeting* waits_at = nullptr;
  unsigned opened_before = 0;
  bool can_run() const { return !done && (!waits_at || waits_at->opened != opened_before); }
};

// A launch, and what its blocks hand to it.
struct Launch {
  const cudaLaunchConfig_t& config;
  const Kernel& kernel;
  char end = 0;  // stands for it in ThreadSanitizer's order
  std::exception_ptr failure;
  std::vector<Thread> last_block;  // ThreadSanitizer would take a new fiber for the one that was destroyed before it
};

// The block that this thread of the host runs. Its fibers serve the next block, too, but under ThreadSanitizer.
struct Block {
  Launch* launch = nullptr;
  std::vector<Thread> threads;  // as many as the largest block had
  std::vector<Warp> warps;
  Meeting barrier{"__syncthreads"};
  char ordered[2];  // stand for the barrier in ThreadSanitizer's order
  int size = 0, live = 0, current = 0;

  Thread& self() { return threads[current]; }
};

thread_local Block* block;

std::vector<int64_t> ordered(int64_t count) {
  static thread_local std::mt19937 random;
  static thread_local std::string seed;
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const char* wanted = std::getenv("MIXUPE_EMULATED_ORDER");
  if (!wanted || !std::strcmp(wanted, "forward")) return order;
  if (!std::strcmp(wanted, "none")) return {};
  if (!std::strcmp(wanted, "reverse")) {
    std::reverse(order.begin(), order.end());
    return order;
  }
  if (seed != wanted) random.seed(std::stoul(seed = wanted));
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

void wait_at(Meeting& meeting, int expected) {
  if (++meeting.arrived == expected) return meeting.open();
  Thread& self = block->self();
  self.waits_at = &meeting, self.opened_before = meeting.opened;
  self.fiber->stop();
  self.waits_at = nullptr;
}

// The word of the lane `from`, or one's own past the last lane.
unsigned exchange(unsigned mask, unsigned word, int from) {
  if (mask != 0xffffffffu) throw std::runtime_error("shuffles of a part of a warp are not emulated");
  Warp& warp = block->warps[block->current / warp_size];
  unsigned* words = warp.words[warp.shuffle.place()];
  const int lane = block->current % warp_size;
  words[lane] = word;
  wait_at(warp.shuffle, warp_size);
  return words[from < warp_size ? from : lane];
}

bool is_early(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      return config.attrs[i].val.programmaticStreamSerializationAllowed;
  return false;
}

// What a fiber does: the kernel, once for each block.
void run_thread() {
  for (;;) {
    Launch& launch = *block->launch;
    try {
      launch.kernel.call(launch.kernel.arguments);
      if (is_early(launch.config) && !block->self().synchronized)
        throw std::runtime_error("a thread of an early launch has not waited for the kernels before it");
    } catch (...) {
      launch.failure = std::current_exception();
    }
    release(&launch.end);
    block->self().done = true;
    --block->live;
    // A barrier waits for the threads that are left.
    if (block->barrier.arrived > 0 && block->barrier.arrived == block->live) block->barrier.open();
    block->self().fiber->stop();
  }
}

[[noreturn]] void report_stuck() {
  std::ostringstream message;
  message << "the threads of block " << blockIdx.x << " wait for ever:";
  int named = 0;
  for (int index = 0; index < block->size; ++index) {
    const Thread& thread = block->threads[index];
    if (thread.done) continue;
    if (++named > 8) break;
    message << (named > 1 ? ", " : " ") << index << " at " << thread.waits_at->name;
  }
  if (named > 8) message << " and so on";
  throw std::runtime_error(message.str());
}

// Gives every thread its turns until all are done, or one has failed.
void take_turns() {
  const std::vector<int64_t> order = ordered(block->size);
  while (block->live > 0) {
    bool moved = false;
    for (const int64_t index : order) {
      Thread& thread = block->threads[index];
      if (!thread.can_run()) continue;
      moved = true;
      block->current = static_cast<int>(index), threadIdx.x = static_cast<unsigned>(index);
      thread.fiber->go_on();
      if (block->launch->failure) return;
    }
    if (!moved) report_stuck();
  }
}

void run_block(Launch& launch, int64_t index) {
  static thread_local Block own;
  const size_t size = launch.config.blockDim.x;
  block = &own;
  gridDim = launch.config.gridDim, blockDim = launch.config.blockDim;
  const auto place = static_cast<uint64_t>(index);
  blockIdx.x = static_cast<unsigned>(place % gridDim.x);
  blockIdx.y = static_cast<unsigned>(place / gridDim.x % gridDim.y);
  blockIdx.z = static_cast<unsigned>(place / gridDim.x / gridDim.y);
  own.launch = &launch;
  if (own.threads.size() < size) own.threads.resize(size);
  own.warps.assign(size / warp_size, Warp{});
  own.barrier = {"__syncthreads"};
  own.size = own.live = static_cast<int>(size);
  for (size_t t = 0; t < size; ++t) {
    Thread& thread = own.threads[t];
    if (!thread.fiber) thread.fiber = std::make_unique<Fiber>(run_thread);
    thread.done = thread.synchronized = false, thread.waits_at = nullptr;
  }
  try {
    take_turns();
  } catch (...) {
    launch.failure = std::current_exception();
  }
  if (watched()) launch.last_block = std::move(own.threads);
  if (launch.failure) own.threads.clear();  // some stopped in the middle of the kernel
}

}  // namespace

int64_t early_launches = 0;

void launch(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  if (is_early(config)) ++early_launches;
  const unsigned threads = config.blockDim.x;
  if (threads == 0 || threads % warp_size || threads > most_threads)
    throw std::runtime_error("blocks of " + std::to_string(threads) + " threads are not emulated");
  Launch launch{config, kernel, 0, nullptr, {}};
  for (const int64_t index : ordered(int64_t(config.gridDim.x) * config.gridDim.y * config.gridDim.z)) {
    if (watched()) {
      // A thread of the host has __shared__ variables of its own; its end orders nothing but what it did itself.
      std::thread([&] { run_block(launch, index); }).join();
    } else {
      run_block(launch, index);
    }
    if (launch.failure) std::rethrow_exception(launch.failure);
  }
  acquire(&launch.end);
}

}  // namespace emulated

unsigned __shfl_sync(unsigned mask, unsigned word, int lane) { return emulated::exchange(mask, word, lane); }

unsigned __shfl_down_sync(unsigned mask, unsigned word, int offset) {
  return emulated::exchange(mask, word, emulated::block->current % emulated::warp_size + offset);
}

namespace {

// Waits for `expected` threads; all that they did before is done for those after it.
void meet(emulated::Meeting& barrier, char* ordered, int expected) {
  char* order = &ordered[barrier.place()];
  emulated::release(order);
  emulated::wait_at(barrier, expected);
  emulated::acquire(order);
}

}  // namespace

void cudaGridDependencySynchronize() { emulated::block->self().synchronized = true; }

// How many launches so far might begin early, for tests.
extern "C" __attribute__((visibility("default"))) int64_t mixupe_emulated_early_launches() {
  return emulated::early_launches;
}

void __syncthreads() { meet(emulated::block->barrier, emulated::block->ordered, emulated::block->live); }

void __syncwarp(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("a part of a warp is not emulated");
  emulated::Warp& warp = emulated::block->warps[emulated::block->current / emulated::warp_size];
  meet(warp.barrier, warp.ordered, emulated::warp_size);
}
