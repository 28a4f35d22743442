// act(gate * input + sum of normed and resampled terms) in one pass: see BatchNormSumParams and ResampledSumParams. The
// affine of a norm is made from its four vectors once per block. As a resampling's weights sum to one, it is applied to
// the interpolated value.
// Traffic per element of the output: 1 written, 1 read of the input and of every term of the output's size; 1/N for
// the gate; a term of another size once from DRAM, its taps from L1/L2 (a thread reads 2 elements per source column
// that its run of pixels meets).
#include "cuda/strips.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast, int kWidth>
GSTO_KERNEL(kThreads, kStripResident)
batch_norm_sum(const BatchNormSumParams p) {
  using S = Strip<T, kLast, kWidth>;
  constexpr int kEntries = S::kEntries;
  S strip(p);
  const ChannelTable<kEntries> table = {reinterpret_cast<float*>(shared_memory()), p.plan.group_units};
  for (int k = 0; k < p.terms; ++k) {
    strip.each_channel(p, [&](int channel, int unit, int j) {
      affine_of(p.norm[k], channel, table.at(2 * k, unit, j), table.at(2 * k + 1, unit, j));
    });
  }
  sync_threads();
  // The pixel that a unit starts with, and how many of its elements belong to it: a unit has at most two of them.
  const int column = strip.channel0 + strip.unit * kWidth;
  const int first_pixel = kLast ? column / p.channels : 0, left = (first_pixel + 1) * p.channels - column;

  strip.each([&](int64_t row, const int64_t (&at)[kStripBatch], int count) {
    UnitBits<T, kWidth> units[kStripBatch] = {};
    float sum[kStripBatch][kWidth] = {};
    if (p.input != nullptr) {
      S::load(p.input, at, count, units);
#pragma unroll
      for (int b = 0; b < kStripBatch; ++b) {
        unpack_bits<T, kWidth>(units[b], sum[b]);
        if (p.gate == nullptr || b >= count) continue;
        const int64_t unit_row = row + b * strip.per_pass;
        if constexpr (kLast) {
          const int64_t pixel = unit_row * p.plan.fold + first_pixel;
          const float gate = load_scalar<T>(p.gate, pixel);
          const float next = left < kWidth ? load_scalar<T>(p.gate, pixel + 1) : 0.f;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sum[b][j] *= j < left ? gate : next;
        } else {
          float gate[kWidth];
          unpack_bits<T, kWidth>(load_bits<T, kWidth>(p.gate, unit_row * kWidth), gate);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sum[b][j] *= gate[j];
        }
      }
    }
    for (int k = 0; k < p.terms; ++k) {
      float scale[kEntries], shift[kEntries];
      S::load(p.term[k], at, count, units);
      table.get(2 * k, strip.unit, scale);
      table.get(2 * k + 1, strip.unit, shift);
#pragma unroll
      for (int b = 0; b < kStripBatch; ++b) {
        float x[kWidth];
        unpack_bits<T, kWidth>(units[b], x);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[b][j] += scale[j % kEntries] * x[j] + shift[j % kEntries];
      }
    }
#pragma unroll
    for (int b = 0; b < kStripBatch; ++b) {
      if (b >= count) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[b][j] = p.relu && sum[b][j] < 0 ? 0.f : sum[b][j];
      store_values<T, kWidth>(p.output, at[b], sum[b]);
    }
  });
}

// One term's values along a run of pixels of a row. Neighbours share source columns: each is interpolated between its
// two rows once, and the last two of them are kept.
template <class T, bool kLast, int kWidth>
struct ColumnReader {
  static constexpr int kEntries = kLast ? kWidth : 1;
  const T *top, *bottom;  // the two source rows, at the unit's channels
  int step;               // between columns
  float top_weight, bottom_weight;
  int left_column = -1, right_column = -1;
  float left[kEntries], right[kEntries];

  GSTO_DEVICE void read(int column, float (&to)[kEntries]) const {
    const int64_t at = static_cast<int64_t>(column) * step;
    float above[kEntries], below[kEntries];
    unpack_bits<T, kEntries>(load_bits<T, kEntries>(top, at), above);
    unpack_bits<T, kEntries>(load_bits<T, kEntries>(bottom, at), below);
#pragma unroll
    for (int e = 0; e < kEntries; ++e) to[e] = top_weight * above[e] + bottom_weight * below[e];
  }

  GSTO_DEVICE void move_to(const TwoTaps& taps) {
    if (taps.first != left_column) {
      if (taps.first == right_column) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) left[e] = right[e];
      } else {
        read(taps.first, left);
      }
      left_column = taps.first;
    }
    if (taps.second != right_column) {
      if (taps.second == left_column) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) right[e] = left[e];
      } else {
        read(taps.second, right);
      }
      right_column = taps.second;
    }
  }
};

template <class T, bool kLast, int kWidth>
GSTO_KERNEL(kThreads, 4)
resampled_sum(const ResampledSumParams p) {
  constexpr int kRun = kLast ? 4 : kWidth;      // pixels of a thread at a time
  constexpr int kUnits = kLast ? kRun : 1;      // and the units that they are
  constexpr int kEntries = kLast ? kWidth : 1;  // channels of a unit
  const Tiling& tiling = p.tiles.tiling;
  float* memory = reinterpret_cast<float*>(shared_memory());
  const ChannelTable<kEntries> table = {memory, p.tiles.group};
  float* tap_memory = memory + p.tiles.group * kEntries * 2 * p.terms;
  const int tap_words = static_cast<int>(TileTaps::words(tiling, 2, 2));

  const int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.tiles.groups));
  const PixelTile tile(tiling, blockIdx.x / static_cast<unsigned>(p.tiles.groups));
  const int channel0 = group * p.tiles.group * kEntries;
  const int group_channels =
      p.channels - channel0 < p.tiles.group * kEntries ? p.channels - channel0 : p.tiles.group * kEntries;
  const int units = group_channels / kEntries;
  for (int k = 0; k < p.terms; ++k) {
    for (int i = static_cast<int>(threadIdx.x); i < group_channels; i += kThreads)
      affine_of(p.norm[k], channel0 + i, table.at(2 * k, i / kEntries, i % kEntries),
                table.at(2 * k + 1, i / kEntries, i % kEntries));
    if (p.resampled[k]) TileTaps(tap_memory + k * tap_words, tiling, 2, 2).fill(p.rows[k], p.cols[k], false, tile);
  }
  sync_threads();

  const int row_runs = tiling.tile_width / kRun, runs = tiling.tile_height * row_runs;
  for (int item = static_cast<int>(threadIdx.x); item < runs * units; item += kThreads) {
    const int run = kLast ? item / units : item % runs, unit = kLast ? item % units : item / runs;
    const int row = run / row_runs, col = run % row_runs * kRun, channel = channel0 + unit * kEntries;
    const int h = tile.h0 + row, w = tile.w0 + col;
    if (h >= tile.height || w >= tile.width) continue;
    const int pixels = tile.width - w < kRun ? tile.width - w : kRun;  // NCHW: all, as units divide the rows
    const int64_t pixel = static_cast<int64_t>(h) * tile.width + w;
    const int64_t offset = offset_of<kLast>(tile.image, p.channels, tile.pixels(), channel, pixel);
    float sum[kUnits][kWidth] = {};
    // A map of the output's size, all loads before the first use.
    const auto each_unit = [&](const void* map, const auto& f) {
      UnitBits<T, kWidth> bits[kUnits] = {};
#pragma unroll
      for (int b = 0; b < kUnits; ++b)
        if (!kLast || b < pixels) bits[b] = load_bits<T, kWidth>(map, offset + b * static_cast<int64_t>(p.channels));
#pragma unroll
      for (int b = 0; b < kUnits; ++b) {
        float x[kWidth];
        unpack_bits<T, kWidth>(bits[b], x);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) f(b, j, x[j]);
      }
    };
    if (p.input != nullptr) {
      each_unit(p.input, [&](int b, int j, float x) { sum[b][j] = x; });
      if (p.gate != nullptr) {
        const int64_t at = tile.image * p.gate_stride + pixel;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float gate = i < pixels ? load_scalar<T>(p.gate, at + i) : 0.f;
#pragma unroll
          for (int j = 0; j < kEntries; ++j) sum[kLast ? i : 0][kLast ? j : i] *= gate;
        }
      }
    }
    for (int k = 0; k < p.terms; ++k) {
      float scale[kEntries], shift[kEntries];
      table.get(2 * k, unit, scale);
      table.get(2 * k + 1, unit, shift);
      if (!p.resampled[k]) {
        each_unit(p.term[k],
                  [&](int b, int j, float x) { sum[b][j] += scale[j % kEntries] * x + shift[j % kEntries]; });
        continue;
      }
      const TileTaps taps(tap_memory + k * tap_words, tiling, 2, 2);
      const TwoTaps rows(taps.rows, row);
      const int source_width = p.cols[k].in;
      const int64_t source_pixels = static_cast<int64_t>(p.rows[k].in) * source_width;
      const T* source = static_cast<const T*>(p.term[k]);
      ColumnReader<T, kLast, kWidth> reader;
      const auto row_at = [&](int source_row) {
        return source + offset_of<kLast>(tile.image, p.channels, source_pixels, channel,
                                         static_cast<int64_t>(source_row) * source_width);
      };
      reader.top = row_at(rows.first);
      reader.bottom = row_at(rows.second);
      reader.step = kLast ? p.channels : 1;
      reader.top_weight = rows.first_weight;
      reader.bottom_weight = rows.second_weight;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i >= pixels) continue;
        const TwoTaps cols(taps.cols, col + i);
        reader.move_to(cols);
#pragma unroll
        for (int e = 0; e < kEntries; ++e)
          sum[kLast ? i : 0][kLast ? e : i] +=
              scale[e] * (cols.first_weight * reader.left[e] + cols.second_weight * reader.right[e]) + shift[e];
      }
    }
#pragma unroll
    for (int b = 0; b < kUnits; ++b) {
      if (kLast && b >= pixels) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[b][j] = p.relu && sum[b][j] < 0 ? 0.f : sum[b][j];
      store_values<T, kWidth>(p.output, offset + b * static_cast<int64_t>(p.channels), sum[b]);
    }
  }
}

}  // namespace

cudaError_t launch_batch_norm_sum(const BatchNormSumParams& params, cudaStream_t stream) {
  return dispatch_strips(params.format, params.plan.width, [&](auto type, auto last, auto width) {
    using Table = ChannelTable<last.value ? width.value : 1>;
    return launch(batch_norm_sum<decltype(type), last.value, width.value>, strip_grid(params), kThreads,
                  sizeof(float) * Table::words(params.plan.group_units, 2 * params.terms), stream, params);
  });
}

cudaError_t launch_resampled_sum(const ResampledSumParams& params, cudaStream_t stream) {
  return dispatch_strips(params.format, params.tiles.width, [&](auto type, auto last, auto width) {
    using Table = ChannelTable<last.value ? width.value : 1>;
    const size_t words = Table::words(params.tiles.group, 2 * params.terms) +
                         static_cast<size_t>(params.terms) * TileTaps::words(params.tiles.tiling, 2, 2);
    const dim3 grid(static_cast<unsigned>(params.batch * tiles_of(params.tiles.tiling) * params.tiles.groups));
    return launch(resampled_sum<decltype(type), last.value, width.value>, grid, kThreads, sizeof(float) * words, stream,
                  params);
  });
}

}  // namespace gsto::cuda
