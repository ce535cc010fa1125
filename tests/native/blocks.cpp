// The kernels' blocks and warps on a host: what cuda.cu launches, with its launch geometry, one thread after the other.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "blocks.h"
#include "filter.h"
#include "finish.h"

using namespace gigatok;

namespace {

struct Prepared {
  std::vector<float> rows, halves;
  float largest = 0;

  Prepared(const float* data, int count, int dim, bool codes) : rows(count * padded_dim(dim)), halves(count) {
    for (int i = 0; i < count; ++i) {
      const float half = prepare_row(data + i * dim, dim, padded_dim(dim), &rows[i * padded_dim(dim)]);
      if (half < INFINITY) largest = largest > half ? largest : half;
      halves[i] = !codes ? half : half < INFINITY ? -half : -HUGE_DISTANCE;
    }
  }
};

template <class Sweep>
void launch(Problem& problem, int wanted, std::vector<RowPartial>& rows, std::vector<float>& partials, int values) {
  const Sweep shape{{problem}};
  const int blocks = (shape.residents() + Shape<Sweep>::of_block - 1) / Shape<Sweep>::of_block;
  problem.plan = plan_splits(blocks, shape.streamed(), wanted, Shape<Sweep>::tile, 64);
  rows.assign(problem.plan.splits * problem.count, {});
  partials.assign(static_cast<size_t>(problem.plan.splits) * values * shape.residents(), -1.f);
  problem.row_partials = rows.data();
  problem.partials = partials.data();
  const Sweep sweep{{problem}};
  for (int split = 0; split < problem.plan.splits; ++split)
    for (int block = 0; block < blocks; ++block) {
      auto team = std::make_unique<HostTeam<Sweep>>();
      Tile<Sweep> tiles[2];
      run_block(sweep, *team, tiles, block, split);
    }
}

// A warp whose lanes take turns; the product is written out from the fragments' layout in the PTX manual.
class HostWarp {
 public:
  static uint32_t pack(float low, float high) {
    const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    uint32_t bits;
    std::memcpy(&bits, both, sizeof bits);
    return bits;
  }
  static uint32_t pack_parts(float x) {
    const float part = static_cast<_Float16>(x);
    return pack(part, x - part);
  }
  template <class Phase>
  void each(const Phase& phase) {
    for (int lane = 0; lane < 32; ++lane) phase(lane, states_[lane]);
  }
  void multiply(const Fragment* codes) {
    for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
      float a[16][16], b[16][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, thread = lane % 4;
        for (int i = 0; i < 2; ++i) {
          const uint32_t (&latents)[4] = states_[lane].latents[strip];
          a[group][2 * thread + i] = half(latents[0], i);
          a[group + 8][2 * thread + i] = half(latents[1], i);
          a[group][2 * thread + 8 + i] = half(latents[2], i);
          a[group + 8][2 * thread + 8 + i] = half(latents[3], i);
          b[2 * thread + i][group] = half(codes[lane].first, i);
          b[2 * thread + 8 + i][group] = half(codes[lane].second, i);
        }
      }
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
          states_[lane].scores[strip][i] = sum;
        }
    }
  }
  template <class Raise>
  void share_best(const Raise& raise) {
    for (int quad = 0; quad < 32; quad += QUAD)
      for (int strip = 0; strip < FILTER_STRIPS; ++strip)
        for (int half = 0; half < 2; ++half) {
          float best = HUGE_DISTANCE;
          for (int lane = quad; lane < quad + QUAD; ++lane) best = fminf(best, states_[lane].nearest[strip][half].best);
          for (int lane = quad; lane < quad + QUAD; ++lane) raise(states_[lane], strip, half, best);
        }
  }
  FilterState states_[32];

 private:
  static float half(uint32_t bits, int i) {
    _Float16 both[2];
    std::memcpy(both, &bits, sizeof bits);
    return both[i];
  }
};

Problem problem_of(const Prepared& latents, const Prepared& codes, int count, int size, int dim, double temperature) {
  Problem problem{};
  problem.count = count;
  problem.size = size;
  problem.dim = padded_dim(dim);
  problem.latents = latents.rows.data();
  problem.codes = codes.rows.data();
  problem.half_latents = latents.halves.data();
  problem.minus_half_codes = codes.halves.data();
  problem.largest_half_code = &codes.largest;
  problem.sharpness = static_cast<float>(1.4426950408889634 / temperature);
  return problem;
}

template <int D>
void search(Problem& problem, int wanted, int64_t* indices) {
  std::vector<RowPartial> rows;
  std::vector<float> partials;
  launch<Assign<float, D, false>>(problem, wanted, rows, partials, 0);
  for (int row = 0; row < problem.count; ++row) indices[row] = finish_search(problem, row, merged_row(problem, row));
}

template <int D>
void penalty(Problem& problem, int wanted, int dim, const float* entropy_gradient, const float* average_gradient,
             double temperature, int64_t* indices, float* entropy, float* average, float* to_latents, float* to_codes) {
  std::vector<RowPartial> rows;
  std::vector<float> partials, thresholds(problem.count), shares(problem.size);
  std::vector<RowRecord> records(problem.count);
  std::vector<RowTerms> terms(problem.count);
  const float cutoff = cutoff_bits(problem.size), scale = 1.f / problem.count;
  problem.margin = 0.5f * cutoff / problem.sharpness;
  for (int code = 0; code < problem.size; ++code) shares[code] = average_gradient[code] * scale;

  launch<Assign<float, D, true>>(problem, wanted, rows, partials, 0);
  for (int row = 0; row < problem.count; ++row) {
    const RowPartial merged = merged_row(problem, row);
    records[row] = finish_assign(problem, row, merged, cutoff);
    indices[row] = finish_search(problem, row, merged);
    entropy[row] = records[row].entropy;
    thresholds[row] = records[row].threshold;
    terms[row] = {records[row].best, records[row].bits, entropy_gradient[row], 0.f, shares[indices[row]]};
  }
  problem.thresholds = thresholds.data();
  problem.terms = terms.data();
  problem.indices = indices;
  problem.shares = shares.data();

  launch<Average<float, D>>(problem, wanted, rows, partials, 1);
  for (int code = 0; code < problem.size; ++code) average[code] = scale * sum_of_splits(problem, problem.size, code);
  const float factor = static_cast<float>(2 / temperature);
  launch<LatentGradient<float, D>>(problem, wanted, rows, partials, 2 * D + 1);
  for (int row = 0; row < problem.count; ++row)
    terms[row].offset =
        finish_latent_gradient(problem, records[row], row, entropy_gradient[row], factor, dim, to_latents + row * dim);
  launch<CodeGradient<float, D>>(problem, wanted, rows, partials, D);
  for (int code = 0; code < problem.size; ++code)
    finish_code_gradient(problem, code, factor, dim, to_codes + code * dim);
}

}  // namespace

extern "C" {

// wanted: how many blocks to spread the work over, which decides the number of splits.
void block_search(const float* z, int count, const float* e, int size, int dim, int wanted, int64_t* indices) {
  const Prepared latents(z, count, dim, false), codes(e, size, dim, true);
  Problem problem = problem_of(latents, codes, count, size, dim, 1.0);
  switch (problem.dim) {
    case 4:
      return search<4>(problem, wanted, indices);
    case 8:
      return search<8>(problem, wanted, indices);
    default:
      return search<32>(problem, wanted, indices);
  }
}

void block_penalty(const float* z, int count, const float* e, int size, int dim, int wanted, double temperature,
                   const float* entropy_gradient, const float* average_gradient, int64_t* indices, float* entropy,
                   float* average, float* to_latents, float* to_codes) {
  const Prepared latents(z, count, dim, false), codes(e, size, dim, true);
  Problem problem = problem_of(latents, codes, count, size, dim, temperature);
  const auto of_dim = problem.dim == 4 ? penalty<4> : problem.dim == 8 ? penalty<8> : penalty<32>;
  of_dim(problem, wanted, dim, entropy_gradient, average_gradient, temperature, indices, entropy, average, to_latents,
         to_codes);
}

// The tensor-core filter. Returns how many codes were looked at in float32; scores: as many of half precision's scores
// less their exact values, in units of their bound, the largest in magnitude.
int64_t warp_search(const float* z, int count, const float* e, int size, int dim, int wanted, int64_t* indices,
                    double* largest_error) {
  const Prepared latents(z, count, dim, false), codes(e, size, dim, true);
  Problem problem = problem_of(latents, codes, count, size, dim, 1.0);
  const int tiles = (size + FILTER_CODES - 1) / FILTER_CODES;
  std::vector<Fragment> fragments(tiles * 32);
  const FilterScale scale = filter_scale(latents.largest, codes.largest);
  for (int i = 0; i < tiles * 32; ++i) fragments[i] = code_fragment<HostWarp>(problem, scale, i / 32, i % 32);
  const int warps = (count + FILTER_ROWS - 1) / FILTER_ROWS;
  problem.plan = plan_splits((warps + 3) / 4, size, wanted, FILTER_CODES * FILTER_SHARE, 64);
  std::vector<RowPartial> rows(problem.plan.splits * QUAD * count);
  problem.row_partials = rows.data();
  const Filter filter{problem, fragments.data(), &latents.largest};

  *largest_error = 0;
  HostWarp probe;
  for (int warp = 0; warp < warps; ++warp) {
    probe.each([&](int lane, FilterState& s) { filter.begin<HostWarp>(s, scale, warp * FILTER_ROWS, lane); });
    for (int tile = 0; tile < tiles; ++tile) {
      probe.multiply(&fragments[tile * 32]);
      probe.each([&](int lane, FilterState& s) {
        for (int strip = 0; strip < FILTER_STRIPS; ++strip)
          for (int i = 0; i < 4; ++i) {
            const int row = filter.row_of(warp * FILTER_ROWS, strip, i / 2, lane);
            const int code = tile * FILTER_CODES + 2 * (lane % QUAD) + i % 2;
            if (code >= size || codes.halves[code] < -0.1f * HUGE_DISTANCE) continue;
            double exact = codes.halves[code];
            for (int d = 0; d < problem.dim; ++d)
              exact +=
                  static_cast<double>(problem.latents[row * problem.dim + d]) * problem.codes[code * problem.dim + d];
            const double bound = filter_error(latents.halves[row], codes.largest, scale);
            const double error = std::abs(s.scores[strip][i] - exact * scale.square) / bound;
            *largest_error = std::max(*largest_error, error);
          }
      });
    }
  }
  for (int split = 0; split < problem.plan.splits; ++split)
    for (int warp = 0; warp < warps; ++warp) {
      auto team = std::make_unique<HostWarp>();
      run_filter(filter, *team, warp * FILTER_ROWS, split);
    }
  const int splits = problem.plan.splits;
  problem.plan.splits *= QUAD;
  for (int row = 0; row < count; ++row) indices[row] = finish_search(problem, row, merged_row(problem, row));
  return splits;
}
}
