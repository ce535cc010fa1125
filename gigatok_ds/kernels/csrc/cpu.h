// The passes compiled for several processors; cpu.cpp chooses among them when the program runs.
#pragma once
#include "problem.h"

namespace gigatok {

struct Level {
  const char* name;
  int width;  // lanes
  void (*run_pass)(Pass pass, const Problem& problem, int64_t begin, int64_t end);
};

extern const Level portable_level, avx2_level, avx512_level;

}  // namespace gigatok
