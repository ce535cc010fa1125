// The kernels' blocks and warps on a host: what cuda.cu launches, with its launch geometry, one thread after the other.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "blocks.h"
#include "finish.h"
#include "recheck.h"

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

// The filter's block, whose threads take turns; the product is written out from the fragments' layout in the PTX
// manual.
class HostFilter {
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
    for (int thread = 0; thread < FILTER_THREADS; ++thread) phase(thread, states_[thread]);
  }
  void copy_four(float* to, const float* from, bool) { std::memcpy(to, from, 4 * sizeof *to); }
  void wait_for_copies() {}
  void multiply(const Fragment* codes) {
    float b[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        b[2 * (lane % 4) + i][lane / 4] = half(codes[lane].first, i);
        b[2 * (lane % 4) + 8 + i][lane / 4] = half(codes[lane].second, i);
      }
    for (FilterState* warp = states_; warp < states_ + FILTER_THREADS; warp += 32)
      for (int strip = 0; strip < FILTER_STRIPS; ++strip) {
        float a[16][16], c[16][8] = {};
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 2; ++i)
            for (int lower = 0; lower < 2; ++lower) {
              a[lane / 4 + 8 * lower][2 * (lane % 4) + i] = half(warp[lane].latents[strip][lower], i);
              a[lane / 4 + 8 * lower][2 * (lane % 4) + 8 + i] = half(warp[lane].ones, i);
            }
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) warp[lane].scores[strip][i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
      }
  }
  FilterState states_[FILTER_THREADS];

 private:
  static float half(uint32_t bits, int i) {
    _Float16 both[2];
    std::memcpy(both, &bits, sizeof bits);
    return both[i];
  }
};

// The warp that looks again. looks: how often all its lanes computed a distance.
class HostWarp {
 public:
  template <class Phase>
  void each(const Phase& phase) {
    ++looks;
    for (int lane = 0; lane < 32; ++lane) phase(lane, near_[lane]);
  }
  template <class Value>
  static float largest(const Value& value) {
    float most = value(0);
    for (int lane = 1; lane < 32; ++lane) most = larger(most, value(lane));
    return most;
  }
  template <class Condition>
  static uint32_t ballot(const Condition& condition) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(condition(lane)) << lane;
    return bits;
  }
  static int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
  int32_t nearest() {
    for (int lane = 1; lane < 32; ++lane) near_[0].take(near_[lane]);
    return near_[0].index;
  }
  int64_t looks = -1;  // the first `each` only begins

 private:
  Nearby near_[32];
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

// The search on tensor cores, planned as for `planned` latents; the warps that are run are those of `count`. Returns
// the number of splits. looks: how often a warp computed distances again. largest_error, unless null: of half precision's
// scores less their exact values, in units of their bound, the largest in magnitude.
int64_t warp_search(const float* z, int count, const float* e, int size, int dim, int planned, int wanted,
                    int64_t* indices, int64_t* looks, double* largest_error) {
  const Prepared latents(z, count, dim, false), codes(e, size, dim, true);
  Problem problem = problem_of(latents, codes, count, size, dim, 1.0);
  const int groups = (size + FILTER_GROUP - 1) / FILTER_GROUP, tiles = groups * FILTER_TILES;
  std::vector<Fragment> fragments(tiles * 32);
  const FilterScale scale = filter_scale(latents.largest, codes.largest);
  for (int i = 0; i < tiles * 32; ++i) fragments[i] = code_fragment<HostFilter>(problem, scale, i / 32, i % 32);
  const auto blocks = [](int rows) { return (rows + FILTER_BLOCK_ROWS - 1) / FILTER_BLOCK_ROWS; };
  problem.plan = plan_splits(blocks(planned), size, wanted, FILTER_GROUP, 64);
  std::vector<FilterPartial> partials(static_cast<int64_t>(count) * problem.plan.splits * QUAD);
  std::vector<float> windows(count);
  for (int i = 0; i < count; ++i) windows[i] = score_window(latents.halves[i], codes.largest, scale);
  const Filter filter{problem, fragments.data(), windows.data(), &latents.largest, partials.data()};

  const auto check = [&](HostFilter& probe, int block) {
    probe.each([&](int thread, FilterState& s) {
      filter.begin<HostFilter>(s, scale, block * FILTER_BLOCK_ROWS + thread / 32 * FILTER_ROWS, thread % 32);
    });
    for (int tile = 0; tile < tiles; ++tile) {
      probe.multiply(&fragments[tile * 32]);
      probe.each([&](int thread, FilterState& s) {
        for (int strip = 0; strip < FILTER_STRIPS; ++strip)
          for (int i = 0; i < 4; ++i) {
            const int first = block * FILTER_BLOCK_ROWS + thread / 32 * FILTER_ROWS;
            const int row = Filter::row_of(first, strip, i / 2, thread % 32);
            const int code = tile * FILTER_CODES + 2 * (thread % QUAD) + i % 2;
            if (row >= count || code >= size || codes.halves[code] < -0.1f * HUGE_DISTANCE) continue;
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
  };
  const auto team = std::make_unique<HostFilter>();
  if (largest_error) {
    *largest_error = 0;
    for (int block = 0; block < blocks(count); ++block) check(*team, block);
  }
  for (int split = 0; split < problem.plan.splits; ++split)
    for (int block = 0; block < blocks(count); ++block) {
      FilterTile buffers[2];
      run_filter(filter, *team, buffers, block, split);
    }
  *looks = 0;
  for (int row = 0; row < count; ++row) {
    HostWarp warp;
    indices[row] = problem.dim == 4 ? run_recheck<4>(filter, warp, row) : run_recheck<8>(filter, warp, row);
    *looks += std::max<int64_t>(warp.looks, 0);
  }
  return problem.plan.splits;
}
}
