// The passes compiled for several processors; cpu.cpp chooses among them when the program runs.
#pragma once
#include "problem.h"

namespace gigatok {

constexpr int PANEL = 16;      // output features of a product side by side
constexpr int TILE_ROWS = 16;  // and its rows: as many sums as registers hold beside the weights

// (rows, depth) times (depth, columns), laid out as product.h says.
struct Product {
  const float *weights, *inputs;
  float* outputs;  // (rows, columns)
  int rows, depth;
  int64_t columns;
};

struct Level {
  const char* name;
  int width;  // lanes
  void (*run_pass)(Pass pass, const Problem& problem, int64_t begin, int64_t end);
  void (*run_product)(const Product& product, int64_t begin, int64_t end, float* sums);  // null: a library's is faster
};

extern const Level portable_level, avx2_level, avx512_level;

}  // namespace gigatok
