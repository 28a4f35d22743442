// K gates and K pooled maps from one reading of x, and their backward: see Pyramid, PyramidParams.
// Traffic, forward: x once from DRAM (a second time from L1/L2, step_pixels at a time), K gates, and the tiles' sums, K
// C floats per tile, written and read. Backward: x twice per four levels, the first time from DRAM and then from L2 (64
// pixels of 2048 bfloat16 channels are 256 KiB), and dx once; the gradients of the pooled maps stay in L2.
#include "cuda/tile.h"

namespace gsto::cuda {
namespace {

constexpr int kGates = 4;  // levels per reading of x

GSTO_HOST_DEVICE int padded_levels(int levels) { return (levels + kGates - 1) / kGates * kGates; }

struct PyramidTile {
  int64_t image;
  int h0, h1, w0, w1;

  GSTO_DEVICE PyramidTile(const Pyramid& pyramid, int64_t index) {
    const int col = static_cast<int>(index % pyramid.col_cuts);
    index /= pyramid.col_cuts;
    const int band = static_cast<int>(index % pyramid.bands);
    index /= pyramid.bands;
    const int row = static_cast<int>(index % pyramid.row_cuts);
    image = index / pyramid.row_cuts;
    const int height = pyramid.rows[row + 1] - pyramid.rows[row];
    h0 = pyramid.rows[row] + height * band / pyramid.bands;
    h1 = pyramid.rows[row] + height * (band + 1) / pyramid.bands;
    w0 = pyramid.cols[col];
    w1 = pyramid.cols[col + 1];
  }
};

template <class T, bool kLast>
GSTO_KERNEL(kThreads, 4)
pyramid_sums(const PyramidParams p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float* logits = scratch + kGates * 4 * kTilePixels;
  float* gates = logits + kGates * kTilePixels;  // (levels, 64)
  float* totals = gates + p.pyramid.levels * kTilePixels;
  const int tid = static_cast<int>(threadIdx.x), levels = p.pyramid.levels;
  for (int i = tid; i < levels * p.channels; i += kThreads) totals[i] = 0;

  const PyramidTile tile(p.pyramid, blockIdx.x);
  const int width = tile.w1 - tile.w0, size = (tile.h1 - tile.h0) * width;
  const int64_t pixels = static_cast<int64_t>(p.height) * p.width;
  const T* input = static_cast<const T*>(p.input);
  const bool whole = kLast && vectorizable<T>(p.input, p.channels);
  const auto pixel_of = [&](int q) {
    return static_cast<int64_t>(tile.h0 + q / width) * p.width + tile.w0 + q % width;
  };
  constexpr int kWidth = kLast ? kVector<T> : 1;
  for (int base = 0; base < size; base += p.pyramid.step_pixels) {
    const int count = size - base < p.pyramid.step_pixels ? size - base : p.pyramid.step_pixels;
    for (int level0 = 0; level0 < levels; level0 += kGates) {
      sync_threads();
      with_access(whole, [&](auto access) {
        sum_channels<T, kLast, kGates, kWidth>(
            p.channels, scratch, logits,
            [&](int q, int channel) {
              using Loaded = std::conditional_t<kLast, Vec16, T>;
              Loaded loaded = {};
              if (q < count) {
                const T* from = input + offset_of<kLast>(tile.image, p.channels, pixels, channel, pixel_of(base + q));
                if constexpr (kLast) {
                  loaded = load_vector(from, p.channels - channel, access);
                } else {
                  loaded = *from;
                }
              }
              return loaded;
            },
            [&](int, int channel, const auto& loaded, float (&sums)[kGates][1]) {
              float x[kLast ? kVector<T> : 1];
              if constexpr (kLast) {
                unpack<T>(loaded, x);
              } else {
                x[0] = to_float(loaded);
              }
#pragma unroll
              for (int g = 0; g < kGates; ++g) {
                if (level0 + g >= levels) continue;
                const int64_t row = static_cast<int64_t>(level0 + g) * p.channels + channel;
#pragma unroll
                for (int j = 0; j < kWidth; ++j)
                  if (access.value || channel + j < p.channels)
                    sums[g][0] += x[j] * load_scalar<T>(p.gate_weight, row + j);
              }
            });
      });
      for (int i = tid; i < kGates * kTilePixels; i += kThreads) {
        const int level = level0 + i / kTilePixels, q = i % kTilePixels;
        if (level >= levels || q >= count) continue;
        const float gate = sigmoid(logits[i] + (p.gate_bias != nullptr ? load_scalar<T>(p.gate_bias, level) : 0.f));
        gates[level * kTilePixels + q] = gate;
        from_float(gate, static_cast<T*>(p.gate)[(tile.image * levels + level) * pixels + pixel_of(base + q)]);
      }
    }
    sync_threads();
    // Channels_last: a thread holds one unit of channels and every pixel. NCHW: the 8 lanes of a channel share the
    // pixels.
    constexpr int kLanes = kLast ? 1 : 8;
    const int lane = tid % kLanes;
    for (int first = 0; first < p.channels; first += kThreads / kLanes * kWidth) {
      const int channel = first + tid / kLanes * kWidth;
      for (int level0 = 0; level0 < levels; level0 += kGates) {
        float sums[kGates][kWidth] = {};
        for (int q = lane; q < count && channel < p.channels; q += kLanes) {
          float x[kVector<T>];
          const T* from = input + offset_of<kLast>(tile.image, p.channels, pixels, channel, pixel_of(base + q));
          load_unit(from, kLast ? p.channels - channel : 1, whole, x);
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
            if (level0 + g >= levels) continue;
            const float gate = gates[(level0 + g) * kTilePixels + q];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) sums[g][j] += gate * x[j];
          }
        }
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            for (int mask = 1; mask < kLanes; mask *= 2) sums[g][j] += shuffle_xor(sums[g][j], mask);
            if (lane == 0 && channel + j < p.channels && level0 + g < levels)
              totals[(level0 + g) * p.channels + channel + j] += sums[g][j];
          }
        }
      }
    }
    sync_threads();
  }
  for (int i = tid; i < levels * p.channels; i += kThreads)
    p.sums[static_cast<int64_t>(blockIdx.x) * levels * p.channels + i] = totals[i];
}

GSTO_DEVICE int cut_at(const int* cuts, int position) {
  int i = 0;
  while (cuts[i] < position) ++i;
  return i;
}

// The window of one bin of all levels, as pixels and as cells.
struct Window {
  int level, h0, h1, w0, w1;

  GSTO_DEVICE Window(const Pyramid& pyramid, int height, int width, int bin) : level(0) {
    while (bin >= pyramid.bins_h[level] * pyramid.bins_w[level]) {
      bin -= pyramid.bins_h[level] * pyramid.bins_w[level];
      ++level;
    }
    const int64_t rows = pyramid.bins_h[level], cols = pyramid.bins_w[level], row = bin / cols, col = bin % cols;
    h0 = static_cast<int>(window_begin(row, rows, height));
    h1 = static_cast<int>(window_end(row, rows, height));
    w0 = static_cast<int>(window_begin(col, cols, width));
    w1 = static_cast<int>(window_end(col, cols, width));
  }
  GSTO_DEVICE float pixels() const { return static_cast<float>((h1 - h0) * (w1 - w0)); }
};

template <class T>
GSTO_KERNEL(kThreads, 4)
pyramid_finish(const PyramidParams p) {
  const Window window(p.pyramid, p.height, p.width, static_cast<int>(blockIdx.x));
  const int row0 = cut_at(p.pyramid.rows, window.h0), row1 = cut_at(p.pyramid.rows, window.h1);
  const int col0 = cut_at(p.pyramid.cols, window.w0), col1 = cut_at(p.pyramid.cols, window.w1);
  const int64_t image = blockIdx.y, bands = p.pyramid.bands, cols = p.pyramid.col_cuts;
  const int channel = static_cast<int>(blockIdx.z * kThreads + threadIdx.x);
  if (channel >= p.channels) return;
  float sum = 0;
  for (int64_t band = row0 * bands; band < row1 * bands; ++band) {
    for (int col = col0; col < col1; ++col) {
      const int64_t tile = (image * p.pyramid.row_cuts * bands + band) * cols + col;
      sum += p.sums[(tile * p.pyramid.levels + window.level) * p.channels + channel];
    }
  }
  const int64_t bins = p.pyramid.total_bins, bin = blockIdx.x;
  const int64_t to = p.pooled_channels_last ? (image * bins + bin) * p.channels + channel
                                            : (image * p.channels + channel) * bins + bin;
  from_float(sum / window.pixels(), static_cast<T*>(p.pooled)[to]);
}

template <class T>
GSTO_KERNEL(kThreads, 4)
pyramid_scale(const PyramidBackwardParams p) {
  const Window window(p.pyramid, p.height, p.width, static_cast<int>(blockIdx.x));
  const int64_t image = blockIdx.y, bins = p.pyramid.total_bins, bin = blockIdx.x;
  const int channel = static_cast<int>(blockIdx.z * kThreads + threadIdx.x);
  if (channel >= p.channels) return;
  p.scaled[(image * bins + bin) * p.channels + channel] =
      load_scalar<T>(p.grad_pooled, (image * p.channels + channel) * bins + bin) / window.pixels();
}

// The bins of a level that hold a pixel.
struct Bins {
  int first, row0, row1, col0, col1, cols;
};

template <class T, bool kLast>
GSTO_KERNEL(kThreads, kResident)
pyramid_backward(const PyramidBackwardParams p) {
  const int tid = static_cast<int>(threadIdx.x), levels = p.pyramid.levels;
  const int padded = padded_levels(levels);
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float* dots = scratch + kGates * 4 * kTilePixels;
  float* gates = dots + kGates * kTilePixels;
  float* dlogits = gates + levels * kTilePixels;
  float* totals = dlogits + levels * kTilePixels;  // (padded levels, C)
  float* bias_totals = totals + padded * p.channels;
  Bins* bins = reinterpret_cast<Bins*>(bias_totals + levels);
  for (int i = tid; i < padded * p.channels + levels; i += kThreads) totals[i] = 0;

  const T* input = static_cast<const T*>(p.input);
  T* grad_input = static_cast<T*>(p.grad_input);
  const Tiling tiling = {1, p.height * p.width, 1, kTilePixels};
  const int64_t pixels = tiling.width, row = kLast ? p.channels : pixels;
  const bool whole = vectorizable<T>(p.input, row) && vectorizable<T>(p.grad_input, row);
  const int64_t tiles = p.batch * tiles_of(tiling);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const PixelTile tile(tiling, index);
    sync_threads();
    for (int i = tid; i < levels * kTilePixels; i += kThreads) {
      const int level = i / kTilePixels, pixel = i % kTilePixels;
      if (tile.valid(pixel, 1) == 0) continue;
      Bins b;
      b.first = 0;
      for (int k = 0; k < level; ++k) b.first += p.pyramid.bins_h[k] * p.pyramid.bins_w[k];
      b.cols = p.pyramid.bins_w[level];
      Axis axis;
      axis.mode = ResampleMode::kAvg;
      axis.in = p.height;
      axis.out = p.pyramid.bins_h[level];
      readers_of(axis, tile.w(pixel) / p.width, b.row0, b.row1);
      axis.in = p.width;
      axis.out = b.cols;
      readers_of(axis, tile.w(pixel) % p.width, b.col0, b.col1);
      bins[i] = b;
    }
    sync_threads();

    // du of one level for a unit.
    const auto add_du = [&](int level, int pixel, int channel, int count, float (&du)[kVector<T>]) {
      const float* scaled = p.scaled + tile.image * p.pyramid.total_bins * p.channels;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        du[j] = 0;
        if (j >= count) continue;
        const Bins b = bins[level * kTilePixels + pixel + (kLast ? 0 : j)];
        for (int r = b.row0; r < b.row1; ++r)
          for (int c = b.col0; c < b.col1; ++c)
            du[j] += scaled[static_cast<int64_t>(b.first + r * b.cols + c) * p.channels + channel + (kLast ? j : 0)];
      }
    };
    const auto unit_at = [&](int pixel, int channel, int& count, int64_t& offset) {
      count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
      if (count > 0) offset = offset_of<kLast>(tile.image, p.channels, pixels, channel, tile.index(pixel));
      return count > 0;
    };

    for (int level0 = 0; level0 < levels; level0 += kGates) {
      sum_channels<T, kLast, kGates, kVector<T>>(
          p.channels, scratch, dots,
          [&](int pixel, int channel) {
            int count;
            int64_t offset;
            return unit_at(pixel, channel, count, offset) ? load_vector(input + offset, count, whole) : Vec16{};
          },
          [&](int pixel, int channel, const Vec16& loaded, auto& sums) {
            const int count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
            if (count == 0) return;
            float x[kVector<T>];
            unpack<T>(loaded, x);
#pragma unroll
            for (int g = 0; g < kGates; ++g) {
              if (level0 + g >= levels) continue;
              float du[kVector<T>];
              add_du(level0 + g, pixel, channel, count, du);
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j)
                if (j < count) sums[g][kLast ? 0 : j] += x[j] * du[j];
            }
          });
      for (int i = tid; i < kGates * kTilePixels; i += kThreads) {
        const int level = level0 + i / kTilePixels, pixel = i % kTilePixels;
        if (level >= levels) continue;
        float gate = 0, dlogit = 0;
        if (tile.valid(pixel, 1) != 0) {
          const int64_t at = (tile.image * levels + level) * pixels + tile.index(pixel);
          gate = load_scalar<T>(p.gate, at);
          dlogit = (dots[i] + (p.grad_gate != nullptr ? load_scalar<T>(p.grad_gate, at) : 0.f)) * gate * (1.f - gate);
        }
        gates[level * kTilePixels + pixel] = gate;
        dlogits[level * kTilePixels + pixel] = dlogit;
      }
      sync_threads();
      static_assert(kThreads == 32 * kGates, "a warp per level");
      const int lane = tid % 32, level = level0 + tid / 32;
      float sum = 0;
      if (level < levels) sum = dlogits[level * kTilePixels + lane] + dlogits[level * kTilePixels + lane + 32];
      for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (level < levels && lane == 0) bias_totals[level] += sum;
      sync_threads();
    }
    // The second reading of x: the sums of four levels, and with the first four dx, which needs all levels.
    for (int level0 = 0; level0 < levels; level0 += kGates) {
      walk_units<T, kLast, kGates>(
          0, p.channels, scratch, totals + level0 * p.channels, p.channels, [&](int pixel, int channel, auto& sums) {
            int count;
            int64_t offset;
            if (!unit_at(pixel, channel, count, offset)) return;
            float x[kVector<T>];
            load_unit(input + offset, count, whole, x);
#pragma unroll
            for (int g = 0; g < kGates; ++g) {
              if (level0 + g >= levels) continue;
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j)
                if (j < count)
                  sums[g][kLast ? j : 0] += dlogits[(level0 + g) * kTilePixels + pixel + (kLast ? 0 : j)] * x[j];
            }
            if (level0 > 0) return;
            float dx[kVector<T>] = {};
            for (int level = 0; level < levels; ++level) {
              float du[kVector<T>];
              add_du(level, pixel, channel, count, du);
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j) {
                if (j >= count) continue;
                const int at = level * kTilePixels + pixel + (kLast ? 0 : j);
                const int64_t c = static_cast<int64_t>(level) * p.channels + channel + (kLast ? j : 0);
                dx[j] += gates[at] * du[j] + load_scalar<T>(p.gate_weight, c) * dlogits[at];
              }
            }
            store_unit(grad_input + offset, count, whole, dx);
          });
    }
  }
  sync_threads();
  float* sums = p.sums + static_cast<int64_t>(blockIdx.x) * levels * (p.channels + 1);
  for (int i = tid; i < levels * p.channels; i += kThreads) sums[i] = totals[i];
  if (tid < levels) sums[levels * p.channels + tid] = bias_totals[tid];
}

template <class P>
dim3 bins_grid(const P& params) {
  return dim3(static_cast<unsigned>(params.pyramid.total_bins), static_cast<unsigned>(params.batch),
              static_cast<unsigned>((params.channels + kThreads - 1) / kThreads));
}

}  // namespace

cudaError_t launch_pyramid(const PyramidParams& params, cudaStream_t stream) {
  const Pyramid& pyramid = params.pyramid;
  const unsigned tiles = static_cast<unsigned>(params.batch * pyramid.row_cuts * pyramid.bands * pyramid.col_cuts);
  const size_t words = kGates * 5 * kTilePixels + static_cast<size_t>(pyramid.levels) * (kTilePixels + params.channels);
  return dispatch(params.format, [&](auto type, auto last) {
    using T = decltype(type);
    const cudaError_t error =
        launch(pyramid_sums<T, last.value>, dim3(tiles), kThreads, words * sizeof(float), stream, params);
    return error != cudaSuccess ? error : launch(pyramid_finish<T>, bins_grid(params), kThreads, 0, stream, params);
  });
}

cudaError_t launch_pyramid_backward(const PyramidBackwardParams& params, cudaStream_t stream) {
  const size_t levels = static_cast<size_t>(params.pyramid.levels);
  const size_t words = 5 * kGates * kTilePixels + levels * (2 * kTilePixels + 1) +
                       static_cast<size_t>(padded_levels(params.pyramid.levels)) * params.channels;
  const size_t bytes = words * sizeof(float) + levels * kTilePixels * sizeof(Bins);
  return dispatch(params.format, [&](auto type, auto last) {
    using T = decltype(type);
    const cudaError_t error = launch(pyramid_scale<T>, bins_grid(params), kThreads, 0, stream, params);
    if (error != cudaSuccess) return error;
    return launch(pyramid_backward<T, last.value>, dim3(static_cast<unsigned>(params.blocks)), kThreads, bytes, stream,
                  params);
  });
}

}  // namespace gsto::cuda
