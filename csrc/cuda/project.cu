// z = act(W (g x) + bias) and the gate, with the statistics of z in the epilogue: see ProjectParams.
//
// The gate is one number per pixel, so W (g x) = g (W x): it is applied to the accumulators. Its logit is summed in
// float32 from the same staged tiles of x, whatever the product's precision is. Traffic per pixel and image: C + C'
// elements and the gate.
#include "cuda/product.h"

namespace gsto::cuda {
namespace {

constexpr int kStagedStride = kTilePixels + 4;  // float4 rows, shifted by 4 banks each

template <class T, bool kLast>
struct ProjectShared {
  using A = OperandLoader<T, true, true>;
  using B = OperandLoader<T, kLast, true>;
  static constexpr size_t kOperands = kOperandBytes<A, B>;
  static constexpr size_t kStaged = kTileRows * kStagedStride * sizeof(float);
  static constexpr size_t kUnion = kOperands > kStaged ? kOperands : kStaged;
  static constexpr size_t kFixed = kUnion + kTilePixels * sizeof(float);

  static size_t bytes(int channels) { return kFixed + static_cast<size_t>(channels) * sizeof(float); }
};

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

    // Staged as the output wants it: pixels adjacent, or channels adjacent.
    acc.each([&](int row, int col, float value) {
      if (p.bias != nullptr || p.relu || p.statistics != nullptr) {
        const int m = row0 + row;
        value *= gates[col];
        if (p.bias != nullptr && m < p.out_channels) value += load_scalar<T>(p.bias, m);
        if (p.relu && value < 0) value = 0;
        if (p.statistics != nullptr) {  // of the values that are stored
          T rounded;
          from_float(value, rounded);
          value = to_float(rounded);
        }
      } else {
        value *= gates[col];
      }
      staged[kLast ? col * kStagedStride + row : row * kStagedStride + col] = value;
    });
    sync_threads();
    constexpr int kUnits = kTileRows / kVector<T>;
    for (int unit = tid; unit < kUnits * kTilePixels; unit += kThreads) {
      const int line = unit / kUnits, along = unit % kUnits * kVector<T>;
      const int m = row0 + (kLast ? along : line), pixel = kLast ? line : along;
      if (m >= p.out_channels || pixel >= pixels) continue;
      const int count = kLast ? p.out_channels - m : pixels - pixel;
      float values[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) values[j] = staged[line * kStagedStride + along + j];
      T* to = static_cast<T*>(p.output) + offset_of<T, kLast>(image, p.out_channels, p.pixels, m, pixel0 + pixel);
      store_unit(to, count, whole, values);
    }
    if (p.statistics != nullptr) {  // two threads per channel, each with every other pixel
      const int row = tid / 2, half = tid % 2, m = row0 + row;
      const auto value = [&](int pixel) {
        return staged[kLast ? pixel * kStagedStride + row : row * kStagedStride + pixel];
      };
      float mean = 0, squares = 0;
      for (int pixel = half; pixel < pixels; pixel += 2) mean += value(pixel);
      mean = (mean + shuffle_xor(mean, 1)) / static_cast<float>(pixels);
      for (int pixel = half; pixel < pixels; pixel += 2) squares += (value(pixel) - mean) * (value(pixel) - mean);
      squares += shuffle_xor(squares, 1);
      if (half == 0 && m < p.out_channels) {
        const int64_t all = tiles * p.batch;
        p.statistics[m * all + blockIdx.x] = mean;
        p.statistics[(p.out_channels + m) * all + blockIdx.x] = squares;
      }
    }
    sync_threads();
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
