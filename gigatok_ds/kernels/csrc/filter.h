// The search's filter on tensor cores, for up to 8 dimensions: one 16x8x16 product in half precision scores 16 latents
// against 8 codes. Slots 0 to 7 hold a vector, slots 8 and 9 the code's -|e|^2/2 in two parts (times 1). The filter
// keeps, without a branch, which group of codes scored highest and how high another one came; recheck.h then computes
// distances in float32 wherever the nearest code can be.
//
// The fragments of the product lie in the registers of a warp's 32 lanes as the PTX manual has them (mma.m16n8k16):
// lane 4 g + t holds rows g and g + 8 of the latents, and of the results columns 2 t and 2 t + 1. The four lanes of a
// quad therefore share their latents and see different codes: each lane leaves a part of its own.
#pragma once
#include "sweeps.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int FILTER_DIM = 8;
constexpr int FILTER_STRIPS = 4;                             // of 16 latents, for each warp
constexpr int FILTER_WARPS = 4;                              // of a block
constexpr int FILTER_THREADS = 32 * FILTER_WARPS;            // of a block
constexpr int FILTER_ROWS = 16 * FILTER_STRIPS;              // latents of a warp
constexpr int FILTER_BLOCK_ROWS = FILTER_ROWS * FILTER_WARPS;
constexpr int FILTER_CODES = 8;                              // codes of a product
constexpr int FILTER_TILES = 16;                             // products of a group
constexpr int FILTER_GROUP = FILTER_CODES * FILTER_TILES;    // codes of a group
constexpr int QUAD = 4;
constexpr float NO_SCORE = -60000.f;  // of what is no code; scaled scores of codes are at least -2

// Both sides are scaled by one power of two, so that no vector is longer than 1 and half precision cannot overflow.
struct FilterScale {
  float factor, square;  // square: factor^2, of scores
};

GIGATOK_INLINE FilterScale filter_scale(float largest_half_latent, float largest_half_code) {
  const float largest = larger(larger(largest_half_latent, largest_half_code), 1e-30f);
  int exponent;
  frexpf(sqrtf(2 * largest), &exponent);  // the norm is less than 2^exponent
  const float factor = ldexpf(1.f, -exponent);
  return {factor, factor * factor};
}

// |score in half precision - score| in scaled units. Rounding both vectors to 11 bits costs 2^-10 |z||e|
// (Cauchy-Schwarz); denormals, the parts of |e|^2/2 and the accumulation in float32 cost less than 2^-16 for vectors of
// length at most 1.
GIGATOK_INLINE float filter_error(float half_latent, float largest_half_code, FilterScale scale) {
  const float lengths = (sqrtf(half_latent) * scale.factor) * (sqrtf(largest_half_code) * scale.factor);
  return 1.01f / 1024 * 2 * lengths + 1.f / 65536;
}

// The highest score less this bounds the scores of codes that can be the nearest; infinite where the latent is not
// finite. Let k be the nearest code, by its computed distance, and m the one that scored highest. Half distances and
// |z|^2/2 - score differ by rounding_bound at most, so score(k) >= score(m) - 2 rounding_bound; and each of the two was
// scored with the filter's error.
GIGATOK_INLINE float score_window(float half_latent, float largest_half_code, FilterScale scale) {
  const float rounding = rounding_bound<float, FILTER_DIM>(half_latent, largest_half_code) * scale.square;
  return 2 * (filter_error(half_latent, largest_half_code, scale) + rounding);
}

struct Fragment {
  uint32_t first, second;
};

// Lane's part of codes 8 tile to 8 tile + 7, for Team::pack (two numbers to half precision).
template <class Team>
GIGATOK_INLINE Fragment code_fragment(const Problem& problem, FilterScale scale, int tile, int lane) {
  const int code = tile * FILTER_CODES + lane / QUAD, column = lane % QUAD;
  const bool known = code < problem.size && problem.minus_half_codes[code] > -0.1f * HUGE_DISTANCE;
  if (!known) return {0, column == 0 ? Team::pack(NO_SCORE, 0.f) : 0};
  const float* e = problem.codes + (int64_t)code * problem.dim + 2 * column;
  const bool held = 2 * column < problem.dim;
  const float bias = problem.minus_half_codes[code] * scale.square;
  return {held ? Team::pack(e[0] * scale.factor, e[1] * scale.factor) : 0, column == 0 ? Team::pack_parts(bias) : 0};
}

// What a lane found among its columns of a split's codes: the highest score and the group it is in, and the highest
// score of any other group.
struct FilterPartial {
  float best, second;
  int32_t group;
};

// What a lane keeps of its 2 FILTER_STRIPS latents. group: the highest score of the present group.
struct FilterState {
  uint32_t latents[FILTER_STRIPS][2], ones;
  float scores[FILTER_STRIPS][4], group[FILTER_STRIPS][2];
  FilterPartial found[FILTER_STRIPS][2];
};

struct Filter {
  Problem problem;
  const Fragment* fragments;         // (groups, FILTER_TILES, 32)
  const float* windows;              // (count,) of score_window
  const float* largest_half_latent;  // (1,)
  FilterPartial* partials;           // (count, parts())

  GIGATOK_INLINE FilterScale scale() const {
    return filter_scale(fetch(largest_half_latent), fetch(problem.largest_half_code));
  }
  // Each lane of a quad leaves a part of each split.
  GIGATOK_INLINE int parts() const { return problem.plan.splits * QUAD; }
  GIGATOK_INLINE int first_group(int split) const { return split * (problem.plan.length / FILTER_GROUP); }
  GIGATOK_INLINE int end_group(int split) const {
    const int groups = (problem.size + FILTER_GROUP - 1) / FILTER_GROUP, end = first_group(split + 1);
    return end < groups ? end : groups;
  }

  template <class Team>
  GIGATOK_INLINE void begin(FilterState& s, FilterScale scale, int first, int lane) const {
    const int column = lane % QUAD;
    s.ones = column == 0 ? Team::pack(1.f, 1.f) : 0;
    GIGATOK_UNROLL
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      GIGATOK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(first, strip, half, lane);
        const float* z = problem.latents + (int64_t)(row < problem.count ? row : problem.count - 1) * problem.dim;
        s.latents[strip][half] = 2 * column < problem.dim ? Team::pack(fetch(z + 2 * column) * scale.factor,
                                                                       fetch(z + 2 * column + 1) * scale.factor)
                                                          : 0;
        s.group[strip][half] = -HUGE_DISTANCE;
        s.found[strip][half] = {-HUGE_DISTANCE, -HUGE_DISTANCE, 0};
      }
    }
  }

  GIGATOK_INLINE static int row_of(int first, int strip, int half, int lane) {
    return first + 16 * strip + 8 * half + lane / QUAD;
  }

  // After a product.
  GIGATOK_INLINE void consume(FilterState& s) const {
    GIGATOK_UNROLL
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      GIGATOK_UNROLL
      for (int half = 0; half < 2; ++half)
        s.group[strip][half] =
            larger(s.group[strip][half], larger(s.scores[strip][2 * half], s.scores[strip][2 * half + 1]));
    }
  }

  // After the products of a group.
  GIGATOK_INLINE void close(FilterState& s, int group) const {
    GIGATOK_UNROLL
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      GIGATOK_UNROLL
      for (int half = 0; half < 2; ++half) {
        FilterPartial& found = s.found[strip][half];
        const float score = s.group[strip][half];
        const bool higher = score > found.best;
        found.second = larger(found.second, higher ? found.best : score);
        found.best = larger(found.best, score);
        found.group = higher ? group : found.group;
        s.group[strip][half] = -HUGE_DISTANCE;
      }
    }
  }

  GIGATOK_INLINE void end(const FilterState& s, int first, int split, int lane) const {
    GIGATOK_UNROLL
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      GIGATOK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(first, strip, half, lane);
        if (row < problem.count)
          partials[(int64_t)row * parts() + split * QUAD + lane % QUAD] = s.found[strip][half];
      }
    }
  }
};

struct alignas(16) FilterTile {
  Fragment fragments[FILTER_TILES * 32];
};

template <class Team>
GIGATOK_INLINE void copy_group(const Filter& filter, FilterTile& tile, int group, int thread, Team& team) {
  constexpr int step = 4 * FILTER_THREADS, floats = sizeof(FilterTile) / sizeof(float);
  static_assert(floats % step == 0);
  float* to = reinterpret_cast<float*>(tile.fragments) + 4 * thread;
  const float* from = reinterpret_cast<const float*>(filter.fragments) + (int64_t)group * floats + 4 * thread;
  GIGATOK_UNROLL
  for (int i = 0; i < floats; i += step) team.copy_four(to + i, from + i, true);
}

// Latents FILTER_BLOCK_ROWS block and on, over the codes of a split. A Team runs the threads, in phases as in blocks.h;
// its `multiply` is a phase, too, of each warp with one tile's fragments.
template <class Team>
GIGATOK_INLINE void run_filter(const Filter& filter, Team& team, FilterTile* tiles, int block, int split) {
  const FilterScale scale = filter.scale();
  const int begin = filter.first_group(split), end = filter.end_group(split);
  const auto first = [&](int thread) { return block * FILTER_BLOCK_ROWS + thread / 32 * FILTER_ROWS; };
  team.each([&](int thread, FilterState& s) {
    filter.begin<Team>(s, scale, first(thread), thread % 32);
    copy_group(filter, tiles[0], begin, thread, team);
  });
  int buffer = 0;
  for (int group = begin; group < end; ++group, buffer ^= 1) {
    team.wait_for_copies();
    team.each([&](int thread, FilterState&) {
      if (group + 1 < end) copy_group(filter, tiles[buffer ^ 1], group + 1, thread, team);
    });
#if defined(__CUDACC__)
#pragma unroll 4
#endif
    for (int tile = 0; tile < FILTER_TILES; ++tile) {
      team.multiply(tiles[buffer].fragments + tile * 32);
      team.each([&](int, FilterState& s) { filter.consume(s); });
    }
    team.each([&](int, FilterState& s) { filter.close(s, group); });
  }
  team.each([&](int thread, FilterState& s) { filter.end(s, first(thread), split, thread % 32); });
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
