// What the passes over latents and codes work on. Plain data only: it is the same in every translation unit and on a
// GPU.
//
// The soft assignment of latent n is p_nk = softmax_k(-|z_n - e_k|^2 / T), here in powers of two:
// p_nk = 2^((best_n - |z_n - e_k|^2) * sharpness - bits_n) with sharpness = log2(e) / T, best_n the smallest squared
// distance and bits_n the binary logarithm of sum_k 2^((best_n - |z_n - e_k|^2) * sharpness).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define GIGATOK_INLINE __host__ __device__ __forceinline__
#define GIGATOK_UNROLL _Pragma("unroll")
#else
#define GIGATOK_INLINE inline __attribute__((always_inline))
#define GIGATOK_UNROLL _Pragma("GCC unroll 64")
#endif

namespace gigatok {

// Larger than any squared distance that is told from infinity.
constexpr float HUGE_DISTANCE = 1e30f;
constexpr float LN2 = 0.69314718055994531f;
constexpr int LARGEST_DIM = 64;

// One latent's part of a search over some of the codes. rest and moment are sums over the codes other than the best one
// of 2^y and 2^y * y with y = (best - |z - e|^2) * sharpness. The best code's 1 is left out of rest: where one code
// dominates, all else, entropy and gradients included, is of the size of rest.
struct RowPartial {
  float best, rest, moment;
  int32_t index;
};

// What the backward pass keeps of a latent. threshold: a code whose score z.e - |e|^2/2 is not above it has p <
// 2^-cutoff.
struct RowRecord {
  float best, bits, threshold, entropy;
};

// A latent's terms in the backward pass. gradient: at its entropy; base: the share of its nearest code; offset: what
// the weights of the backward pass are less, so that they add up to 0.
struct alignas(16) RowTerms {
  float best, bits, gradient, offset, base;
};

// A pass cuts what it streams into `splits` parts of `length` each, and adds the parts' results in order.
struct Plan {
  int splits, length;
};

struct Problem {
  int count, size, dim;            // latents, codes, and their dimension, padded with zeros
  const float* latents;            // (count, dim), zeros where not finite
  const float* codes;              // (size, dim), zeros where not finite
  const float* half_latents;       // (count,) |z|^2 / 2, infinite where not finite
  const float* minus_half_codes;   // (size,) -|e|^2 / 2, -HUGE_DISTANCE where not finite
  const float* largest_half_code;  // (1,) the largest |e|^2 / 2
  const float* thresholds;         // (count,) of RowRecord
  const RowTerms* terms;           // (count,)
  const int64_t* indices;          // (count,) the nearest codes
  const float* shares;             // (size,) dL/dp_nk from the mean assignment, the same for all n
  float sharpness;                 // log2(e) / T
  float margin;                    // half the distance beyond the best at which p < 2^-cutoff
  Plan plan;
  RowPartial* row_partials;  // (splits, count)
  float* partials;           // (splits, values, count or size)
};

enum class Pass { search, assign, average, latent_gradient, code_gradient };

}  // namespace gigatok
