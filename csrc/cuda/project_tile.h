// One tile of W (g x), 64 output channels x 64 pixels, from the accumulators to the map, with its statistics.
#pragma once

#include "cuda/product.h"

namespace gsto::cuda {

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

struct ProductTile {
  void* output;
  int out_channels;
  int64_t map_pixels, image, pixel0;  // per image; of the tile
  int pixels, row0;                   // that exist, and the first channel
  bool whole;                         // see load_vector
  const void* bias = nullptr;
  bool relu = false;
  bool statistics = false;
};

// output = act(gate * acc + bias). With statistics, store(channel, mean, sum of squared differences) is called per
// channel of the tile. All threads call it; `staged` may be used again on return.
template <class T, bool kLast, class Store>
GSTO_DEVICE void finish_tile(const Accumulators& acc, const float* gates, float* staged, const ProductTile& t,
                             const Store& store) {
  const int tid = static_cast<int>(threadIdx.x);
  // Staged as the output wants it: pixels adjacent, or channels adjacent.
  acc.each([&](int row, int col, float value) {
    if (t.bias != nullptr || t.relu || t.statistics) {
      const int m = t.row0 + row;
      value *= gates[col];
      if (t.bias != nullptr && m < t.out_channels) value += load_scalar<T>(t.bias, m);
      if (t.relu && value < 0) value = 0;
      if (t.statistics) {  // of the values that are stored
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
    const int m = t.row0 + (kLast ? along : line), pixel = kLast ? line : along;
    if (m >= t.out_channels || pixel >= t.pixels) continue;
    const int count = kLast ? t.out_channels - m : t.pixels - pixel;
    float values[kVector<T>];
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) values[j] = staged[line * kStagedStride + along + j];
    T* to = static_cast<T*>(t.output) + offset_of<kLast>(t.image, t.out_channels, t.map_pixels, m, t.pixel0 + pixel);
    store_unit(to, count, t.whole, values);
  }
  if (t.statistics) {  // two threads per channel, each with every other pixel
    const int row = tid / 2, half = tid % 2, m = t.row0 + row;
    const auto value = [&](int pixel) {
      return staged[kLast ? pixel * kStagedStride + row : row * kStagedStride + pixel];
    };
    float mean = 0, squares = 0;
    for (int pixel = half; pixel < t.pixels; pixel += 2) mean += value(pixel);
    mean = (mean + shuffle_xor(mean, 1)) / static_cast<float>(t.pixels);
    for (int pixel = half; pixel < t.pixels; pixel += 2) squares += (value(pixel) - mean) * (value(pixel) - mean);
    squares += shuffle_xor(squares, 1);
    if (half == 0 && m < t.out_channels) store(m, mean, squares);
  }
  sync_threads();
}

}  // namespace gsto::cuda
