// The search's filter on tensor cores, for up to 8 dimensions: one 16x8x16 product in half precision scores 16 latents
// against 8 codes. Slots 0 to 7 hold a vector, slots 8 and 9 the code's -|e|^2/2 in two parts (times 1). Codes whose
// score comes within a proven bound of the best one's are looked at in float32, so that the result is that of the
// float32 search.
//
// The fragments of the product lie in the registers of a warp's 32 lanes as the PTX manual has them (mma.m16n8k16):
// lane 4 g + t holds rows g and g + 8 of the latents, and of the results columns 2 t and 2 t + 1. The four lanes of a
// quad therefore share their latents and see different codes.
#pragma once
#include "sweeps.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int FILTER_DIM = 8;
constexpr int FILTER_STRIPS = 4;                 // of 16 latents, for each warp
constexpr int FILTER_ROWS = 16 * FILTER_STRIPS;  // latents of a warp
constexpr int FILTER_CODES = 8;                  // codes of a product
constexpr int FILTER_SHARE = 16;                 // products between two exchanges among the lanes of a quad
constexpr int QUAD = 4;

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

struct Fragment {
  uint32_t first, second;
};

// Lane's part of codes 8 tile to 8 tile + 7, for Team::pack (two numbers to half precision).
template <class Team>
GIGATOK_INLINE Fragment code_fragment(const Problem& problem, FilterScale scale, int tile, int lane) {
  const int code = tile * FILTER_CODES + lane / QUAD, column = lane % QUAD;
  const bool known = code < problem.size && problem.minus_half_codes[code] > -0.1f * HUGE_DISTANCE;
  if (!known) return {0, column == 0 ? Team::pack(-60000.f, 0.f) : 0};
  const float* e = problem.codes + (int64_t)code * problem.dim + 2 * column;
  const bool held = 2 * column < problem.dim;
  const float bias = problem.minus_half_codes[code] * scale.square;
  return {held ? Team::pack(e[0] * scale.factor, e[1] * scale.factor) : 0, column == 0 ? Team::pack_parts(bias) : 0};
}

// What a lane keeps of its 2 FILTER_STRIPS latents.
struct FilterState {
  uint32_t latents[FILTER_STRIPS][4];
  float scores[FILTER_STRIPS][4], thresholds[FILTER_STRIPS][2];
  Nearest<float, false> nearest[FILTER_STRIPS][2];
};

struct Filter {
  Problem problem;
  const Fragment* fragments;         // (codes / 8 rounded up, 32)
  const float* largest_half_latent;  // (1,)

  GIGATOK_INLINE int row_of(int first, int strip, int half, int lane) const {
    const int row = first + 16 * strip + 8 * half + lane / QUAD;
    return row < problem.count ? row : problem.count - 1;
  }
  GIGATOK_INLINE FilterScale scale() const {
    return filter_scale(fetch(largest_half_latent), fetch(problem.largest_half_code));
  }

  template <class Team>
  GIGATOK_INLINE void begin(FilterState& s, FilterScale scale, int first, int lane) const {
    const int column = lane % QUAD;
    GIGATOK_UNROLL
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      GIGATOK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(first, strip, half, lane);
        const float* z = problem.latents + (int64_t)row * problem.dim + 2 * column;
        s.latents[strip][half] =
            2 * column < problem.dim ? Team::pack(fetch(z) * scale.factor, fetch(z + 1) * scale.factor) : 0;
        s.latents[strip][2 + half] = column == 0 ? Team::pack(1.f, 1.f) : 0;
        const float length = fetch(problem.half_latents + row), largest = fetch(problem.largest_half_code);
        const float error = filter_error(length, largest, scale) / scale.square;
        s.nearest[strip][half].begin(length - rounding_bound<float, FILTER_DIM>(length, largest) - error);
        s.thresholds[strip][half] = -0.1f * HUGE_DISTANCE;
      }
    }
  }

  // After a product: take the codes that pass into account.
  GIGATOK_INLINE void consume(FilterState& s, FilterScale scale, int first, int tile, int lane) const {
    GIGATOK_UNROLL
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      const float (&scores)[4] = s.scores[strip];
      const float (&thresholds)[2] = s.thresholds[strip];
      if (larger(scores[0], scores[1]) > thresholds[0] || larger(scores[2], scores[3]) > thresholds[1]) {
        GIGATOK_UNROLL
        for (int i = 0; i < 4; ++i)
          if (scores[i] > thresholds[i / 2])
            accept(s, scale, strip, i / 2, row_of(first, strip, i / 2, lane),
                   tile * FILTER_CODES + 2 * (lane % QUAD) + i % 2);
      }
    }
  }

  GIGATOK_INLINE void accept(FilterState& s, FilterScale scale, int strip, int half, int row, int code) const {
    if (code >= problem.size || fetch(problem.minus_half_codes + code) < -0.1f * HUGE_DISTANCE) return;
    float sum = 0;
    for (int d = 0; d < problem.dim; ++d) {
      const float difference = fetch(problem.latents + (int64_t)row * problem.dim + d) -
                               fetch(problem.codes + (int64_t)code * problem.dim + d);
      sum = multiply_add(difference, difference, sum);
    }
    Nearest<float, false>& nearest = s.nearest[strip][half];
    nearest.accept(sum, code, 1.f);
    raise(s, scale, strip, half, nearest.best);
  }

  // `best` is the distance of some code from the latent: no code farther away need be looked at.
  GIGATOK_INLINE void raise(FilterState& s, FilterScale scale, int strip, int half, float best) const {
    const float threshold = (s.nearest[strip][half].ceiling - 0.5f * best) * scale.square;
    s.thresholds[strip][half] = larger(s.thresholds[strip][half], threshold);
  }

  GIGATOK_INLINE void end(FilterState& s, int first, int split, int lane) const {
    GIGATOK_UNROLL
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      GIGATOK_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = first + 16 * strip + 8 * half + lane / QUAD;
        if (row < problem.count) {
          RowPartial* partials = problem.row_partials + (int64_t)(split * QUAD + lane % QUAD) * problem.count;
          s.nearest[strip][half].end(partials, row, problem.count);
        }
      }
    }
  }
};

// One warp and its latents `first` to first + FILTER_ROWS - 1, over the codes of a split. A Team runs the lanes: see
// blocks.h.
template <class Team>
GIGATOK_INLINE void run_filter(const Filter& filter, Team& team, int first, int split) {
  const FilterScale scale = filter.scale();
  const int tiles = (filter.problem.size + FILTER_CODES - 1) / FILTER_CODES;
  const int length = filter.problem.plan.length / FILTER_CODES, begin = split * length;
  const int end = begin + length < tiles ? begin + length : tiles;
  team.each([&](int lane, FilterState& s) { filter.begin<Team>(s, scale, first, lane); });
  for (int tile = begin; tile < end; ++tile) {
    team.multiply(filter.fragments + (int64_t)tile * 32);
    team.each([&](int lane, FilterState& s) { filter.consume(s, scale, first, tile, lane); });
    if (tile % FILTER_SHARE == FILTER_SHARE - 1)
      team.share_best(
          [&](FilterState& s, int strip, int half, float best) { filter.raise(s, scale, strip, half, best); });
  }
  team.each([&](int lane, FilterState& s) { filter.end(s, first, split, lane); });
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
