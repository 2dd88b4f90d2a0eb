// CUDA's language on a CPU, as much of it as csrc/cuda uses, so that kernels can be run without a
// GPU. A thread of a block is a coroutine that runs until it waits for others of its warp or block;
// who waits for a thread that has returned, or that never comes, ends the program with a sentence.
// Only one thread runs at a time: races are not found.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__ static
#define __launch_bounds__(threads)
#define __shared__ static  // one block runs at a time

using std::fma;
using std::log2;
using std::max;
using std::min;
using std::nan;

using cudaStream_t = struct Stream*;

struct dim3 {
  unsigned x, y;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};

inline dim3 threadIdx(0, 0), blockIdx(0, 0), gridDim(0, 0);

namespace emulation {

constexpr int kWarp = 32;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  bool returned;
  int64_t n_warp_waits;
  uint64_t given[2];  // at this wait of the warp, and at the one before
};

inline std::vector<std::unique_ptr<Thread>> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool moved;  // since the scheduler began a round
inline unsigned n_running, n_waiting;  // threads, and those of them at the block's next barrier
inline int64_t n_barriers;

inline Thread& self() { return *threads[threadIdx.x]; }

inline void wait_until(const std::function<bool()>& ready) {
  while (!ready()) {
    const unsigned me = threadIdx.x;
    swapcontext(&threads[me]->context, &scheduler);
  }
  moved = true;
}

inline void enter() {
  body();
  self().returned = moved = true;
  --n_running;
  swapcontext(&self().context, &scheduler);
}

inline void run_block(unsigned n_threads) {
  while (threads.size() < n_threads) threads.push_back(std::make_unique<Thread>());
  threads.resize(n_threads);
  for (auto& pointer : threads) {
    Thread& thread = *pointer;
    thread.returned = false;
    thread.n_warp_waits = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (n_running = n_threads, n_waiting = 0; n_running > 0;) {
    moved = false;
    for (unsigned i = 0; i < n_threads; ++i) {
      if (threads[i]->returned) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i]->context);
    }
    if (moved) continue;
    std::fprintf(stderr, "block %u, %u: threads wait for others that never come\n", blockIdx.x,
                 blockIdx.y);
    std::exit(1);
  }
}

template <class... Parameters, class... Arguments>
void launch(dim3 grid, unsigned n_threads, int, cudaStream_t, void (*kernel)(Parameters...),
            Arguments... arguments) {
  gridDim = grid;
  body = [=] { kernel(arguments...); };
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(n_threads);
}

// Give a value to the lanes of a mask, and wait for theirs: values[lane].
template <class T>
std::array<T, kWarp> exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned first = threadIdx.x / kWarp * kWarp;
  if (!(mask >> (threadIdx.x - first) & 1)) {
    std::fprintf(stderr, "thread %u is not in the mask that it waits with\n", threadIdx.x);
    std::exit(1);
  }
  const int64_t turn = self().n_warp_waits++;
  std::memcpy(&self().given[turn % 2], &value, sizeof(T));
  const auto lanes = [=](const std::function<bool(unsigned)>& holds) {
    for (unsigned lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1 && !holds(lane)) return false;
    return true;
  };
  wait_until([&] {
    return lanes([&](unsigned lane) {
      return first + lane < threads.size() && threads[first + lane]->n_warp_waits > turn;
    });
  });
  std::array<T, kWarp> values{};
  for (unsigned lane = 0; lane < kWarp && first + lane < threads.size(); ++lane)
    std::memcpy(&values[lane], &threads[first + lane]->given[turn % 2], sizeof(T));
  return values;
}

}  // namespace emulation

inline void __syncthreads() {
  using namespace emulation;
  ++n_waiting;
  const int64_t turn = n_barriers;
  wait_until([=] {
    if (n_barriers == turn && n_waiting == n_running) n_waiting = 0, ++n_barriers;
    return n_barriers > turn;
  });
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  unsigned sum = 0;
  const auto values = emulation::exchange(mask, value);
  for (int lane = 0; lane < emulation::kWarp; ++lane)
    if (mask >> lane & 1) sum += values[lane];
  return sum;
}

inline bool __any_sync(unsigned mask, bool value) {
  return __reduce_add_sync(mask, value) > 0;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::exchange(mask, value)[threadIdx.x % emulation::kWarp ^ bits];
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  const unsigned lane = threadIdx.x % emulation::kWarp;
  const auto values = emulation::exchange(mask, value);
  return lane + offset < emulation::kWarp ? values[lane + offset] : value;
}

inline void atomicMin(long long* place, long long value) { *place = min(*place, value); }
inline void atomicOr(unsigned long long* place, unsigned long long value) { *place |= value; }
inline void atomicAdd(unsigned long long* place, unsigned long long value) { *place += value; }

inline int cudaGetLastError() { return 0; }

struct cudaFuncAttributes {};
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return 0;
}
