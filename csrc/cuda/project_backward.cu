// du = W^T dz and the gate's backward in one kernel: see ProjectBackwardParams. All of du for 64 pixels stays in shared
// memory until its dot product with x is known, so du is never written. Traffic per pixel: C' elements of dz (again per
// further 64 input channels, from L1/L2), C of x twice (the second time from L1), C of dx.
#include "cuda/gate_backward.h"
#include "cuda/product.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast>
struct BackwardShared {
  using A = OperandLoader<T, true, false>;
  using B = OperandLoader<T, kLast, true>;
  static constexpr size_t kOperands = kOperandBytes<A, B>;

  GSTO_HOST_DEVICE static int stride(int channels) {  // of the staged du: [pixel][channel] or [channel][pixel]
    return kLast ? (channels + kTileRows - 1) / kTileRows * kTileRows + 4 : kTilePixels + 4;
  }
  GSTO_HOST_DEVICE static int lines(int channels) {
    return kLast ? kTilePixels : (channels + kTileRows - 1) / kTileRows * kTileRows;
  }
  GSTO_HOST_DEVICE static size_t staged(int channels) {
    return static_cast<size_t>(stride(channels)) * lines(channels);
  }
  static size_t bytes(int channels, bool gate) {  // without the gate one row tile at a time is staged
    const size_t floats = gate ? staged(channels) + kGateScratch + channels + 1 : staged(kTileRows);
    return kOperands + floats * sizeof(float);
  }
};

// du in shared memory, as gate_backward_tile() asks for it: there is nothing to load.
template <class T, bool kLast>
struct StagedGradient {
  struct Nothing {};
  const float* staged;
  int stride;

  GSTO_DEVICE Nothing load(int, int, int) const { return {}; }
  GSTO_DEVICE void get(Nothing, int pixel, int channel, int, float (&du)[kVector<T>]) const {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j)
      du[j] = staged[kLast ? pixel * stride + channel + j : channel * stride + pixel + j];
  }
};

template <class T, bool kLast, Float32Product kProduct>
GSTO_KERNEL(kThreads, kProductBlocks)
project_backward(const ProjectBackwardParams p) {
  using Shared = BackwardShared<T, kLast>;
  char* memory = shared_memory();
  float* staged = reinterpret_cast<float*>(memory + Shared::kOperands);
  const bool has_gate = p.input != nullptr;
  const int stride = Shared::stride(has_gate ? p.channels : kTileRows);
  float* scratch = staged + Shared::staged(p.channels);
  float* totals = scratch + kGateScratch;
  const int tid = static_cast<int>(threadIdx.x);
  if (has_gate) {
    for (int c = tid; c <= p.channels; c += kThreads) totals[c] = 0;
  }

  const Feature<T> w = feature_of<T, true>(p.weight, 0, p.out_channels, p.channels);
  const int64_t tiles = (p.pixels + kTilePixels - 1) / kTilePixels;
  const int row_tiles = (p.channels + kTileRows - 1) / kTileRows;
  const int first = static_cast<int>(blockIdx.y) * p.row_tiles_per_block;
  const int last = first + p.row_tiles_per_block < row_tiles ? first + p.row_tiles_per_block : row_tiles;
  const bool whole = vectorizable<T>(p.grad_input, kLast ? p.channels : p.pixels);
  for (int64_t tile = blockIdx.x; tile < tiles * p.batch; tile += gridDim.x) {
    const int64_t image = tile / tiles, pixel0 = tile % tiles * kTilePixels;
    const Feature<T> dz = feature_of<T, kLast>(p.gradient, image, p.pixels, p.out_channels).shifted(pixel0);
    for (int row_tile = first; row_tile < last; ++row_tile) {
      const int row0 = row_tile * kTileRows;
      Accumulators acc;
      acc.clear();
      multiply<T, kProduct, typename Shared::A, typename Shared::B>(w, row0, dz, 0, p.out_channels, memory, acc,
                                                                    [](int, const T*, const T*) {});
      const int base = has_gate ? row0 : 0;
      acc.each([&](int row, int col, float value) {
        staged[kLast ? col * stride + base + row : (base + row) * stride + col] = value;
      });
      sync_threads();
      if (has_gate) continue;
      constexpr int kUnits = kTileRows / kVector<T>;
      for (int unit = tid; unit < kUnits * kTilePixels; unit += kThreads) {
        const int line = unit / kUnits, along = unit % kUnits * kVector<T>;
        const int c = row0 + (kLast ? along : line);
        const int64_t pixel = pixel0 + (kLast ? line : along);
        if (c >= p.channels || pixel >= p.pixels) continue;
        const int64_t left = kLast ? p.channels - c : p.pixels - pixel;
        float values[kVector<T>];
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) values[j] = staged[line * stride + along + j];
        T* to = static_cast<T*>(p.grad_input) + offset_of<kLast>(image, p.channels, p.pixels, c, pixel);
        store_unit(to, left < kVector<T> ? static_cast<int>(left) : kVector<T>, whole, values);
      }
    }
    if (!has_gate) continue;
    // 64 pixels in a row, wherever the image's rows end.
    PixelTile pixels(Tiling{1, static_cast<int>(p.pixels), 1, kTilePixels}, tile);
    const GateBackwardOperands operands = {p.input, p.gate, p.gate_weight, p.grad_gate, false, p.grad_input};
    const StagedGradient<T, kLast> du = {staged, stride};
    with_access(gate_backward_whole<T, kLast>(operands, p.channels, pixels.width), [&](auto whole) {
      gate_backward_tile<T, kLast>(operands, pixels, p.channels, scratch, totals, whole, du);
    });
  }
  if (has_gate) {
    sync_threads();
    for (int c = tid; c <= p.channels; c += kThreads)
      p.sums[static_cast<int64_t>(blockIdx.x) * (p.channels + 1) + c] = totals[c];
  }
}

}  // namespace

cudaError_t launch_project_backward(const ProjectBackwardParams& params, cudaStream_t stream) {
  const bool gate = params.input != nullptr;
  const int row_tiles = (params.channels + kTileRows - 1) / kTileRows;
  const int groups = gate ? 1 : (row_tiles + params.row_tiles_per_block - 1) / params.row_tiles_per_block;
  return dispatch_product(params.format, [&](auto type, auto last, auto product) {
    return launch(project_backward<decltype(type), last.value, product.value>,
                  dim3(static_cast<unsigned>(params.blocks), static_cast<unsigned>(groups)), kThreads,
                  BackwardShared<decltype(type), last.value>::bytes(params.channels, gate), stream, params);
  });
}

}  // namespace gsto::cuda
