// Arithmetic on lanes. V holds one float for each lane: a float itself for a thread of a GPU, a vector on a CPU.
#pragma once
#include "problem.h"

#if !defined(GIGATOK_LEVEL)
#define GIGATOK_LEVEL one_lane
#endif

// Functions compiled for different processors must not be merged by the linker: each level has a namespace.
namespace gigatok {
inline namespace GIGATOK_LEVEL {

template <class V>
struct Lanes;

template <>
struct Lanes<float> {
  using Index = int32_t;
  static constexpr int count = 1;
};

template <class V>
GIGATOK_INLINE V broadcast(float x) {
  return x - V{};
}
template <>
GIGATOK_INLINE float broadcast<float>(float x) {
  return x;
}

GIGATOK_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
// Of numbers, not of NaN: a comparison and a selection would be two instructions of a GPU.
GIGATOK_INLINE float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
GIGATOK_INLINE float select(bool mask, float a, float b) {
  return mask ? a : b;
}
GIGATOK_INLINE int32_t select_index(bool mask, int32_t a, int32_t b) {
  return mask ? a : b;
}
GIGATOK_INLINE bool any(bool mask) {
  return mask;
}
GIGATOK_INLINE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_exp2f(x);
#endif
}
GIGATOK_INLINE float& lane(float& v, int) {
  return v;
}
GIGATOK_INLINE int32_t& lane(int32_t& v, int) {
  return v;
}

// Read-only data that no thread writes while a kernel runs.
GIGATOK_INLINE float fetch(const float* address) {
#if defined(__CUDA_ARCH__)
  return __ldg(address);
#else
  return *address;
#endif
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
