// Separable resampling as arithmetic on one axis, for host and device: the one place where the modes' formulas are
// written. Every output reads a contiguous run of inputs (its taps), and the runs move monotonely with the output, so
// the outputs that read one input are a contiguous run too: that run is the gather form of the transpose.
#pragma once

#include "types.h"

namespace gsto {

// Window b of `bins` along an axis of this length: adaptive average pooling's rule.
GSTO_HOST_DEVICE int64_t window_begin(int64_t b, int64_t bins, int64_t length) { return b * length / bins; }
GSTO_HOST_DEVICE int64_t window_end(int64_t b, int64_t bins, int64_t length) {
  return ((b + 1) * length + bins - 1) / bins;
}

struct Axis {
  int in = 1, out = 1;
  ResampleMode mode = ResampleMode::kBilinear;
  bool align_corners = false;
  double step = 1;       // inputs per output
  float float_step = 1;  // the same as F.interpolate's nearest mode computes it
};

// `given` is the scale factor of the caller or 0: like F.interpolate, resampling then steps by 1 / scale and not by in
// / out.
inline Axis make_axis(int64_t in, int64_t out, ResampleMode mode, bool align_corners, double given) {
  Axis axis;
  axis.in = static_cast<int>(in);
  axis.out = static_cast<int>(out);
  axis.mode = mode;
  axis.align_corners = align_corners;
  axis.step = given > 0 ? 1.0 / given : static_cast<double>(in) / static_cast<double>(out);
  if (align_corners) axis.step = out > 1 ? static_cast<double>(in - 1) / static_cast<double>(out - 1) : 0.0;
  axis.float_step = given > 0 ? static_cast<float>(1.0 / given) : static_cast<float>(in) / static_cast<float>(out);
  return axis;
}

// Whether resampling along the axis is a copy. A bilinear axis of equal sizes is one, even where a scale other than 1
// was given.
inline bool is_identity(const Axis& axis) {
  return axis.in == axis.out && (axis.mode != ResampleMode::kNearest || axis.float_step == 1.f);
}

// A is the type of the weights: float, or double where the maps are.
template <class A>
struct Taps {
  int start, count;
  A first, rest;  // weight of the first tap, and of each other one

  GSTO_HOST_DEVICE int end() const { return start + count; }
  GSTO_HOST_DEVICE A weight(int input) const { return input == start ? first : rest; }
};

template <class A = float>
GSTO_HOST_DEVICE Taps<A> taps_of(const Axis& axis, int output) {
  if (axis.mode == ResampleMode::kAvg) {
    const int start = static_cast<int>(window_begin(output, axis.out, axis.in));
    const int count = static_cast<int>(window_end(output, axis.out, axis.in)) - start;
    const A weight = A(1) / static_cast<A>(count);
    return {start, count, weight, weight};
  }
  if (axis.mode == ResampleMode::kNearest) {
    const int64_t input = static_cast<int64_t>(static_cast<float>(output) * axis.float_step);  // truncation: it is >= 0
    return {static_cast<int>(input < axis.in - 1 ? input : axis.in - 1), 1, A(1), A(1)};
  }
  if (axis.in == axis.out) return {output, 1, A(1), A(1)};
  double position = axis.align_corners ? axis.step * output : axis.step * (output + 0.5) - 0.5;
  if (position < 0) position = 0;
  const int start = position < axis.in - 1 ? static_cast<int>(position) : axis.in - 1;
  if (start == axis.in - 1) return {start, 1, A(1), A(1)};
  const A lambda = static_cast<A>(position - start);
  return {start, 2, A(1) - lambda, lambda};
}

// The outputs [begin, end) that read `input`: two binary searches over the monotone runs.
GSTO_HOST_DEVICE void readers_of(const Axis& axis, int input, int& begin, int& end) {
  int low = 0, high = axis.out;  // the first output whose run ends behind the input
  while (low < high) {
    const int middle = (low + high) / 2;
    if (taps_of(axis, middle).end() > input) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  begin = low;
  high = axis.out;  // the first output whose run starts behind it
  while (low < high) {
    const int middle = (low + high) / 2;
    if (taps_of(axis, middle).start > input) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  end = low;
}

// The inputs that outputs [first, first + count) read, and those that they own: every input has one owner.
struct Region {
  int begin, end, owned_begin, owned_end;

  GSTO_HOST_DEVICE Region(const Axis& axis, int first, int count) {
    const int last = first + count < axis.out ? first + count : axis.out;
    const Taps<float> head = taps_of(axis, first), tail = taps_of(axis, last - 1);
    owned_begin = first == 0 ? 0 : head.start;
    owned_end = last == axis.out ? axis.in : taps_of(axis, last).start;
    begin = owned_begin < head.start ? owned_begin : head.start;
    end = owned_end > tail.end() ? owned_end : tail.end();
  }
};

inline int longest_region(const Axis& axis, int count) {
  int longest = 1;
  for (int first = 0; first < axis.out; first += count) {
    const Region region(axis, first, count);
    longest = region.end - region.begin > longest ? region.end - region.begin : longest;
  }
  return longest;
}

// The longest run of taps (or, transposed, of readers) along the axis, found by looking at all of it: exact, and the
// host does it once per call, with at most a few thousand positions.
inline int longest_run(const Axis& axis, bool transposed) {
  int longest = 1;
  if (!transposed) {
    for (int o = 0; o < axis.out; ++o) {
      const int count = taps_of(axis, o).count;
      longest = count > longest ? count : longest;
    }
    return longest;
  }
  int begin = 0, end = 0;  // both ends move monotonely with the input
  for (int i = 0; i < axis.in; ++i) {
    while (begin < axis.out && taps_of(axis, begin).end() <= i) ++begin;
    if (end < begin) end = begin;
    while (end < axis.out && taps_of(axis, end).start <= i) ++end;
    longest = end - begin > longest ? end - begin : longest;
  }
  return longest;
}

}  // namespace gsto
