// What the Teams of blocks.h, filter.h and recheck.h are on a GPU.
#pragma once
#include <cuda_fp16.h>

#include "blocks.h"
#include "recheck.h"

namespace gigatok {

// A block's threads, of which each keeps `residents` states.
template <class State, int residents>
class DeviceThreads {
 public:
  // 16 bytes to shared memory, on the way while the thread goes on; zeros if not valid.
  __device__ __forceinline__ void copy_four(float* to, const float* from, bool valid) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
  }
  // After this every thread has done what came before it, and sees what was copied.
  __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;\n" ::: "memory");
    __syncthreads();
  }

 protected:
  State states_[residents];
};

template <class Sweep>
class DeviceTeam : public DeviceThreads<typename Sweep::State, Shape<Sweep>::residents> {
 public:
  template <class Phase>
  __device__ __forceinline__ void each(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), this->states_);
  }
};

class DeviceFilter : public DeviceThreads<FilterState, 1> {
 public:
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
    phase(static_cast<int>(threadIdx.x), states_[0]);
  }
  __device__ __forceinline__ void multiply(const Fragment* fragments) {
    const uint2 codes = reinterpret_cast<const uint2*>(fragments)[threadIdx.x % 32];
    const uint32_t ones = states_[0].ones;
#pragma unroll
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      const uint32_t (&a)[2] = states_[0].latents[strip];
      float (&c)[4] = states_[0].scores[strip];
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%6},{%7,%8},{%9,%9,%9,%9};"
          : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(ones), "r"(codes.x), "r"(codes.y), "f"(0.f));
    }
  }
};

class DeviceWarp {
 public:
  template <class Phase>
  __device__ __forceinline__ void each(const Phase& phase) {
    phase(lane(), near_);
  }
  template <class Value>
  __device__ __forceinline__ static float largest(const Value& value) {
    float most = value(lane());
#pragma unroll
    for (int distance = 16; distance; distance /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    return most;
  }
  template <class Condition>
  __device__ __forceinline__ static uint32_t ballot(const Condition& condition) {
    return __ballot_sync(~0u, condition(lane()));
  }
  __device__ __forceinline__ static int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
  __device__ __forceinline__ int32_t nearest() const {
    Nearby near = near_;
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
      near.take({__shfl_xor_sync(~0u, near.distance, distance), __shfl_xor_sync(~0u, near.index, distance)});
    return near.index;
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  Nearby near_;
};

}  // namespace gigatok
