// After the filter on tensor cores: the nearest code, by distances in float32 of all codes that can be it.
//
// A code can be the nearest only if its score comes within a proven bound of the highest one. The filter left, for each
// part of the codes (a lane's columns of a split), its highest score and the group of that, which is looked at if the
// score is that high; and the highest score of its other groups: if that is as high, too, the whole part is looked at.
// So the work is small where few codes compete, and where all do that of a search in float32.
#pragma once
#include "filter.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

// A row of a (count, D) array whose rows are aligned to 16 bytes.
template <int D>
GIGATOK_INLINE void load_row(float (&row)[D], const float* from) {
  GIGATOK_UNROLL
  for (int d = 0; d < D; d += 4) {
#if defined(__CUDA_ARCH__)
    const float4 four = __ldg(reinterpret_cast<const float4*>(from + d));
    row[d] = four.x, row[d + 1] = four.y, row[d + 2] = four.z, row[d + 3] = four.w;
#else
    for (int i = d; i < d + 4; ++i) row[i] = from[i];
#endif
  }
}

// What a lane found: the nearest of the codes that it looked at, the lowest index of equally near ones.
struct Nearby {
  float distance;
  int32_t index;

  GIGATOK_INLINE void take(Nearby other) {
    const bool nearer =
        other.distance < distance || (other.distance == distance && (uint32_t)other.index < (uint32_t)index);
    distance = nearer ? other.distance : distance;
    index = nearer ? other.index : index;
  }
};

// One warp finds latent `row`'s nearest code: all lanes' result is its index, -1 if the latent is not finite or no code
// is. A Team runs the lanes: `each`, and what a warp has to combine them.
template <int D, class Team>
GIGATOK_INLINE int32_t run_recheck(const Filter& filter, Team& team, int row) {
  const Problem& problem = filter.problem;
  const FilterPartial* partials = filter.partials + (int64_t)row * filter.parts();
  const float window = fetch(filter.windows + row);
  const int parts = filter.parts();
  const float highest = team.largest([&](int lane) {
    float best = -HUGE_DISTANCE;
    for (int part = lane; part < parts; part += 32) best = larger(best, partials[part].best);
    return best;
  });
  if (!(window < INFINITY) || highest < 0.5f * NO_SCORE) return -1;
  const float threshold = highest - window;
  float latent[D];
  load_row<D>(latent, problem.latents + (int64_t)row * D);
  team.each([&](int, Nearby& near) { near = {HUGE_DISTANCE, -1}; });
  for (int chunk = 0; chunk < parts; chunk += 32) {
    uint32_t candidates =
        team.ballot([&](int lane) { return chunk + lane < parts && partials[chunk + lane].best >= threshold; });
    for (; candidates; candidates &= candidates - 1) {
      const int part = chunk + Team::lowest_bit(candidates);
      const FilterPartial found = partials[part];
      const bool several = found.second >= threshold;
      const int begin = several ? filter.first_group(part / QUAD) : found.group;
      const int end = several ? filter.end_group(part / QUAD) : found.group + 1;
      for (int group = begin; group < end; ++group)
        team.each([&](int lane, Nearby& near) {
          // A part has two columns of each tile: 32 codes of a group.
          const int code = group * FILTER_GROUP + lane / 2 * FILTER_CODES + part % QUAD * 2 + lane % 2;
          if (code >= problem.size || fetch(problem.minus_half_codes + code) < -0.1f * HUGE_DISTANCE) return;
          float other[D];
          load_row<D>(other, problem.codes + (int64_t)code * D);
          near.take({distance<float, D>(latent, other), code});
        });
    }
  }
  return team.nearest();
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
