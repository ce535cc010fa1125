// Lanes of a CPU's vector registers, in the compiler's vector types: GIGATOK_WIDTH of them for the level GIGATOK_LEVEL.
#pragma once
#include "lanes.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int WIDTH = GIGATOK_WIDTH;
typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t VectorIndex __attribute__((vector_size(4 * WIDTH)));

template <>
struct Lanes<Vector> {
  using Index = VectorIndex;
  static constexpr int count = WIDTH;
};

// The compiler contracts this to one instruction where there is one (-ffp-contract=fast).
GIGATOK_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
  return a * b + c;
}
GIGATOK_INLINE Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}
GIGATOK_INLINE Vector select(VectorIndex mask, Vector a, Vector b) {
  return mask ? a : b;
}
GIGATOK_INLINE VectorIndex select_index(VectorIndex mask, int32_t a, VectorIndex b) {
  return mask ? a - VectorIndex{} : b;
}

GIGATOK_INLINE bool any(VectorIndex mask) {
#if GIGATOK_WIDTH == 16
  return __builtin_ia32_ptestmd512(mask, mask, static_cast<unsigned short>(-1)) != 0;
#elif GIGATOK_WIDTH == 8
  return __builtin_ia32_movmskps256((Vector)mask) != 0;
#elif defined(__SSE__)
  return __builtin_ia32_movmskps((Vector)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// 2^x for x <= 0 to about one unit in the last place; 0 below 2^-126. The fraction is in [-1/2, 1/2], where the
// polynomial is the minimax one of degree 6.
GIGATOK_INLINE Vector power_of_two(Vector x) {
  constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector clamped = larger(x, broadcast<Vector>(-126.f));
  const Vector shifted = clamped + SHIFT;
  const Vector fraction = clamped - (shifted - SHIFT);
  const VectorIndex exponent = (VectorIndex)shifted - 0x4B400000;
  Vector p = broadcast<Vector>(1.5403530393381609e-4f);
  p = p * fraction + 1.3333558146428443e-3f;
  p = p * fraction + 9.618129107628477e-3f;
  p = p * fraction + 5.550410866482158e-2f;
  p = p * fraction + 2.402265069591007e-1f;
  p = p * fraction + 6.931471805599453e-1f;
  p = p * fraction + 1.f;
  const Vector scaled = (Vector)((VectorIndex)p + (exponent << 23));
  return x < -126.f ? Vector{} : scaled;
}

GIGATOK_INLINE float& lane(Vector& v, int i) {
  return reinterpret_cast<float*>(&v)[i];
}
GIGATOK_INLINE int32_t& lane(VectorIndex& v, int i) {
  return reinterpret_cast<int32_t*>(&v)[i];
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
