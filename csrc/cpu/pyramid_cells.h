// What the passes of gated_pyramid_pool over tiles and over planes share: the parameters, and the cells of rows and
// columns between which no window of any level begins or ends (pyramid.h). Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// Levels are worked on kGroup at a time, filled up with levels of weight zero: one read of a pixel serves all of them.
template <class S, int kGroup>
struct PyramidCells {
  using A = Accumulate<S>;
  static constexpr int64_t lanes = kLanes<A>;

  const Call& call;
  const GatedPyramidPoolParams& p;
  const int64_t row, levels, windows;  // padded channels, padded levels, sum of bins^2
  const Buffer<A> gate_weight, gate_bias;

  PyramidCells(const Call& c, const GatedPyramidPoolParams& params)
      : call(c),
        p(params),
        row(padded<A>(p.channels)),
        levels((p.levels + kGroup - 1) / kGroup * kGroup),
        windows(count_windows(params)),
        gate_weight(levels * row),
        gate_bias(padded<A>(levels)) {
    fill_pixels(gate_weight.data(), levels * row, A(0));
    fill_padded<S>(p.gate_bias, p.gate_bias.stride_n, p.gate_bias.data ? p.levels : 0, gate_bias.data(),
                   padded<A>(levels));
    for (int64_t k = 0; k < p.levels; ++k) {
      TensorView filter = p.gate_weight;
      filter.data = mutable_pixel<S>(p.gate_weight, k, 0, 0);
      fill_padded<S>(filter, filter.stride_c, p.channels, gate_weight.data() + k * row);
    }
  }

  static int64_t count_windows(const GatedPyramidPoolParams& p) {
    int64_t count = 0;
    for (int64_t k = 0; k < p.levels; ++k) count += p.bins[k] * p.bins[k];
    return count;
  }

  // A value per cell of an image's row of cells, level and channel: the sums, or the gradients.
  int64_t cell_row_size() const { return p.col_cells * levels * row; }
  A* cell(A* cell_row, int64_t j, int64_t k) const { return cell_row + (j * levels + k) * row; }

  // Calls f(level, its bins per axis, the first of its windows) for all levels.
  template <class F>
  void for_levels(const F& f) const {
    int64_t first = 0;
    for (int64_t k = 0; k < p.levels; ++k) {
      f(k, p.bins[k], first);
      first += p.bins[k] * p.bins[k];
    }
  }

  static bool inside(int64_t b, int64_t bins, int64_t length, int64_t at) {
    return window_begin(b, bins, length) <= at && at < window_end(b, bins, length);
  }

  int64_t area(int64_t bi, int64_t bj, int64_t bins) const {
    return (window_end(bi, bins, p.height) - window_begin(bi, bins, p.height)) *
           (window_end(bj, bins, p.width) - window_begin(bj, bins, p.width));
  }

  void fill_scaled(A* values, A factor) const {
    for (int64_t c = 0; c < row; c += lanes) store(values + c, load(values + c) * factor);
  }

  // The logits of a run of pixels become gates, `step` from level to level and with room for whole vectors, which are
  // stored.
  void make_gates(int64_t n, int64_t h, int64_t w, int64_t count, A* gate, int64_t step) const {
    for (int64_t k = 0; k < p.levels; ++k) {
      gate_logits(gate + k * step, gate_bias.data()[k], count);
      store_channels(mutable_pixel<S>(from_channel<S>(p.gate, k), n, h, w), count, gate + k * step);
    }
  }

  void load_gates(int64_t n, int64_t h, int64_t w, int64_t count, A* gate, int64_t step) const {
    for (int64_t k = 0; k < p.levels; ++k) load_scalars<S>(from_channel<S>(p.gate, k), n, h, w, count, gate + k * step);
  }

  // grad, the dot products of x with the gradient of g_k x, becomes the gradient of the logits.
  void gate_backward(int64_t n, int64_t h, int64_t w, int64_t count, const A* gate, A* grad, int64_t step,
                     A* bias_sums) const {
    const Buffer<A> given(padded<A>(count));
    for (int64_t k = p.levels; k < levels; ++k)  // an infinite x makes these NaN
      fill_pixels(grad + k * step, padded<A>(count), A(0));
    for (int64_t k = 0; k < p.levels; ++k) {
      load_optional_scalars<S>(from_channel<S>(p.grad_gate, k), n, h, w, count, given.data());
      bias_sums[k * lanes] += gate_gradients(gate + k * step, given.data(), count, grad + k * step);
    }
  }

  // Adds up the cells of one window.
  void sum_window(const A* cells, int64_t n, int64_t window, const Buffer<A>& total) const {
    for_levels([&](int64_t k, int64_t bins, int64_t first) {
      if (window < first || window >= first + bins * bins) return;
      const int64_t bi = (window - first) / bins, bj = (window - first) % bins;
      fill_pixels(total.data(), row, A(0));
      for (int64_t i = 0; i < p.row_cells; ++i) {
        for (int64_t j = 0; j < p.col_cells; ++j) {
          if (!inside(bi, bins, p.height, p.row_cuts[i]) || !inside(bj, bins, p.width, p.col_cuts[j])) continue;
          const A* sums = cells + (n * p.row_cells + i) * cell_row_size() + (j * levels + k) * row;
          for (int64_t c = 0; c < row; c += lanes) store(total.data() + c, load(total.data() + c) + load(sums + c));
        }
      }
      fill_scaled(total.data(), A(1) / static_cast<A>(area(bi, bj, bins)));
      store_pixels<S>(p.pooled, p.channels, n, 0, window, 1, total.data());
    });
  }

  // The gradients of the windows' sums.
  void load_windows(const Map<A>& grad_pooled) const {
    parallel_for(call, p.batch * windows, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / windows, window = task % windows;
        A* grad = grad_pooled.at(n, window);
        load_pixels<S>(p.grad_pooled, p.channels, n, 0, window, 1, grad);
        for_levels([&](int64_t, int64_t bins, int64_t first) {
          if (window < first || window >= first + bins * bins) return;
          const int64_t bi = (window - first) / bins, bj = (window - first) % bins;
          fill_scaled(grad, A(1) / static_cast<A>(area(bi, bj, bins)));
        });
      }
    });
  }

  // The gradient of g_k x for each cell of a row of cells: the sum over the windows that the cell lies in.
  void spread_windows(const Map<A>& grad_pooled, int64_t n, int64_t cell_row, A* to) const {
    fill_pixels(to, cell_row_size(), A(0));
    for_levels([&](int64_t k, int64_t bins, int64_t first) {
      for (int64_t window = 0; window < bins * bins; ++window) {
        if (!inside(window / bins, bins, p.height, p.row_cuts[cell_row])) continue;
        const A* grad = grad_pooled.at(n, first + window);
        for (int64_t j = 0; j < p.col_cells; ++j) {
          if (!inside(window % bins, bins, p.width, p.col_cuts[j])) continue;
          A* sums = cell(to, j, k);
          for (int64_t c = 0; c < row; c += lanes) store(sums + c, load(sums + c) + load(grad + c));
        }
      }
    });
  }
};

}  // namespace gsto::cpu::GSTO_ISA
