// gated_scale_transfer, forward and backward. Included once per instruction set.
//
//   g = sigmoid(rho . x + b),  output = R act(W (g x) + bias)
//
// R is separable resampling (cpu/resample.h). Its rows sum to one, so without an activation it commutes with the
// projection W and the bias, and W runs where there are fewer pixels: after R when R shrinks the map ("project late"),
// before R otherwise.
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S>
struct GatedScaleTransfer : GatedPixels<S> {
  using A = Accumulate<S>;
  using Base = GatedPixels<S>;
  using Workspace = typename Base::Workspace;
  using Base::call;
  using Base::has_weight;
  using Base::operands;
  using Base::out_row;
  using Base::row;

  const GatedScaleTransferParams& p;
  const bool identity, shrinks, project_late;

  GatedScaleTransfer(const Call& c, const GatedScaleTransferParams& params, bool is_backward)
      : Base(c, params, is_backward),
        p(params),
        identity(c.rows.identity && c.cols.identity),
        shrinks(c.rows.out * c.cols.out < c.rows.in * c.cols.in),
        project_late(shrinks && has_weight && !params.relu) {}

  // Whether only a gate is applied, to maps that these say can do without tiles.
  template <class F>
  bool gate_only(const F& fits, const TensorView& from, const TensorView& to) const {
    return identity && !has_weight && !p.relu && fits(p.input) && fits(from) && fits(to);
  }

  static bool in_runs(const TensorView& t) { return t.stride_c == 1; }

  void forward() const {
    if (shrinks) {
      forward_blocks();
    } else if (gate_only(planar, p.input, p.output)) {
      forward_planes();
    } else if (p.channels >= kLanes<A> && gate_only(in_runs, p.input, p.output)) {
      forward_runs();
    } else if (identity) {
      forward_whole([&](int64_t n, int64_t h, int64_t w,
                        A* tile) { return tile_for<S>(p.output, p.out_channels, n, h, w, tile); },
                    [&](int64_t n, int64_t h, int64_t w, int64_t count, const A* z) {
                      finish_tile<S>(p.output, p.out_channels, n, h, w, count, z);
                    });
    } else {
      const Map<A> projected(p.batch, p.in_height * p.in_width, p.out_channels);
      const auto place = [&](int64_t n, int64_t h, int64_t w, A*) { return projected.at(n, h * p.in_width + w); };
      forward_whole(place, [](int64_t, int64_t, int64_t, int64_t, const A*) {});
      resample_to<S>(call, p.batch, call.rows, call.cols, p.out_channels, p.output,
                     [&](int64_t n, int64_t h, int64_t w, int64_t, A*) { return place(n, h, w, nullptr); });
    }
  }

  // Gate, projection and activation of the whole map.
  template <class Place, class Consume>
  void forward_whole(const Place& place, const Consume& consume) const {
    const Pixels pixels = this->forward_pixels();
    parallel_for(call, pixels.tasks(),
                 [&](int64_t begin, int64_t end) { Base::forward(pixels, begin, end, place, consume); });
  }

  void forward_planes() const {
    const Pixels pixels(p.batch, p.in_height, p.in_width, collapsible(p.input, p.in_height, p.in_width), kPlaneChunk);
    parallel_for(call, pixels.tasks(), [&](int64_t begin, int64_t end) {
      const Buffer<A> gate(padded<A>(pixels.chunk));
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        const S* x = pixel<S>(p.input, n, h, w);
        fill_pixels(gate.data(), padded<A>(count), A(0));
        for_channels(0, p.channels, [&](int64_t c, auto channels) {
          const A* weights = operands.gate_weight.data() + c;
          add_products<1, channels>(
              x + c * p.input.stride_c, p.input.stride_c, count,
              [=](int64_t i, int64_t, int64_t, auto) { return weights[i]; }, gate.data(), 0);
        });
        gate_logits(gate.data(), operands.gate_bias, count);
        this->store_gate(n, h, w, count, gate.data());
        S* to = mutable_pixel<S>(p.output, n, h, w);
        const A* factors = gate.data();
        for (int64_t c = 0; c < p.channels; ++c, x += p.input.stride_c, to += p.output.stride_c) {
          const S* next = x + 2 * p.input.stride_c;
          S* next_to = to + 2 * p.output.stride_c;
          for_parts<A>(count, [=](int64_t i, auto valid) {
            __builtin_prefetch(next + i);
            __builtin_prefetch(next_to + i, 1);
            store_valid(to + i, load(factors + i) * load_valid(x + i, valid), valid);
          });
        }
      });
    });
  }

  // The gate alone, channels_last.
  void forward_runs() const {
    const Pixels pixels = this->forward_pixels();
    parallel_for(call, pixels.tasks(), [&](int64_t begin, int64_t end) {
      const Buffer<A> gate(padded<A>(pixels.chunk));
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        this->runs.gate(pixel<S>(p.input, n, h, w), p.input.stride_w, operands.gate_weight.data(), operands.gate_bias,
                        count, gate.data(), mutable_pixel<S>(p.output, n, h, w), p.output.stride_w);
        this->store_gate(n, h, w, count, gate.data());
      });
    });
  }

  // All steps block by block: no map in between is written.
  void forward_blocks() const {
    const Blocks<A> blocks(p.batch, call.rows, call.cols, most(p.channels, p.out_channels));
    const bool project_early = has_weight && !project_late;
    const int64_t pooled_row = project_late ? row : out_row;
    parallel_for(call, blocks.tasks(), [&](int64_t begin, int64_t end) {
      const BlockResampler<A> resampler(blocks, pooled_row, pooled_row);
      const int64_t input_width = blocks.input_width();
      const typename Base::Input input(*this, input_width), pooled_input(*this, project_late ? blocks.width : 0);
      const Buffer<A> gate(padded<A>(input_width)), z(project_early ? input_width * out_row : 0),
          pooled(blocks.width * pooled_row), product(project_late ? blocks.width * out_row : 0);
      A* const x = input.tile.data();
      for (int64_t task = begin; task < end; ++task) {
        const Block block = blocks.block(task);
        const int64_t h_end = blocks.owned_end(call.rows, block.row1), w_end = blocks.owned_end(call.cols, block.col1);
        const int64_t w = blocks.owned_begin(call.cols, block.col0);
        const int64_t count = most(w_end, call.cols.end(block.col1 - 1)) - w;
        int64_t h = blocks.owned_begin(call.rows, block.row0);
        const auto gate_next_row = [&] {
          if (h + 1 < p.in_height) {
            prefetch_pixels<S>(p.input, p.channels, block.n, h + 1, w, count);
            prefetch_first_planes<S>(p.input, p.channels, block.n, h + 1, w, count);
          }
          if (project_late) {
            const A* pixels = tile_of<S>(p.input, p.channels, block.n, h, w, count, x);
            this->gate_tile(pixels, count, gate.data(), x);
          } else {
            this->gate_and_project(block.n, h, w, count, input, gate.data(), project_early ? z.data() : x);
          }
          if (h < h_end) this->store_gate(block.n, h, w, w_end - w, gate.data());
          ++h;
        };
        const auto source = [&](int64_t i) {
          while (h <= i) gate_next_row();
          const A* gated = project_early ? z.data() : x;
          return gated + (call.cols.start[block.col0] - w) * pooled_row;
        };
        resampler.run(block, source, [&](int64_t o, const auto& make) {
          A* result = project_late ? product.data()
                                   : tile_for<S>(p.output, p.out_channels, block.n, o, block.col0, pooled.data());
          make(project_late ? pooled.data() : result);
          if (project_late) this->project_forward(pooled.data(), block.width(), pooled_input, result);
          finish_tile<S>(p.output, p.out_channels, block.n, o, block.col0, block.width(), result);
        });
        while (h < h_end) gate_next_row();
      }
    });
  }

  void backward() const {
    if (gate_only(planar, p.grad_output, p.grad_input)) {
      backward_planes();
    } else if (p.channels >= kLanes<A> && gate_only(in_runs, p.grad_output, p.grad_input)) {
      backward_runs();
    } else if (identity) {
      Base::backward(this->backward_pixels(this->pixels_per_tile(), p.grad_output), 1,
                     [&](int64_t n, int64_t h, int64_t w, int64_t count, A* buffer) {
                       load_pixels<S>(p.grad_output, p.out_channels, n, h, w, count, buffer);
                       return buffer;
                     });
    } else if (!shrinks) {
      const Map<A> grad(p.batch, p.in_height * p.in_width, p.out_channels);
      with_gradient([&](const auto& source) {
        resample_to<A>(call, p.batch, call.rows_transposed, call.cols_transposed, grad.row, grad.view(p.in_width),
                       source);
      });
      Base::backward(this->backward_pixels(this->pixels_per_tile(), {}), 0,
                     [&](int64_t n, int64_t h, int64_t w, int64_t, A*) { return grad.at(n, h * p.in_width + w); });
    } else if (project_late) {
      const Map<A> grad(p.batch, p.out_height * p.out_width, p.channels);
      backward_late_projection(grad);
      backward_blocks([&](int64_t n, int64_t h, int64_t w, int64_t, A*) { return grad.at(n, h * p.out_width + w); });
    } else {
      with_gradient([&](const auto& source) { backward_blocks(source); });
    }
  }

  // The gate's share takes dot products over all lanes, and products of pairs take an odd channel's partner.
  template <class Use>
  void with_gradient(const Use& use) const {
    const bool zeros = !has_weight || (kPairs<S> && p.out_channels % 2 != 0);
    with_source<S>(p.grad_output, p.out_channels, p.batch, p.out_height, p.out_width, zeros, use);
  }

  void backward_runs() const {
    const Pixels pixels = this->backward_pixels(this->pixels_per_tile(), p.grad_output);
    Reduction<A> reduction(pixels.tasks(), this->gate_sums());
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const int64_t size = padded<A>(pixels.chunk);
      const Buffer<A> gate(size), grad(size), dots(size);
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        const S *u = pixel<S>(p.grad_output, n, h, w), *x = pixel<S>(p.input, n, h, w);
        load_scalars<S>(p.gate, n, h, w, count, gate.data());
        load_optional_scalars<S>(p.grad_gate, n, h, w, count, grad.data());
        this->runs.dot(u, p.grad_output.stride_w, x, p.input.stride_w, count, dots.data());
        sums[row] += gate_gradients(gate.data(), dots.data(), count, grad.data());
        this->runs.input_gradient(u, p.grad_output.stride_w, x, p.input.stride_w, operands.gate_weight.data(),
                                  gate.data(), grad.data(), count, sums, mutable_pixel<S>(p.grad_input, n, h, w),
                                  p.grad_input.stride_w);
      });
    });
    this->store_gate_gradients(reduction);
  }

  void backward_planes() const {
    constexpr int64_t lanes = kLanes<A>;
    const Pixels pixels = this->backward_pixels(kPlaneChunk, p.grad_output);
    Reduction<A> reduction(pixels.tasks(), this->gate_sums());
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Buffer<A> vector_sums(row * lanes), gate(pixels.chunk), grad(pixels.chunk), dots(pixels.chunk);
      fill_pixels(vector_sums.data(), row * lanes, A(0));
      pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
        const S *u = pixel<S>(p.grad_output, n, h, w), *x = pixel<S>(p.input, n, h, w);
        const int64_t u_plane = p.grad_output.stride_c;
        fill_pixels(gate.data(), padded<A>(count), A(0));
        fill_pixels(grad.data(), padded<A>(count), A(0));
        fill_pixels(dots.data(), padded<A>(count), A(0));
        load_scalars<S>(p.gate, n, h, w, count, gate.data());
        load_optional_scalars<S>(p.grad_gate, n, h, w, count, grad.data());
        for_channels(0, p.channels, [&](int64_t c, auto channels) {
          const S* from = u + c * u_plane;
          add_products<1, channels>(
              x + c * p.input.stride_c, p.input.stride_c, count,
              [=](int64_t i, int64_t, int64_t at, auto valid) {
                __builtin_prefetch(from + (i + channels) * u_plane + at);
                return load_valid(from + i * u_plane + at, valid);
              },
              dots.data(), 0);
        });
        sums[row] += gate_gradients(gate.data(), dots.data(), count, grad.data());
        for (int64_t c = 0; c < p.channels; ++c)
          line_backward(x + c * p.input.stride_c, u + c * u_plane, count, c, gate.data(), grad.data(),
                        mutable_pixel<S>(p.grad_input, n, h, w) + c * p.grad_input.stride_c,
                        vector_sums.data() + c * lanes);
      });
      for (int64_t c = 0; c < row; c += lanes) store(sums + c, sum_each(vector_sums.data() + c * lanes));
    });
    this->store_gate_gradients(reduction);
  }

  // A run of one plane; adds to a vector of sums.
  void line_backward(const S* x, const S* u, int64_t count, int64_t c, const A* gate, const A* grad, S* to,
                     A* sums) const {
    const Vec<A> weight = Vec<A>{} + operands.gate_weight.data()[c];
    const S *next_x = x + 2 * p.input.stride_c, *next_u = u + 2 * p.grad_output.stride_c;
    S* next_to = to + 2 * p.grad_input.stride_c;
    Vec<A> sum = load(sums);
    for_parts<A>(count, [=, &sum](int64_t i, auto valid) {
      __builtin_prefetch(next_x + i);
      __builtin_prefetch(next_u + i);
      __builtin_prefetch(next_to + i, 1);
      const Vec<A> from_gate = load(grad + i);
      sum += from_gate * load_valid(x + i, valid);
      store_valid(to + i, load(gate + i) * load_valid(u + i, valid) + from_gate * weight, valid);
    });
    store(sums, sum);
  }

  // Late projection: the gradients of weight and bias from the small maps, and the small map W^T grad_output.
  void backward_late_projection(const Map<A>& grad) const {
    const Blocks<A> blocks(p.batch, call.rows, call.cols, most(p.channels, p.out_channels));
    Reduction<A> reduction(blocks.tasks(), this->weight_sums());
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const BlockResampler<A> resampler(blocks, row, row);
      const int64_t input_width = blocks.input_width();
      const Buffer<A> gated(input_width * row), gate(padded<A>(input_width)), pooled(blocks.width * row),
          grad_output(blocks.width * out_row);
      const Workspace space(*this, blocks.width);
      fill_pixels(space.gate.data(), blocks.width, A(1));  // the gate is in the pooled pixels
      const auto gated_pixels = [&](int64_t n, int64_t h, int64_t w, int64_t count, A* buffer) {
        const A* x = tile_of<S>(p.input, p.channels, n, h, w, count, buffer);
        load_scalars<S>(p.gate, n, h, w, count, gate.data());
        scale_pixels(x, gate.data(), row, count, buffer);
        return buffer;
      };
      const auto project_gradient = [&](int64_t n, int64_t h, int64_t w, int64_t count, const auto& make) {
        make(pooled.data());
        const A* result = tile_of<S>(p.grad_output, p.out_channels, n, h, w, count, grad_output.data());
        const Factor<S>* x = summed_rows<S>(pooled.data(), count, row, space.x_factors.data());
        this->projection_backward(result, nullptr, space.gate.data(), count, x, grad.at(n, h * p.out_width + w), space,
                                  sums);
      };
      for (int64_t task = begin; task < end; ++task)
        resample_block(blocks, blocks.block(task), resampler, gated.data(), gated_pixels, project_gradient);
    });
    this->store_weight_gradients(reduction, 0);
  }

  // Shrinking maps, at the input's resolution: source(n, h, w, count, buffer) returns a run of the gradient of R's
  // result, which is that of act(W (g x) + bias), or with a late projection that of g x.
  template <class Source>
  void backward_blocks(const Source& source) const {
    const bool projects = has_weight && !project_late;
    const int64_t channels = project_late ? p.channels : p.out_channels;
    // Products with the weight gradient want long runs.
    const Blocks<A> blocks(p.batch, call.rows_transposed, call.cols_transposed, most(channels, p.channels),
                           projects ? 64 : 16);
    Reduction<A> reduction(blocks.tasks(), this->gate_sums() + (projects ? this->weight_sums() : 0));
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const int64_t step = padded<A>(channels);
      const BlockResampler<A> resampler(blocks, step, step);
      const Buffer<A> buffer(blocks.input_width() * step), tile(blocks.width * step);
      const Workspace space(*this, blocks.width);
      const auto finish = [&](int64_t n, int64_t h, int64_t w, int64_t count, const auto& make) {
        if (projects) {
          make(tile.data());
          return Base::backward(n, h, w, count, tile.data(), space, sums);
        }
        A* u = tile_for<S>(p.grad_input, p.channels, n, h, w, tile.data());
        make(u);
        const A* x = this->x_tile(n, h, w, count, p.relu, space);
        load_scalars<S>(p.gate, n, h, w, count, space.gate.data());
        if (p.relu) this->mask(x, space.gate.data(), count, u);
        this->gate_backward(n, h, w, count, u, x, space.gate.data(), space.scalars.data(), sums);
      };
      for (int64_t task = begin; task < end; ++task)
        resample_block(blocks, blocks.block(task), resampler, buffer.data(), source, finish);
    });
    this->store_gate_gradients(reduction);
    if (projects) this->store_weight_gradients(reduction, this->gate_sums());
  }
};

inline void gated_scale_transfer(const Call& call, const GatedScaleTransferParams& params) {
  with_storage_type(params.dtype,
                    [&](auto type) { GatedScaleTransfer<decltype(type)>(call, params, false).forward(); });
}

inline void gated_scale_transfer_backward(const Call& call, const GatedScaleTransferParams& params) {
  with_storage_type(params.dtype,
                    [&](auto type) { GatedScaleTransfer<decltype(type)>(call, params, true).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
