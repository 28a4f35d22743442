// Separable resampling as tables. Along one axis every output is a weighted sum of a contiguous run of inputs (its
// taps), and the runs move monotonely; so the transpose, which the backward pass needs, has the same form. No torch
// header.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "types.h"

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

class Axis {
 public:
  // scale is the factor that the caller gave, if any; like F.interpolate, "bilinear" without align_corners and
  // "nearest" then step by 1 / scale and not by in / out.
  Axis(int64_t in, int64_t out, ResampleMode mode, bool align_corners, std::optional<double> scale)
      : in_(in), out_(out) {
    const bool given = scale.has_value() && *scale > 0;
    if (mode == ResampleMode::kAvg) {
      for (int64_t o = 0; o < out; ++o) {
        const int64_t first = o * in / out;
        const int64_t count = ((o + 1) * in + out - 1) / out - first;
        add(first, count, 1.0 / static_cast<double>(count));
      }
    } else if (mode == ResampleMode::kNearest) {
      // float32 whatever the dtype: the index is what F.interpolate computes for float32, to the bit.
      const float step = given ? static_cast<float>(1.0 / *scale) : static_cast<float>(in) / static_cast<float>(out);
      for (int64_t o = 0; o < out; ++o) {
        const int64_t i = static_cast<int64_t>(std::floor(static_cast<float>(o) * step));
        add(std::min(i, in - 1), 1, 1.0);
      }
    } else if (in == out) {
      for (int64_t o = 0; o < out; ++o) add(o, 1, 1.0);  // a copy, even where a scale other than 1 was given
    } else {
      double step = given ? 1.0 / *scale : static_cast<double>(in) / static_cast<double>(out);
      if (align_corners) step = out > 1 ? static_cast<double>(in - 1) / static_cast<double>(out - 1) : 0.0;
      for (int64_t o = 0; o < out; ++o) {
        const double position =
            align_corners ? step * static_cast<double>(o) : std::max(0.0, step * (static_cast<double>(o) + 0.5) - 0.5);
        const int64_t first = std::min(static_cast<int64_t>(position), in - 1);
        if (first == in - 1) {
          add(first, 1, 1.0);
        } else {
          const double lambda = std::min(1.0, position - static_cast<double>(first));
          add(first, 1, 1.0 - lambda);
          weight_.push_back(lambda);
        }
      }
    }
    offset_.push_back(static_cast<int64_t>(weight_.size()));
    weight_float_.assign(weight_.begin(), weight_.end());
  }

  Axis transposed() const {
    Axis t(out_, in_);
    int64_t first = 0;  // the first output that may touch input i
    for (int64_t i = 0; i < in_; ++i) {
      while (first < out_ && start_[first] + offset_[first + 1] - offset_[first] <= i) ++first;
      t.start_.push_back(first);
      t.offset_.push_back(static_cast<int64_t>(t.weight_.size()));
      for (int64_t o = first; o < out_ && start_[o] <= i; ++o) t.weight_.push_back(weight_[offset_[o] + i - start_[o]]);
    }
    t.offset_.push_back(static_cast<int64_t>(t.weight_.size()));
    t.weight_float_.assign(t.weight_.begin(), t.weight_.end());
    return t;
  }

  AxisView view() const {
    int64_t most_taps = 0;
    for (int64_t o = 0; o < out_; ++o) most_taps = std::max(most_taps, offset_[o + 1] - offset_[o]);
    bool identity = in_ == out_ && static_cast<int64_t>(weight_.size()) == out_;
    for (int64_t o = 0; identity && o < out_; ++o) identity = start_[o] == o && weight_[o] == 1.0;
    return {in_, out_, most_taps, identity, start_.data(), offset_.data(), weight_.data(), weight_float_.data()};
  }

 private:
  Axis(int64_t in, int64_t out) : in_(in), out_(out) {}

  void add(int64_t start, int64_t count, double weight) {
    start_.push_back(start);
    offset_.push_back(static_cast<int64_t>(weight_.size()));
    weight_.insert(weight_.end(), static_cast<size_t>(count), weight);
  }

  int64_t in_, out_;
  std::vector<int64_t> start_, offset_;
  std::vector<double> weight_;
  std::vector<float> weight_float_;
};

}  // namespace gsto::cpu
