// The passes compiled for several processors; cpu.cpp chooses among them when the program runs.
#pragma once
#include "problem.h"

namespace gigatok {

constexpr int PANEL = 16;      // output features of a product side by side
constexpr int TILE_ROWS = 16;  // and its rows: as many sums as registers hold beside the weights
constexpr int WINOGRAD_POINTS = 6, WINOGRAD_STEP = 4;  // of a tile's side, and how far the next tile is

// (rows, depth) times (depth, columns), laid out as product.h says.
struct Product {
  const float *weights, *inputs;
  float* outputs;  // (rows, columns)
  int rows, depth;
  int64_t columns;
};

enum class WinogradPass { inputs, gradients, back };

// Maps (channels, height, width) and some rows of their tiles: `down` of `across` each, from `first`.
struct Winograd {
  const float *maps, *bias;
  float *tiles, *outputs;  // (36, channels, down x across); maps to write to
  int64_t channels, height, width, across, first, down;

  int64_t scratch() const { return (WINOGRAD_POINTS + WINOGRAD_STEP + 1) * across * WINOGRAD_STEP + 2 * WINOGRAD_STEP; }
};

struct Level {
  const char* name;
  int width;  // lanes
  void (*run_pass)(Pass pass, const Problem& problem, int64_t begin, int64_t end);
  void (*run_product)(const Product& product, int64_t begin, int64_t end, float* sums);  // null: a library's is faster
  void (*run_winograd)(const Winograd& work, WinogradPass pass, int64_t begin, int64_t end, float* scratch);
};

extern const Level portable_level, avx2_level, avx512_level;

// The best of this processor's levels, or the one that GIGATOK_CPU_CAPABILITY names.
const Level& level();

}  // namespace gigatok
