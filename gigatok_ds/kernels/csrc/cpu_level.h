// Drives the sweeps with the vectors of one processor level; included by a file that sets the level and its target.
#pragma once
#include "vectors.h"  // first: templates find only the arithmetic that comes before them

#include "sweeps.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int GROUP = 4;    // streamed elements at a time
constexpr int TILE = 1024;  // streamed elements between two flushes

template <class Sweep>
void run_task(const Sweep& sweep, int64_t task) {
  const Plan& plan = sweep.problem.plan;
  const int split = static_cast<int>(task % plan.splits), resident = static_cast<int>(task / plan.splits) * WIDTH;
  const int begin = split * plan.length,
            end = begin + plan.length < sweep.streamed() ? begin + plan.length : sweep.streamed();
  constexpr int D = Sweep::dim;
  const float *elements = sweep.elements(), *sides = sweep.sides();
  typename Sweep::State state;
  sweep.begin(state, resident);
  for (int tile = begin; tile < end; tile += TILE) {
    const int stop = tile + TILE < end ? tile + TILE : end;
    int i = tile;
    for (; i + GROUP <= stop; i += GROUP) sweep.template step<GROUP>(state, elements + (int64_t)i * D, sides + i, i);
    for (; i < stop; ++i) sweep.template step<1>(state, elements + (int64_t)i * D, sides + i, i);
    sweep.flush(state);
  }
  sweep.end(state, resident, split);
}

template <class Sweep>
void run_tasks(const Problem& problem, int64_t begin, int64_t end) {
  const Sweep sweep{{problem}};
  for (int64_t task = begin; task < end; ++task) run_task(sweep, task);
}

template <int D>
void run_pass_of(Pass pass, const Problem& problem, int64_t begin, int64_t end) {
  switch (pass) {
    case Pass::search:
      return run_tasks<Assign<Vector, D, false>>(problem, begin, end);
    case Pass::assign:
      return run_tasks<Assign<Vector, D, true>>(problem, begin, end);
    case Pass::average:
      return run_tasks<Average<Vector, D>>(problem, begin, end);
    case Pass::latent_gradient:
      return run_tasks<LatentGradient<Vector, D>>(problem, begin, end);
    case Pass::code_gradient:
      return run_tasks<CodeGradient<Vector, D>>(problem, begin, end);
  }
}

// Tasks begin to end of a pass; there are splits times residents / WIDTH, rounded up.
void run_pass(Pass pass, const Problem& problem, int64_t begin, int64_t end) {
  switch (problem.dim) {
    case 4:
      return run_pass_of<4>(pass, problem, begin, end);
    case 8:
      return run_pass_of<8>(pass, problem, begin, end);
    case 16:
      return run_pass_of<16>(pass, problem, begin, end);
    case 32:
      return run_pass_of<32>(pass, problem, begin, end);
    default:
      return run_pass_of<64>(pass, problem, begin, end);
  }
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
