// Device helpers of all kernels: 16-byte units of feature maps, tiles of pixels, tap tables, and block-wide reductions
// in a fixed order.
//
// A unit is kVector elements that are adjacent in memory: channels of one pixel (channels_last) or pixels of one
// channel (NCHW). The 128 threads cover a tile of 64 pixels as follows. channels_last: 8 lanes hold 8 units of one
// pixel, the 16 groups of lanes hold 16 pixels at a time. NCHW: 64 / kVector lanes hold the tile's pixels, the groups
// of lanes hold different channels.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/kernels.h"

namespace gsto::cuda {

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

GSTO_DEVICE float sigmoid(float logit) {
  const float e = expf(logit < 0 ? logit : -logit);  // e <= 1: never overflows; a NaN stays one
  return (logit < 0 ? e : 1.f) / (1.f + e);
}

// Whether whole units of the map can be moved with 16-byte accesses; `row` is the count of adjacent elements after
// which the next row starts.
template <class T>
GSTO_DEVICE bool vectorizable(const void* data, int64_t row) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row % kVector<T> == 0;
}

template <class T>
GSTO_DEVICE Vec16 load_vector(const T* from, int count, bool whole) {
  if (whole && count >= kVector<T>) return *aligned(reinterpret_cast<const Vec16*>(from));
  union {
    Vec16 vector;
    T elements[kVector<T>];
  } u;
  u.vector = Vec16{{0, 0, 0, 0}};
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j)
    if (j < count) u.elements[j] = from[j];
  return u.vector;
}

// Bits of 16-bit elements are taken from words with shifts: no array is indexed in memory.
template <class T>
GSTO_DEVICE void unpack(const Vec16& v, float (&to)[kVector<T>]) {
  if constexpr (sizeof(T) == 4) {
    union {
      uint32_t bits;
      float value;
    } u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u.bits = v.words[j];
      to[j] = u.value;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      T element;
      element.bits = static_cast<uint16_t>(v.words[j / 2] >> 16 * (j % 2));
      to[j] = to_float(element);
    }
  }
}

template <class T>
GSTO_DEVICE Vec16 pack(const float (&from)[kVector<T>]) {
  Vec16 v;
  if constexpr (sizeof(T) == 4) {
    union {
      uint32_t bits;
      float value;
    } u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u.value = from[j];
      v.words[j] = u.bits;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      T low, high;
      from_float(from[2 * j], low);
      from_float(from[2 * j + 1], high);
      v.words[j] = static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
    }
  }
  return v;
}

// The same where `whole` is the same for all units of a map, and known at compile time: a plain load, which the
// compiler can move. Whole units have all their elements.
template <class T, bool kWhole>
GSTO_DEVICE Vec16 load_vector(const T* from, int count, std::bool_constant<kWhole>) {
  if constexpr (kWhole) return *aligned(reinterpret_cast<const Vec16*>(from));
  return load_vector(from, count, false);
}

template <class F>
GSTO_DEVICE void with_access(bool whole, const F& f) {
  if (whole) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// The first `count` elements of a unit, zeros behind them.
template <class T, class Whole>
GSTO_DEVICE void load_unit(const T* from, int count, Whole whole, float (&to)[kVector<T>]) {
  unpack<T>(load_vector(from, count, whole), to);
}

template <class T>
GSTO_DEVICE void store_unit(T* to, int count, bool whole, const float (&from)[kVector<T>]) {
  const Vec16 v = pack<T>(from);
  if (whole && count >= kVector<T>) {
    *aligned(reinterpret_cast<Vec16*>(to)) = v;
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j)
    if (j < count) from_float(from[j], to[j]);
}

template <class T>
GSTO_DEVICE float load_scalar(const void* from, int64_t i) {
  return to_float(static_cast<const T*>(from)[i]);
}

// One tile of one image of a map.
struct PixelTile {
  int height, width, tile_width, size;
  int h0, w0;
  int64_t image;

  GSTO_DEVICE PixelTile(const Tiling& t, int64_t index) : height(t.height), width(t.width), tile_width(t.tile_width) {
    size = t.tile_height * t.tile_width;
    const int across = (t.width + t.tile_width - 1) / t.tile_width;
    const int tiles = tiles_of(t);
    image = index / tiles;
    const int tile = static_cast<int>(index % tiles);
    h0 = tile / across * t.tile_height;
    w0 = tile % across * t.tile_width;
  }

  GSTO_DEVICE int h(int p) const { return h0 + p / tile_width; }
  GSTO_DEVICE int w(int p) const { return w0 + p % tile_width; }
  // How many of the pixels p, p + 1, ... in p's row, at most `most`, exist.
  GSTO_DEVICE int valid(int p, int most) const {
    if (p >= size || h(p) >= height) return 0;
    const int left = width - w(p);
    return left < 0 ? 0 : left < most ? left : most;
  }
  GSTO_DEVICE int64_t index(int p) const { return static_cast<int64_t>(h(p)) * width + w(p); }  // within the image
  GSTO_DEVICE int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

// How many elements of the unit at (p, channel) exist.
template <class T, bool kLast>
GSTO_DEVICE int unit_count(const PixelTile& tile, int channels, int p, int channel) {
  if (!kLast) return tile.valid(p, kVector<T>);
  return tile.valid(p, 1) == 0 ? 0 : channels - channel;
}

// Which unit a thread holds, and walks over all units of a tile.
template <class T, bool kLast, int kWidth = kVector<T>>
struct Lanes {
  static constexpr int kGroup = kLast ? 8 : kTilePixels / kWidth;  // lanes that share a pixel or a channel
  static constexpr int kGroups = kThreads / kGroup;
  static constexpr int kPasses = kLast ? kTilePixels / kGroups : 1;  // pixels per lane
  static constexpr int kChannelStep = kLast ? 8 * kWidth : kGroups;

  GSTO_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kGroup; }
  GSTO_DEVICE static int group() { return static_cast<int>(threadIdx.x) / kGroup; }
  GSTO_DEVICE static int channel(int base) { return base + (kLast ? lane() * kWidth : group()); }
  GSTO_DEVICE static int pixel(int pass) { return kLast ? pass * kGroups + group() : lane() * kWidth; }
};

// out[g * 64 + p] = sum over channels of what add(p, channel, load(p, channel), sums) adds; sums[g] has one entry per
// pixel of the unit (one with channels_last). load() of a unit that does not exist returns {}; it is apart from add()
// so that several loads are under way before the first use. `scratch` has kGates * 4 * 64 floats. All threads call it,
// and may read `out` on return.
template <class T, bool kLast, int kGates, int kWidth, class Load, class Add>
GSTO_DEVICE void sum_channels(int channels, float* scratch, float* out, const Load& load, const Add& add) {
  using L = Lanes<T, kLast, kWidth>;
  constexpr int kEntries = kLast ? 1 : kWidth;
  constexpr int kBatch = kLast ? 1 : kWidth == 1 ? 8 : 2;  // channel steps at once; channels_last has 4 passes at once
  using Loaded = decltype(load(0, 0));
  float sums[kGates][L::kPasses][kEntries] = {};
  for (int base = 0; base < channels; base += kBatch * L::kChannelStep) {
    Loaded loaded[kBatch][L::kPasses] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int channel = L::channel(base + b * L::kChannelStep);
#pragma unroll
      for (int pass = 0; pass < L::kPasses; ++pass)
        if (channel < channels) loaded[b][pass] = load(L::pixel(pass), channel);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int channel = L::channel(base + b * L::kChannelStep);
      if (channel >= channels) continue;
#pragma unroll
      for (int pass = 0; pass < L::kPasses; ++pass) {
        float unit[kGates][kEntries] = {};
        add(L::pixel(pass), channel, loaded[b][pass], unit);
#pragma unroll
        for (int g = 0; g < kGates; ++g)
#pragma unroll
          for (int j = 0; j < kEntries; ++j) sums[g][pass][j] += unit[g][j];
      }
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
#pragma unroll
    for (int pass = 0; pass < L::kPasses; ++pass) {
#pragma unroll
      for (int j = 0; j < kEntries; ++j) {
        float sum = sums[g][pass][j];
        if constexpr (kLast) {
          for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);
          if (L::lane() == 0) out[g * kTilePixels + L::pixel(pass)] = sum;
        } else {
          for (int mask = L::kGroup; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
          // The warps that hold a pixel differ with kGroup: all four, or with 64 lanes per group two.
          if (static_cast<int>(threadIdx.x) % 32 < L::kGroup)
            scratch[(g * 4 + warp) * kTilePixels + L::pixel(0) + j] = sum;
        }
      }
    }
  }
  sync_threads();
  if constexpr (!kLast) {
    for (int i = static_cast<int>(threadIdx.x); i < kGates * kTilePixels; i += kThreads) {
      const float* of = scratch + (i / kTilePixels) * 4 * kTilePixels + i % kTilePixels;
      if constexpr (L::kGroup == 64) {  // warps 0 and 2 hold pixels 0-31, warps 1 and 3 the others
        const int first = i % kTilePixels / 32;
        out[i] = of[first * kTilePixels] + of[(first + 2) * kTilePixels];
      } else {
        out[i] = of[0] + of[kTilePixels] + of[2 * kTilePixels] + of[3 * kTilePixels];
      }
    }
    sync_threads();
  }
}

// Calls f(p, channel, sums) for every unit of channels [begin, end); `sums` are kSums sums over pixels, one entry per
// channel of the unit, and totals[s * stride + channel] += their sum over the tile. `scratch` has kSums * 4 * 8 *
// kVector floats.
template <class T, bool kLast, int kSums, class F>
GSTO_DEVICE void walk_units(int begin, int end, float* scratch, float* totals, int stride, const F& f) {
  using L = Lanes<T, kLast>;
  constexpr int kEntries = kLast ? kVector<T> : 1;
  constexpr int kChunk = 8 * kVector<T>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int base = begin; base < end; base += L::kChannelStep) {
    const int channel = L::channel(base);
    float sums[kSums > 0 ? kSums : 1][kEntries] = {};
    if (channel < end) {
#pragma unroll
      for (int pass = 0; pass < L::kPasses; ++pass) f(L::pixel(pass), channel, sums);
    }
    if constexpr (kSums > 0) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int j = 0; j < kEntries; ++j) {
          float sum = sums[s][j];
          if constexpr (kLast) {
            for (int mask = 8; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
            if (static_cast<int>(threadIdx.x) % 32 < 8)
              scratch[(s * 4 + warp) * kChunk + L::lane() * kVector<T> + j] = sum;
          } else {
            for (int mask = 1; mask < L::kGroup; mask *= 2) sum += shuffle_xor(sum, mask);
            if (L::lane() == 0 && channel < end) totals[s * stride + channel] += sum;
          }
        }
      }
      if constexpr (kLast) {
        sync_threads();
        for (int i = static_cast<int>(threadIdx.x); i < kSums * kChunk; i += kThreads) {
          const int s = i / kChunk, c = base + i % kChunk;
          const float* of = scratch + s * 4 * kChunk + i % kChunk;
          if (c < end) totals[s * stride + c] += of[0] + of[kChunk] + of[2 * kChunk] + of[3 * kChunk];
        }
        sync_threads();
      }
    }
  }
}

// Tap tables of a tile's rows and columns, in shared memory: start, count and weights of every row and every column.
struct TapTable {
  int* start;
  int* count;
  float* weights;
  int taps;

  GSTO_HOST_DEVICE static size_t words(int size, int taps) { return static_cast<size_t>(size) * (2 + taps); }

  GSTO_DEVICE TapTable(float* memory, int size, int taps_) : taps(taps_) {
    start = reinterpret_cast<int*>(memory);
    count = start + size;
    weights = memory + 2 * size;
  }

  // Entry `i` for position `at` of the output axis, or, transposed, of the input axis.
  GSTO_DEVICE void fill(int i, const Axis& axis, bool transposed, int at) const {
    if (at >= (transposed ? axis.in : axis.out)) {
      start[i] = count[i] = 0;
      return;
    }
    if (!transposed) {
      const Taps<float> t = taps_of(axis, at);
      start[i] = t.start;
      count[i] = t.count;
      for (int j = 0; j < t.count; ++j) weights[i * taps + j] = j == 0 ? t.first : t.rest;
      return;
    }
    int begin, end;
    readers_of(axis, at, begin, end);
    start[i] = begin;
    count[i] = end - begin;
    for (int o = begin; o < end; ++o) weights[i * taps + o - begin] = taps_of(axis, o).weight(at);
  }
};

// A position of an axis with one or two taps, as two: one tap counts as two halves of the same input, which is exact.
struct TwoTaps {
  int first, second;
  float first_weight, second_weight;

  GSTO_DEVICE TwoTaps(const TapTable& table, int i) {
    const bool two = table.count[i] == 2;
    first = table.start[i];
    second = first + (two ? 1 : 0);
    first_weight = two ? table.weights[i * table.taps] : 0.5f;
    second_weight = two ? table.weights[i * table.taps + 1] : 0.5f;
  }
};

struct TileTaps {
  TapTable rows, cols;
  int tile_height, tile_width;

  GSTO_HOST_DEVICE static size_t words(const Tiling& t, int row_taps, int col_taps) {
    return TapTable::words(t.tile_height, row_taps) + TapTable::words(t.tile_width, col_taps);
  }

  GSTO_DEVICE TileTaps(float* memory, const Tiling& t, int row_taps, int col_taps)
      : rows(memory, t.tile_height, row_taps),
        cols(memory + TapTable::words(t.tile_height, row_taps), t.tile_width, col_taps),
        tile_height(t.tile_height),
        tile_width(t.tile_width) {}

  // All threads call it; the caller synchronises.
  GSTO_DEVICE void fill(const Axis& row_axis, const Axis& col_axis, bool transposed, const PixelTile& tile) const {
    for (int i = static_cast<int>(threadIdx.x); i < tile_height + tile_width; i += kThreads) {
      if (i < tile_height) {
        rows.fill(i, row_axis, transposed, tile.h0 + i);
      } else {
        cols.fill(i - tile_height, col_axis, transposed, tile.w0 + i - tile_height);
      }
    }
  }

  // Calls f(source row, source column, weight) for the taps of pixel p. kBatch calls are unrolled for their loads to
  // overlap.
  template <int kBatch = 1, class F>
  GSTO_DEVICE void each(int p, const F& f) const {
    const int r = p / tile_width, c = p % tile_width;
    const int row_start = rows.start[r], row_count = rows.count[r], col_start = cols.start[c],
              col_count = cols.count[c];
    for (int i = 0; i < row_count; ++i) {
      const float row_weight = rows.weights[r * rows.taps + i];
#pragma unroll kBatch
      for (int j = 0; j < col_count; ++j) f(row_start + i, col_start + j, row_weight * cols.weights[c * cols.taps + j]);
    }
  }
};

// Calls f(T{}, std::bool_constant<kLast>{}) for the call's dtype and layout.
template <class F>
cudaError_t dispatch(const Format& format, const F& f) {
  switch (format.dtype) {
    case ScalarType::kFloat32:
      return format.channels_last ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
    case ScalarType::kBFloat16:
      return format.channels_last ? f(BFloat16{}, std::true_type{}) : f(BFloat16{}, std::false_type{});
    case ScalarType::kFloat16:
      return format.channels_last ? f(Float16{}, std::true_type{}) : f(Float16{}, std::false_type{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace gsto::cuda
