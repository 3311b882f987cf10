// Just enough of CUDA C++ to run csrc/ on a CPU: every CUDA thread is a call, or a std::thread where the threads
// of a block wait for each other. Found in place of NVIDIA's header of this name.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

using __half = _Float16;
inline __half __float2half_rn(float value) { return static_cast<__half>(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }

// Rounded one by one: the compiler's command forbids it to contract them.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(threads)
#define __shared__ static

struct Index {
  unsigned x, y, z;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;
inline std::unique_ptr<std::barrier<>> block_barrier;

using std::max;
using std::min;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

// Runs `kernel` over a grid, the threads of a block one after the other, or side by side if they synchronise.
template <typename Kernel>
void launch(unsigned x, unsigned y, unsigned threads, bool synchronises, Kernel kernel) {
  gridDim = {x, y, 1};
  blockDim = {threads, 1, 1};
  for (unsigned block = 0; block < x * y; ++block) {
    const Index at{block % x, block / x, 0};
    if (!synchronises) {
      for (unsigned thread = 0; thread < threads; ++thread) {
        blockIdx = at;
        threadIdx = {thread, 0, 0};
        kernel();
      }
      continue;
    }
    block_barrier = std::make_unique<std::barrier<>>(threads);
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        blockIdx = at;
        threadIdx = {thread, 0, 0};
        kernel();
      });
    }
    for (auto& thread : running) thread.join();
  }
}
