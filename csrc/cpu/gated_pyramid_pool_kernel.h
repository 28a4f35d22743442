// gated_pyramid_pool, forward and backward. Included once per instruction set.
//
//   g_k = sigmoid(rho_k . x + b_k),  pooled_k = adaptive average pooling of g_k x to bins_k x bins_k, for K levels
//
// The input is read once, row of cells by row of cells (pyramid.h). Forward sums g_k x over each cell, then the
// cells of each window. Backward goes the other way: the gradient of g_k x is the same for all pixels of a cell.
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S, int kGroup>
struct GatedPyramidPool : PyramidCells<S, kGroup> {
  using A = Accumulate<S>;
  using PyramidCells<S, kGroup>::call, PyramidCells<S, kGroup>::p;
  using PyramidCells<S, kGroup>::row, PyramidCells<S, kGroup>::levels, PyramidCells<S, kGroup>::windows;
  static constexpr int64_t lanes = kLanes<A>;
  static constexpr int64_t kPixels = lanes / kGroup;  // of a block of dot products, which is one vector

  const int64_t tile;  // pixels

  GatedPyramidPool(const Call& c, const GatedPyramidPoolParams& params)
      : PyramidCells<S, kGroup>(c, params), tile(tile_pixels<A>(params.channels, 256)) {}

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

  // dots[k * tile + i] = x[i] . vectors[k] for a group of levels. Tiles, or memory whose pixels are whole vectors; few
  // pixels at a time, as they may lie a multiple of L1's size apart.
  template <class X>
  void dot_levels(const X* x, int64_t x_row, int64_t count, const A* vectors, A* dots) const {
    constexpr int64_t few = least(4, kPixels);
    for (int64_t i = 0; i < count; i += kPixels) {
      const X* pixel[kPixels];
      for (int64_t v = 0; v < kPixels; ++v) pixel[v] = x + least(i + v, count - 1) * x_row;
      Vec<A> sums[lanes] = {};
      for (int64_t first = 0; first < kPixels; first += few) {
        for (int64_t c = 0; c < row; c += lanes) {
          for (int64_t k = 0; k < kGroup; ++k) {
            const Vec<A> vector = load(vectors + k * row + c);
            for (int64_t v = first; v < first + few; ++v) sums[k * kPixels + v] += vector * load(pixel[v] + c);
          }
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
  template <int kVectors, class X>
  void add_gated(const X* x, int64_t x_row, int64_t count, const A* gate, A* sums) const {
    Vec<A> sum[kGroup][kVectors];
    for (int64_t k = 0; k < kGroup; ++k)
      for (int v = 0; v < kVectors; ++v) sum[k][v] = load(sums + k * row + v * lanes);
    for (int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> value = load(x + i * x_row + v * lanes);
        for (int64_t k = 0; k < kGroup; ++k) sum[k][v] += gate[k * tile + i] * value;
      }
    }
    for (int64_t k = 0; k < kGroup; ++k)
      for (int v = 0; v < kVectors; ++v) store(sums + k * row + v * lanes, sum[k][v]);
  }

  void forward() const {
    const Buffer<A> cells(p.batch * p.row_cells * this->cell_row_size());
    parallel_for(call, p.batch * p.row_cells, [&](int64_t begin, int64_t end) {
      fill_pixels(cells.data() + begin * this->cell_row_size(), (end - begin) * this->cell_row_size(), A(0));
      if (planar(p.input)) {
        PyramidPlanes<S, kGroup>(*this).forward(begin, end, cells.data());
      } else {
        forward_tiles(begin, end, cells.data());
      }
    });
    parallel_for(call, p.batch * windows, [&](int64_t begin, int64_t end) {
      const Buffer<A> total(row);
      for (int64_t task = begin; task < end; ++task)
        this->sum_window(cells.data(), task / windows, task % windows, total);
    });
  }

  // Rows of cells begin .. end - 1.
  void forward_tiles(int64_t begin, int64_t end, A* cells) const {
    const bool runs = is_run<S>(p.input, p.channels);
    const Buffer<A> x(runs ? 0 : tile * row), gate(levels * tile);
    for (int64_t task = begin; task < end; ++task) {
      A* cell_row = cells + task * this->cell_row_size();
      const int64_t n = task / p.row_cells;
      visit(task % p.row_cells, [&](int64_t h, int64_t w, int64_t count, int64_t j) {
        const auto work = [&](const auto* pixels, int64_t pixel_row) {
          for (int64_t k = 0; k < levels; k += kGroup)
            dot_levels(pixels, pixel_row, count, this->gate_weight.data() + k * row, gate.data() + k * tile);
          this->make_gates(n, h, w, count, gate.data(), tile);
          split(w, count, j, [&](int64_t at, int64_t first, int64_t part_count) {
            const auto* part = pixels + first * pixel_row;
            for (int64_t k = 0; k < levels; k += kGroup) {
              const A* part_gate = gate.data() + k * tile + first;
              A* sums = this->cell(cell_row, at, k);
              constexpr int kVectors = 8 / kGroup;
              int64_t c = 0;
              for (; c + kVectors * lanes <= row; c += kVectors * lanes)
                add_gated<kVectors>(part + c, pixel_row, part_count, part_gate, sums + c);
              for (; c < row; c += lanes) add_gated<1>(part + c, pixel_row, part_count, part_gate, sums + c);
            }
          });
        };
        if (runs) {
          work(pixel<S>(p.input, n, h, w), p.input.stride_w);
        } else {
          load_pixels<S>(p.input, p.channels, n, h, w, count, x.data());
          work(static_cast<const A*>(x.data()), row);
        }
      });
    }
  }

  void backward() const {
    const Map<A> grad_pooled(p.batch, windows, p.channels);
    this->load_windows(grad_pooled);
    Reduction<A> reduction(p.batch * p.row_cells, levels * (row + lanes));
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      if (planar(p.input) && planar(p.grad_input)) {
        PyramidPlanes<S, kGroup>(*this).backward(begin, end, grad_pooled, sums);
      } else {
        backward_tiles(begin, end, grad_pooled, sums);
      }
    });
    for (int64_t k = 0; k < p.levels; ++k) {
      reduction.template store_totals<S>(k * row, p.channels, static_cast<S*>(p.grad_gate_weight) + k * p.channels);
      reduction.template store_totals<S>(levels * row + k * lanes, 1, static_cast<S*>(p.grad_gate_bias) + k);
    }
  }

  void backward_tiles(int64_t begin, int64_t end, const Map<A>& grad_pooled, A* sums) const {
    const Buffer<A> cell_row(this->cell_row_size()), x(tile * row), u(tile * row), gate(levels * tile),
        grad(levels * tile);
    fill_pixels(gate.data(), levels * tile, A(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.row_cells;
      this->spread_windows(grad_pooled, n, task % p.row_cells, cell_row.data());
      visit(task % p.row_cells, [&](int64_t h, int64_t w, int64_t count, int64_t j) {
        const A* pixels = tile_of<S>(p.input, p.channels, n, h, w, count, x.data());
        A* result = tile_for<S>(p.grad_input, p.channels, n, h, w, u.data());
        this->load_gates(n, h, w, count, gate.data(), tile);
        split(w, count, j, [&](int64_t at, int64_t first, int64_t part_count) {
          for (int64_t k = 0; k < levels; k += kGroup)
            dot_levels(pixels + first * row, row, part_count, this->cell(cell_row.data(), at, k),
                       grad.data() + k * tile + first);
        });
        this->gate_backward(n, h, w, count, gate.data(), grad.data(), tile, sums + levels * row);
        split(w, count, j, [&](int64_t at, int64_t first, int64_t part_count) {
          for (int64_t k = 0; k < levels; k += kGroup)
            for (int64_t c = 0; c < row; c += lanes)
              input_backward(pixels + first * row + c, part_count, gate.data() + k * tile + first,
                             grad.data() + k * tile + first, this->cell(cell_row.data(), at, k) + c,
                             this->gate_weight.data() + k * row + c, k == 0, result + first * row + c,
                             sums + k * row + c);
        });
        finish_tile<S>(p.grad_input, p.channels, n, h, w, count, result);
      });
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

// Calls f with the operator for this dtype and number of levels: one level is not filled up to four.
template <class F>
inline void with_pyramid(const Call& call, const GatedPyramidPoolParams& params, const F& f) {
  with_storage_type(params.dtype, [&](auto type) {
    using S = decltype(type);
    if (params.levels == 1) return f(GatedPyramidPool<S, 1>(call, params));
    f(GatedPyramidPool < S, kLanes<Accumulate<S>><4 ? kLanes<Accumulate<S>> : 4>(call, params));
  });
}

inline void gated_pyramid_pool(const Call& call, const GatedPyramidPoolParams& params) {
  with_pyramid(call, params, [](const auto& pool) { pool.forward(); });
}

inline void gated_pyramid_pool_backward(const Call& call, const GatedPyramidPoolParams& params) {
  with_pyramid(call, params, [](const auto& pool) { pool.backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
