// gated_split, forward and backward. Included once per instruction set.
//
//   g_k = sigmoid(act(rho_k . x + b_k)),  z_k = g_k (W_k x) with each channel's moments,  copy_k = g_k x
//
// A tile of x is read once for all of it: the rho are further rows of W. Backward reads x, the gates and the gradients
// once; the gate's gradient is x . (W_k^T dz_k), or x . d(copy_k).
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S>
struct GatedSplit {
  using A = Accumulate<S>;
  static constexpr int64_t lanes = kLanes<A>;

  const Call& call;
  const GatedSplitParams& p;
  const int64_t row;         // padded channels of x
  const int64_t gate_lanes;  // padded gates
  const int64_t columns;     // of the product: every projection's channels, padded, then the gates
  const Buffer<A> by_row;    // (C, columns): W and rho, transposed
  const Buffer<A> weight;    // (sum of out_channels, row)
  const Buffer<A> gate_weight, gate_bias;

  GatedSplit(const Call& c, const GatedSplitParams& params)
      : call(c),
        p(params),
        row(padded<A>(p.channels)),
        gate_lanes(padded<A>(p.gates)),
        columns(column_of(params, p.projections) + gate_lanes),
        by_row(p.channels * columns),
        weight(most(1, rows_of(params, p.projections)) * row),
        gate_weight(p.gates * row),
        gate_bias(gate_lanes) {
    fill_pixels(by_row.data(), p.channels * columns, A(0));
    for (int64_t k = 0; k < p.projections; ++k)
      for (int64_t m = 0; m < p.out_channels[k]; ++m) {
        A* to = weight.data() + (rows_of(p, k) + m) * row;
        fill_row(p.weight, rows_of(p, k) + m, to);
        for (int64_t c = 0; c < p.channels; ++c) by_row.data()[c * columns + column_of(p, k) + m] = to[c];
      }
    for (int64_t k = 0; k < p.gates; ++k) {
      A* to = gate_weight.data() + k * row;
      fill_row(p.gate_weight, k, to);
      for (int64_t c = 0; c < p.channels; ++c) by_row.data()[c * columns + gate_column() + k] = to[c];
    }
    fill_padded<S>(p.gate_bias, p.gate_bias.stride_n, p.gate_bias.data ? p.gates : 0, gate_bias.data(), gate_lanes);
  }

  void fill_row(TensorView filters, int64_t m, A* to) const {
    filters.data = mutable_pixel<S>(filters, m, 0, 0);
    fill_padded<S>(filters, filters.stride_c, p.channels, to);
  }

  // Rows of W before projection k, and columns of the product.
  static int64_t rows_of(const GatedSplitParams& p, int64_t k) {
    int64_t rows = 0;
    for (int64_t i = 0; i < k; ++i) rows += p.out_channels[i];
    return rows;
  }
  static int64_t column_of(const GatedSplitParams& p, int64_t k) {
    int64_t column = 0;
    for (int64_t i = 0; i < k; ++i) column += padded<A>(p.out_channels[i]);
    return column;
  }
  int64_t gate_column() const { return columns - gate_lanes; }

  static TensorView level(TensorView gate, int64_t k) {
    if (gate.data) gate.data = static_cast<S*>(gate.data) + k * gate.stride_c;
    return gate;
  }

  Pixels pixels() const {
    bool collapse = collapsible(p.input, p.height, p.width) && collapsible(p.gate, p.height, p.width) &&
                    collapsible(p.grad_gate, p.height, p.width);
    for (int64_t k = 0; k < p.projections; ++k) collapse = collapse && collapsible(p.projected[k], p.height, p.width);
    for (int64_t k = 0; k < p.copies; ++k) collapse = collapse && collapsible(p.gated[k], p.height, p.width);
    return Pixels(p.batch, p.height, p.width, collapse, most(32, tile_pixels<A>(most(p.channels, columns), 32)));
  }

  int64_t moments_before(int64_t k) const { return 2 * column_of(p, k) + k * lanes; }

  void forward() const {
    const Pixels runs = pixels();
    Reduction<A> reduction(runs.tasks(), most(1, moments_before(p.projections)));
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Buffer<A> tile(runs.chunk * row), product(runs.chunk * columns), scaled(runs.chunk * most(row, columns));
      const Buffer<A> gate(p.gates * padded<A>(runs.chunk));
      runs.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        const A* x = tile_of<S>(p.input, p.channels, n, h, w, count, tile.data());
        gemm(Gemm<A>{count, columns, p.channels, x, row, 1, by_row.data(), columns, product.data(), columns, false});
        for (int64_t k = 0; k < p.gates; ++k) {
          A* g = gate.data() + k * padded<A>(runs.chunk);
          for (int64_t i = 0; i < count; ++i) {
            const A logit = product.data()[i * columns + gate_column() + k] + gate_bias.data()[k];
            g[i] = p.relu && logit < 0 ? A(0) : logit;
          }
          gate_logits(g, A(0), count);
          store_channels(mutable_pixel<S>(level(p.gate, k), n, h, w), count, g);  // forward's gate is contiguous
        }
        for (int64_t k = 0; k < p.projections; ++k) {
          const A* g = gate.data() + k * padded<A>(runs.chunk);
          const int64_t out_row = padded<A>(p.out_channels[k]);
          A* z = tile_for<S>(p.projected[k], p.out_channels[k], n, h, w, scaled.data());
          for (int64_t i = 0; i < count; ++i)
            for (int64_t c = 0; c < out_row; c += lanes)
              store(z + i * out_row + c, g[i] * load(product.data() + i * columns + column_of(p, k) + c));
          Moments<A>(sums + moments_before(k), out_row).add_pixels(z, count);
          finish_tile<S>(p.projected[k], p.out_channels[k], n, h, w, count, z);
        }
        for (int64_t k = 0; k < p.copies; ++k) {
          const A* g = gate.data() + (p.projections + k) * padded<A>(runs.chunk);
          A* to = tile_for<S>(p.gated[k], p.channels, n, h, w, scaled.data());
          scale_pixels(x, g, row, count, to);
          finish_tile<S>(p.gated[k], p.channels, n, h, w, count, to);
        }
      });
    });
    for (int64_t k = 0; k < p.projections; ++k) store_moments(reduction, k);
  }

  void store_moments(const Reduction<A>& reduction, int64_t k) const {
    const int64_t out_row = padded<A>(p.out_channels[k]), first = rows_of(p, k);
    const Buffer<A> values(Moments<A>::size(out_row));
    fill_pixels(values.data(), Moments<A>::size(out_row), A(0));
    const Moments<A> total(values.data(), out_row);
    for (int64_t s = 0; s < reduction.slots(); ++s)
      total.add(Moments<A>(reduction.slot(s) + moments_before(k), out_row));
    for (int64_t c = 0; c < p.out_channels[k]; ++c) {
      static_cast<A*>(p.mean)[first + c] = *total.count > 0 ? total.mean[c] : A(NAN);  // as torch.var_mean of nothing
      static_cast<A*>(p.var)[first + c] = *total.count > 0 ? total.m2[c] / *total.count : A(NAN);
    }
  }

  // Sums of the reduction: of every gate's rho, of the biases, of W.
  int64_t bias_sums() const { return p.gates * row; }
  int64_t weight_sums() const { return bias_sums() + gate_lanes; }

  void backward() const {
    const Pixels runs = pixels();
    const int64_t rows = rows_of(p, p.projections);
    Reduction<A> reduction(runs.tasks(), weight_sums() + rows * row);
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      int64_t widest = row;
      for (int64_t k = 0; k < p.projections; ++k) widest = most(widest, padded<A>(p.out_channels[k]));
      const Buffer<A> tile(runs.chunk * row), total(runs.chunk * row), part(runs.chunk * row);
      const Buffer<A> grad(runs.chunk * widest), gate(padded<A>(runs.chunk)), dots(padded<A>(runs.chunk));
      const Buffer<A> logit(padded<A>(runs.chunk));
      runs.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        const A* x = tile_of<S>(p.input, p.channels, n, h, w, count, tile.data());
        A* sum = tile_for<S>(p.grad_input, p.channels, n, h, w, total.data());
        for (int64_t k = 0; k < p.gates; ++k) {
          const A* u = nullptr;  // the gradient of g_k x
          load_scalars<S>(level(p.gate, k), n, h, w, count, gate.data());
          if (k < p.projections) {
            const int64_t channels = p.out_channels[k], out_row = padded<A>(channels);
            const A* filters = weight.data() + rows_of(p, k) * row;
            load_pixels<S>(p.projected[k], channels, n, h, w, count, grad.data());
            gemm(Gemm<A>{count, row, channels, grad.data(), out_row, 1, filters, row, part.data(), row, false});
            scale_pixels(grad.data(), gate.data(), out_row, count, grad.data());
            A* to = sums + weight_sums() + rows_of(p, k) * row;
            gemm(Gemm<A>{channels, row, count, grad.data(), 1, out_row, x, row, to, row, true});
            u = part.data();
          } else if (k < p.projections + p.copies) {
            u = tile_of<S>(p.gated[k - p.projections], p.channels, n, h, w, count, grad.data());
          }
          load_optional_scalars<S>(level(p.grad_gate, k), n, h, w, count, logit.data());
          if (u) {
            dot_pixels(u, x, row, row, count, dots.data());
          } else {
            for (int64_t i = 0; i < count; ++i) dots.data()[i] = 0;
          }
          A bias = 0;
          for (int64_t i = 0; i < count; ++i) {
            const A g = gate.data()[i];
            const A value = (logit.data()[i] + dots.data()[i]) * g * (A(1) - g);
            logit.data()[i] = p.relu && !(g > A(0.5)) ? A(0) : value;  // sigmoid(0): the ReLU was closed
            bias += logit.data()[i];
          }
          sums[bias_sums() + k] += bias;
          add_gate(k, x, u, gate.data(), logit.data(), count, sums + k * row, sum);
        }
        finish_tile<S>(p.grad_input, p.channels, n, h, w, count, sum);
      });
    });
    for (int64_t k = 0; k < p.gates; ++k)
      reduction.template store_totals<S>(k * row, p.channels, static_cast<S*>(p.grad_gate_weight) + k * p.channels);
    reduction.template store_totals<S>(bias_sums(), p.gates, p.grad_gate_bias);
    if (rows == 0) return;
    parallel_for(call, rows, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        reduction.template store_totals<S>(weight_sums() + m * row, p.channels,
                                           static_cast<S*>(p.grad_weight) + m * p.channels);
    });
  }

  // sum (+)= g_k u + dlogit_k rho_k, which the first gate starts; and dlogit_k x to the sums of rho_k.
  void add_gate(int64_t k, const A* x, const A* u, const A* gate, const A* logit, int64_t count, A* sums,
                A* sum) const {
    for (int64_t c = 0; c < row; c += lanes) {
      const Vec<A> rho = load(gate_weight.data() + k * row + c);
      Vec<A> total = load(sums + c);
      for (int64_t i = 0; i < count; ++i) {
        total += logit[i] * load(x + i * row + c);
        Vec<A> value = logit[i] * rho;
        if (u) value += gate[i] * load(u + i * row + c);
        if (k > 0) value += load(sum + i * row + c);
        store(sum + i * row + c, value);
      }
      store(sums + c, total);
    }
  }
};

inline void gated_split(const Call& call, const GatedSplitParams& params) {
  with_storage_type(params.dtype, [&](auto type) { GatedSplit<decltype(type)>(call, params).forward(); });
}

inline void gated_split_backward(const Call& call, const GatedSplitParams& params) {
  with_storage_type(params.dtype, [&](auto type) { GatedSplit<decltype(type)>(call, params).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
