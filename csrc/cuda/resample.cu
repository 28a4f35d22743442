// Resampling as a gather over tap tables, forward and transposed, with the affine, the activation and their backward on
// the way: see ResampleParams. A block makes 64 results of every channel of its group. Traffic per result: 1 element
// written, the source's share read once from DRAM; the taps' overlap comes from L1/L2, which is why a channels_last
// tile is 8 x 8 (1.3 x as many bytes as without overlap when up-sampling by 2, against 2 x for a row of 64).
#include "cuda/tile.h"

namespace gsto::cuda {
namespace {

constexpr int kSums = 2;

template <class T>
constexpr int kSumScratch = kSums * 4 * 8 * kVector<T>;

// kTwoTaps: forward with at most two taps per axis (up-sampling), whose loads are all issued before the first use;
// kMapped: with a gate, an affine or an activation.
enum class Kind { kTwoTaps, kTwoTapsMapped, kForward, kForwardMapped, kTransposed };

template <class T, bool kLast, Kind kKind>
GSTO_KERNEL(kThreads, kKind == Kind::kTransposed ? 3 : 4)
resample(const ResampleParams p) {
  constexpr bool kTransposed = kKind == Kind::kTransposed;
  constexpr bool kTwo = kKind == Kind::kTwoTaps || kKind == Kind::kTwoTapsMapped;
  constexpr bool kMapped = kKind == Kind::kTwoTapsMapped || kKind == Kind::kForwardMapped;
  constexpr int kUnitChannels = kLast ? kVector<T> : 1;
  using L = Lanes<T, kLast>;
  float* memory = reinterpret_cast<float*>(shared_memory());
  const TileTaps taps(memory, p.tiling, p.row_taps, p.col_taps);
  float* scratch = memory + TileTaps::words(p.tiling, p.row_taps, p.col_taps);
  float* totals = scratch + kSumScratch<T>;
  const int tid = static_cast<int>(threadIdx.x);

  const int step = L::kChannelStep;
  const int per_group = ((p.channels + p.channel_groups - 1) / p.channel_groups + step - 1) / step * step;
  const int begin = static_cast<int>(blockIdx.y) * per_group;
  const int end = begin + per_group < p.channels ? begin + per_group : p.channels;
  const int source_width = kTransposed ? p.cols.out : p.cols.in;
  const int64_t source_pixels = static_cast<int64_t>(kTransposed ? p.rows.out : p.rows.in) * source_width;
  const T* source = static_cast<const T*>(p.source);
  const T* mask = static_cast<const T*>(p.mask);
  T* dest = static_cast<T*>(p.dest);
  const bool source_whole = vectorizable<T>(p.source, p.channels);
  const int64_t dest_row = kLast ? p.channels : p.tiling.width;
  const bool dest_whole = vectorizable<T>(p.dest, dest_row), mask_whole = vectorizable<T>(p.mask, dest_row);
  if (kTransposed && p.sums != nullptr) {
    for (int i = tid; i < kSums * per_group; i += kThreads) totals[i] = 0;
  }

  const int64_t tiles = p.batch * tiles_of(p.tiling);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const PixelTile tile(p.tiling, index);
    sync_threads();
    taps.fill(p.rows, p.cols, kTransposed, tile);
    sync_threads();

    // NCHW with two taps: a thread's pixels are the same for all of its channels, and so are their columns.
    constexpr int kColumns = kTwo && !kLast ? kVector<T> : 1;
    int first_column[kColumns] = {}, second_column[kColumns] = {};
    float first_weight[kColumns] = {}, second_weight[kColumns] = {};
    if constexpr (kTwo && !kLast) {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        if (L::pixel(0) + j >= tile.size) continue;
        const TwoTaps two(taps.cols, (L::pixel(0) + j) % tile.tile_width);
        first_column[j] = two.first;
        second_column[j] = two.second;
        first_weight[j] = two.first_weight;
        second_weight[j] = two.second_weight;
      }
    }

    // One unit of results; the sums are the last two of the kernel's comment.
    const auto unit = [&](int pixel, int channel, float (&sums)[kSums][kUnitChannels]) {
      const int count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
      if (count == 0) return;
      float scale[kUnitChannels], shift[kUnitChannels];
#pragma unroll
      for (int j = 0; j < kUnitChannels; ++j) {
        const bool given = (kMapped || kTransposed) && p.scale != nullptr && channel + j < p.channels;
        scale[j] = given ? p.scale[channel + j] : 1.f;
        shift[j] = given ? p.shift[channel + j] : 0.f;
      }
      const auto value_of = [&](float v, int j, float gate) {
        if constexpr (!kMapped) return v;
        v = scale[kLast ? j : 0] * (gate * v) + shift[kLast ? j : 0];
        return p.relu && v < 0 ? 0.f : v;
      };
      const auto gate_at = [&](int64_t source_pixel) {
        return kMapped && p.gate != nullptr ? load_scalar<T>(p.gate, tile.image * source_pixels + source_pixel) : 1.f;
      };
      float result[kVector<T>] = {};
      if constexpr (kTwo) {
        const TwoTaps row(taps.rows, pixel / tile.tile_width);
        const int64_t rows[2] = {static_cast<int64_t>(row.first) * source_width,
                                 static_cast<int64_t>(row.second) * source_width};
        const float row_weights[2] = {row.first_weight, row.second_weight};
        if constexpr (kLast) {
          const TwoTaps col(taps.cols, pixel % tile.tile_width);
          const int64_t from[4] = {rows[0] + col.first, rows[0] + col.second, rows[1] + col.first,
                                   rows[1] + col.second};
          const float col_weights[2] = {col.first_weight, col.second_weight};
          Vec16 v[4];
#pragma unroll
          for (int t = 0; t < 4; ++t)
            v[t] = load_vector(source + (tile.image * source_pixels + from[t]) * p.channels + channel, count,
                               source_whole);
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const float weight = row_weights[t / 2] * col_weights[t % 2], gate = gate_at(from[t]);
            float x[kVector<T>];
            unpack<T>(v[t], x);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) result[j] += weight * value_of(x[j], j, gate);
          }
        } else {
          const T* plane = source + (tile.image * p.channels + channel) * source_pixels;
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) {
            if (j >= count) continue;
#pragma unroll
            for (int t = 0; t < 4; ++t) {
              const int64_t from = rows[t / 2] + (t % 2 == 0 ? first_column[j] : second_column[j]);
              const float weight = row_weights[t / 2] * (t % 2 == 0 ? first_weight[j] : second_weight[j]);
              result[j] += weight * value_of(to_float(plane[from]), j, gate_at(from));
            }
          }
        }
      } else if constexpr (kLast) {
        with_access(source_whole, [&](auto whole) {
          taps.each<4>(pixel, [&](int h, int w, float weight) {
            const int64_t from = static_cast<int64_t>(h) * source_width + w;
            const float gate = gate_at(from);
            float v[kVector<T>];
            load_unit(source + (tile.image * source_pixels + from) * p.channels + channel, count, whole, v);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) result[j] += weight * value_of(v[j], j, gate);
          });
        });
      } else {
        const T* plane = source + (tile.image * p.channels + channel) * source_pixels;
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          if (j >= count) continue;
          float sum = 0;
          taps.each<4>(pixel + j, [&](int h, int w, float weight) {
            const int64_t from = static_cast<int64_t>(h) * source_width + w;
            sum += weight * value_of(to_float(plane[from]), j, gate_at(from));
          });
          result[j] = sum;
        }
      }
      const int64_t offset = offset_of<kLast>(tile.image, p.channels, tile.pixels(), channel, tile.index(pixel));
      if constexpr (kTransposed) {
        if (p.mask != nullptr) {
          float before[kVector<T>];
          load_unit(mask + offset, count, mask_whole, before);
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) {
            const int s = kLast ? j : 0;
            if (p.relu && !(scale[s] * before[j] + shift[s] > 0)) result[j] = 0;
            if (j < count) {
              sums[0][s] += result[j] * (before[j] - (p.mean != nullptr ? p.mean[channel + s] : 0.f));
              sums[1][s] += result[j];
            }
            result[j] *= scale[s];
          }
        }
      }
      store_unit(dest + offset, count, dest_whole, result);
    };
    if (kTransposed && p.sums != nullptr) {
      walk_units<T, kLast, kSums>(begin, end, scratch, totals - begin, per_group, unit);
    } else {
      walk_units<T, kLast, 0>(begin, end, scratch, totals, 0, [&](int pixel, int channel, auto&) {
        float unused[kSums][kUnitChannels] = {};
        unit(pixel, channel, unused);
      });
    }
  }
  if (kTransposed && p.sums != nullptr) {
    sync_threads();
    for (int i = tid; i < kSums * (end - begin); i += kThreads) {
      const int s = i / (end - begin), c = i % (end - begin);
      p.sums[(static_cast<int64_t>(blockIdx.x) * kSums + s) * p.channels + begin + c] = totals[s * per_group + c];
    }
  }
}

Kind kind_of(const ResampleParams& params) {
  if (params.transposed) return Kind::kTransposed;
  const bool mapped = params.gate != nullptr || params.scale != nullptr || params.relu;
  if (params.row_taps <= 2 && params.col_taps <= 2) return mapped ? Kind::kTwoTapsMapped : Kind::kTwoTaps;
  return mapped ? Kind::kForwardMapped : Kind::kForward;
}

}  // namespace

cudaError_t launch_resample(const ResampleParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.blocks), static_cast<unsigned>(params.channel_groups));
  return dispatch(params.format, [&](auto type, auto last) {
    using T = decltype(type);
    const int step = Lanes<T, last.value>::kChannelStep;
    const int per_group =
        ((params.channels + params.channel_groups - 1) / params.channel_groups + step - 1) / step * step;
    size_t words = TileTaps::words(params.tiling, params.row_taps, params.col_taps);
    if (params.sums != nullptr) words += kSumScratch<T> + static_cast<size_t>(kSums) * per_group;
    const auto run = [&](auto kernel) { return launch(kernel, grid, kThreads, words * sizeof(float), stream, params); };
    switch (kind_of(params)) {
      case Kind::kTwoTaps:
        return run(resample<T, last.value, Kind::kTwoTaps>);
      case Kind::kTwoTapsMapped:
        return run(resample<T, last.value, Kind::kTwoTapsMapped>);
      case Kind::kForward:
        return run(resample<T, last.value, Kind::kForward>);
      case Kind::kForwardMapped:
        return run(resample<T, last.value, Kind::kForwardMapped>);
      case Kind::kTransposed:
        return run(resample<T, last.value, Kind::kTransposed>);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace gsto::cuda
