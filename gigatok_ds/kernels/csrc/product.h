// A few rows times a large matrix, as in decoding, where weights come from memory once and are all that takes time.
//
// Weights lie in panels of PANEL output features, (panel, depth, PANEL), and the rows in tiles, (tile, depth, rows of the
// tile). Each output is one chain of multiply-adds over the depth, in its order: the same for any number of rows.
#pragma once
#include "vectors.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int VECTORS = PANEL / WIDTH;
constexpr int TILE_ROWS = WIDTH == 16 ? 16 : WIDTH == 8 ? 6 : 3;  // times VECTORS, as accumulators fit into registers
constexpr int AHEAD = 64;  // steps of the depth that weights are fetched ahead: hardware stops at the end of a page

template <int ROWS>
void multiply_tile(const float* weights, const float* rows, int depth, int kept, float* outputs, int64_t stride) {
  Vector sums[ROWS][VECTORS] = {};
  for (int k = 0; k < depth; ++k, weights += PANEL, rows += ROWS) {
    __builtin_prefetch(weights + AHEAD * PANEL);
    Vector weight[VECTORS];
    __builtin_memcpy(weight, weights, sizeof weight);
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < VECTORS; ++v) sums[row][v] = multiply_add(weight[v], broadcast<Vector>(rows[row]), sums[row][v]);
  }
  for (int row = 0; row < ROWS; ++row) __builtin_memcpy(outputs + row * stride, sums[row], kept * sizeof(float));
}

template <int ROWS>
void multiply_rows(int count, const float* weights, const float* rows, int depth, int kept, float* outputs,
                   int64_t stride) {
  if (count == ROWS) return multiply_tile<ROWS>(weights, rows, depth, kept, outputs, stride);
  if constexpr (ROWS > 1) multiply_rows<ROWS - 1>(count, weights, rows, depth, kept, outputs, stride);
}

// Panels begin to end of a product.
void run_product(const Product& product, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const float* weights = product.weights + panel * product.depth * PANEL;
    const int64_t column = panel * PANEL, left = product.columns - column;
    const int kept = left < PANEL ? static_cast<int>(left) : PANEL;
    for (int row = 0; row < product.rows; row += TILE_ROWS) {
      const int count = product.rows - row < TILE_ROWS ? product.rows - row : TILE_ROWS;
      multiply_rows<TILE_ROWS>(count, weights, product.inputs + (int64_t)row * product.depth, product.depth, kept,
                               product.outputs + row * product.columns + column, product.columns);
    }
  }
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
