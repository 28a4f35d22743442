// affine_scale_transfer, forward and backward: output = R act(scale_c x + shift_c). Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class S>
struct AffineScaleTransfer {
  using A = Accumulate<S>;

  const Call& call;
  const AffineScaleTransferParams& p;
  const int64_t row;
  const bool identity;
  const Buffer<A> scale, shift;

  AffineScaleTransfer(const Call& c, const AffineScaleTransferParams& params)
      : call(c),
        p(params),
        row(padded<A>(p.channels)),
        identity(c.rows.identity && c.cols.identity),
        scale(row),
        shift(row) {
    fill_padded<A>(p.scale, p.scale.stride_n, p.channels, scale.data());
    fill_padded<A>(p.shift, p.shift.stride_n, p.channels, shift.data());
  }

  // Input pixels, of which a resampling reads act(scale x + shift): bilinear enlarging does so up to four times, which
  // takes less than a tile in between.
  struct AffineRun : Run<S> {
    const AffineScaleTransfer& of;

    AffineRun(const Run<S>& run, const AffineScaleTransfer& transfer) : Run<S>(run), of(transfer) {}
    Vec<A> value(const S* at, int64_t c) const {
      return of.activate(load(of.scale.data() + c) * load(at) + load(of.shift.data() + c));
    }
  };

  Vec<A> activate(Vec<A> value) const { return p.relu ? relu(value) : value; }

  // to = act(scale x + shift), which may be the same tile.
  void affine_pixels(const A* x, int64_t count, A* to) const {
    for (int64_t i = 0; i < count; ++i, x += row, to += row)
      for (int64_t c = 0; c < row; c += kLanes<A>)
        store(to + c, activate(load(scale.data() + c) * load(x + c) + load(shift.data() + c)));
  }

  // Pixels of a pass without resampling, in tiles that stay in L1.
  Pixels pixels_of(const TensorView& gradient) const {
    const bool collapse =
        collapsible(p.input, p.in_height, p.in_width) && collapsible(gradient, p.in_height, p.in_width);
    return Pixels(p.batch, p.in_height, p.in_width, collapse, tile_pixels<A>(p.channels, 16));
  }

  void forward() const {
    if (!identity && is_run<S>(p.input, p.channels)) {
      resample_to<S>(call, Blocks<A>(p.batch, call.rows, call.cols, p.channels), p.channels, p.output,
                     [&](int64_t n, int64_t h, int64_t w, int64_t, A*) {
                       return AffineRun{{pixel<S>(p.input, n, h, w), p.input.stride_w}, *this};
                     });
    } else if (!identity) {
      const Blocks<A> blocks(p.batch, call.rows, call.cols, p.channels);
      resample_to<S>(call, blocks, p.channels, p.output,
                     [&](int64_t n, int64_t h, int64_t w, int64_t count, A* buffer) {
                       affine_pixels(tile_of<S>(p.input, p.channels, n, h, w, count, buffer), count, buffer);
                       return buffer;
                     });
    } else if (planar(p.input) && planar(p.output)) {
      forward_planes();
    } else {
      const Pixels pixels = pixels_of({});
      parallel_for(call, pixels.tasks(), [&](int64_t begin, int64_t end) {
        const Buffer<A> tile(pixels.chunk * row);
        pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
          const A* x = tile_of<S>(p.input, p.channels, n, h, w, count, tile.data());
          A* to = tile_for<S>(p.output, p.channels, n, h, w, tile.data());
          affine_pixels(x, count, to);
          finish_tile<S>(p.output, p.channels, n, h, w, count, to);
        });
      });
    }
  }

  // NCHW without resampling needs no transposition: calls f(n, c, h, pixels) for each plane, or for its rows.
  template <class F>
  void visit_planes(const Pixels& lines, int64_t begin, int64_t end, const F& f) const {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t h = 0; h < lines.height; ++h) f(task / p.channels, task % p.channels, h, lines.width);
  }

  void forward_planes() const {
    const Pixels lines = pixels_of({});
    parallel_for(call, p.batch * p.channels, [&](int64_t begin, int64_t end) {
      visit_planes(lines, begin, end, [&](int64_t n, int64_t c, int64_t h, int64_t width) {
        const S* from = pixel<S>(p.input, n, h, 0) + c * p.input.stride_c;
        S* to = mutable_pixel<S>(p.output, n, h, 0) + c * p.output.stride_c;
        const A factor = scale.data()[c], offset = shift.data()[c];
        for_blocks<A>(width, [&](int64_t first, int64_t valid) {
          if (valid == kLanes<A>) {
            store(to + first, activate(factor * load(from + first) + offset));
          } else {
            store_some(to + first, activate(factor * load_some(from + first, valid) + offset), valid);
          }
        });
      });
    });
  }

  // From u, the gradient of act's result, makes grad_input's values and adds to the sums of scale and shift.
  Vec<A> backward_vector(Vec<A> u, Vec<A> x, Vec<A> factor, Vec<A> offset, Vec<A>* sums) const {
    if (p.relu) u = factor * x + offset > 0 ? u : Vec<A>{};
    sums[0] += u * x;
    sums[1] += u;
    return factor * u;
  }

  // u and the result may be the same tile.
  void backward_pixels(const A* x, const A* u, int64_t count, A* to, A* sums) const {
    constexpr int64_t lanes = kLanes<A>;
    for_vectors<A>(row, [&](int64_t c, auto vectors) {
      Vec<A> factor[vectors], offset[vectors], sum[vectors][2] = {};
      for (int v = 0; v < vectors; ++v) {
        factor[v] = load(scale.data() + c + v * lanes);
        offset[v] = load(shift.data() + c + v * lanes);
      }
      for (int64_t i = c; i < count * row; i += row)
        for (int v = 0; v < vectors; ++v)
          store(to + i + v * lanes,
                backward_vector(load(u + i + v * lanes), load(x + i + v * lanes), factor[v], offset[v], sum[v]));
      for (int v = 0; v < vectors; ++v) {
        for (int64_t s = 0; s < 2; ++s) {
          A* total = sums + s * row + c + v * lanes;
          store(total, load(total) + sum[v][s]);
        }
      }
    });
  }

  void backward() const {
    if (identity && planar(p.input) && planar(p.grad_output) && planar(p.grad_input)) return backward_planes();
    // make(to) returns a run of the gradient of act's result, which it may write there.
    const auto finish = [&](int64_t n, int64_t h, int64_t w, int64_t count, const auto& make, A* tile, A* x_tile,
                            A* sums) {
      A* to = tile_for<S>(p.grad_input, p.channels, n, h, w, tile);
      const A* u = make(to);
      backward_pixels(tile_of<S>(p.input, p.channels, n, h, w, count, x_tile), u, count, to, sums);
      finish_tile<S>(p.grad_input, p.channels, n, h, w, count, to);
    };
    const Pixels pixels = pixels_of(p.grad_output);
    const Blocks<A> blocks(p.batch, call.rows_transposed, call.cols_transposed, p.channels);
    Reduction<A> reduction(identity ? pixels.tasks() : blocks.tasks(), 2 * row);
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const int64_t run = identity ? pixels.chunk : blocks.width;
      const Buffer<A> x(run * row), u(run * row);
      if (identity) {
        pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
          const auto make = [&](A* to) { return tile_of<S>(p.grad_output, p.channels, n, h, w, count, to); };
          finish(n, h, w, count, make, u.data(), x.data(), sums);
        });
        return;
      }
      const BlockResampler<A> resampler(blocks, row, row);
      const Buffer<A> buffer(blocks.input_width() * row);
      const auto consume = [&](int64_t n, int64_t h, int64_t w, int64_t count, const auto& make) {
        const auto made = [&](A* to) {
          make(to);
          return static_cast<const A*>(to);
        };
        finish(n, h, w, count, made, u.data(), x.data(), sums);
      };
      with_source<S>(p.grad_output, p.channels, call.rows_transposed.in, [&](const auto& source) {
        for (int64_t task = begin; task < end; ++task)
          resample_block(blocks, blocks.block(task), resampler, buffer.data(), source, consume);
      });
    });
    reduction.template store_totals<A>(0, p.channels, p.grad_scale);
    reduction.template store_totals<A>(row, p.channels, p.grad_shift);
  }

  void backward_planes() const {
    const Pixels lines = pixels_of(p.grad_output);
    const Buffer<A> sums(2 * p.batch * p.channels);  // of each plane
    parallel_for(call, p.batch * p.channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = 2 * begin; i < 2 * end; ++i) sums.data()[i] = 0;
      visit_planes(lines, begin, end, [&](int64_t n, int64_t c, int64_t h, int64_t width) {
        const S* x = pixel<S>(p.input, n, h, 0) + c * p.input.stride_c;
        const S* grad = pixel<S>(p.grad_output, n, h, 0) + c * p.grad_output.stride_c;
        S* to = mutable_pixel<S>(p.grad_input, n, h, 0) + c * p.grad_input.stride_c;
        const Vec<A> factor = Vec<A>{} + scale.data()[c], offset = Vec<A>{} + shift.data()[c];
        Vec<A> sum[2] = {};
        int64_t i = 0;
        for (; i + kLanes<A> <= width; i += kLanes<A>)
          store(to + i, backward_vector(load(grad + i), load(x + i), factor, offset, sum));
        if (i < width) {
          const Vec<A> u = load_some(grad + i, width - i), value = load_some(x + i, width - i);
          store_some(to + i, backward_vector(u, value, factor, offset, sum), width - i);
        }
        for (int64_t s = 0; s < 2; ++s) sums.data()[2 * (n * p.channels + c) + s] += sum_lanes<A>(sum[s]);
      });
    });
    for (int64_t c = 0; c < p.channels; ++c) {
      A totals[2] = {};
      for (int64_t n = 0; n < p.batch; ++n)
        for (int64_t s = 0; s < 2; ++s) totals[s] += sums.data()[2 * (n * p.channels + c) + s];
      static_cast<A*>(p.grad_scale)[c] = totals[0];
      static_cast<A*>(p.grad_shift)[c] = totals[1];
    }
  }
};

inline void affine_scale_transfer(const Call& call, const AffineScaleTransferParams& params) {
  with_storage_type(params.dtype, [&](auto type) { AffineScaleTransfer<decltype(type)>(call, params).forward(); });
}

inline void affine_scale_transfer_backward(const Call& call, const AffineScaleTransferParams& params) {
  with_storage_type(params.dtype, [&](auto type) { AffineScaleTransfer<decltype(type)>(call, params).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
