// A few rows times a large matrix, as in decoding, where weights come from memory once and are all that takes time.
// For AVX-512 only: elsewhere a library's product is faster.
//
// Weights lie in panels of PANEL output features, (panel, depth, PANEL), and the rows in tiles, (tile, depth, rows of the
// tile). Each output is one chain of multiply-adds over the depth, in its order: the same for any number of rows.
#pragma once
#include "vectors.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int AHEAD = 64;     // steps of the depth that weights are fetched ahead: hardware stops at the end of a page
constexpr int STRETCH = 256;   // steps of the depth for all rows in turn: as many weights stay in the nearest cache

static_assert(PANEL == WIDTH);

// Goes on with the sums of ROWS rows and a panel, which begin as zeros.
template <int ROWS>
void multiply_tile(const float* weights, const float* rows, int depth, float* sums) {
  Vector sum[ROWS];
  __builtin_memcpy(sum, sums, sizeof sum);
  for (int k = 0; k < depth; ++k, weights += PANEL, rows += ROWS) {
    __builtin_prefetch(weights + AHEAD * PANEL);
    Vector weight;
    __builtin_memcpy(&weight, weights, sizeof weight);
    for (int row = 0; row < ROWS; ++row) sum[row] = multiply_add(weight, broadcast<Vector>(rows[row]), sum[row]);
  }
  __builtin_memcpy(sums, sum, sizeof sum);
}

template <int ROWS>
void multiply_rows(int count, const float* weights, const float* rows, int depth, float* sums) {
  if (count == ROWS) return multiply_tile<ROWS>(weights, rows, depth, sums);
  if constexpr (ROWS > 1) multiply_rows<ROWS - 1>(count, weights, rows, depth, sums);
}

// Panels begin to end of a product; `sums` has room for rows x PANEL.
void run_product(const Product& product, int64_t begin, int64_t end, float* sums) {
  const int depth = product.depth;
  for (int64_t panel = begin; panel < end; ++panel) {
    __builtin_memset(sums, 0, sizeof(float) * product.rows * PANEL);
    for (int first = 0; first < depth; first += STRETCH) {
      const int length = depth - first < STRETCH ? depth - first : STRETCH;
      const float* weights = product.weights + (panel * depth + first) * PANEL;
      for (int row = 0; row < product.rows; row += TILE_ROWS) {
        const int count = product.rows - row < TILE_ROWS ? product.rows - row : TILE_ROWS;
        const float* inputs = product.inputs + (int64_t)row * depth + (int64_t)first * count;
        multiply_rows<TILE_ROWS>(count, weights, inputs, length, sums + (int64_t)row * PANEL);
      }
    }
    const int64_t column = panel * PANEL, left = product.columns - column;
    const int64_t kept = left < PANEL ? left : PANEL;
    for (int64_t row = 0; row < product.rows; ++row)
      __builtin_memcpy(product.outputs + row * product.columns + column, sums + row * PANEL, kept * sizeof(float));
  }
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
