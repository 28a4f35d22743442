// grad_weight = sum over pixels of dz (g x)^T, split over ranges of pixels: see WeightGradientParams. The finish is
// sum_rows. Traffic: dz and x once per 64 x 64 tile of the weight (one tile for C, C' <= 64), and the partial sums,
// which the plan bounds.
#include "cuda/product.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast>
using PixelLoader = OperandLoader<T, kLast, false>;

template <class T, bool kLast, Float32Product kProduct>
GSTO_KERNEL(kThreads, kProductBlocks)
weight_gradient(const WeightGradientParams p) {
  using Loader = PixelLoader<T, kLast>;
  const int tid = static_cast<int>(threadIdx.x);
  const int col_tiles = (p.channels + kTileRows - 1) / kTileRows;
  const int row0 = static_cast<int>(blockIdx.y) / col_tiles * kTileRows,
            col0 = static_cast<int>(blockIdx.y) % col_tiles * kTileRows;
  const int64_t image = blockIdx.x / static_cast<unsigned>(p.splits);
  const int64_t begin = blockIdx.x % static_cast<unsigned>(p.splits) * p.split_pixels;
  const int64_t left = p.pixels - begin;
  const int count = static_cast<int>(left < p.split_pixels ? left : p.split_pixels);

  const Feature<T> dz = feature_of<T, kLast>(p.gradient, image, p.pixels, p.out_channels).shifted(begin);
  Feature<T> x = feature_of<T, kLast>(p.input, image, p.pixels, p.channels);
  if (p.gate != nullptr) x.scale = static_cast<const T*>(p.gate) + image * p.gate_stride;
  x = x.shifted(begin);

  Accumulators acc;
  acc.clear();
  float bias = 0;  // two threads per row of dz
  multiply<T, kProduct, Loader, Loader>(dz, row0, x, col0, count, shared_memory(), acc, [&](int, const T* a, const T*) {
    if (col0 != 0) return;
#pragma unroll
    for (int k = 0; k < kTileK<T> / 2; ++k)
      bias += to_float(a[Loader::Tile::at(tid / 2, tid % 2 * (kTileK<T> / 2) + k)]);
  });
  bias += shuffle_xor(bias, 1);

  const int64_t size = static_cast<int64_t>(p.out_channels) * p.channels;
  float* sums = p.sums + static_cast<int64_t>(blockIdx.x) * (size + p.out_channels);
  acc.each([&](int row, int col, float value) {
    const int m = row0 + row, c = col0 + col;
    if (m < p.out_channels && c < p.channels) sums[static_cast<int64_t>(m) * p.channels + c] = value;
  });
  if (col0 == 0 && tid % 2 == 0 && row0 + tid / 2 < p.out_channels) sums[size + row0 + tid / 2] = bias;
}

}  // namespace

cudaError_t launch_weight_gradient(const WeightGradientParams& params, cudaStream_t stream) {
  const int tiles = (params.channels + kTileRows - 1) / kTileRows * ((params.out_channels + kTileRows - 1) / kTileRows);
  const dim3 grid(static_cast<unsigned>(params.batch * params.splits), static_cast<unsigned>(tiles));
  return dispatch_product(params.format, [&](auto type, auto last, auto product) {
    using Loader = PixelLoader<decltype(type), last.value>;
    return launch(weight_gradient<decltype(type), last.value, product.value>, grid, kThreads,
                  kOperandBytes<Loader, Loader>, stream, params);
  });
}

}  // namespace gsto::cuda
