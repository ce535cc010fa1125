// The operators around winograd.h, of some rows of tiles at a time.
#include <memory>
#include <optional>

#include "cpu.h"
#include "operators.h"

namespace gigatok {
namespace {

// What tiles (36, C, T) and the rows of maps (C, H, W) from tile `first` on have to do with each other.
Winograd work_of(const Tensor& maps, Tensor& tiles, int64_t first) {
  for (const Tensor* tensor : {&maps, const_cast<const Tensor*>(&tiles)})
    STD_TORCH_CHECK(tensor->dim() == 3 && tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Float &&
                        tensor->numel() > 0,
                    "maps must be (C, H, W) and tiles (36, C, T), contiguous and float32");
  Winograd work{};
  work.channels = maps.size(0);
  work.height = maps.size(1);
  work.width = maps.size(2);
  work.across = (work.width + WINOGRAD_STEP - 1) / WINOGRAD_STEP;
  work.first = first;
  work.down = tiles.size(2) / work.across;
  STD_TORCH_CHECK(tiles.size(0) == WINOGRAD_POINTS * WINOGRAD_POINTS && tiles.size(1) == work.channels &&
                      tiles.size(2) == work.down * work.across,
                  "tiles must be 36, of as many channels as the maps, and of whole rows");
  const int64_t rows = (work.height + WINOGRAD_STEP - 1) / WINOGRAD_STEP;
  STD_TORCH_CHECK(first >= 0 && first <= rows - work.down, "maps have ", rows, " rows of tiles, not ", first, " and ",
                  work.down, " more");
  work.tiles = tiles.mutable_data_ptr<float>();
  return work;
}

void run(const Winograd& work, WinogradPass pass) {
  const Level& chosen = level();
  torch::stable::parallel_for(0, work.channels, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[work.scratch()]);
    chosen.run_winograd(work, pass, begin, end, scratch.get());
  });
}

void winograd_tiles(Tensor& tiles, const Tensor& maps, int64_t first, bool gradients) {
  Winograd work = work_of(maps, tiles, first);
  work.maps = maps.const_data_ptr<float>();
  run(work, gradients ? WinogradPass::gradients : WinogradPass::inputs);
}

void winograd_maps(Tensor& maps, Tensor& tiles, int64_t first, const std::optional<Tensor>& bias) {
  Winograd work = work_of(maps, tiles, first);
  STD_TORCH_CHECK(!bias || (bias->numel() == work.channels && bias->is_contiguous() &&
                            bias->scalar_type() == ScalarType::Float),
                  "bias must be (C,), contiguous and float32");
  work.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  work.outputs = maps.mutable_data_ptr<float>();
  run(work, WinogradPass::back);
}

}  // namespace
}  // namespace gigatok

STABLE_TORCH_LIBRARY_FRAGMENT(gigatok_native, library) {
  // Rows of tiles (36, C, tiles) of maps (C, H, W), from row `first` on: of gradients (A u A') or of inputs (B' d B).
  library.def("winograd_tiles(Tensor(a!) tiles, Tensor maps, int first, bool gradients) -> ()");
  // Into those rows of the maps: A' m A + bias.
  library.def("winograd_maps(Tensor(a!) maps, Tensor tiles, int first, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gigatok_native, CPU, library) {
  library.impl("winograd_tiles", TORCH_BOX(&gigatok::winograd_tiles));
  library.impl("winograd_maps", TORCH_BOX(&gigatok::winograd_maps));
}
