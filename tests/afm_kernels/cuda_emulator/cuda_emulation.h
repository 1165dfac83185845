// CUDA blocks on the CPU, for the tests. See Note [Emulation] in csrc/cuda/platform.cuh.
//
// Every thread of a block is a fiber. It runs until it reaches a collective (shuffle, vote,
// barrier) and waits there until every lane of its warp, or every thread of the block, has reached
// the same one; a lane that is missing, or is at another collective, stops the test. Between
// collectives the threads run one after the other in an order drawn anew for every block, so that a
// kernel that depends on the order gives different results from run to run. Static shared memory
// keeps what the block before left in it, as on a GPU.

#pragma once

#include <setjmp.h>
#include <ucontext.h>
#include <vector_types.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

enum class Wait { kNone, kShuffle, kVote, kBarrier };

struct Fiber {
  jmp_buf resume;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
  Wait wait = Wait::kNone;
  int shuffle_bytes = 0, shuffle_offset = 0;
  unsigned generation = 0;  // which half of the slots the next collective of the warp uses
  alignas(8) char slot[2][8];
};

struct Machine {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  int current = 0;
  int threads = 0;
  std::string failure;
  uint64_t random = 0x9e3779b97f4a7c15ull;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  int64_t launches = 0;
};

inline Machine machine;
inline Index thread_index, block_index, block_size, grid_size;

inline uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

inline Fiber& self() { return machine.fibers[machine.current]; }

[[noreturn]] inline void yield_to_scheduler() { _longjmp(machine.scheduler, 1); }

// Waits until the scheduler lets this fiber go on.
inline void wait_for(Wait kind) {
  self().wait = kind;
  if (_setjmp(self().resume) == 0) yield_to_scheduler();
}

inline void fiber_main() {
  machine.body(machine.argument);
  self().finished = true;
  yield_to_scheduler();
}

inline void fail(const std::string& what) {
  if (machine.failure.empty()) machine.failure = what;
}

// Lets the fibers [first, last) go on if all of them wait at the same collective.
inline bool release(int first, int last) {
  const Fiber& leader = machine.fibers[first];
  for (int i = first; i < last; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.finished || fiber.wait != leader.wait ||
        fiber.shuffle_bytes != leader.shuffle_bytes ||
        fiber.shuffle_offset != leader.shuffle_offset) {
      return false;
    }
  }
  for (int i = first; i < last; ++i) machine.fibers[i].wait = Wait::kNone;
  return true;
}

inline void run_block() {
  const int threads = machine.threads;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  for (int i = threads - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
  for (Fiber& fiber : machine.fibers) {
    fiber.started = fiber.finished = false;
    fiber.wait = Wait::kNone;
    fiber.shuffle_bytes = fiber.shuffle_offset = 0;
    fiber.generation = 0;
  }
  for (;;) {
    bool ran = false, left = false;
    for (const int thread : order) {
      Fiber& fiber = machine.fibers[thread];
      if (fiber.finished) continue;
      left = true;
      if (fiber.wait != Wait::kNone) continue;
      ran = true;
      machine.current = thread;
      thread_index.x = thread;
      if (_setjmp(machine.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
        setcontext(&fiber.start);
      }
      if (!machine.failure.empty()) return;
    }
    if (!left) return;
    bool released = false;
    for (int warp = 0; warp < threads; warp += kWarp) {
      const Wait wait = machine.fibers[warp].wait;
      if (wait == Wait::kShuffle || wait == Wait::kVote) released |= release(warp, warp + kWarp);
    }
    if (machine.fibers[0].wait == Wait::kBarrier) released |= release(0, threads);
    if (!ran && !released) {
      return fail("lanes wait at different collectives, or some have left the kernel");
    }
  }
}

template <typename Params>
void run(void (*kernel)(Params), int64_t blocks, int threads, const Params& params) {
  if (threads <= 0 || threads > 1024 || threads % kWarp != 0) {
    throw std::runtime_error("emulation: a block of " + std::to_string(threads) + " threads");
  }
  if (blocks <= 0 || blocks > 0x7fffffff) {
    throw std::runtime_error("emulation: a grid of " + std::to_string(blocks) + " blocks");
  }
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, &params};
  machine.body = [](void* pointer) {
    const Call* call = static_cast<const Call*>(pointer);
    call->kernel(*call->params);
  };
  machine.argument = &call;
  machine.threads = threads;
  machine.launches += 1;
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    if (!machine.fibers[i].stack) machine.fibers[i].stack.reset(new char[kStackBytes]);
  }
  block_size.x = threads;
  grid_size.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    block_index.x = static_cast<unsigned>(block);
    run_block();
    if (!machine.failure.empty()) {
      const std::string failure = machine.failure;
      machine.failure.clear();
      throw std::runtime_error("emulation: " + failure);
    }
  }
}

template <typename T>
T shuffle_xor(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  if (mask != 0xffffffffu) fail("a shuffle without the whole warp");
  const int thread = machine.current;
  Fiber& fiber = self();
  const unsigned half = fiber.generation++ & 1;
  fiber.shuffle_bytes = sizeof(T);
  fiber.shuffle_offset = offset;
  std::memcpy(fiber.slot[half], &value, sizeof(T));
  wait_for(Wait::kShuffle);
  T result;
  std::memcpy(&result, machine.fibers[thread ^ offset].slot[half], sizeof(T));
  return result;
}

inline int any(unsigned mask, int predicate) {
  if (mask != 0xffffffffu) fail("a vote without the whole warp");
  const int thread = machine.current;
  Fiber& fiber = self();
  const unsigned half = fiber.generation++ & 1;
  fiber.shuffle_bytes = fiber.shuffle_offset = 0;
  fiber.slot[half][0] = predicate != 0;
  wait_for(Wait::kVote);
  int result = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    result |= machine.fibers[thread / kWarp * kWarp + lane].slot[half][0];
  }
  return result;
}

inline void barrier() {
  Fiber& fiber = self();
  fiber.shuffle_bytes = fiber.shuffle_offset = 0;
  wait_for(Wait::kBarrier);
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)
#define __shfl_xor_sync(mask, value, offset) ::emulation::shuffle_xor(mask, value, offset)
#define __any_sync(mask, predicate) ::emulation::any(mask, predicate)
#define __syncthreads() ::emulation::barrier()

template <typename T>
inline void __stcs(T* to, T value) {
  *to = value;
}
