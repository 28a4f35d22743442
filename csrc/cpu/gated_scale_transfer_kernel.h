// gated_scale_transfer, forward and backward. Included once per instruction set.
//
//   g = sigmoid(rho . x + b),  output = R (W (g x) + bias)
//
// R is separable resampling (cpu/resample.h). Its rows sum to one, so it commutes with the projection W and the bias,
// and W runs where there are fewer pixels: after R when R shrinks the map ("pool first"), before R otherwise ("project
// first").
#pragma once

namespace gsto::cpu::GSTO_ISA {

// Where only the gate is applied to NCHW memory: pixels per task, and vectors of pixels taken from each plane at once.
// Runs of 512 bytes took half the time of runs of 256 (48 x 128 x 256, float32, in L3).
constexpr int64_t kPlaneChunk = 1024;
constexpr int kPlaneVectors = 512 / kVectorBytes;

template <class S>
struct GatedScaleTransfer {
  using A = Accumulate<S>;

  const Call& call;
  const GatedScaleTransferParams& p;
  const Operands<S> operands;
  const bool has_weight, identity, pool_first;
  const int64_t row, out_row;  // padded channels

  explicit GatedScaleTransfer(const Call& c)
      : call(c),
        p(c.params),
        operands(c.params),
        has_weight(c.params.weight.data != nullptr),
        identity(c.rows.identity && c.cols.identity),
        pool_first(c.rows.out * c.cols.out < c.rows.in * c.cols.in),
        row(padded<A>(p.channels)),
        out_row(padded<A>(p.out_channels)) {}

  // x[p] becomes g[p] * x[p].
  void gate_tile(A* tile, int64_t count, A* gate) const {
    gate_pixels(tile, operands.gate_weight.data(), operands.gate_bias, row, count, gate);
  }

  void store_gate(int64_t n, int64_t h, int64_t w, int64_t count, const A* gate) const {
    store_channels(mutable_pixel<S>(p.gate, n, h, w), count, gate);  // forward's gate is contiguous
  }

  void project_forward(const A* tile, int64_t count, A* result) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < out_row; c += kLanes<A>) store(result + i * out_row + c, load(operands.bias.data() + c));
    project(tile, count, p.channels, operands.weight_by_row.data(), p.out_channels, result);
  }

  void forward() const {
    if (pool_first) {
      forward_pool_first();
    } else if (identity && !has_weight && planar(p.input) && planar(p.output)) {
      forward_planes();
    } else if (identity) {
      forward_project(nullptr);
    } else {
      const Map<A> projected(p.batch, p.in_height * p.in_width, p.out_channels);
      forward_project(&projected);
      const auto source = [&](int64_t n, int64_t h, int64_t w, int64_t, A*) {
        return static_cast<const A*>(projected.at(n, h * p.in_width + w));
      };
      resample(call.rows, call.cols, p.out_channels, source,
               [&](int64_t n, int64_t h, int64_t w, int64_t count, const A* pixels) {
                 store_pixels<S>(p.output, p.out_channels, n, h, w, count, pixels);
               });
    }
  }

  static bool planar(const TensorView& t) { return t.stride_w == 1 && t.stride_c != 1; }

  // The gate alone, NCHW: calls f(n, h, w, vectors as a constant, pixels) for groups of pixels.
  template <class F>
  static void visit_planes(const Pixels& pixels, int64_t begin, int64_t end, const F& f) {
    constexpr int64_t lanes = kLanes<A>, group = kPlaneVectors * lanes;
    pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
      int64_t i = 0;
      for (; i + group <= count; i += group) f(n, h, w + i, std::integral_constant<int, kPlaneVectors>(), group);
      for (; i < count; i += lanes) f(n, h, w + i, std::integral_constant<int, 1>(), least(lanes, count - i));
    });
  }

  void forward_planes() const {
    const Pixels pixels(p.batch, p.in_height, p.in_width, collapsible(p.input, p.in_height, p.in_width), kPlaneChunk);
    parallel_for(call, pixels.tasks(), [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(kPlaneVectors * kLanes<A> * p.channels);
      visit_planes(pixels, begin, end, [&](int64_t n, int64_t h, int64_t w, auto vectors, int64_t valid) {
        gate_planes<S, decltype(vectors)::value>(pixel<S>(p.input, n, h, w), p.input.stride_c,
                                                 operands.gate_weight.data(), operands.gate_bias, p.channels, valid,
                                                 scratch.data(), mutable_pixel<S>(p.gate, n, h, w),
                                                 mutable_pixel<S>(p.output, n, h, w), p.output.stride_c);
      });
    });
  }

  // Gate and projection, to `projected` or, without resampling, to the output.
  void forward_project(const Map<A>* projected) const {
    const bool collapse = collapsible(p.input, p.in_height, p.in_width);
    const Pixels pixels(p.batch, p.in_height, p.in_width, collapse, pixels_per_tile());
    parallel_for(call, pixels.tasks(), [&](int64_t begin, int64_t end) {
      const Buffer<A> tile(pixels.chunk * row), product(pixels.chunk * out_row), gate(padded<A>(pixels.chunk));
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        A* result = projected ? projected->at(n, h * p.in_width + w) : product.data();
        A* x = has_weight ? tile.data() : result;
        load_pixels<S>(p.input, p.channels, n, h, w, count, x);
        gate_tile(x, count, gate.data());
        store_gate(n, h, w, count, gate.data());
        if (has_weight) project_forward(x, count, result);
        if (!projected) store_pixels<S>(p.output, p.out_channels, n, h, w, count, result);
      });
    });
  }

  // Without a product the tile should stay in L1.
  int64_t pixels_per_tile() const {
    return has_weight ? most(32, tile_pixels<A>(most(p.channels, p.out_channels), 64)) : tile_pixels<A>(p.channels, 16);
  }

  // Calls consume(n, h, w, count, pixels) for runs of pixels that cover the resampled map; source(n, h, w, count,
  // buffer) returns a run of input pixels, for which it may use the buffer.
  template <class Source, class Consume>
  void resample(const AxisView& rows, const AxisView& cols, int64_t channels, const Source& source,
                const Consume& consume) const {
    const Blocks<A> blocks(p.batch, rows, cols, channels);
    parallel_for(call, blocks.tasks(), [&](int64_t begin, int64_t end) {
      const BlockResampler<A> resampler(blocks, padded<A>(channels));
      const Buffer<A> buffer(blocks.input_width() * padded<A>(channels));
      for (int64_t task = begin; task < end; ++task)
        resample_block(blocks, blocks.block(task), resampler, buffer.data(), source, consume);
    });
  }

  template <class Source, class Consume>
  static void resample_block(const Blocks<A>& blocks, const Block& block, const BlockResampler<A>& resampler, A* buffer,
                             const Source& source, const Consume& consume) {
    const int64_t w = blocks.cols.start[block.col0], count = blocks.cols.end(block.col1 - 1) - w;
    resampler.run(
        block, [&](int64_t i) { return source(block.n, i, w, count, buffer); },
        [&](int64_t o, A* pixels) { consume(block.n, o, block.col0, block.width(), pixels); });
  }

  void forward_pool_first() const {
    const Blocks<A> blocks(p.batch, call.rows, call.cols, most(p.channels, p.out_channels));
    parallel_for(call, blocks.tasks(), [&](int64_t begin, int64_t end) {
      const BlockResampler<A> resampler(blocks, row);
      const int64_t input_width = blocks.input_width();
      const Buffer<A> x(input_width * row), gate(padded<A>(input_width)),
          product(has_weight ? blocks.width * out_row : 0);
      for (int64_t task = begin; task < end; ++task) {
        const Block block = blocks.block(task);
        const int64_t h_end = blocks.owned_end(call.rows, block.row1), w_end = blocks.owned_end(call.cols, block.col1);
        const int64_t w = blocks.owned_begin(call.cols, block.col0);
        const int64_t count = most(w_end, call.cols.end(block.col1 - 1)) - w;
        int64_t h = blocks.owned_begin(call.rows, block.row0);
        const auto gate_next_row = [&] {
          load_pixels<S>(p.input, p.channels, block.n, h, w, count, x.data());
          gate_tile(x.data(), count, gate.data());
          if (h < h_end) store_gate(block.n, h, w, w_end - w, gate.data());
          ++h;
        };
        const auto source = [&](int64_t i) {
          while (h <= i) gate_next_row();
          return static_cast<const A*>(x.data() + (call.cols.start[block.col0] - w) * row);
        };
        resampler.run(block, source, [&](int64_t o, A* pooled) {
          if (has_weight) project_forward(pooled, block.width(), product.data());
          const A* result = has_weight ? product.data() : pooled;
          store_pixels<S>(p.output, p.out_channels, block.n, o, block.col0, block.width(), result);
        });
        while (h < h_end) gate_next_row();
      }
    });
  }

  void backward() const {
    if (identity && !has_weight && planar(p.input) && planar(p.grad_output) && planar(p.grad_input)) {
      backward_planes();
    } else if (identity) {
      backward_pixels(nullptr);
    } else if (!pool_first) {
      const Map<A> grad(p.batch, p.in_height * p.in_width, p.out_channels);
      resample(call.rows_transposed, call.cols_transposed, p.out_channels, load_grad_output(),
               [&](int64_t n, int64_t h, int64_t w, int64_t count, const A* pixels) {
                 __builtin_memcpy(grad.at(n, h * p.in_width + w), pixels,
                                  sizeof(A) * static_cast<size_t>(count * grad.row));
               });
      backward_pixels(&grad);
    } else if (has_weight) {
      const Map<A> grad(p.batch, p.out_height * p.out_width, p.channels);
      backward_pooled_projection(grad);
      backward_blocks([&](int64_t n, int64_t h, int64_t w, int64_t, A*) {
        return static_cast<const A*>(grad.at(n, h * p.out_width + w));
      });
    } else {
      backward_blocks(load_grad_output());
    }
  }

  auto load_grad_output() const {
    return [this](int64_t n, int64_t h, int64_t w, int64_t count, A* buffer) {
      load_pixels<S>(p.grad_output, p.out_channels, n, h, w, count, buffer);
      return static_cast<const A*>(buffer);
    };
  }

  void load_grad_gate(int64_t n, int64_t h, int64_t w, int64_t count, A* values) const {
    if (p.grad_gate.data) return load_scalars<S>(p.grad_gate, n, h, w, count, values);
    for (int64_t i = 0; i < count; ++i) values[i] = 0;
  }

  // The gate's share: from u = d/d(g x) and x makes grad_input's pixels (in u) and, in x, g x. Adds to the sums. grad
  // is scratch for two values per pixel.
  void gate_backward(int64_t n, int64_t h, int64_t w, int64_t count, A* u, A* x, A* gate, A* grad, A* sums) const {
    load_scalars<S>(p.gate, n, h, w, count, gate);
    load_grad_gate(n, h, w, count, grad);
    A* dots = grad + count;
    dot_pixels(u, x, row, row, count, dots);
    A total = 0;
    for (int64_t i = 0; i < count; ++i) {
      grad[i] = (grad[i] + dots[i]) * gate[i] * (A(1) - gate[i]);
      total += grad[i];
    }
    sums[row] += total;
    for (int64_t c = 0; c < row; c += kLanes<A>) {
      const Vec<A> gate_weight = load(operands.gate_weight.data() + c);
      Vec<A> sum = {};
      for (int64_t i = 0; i < count; ++i) {
        const Vec<A> value = load(x + i * row + c);
        sum += grad[i] * value;
        store(u + i * row + c, gate[i] * load(u + i * row + c) + grad[i] * gate_weight);
        store(x + i * row + c, gate[i] * value);
      }
      store(sums + c, load(sums + c) + sum);
    }
  }

  void add_weight_gradient(const A* grad, const A* x, int64_t count, A* weight_sums) const {
    gemm(Gemm<A>{p.out_channels, row, count, grad, 1, out_row, x, row, weight_sums, row});
  }

  void store_gate_gradients(const Reduction<A>& reduction) const {
    reduction.template store_totals<S>(0, p.channels, p.grad_gate_weight);
    reduction.template store_totals<S>(row, 1, p.grad_gate_bias);
  }

  void store_weight_gradients(const Reduction<A>& reduction, int64_t first) const {
    for (int64_t m = 0; m < p.out_channels; ++m)
      reduction.template store_totals<S>(first + m * row, p.channels, static_cast<S*>(p.grad_weight) + m * p.channels);
    reduction.template store_totals<S>(first + p.out_channels * row, p.out_channels, p.grad_bias);
  }

  bool backward_collapsible() const {
    return collapsible(p.input, p.in_height, p.in_width) && collapsible(p.gate, p.in_height, p.in_width) &&
           collapsible(p.grad_gate, p.in_height, p.in_width) &&
           (!identity || collapsible(p.grad_output, p.in_height, p.in_width));
  }

  void backward_planes() const {
    constexpr int64_t lanes = kLanes<A>, group = kPlaneVectors * lanes;
    const Pixels pixels(p.batch, p.in_height, p.in_width, backward_collapsible(), kPlaneChunk);
    Reduction<A> reduction(pixels.tasks(), row + lanes);
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Buffer<A> scratch(2 * group * p.channels), vector_sums(lanes * p.channels), gate(group), grad(group);
      fill_pixels(vector_sums.data(), lanes * p.channels, A(0));
      visit_planes(pixels, begin, end, [&](int64_t n, int64_t h, int64_t w, auto vectors, int64_t valid) {
        fill_pixels(gate.data(), group, A(0));
        fill_pixels(grad.data(), group, A(0));
        load_scalars<S>(p.gate, n, h, w, valid, gate.data());
        load_grad_gate(n, h, w, valid, grad.data());
        gate_planes_backward<S, decltype(vectors)::value>(
            pixel<S>(p.grad_output, n, h, w), p.grad_output.stride_c, pixel<S>(p.input, n, h, w), p.input.stride_c,
            operands.gate_weight.data(), p.channels, valid, scratch.data(), gate.data(), grad.data(),
            vector_sums.data(), mutable_pixel<S>(p.grad_input, n, h, w), p.grad_input.stride_c);
        add_pixels(grad.data(), lanes, decltype(vectors)::value, sums + row);
      });
      for (int64_t c = 0; c < p.channels; ++c) sums[c] = sum_lanes<A>(load(vector_sums.data() + c * lanes));
      sums[row] = sum_lanes<A>(load(sums + row));
    });
    store_gate_gradients(reduction);
  }

  // Everything at the input's resolution; the gradient of the projected map is `given` or, without resampling,
  // grad_output.
  void backward_pixels(const Map<A>* given) const {
    const Pixels pixels(p.batch, p.in_height, p.in_width, backward_collapsible(), pixels_per_tile());
    const int64_t gate_sums = row + kLanes<A>;
    Reduction<A> reduction(pixels.tasks(), gate_sums + (has_weight ? p.out_channels * row + out_row : 0));
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Buffer<A> x(pixels.chunk * row), u(pixels.chunk * row), grad_tile(pixels.chunk * out_row);
      const Buffer<A> gate(pixels.chunk), scalars(2 * pixels.chunk);
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        A* grad = given ? given->at(n, h * p.in_width + w) : has_weight ? grad_tile.data() : u.data();
        if (!given) load_pixels<S>(p.grad_output, p.out_channels, n, h, w, count, grad);
        A* grad_gated = grad;
        if (has_weight) {
          grad_gated = u.data();
          project_backward(grad, count, grad_gated);
        }
        load_pixels<S>(p.input, p.channels, n, h, w, count, x.data());
        gate_backward(n, h, w, count, grad_gated, x.data(), gate.data(), scalars.data(), sums);
        if (has_weight) {
          add_weight_gradient(grad, x.data(), count, sums + gate_sums);
          add_pixels(grad, out_row, count, sums + gate_sums + p.out_channels * row);
        }
        store_pixels<S>(p.grad_input, p.channels, n, h, w, count, grad_gated);
      });
    });
    store_gate_gradients(reduction);
    if (has_weight) store_weight_gradients(reduction, gate_sums);
  }

  void project_backward(const A* grad, int64_t count, A* result) const {
    fill_pixels(result, count * row, A(0));
    project(grad, count, p.out_channels, operands.weight.data(), p.channels, result);
  }

  // Pool first: the gradients of weight and bias from the small maps, and the small map W^T grad_output.
  void backward_pooled_projection(const Map<A>& grad) const {
    const Blocks<A> blocks(p.batch, call.rows, call.cols, most(p.channels, p.out_channels));
    Reduction<A> reduction(blocks.tasks(), p.out_channels * row + out_row);
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const BlockResampler<A> resampler(blocks, row);
      const int64_t input_width = blocks.input_width();
      const Buffer<A> x(input_width * row), gate(input_width), grad_output(blocks.width * out_row);
      const auto gated_pixels = [&](int64_t n, int64_t h, int64_t w, int64_t count, A* buffer) {
        load_pixels<S>(p.input, p.channels, n, h, w, count, buffer);
        load_scalars<S>(p.gate, n, h, w, count, gate.data());
        scale_pixels(buffer, gate.data(), row, count);
        return static_cast<const A*>(buffer);
      };
      const auto project_gradient = [&](int64_t n, int64_t h, int64_t w, int64_t count, const A* pooled) {
        load_pixels<S>(p.grad_output, p.out_channels, n, h, w, count, grad_output.data());
        project_backward(grad_output.data(), count, grad.at(n, h * p.out_width + w));
        add_weight_gradient(grad_output.data(), pooled, count, sums);
        add_pixels(grad_output.data(), out_row, count, sums + p.out_channels * row);
      };
      for (int64_t task = begin; task < end; ++task)
        resample_block(blocks, blocks.block(task), resampler, x.data(), gated_pixels, project_gradient);
    });
    store_weight_gradients(reduction, 0);
  }

  // Pool first, at the input's resolution: source(n, h, w, count, buffer) returns a run of the gradient of the pooled
  // map.
  template <class Source>
  void backward_blocks(const Source& source) const {
    const Blocks<A> blocks(p.batch, call.rows_transposed, call.cols_transposed, p.channels);
    Reduction<A> reduction(blocks.tasks(), row + kLanes<A>);
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const BlockResampler<A> resampler(blocks, row);
      const Buffer<A> buffer(blocks.input_width() * row), x(blocks.width * row), gate(blocks.width),
          scalars(2 * blocks.width);
      const auto finish = [&](int64_t n, int64_t h, int64_t w, int64_t count, A* u) {
        load_pixels<S>(p.input, p.channels, n, h, w, count, x.data());
        gate_backward(n, h, w, count, u, x.data(), gate.data(), scalars.data(), sums);
        store_pixels<S>(p.grad_input, p.channels, n, h, w, count, u);
      };
      for (int64_t task = begin; task < end; ++task)
        resample_block(blocks, blocks.block(task), resampler, buffer.data(), source, finish);
    });
    store_gate_gradients(reduction);
  }
};

template <class F>
inline void with_storage_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::kFloat32:
      return f(float{});
    case ScalarType::kFloat64:
      return f(double{});
    case ScalarType::kBFloat16:
      return f(BFloat16{});
    case ScalarType::kFloat16:
      return f(Float16{});
  }
}

inline void gated_scale_transfer(const Call& call) {
  with_storage_type(call.params.dtype, [&](auto type) { GatedScaleTransfer<decltype(type)>(call).forward(); });
}

inline void gated_scale_transfer_backward(const Call& call) {
  with_storage_type(call.params.dtype, [&](auto type) { GatedScaleTransfer<decltype(type)>(call).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
