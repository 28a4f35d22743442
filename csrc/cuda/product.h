// A block's matrix product: 64 rows x 64 columns in float32 accumulators, over k in steps of 64 bytes, by 4 warps of 32
// x 32 each. Both operands are feature maps (or weights, which are maps with C channels per "pixel"), read as [row][k]
// with either dimension adjacent in memory. Three steps are in shared memory: two are in flight, by asynchronous
// copies, while one is computed. That keeps 16 KiB per block in flight: 48 KiB with three blocks per multiprocessor,
// where 4.2 TB/s at 700 ns ask for 22 KiB.
#pragma once

#include "cuda/tile.h"

namespace gsto::cuda {

template <class T>
constexpr int kTileK = 64 / static_cast<int>(sizeof(T));  // 64 bytes
constexpr int kStages = 3;
constexpr int kProductBlocks =
    3;  // blocks per multiprocessor: 168 registers per thread; four (128) make some of them spill

// How float32 is multiplied; 16-bit types always use the tensor cores with float32 accumulation.
enum class Float32Product { kExact, kTf32 };

// The operand in shared memory. The padding makes every access of a warp conflict-free: row strides are odd multiples
// of 16 bytes (ldmatrix), or 4 or 8 words modulo 32 (8 x 4 lanes of a float32 fragment).
template <class T, bool kKAdjacent>
struct OperandTile {
  static constexpr int kStride = kKAdjacent ? kTileK<T> + kVector<T> : kTileRows + 8;
  static constexpr int kSize = (kKAdjacent ? kTileRows : kTileK<T>)*kStride;
  static constexpr size_t kBytes = kSize * sizeof(T);

  GSTO_DEVICE static int at(int row, int k) { return kKAdjacent ? row * kStride + k : k * kStride + row; }
};

// A map of `pixels` x `channels` as the product reads it: value = data + c0 + c1 * z, times scale[pixel]. Large maps
// are shifted to the block's first pixel, after which 32-bit positions do.
template <class T>
struct Feature {
  const T* data = nullptr;
  int pixel_stride = 0, channel_stride = 1;
  int64_t pixels = 0;
  int channels = 0;
  bool whole = false;  // 16-byte accesses are legal
  const T* z = nullptr;
  const float* c0 = nullptr;
  const float* c1 = nullptr;
  const T* scale = nullptr;

  GSTO_DEVICE Feature shifted(int64_t pixel) const {
    Feature f = *this;
    f.data += pixel * pixel_stride;
    if (z != nullptr) f.z += pixel * pixel_stride;
    if (scale != nullptr) f.scale += pixel;
    f.pixels -= pixel;
    return f;
  }
};

template <class T, bool kLast>
GSTO_DEVICE Feature<T> feature_of(const void* data, int64_t image, int64_t pixels, int channels) {
  Feature<T> f;
  f.data = static_cast<const T*>(data) + image * pixels * channels;
  f.pixel_stride = kLast ? channels : 1;
  f.channel_stride = kLast ? 1 : static_cast<int>(pixels);
  f.pixels = pixels;
  f.channels = channels;
  f.whole = vectorizable<T>(data, kLast ? channels : pixels);
  return f;
}

template <class T, bool kLast>
GSTO_DEVICE Feature<T> feature_of(const Gradient& gradient, int64_t image, int64_t pixels, int channels) {
  Feature<T> f = feature_of<T, kLast>(gradient.grad, image, pixels, channels);
  if (gradient.c0 != nullptr) {
    f.z = static_cast<const T*>(gradient.z) + image * pixels * channels;
    f.c0 = gradient.c0;
    f.c1 = gradient.c1;
    f.whole = f.whole && vectorizable<T>(gradient.z, kLast ? channels : pixels);
  }
  return f;
}

// Moves one step of an operand from the map to shared memory. kChannelIsK: k counts channels and the rows are pixels;
// otherwise the other way round.
template <class T, bool kLast, bool kChannelIsK>
struct OperandLoader {
  static constexpr bool kKAdjacent = kLast == kChannelIsK;
  using Tile = OperandTile<T, kKAdjacent>;
  static constexpr int kPerLine = (kKAdjacent ? kTileK<T> : kTileRows) / kVector<T>;
  static constexpr int kVectors = kTileRows * kTileK<T> / kVector<T> / kThreads;

  // Calls f(place in the tile, pixel, channel, elements that exist) for the thread's vectors.
  template <class F>
  GSTO_DEVICE static void each(const Feature<T>& map, int row0, int k0, const F& f) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int unit = v * kThreads + static_cast<int>(threadIdx.x);
      const int line = unit / kPerLine, along = unit % kPerLine * kVector<T>;
      const int row = row0 + (kKAdjacent ? line : along), k = k0 + (kKAdjacent ? along : line);
      const int pixel = kChannelIsK ? row : k, channel = kChannelIsK ? k : row;
      const int pixels = map.pixels < 0x7fffffff ? static_cast<int>(map.pixels) : 0x7fffffff;
      const int left = kLast ? map.channels - channel : pixels - pixel;
      const bool inside = kLast ? pixel < pixels : channel < map.channels;
      const int count = !inside || left < 0 ? 0 : left < kVector<T> ? left : kVector<T>;
      f(line * Tile::kStride + along, pixel, channel, count);
    }
  }

  GSTO_DEVICE static int64_t offset(const Feature<T>& map, int pixel, int channel) {
    return static_cast<int64_t>(pixel) * map.pixel_stride + static_cast<int64_t>(channel) * map.channel_stride;
  }

  // Begins the step. Where the map's rows are not aligned, elements are copied one by one instead.
  GSTO_DEVICE static void begin(const Feature<T>& map, int row0, int k0, T* tile) {
    each(map, row0, k0, [&](int to, int pixel, int channel, int count) {
      const T* from = map.data + (count > 0 ? offset(map, pixel, channel) : 0);
      if (map.whole) {
        copy_async(tile + to, from, count * static_cast<int>(sizeof(T)));
      } else {
        *aligned(reinterpret_cast<Vec16*>(tile + to)) = load_vector(from, count, false);
      }
    });
  }

  // After the thread's copies have arrived: applies what the map asks for to the elements that this thread brought.
  GSTO_DEVICE static void finish(const Feature<T>& map, int row0, int k0, T* tile) {
    if (map.c0 == nullptr && map.scale == nullptr) return;
    each(map, row0, k0, [&](int to, int pixel, int channel, int count) {
      if (count == 0) return;
      float values[kVector<T>];
      unpack<T>(*aligned(reinterpret_cast<const Vec16*>(tile + to)), values);
      if (map.c0 != nullptr) {
        float z[kVector<T>];
        load_unit(map.z + offset(map, pixel, channel), count, map.whole, z);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          const int c = kLast ? channel + j : channel;
          if (j < count) values[j] += map.c0[c] + map.c1[c] * z[j];
        }
      }
      if (map.scale != nullptr) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j)
          if (j < count) values[j] *= to_float(map.scale[kLast ? pixel : pixel + j]);
      }
      *aligned(reinterpret_cast<Vec16*>(tile + to)) = pack<T>(values);
    });
  }
};

// A warp's 32 x 32 accumulators: [16-row tile][8-column tile][fragment], the fragment as in mma.m16n8.
struct Accumulators {
  float values[2][4][4];

  GSTO_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) values[i][j][e] = 0;
  }

  // Calls f(row, column, value) for every value of the thread.
  template <class F>
  GSTO_DEVICE void each(const F& f) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row0 = warp / 2 * 32 + lane / 4, col0 = warp % 2 * 32 + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(row0 + 16 * i + 8 * (e / 2), col0 + 8 * j + e % 2, values[i][j][e]);
  }
};

template <class T, Float32Product kProduct, bool kAKAdjacent, bool kBKAdjacent>
GSTO_DEVICE void multiply_step(const T* a, const T* b, Accumulators& acc) {
  using A = OperandTile<T, kAKAdjacent>;
  using B = OperandTile<T, kBKAdjacent>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row0 = warp / 2 * 32, col0 = warp % 2 * 32;
  if constexpr (sizeof(T) == 2) {
    const int matrix = lane / 8, within = lane % 8;
#pragma unroll
    for (int k = 0; k < kTileK<T>; k += 16) {
      uint32_t fa[2][4], fb[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // matrices of 8 x 8 in the order that the fragment wants: rows first, then k
        const int row = row0 + 16 * i + 8 * (matrix % 2), kk = k + 8 * (matrix / 2);
        load_matrices(fa[i], a + (kAKAdjacent ? A::at(row + within, kk) : A::at(row, kk + within)), !kAKAdjacent);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // two column tiles at once: k first
        const int col = col0 + 16 * j + 8 * (matrix / 2), kk = k + 8 * (matrix % 2);
        load_matrices(fb[j], b + (kBKAdjacent ? B::at(col + within, kk) : B::at(col, kk + within)), !kBKAdjacent);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t column[2] = {fb[j / 2][2 * (j % 2)], fb[j / 2][2 * (j % 2) + 1]};
          mma(acc.values[i][j], fa[i], column, T{});
        }
    }
  } else if constexpr (kProduct == Float32Product::kTf32) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kTileK<T>; k += 8) {
      uint32_t fa[2][4], fb[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) fa[i][e] = to_tf32(a[A::at(row0 + 16 * i + g + 8 * (e % 2), k + t + 4 * (e / 2))]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) fb[j][e] = to_tf32(b[B::at(col0 + 8 * j + g, k + t + 4 * e)]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_tf32(acc.values[i][j], fa[i], fb[j]);
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 4
    for (int k = 0; k < kTileK<T>; ++k) {
      float left[4], right[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = a[A::at(row0 + 8 * i + g, k)];
#pragma unroll
      for (int j = 0; j < 8; ++j) right[j] = b[B::at(col0 + 8 * (j / 2) + 2 * t + j % 2, k)];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc.values[i][j][e] += left[2 * i + e / 2] * right[2 * j + e % 2];
    }
  }
}

// The operands' shared memory: all stages of A, then all of B.
template <class LoaderA, class LoaderB>
constexpr size_t kOperandBytes = kStages * (LoaderA::Tile::kBytes + LoaderB::Tile::kBytes);

// acc += A B over k in [0, k1). Once a step's operands are in shared memory, each(k, a, b) may look at them.
template <class T, Float32Product kProduct, class LoaderA, class LoaderB, class Each>
GSTO_DEVICE void multiply(const Feature<T>& a, int a_row, const Feature<T>& b, int b_row, int k1, char* memory,
                          Accumulators& acc, const Each& each) {
  T* a_tiles = reinterpret_cast<T*>(memory);
  T* b_tiles = a_tiles + kStages * LoaderA::Tile::kSize;
  const auto begin = [&](int k, int stage) {
    if (k < k1) {
      LoaderA::begin(a, a_row, k, a_tiles + stage * LoaderA::Tile::kSize);
      LoaderB::begin(b, b_row, k, b_tiles + stage * LoaderB::Tile::kSize);
    }
    commit_copies();  // an empty group where there is nothing left, so that the count below stays right
  };
  sync_threads();  // whatever used this memory before
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) begin(stage * kTileK<T>, stage);
  int stage = 0;
  for (int k = 0; k < k1; k += kTileK<T>) {
    T* a_tile = a_tiles + stage * LoaderA::Tile::kSize;
    T* b_tile = b_tiles + stage * LoaderB::Tile::kSize;
    wait_copies<kStages - 2>();
    LoaderA::finish(a, a_row, k, a_tile);
    LoaderB::finish(b, b_row, k, b_tile);
    sync_threads();  // all see this step, and none computes the previous one, whose place is filled next
    begin(k + (kStages - 1) * kTileK<T>, (stage + kStages - 1) % kStages);
    each(k, a_tile, b_tile);
    multiply_step<T, kProduct, LoaderA::kKAdjacent, LoaderB::kKAdjacent>(a_tile, b_tile, acc);
    stage = (stage + 1) % kStages;
  }
  wait_copies<0>();
  sync_threads();
}

// dispatch() for products: float32 has two kinds.
template <class F>
cudaError_t dispatch_product(const Format& format, const F& f) {
  using Exact = std::integral_constant<Float32Product, Float32Product::kExact>;
  using Tf32 = std::integral_constant<Float32Product, Float32Product::kTf32>;
  return dispatch(format, [&](auto type, auto last) {
    if constexpr (sizeof(type) == 4) {
      if (format.tf32) return f(type, last, Tf32{});
    }
    return f(type, last, Exact{});
  });
}

}  // namespace gsto::cuda
