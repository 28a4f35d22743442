// The kernels whose gate needs no product: gate + resampling of x itself (GateResampleParams), and the gate's backward
// with du gathered on the fly (GateBackwardParams). Both read a tile of x twice, the first time for a sum over
// channels; plans keep the tile small enough for the second reading to hit L1/L2.
#include "cuda/gate_backward.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast>
GSTO_KERNEL(kThreads, 4)
gate_resample(const GateResampleParams p) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const TileTaps taps(memory, p.tiling, p.row_taps, p.col_taps);
  float* gate_weight = memory + TileTaps::words(p.tiling, p.row_taps, p.col_taps);
  float* scratch = gate_weight + p.channels;
  float* logits = scratch + 4 * kTilePixels;
  float* gates = logits + kTilePixels;
  const int tid = static_cast<int>(threadIdx.x);

  const PixelTile tile(p.tiling, blockIdx.x);
  taps.fill(p.rows, p.cols, false, tile);
  for (int c = tid; c < p.channels; c += kThreads) gate_weight[c] = load_scalar<T>(p.gate_weight, c);
  const Region rows(p.rows, tile.h0, p.tiling.tile_height), cols(p.cols, tile.w0, p.tiling.tile_width);
  const int region_width = cols.end - cols.begin, region = (rows.end - rows.begin) * region_width;
  const int64_t in_pixels = static_cast<int64_t>(p.rows.in) * p.cols.in;
  const T* input = static_cast<const T*>(p.input);
  const bool whole = kLast && vectorizable<T>(p.input, p.channels);
  const float gate_bias = p.gate_bias != nullptr ? load_scalar<T>(p.gate_bias, 0) : 0.f;
  sync_threads();

  // One lane per pixel in NCHW: the region's rows start anywhere, so units would not be aligned.
  constexpr int kWidth = kLast ? kVector<T> : 1;
  for (int base = 0; base < region; base += kTilePixels) {
    const auto pixel_of = [&](int q) {
      return static_cast<int64_t>(rows.begin + q / region_width) * p.cols.in + cols.begin + q % region_width;
    };
    with_access(whole, [&](auto access) {
      sum_channels<T, kLast, 1, kWidth>(
          p.channels, scratch, logits,
          [&](int pixel, int channel) {
            using Loaded = std::conditional_t<kLast, Vec16, T>;
            Loaded loaded = {};
            const int q = base + pixel;
            if (q < region) {
              const T* from = input + offset_of<kLast>(tile.image, p.channels, in_pixels, channel, pixel_of(q));
              if constexpr (kLast) {
                loaded = load_vector(from, p.channels - channel, access);
              } else {
                loaded = *from;
              }
            }
            return loaded;
          },
          [&](int, int channel, const auto& loaded, float (&sums)[1][1]) {
            if constexpr (kLast) {
              float x[kVector<T>];
              unpack<T>(loaded, x);
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j)
                if (access.value || channel + j < p.channels) sums[0][0] += x[j] * gate_weight[channel + j];
            } else {
              sums[0][0] += to_float(loaded) * gate_weight[channel];
            }
          });
    });
    const int q = base + tid;
    if (tid < kTilePixels && q < region) {
      const float gate = sigmoid(logits[tid] + gate_bias);
      gates[q] = gate;
      const int h = rows.begin + q / region_width, w = cols.begin + q % region_width;
      if (rows.owned_begin <= h && h < rows.owned_end && cols.owned_begin <= w && w < cols.owned_end)
        from_float(gate, static_cast<T*>(p.gate)[tile.image * in_pixels + pixel_of(q)]);
    }
    sync_threads();
  }

  T* dest = static_cast<T*>(p.dest);
  const bool dest_whole = vectorizable<T>(p.dest, kLast ? p.channels : tile.width);
  const auto gate_at = [&](int h, int w) { return gates[(h - rows.begin) * region_width + w - cols.begin]; };
  with_access(whole, [&](auto access) {
    walk_units<T, kLast, 0>(0, p.channels, nullptr, nullptr, 0, [&](int pixel, int channel, auto&) {
      const int count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
      if (count == 0) return;
      float result[kVector<T>] = {};
      if constexpr (kLast) {
        taps.each<2>(pixel, [&](int h, int w, float weight) {
          const int64_t from = tile.image * in_pixels + static_cast<int64_t>(h) * p.cols.in + w;
          const float factor = weight * gate_at(h, w);
          float x[kVector<T>];
          load_unit(input + from * p.channels + channel, count, access, x);
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) result[j] += factor * (p.relu && x[j] < 0 ? 0.f : x[j]);
        });
      } else {
        const T* plane = input + (tile.image * p.channels + channel) * in_pixels;
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          if (j >= count) continue;
          float sum = 0;
          taps.each<2>(pixel + j, [&](int h, int w, float weight) {
            const float x = to_float(plane[static_cast<int64_t>(h) * p.cols.in + w]);
            sum += weight * gate_at(h, w) * (p.relu && x < 0 ? 0.f : x);
          });
          result[j] = sum;
        }
      }
      const int64_t offset = offset_of<kLast>(tile.image, p.channels, tile.pixels(), channel, tile.index(pixel));
      store_unit(dest + offset, count, dest_whole, result);
    });
  });
}

// du = R^T source, as gate_backward_tile() asks for it. Without resampling its unit is loaded ahead.
template <class T, bool kLast>
struct GatheredGradient {
  const TileTaps& taps;
  const PixelTile& tile;
  const T* source;
  int64_t pixels;
  int width, channels;
  bool whole, identity;

  GSTO_DEVICE Vec16 load(int pixel, int channel, int count) const {
    if (!identity) return {};
    return load_vector(source + offset_of<kLast>(tile.image, channels, pixels, channel, tile.index(pixel)), count,
                       whole);
  }

  GSTO_DEVICE void get(const Vec16& loaded, int pixel, int channel, int count, float (&du)[kVector<T>]) const {
    unpack<T>(loaded, du);
    if (identity) return;
    if constexpr (kLast) {
      taps.each<2>(pixel, [&](int h, int w, float weight) {
        const int64_t from = tile.image * pixels + static_cast<int64_t>(h) * width + w;
        float v[kVector<T>];
        load_unit(source + from * channels + channel, count, whole, v);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) du[j] += weight * v[j];
      });
    } else {
      const T* plane = source + (tile.image * channels + channel) * pixels;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        if (j >= count) continue;
        float sum = 0;
        taps.each<2>(pixel + j, [&](int h, int w, float weight) {
          sum += weight * to_float(plane[static_cast<int64_t>(h) * width + w]);
        });
        du[j] = sum;
      }
    }
  }
};

template <class T, bool kLast>
GSTO_KERNEL(kThreads, 4)
gate_backward(const GateBackwardParams p) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const TileTaps taps(memory, p.tiling, p.row_taps, p.col_taps);
  float* scratch = memory + TileTaps::words(p.tiling, p.row_taps, p.col_taps);
  float* totals = scratch + kGateScratch;
  const int tid = static_cast<int>(threadIdx.x);
  for (int c = tid; c <= p.channels; c += kThreads) totals[c] = 0;

  const int64_t source_pixels = static_cast<int64_t>(p.rows.out) * p.cols.out;
  const GateBackwardOperands operands = {p.input, p.gate, p.gate_weight, p.grad_gate, p.relu, p.grad_input};
  const bool source_whole = vectorizable<T>(p.source, kLast ? p.channels : p.identity ? p.tiling.width : 1);
  const int64_t tiles = p.batch * tiles_of(p.tiling);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const PixelTile tile(p.tiling, index);
    sync_threads();
    if (!p.identity) taps.fill(p.rows, p.cols, true, tile);
    sync_threads();
    const GatheredGradient<T, kLast> du = {
        taps, tile, static_cast<const T*>(p.source), source_pixels, p.cols.out, p.channels, source_whole, p.identity};
    with_access(gate_backward_whole<T, kLast>(operands, p.channels, tile.width), [&](auto whole) {
      gate_backward_tile<T, kLast>(operands, tile, p.channels, scratch, totals, whole, du);
    });
  }
  sync_threads();
  for (int c = tid; c <= p.channels; c += kThreads)
    p.sums[static_cast<int64_t>(blockIdx.x) * (p.channels + 1) + c] = totals[c];
}

}  // namespace

cudaError_t launch_gate_resample(const GateResampleParams& params, cudaStream_t stream) {
  const unsigned tiles = static_cast<unsigned>(params.batch * tiles_of(params.tiling));
  const size_t words = TileTaps::words(params.tiling, params.row_taps, params.col_taps) +
                       static_cast<size_t>(params.channels) + 5 * kTilePixels +
                       static_cast<size_t>(params.region_pixels);
  return dispatch(params.format, [&](auto type, auto last) {
    return launch(gate_resample<decltype(type), last.value>, dim3(tiles), kThreads, words * sizeof(float), stream,
                  params);
  });
}

cudaError_t launch_gate_backward(const GateBackwardParams& params, cudaStream_t stream) {
  const size_t words = TileTaps::words(params.tiling, params.row_taps, params.col_taps) + kGateScratch +
                       static_cast<size_t>(params.channels) + 1;
  return dispatch(params.format, [&](auto type, auto last) {
    return launch(gate_backward<decltype(type), last.value>, dim3(static_cast<unsigned>(params.blocks)), kThreads,
                  words * sizeof(float), stream, params);
  });
}

}  // namespace gsto::cuda
