// The passes compiled for several processors; cpu.cpp chooses among them when the program runs.
#pragma once
#include "problem.h"

namespace gigatok {

constexpr int PANEL = 16;  // output features side by side, for every level

// (rows, depth) times (depth, columns), laid out as product.h says.
struct Product {
  const float *weights, *inputs;
  float* outputs;  // (rows, columns)
  int rows, depth;
  int64_t columns;
};

struct Level {
  const char* name;
  int width;      // lanes
  int tile_rows;  // of a product
  void (*run_pass)(Pass pass, const Problem& problem, int64_t begin, int64_t end);
  void (*run_product)(const Product& product, int64_t begin, int64_t end);
};

extern const Level portable_level, avx2_level, avx512_level;

}  // namespace gigatok
