// What the operators of every device begin with. Only torch's stable C++ interface is used, the one of torch 2.11: a
// library compiled with any torch since then loads into every other one.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "problem.h"

namespace gigatok {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Callers (kernels/ops.py) pass contiguous float32 matrices of equal width; this is about what only kernels cannot do.
inline void check_inputs(const Tensor& latents, const Tensor& codebook) {
  STD_TORCH_CHECK(
      latents.dim() == 2 && codebook.dim() == 2 && latents.size(1) == codebook.size(1) && codebook.size(0) > 0,
      "latents and codebook must be (N, D) and (K, D) with K at least 1");
  STD_TORCH_CHECK(latents.is_contiguous() && codebook.is_contiguous(), "latents and codebook must be contiguous");
  STD_TORCH_CHECK(latents.scalar_type() == ScalarType::Float && codebook.scalar_type() == ScalarType::Float,
                  "latents and codebook must be float32");
  STD_TORCH_CHECK(latents.size(1) <= LARGEST_DIM, "the codes' dimension is ", latents.size(1), "; it may be at most ",
                  LARGEST_DIM);
  STD_TORCH_CHECK(latents.size(0) < (1 << 30) && codebook.size(0) <= (1 << 24),
                  "at most 2^30 latents and 2^24 codes at a time");
}

// Of the backward pass: what the forward pass returned, and the gradients at it. They come from autograd, which may
// have kept them elsewhere in between.
inline void check_saved(const Tensor& latents, const Tensor& codebook, const Tensor& indices, const Tensor& state,
                        const Tensor& entropy_gradient, const Tensor& average_gradient) {
  const int64_t count = latents.size(0), size = codebook.size(0);
  const auto is = [&](const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns) {
    return tensor.scalar_type() == type && tensor.is_contiguous() && tensor.get_device() == latents.get_device() &&
           tensor.dim() == (columns ? 2 : 1) && tensor.size(0) == rows && (!columns || tensor.size(1) == columns);
  };
  STD_TORCH_CHECK(is(indices, ScalarType::Long, count, 0), "indices must be contiguous int64 (N,), beside the latents");
  STD_TORCH_CHECK(is(state, ScalarType::Float, count, sizeof(RowRecord) / sizeof(float)),
                  "state must be contiguous float32 (N, 4), beside the latents");
  STD_TORCH_CHECK(is(entropy_gradient, ScalarType::Float, count, 0) && is(average_gradient, ScalarType::Float, size, 0),
                  "gradients must be contiguous float32 (N,) and (K,), beside the latents");
}

inline float sharpness_of(double temperature) {
  return static_cast<float>(1.4426950408889634 / temperature);
}

}  // namespace gigatok
