// Elementwise kernels' view of dense maps: see StripPlan. Units are exact (a row has no remainder), so none is masked;
// they are 16 bytes wherever the shape and the addresses allow it, else 4, else one element.
#pragma once

#include "cuda/tile.h"

namespace gsto::cuda {

// The bits of kWidth elements, moved in one access.
template <class T, int kWidth>
using UnitBits = std::conditional_t<kWidth * sizeof(T) == 16, Vec16,
                                    std::conditional_t<kWidth * sizeof(T) == 4, uint32_t, uint16_t>>;

template <class T, int kWidth>
GSTO_DEVICE UnitBits<T, kWidth> load_bits(const void* map, int64_t offset) {
  return *aligned(reinterpret_cast<const UnitBits<T, kWidth>*>(static_cast<const T*>(map) + offset));
}

template <class T, int kWidth>
GSTO_DEVICE void unpack_bits(const UnitBits<T, kWidth>& bits, float (&to)[kWidth]) {
  if constexpr (kWidth * sizeof(T) == 16) {
    unpack<T>(bits, to);
  } else if constexpr (sizeof(T) == 4) {
    union {
      uint32_t bits;
      float value;
    } u;
    u.bits = bits;
    to[0] = u.value;
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      T element;
      element.bits = static_cast<uint16_t>(bits >> 16 * j);
      to[j] = to_float(element);
    }
  }
}

template <class T, int kWidth>
GSTO_DEVICE void store_values(void* map, int64_t offset, const float (&from)[kWidth]) {
  T* to = static_cast<T*>(map) + offset;
  if constexpr (kWidth * sizeof(T) == 16) {
    *aligned(reinterpret_cast<Vec16*>(to)) = pack<T>(from);
  } else if constexpr (kWidth == 1) {
    from_float(from[0], *to);
  } else {
    T low, high;
    from_float(from[0], low);
    from_float(from[1], high);
    *aligned(reinterpret_cast<uint32_t*>(to)) = static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits)
                                                                                      << 16;
  }
}

// Parameters per channel in shared memory, `units` units of kEntries channels. Four of them are read at once, and the
// units' quarters are adjacent, so that no two lanes meet in a bank.
template <int kEntries>
struct ChannelTable {
  static constexpr int kQuarter = kEntries > 4 ? 4 : kEntries;
  float* values;
  int units;

  static size_t words(int units, int parameters) { return static_cast<size_t>(units) * kEntries * parameters; }

  GSTO_DEVICE float& at(int parameter, int unit, int j) const {
    return values[((parameter * (kEntries / kQuarter) + j / kQuarter) * units + unit) * kQuarter + j % kQuarter];
  }

  GSTO_DEVICE void get(int parameter, int unit, float (&to)[kEntries]) const {
    if constexpr (kQuarter == 4) {
#pragma unroll
      for (int j = 0; j < kEntries; j += 4) {
        float four[4];
        unpack<float>(*aligned(reinterpret_cast<const Vec16*>(&at(parameter, unit, j))), four);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[j + i] = four[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kEntries; ++j) to[j] = at(parameter, unit, j);
    }
  }
};

// A thread's part of a walk: units at `offset`, in rows from `row` on.
template <class T, bool kLast, int kWidth>
struct Strip {
  static constexpr int kEntries = kLast ? kWidth : 1;  // channels of a unit

  int unit;      // the thread's, within the block's group
  int channel0;  // of the group: a column of folded rows, or (NCHW) the channel
  int per_pass;  // rows of a pass
  int64_t row, end, offset, step;
  int place = 0, place_step = 0, row_units = 0;  // NCHW: the unit within its plane
  int64_t wrap = 0;

  GSTO_DEVICE Strip(const StripParams& p) {
    const StripPlan& plan = p.plan;
    const int tid = static_cast<int>(threadIdx.x);
    const int group = static_cast<int>(blockIdx.x / static_cast<unsigned>(plan.blocks));
    const int64_t first = blockIdx.x % static_cast<unsigned>(plan.blocks) * plan.span;
    per_pass = pass_rows(plan);
    unit = tid % plan.group_units;
    const int line = tid / plan.group_units;
    channel0 = kLast ? group * plan.group_units * kWidth : group;
    row = first + line;
    end = first + plan.span < plan.rows ? first + plan.span : plan.rows;
    if (line >= per_pass || (kLast && group * plan.group_units + unit >= plan.row_units)) row = end;
    if constexpr (kLast) {
      const int64_t stride = static_cast<int64_t>(p.channels) * plan.fold;
      offset = row * stride + channel0 + unit * kWidth;
      step = per_pass * stride;
    } else {
      row_units = plan.row_units;
      place = static_cast<int>(row % row_units);
      place_step = per_pass % row_units;
      offset = (row / row_units * p.channels + group) * p.pixels + static_cast<int64_t>(place) * kWidth;
      step = per_pass / row_units * p.channels * p.pixels + static_cast<int64_t>(place_step) * kWidth;
      wrap = (p.channels - 1) * p.pixels;
    }
  }

  GSTO_DEVICE void advance() {
    row += per_pass;
    offset += step;
    if constexpr (!kLast) {
      place += place_step;
      if (place >= row_units) {
        place -= row_units;
        offset += wrap;
      }
    }
  }

  // Calls f(first row, offsets, how many of them exist) for up to kStripBatch units at a time, per_pass rows apart.
  template <class F>
  GSTO_DEVICE void each(const F& f) {
    while (row < end) {
      const int64_t first = row;
      int64_t at[kStripBatch];
      int count = 0;
#pragma unroll
      for (int b = 0; b < kStripBatch; ++b) {
        at[b] = offset;
        count += row < end;
        advance();
      }
      f(first, at, count);
    }
  }

  GSTO_DEVICE static void load(const void* map, const int64_t (&at)[kStripBatch], int count,
                               UnitBits<T, kWidth> (&to)[kStripBatch]) {
#pragma unroll
    for (int b = 0; b < kStripBatch; ++b)
      if (b < count) to[b] = load_bits<T, kWidth>(map, at[b]);
  }

  // The channel of entry j of a unit of the group, and which pixel of the fold it belongs to; -1: there is none.
  GSTO_DEVICE int channel_of(const StripParams& p, int unit_, int j, int& fold) const {
    const int column = channel0 + unit_ * kEntries + j;
    if (column >= p.channels * p.plan.fold) return -1;
    fold = column / p.channels;
    return column % p.channels;
  }

  // Calls f(channel, unit, j) for all entries of the block's group; all threads of the block share them.
  template <class F>
  GSTO_DEVICE void each_channel(const StripParams& p, const F& f) const {
    for (int i = static_cast<int>(threadIdx.x); i < p.plan.group_units * kEntries; i += kThreads) {
      int fold;
      const int channel = channel_of(p, i / kEntries, i % kEntries, fold);
      if (channel >= 0) f(channel, i / kEntries, i % kEntries);
    }
  }

  // Row of partial results of this block and a fold.
  GSTO_DEVICE int64_t part(const StripParams& p, int fold) const {
    return blockIdx.x % static_cast<unsigned>(p.plan.blocks) * static_cast<int64_t>(p.plan.fold) + fold;
  }
};

// Calls f(type, layout, width) for a plan.
template <class F>
cudaError_t dispatch_strips(const Format& format, int width, const F& f) {
  return dispatch(format, [&](auto type, auto last) {
    using T = decltype(type);
    if (width == kVector<T>) return f(type, last, std::integral_constant<int, kVector<T>>{});
    if constexpr (sizeof(T) == 2) {
      if (width == 2) return f(type, last, std::integral_constant<int, 2>{});
    }
    return width == 1 ? f(type, last, std::integral_constant<int, 1>{}) : cudaErrorInvalidValue;
  });
}

inline dim3 strip_grid(const StripParams& params) {
  return dim3(static_cast<unsigned>(params.plan.blocks) * static_cast<unsigned>(params.plan.groups));
}

// scale and shift of a channel: norm(x) = scale * x + shift. The shift is of no use without a bias.
GSTO_DEVICE void affine_of(const Norm& norm, int channel, float& scale, float& shift) {
  const bool normed = norm.variance != nullptr;
  scale = normed ? norm.weight[channel] / sqrtf(norm.variance[channel] + norm.eps) : 1.f;
  shift = normed && norm.bias != nullptr ? norm.bias[channel] - norm.mean[channel] * scale : 0.f;
}

}  // namespace gsto::cuda
