// Around the sweeps, an element at a time: preparing inputs, and adding up what the splits left, in their order.
#pragma once
#include <cmath>

#include "problem.h"

namespace gigatok {

constexpr float NOT_A_NUMBER = __builtin_nanf("");

// Copies a row of `dim` to one of `padded`, zeros where it has none or is not finite. Returns |row|^2 / 2, else
// infinity.
GIGATOK_INLINE float prepare_row(const float* row, int dim, int padded, float* prepared) {
  float square = 0;
  for (int d = 0; d < dim; ++d) square += row[d] * row[d];
  const bool finite = square < 0.1f * HUGE_DISTANCE;  // comparisons with NaN are false
  for (int d = 0; d < padded; ++d) prepared[d] = finite && d < dim ? row[d] : 0.f;
  return finite ? 0.5f * square : INFINITY;
}

// The nearest of both, with both sums relative to it. The order of the two does not matter to the index.
GIGATOK_INLINE RowPartial merge(const RowPartial& a, const RowPartial& b, float sharpness) {
  const bool second = b.best < a.best || (b.best == a.best && (uint32_t)b.index < (uint32_t)a.index);
  const RowPartial& near = second ? b : a;
  const RowPartial& far = second ? a : b;
  const float change = fmaxf((near.best - far.best) * sharpness, -HUGE_DISTANCE), factor = exp2f(change);
  const float others = far.index < 0 ? 0.f : far.rest + 1.f;
  return {near.best, near.rest + factor * others, near.moment + factor * (far.moment + others * change), near.index};
}

GIGATOK_INLINE RowPartial merged_row(const Problem& problem, int row) {
  RowPartial merged = problem.row_partials[row];
  for (int split = 1; split < problem.plan.splits; ++split)
    merged = merge(merged, problem.row_partials[(int64_t)split * problem.count + row], problem.sharpness);
  return merged;
}

// -1 for a latent that is not finite, or if no code is.
GIGATOK_INLINE int64_t finish_search(const Problem& problem, int row, const RowPartial& merged) {
  return problem.half_latents[row] < INFINITY ? merged.index : -1;
}

// What later passes need to know of a latent. Codes with p < 2^-cutoff will be left out.
GIGATOK_INLINE RowRecord finish_assign(const Problem& problem, int row, const RowPartial& merged, float cutoff) {
  const float half = problem.half_latents[row];
  if (!(half < INFINITY) || merged.index < 0) return {NOT_A_NUMBER, NOT_A_NUMBER, HUGE_DISTANCE, NOT_A_NUMBER};
  const float bits = log1pf(merged.rest) / LN2, rounding = (problem.dim + 4) * 6 * 5.9604645e-8f;
  const float slack = (half + *problem.largest_half_code) * rounding;
  const float margin = 0.5f * fmaxf(cutoff - bits, 0.f) / problem.sharpness;
  return {merged.best, bits, half - 0.5f * merged.best - slack - margin,
          LN2 * (bits - merged.moment / (1.f + merged.rest))};
}

GIGATOK_INLINE float sum_of_splits(const Problem& problem, int64_t stride, int64_t element) {
  float sum = 0;
  for (int split = 0; split < problem.plan.splits; ++split) sum += problem.partials[split * stride + element];
  return sum;
}

// The gradient at latent `row` into (dim,) of `gradient`; returns the latent's offset. factor: 2 / T.
GIGATOK_INLINE float finish_latent_gradient(const Problem& problem, const RowRecord& record, int row, float gradient_,
                                            float factor, int dim, float* gradient) {
  const int64_t count = problem.count, stride = count * (2 * problem.dim + 1);
  const float offset = sum_of_splits(problem, stride, 2 * problem.dim * count + row) + gradient_ * record.entropy;
  for (int d = 0; d < dim; ++d) {
    const float pull = sum_of_splits(problem, stride, d * count + row);
    const float mean = sum_of_splits(problem, stride, (problem.dim + d) * count + row);
    gradient[d] = factor * (pull - offset * mean);
  }
  return offset;
}

GIGATOK_INLINE void finish_code_gradient(const Problem& problem, int code, float factor, int dim, float* gradient) {
  const int64_t size = problem.size;
  for (int d = 0; d < dim; ++d) gradient[d] = factor * sum_of_splits(problem, size * problem.dim, d * size + code);
}

// The smallest dimension that kernels are compiled for and `dim` fits into.
inline int padded_dim(int dim) {
  for (int padded = 4; padded < LARGEST_DIM; padded *= 2)
    if (dim <= padded) return padded;
  return LARGEST_DIM;
}

// At most one code in 2^26 of the softmax's mass is dropped, whatever the codebook's size.
inline float cutoff_bits(int64_t size) {
  return std::log2(static_cast<float>(size)) + 26.f;
}

// Cut `streamed` elements so that about `wanted` tasks come of `groups` residents, in parts of a multiple of `unit`.
inline Plan plan_splits(int64_t groups, int64_t streamed, int64_t wanted, int64_t unit, int64_t most) {
  const int64_t units = (streamed + unit - 1) / unit;
  int64_t splits = wanted / (groups > 0 ? groups : 1);
  splits = splits < 1 ? 1 : splits > most ? most : splits;
  splits = splits < units ? splits : (units > 0 ? units : 1);
  const int64_t length = (units + splits - 1) / splits * unit;
  return {static_cast<int>(length > 0 ? (streamed + length - 1) / length : 1), static_cast<int>(length)};
}

}  // namespace gigatok
