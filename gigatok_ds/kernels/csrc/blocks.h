// A block of a GPU's threads runs a sweep: the threads hold residents, and streamed elements pass through shared
// memory.
//
// The block is written in phases. A Team runs them: on a GPU its threads do, and wait for each other where copies are
// waited for; on a host one after the other. So a test without a GPU executes what decides which thread holds, copies
// and writes what. One barrier a tile is enough: once a thread is past it, all have read the tile before, whose place
// the next one's copies take.
#pragma once
#include "sweeps.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int THREADS = 128;  // of a block

// How a sweep is spread: residents of a thread, streamed elements of a step and of a tile.
template <class Sweep>
struct Shape {
  static constexpr int residents = Sweep::dim <= 8 ? 2 : 1;
  static constexpr int group = 2;
  static constexpr int tile = Sweep::dim <= 16 ? 128 : Sweep::dim == 32 ? 64 : 32;
  static constexpr int of_block = THREADS * residents;
};

template <class Sweep>
struct alignas(16) Tile {
  float elements[Shape<Sweep>::tile * Sweep::dim];
  float sides[Shape<Sweep>::tile];
};

template <class Sweep, class Team>
GIGATOK_INLINE void copy_tile(const Sweep& sweep, Tile<Sweep>& tile, int first, int end, int thread, Team& team) {
  constexpr int D = Sweep::dim, length = Shape<Sweep>::tile;
  for (int i = 4 * thread; i < length * D; i += 4 * THREADS) {
    const int element = first + i / D;
    const bool inside = element < end;
    team.copy_four(tile.elements + i, sweep.elements() + (int64_t)(inside ? element : 0) * D + i % D, inside);
  }
  for (int i = thread; i < length; i += THREADS)
    tile.sides[i] = first + i < end ? fetch(sweep.sides() + first + i) : Sweep::beyond;
}

template <class Sweep, class Team>
GIGATOK_INLINE void run_block(const Sweep& sweep, Team& team, Tile<Sweep>* tiles, int block, int split) {
  using Shape = gigatok::Shape<Sweep>;
  using State = typename Sweep::State;
  const int begin = split * sweep.problem.plan.length;
  const int end =
      begin + sweep.problem.plan.length < sweep.streamed() ? begin + sweep.problem.plan.length : sweep.streamed();
  const int first = block * Shape::of_block;

  team.each([&](int thread, State* states) {
    GIGATOK_UNROLL
    for (int r = 0; r < Shape::residents; ++r) sweep.begin(states[r], first + r * THREADS + thread);
    copy_tile(sweep, tiles[0], begin, end, thread, team);
  });
  int buffer = 0;
  for (int i = begin; i < end; i += Shape::tile, buffer ^= 1) {
    team.wait_for_copies();
    team.each([&](int thread, State* states) {
      if (i + Shape::tile < end) copy_tile(sweep, tiles[buffer ^ 1], i + Shape::tile, end, thread, team);
      const Tile<Sweep>& tile = tiles[buffer];
#if defined(__CUDACC__)
#pragma unroll 1
#endif
      for (int k = 0; k < Shape::tile; k += Shape::group) GIGATOK_UNROLL
      for (int r = 0; r < Shape::residents; ++r)
        sweep.template step<Shape::group>(states[r], tile.elements + k * Sweep::dim, tile.sides + k, i + k);
      GIGATOK_UNROLL
      for (int r = 0; r < Shape::residents; ++r) sweep.flush(states[r]);
    });
  }
  team.each([&](int thread, State* states) {
    GIGATOK_UNROLL
    for (int r = 0; r < Shape::residents; ++r) {
      const int resident = first + r * THREADS + thread;
      if (resident < sweep.residents()) sweep.end(states[r], resident, split);
    }
  });
}

// The block on a host.
template <class Sweep>
class HostTeam {
 public:
  template <class Phase>
  void each(const Phase& phase) {
    for (int thread = 0; thread < THREADS; ++thread) phase(thread, states_ + thread * Shape<Sweep>::residents);
  }
  void copy_four(float* to, const float* from, bool valid) {
    for (int i = 0; i < 4; ++i) to[i] = valid ? from[i] : 0.f;
  }
  void wait_for_copies() {}

 private:
  typename Sweep::State states_[THREADS * Shape<Sweep>::residents];
};

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
