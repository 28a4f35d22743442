// z = act(W (g x) + bias) and the gate, with the statistics of z in the epilogue: see ProjectParams.
//
// The gate is one number per pixel, so W (g x) = g (W x): it is applied to the accumulators. Its logit is summed in
// float32 from the same staged tiles of x, whatever the product's precision is. Traffic per pixel and image: C + C'
// elements and the gate.
#include "cuda/project_tile.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast, Float32Product kProduct>
GSTO_KERNEL(kThreads, kProductBlocks)
project(const ProjectParams p) {
  using Shared = ProjectShared<T, kLast>;
  char* memory = shared_memory();
  float* staged = reinterpret_cast<float*>(memory);
  float* gates = reinterpret_cast<float*>(memory + Shared::kUnion);
  float* gate_weight = gates + kTilePixels;

  const int tid = static_cast<int>(threadIdx.x);
  const int64_t tiles = (p.pixels + kTilePixels - 1) / kTilePixels;
  const int64_t image = blockIdx.x / tiles, pixel0 = blockIdx.x % tiles * kTilePixels;
  const int64_t left = p.pixels - pixel0;
  const int pixels = left < kTilePixels ? static_cast<int>(left) : kTilePixels;
  const bool makes_gate = p.gate_weight != nullptr;
  if (makes_gate) {
    for (int c = tid; c < p.channels; c += kThreads) gate_weight[c] = load_scalar<T>(p.gate_weight, c);
  } else if (tid < kTilePixels) {
    gates[tid] = p.gate != nullptr && tid < pixels ? load_scalar<T>(p.gate, image * p.pixels + pixel0 + tid) : 1.f;
  }

  const Feature<T> x = feature_of<T, kLast>(p.input, image, p.pixels, p.channels).shifted(pixel0);
  const Feature<T> w = feature_of<T, true>(p.weight, 0, p.out_channels, p.channels);
  const int row_tiles = p.output == nullptr ? 1 : (p.out_channels + kTileRows - 1) / kTileRows;
  const int first = static_cast<int>(blockIdx.y) * p.row_tiles_per_block;
  const int last = first + p.row_tiles_per_block < row_tiles ? first + p.row_tiles_per_block : row_tiles;
  const bool whole = p.output != nullptr && vectorizable<T>(p.output, kLast ? p.out_channels : p.pixels);
  for (int tile = first; tile < last; ++tile) {
    const int row0 = tile * kTileRows;
    Accumulators acc;
    acc.clear();
    float logit = 0;  // two threads per pixel, each with half of the channels of a step
    multiply<T, kProduct, typename Shared::A, typename Shared::B>(
        w, row0, x, 0, p.channels, memory, acc, [&](int k0, const T*, const T* b) {
          if (!makes_gate || tile != first) return;
          const int begin = tid % 2 * (kTileK<T> / 2);
          const int channels = p.channels - k0 - begin;
#pragma unroll 4
          for (int k = 0; k < kTileK<T> / 2; ++k)
            if (k < channels)
              logit += gate_weight[k0 + begin + k] * to_float(b[Shared::B::Tile::at(tid / 2, begin + k)]);
        });
    if (makes_gate && tile == first) {
      logit += shuffle_xor(logit, 1);
      if (tid % 2 == 0) {
        const float gate = sigmoid(logit + (p.gate_bias != nullptr ? load_scalar<T>(p.gate_bias, 0) : 0.f));
        gates[tid / 2] = gate;
        if (blockIdx.y == 0 && tid / 2 < pixels)
          from_float(gate, static_cast<T*>(p.gate)[image * p.pixels + pixel0 + tid / 2]);
      }
      sync_threads();
    }
    if (p.output == nullptr) return;

    ProductTile to = {p.output, p.out_channels, p.pixels, image, pixel0, pixels, row0, whole};
    to.bias = p.bias;
    to.relu = p.relu;
    to.statistics = p.statistics != nullptr;
    finish_tile<T, kLast>(acc, gates, staged, to, [&](int m, float mean, float squares) {
      const int64_t all = tiles * p.batch;
      p.statistics[m * all + blockIdx.x] = mean;
      p.statistics[(p.out_channels + m) * all + blockIdx.x] = squares;
    });
  }
}

}  // namespace

cudaError_t launch_project(const ProjectParams& params, cudaStream_t stream) {
  const int row_tiles = params.output == nullptr ? 1 : (params.out_channels + kTileRows - 1) / kTileRows;
  const unsigned groups =
      static_cast<unsigned>((row_tiles + params.row_tiles_per_block - 1) / params.row_tiles_per_block);
  const unsigned tiles = static_cast<unsigned>((params.pixels + kTilePixels - 1) / kTilePixels * params.batch);
  return dispatch_product(params.format, [&](auto type, auto last, auto product) {
    using Shared = ProjectShared<decltype(type), last.value>;
    return launch(project<decltype(type), last.value, product.value>, dim3(tiles, groups), kThreads,
                  Shared::bytes(params.channels), stream, params);
  });
}

}  // namespace gsto::cuda
