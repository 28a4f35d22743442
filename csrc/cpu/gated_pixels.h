// The gate and the projection at the input's resolution, forward and backward: what gated_scale_transfer and
// gated_projection share. Included once per instruction set.
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
  const bool has_weight;
  const int64_t row, out_row;  // padded channels

  GatedPixels(const Call& c, const GatedParams& params)
      : call(c),
        p(params),
        operands(params),
        has_weight(params.weight.data != nullptr),
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

  // Without a product the tile should stay in L1.
  int64_t pixels_per_tile() const {
    return has_weight ? most(32, tile_pixels<A>(most(p.channels, p.out_channels), 64)) : tile_pixels<A>(p.channels, 16);
  }

  Pixels forward_pixels() const {
    const bool collapse = collapsible(p.input, p.in_height, p.in_width);
    return Pixels(p.batch, p.in_height, p.in_width, collapse, pixels_per_tile());
  }

  // z of a range of pixels, to place(n, h, w), or to a tile where that is null; then consume(n, h, w, count, z).
  template <class Place, class Consume>
  void forward(const Pixels& pixels, int64_t begin, int64_t end, const Place& place, const Consume& consume) const {
    const Buffer<A> tile(pixels.chunk * row), product(pixels.chunk * out_row), gate(padded<A>(pixels.chunk));
    pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
      A* given = place(n, h, w);
      A* z = given ? given : product.data();
      A* x = has_weight ? tile.data() : z;
      load_pixels<S>(p.input, p.channels, n, h, w, count, x);
      gate_tile(x, count, gate.data());
      store_gate(n, h, w, count, gate.data());
      if (has_weight) project_forward(x, count, z);
      if (p.relu) relu_pixels(z, count * out_row);
      consume(n, h, w, count, z);
    });
  }

  // Memory for the backward of `count` pixels.
  struct Workspace {
    Buffer<A> x, u, z, gate, scalars;

    Workspace(const GatedPixels& of, int64_t count)
        : x(count * of.row),
          u(of.has_weight ? count * of.row : 0),
          z(of.has_weight && of.p.relu ? count * of.out_row : 0),
          gate(padded<A>(count)),
          scalars(2 * count) {}
  };

  // Sums of a reduction: those of the gate, then those of weight and bias.
  int64_t gate_sums() const { return row + kLanes<A>; }
  int64_t weight_sums() const { return has_weight ? p.out_channels * row + out_row : 0; }

  // The gate's share: from u = d/d(g x), x and g makes grad_input's pixels (in u) and, in x, g x. Adds to the sums.
  // grad is scratch for two values per pixel.
  void gate_backward(int64_t n, int64_t h, int64_t w, int64_t count, A* u, A* x, const A* gate, A* grad,
                     A* sums) const {
    load_optional_scalars<S>(p.grad_gate, n, h, w, count, grad);
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

  // The whole backward of a run of pixels, from the gradient of z, which it may overwrite.
  void backward(int64_t n, int64_t h, int64_t w, int64_t count, A* grad, const Workspace& space, A* sums) const {
    A* x = space.x.data();
    load_pixels<S>(p.input, p.channels, n, h, w, count, x);
    load_scalars<S>(p.gate, n, h, w, count, space.gate.data());
    if (p.relu) mask(x, space.gate.data(), count, grad, space.z.data());
    A* u = grad;
    if (has_weight) {
      u = space.u.data();
      project_backward(grad, count, u);
    }
    gate_backward(n, h, w, count, u, x, space.gate.data(), space.scalars.data(), sums);
    if (has_weight) {
      add_weight_gradient(grad, x, count, sums + gate_sums());
      add_pixels(grad, out_row, count, sums + gate_sums() + p.out_channels * row);
    }
    store_pixels<S>(p.grad_input, p.channels, n, h, w, count, u);
  }

  // The ReLU's share: z once more, as g (W x) + bias.
  void mask(const A* x, const A* gate, int64_t count, A* grad, A* z) const {
    const A* product = x;
    if (has_weight) {
      fill_pixels(z, count * out_row, A(0));
      project(x, count, p.channels, operands.weight_by_row.data(), p.out_channels, z);
      product = z;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < out_row; c += kLanes<A>) {
        A* to = grad + i * out_row + c;
        const Vec<A> value = gate[i] * load(product + i * out_row + c) + load(operands.bias.data() + c);
        store(to, value > 0 ? load(to) : Vec<A>{});
      }
    }
  }

  void project_backward(const A* grad, int64_t count, A* result) const {
    fill_pixels(result, count * row, A(0));
    project(grad, count, p.out_channels, operands.weight.data(), p.channels, result);
  }

  void add_weight_gradient(const A* grad, const A* x, int64_t count, A* sums) const {
    gemm(Gemm<A>{p.out_channels, row, count, grad, 1, out_row, x, row, sums, row});
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
    for (int64_t m = 0; m < p.out_channels; ++m)
      reduction.template store_totals<S>(first + m * row, p.channels, static_cast<S*>(p.grad_weight) + m * p.channels);
    if (p.grad_bias) reduction.template store_totals<S>(first + p.out_channels * row, p.out_channels, p.grad_bias);
  }
};

}  // namespace gsto::cpu::GSTO_ISA
