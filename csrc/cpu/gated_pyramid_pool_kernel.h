// gated_pyramid_pool, forward and backward. Included once per instruction set.
//
//   g_k = sigmoid(rho_k . x + b_k),  pooled_k = adaptive average pooling of g_k x to bins_k x bins_k, for K levels
//
// The input is read once, row of cells by row of cells (pyramid.h). Forward sums g_k x over each cell, then the
// cells of each window. Backward goes the other way: the gradient of g_k x is the same for all pixels of a cell.
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S>
struct GatedPyramidPool {
  using A = Accumulate<S>;
  static constexpr int64_t lanes = kLanes<A>;
  // Levels are worked on in groups, filled up with levels of weight zero: one read of a pixel serves four of them. A
  // block of dot products is one vector: kPixels pixels by kGroup levels.
  static constexpr int64_t kGroup = lanes < 4 ? lanes : 4;
  static constexpr int64_t kPixels = lanes / kGroup;

  const Call& call;
  const GatedPyramidPoolParams& p;
  const int64_t row, levels, windows, tile;  // padded channels, padded levels, sum of bins^2, pixels of a tile
  const Buffer<A> gate_weight, gate_bias;

  GatedPyramidPool(const Call& c, const GatedPyramidPoolParams& params)
      : call(c),
        p(params),
        row(padded<A>(p.channels)),
        levels((p.levels + kGroup - 1) / kGroup * kGroup),
        windows(count_windows(params)),
        tile(tile_pixels<A>(p.channels, 256)),
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

  static TensorView level(TensorView gate, int64_t k) {
    if (gate.data) gate.data = static_cast<S*>(gate.data) + k * gate.stride_c;
    return gate;
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

  // Calls f(h, w, count, first cell) for tiles of the pixels of a row of cells.
  template <class F>
  void visit(int64_t cell_row, const F& f) const {
    for (int64_t h = p.row_cuts[cell_row]; h < p.row_cuts[cell_row + 1]; ++h) {
      int64_t j = 0;
      for (int64_t w = 0; w < p.width; w += tile) {
        while (p.col_cuts[j + 1] <= w) ++j;
        f(h, w, least(tile, p.width - w), j);
      }
    }
  }

  // Calls f(cell, first pixel, pixels) for the parts of a tile that lie in one cell.
  template <class F>
  void split(int64_t w, int64_t count, int64_t j, const F& f) const {
    for (int64_t from = w; from < w + count; ++j) {
      const int64_t end = least(p.col_cuts[j + 1], w + count);
      f(j, from - w, end - from);
      from = end;
    }
  }

  // dots[k * tile + i] = x[i] . vectors[k] for a group of levels.
  void dot_levels(const A* x, int64_t count, const A* vectors, A* dots) const {
    for (int64_t i = 0; i < count; i += kPixels) {
      const A* pixel[kPixels];
      for (int64_t v = 0; v < kPixels; ++v) pixel[v] = x + least(i + v, count - 1) * row;
      Vec<A> sums[lanes] = {};
      for (int64_t c = 0; c < row; c += lanes) {
        for (int64_t k = 0; k < kGroup; ++k) {
          const Vec<A> vector = load(vectors + k * row + c);
          for (int64_t v = 0; v < kPixels; ++v) sums[k * kPixels + v] += vector * load(pixel[v] + c);
        }
      }
      transpose<A>(sums);
      for (int64_t v = 1; v < lanes; ++v) sums[0] += sums[v];
      const int64_t valid = least(kPixels, count - i);
      for (int64_t k = 0; k < kGroup; ++k)
        for (int64_t v = 0; v < valid; ++v) dots[k * tile + i + v] = sums[0][k * kPixels + v];
    }
  }

  // sums[k] += sum_i gate[k * tile + i] x[i] for a group of levels and kVectors vectors of channels.
  template <int kVectors>
  void add_gated(const A* x, int64_t count, const A* gate, A* sums) const {
    Vec<A> sum[kGroup][kVectors];
    for (int64_t k = 0; k < kGroup; ++k)
      for (int v = 0; v < kVectors; ++v) sum[k][v] = load(sums + k * row + v * lanes);
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> value = load(x + i * row + v * lanes);
        for (int64_t k = 0; k < kGroup; ++k) sum[k][v] += gate[k * tile + i] * value;
      }
    }
    for (int64_t k = 0; k < kGroup; ++k)
      for (int v = 0; v < kVectors; ++v) store(sums + k * row + v * lanes, sum[k][v]);
  }

  void forward() const {
    const Buffer<A> cells(p.batch * p.row_cells * cell_row_size());
    parallel_for(call, p.batch * p.row_cells, [&](int64_t begin, int64_t end) {
      const Buffer<A> x(tile * row), gate(levels * tile);
      for (int64_t task = begin; task < end; ++task) {
        A* cell_row = cells.data() + task * cell_row_size();
        fill_pixels(cell_row, cell_row_size(), A(0));
        const int64_t n = task / p.row_cells;
        visit(task % p.row_cells, [&](int64_t h, int64_t w, int64_t count, int64_t j) {
          const A* pixels = tile_of<S>(p.input, p.channels, n, h, w, count, x.data());
          make_gates(n, h, w, count, pixels, gate.data());
          split(w, count, j, [&](int64_t at, int64_t first, int64_t part_count) {
            for (int64_t k = 0; k < levels; k += kGroup) {
              const A* part = pixels + first * row;
              const A* part_gate = gate.data() + k * tile + first;
              A* sums = cell(cell_row, at, k);
              int64_t c = 0;
              for (; c + 2 * lanes <= row; c += 2 * lanes) add_gated<2>(part + c, part_count, part_gate, sums + c);
              if (c < row) add_gated<1>(part + c, part_count, part_gate, sums + c);
            }
          });
        });
      }
    });
    parallel_for(call, p.batch * windows, [&](int64_t begin, int64_t end) {
      const Buffer<A> total(row);
      for (int64_t task = begin; task < end; ++task) sum_window(cells.data(), task / windows, task % windows, total);
    });
  }

  void make_gates(int64_t n, int64_t h, int64_t w, int64_t count, const A* x, A* gate) const {
    for (int64_t k = 0; k < levels; k += kGroup) dot_levels(x, count, gate_weight.data() + k * row, gate + k * tile);
    for (int64_t k = 0; k < p.levels; ++k) {
      A* values = gate + k * tile;  // a tile is a multiple of 16 pixels, so whole vectors may be worked on
      for (int64_t i = 0; i < count; i += lanes) store(values + i, sigmoid<A>(load(values + i) + gate_bias.data()[k]));
      store_channels(mutable_pixel<S>(level(p.gate, k), n, h, w), count, values);
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
      const A share = A(1) / static_cast<A>(area(bi, bj, bins));
      fill_scaled(total.data(), share);
      store_pixels<S>(p.pooled, p.channels, n, 0, window, 1, total.data());
    });
  }

  void fill_scaled(A* values, A factor) const {
    for (int64_t c = 0; c < row; c += lanes) store(values + c, load(values + c) * factor);
  }

  int64_t area(int64_t bi, int64_t bj, int64_t bins) const {
    return (window_end(bi, bins, p.height) - window_begin(bi, bins, p.height)) *
           (window_end(bj, bins, p.width) - window_begin(bj, bins, p.width));
  }

  void backward() const {
    const Map<A> grad_pooled(p.batch, windows, p.channels);
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
    Reduction<A> reduction(p.batch * p.row_cells, levels * (row + lanes));
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Buffer<A> cell_row(cell_row_size()), x(tile * row), u(tile * row), gate(levels * tile), grad(levels * tile);
      fill_pixels(gate.data(), levels * tile, A(0));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / p.row_cells;
        spread_windows(grad_pooled, n, task % p.row_cells, cell_row.data());
        visit(task % p.row_cells, [&](int64_t h, int64_t w, int64_t count, int64_t j) {
          const A* pixels = tile_of<S>(p.input, p.channels, n, h, w, count, x.data());
          A* result = tile_for<S>(p.grad_input, p.channels, n, h, w, u.data());
          for (int64_t k = 0; k < p.levels; ++k)
            load_scalars<S>(level(p.gate, k), n, h, w, count, gate.data() + k * tile);
          split(w, count, j, [&](int64_t at, int64_t first, int64_t part_count) {
            for (int64_t k = 0; k < levels; k += kGroup)
              dot_levels(pixels + first * row, part_count, cell(cell_row.data(), at, k),
                         grad.data() + k * tile + first);
          });
          gate_backward(n, h, w, count, gate.data(), grad.data(), sums + levels * row);
          split(w, count, j, [&](int64_t at, int64_t first, int64_t part_count) {
            for (int64_t k = 0; k < levels; k += kGroup)
              for (int64_t c = 0; c < row; c += lanes)
                input_backward(pixels + first * row + c, part_count, gate.data() + k * tile + first,
                               grad.data() + k * tile + first, cell(cell_row.data(), at, k) + c,
                               gate_weight.data() + k * row + c, k == 0, result + first * row + c, sums + k * row + c);
          });
          finish_tile<S>(p.grad_input, p.channels, n, h, w, count, result);
        });
      }
    });
    for (int64_t k = 0; k < p.levels; ++k) {
      reduction.template store_totals<S>(k * row, p.channels, static_cast<S*>(p.grad_gate_weight) + k * p.channels);
      reduction.template store_totals<S>(levels * row + k * lanes, 1, static_cast<S*>(p.grad_gate_bias) + k);
    }
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

  // grad, the dot products of x with the gradient of g_k x, becomes the gradient of the logits.
  void gate_backward(int64_t n, int64_t h, int64_t w, int64_t count, const A* gate, A* grad, A* bias_sums) const {
    const Buffer<A> given(tile);
    fill_pixels(grad + p.levels * tile, (levels - p.levels) * tile, A(0));  // an infinite x makes these NaN
    for (int64_t k = 0; k < p.levels; ++k) {
      load_optional_scalars<S>(level(p.grad_gate, k), n, h, w, count, given.data());
      A total = 0;
      for (int64_t i = 0; i < count; ++i) {
        const A g = gate[k * tile + i];
        A& value = grad[k * tile + i];
        value = (value + given.data()[i]) * g * (A(1) - g);
        total += value;
      }
      bias_sums[k * lanes] += total;
    }
  }

  // One vector of channels of a part of a tile that lies in one cell, for a group of levels.
  void input_backward(const A* x, int64_t count, const A* gate, const A* grad, const A* cell_grad, const A* weight,
                      bool first_group, A* u, A* sums) const {
    Vec<A> from_cell[kGroup], from_gate[kGroup], sum[kGroup];
    for (int64_t k = 0; k < kGroup; ++k) {
      from_cell[k] = load(cell_grad + k * row);
      from_gate[k] = load(weight + k * row);
      sum[k] = load(sums + k * row);
    }
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> value = load(x + i * row);
      Vec<A> result = first_group ? Vec<A>{} : load(u + i * row);
      for (int64_t k = 0; k < kGroup; ++k) {
        result += gate[k * tile + i] * from_cell[k] + grad[k * tile + i] * from_gate[k];
        sum[k] += grad[k * tile + i] * value;
      }
      store(u + i * row, result);
    }
    for (int64_t k = 0; k < kGroup; ++k) store(sums + k * row, sum[k]);
  }
};

inline void gated_pyramid_pool(const Call& call, const GatedPyramidPoolParams& params) {
  with_storage_type(params.dtype, [&](auto type) { GatedPyramidPool<decltype(type)>(call, params).forward(); });
}

inline void gated_pyramid_pool_backward(const Call& call, const GatedPyramidPoolParams& params) {
  with_storage_type(params.dtype, [&](auto type) { GatedPyramidPool<decltype(type)>(call, params).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
