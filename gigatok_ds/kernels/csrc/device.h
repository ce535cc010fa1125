// What the Teams of blocks.h and filter.h are on a GPU.
#pragma once
#include <cuda_fp16.h>

#include "blocks.h"
#include "filter.h"

namespace gigatok {

template <class Sweep>
class DeviceTeam {
 public:
  template <class Phase>
  __device__ __forceinline__ void each(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), states_);
  }
  // 16 bytes to shared memory, on the way while the thread goes on; zeros if not valid.
  __device__ __forceinline__ void copy_four(float* to, const float* from, bool valid) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;\n" ::: "memory");
    __syncthreads();
  }
  __device__ __forceinline__ void barrier() { __syncthreads(); }

 private:
  typename Sweep::State states_[Shape<Sweep>::residents];
};

class DeviceWarp {
 public:
  __device__ __forceinline__ explicit DeviceWarp(int lane) : lane_(lane) {}

  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    const __half2 packed = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(packed);
  }
  // A number as the sum of two in half precision.
  __device__ __forceinline__ static uint32_t pack_parts(float x) {
    const float part = __half2float(__float2half_rn(x));
    return pack(part, x - part);
  }
  template <class Phase>
  __device__ __forceinline__ void each(const Phase& phase) {
    phase(lane_, state_);
  }
  __device__ __forceinline__ void multiply(const Fragment* fragments) {
    const uint2 codes = __ldg(reinterpret_cast<const uint2*>(fragments) + lane_);
#pragma unroll
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      const uint32_t (&a)[4] = state_.latents[strip];
      float (&c)[4] = state_.scores[strip];
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"
          : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(codes.x), "r"(codes.y), "f"(0.f));
    }
  }
  template <class Raise>
  __device__ __forceinline__ void share_best(const Raise& raise) {
#pragma unroll
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float best = state_.nearest[strip][half].best;
        best = fminf(best, __shfl_xor_sync(~0u, best, 1));
        best = fminf(best, __shfl_xor_sync(~0u, best, 2));
        raise(state_, strip, half, best);
      }
    }
  }

 private:
  FilterState state_;
  int lane_;
};

}  // namespace gigatok
