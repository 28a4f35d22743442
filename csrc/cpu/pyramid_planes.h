// gated_pyramid_pool over NCHW memory without transposing it: a few rows of all planes at a time, which are read twice,
// the second time from the caches. Every plane's rows lie in sequence. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S, int kGroup>
struct PyramidPlanes {
  using A = Accumulate<S>;
  using Cells = PyramidCells<S, kGroup>;
  static constexpr int64_t lanes = kLanes<A>;

  const Cells& cells;
  const GatedPyramidPoolParams& p;
  const int64_t width, most_rows, step;  // of a line in whole vectors; of a band; values of a band and level

  explicit PyramidPlanes(const Cells& of)
      : cells(of), p(of.p), width(padded<A>(p.width)), most_rows(rows_of_bands(of.p)), step(most_rows * width) {}

  // A few rows of all planes, in one row of cells.
  struct Band {
    int64_t n, h, rows;
  };

  // 4 MiB, a core's share of an L3. Four levels of 2048 x 64 x 128 pixels, float32: 8.7 ms, with 2 MiB 10.2, with 8 MiB
  // 8.0.
  static int64_t rows_of_bands(const GatedPyramidPoolParams& p) {
    int64_t tallest = 1;
    for (int64_t i = 0; i < p.row_cells; ++i) tallest = most(tallest, p.row_cuts[i + 1] - p.row_cuts[i]);
    return least(tallest, most(1, (int64_t{4} << 20) / (p.channels * p.width * static_cast<int64_t>(sizeof(S)))));
  }

  template <class F>
  void for_bands(int64_t n, int64_t cell_row, const F& f) const {
    const int64_t end = p.row_cuts[cell_row + 1];
    for (int64_t h = p.row_cuts[cell_row]; h < end; h += most_rows) f(Band{n, h, least(most_rows, end - h)});
  }

  const S* line(const TensorView& t, const Band& band, int64_t c) const {
    return pixel<S>(t, band.n, band.h, 0) + c * t.stride_c;
  }

  // dots[k][row][w] += sum of weight(c, k, w, valid) x over kChannels channels, for a group of levels.
  template <int kChannels, class Weight>
  void add_rows_of_products(const Band& band, int64_t c, const Weight& weight, A* dots) const {
    for (int64_t r = 0; r < band.rows; ++r)
      add_products<kGroup, kChannels>(line(p.input, band, c) + r * p.input.stride_h, p.input.stride_c, p.width, weight,
                                      dots + r * width, step);
  }

  template <int kChannels>
  struct Weights {
    Vec<A> of[kGroup][kChannels];
    template <class Valid>
    Vec<A> operator()(int64_t c, int64_t k, int64_t, Valid) const {
      return of[k][c];
    }
  };

  void forward(int64_t begin, int64_t end, A* all_cells) const {
    const Buffer<A> gate(cells.levels * step), planes(cells.levels * lanes * width), tile(width * lanes);
    for (int64_t task = begin; task < end; ++task) {
      A* cell_row = all_cells + task * cells.cell_row_size();
      for_bands(task / p.row_cells, task % p.row_cells, [&](const Band& band) {
        fill_pixels(gate.data(), cells.levels * step, A(0));
        for (int64_t k = 0; k < cells.levels; k += kGroup) {
          for_channels(0, p.channels, [&](int64_t c, auto channels) {
            const A* from = cells.gate_weight.data() + k * cells.row + c;
            Weights<channels> weights;
            for (int64_t l = 0; l < kGroup; ++l)
              for (int64_t i = 0; i < channels; ++i) weights.of[l][i] = Vec<A>{} + from[l * cells.row + i];
            add_rows_of_products<channels>(band, c, weights, gate.data() + k * step);
          });
        }
        for (int64_t r = 0; r < band.rows; ++r)
          cells.make_gates(band.n, band.h + r, 0, p.width, gate.data() + r * width, step);
        for (int64_t c = 0; c < p.channels; c += lanes) {
          const int64_t present = least(lanes, p.channels - c);
          for (int64_t i = 0; i < present; ++i)
            for (int64_t k = 0; k < cells.levels; k += kGroup)
              add_rows(band, c + i, gate.data() + k * step, planes.data() + (k * lanes + i) * width);
          for (int64_t k = 0; k < cells.levels; ++k) {
            load_pixels<A>({planes.data() + k * lanes * width, 0, width, 0, 1}, present, 0, 0, 0, p.width, tile.data());
            for (int64_t j = 0; j < p.col_cells; ++j)
              add_pixels(tile.data() + p.col_cuts[j] * lanes, lanes, p.col_cuts[j + 1] - p.col_cuts[j],
                         cells.cell(cell_row, j, k) + c);
          }
        }
      });
    }
  }

  // The sums of g_k x over the band's rows, for a group of levels.
  void add_rows(const Band& band, int64_t c, const A* gate, A* sums) const {
    const S* x = line(p.input, band, c);
    const int64_t rows = band.rows, row_step = p.input.stride_h, plane = p.input.stride_c, gate_row = width,
                  next = step;
    for_parts<A>(p.width, [=](int64_t w, auto valid) {
      Vec<A> sum[kGroup] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const S* at = x + r * row_step + w;
        const Vec<A> value = load_valid(at, valid);
        __builtin_prefetch(at + 2 * plane);
        for (int64_t k = 0; k < kGroup; ++k) sum[k] += load(gate + k * next + r * gate_row + w) * value;
      }
      for (int64_t k = 0; k < kGroup; ++k) store(sums + k * lanes * gate_row + w, sum[k]);
    });
  }

  // The gradients of g_k x for the pixels of a row and for as many channels as a vector has lanes, as lines: [level]
  // [channel][w].
  void spread(A* cell_row, int64_t c, A* tile, A* lines) const {
    for (int64_t k = 0; k < cells.levels; ++k, lines += lanes * width) {
      for (int64_t j = 0; j < p.col_cells; ++j) {
        const Vec<A> value = load(cells.cell(cell_row, j, k) + c);
        for (int64_t w = p.col_cuts[j]; w < p.col_cuts[j + 1]; ++w) store(tile + w * lanes, value);
      }
      store_pixels<A>({lines, 0, width, 0, 1}, lanes, 0, 0, 0, p.width, tile);
    }
  }

  void backward(int64_t begin, int64_t end, const Map<A>& grad_pooled, A* sums) const {
    const Buffer<A> cell_row(cells.cell_row_size()), gate(cells.levels * step), grad(cells.levels * step), u(step),
        tile(width * lanes), lines(cells.levels * lanes * width), vectors(cells.levels * lanes * lanes);
    fill_pixels(vectors.data(), cells.levels * lanes * lanes, A(0));
    for (int64_t task = begin; task < end; ++task) {
      cells.spread_windows(grad_pooled, task / p.row_cells, task % p.row_cells, cell_row.data());
      for_bands(task / p.row_cells, task % p.row_cells, [&](const Band& band) {
        fill_pixels(gate.data(), cells.levels * step, A(0));
        fill_pixels(grad.data(), cells.levels * step, A(0));
        for (int64_t first = 0; first < p.channels; first += lanes) {
          spread(cell_row.data(), first, tile.data(), lines.data());
          for_channels(first, least(p.channels, first + lanes), [&](int64_t c, auto channels) {
            for (int64_t k = 0; k < cells.levels; k += kGroup) {
              const A* from = lines.data() + (k * lanes + c - first) * width;
              const int64_t size = width;
              add_rows_of_products<channels>(
                  band, c,
                  [=](int64_t i, int64_t l, int64_t w, auto) { return load(from + (l * lanes + i) * size + w); },
                  grad.data() + k * step);
            }
          });
        }
        for (int64_t r = 0; r < band.rows; ++r) {
          A *gates = gate.data() + r * width, *grads = grad.data() + r * width;
          cells.load_gates(band.n, band.h + r, 0, p.width, gates, step);
          cells.gate_backward(band.n, band.h + r, 0, p.width, gates, grads, step, sums + cells.levels * cells.row);
          for (int64_t k = 0; k < p.levels; ++k)  // the last vector's sums are of all of its lanes
            for (int64_t w = p.width; w < width; ++w) grads[k * step + w] = 0;
        }
        for (int64_t first = 0; first < p.channels; first += lanes) {
          spread(cell_row.data(), first, tile.data(), lines.data());
          const int64_t present = least(lanes, p.channels - first);
          for (int64_t i = 0; i < present; ++i)
            for (int64_t k = 0; k < cells.levels; k += kGroup)
              input_backward(band, first + i, k, gate.data() + k * step, grad.data() + k * step,
                             lines.data() + (k * lanes + i) * width, u.data(),
                             vectors.data() + (k * lanes + i) * lanes);
          for (int64_t k = 0; k < p.levels; ++k) {
            A* at = sums + k * cells.row + first;
            store(at, load(at) + sum_each(vectors.data() + k * lanes * lanes));
          }
        }
      });
    }
  }

  // The gradient of one plane's input from a group of levels, in `u` until all groups are there. Makes a vector of sums
  // for each level.
  void input_backward(const Band& band, int64_t c, int64_t k, const A* gate, const A* grad, const A* lines, A* u,
                      A* sums) const {
    const bool first = k == 0, last = k + kGroup == cells.levels;
    const S* x = line(p.input, band, c);
    S* to = mutable_pixel<S>(p.grad_input, band.n, band.h, 0) + c * p.grad_input.stride_c;
    const A* gate_weight = cells.gate_weight.data() + k * cells.row + c;
    const int64_t rows = band.rows, in_row = p.input.stride_h, in_plane = p.input.stride_c, line_size = width;
    const int64_t out_row = p.grad_input.stride_h, out_plane = p.grad_input.stride_c, next = step;
    Vec<A> sum[kGroup] = {}, weight[kGroup];
    for (int64_t l = 0; l < kGroup; ++l) weight[l] = Vec<A>{} + gate_weight[l * cells.row];
    for_parts<A>(p.width, [=, &sum](int64_t w, auto valid) {
      Vec<A> from_cell[kGroup];
      for (int64_t l = 0; l < kGroup; ++l) from_cell[l] = load(lines + l * lanes * line_size + w);
      for (int64_t r = 0; r < rows; ++r) {
        const S* at = x + r * in_row + w;
        S* result_at = to + r * out_row + w;
        const int64_t i = r * line_size + w;
        __builtin_prefetch(at + 2 * in_plane);
        __builtin_prefetch(result_at + 2 * out_plane, 1);
        const Vec<A> value = load_valid(at, valid);
        Vec<A> result = first ? Vec<A>{} : load(u + i);
        for (int64_t l = 0; l < kGroup; ++l) {
          const Vec<A> from_gate = load(grad + l * next + i);
          result += load(gate + l * next + i) * from_cell[l] + from_gate * weight[l];
          sum[l] += from_gate * value;
        }
        if (last) {
          store_valid(result_at, result, valid);
        } else {
          store(u + i, result);
        }
      }
    });
    for (int64_t l = 0; l < kGroup; ++l) store(sums + l * lanes * lanes, sum[l]);
  }
};

}  // namespace gsto::cpu::GSTO_ISA
