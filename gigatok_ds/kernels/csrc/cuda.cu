// The operators on GPUs. Nothing here waits for the device, and nothing is added up in an order that varies.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>

#include "device.h"
#include "finish.h"
#include "operators.h"

namespace gigatok {
namespace {

constexpr int WAVES = 4;  // blocks for each multiprocessor, if there is work for them
constexpr int MOST_SPLITS = 64;
constexpr int SIMPLE_THREADS = 256;  // of blocks that treat each element by itself
constexpr int RECHECK_WARPS = 8;     // of a block

int blocks_for(int64_t elements, int of_block) {
  return static_cast<int>((elements + of_block - 1) / of_block);
}

// Where an operator's kernels run: the tensor's device, and the stream that is current there.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int multiprocessors;

  explicit Place(const Tensor& tensor) : guard(tensor.get_device()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, tensor.get_device()));
  }
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice,
                    "the quantizer's kernels were not compiled for this GPU; gigatok-ds doctor --build compiles them, "
                    "GIGATOK_KERNELS=torch does without");
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA error in the quantizer's kernels: ", cudaGetErrorString(error));
  }
};

// A kernel that calls work(i) for i from 0 to count - 1, which may be more than 2^31.
template <class Work>
__global__ void elementwise(int64_t count, Work work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) work(i);
}

template <class Work>
void for_each(const Place& place, int64_t count, const Work& work) {
  if (count == 0) return;
  elementwise<<<blocks_for(count, SIMPLE_THREADS), SIMPLE_THREADS, 0, place.stream>>>(count, work);
  Place::check(cudaGetLastError());
}

// An input as the passes want it. summary[0]: the largest half square of a finite row; summary[1]: 1 if one is not
// finite.
struct Prepared {
  Tensor rows, halves, summary;
};

__global__ void prepare_kernel(const float* from, int count, int dim, int padded, bool codes, float* rows,
                               float* halves, float* summary) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned bits = 0;  // positive floats are ordered like their bits
  if (i < count) {
    const float half = prepare_row(from + i * dim, dim, padded, rows + i * padded);
    const bool finite = half < INFINITY;
    if (finite) bits = __float_as_uint(half);
    if (!finite) summary[1] = 1.f;
    halves[i] = !codes ? half : finite ? -half : -HUGE_DISTANCE;
  }
  // A maximum does not depend on the order. One thread speaks for its warp, since all would queue at the one address.
  const unsigned largest = __reduce_max_sync(~0u, bits);
  if (threadIdx.x % 32 == 0 && largest) atomicMax(reinterpret_cast<unsigned*>(summary), largest);
}

Prepared prepare(const Place& place, const Tensor& tensor, bool codes) {
  const int count = static_cast<int>(tensor.size(0)), dim = static_cast<int>(tensor.size(1)), padded = padded_dim(dim);
  Prepared prepared{torch::stable::new_empty(tensor, {count, padded}), torch::stable::new_empty(tensor, {count}),
                    torch::stable::new_zeros(tensor, {2})};
  if (count) {
    prepare_kernel<<<blocks_for(count, SIMPLE_THREADS), SIMPLE_THREADS, 0, place.stream>>>(
        tensor.const_data_ptr<float>(), count, dim, padded, codes, prepared.rows.mutable_data_ptr<float>(),
        prepared.halves.mutable_data_ptr<float>(), prepared.summary.mutable_data_ptr<float>());
    Place::check(cudaGetLastError());
  }
  return prepared;
}

struct Inputs {
  Prepared latents, codes;
  Problem problem{};

  Inputs(const Place& place, const Tensor& z, const Tensor& e, double temperature)
      : latents(prepare(place, z, false)), codes(prepare(place, e, true)) {
    problem.count = static_cast<int>(z.size(0));
    problem.size = static_cast<int>(e.size(0));
    problem.dim = padded_dim(static_cast<int>(z.size(1)));
    problem.latents = latents.rows.const_data_ptr<float>();
    problem.codes = codes.rows.const_data_ptr<float>();
    problem.half_latents = latents.halves.const_data_ptr<float>();
    problem.minus_half_codes = codes.halves.const_data_ptr<float>();
    problem.largest_half_code = codes.summary.const_data_ptr<float>();
    problem.sharpness = sharpness_of(temperature);
  }
};

template <class Sweep>
__global__ void __launch_bounds__(THREADS, 1) sweep_kernel(const __grid_constant__ Sweep sweep) {
  __shared__ Tile<Sweep> tiles[2];
  DeviceTeam<Sweep> team;
  run_block(sweep, team, tiles, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
}

// Holds what splits leave until it has been added up.
struct Workspace {
  Tensor partials;
};

template <class Sweep>
Workspace launch_sweep(const Place& place, Problem& problem, const Tensor& like, int64_t residents, int64_t streamed,
                       int64_t values) {
  const int blocks = blocks_for(residents, Shape<Sweep>::of_block);
  problem.plan = plan_splits(blocks, streamed, WAVES * place.multiprocessors, Shape<Sweep>::tile, MOST_SPLITS);
  const bool rows = values == 0;
  const int64_t floats = rows ? sizeof(RowPartial) / sizeof(float) : values;
  Workspace workspace{torch::stable::new_empty(like, {problem.plan.splits * residents * floats})};
  problem.partials = workspace.partials.mutable_data_ptr<float>();
  problem.row_partials = reinterpret_cast<RowPartial*>(problem.partials);
  if (blocks) {
    sweep_kernel<<<dim3(blocks, problem.plan.splits), THREADS, 0, place.stream>>>(Sweep{{problem}});
    Place::check(cudaGetLastError());
  }
  return workspace;
}

template <int D>
Workspace launch_of_dim(Pass pass, const Place& place, Problem& problem, const Tensor& like) {
  const int64_t count = problem.count, size = problem.size;
  switch (pass) {
    case Pass::search:
      return launch_sweep<Assign<float, D, false>>(place, problem, like, count, size, 0);
    case Pass::assign:
      return launch_sweep<Assign<float, D, true>>(place, problem, like, count, size, 0);
    case Pass::average:
      return launch_sweep<Average<float, D>>(place, problem, like, size, count, 1);
    case Pass::latent_gradient:
      return launch_sweep<LatentGradient<float, D>>(place, problem, like, count, size, 2 * D + 1);
    default:
      return launch_sweep<CodeGradient<float, D>>(place, problem, like, size, count, D);
  }
}

Workspace launch(Pass pass, const Place& place, Problem& problem, const Tensor& like) {
  switch (problem.dim) {
    case 4:
      return launch_of_dim<4>(pass, place, problem, like);
    case 8:
      return launch_of_dim<8>(pass, place, problem, like);
    case 16:
      return launch_of_dim<16>(pass, place, problem, like);
    case 32:
      return launch_of_dim<32>(pass, place, problem, like);
    default:
      return launch_of_dim<64>(pass, place, problem, like);
  }
}

__global__ void __launch_bounds__(FILTER_THREADS, WAVES) filter_kernel(const __grid_constant__ Filter filter) {
  __shared__ FilterTile tiles[2];
  DeviceFilter team;
  run_filter(filter, team, tiles, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
}

template <int D>
__global__ void __launch_bounds__(32 * RECHECK_WARPS) recheck_kernel(const __grid_constant__ Filter filter,
                                                                     int64_t* indices) {
  const int row = static_cast<int>(blockIdx.x * RECHECK_WARPS + threadIdx.x / 32);
  if (row >= filter.problem.count) return;
  DeviceWarp team;
  const int32_t nearest = run_recheck<D>(filter, team, row);
  if (threadIdx.x % 32 == 0) indices[row] = nearest;
}

// The search on tensor cores, for latents of at most FILTER_DIM dimensions.
void search_filtered(const Place& place, const Inputs& inputs, const Tensor& like, int64_t* indices) {
  Problem problem = inputs.problem;
  if (problem.count == 0) return;
  const int groups = blocks_for(problem.size, FILTER_GROUP), blocks = blocks_for(problem.count, FILTER_BLOCK_ROWS);
  problem.plan = plan_splits(blocks, problem.size, WAVES * place.multiprocessors, FILTER_GROUP, MOST_SPLITS);
  Tensor packed =
      torch::stable::new_empty(like, {groups * static_cast<int64_t>(sizeof(FilterTile) / sizeof(float))});
  const int64_t parts = static_cast<int64_t>(problem.count) * problem.plan.splits * QUAD;
  Tensor found = torch::stable::new_empty(like, {parts * static_cast<int64_t>(sizeof(FilterPartial) / sizeof(float))});
  Tensor margins = torch::stable::new_empty(like, {problem.count});
  auto* fragments = reinterpret_cast<Fragment*>(packed.mutable_data_ptr<float>());
  float* windows = margins.mutable_data_ptr<float>();
  const Filter filter{problem, fragments, windows, inputs.latents.summary.const_data_ptr<float>(),
                      reinterpret_cast<FilterPartial*>(found.mutable_data_ptr<float>())};
  const int lanes = groups * FILTER_TILES * 32;
  for_each(place, std::max(lanes, problem.count), [=] __device__(int i) {
    const Problem& of = filter.problem;
    const FilterScale scale = filter.scale();
    if (i < lanes) fragments[i] = code_fragment<DeviceFilter>(of, scale, i / 32, i % 32);
    if (i < of.count) windows[i] = score_window(of.half_latents[i], *of.largest_half_code, scale);
  });
  filter_kernel<<<dim3(blocks, problem.plan.splits), FILTER_THREADS, 0, place.stream>>>(filter);
  Place::check(cudaGetLastError());
  const auto recheck = problem.dim == 4 ? recheck_kernel<4> : recheck_kernel<8>;
  recheck<<<blocks_for(problem.count, RECHECK_WARPS), 32 * RECHECK_WARPS, 0, place.stream>>>(filter, indices);
  Place::check(cudaGetLastError());
}

// GIGATOK_TENSOR_CORES=0 leaves the filter to float32, for comparison.
bool tensor_cores() {
  const char* variable = std::getenv("GIGATOK_TENSOR_CORES");
  return !variable || variable[0] != '0';
}

Tensor nearest_code(const Tensor& z, const Tensor& e) {
  check_inputs(z, e);
  const Place place(z);
  Tensor indices = torch::stable::new_empty(z, {z.size(0)}, ScalarType::Long);
  int64_t* nearest = indices.mutable_data_ptr<int64_t>();
  Inputs inputs(place, z, e, 1.0);
  if (inputs.problem.dim <= FILTER_DIM && tensor_cores()) {
    search_filtered(place, inputs, z, nearest);
    return indices;
  }
  const Workspace workspace = launch(Pass::search, place, inputs.problem, z);
  const Problem problem = inputs.problem;
  for_each(place, problem.count,
           [=] __device__(int row) { nearest[row] = finish_search(problem, row, merged_row(problem, row)); });
  return indices;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> entropy_forward(const Tensor& z, const Tensor& e, double temperature) {
  check_inputs(z, e);
  const Place place(z);
  const int64_t count = z.size(0), size = e.size(0);
  Tensor indices = torch::stable::new_empty(z, {count}, ScalarType::Long),
         entropy = torch::stable::new_empty(z, {count});
  Tensor average = torch::stable::new_empty(z, {size}), state = torch::stable::new_empty(z, {count, 4});
  Tensor thresholds = torch::stable::new_empty(z, {count});
  Tensor terms = torch::stable::new_empty(z, {count * static_cast<int64_t>(sizeof(RowTerms) / sizeof(float))});
  Inputs inputs(place, z, e, temperature);
  Problem& problem = inputs.problem;
  const float cutoff = cutoff_bits(size);
  problem.margin = 0.5f * cutoff / problem.sharpness;

  const Workspace rows = launch(Pass::assign, place, problem, z);
  auto* records = reinterpret_cast<RowRecord*>(state.mutable_data_ptr<float>());
  auto* row_terms = reinterpret_cast<RowTerms*>(terms.mutable_data_ptr<float>());
  int64_t* nearest = indices.mutable_data_ptr<int64_t>();
  float *entropies = entropy.mutable_data_ptr<float>(), *limits = thresholds.mutable_data_ptr<float>();
  const Problem assigned = problem;
  for_each(place, count, [=] __device__(int row) {
    const RowPartial merged = merged_row(assigned, row);
    const RowRecord record = finish_assign(assigned, row, merged, cutoff);
    nearest[row] = finish_search(assigned, row, merged);
    records[row] = record;
    entropies[row] = record.entropy;
    limits[row] = record.threshold;
    row_terms[row] = {record.best, record.bits, 0.f, 0.f, 0.f};
  });

  problem.thresholds = limits;
  problem.terms = row_terms;
  const Workspace codes = launch(Pass::average, place, problem, z);
  float* probabilities = average.mutable_data_ptr<float>();
  const float* bad = inputs.latents.summary.const_data_ptr<float>() + 1;
  const float scale = count ? 1.f / static_cast<float>(count) : 0.f;
  const Problem averaged = problem;
  for_each(place, size, [=] __device__(int code) {
    probabilities[code] = *bad ? NOT_A_NUMBER : scale * sum_of_splits(averaged, averaged.size, code);
  });
  return {indices, entropy, average, state};
}

std::tuple<Tensor, Tensor> entropy_backward(const Tensor& z, const Tensor& e, const Tensor& indices,
                                            const Tensor& state, const Tensor& entropy_gradient,
                                            const Tensor& average_gradient, double temperature) {
  check_inputs(z, e);
  check_saved(z, e, indices, state, entropy_gradient, average_gradient);
  const Place place(z);
  const int64_t count = z.size(0), size = e.size(0);
  const int dim = static_cast<int>(z.size(1));
  Tensor latent_gradient = torch::stable::new_empty(z, {count, dim}),
         code_gradient = torch::stable::new_empty(e, {size, dim});
  Tensor thresholds = torch::stable::new_empty(z, {count}), shares = torch::stable::new_empty(z, {size});
  Tensor terms = torch::stable::new_empty(z, {count * static_cast<int64_t>(sizeof(RowTerms) / sizeof(float))});
  Inputs inputs(place, z, e, temperature);
  Problem& problem = inputs.problem;
  const auto* records = reinterpret_cast<const RowRecord*>(state.const_data_ptr<float>());
  auto* row_terms = reinterpret_cast<RowTerms*>(terms.mutable_data_ptr<float>());
  const int64_t* nearest = indices.const_data_ptr<int64_t>();
  const float* entropy_gradients = entropy_gradient.const_data_ptr<float>();
  const float* average_gradients = average_gradient.const_data_ptr<float>();
  float *limits = thresholds.mutable_data_ptr<float>(), *shares_ = shares.mutable_data_ptr<float>();
  const float scale = 1.f / static_cast<float>(std::max<int64_t>(count, 1));
  for_each(place, size, [=] __device__(int code) { shares_[code] = average_gradients[code] * scale; });
  for_each(place, count, [=] __device__(int row) {
    const RowRecord record = records[row];
    const float base = average_gradients[nearest[row] < 0 ? 0 : nearest[row]] * scale;
    limits[row] = record.threshold;
    row_terms[row] = {record.best, record.bits, entropy_gradients[row], 0.f, base};
  });
  problem.thresholds = limits;
  problem.terms = row_terms;
  problem.indices = nearest;
  problem.shares = shares_;

  const float factor = static_cast<float>(2 / temperature);
  float* to_latents = latent_gradient.mutable_data_ptr<float>();
  const Workspace rows = launch(Pass::latent_gradient, place, problem, z);
  const Problem of_latents = problem;
  for_each(place, count, [=] __device__(int row) {
    row_terms[row].offset = finish_latent_gradient(of_latents, records[row], row, entropy_gradients[row], factor, dim,
                                                   to_latents + static_cast<int64_t>(row) * dim);
  });
  float* to_codes = code_gradient.mutable_data_ptr<float>();
  const float* bad = inputs.latents.summary.const_data_ptr<float>() + 1;
  const Workspace codes = launch(Pass::code_gradient, place, problem, z);
  const Problem of_codes = problem;
  for_each(place, size, [=] __device__(int code) {
    finish_code_gradient(of_codes, code, *bad ? NOT_A_NUMBER : factor, dim,
                         to_codes + static_cast<int64_t>(code) * dim);
  });
  return {latent_gradient, code_gradient};
}

Tensor code_histogram(const Tensor& codes, int64_t size) {
  const Place place(codes);
  Tensor counts = torch::stable::new_zeros(codes, {size}, ScalarType::Long);
  auto* count = reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr<int64_t>());
  const int64_t* values = codes.const_data_ptr<int64_t>();
  // Integers: the sum does not depend on the order.
  for_each(place, codes.numel(), [=] __device__(int64_t i) {
    if (values[i] >= 0 && values[i] < size) atomicAdd(count + values[i], 1ull);
  });
  return counts;
}

}  // namespace
}  // namespace gigatok

STABLE_TORCH_LIBRARY_IMPL(gigatok_native, CUDA, library) {
  library.impl("nearest_code", TORCH_BOX(&gigatok::nearest_code));
  library.impl("entropy_forward", TORCH_BOX(&gigatok::entropy_forward));
  library.impl("entropy_backward", TORCH_BOX(&gigatok::entropy_backward));
  library.impl("code_histogram", TORCH_BOX(&gigatok::code_histogram));
}
