// The gate and the projection at the input's resolution, forward and backward: what gated_scale_transfer,
// gated_projection and class_map share. Included once per instruction set.
//
//   g = sigmoid(rho . x + b),  z = act(W (g x) + bias)
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S>
struct GatedPixels {
  using A = Accumulate<S>;

  const Call& call;
  const GatedParams& p;
  const Operands<S> operands;
  const ChannelRuns<S> runs;
  const bool has_weight;
  const int64_t row, out_row;  // padded channels

  GatedPixels(const Call& c, const GatedParams& params, bool is_backward)
      : call(c),
        p(params),
        operands(params, !is_backward || params.relu, is_backward),
        runs(params.channels),
        has_weight(params.weight.data != nullptr),
        row(padded<A>(p.channels)),
        out_row(padded<A>(p.out_channels)) {}

  // gated[p] = g[p] * x[p], which may be the same tile.
  void gate_tile(const A* x, int64_t count, A* gate, A* gated) const {
    gate_pixels(x, operands.gate_weight.data(), operands.gate_bias, row, count, gate, gated);
  }

  void store_gate(int64_t n, int64_t h, int64_t w, int64_t count, const A* gate) const {
    store_channels(mutable_pixel<S>(p.gate, n, h, w), count, gate);  // forward's gate is contiguous
  }

  // Memory for a run of input pixels as a tile and as the left operand of a product.
  struct Input {
    Buffer<A> tile;
    Buffer<Factor<S>> factors;

    Input(const GatedPixels& of, int64_t count)
        : tile(count * of.row), factors(kPairs<S> && of.has_weight ? count * of.row / 2 : 0) {}
  };

  // W of gated pixels, which are a tile of Input.
  void project_forward(const A* gated, int64_t count, const Input& space, A* result) const {
    project<S>(left_operand<S>(gated, count, row, space.factors.data()), count, p.channels, operands.weight_by_row,
               p.out_channels, result);
    finish_projection(count, nullptr, result);
  }

  // g and z. The gate is a factor per pixel, so it can wait until after the product, whose result is smaller or in
  // cache, and rho can be one more row of W.
  void gate_and_project(int64_t n, int64_t h, int64_t w, int64_t count, const Input& space, A* gate, A* z) const {
    if (!has_weight) {
      gate_tile(tile_of<S>(p.input, p.channels, n, h, w, count, space.tile.data()), count, gate, z);
      if (p.relu) relu_pixels(z, count * out_row);
      return;
    }
    const bool rho_in_weight = p.out_channels < out_row;
    const bool from_memory = is_left_operand<S>(p.input, p.channels) && (rho_in_weight || kPairs<S>);
    const A* x = from_memory ? nullptr : tile_of<S>(p.input, p.channels, n, h, w, count, space.tile.data());
    project_x(n, h, w, count, x, space, z);
    if (rho_in_weight) {
      for (int64_t i = 0; i < count; ++i) gate[i] = z[i * out_row + p.out_channels];
    } else {
      dot_with_rho(pixel<S>(p.input, n, h, w), x, count, gate);
    }
    gate_logits(gate, operands.gate_bias, count);
    finish_projection(count, gate, z);
  }

  // W x. The tile x is not used where the pixels in memory will do.
  void project_x(int64_t n, int64_t h, int64_t w, int64_t count, const A* x, const Input& space, A* z) const {
    Left<S> left;
    if (is_left_operand<S>(p.input, p.channels)) {
      left = {reinterpret_cast<const Factor<S>*>(pixel<S>(p.input, n, h, w)),
              kPairs<S> ? p.input.stride_w / 2 : p.input.stride_w};
    } else {
      left = left_operand<S>(x, count, row, space.factors.data());
    }
    project<S>(left, count, p.channels, operands.weight_by_row, p.out_channels, z);
  }

  // rho . x, of the tile, or without one of pairs in memory.
  void dot_with_rho(const S* pixels, const A* x, int64_t count, A* gate) const {
    if (x) return dot_pixels(x, operands.gate_weight.data(), 0, row, count, gate);
    if constexpr (kPairs<S>) dot_pairs(pixels, p.input.stride_w, operands.gate_pairs.data(), p.channels, count, gate);
  }

  // z = act(g z + bias), g being 1 without a gate.
  void finish_projection(int64_t count, const A* gate, A* z) const {
    for (int64_t i = 0; i < count; ++i) {
      const A factor = gate ? gate[i] : A(1);
      for (int64_t c = 0; c < out_row; c += kLanes<A>) {
        const Vec<A> value = factor * load(z + i * out_row + c) + load(operands.bias.data() + c);
        store(z + i * out_row + c, p.relu ? relu(value) : value);
      }
    }
  }

  // Without a product the tile should stay in L1. Products of pairs are twice as fast, and loading and storing the sums
  // of a weight's gradient for each tile weighs twice as much.
  int64_t pixels_per_tile() const {
    const int64_t kilobytes = has_weight ? (kPairs<S> ? 128 : 64) : 8;
    return most(has_weight ? 32 : 16,
                tile_pixels<A>(has_weight ? most(p.channels, p.out_channels) : p.channels, kilobytes));
  }

  Pixels forward_pixels() const {
    const bool collapse = collapsible(p.input, p.in_height, p.in_width);
    return Pixels(p.batch, p.in_height, p.in_width, collapse, pixels_per_tile());
  }

  // Calls consume(n, h, w, count, z) for a range of pixels; place(n, h, w, tile) says where z is made, which may be the
  // tile.
  template <class Place, class Consume>
  void forward(const Pixels& pixels, int64_t begin, int64_t end, const Place& place, const Consume& consume) const {
    const Input space(*this, pixels.chunk);
    const Buffer<A> product(pixels.chunk * out_row), gate(padded<A>(pixels.chunk));
    pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
      A* z = place(n, h, w, product.data());
      gate_and_project(n, h, w, count, space, gate.data(), z);
      store_gate(n, h, w, count, gate.data());
      consume(n, h, w, count, z);
    });
  }

  // Memory for the backward of `count` pixels.
  struct Workspace {
    Input x;
    Buffer<Factor<S>> factors, summed, x_factors;  // of the gradient; of it and of x, summed over the pixels
    Buffer<A> u, z, gate, scalars;

    Workspace(const GatedPixels& of, int64_t count)
        : x(of, count),
          factors(kPairs<S> && of.has_weight ? steps<S>(count) * of.out_row : 0),
          summed(of.has_weight ? steps<S>(count) * of.out_row : 0),
          x_factors(kPairs<S> && of.has_weight ? steps<S>(count) * of.row : 0),
          u(of.has_weight ? count * of.row : 0),
          z(of.has_weight && of.p.relu ? count * of.out_row : 0),
          gate(padded<A>(count)),
          scalars(2 * padded<A>(count)) {}
  };

  // Sums of a reduction: those of the gate, then those of weight and bias.
  int64_t gate_sums() const { return row + kLanes<A>; }
  int64_t weight_sums() const { return has_weight ? p.out_channels * row + out_row : 0; }

  // Whether the gate's share takes x from memory and writes grad_input there: channels_last.
  bool has_runs() const { return p.channels >= kLanes<A> && p.input.stride_c == 1 && p.grad_input.stride_c == 1; }

  // x as a tile; nullptr where the gate's share does without one and nothing else needs it.
  const A* x_tile(int64_t n, int64_t h, int64_t w, int64_t count, bool needed, const Workspace& space) const {
    return needed || !has_runs() ? tile_of<S>(p.input, p.channels, n, h, w, count, space.x.tile.data()) : nullptr;
  }

  // The gate's share: from u = d/d(g x), g and x, a tile or in memory, makes grad_input, and adds to the sums. u is
  // overwritten; grad is scratch for two vectors of a value per pixel.
  void gate_backward(int64_t n, int64_t h, int64_t w, int64_t count, A* u, const A* x, const A* gate, A* grad,
                     A* sums) const {
    load_optional_scalars<S>(p.grad_gate, n, h, w, count, grad);
    A* dots = grad + padded<A>(count);
    if (has_runs()) {
      const S* from = pixel<S>(p.input, n, h, w);
      runs.dot(from, p.input.stride_w, u, row, count, dots);
      sums[row] += gate_gradients(gate, dots, count, grad);
      runs.input_gradient(u, row, from, p.input.stride_w, operands.gate_weight.data(), gate, grad, count, sums,
                          mutable_pixel<S>(p.grad_input, n, h, w), p.grad_input.stride_w);
      return;
    }
    dot_pixels(u, x, row, row, count, dots);
    sums[row] += gate_gradients(gate, dots, count, grad);
    for_vectors<A>(row, [&](int64_t c, auto vectors) {
      Vec<A> gate_weight[vectors], sum[vectors] = {};
      for (int v = 0; v < vectors; ++v) gate_weight[v] = load(operands.gate_weight.data() + c + v * kLanes<A>);
      for (int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = i * row + c + v * kLanes<A>;
          sum[v] += grad[i] * load(x + at);
          store(u + at, gate[i] * load(u + at) + grad[i] * gate_weight[v]);
        }
      }
      for (int v = 0; v < vectors; ++v) store(sums + c + v * kLanes<A>, load(sums + c + v * kLanes<A>) + sum[v]);
    });
    finish_tile<S>(p.grad_input, p.channels, n, h, w, count, u);
  }

  // The whole backward of a run of pixels, from the gradient of z, which it overwrites.
  void backward(int64_t n, int64_t h, int64_t w, int64_t count, A* grad, const Workspace& space, A* sums) const {
    const bool needs_tile = p.relu && !(has_weight && is_left_operand<S>(p.input, p.channels));
    const A* x = x_tile(n, h, w, count, needs_tile, space);
    const A* gate = space.gate.data();
    load_scalars<S>(p.gate, n, h, w, count, space.gate.data());
    A* u = grad;
    if (has_weight) {
      if (p.relu) project_x(n, h, w, count, x, space.x, space.z.data());
      u = tile_for<S>(p.grad_input, p.channels, n, h, w, space.u.data());
      projection_backward(grad, p.relu ? space.z.data() : nullptr, gate, count, summed_x(n, h, w, count, x, space), u,
                          space, sums + gate_sums());
    } else if (p.relu) {
      mask(x, gate, count, grad);
    }
    gate_backward(n, h, w, count, u, x, gate, space.scalars.data(), sums);
  }

  // Where g x, of a transfer without a projection, is not positive, its gradient becomes zero.
  void mask(const A* x, const A* gate, int64_t count, A* grad) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = i * row; c < (i + 1) * row; c += kLanes<A>)
        store(grad + c, gate[i] * load(x + c) > 0 ? load(grad + c) : Vec<A>{});
    }
  }

  // x as factors of sums over its pixels, from the tile, if there is one, or from memory.
  const Factor<S>* summed_x(int64_t n, int64_t h, int64_t w, int64_t count, const A* x, const Workspace& space) const {
    if constexpr (kPairs<S>)
      if (p.input.stride_c == 1)
        return summed_pixels<S>(pixel<S>(p.input, n, h, w), p.input.stride_w, p.channels, count, row,
                                space.x_factors.data());
    if (!x) x = tile_of<S>(p.input, p.channels, n, h, w, count, space.x.tile.data());
    return summed_rows<S>(x, count, row, space.x_factors.data());
  }

  // The projection's share: makes u = W^T grad and adds to the sums of weight and bias, whose x is given as factors of
  // sums over its pixels. product = W x is there where a ReLU masks the gradient, and is overwritten.
  void projection_backward(const A* grad, A* product, const A* gate, int64_t count, const Factor<S>* x, A* u,
                           const Workspace& space, A* sums) const {
    A* bias_sums = sums + p.out_channels * row;
    const Left<S> left = product ? split_gradient<true>(grad, product, gate, count, space, bias_sums)
                                 : split_gradient<false>(grad, product, gate, count, space, bias_sums);
    project<S>(left, count, p.out_channels, operands.weight, p.channels, u);
    gemm(Gemm<Factor<S>>{p.out_channels, row, steps<S>(count), space.summed.data(), 1, out_row, x, row, sums, row,
                         true});
  }

  // The gradient on its way into both products, in one pass (in five, one each for what follows, down4 54 -> 72 took
  // 3.8 ms in bfloat16 and not 3.1): masked by the ReLU, and added to the sums of the bias; as a left operand, and in
  // space.summed times the gate as factors of sums over the pixels.
  template <bool kMasked>
  Left<S> split_gradient(const A* grad, A* product, const A* gate, int64_t count, const Workspace& space,
                         A* bias_sums) const {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t step = out_row;
    Factor<S>*const factors = space.factors.data(), *const summed = space.summed.data();
    for_vectors<A>(out_row, [=](int64_t from, auto vectors) {
      Vec<A> sum[vectors], bias[vectors];
      for (int v = 0; v < vectors; ++v) {
        sum[v] = load(bias_sums + from + v * lanes);
        bias[v] = load(operands.bias.data() + from + v * lanes);
      }
      const auto masked = [=](int64_t i, int64_t at, Vec<A> shift) {
        Vec<A> value = load(grad + at);
        if constexpr (kMasked) value = gate[i] * load(product + at) + shift > 0 ? value : Vec<A>{};
        return value;
      };
      for (int64_t i = 0; i < count; i += kPairs<S> ? 2 : 1) {
        for (int v = 0; v < vectors; ++v) {
          const int64_t c = from + v * lanes, at = i * step + c;
          const Vec<A> value = masked(i, at, bias[v]);
          sum[v] += value;
          if constexpr (kPairs<S>) {
            Vec<A> next = {}, scaled = {};
            BFloat16* rounded = reinterpret_cast<BFloat16*>(factors) + at;
            store_rounded(rounded, value);
            if (i + 1 < count) {
              next = masked(i + 1, at + step, bias[v]);
              scaled = gate[i + 1] * next;
              store_rounded(rounded + step, next);
            }
            sum[v] += next;
            store(summed + i / 2 * step + c, make_pairs(gate[i] * value, scaled));
          } else {
            if constexpr (kMasked) store(product + at, value);
            store(summed + at, gate[i] * value);
          }
        }
      }
      for (int v = 0; v < vectors; ++v) store(bias_sums + from + v * lanes, sum[v]);
    });
    if constexpr (kPairs<S>) {
      return {factors, out_row / 2};
    } else {
      return {kMasked ? product : grad, out_row};
    }
  }

  // Pixels of a backward pass that reads these maps, too, where they are given.
  Pixels backward_pixels(int64_t chunk, const TensorView& gradient, const TensorView& output = {}) const {
    const bool collapse =
        collapsible(p.input, p.in_height, p.in_width) && collapsible(p.gate, p.in_height, p.in_width) &&
        collapsible(p.grad_gate, p.in_height, p.in_width) && collapsible(gradient, p.in_height, p.in_width) &&
        collapsible(output, p.in_height, p.in_width);
    return Pixels(p.batch, p.in_height, p.in_width, collapse, chunk);
  }

  // The backward of all pixels; gradient(n, h, w, count, buffer) returns that of a run of z. It may write to the
  // buffer, of so many tiles.
  template <class Gradient>
  void backward(const Pixels& pixels, int64_t buffer_tiles, const Gradient& gradient) const {
    Reduction<A> reduction(pixels.tasks(), gate_sums() + weight_sums());
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Workspace space(*this, pixels.chunk);
      const Buffer<A> grad(buffer_tiles * pixels.chunk * out_row);
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        backward(n, h, w, count, gradient(n, h, w, count, grad.data()), space, sums);
      });
    });
    store_gate_gradients(reduction);
    if (has_weight) store_weight_gradients(reduction, gate_sums());
  }

  void store_gate_gradients(const Reduction<A>& reduction) const {
    reduction.template store_totals<S>(0, p.channels, p.grad_gate_weight);
    reduction.template store_totals<S>(row, 1, p.grad_gate_bias);
  }

  void store_weight_gradients(const Reduction<A>& reduction, int64_t first) const {
    parallel_for(call, p.out_channels, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        reduction.template store_totals<S>(first + m * row, p.channels,
                                           static_cast<S*>(p.grad_weight) + m * p.channels);
    });
    if (p.grad_bias) reduction.template store_totals<S>(first + p.out_channels * row, p.out_channels, p.grad_bias);
  }
};

}  // namespace gsto::cpu::GSTO_ISA
