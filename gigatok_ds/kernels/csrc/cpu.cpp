// The operators on CPUs: inputs prepared, passes spread over torch's threads, splits added up.
#include "cpu.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "finish.h"
#include "operators.h"

namespace gigatok {

const Level& level() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#else
  static const bool has_avx2 = false, has_avx512 = false;
#endif
  const char* variable = std::getenv("GIGATOK_CPU_CAPABILITY");
  const std::string wanted = variable ? variable : "";
  const std::pair<const Level*, bool> levels[] = {
      {&avx512_level, has_avx512}, {&avx2_level, has_avx2}, {&portable_level, true}};
  for (const auto& [candidate, supported] : levels)
    if (supported && candidate->run_pass && (wanted.empty() || wanted == candidate->name)) return *candidate;
  STD_TORCH_CHECK(false, "GIGATOK_CPU_CAPABILITY is '", wanted,
                  "'; choose avx512 or avx2 where this processor has it, or portable");
}

namespace {

// Inputs as the passes want them.
struct Prepared {
  std::unique_ptr<float[]> rows, halves;
  float largest = 0;
  bool bad = false;

  Prepared(const Tensor& tensor, int padded, bool codes)
      : rows(new float[std::max<int64_t>(tensor.size(0), 1) * padded]),
        halves(new float[std::max<int64_t>(tensor.size(0), 1)]) {
    const float* data = tensor.const_data_ptr<float>();
    const int dim = static_cast<int>(tensor.size(1));
    for (int64_t i = 0; i < tensor.size(0); ++i) {
      const float half = prepare_row(data + i * dim, dim, padded, rows.get() + i * padded);
      const bool finite = half < INFINITY;
      bad |= !finite;
      largest = std::max(largest, finite ? half : 0.f);
      halves[i] = !codes ? half : finite ? -half : -HUGE_DISTANCE;
    }
  }
};

struct Inputs {
  Prepared latents, codes;
  Problem problem{};

  Inputs(const Tensor& z, const Tensor& e, double temperature)
      : latents(z, padded_dim(static_cast<int>(z.size(1))), false),
        codes(e, padded_dim(static_cast<int>(z.size(1))), true) {
    problem.count = static_cast<int>(z.size(0));
    problem.size = static_cast<int>(e.size(0));
    problem.dim = padded_dim(static_cast<int>(z.size(1)));
    problem.latents = latents.rows.get();
    problem.codes = codes.rows.get();
    problem.half_latents = latents.halves.get();
    problem.minus_half_codes = codes.halves.get();
    problem.largest_half_code = &codes.largest;
    problem.sharpness = sharpness_of(temperature);
  }
};

// Runs a pass whose lanes hold `residents` and which streams `streamed`; its splits leave `values` floats per resident.
template <class Finish>
void run(Pass pass, Problem& problem, int64_t residents, int64_t streamed, int64_t values, const Finish& finish) {
  const Level& chosen = level();
  const int64_t groups = (residents + chosen.width - 1) / chosen.width, threads = torch::stable::get_num_threads();
  problem.plan = plan_splits(groups, streamed, 4 * threads, 64, 64);
  const bool rows = pass == Pass::search || pass == Pass::assign;
  std::unique_ptr<RowPartial[]> row_partials(new RowPartial[rows ? problem.plan.splits * residents : 0]);
  std::unique_ptr<float[]> partials(new float[problem.plan.splits * values * residents]);
  problem.row_partials = row_partials.get();
  problem.partials = partials.get();
  torch::stable::parallel_for(0, groups * problem.plan.splits, 1,
                              [&](int64_t begin, int64_t end) { chosen.run_pass(pass, problem, begin, end); });
  for (int64_t i = 0; i < residents; ++i) finish(static_cast<int>(i));
}

Tensor nearest_code(const Tensor& z, const Tensor& e) {
  check_inputs(z, e);
  Tensor indices = torch::stable::new_empty(z, {z.size(0)}, ScalarType::Long);
  int64_t* nearest = indices.mutable_data_ptr<int64_t>();
  Inputs inputs(z, e, 1.0);
  Problem& problem = inputs.problem;
  run(Pass::search, problem, problem.count, problem.size, 0,
      [&](int row) { nearest[row] = finish_search(problem, row, merged_row(problem, row)); });
  return indices;
}

// What the sweeps over codes and the backward pass read of the latents' records.
struct Rows {
  std::unique_ptr<float[]> thresholds;
  std::unique_ptr<RowTerms[]> terms;

  // In the backward pass the problem has indices and shares, and gradients are those at the entropies.
  Rows(Problem& problem, const RowRecord* records, const float* gradients)
      : thresholds(new float[problem.count]), terms(new RowTerms[problem.count]) {
    for (int row = 0; row < problem.count; ++row) {
      thresholds[row] = records[row].threshold;
      terms[row] = {records[row].best, records[row].bits, 0.f, 0.f, 0.f};
      if (!gradients) continue;
      terms[row].gradient = gradients[row];
      terms[row].base = problem.shares[std::max<int64_t>(problem.indices[row], 0)];
    }
    problem.thresholds = thresholds.get();
    problem.terms = terms.get();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> entropy_forward(const Tensor& z, const Tensor& e, double temperature) {
  check_inputs(z, e);
  const int64_t count = z.size(0), size = e.size(0);
  Tensor indices = torch::stable::new_empty(z, {count}, ScalarType::Long),
         entropy = torch::stable::new_empty(z, {count});
  Tensor average = torch::stable::new_empty(z, {size}), state = torch::stable::new_empty(z, {count, 4});
  Inputs inputs(z, e, temperature);
  Problem& problem = inputs.problem;
  const float cutoff = cutoff_bits(size);
  problem.margin = 0.5f * cutoff / problem.sharpness;

  auto* records = reinterpret_cast<RowRecord*>(state.mutable_data_ptr<float>());
  int64_t* nearest = indices.mutable_data_ptr<int64_t>();
  float* entropies = entropy.mutable_data_ptr<float>();
  run(Pass::assign, problem, count, size, 0, [&](int row) {
    const RowPartial merged = merged_row(problem, row);
    nearest[row] = finish_search(problem, row, merged);
    records[row] = finish_assign(problem, row, merged, cutoff);
    entropies[row] = records[row].entropy;
  });

  Rows rows(problem, records, nullptr);
  float* probabilities = average.mutable_data_ptr<float>();
  const float scale = inputs.latents.bad ? NOT_A_NUMBER : count ? 1.f / static_cast<float>(count) : 0.f;
  run(Pass::average, problem, size, count, 1,
      [&](int code) { probabilities[code] = scale * sum_of_splits(problem, size, code); });
  return {indices, entropy, average, state};
}

std::tuple<Tensor, Tensor> entropy_backward(const Tensor& z, const Tensor& e, const Tensor& indices,
                                            const Tensor& state, const Tensor& entropy_gradient,
                                            const Tensor& average_gradient, double temperature) {
  check_inputs(z, e);
  check_saved(z, e, indices, state, entropy_gradient, average_gradient);
  const int64_t count = z.size(0), size = e.size(0);
  const int dim = static_cast<int>(z.size(1));
  Tensor latent_gradient = torch::stable::new_empty(z, {count, dim}),
         code_gradient = torch::stable::new_empty(e, {size, dim});
  Inputs inputs(z, e, temperature);
  Problem& problem = inputs.problem;
  const auto* records = reinterpret_cast<const RowRecord*>(state.const_data_ptr<float>());
  const float* gradients = entropy_gradient.const_data_ptr<float>();
  problem.indices = indices.const_data_ptr<int64_t>();
  std::unique_ptr<float[]> shares(new float[size]);
  for (int64_t code = 0; code < size; ++code)
    shares[code] = average_gradient.const_data_ptr<float>()[code] / static_cast<float>(std::max<int64_t>(count, 1));
  problem.shares = shares.get();
  Rows rows(problem, records, gradients);

  const float factor = static_cast<float>(2 / temperature);
  float* to_latents = latent_gradient.mutable_data_ptr<float>();
  run(Pass::latent_gradient, problem, count, size, 2 * problem.dim + 1, [&](int row) {
    rows.terms[row].offset = finish_latent_gradient(problem, records[row], row, gradients[row], factor, dim,
                                                    to_latents + static_cast<int64_t>(row) * dim);
  });
  float* to_codes = code_gradient.mutable_data_ptr<float>();
  const float poisoned = inputs.latents.bad ? NOT_A_NUMBER : factor;
  run(Pass::code_gradient, problem, size, count, problem.dim, [&](int code) {
    finish_code_gradient(problem, code, poisoned, dim, to_codes + static_cast<int64_t>(code) * dim);
  });
  return {latent_gradient, code_gradient};
}

Tensor code_histogram(const Tensor& codes, int64_t size) {
  Tensor counts = torch::stable::new_zeros(codes, {size}, ScalarType::Long);
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  const int64_t* values = codes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < codes.numel(); ++i)
    if (values[i] >= 0 && values[i] < size) ++count[values[i]];
  return counts;
}

// Rows (rows, depth) as product.h wants them.
std::unique_ptr<float[]> in_tiles(const float* rows, int count, int depth) {
  std::unique_ptr<float[]> tiles(new float[static_cast<int64_t>(count) * depth]);
  for (int first = 0; first < count; first += TILE_ROWS) {
    const int size = std::min(TILE_ROWS, count - first);
    float* tile = tiles.get() + static_cast<int64_t>(first) * depth;
    const float* from = rows + static_cast<int64_t>(first) * depth;
    for (int k = 0; k < depth; ++k)
      for (int row = 0; row < size; ++row) *tile++ = from[static_cast<int64_t>(row) * depth + k];
  }
  return tiles;
}

Tensor few_row_product(const Tensor& rows, const Tensor& panels, int64_t columns) {
  STD_TORCH_CHECK(rows.dim() == 2 && panels.dim() == 3 && panels.size(1) == rows.size(1) && panels.size(2) == PANEL &&
                      panels.size(0) == (columns + PANEL - 1) / PANEL && columns > 0,
                  "rows and panels must be (R, D) and (columns / 16 rounded up, D, 16)");
  STD_TORCH_CHECK(rows.is_contiguous() && panels.is_contiguous() && rows.scalar_type() == ScalarType::Float &&
                      panels.scalar_type() == ScalarType::Float,
                  "rows and panels must be contiguous and float32");
  STD_TORCH_CHECK(rows.size(0) < (1 << 24) && rows.size(1) < (1 << 24), "at most 2^24 rows and 2^24 of depth");
  Tensor outputs = torch::stable::new_empty(rows, {rows.size(0), columns});
  const Level& chosen = level();
  STD_TORCH_CHECK(chosen.run_product, "there is no such product for ", chosen.name);
  Product product{};
  product.rows = static_cast<int>(rows.size(0));
  product.depth = static_cast<int>(rows.size(1));
  product.columns = columns;
  const auto tiles = in_tiles(rows.const_data_ptr<float>(), product.rows, product.depth);
  product.weights = panels.const_data_ptr<float>();
  product.inputs = tiles.get();
  product.outputs = outputs.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, panels.size(0), 1,
                              [&](int64_t begin, int64_t end) {
                                std::unique_ptr<float[]> sums(new float[rows.size(0) * PANEL]);
                                chosen.run_product(product, begin, end, sums.get());
                              });
  return outputs;
}

std::string cpu_capability() {
  return level().name;
}

}  // namespace
}  // namespace gigatok

STABLE_TORCH_LIBRARY(gigatok_native, library) {
  library.def("nearest_code(Tensor latents, Tensor codebook) -> Tensor");
  library.def(
      "entropy_forward(Tensor latents, Tensor codebook, float temperature) -> "
      "(Tensor indices, Tensor entropy, Tensor average, Tensor state)");
  library.def(
      "entropy_backward(Tensor latents, Tensor codebook, Tensor indices, Tensor state, Tensor entropy_gradient, "
      "Tensor average_gradient, float temperature) -> (Tensor latents, Tensor codebook)");
  library.def("code_histogram(Tensor codes, int size) -> Tensor");
  library.def("few_row_product(Tensor rows, Tensor panels, int columns) -> Tensor");
  library.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gigatok_native, CPU, library) {
  library.impl("nearest_code", TORCH_BOX(&gigatok::nearest_code));
  library.impl("entropy_forward", TORCH_BOX(&gigatok::entropy_forward));
  library.impl("entropy_backward", TORCH_BOX(&gigatok::entropy_backward));
  library.impl("code_histogram", TORCH_BOX(&gigatok::code_histogram));
  library.impl("few_row_product", TORCH_BOX(&gigatok::few_row_product));
}

STABLE_TORCH_LIBRARY_IMPL(gigatok_native, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&gigatok::cpu_capability));
}
