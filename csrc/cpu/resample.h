// Separable resampling (axis.h) as tables: of the taps, or of the transpose, which the backward pass needs and which
// has the same form. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "axis.h"

namespace gsto::cpu {

// Output o is sum_t weight[offset[o] + t] * input[start[o] + t], 0 <= t < offset[o + 1] - offset[o].
struct AxisView {
  int64_t in = 0, out = 0;
  int64_t most_taps = 0;
  bool identity = false;
  const int64_t* start = nullptr;
  const int64_t* offset = nullptr;
  const double* weight = nullptr;
  const float* weight_float = nullptr;  // the same, rounded

  template <class A>
  const A* weights(int64_t o) const {
    if constexpr (std::is_same_v<A, float>) {
      return weight_float + offset[o];
    } else {
      return weight + offset[o];
    }
  }
  int64_t taps(int64_t o) const { return offset[o + 1] - offset[o]; }
  int64_t end(int64_t o) const { return start[o] + offset[o + 1] - offset[o]; }
};

class AxisTable {
 public:
  AxisTable(const Axis& axis, bool transposed) : axis_(axis), transposed_(transposed) {
    // One block of memory: grown piece by piece, the tables of a call on 4x4 pixels took a fifth of its time. An axis
    // has at most two taps per output, or, where windows of pooling are longer, an input is in two windows at most.
    const int64_t count = transposed ? axis.in : axis.out, capacity = axis.in + int64_t{2} * axis.out;
    memory_.reset(new Entry[static_cast<size_t>(2 * count + 1 + capacity + (capacity + 1) / 2)]);
    start_ = reinterpret_cast<int64_t*>(memory_.get());
    offset_ = start_ + count;
    weight_ = reinterpret_cast<double*>(offset_ + count + 1);
    weight_float_ = reinterpret_cast<float*>(weight_ + capacity);
    int64_t size = 0;
    int begin = 0, end = 0;  // of the outputs that read an input: both move monotonely with it
    for (int i = 0; i < count; ++i) {
      offset_[i] = size;
      if (!transposed) {
        const Taps<double> taps = taps_of<double>(axis, i);
        start_[i] = taps.start;
        for (int t = taps.start; t < taps.end(); ++t) weight_[size++] = taps.weight(t);
      } else {
        while (begin < axis.out && taps_of<double>(axis, begin).end() <= i) ++begin;
        start_[i] = begin;
        end = std::max(begin, end);
        while (end < axis.out && taps_of<double>(axis, end).start <= i) ++end;
        for (int o = begin; o < end; ++o) weight_[size++] = taps_of<double>(axis, o).weight(i);
      }
      most_taps_ = std::max(most_taps_, size - offset_[i]);
    }
    offset_[count] = size;
    std::copy(weight_, weight_ + size, weight_float_);
  }

  AxisView view() const {
    return {transposed_ ? axis_.out : axis_.in,
            transposed_ ? axis_.in : axis_.out,
            most_taps_,
            is_identity(axis_),
            start_,
            offset_,
            weight_,
            weight_float_};
  }

 private:
  union Entry {
    int64_t position;
    double weight;
    float weights[2];
  };

  Axis axis_;
  bool transposed_;
  int64_t most_taps_ = 0;
  std::unique_ptr<Entry[]> memory_;
  int64_t *start_, *offset_;
  double* weight_;
  float* weight_float_;
};

}  // namespace gsto::cpu
