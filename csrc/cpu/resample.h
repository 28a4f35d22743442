// Separable resampling (axis.h) as tables: of the taps, or of the transpose, which the backward pass needs and which
// has the same form. No torch header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

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
    int begin = 0, end = 0;  // of the outputs that read an input: both move monotonely with it
    for (int i = 0; i < (transposed ? axis.in : axis.out); ++i) {
      offset_.push_back(static_cast<int64_t>(weight_.size()));
      if (!transposed) {
        const Taps<double> taps = taps_of<double>(axis, i);
        start_.push_back(taps.start);
        for (int t = taps.start; t < taps.end(); ++t) weight_.push_back(taps.weight(t));
      } else {
        while (begin < axis.out && taps_of<double>(axis, begin).end() <= i) ++begin;
        start_.push_back(begin);
        end = std::max(begin, end);
        while (end < axis.out && taps_of<double>(axis, end).start <= i) ++end;
        for (int o = begin; o < end; ++o) weight_.push_back(taps_of<double>(axis, o).weight(i));
      }
      most_taps_ = std::max(most_taps_, static_cast<int64_t>(weight_.size()) - offset_.back());
    }
    offset_.push_back(static_cast<int64_t>(weight_.size()));
    weight_float_.assign(weight_.begin(), weight_.end());
  }

  AxisView view() const {
    return {transposed_ ? axis_.out : axis_.in,
            transposed_ ? axis_.in : axis_.out,
            most_taps_,
            is_identity(axis_),
            start_.data(),
            offset_.data(),
            weight_.data(),
            weight_float_.data()};
  }

 private:
  Axis axis_;
  bool transposed_;
  int64_t most_taps_ = 0;
  std::vector<int64_t> start_, offset_;
  std::vector<double> weight_;
  std::vector<float> weight_float_;
};

}  // namespace gsto::cpu
