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
  // takes less than a tile in between. Without an activation the affine waits for the sum, as the weights add up to
  // one.
  template <bool kRelu>
  struct AffineRun : Run<S, true> {
    const AffineScaleTransfer* of = nullptr;

    AffineRun() = default;
    AffineRun(const Run<S, true>& run, const AffineScaleTransfer& transfer) : Run<S, true>(run), of(&transfer) {}

    template <int kVectors>
    struct Channels {
      Vec<A> scale[kVectors], shift[kVectors];

      Vec<A> value(const S* at, int v) const {
        ask_ahead(at);
        return kRelu ? relu(scale[v] * load(at) + shift[v]) : load(at);
      }
      Vec<A> result(Vec<A> sum, int v) const { return kRelu ? sum : scale[v] * sum + shift[v]; }
    };
    template <int kVectors>
    Channels<kVectors> channels(int64_t c) const {
      Channels<kVectors> found;
      for (int v = 0; v < kVectors; ++v) {
        found.scale[v] = load(of->scale.data() + c + v * kLanes<A>);
        found.shift[v] = load(of->shift.data() + c + v * kLanes<A>);
      }
      return found;
    }
  };

  Vec<A> activate(Vec<A> value) const { return p.relu ? relu(value) : value; }

  // to = act(scale x + shift), which may be the same pixels; tiles, or memory whose pixels are whole vectors.
  template <class T>
  void affine_pixels(const T* x, int64_t x_row, int64_t count, T* to, int64_t to_row) const {
    for (int64_t i = 0; i < count; ++i, x += x_row, to += to_row)
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
    if (!identity && planar_resampling(call.rows, p.input, p.output)) {
      p.relu ? forward_planes_resampled<true>() : forward_planes_resampled<false>();
    } else if (!identity && p.input.stride_c == 1) {
      p.relu ? forward_run<true>() : forward_run<false>();
    } else if (!identity) {
      resample_to<S>(call, p.batch, call.rows, call.cols, p.channels, p.output,
                     [&](int64_t n, int64_t h, int64_t w, int64_t count, A* buffer) {
                       affine_pixels(tile_of<S>(p.input, p.channels, n, h, w, count, buffer), row, count, buffer, row);
                       return buffer;
                     });
    } else if (planar(p.input) && planar(p.output)) {
      forward_planes();
    } else {
      const Pixels pixels = pixels_of({});
      const bool runs = is_run<S>(p.input, p.channels) && is_run<S>(p.output, p.channels);
      parallel_for(call, pixels.tasks(), [&](int64_t begin, int64_t end) {
        const Buffer<A> tile(runs ? 0 : pixels.chunk * row);
        pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
          if (runs)
            return affine_pixels(pixel<S>(p.input, n, h, w), p.input.stride_w, count,
                                 mutable_pixel<S>(p.output, n, h, w), p.output.stride_w);
          const A* x = tile_of<S>(p.input, p.channels, n, h, w, count, tile.data());
          affine_pixels(x, row, count, tile.data(), row);
          store_pixels<S>(p.output, p.channels, n, h, w, count, tile.data());
        });
      });
    }
  }

  template <bool kRelu>
  void forward_run() const {
    const PixelRuns<S> runs(p.input, p.channels, p.batch, p.in_height, p.in_width);
    resample_to<S>(call, p.batch, call.rows, call.cols, p.channels, p.output,
                   [&](int64_t n, int64_t h, int64_t w, int64_t count, A* buffer) {
                     return AffineRun<kRelu>(runs(n, h, w, count, buffer), *this);
                   });
  }

  // Whether the map of more rows is planar, so that a resampling need not transpose it.
  static bool planar_resampling(const AxisView& rows, const TensorView& from, const TensorView& to) {
    return planar(rows.out <= rows.in ? from : to);
  }

  template <bool kRelu>
  void forward_planes_resampled() const {
    const PlaneResampler<S> resampler(p.batch, p.channels, call.rows, call.cols);
    parallel_for(call, resampler.tasks(), [&](int64_t begin, int64_t end) {
      if (call.rows.out <= call.rows.in) {
        const auto value = [&](int64_t c) {
          const Vec<A> factor = Vec<A>{} + scale.data()[c], offset = Vec<A>{} + shift.data()[c];
          return [=](Vec<A> x) { return kRelu ? relu(factor * x + offset) : factor * x + offset; };
        };
        resampler.rows_first(
            begin, end, p.input, value,
            [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t count, const A* pixels) {
              store_pixels<S>(from_channel<S>(p.output, c), channels, n, h, w, count, pixels);
            });
        return;
      }
      resampler.columns_first(
          begin, end,
          [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t count, A* pixels) {
            load_pixels<S>(from_channel<S>(p.input, c), channels, n, h, w, count, pixels);
            const Vec<A> factor = load(scale.data() + c), offset = load(shift.data() + c);
            for (int64_t i = 0; i < count; ++i, pixels += kLanes<A>) {
              const Vec<A> y = factor * load(pixels) + offset;
              store(pixels, kRelu ? relu(y) : y);
            }
          },
          [&](int64_t n, int64_t c, int64_t h, int64_t w, int64_t count, const A* line) {
            S* to = mutable_pixel<S>(p.output, n, h, w) + c * p.output.stride_c;
            prefetch_run<true>(to + 2 * p.output.stride_c, count);
            store_channels(to, count, line);
          },
          [](int64_t, int64_t) {});
    });
  }

  // NCHW without resampling needs no transposition either.
  void forward_planes() const {
    const Pixels lines = pixels_of({});
    parallel_for(call, p.batch * p.channels, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / p.channels, c = task % p.channels;
        const A factor = scale.data()[c], offset = shift.data()[c];
        for (int64_t h = 0; h < lines.height; ++h) {
          const S* from = pixel<S>(p.input, n, h, 0) + c * p.input.stride_c;
          S* to = mutable_pixel<S>(p.output, n, h, 0) + c * p.output.stride_c;
          for_blocks<A>(lines.width, [&](int64_t first, int64_t valid) {
            store_valid(to + first, activate(factor * load_valid(from + first, valid) + offset), valid);
          });
        }
      }
    });
  }

  // From u, the gradient of act's result, makes grad_input's values and adds to the sums of scale and shift.
  Vec<A> backward_vector(Vec<A> u, Vec<A> x, Vec<A> factor, Vec<A> offset, Vec<A>* sums) const {
    if (p.relu) u = factor * x + offset > 0 ? u : Vec<A>{};
    sums[0] += u * x;
    sums[1] += u;
    return factor * u;
  }

  // u and the result may be the same pixels; tiles, or memory whose pixels are whole vectors.
  template <class X, class U>
  void backward_pixels(const X* x, int64_t x_row, const U* u, int64_t u_row, int64_t count, X* to, int64_t to_row,
                       A* sums) const {
    constexpr int64_t lanes = kLanes<A>;
    for_vectors<A>(row, [&](int64_t c, auto vectors) {
      Vec<A> factor[vectors], offset[vectors], sum[vectors][2] = {};
      for (int v = 0; v < vectors; ++v) {
        factor[v] = load(scale.data() + c + v * lanes);
        offset[v] = load(shift.data() + c + v * lanes);
      }
      for (int64_t i = 0; i < count; ++i)
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = c + v * lanes;
          store(to + i * to_row + at,
                backward_vector(load(u + i * u_row + at), load(x + i * x_row + at), factor[v], offset[v], sum[v]));
        }
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
    if (!identity && planar_resampling(call.rows_transposed, p.grad_output, p.input) && planar(p.grad_input))
      return backward_planes_resampled();
    const bool runs = is_run<S>(p.input, p.channels) && is_run<S>(p.grad_input, p.channels);
    // From u, a run of the gradient of act's result; tile may be u.
    const auto finish = [&](int64_t n, int64_t h, int64_t w, int64_t count, const auto* u, int64_t u_row, A* tile,
                            A* x_tile, A* sums) {
      if (runs) {
        if (!identity && h + 1 < p.in_height) prefetch_pixels<S>(p.input, p.channels, n, h + 1, w, count);
        return backward_pixels(pixel<S>(p.input, n, h, w), p.input.stride_w, u, u_row, count,
                               mutable_pixel<S>(p.grad_input, n, h, w), p.grad_input.stride_w, sums);
      }
      const A* x = tile_of<S>(p.input, p.channels, n, h, w, count, x_tile);
      backward_pixels(x, row, u, u_row, count, tile, row, sums);
      store_pixels<S>(p.grad_input, p.channels, n, h, w, count, tile);
    };
    const Pixels pixels = pixels_of(p.grad_output);
    const int64_t kilobytes = p.grad_output.stride_c == 1 ? kLongRuns : 16;
    const Blocks<A> blocks(p.batch, call.rows_transposed, call.cols_transposed, p.channels, kilobytes);
    Reduction<A> reduction(identity ? pixels.tasks() : blocks.tasks(), 2 * row);
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const int64_t run = identity ? pixels.chunk : blocks.width;
      const Buffer<A> x(run * row), u(run * row);
      if (identity) {
        const bool direct = runs && is_run<S>(p.grad_output, p.channels);
        pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
          if (direct)
            return finish(n, h, w, count, pixel<S>(p.grad_output, n, h, w), p.grad_output.stride_w, u.data(), x.data(),
                          sums);
          const A* gradient = tile_of<S>(p.grad_output, p.channels, n, h, w, count, u.data());
          finish(n, h, w, count, gradient, row, u.data(), x.data(), sums);
        });
        return;
      }
      const BlockResampler<A> resampler(blocks, row, row);
      const Buffer<A> buffer(blocks.input_width() * row);
      const auto consume = [&](int64_t n, int64_t h, int64_t w, int64_t count, const auto& make) {
        make(u.data());
        finish(n, h, w, count, static_cast<const A*>(u.data()), row, u.data(), x.data(), sums);
      };
      with_source<S>(p.grad_output, p.channels, p.batch, call.rows_transposed.in, call.cols_transposed.in, false,
                     [&](const auto& source) {
                       for (int64_t task = begin; task < end; ++task)
                         resample_block(blocks, blocks.block(task), resampler, buffer.data(), source, consume);
                     });
    });
    reduction.template store_totals<A>(0, p.channels, p.grad_scale);
    reduction.template store_totals<A>(row, p.channels, p.grad_shift);
  }

  void backward_planes_resampled() const {
    constexpr int64_t lanes = kLanes<A>;
    const PlaneResampler<S> resampler(p.batch, p.channels, call.rows_transposed, call.cols_transposed);
    Reduction<A> reduction(resampler.tasks(), 2 * row);
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      if (call.rows_transposed.out <= call.rows_transposed.in) {
        const Buffer<A> buffer(p.in_width * lanes);
        resampler.rows_first(
            begin, end, p.grad_output, [](int64_t) { return [=](Vec<A> u) { return u; }; },
            [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t count, A* u) {
              load_pixels<S>(from_channel<S>(p.input, c), channels, n, h, w, count, buffer.data());
              const Vec<A> factor = load(scale.data() + c), offset = load(shift.data() + c);
              Vec<A> sum[2] = {load(sums + c), load(sums + row + c)};
              for (int64_t i = 0; i < count; ++i) {
                A* at = u + i * lanes;
                store(at, backward_vector(load(at), load(buffer.data() + i * lanes), factor, offset, sum));
              }
              for (int64_t s = 0; s < 2; ++s) store(sums + s * row + c, sum[s]);
              store_pixels<S>(from_channel<S>(p.grad_input, c), channels, n, h, w, count, u);
            });
        return;
      }
      const Buffer<A> plane_sums(2 * lanes * lanes);
      fill_pixels(plane_sums.data(), 2 * lanes * lanes, A(0));
      resampler.columns_first(
          begin, end,
          [&](int64_t n, int64_t c, int64_t channels, int64_t h, int64_t w, int64_t count, A* pixels) {
            load_pixels<S>(from_channel<S>(p.grad_output, c), channels, n, h, w, count, pixels);
          },
          [&](int64_t n, int64_t c, int64_t h, int64_t w, int64_t count, const A* u) {
            const S* x = pixel<S>(p.input, n, h, w) + c * p.input.stride_c;
            S* to = mutable_pixel<S>(p.grad_input, n, h, w) + c * p.grad_input.stride_c;
            prefetch_run<false>(x + 2 * p.input.stride_c, count);
            prefetch_run<true>(to + 2 * p.grad_input.stride_c, count);
            line_backward(x, u, count, c, to, plane_sums.data() + c % lanes * 2 * lanes);
          },
          [&](int64_t c, int64_t channels) {
            for (int64_t i = 0; i < 2 * channels; ++i) {
              A* sum = plane_sums.data() + i * lanes;
              sums[i % 2 * row + c + i / 2] += sum_lanes<A>(load(sum));
              store(sum, Vec<A>{});
            }
          });
    });
    reduction.template store_totals<A>(0, p.channels, p.grad_scale);
    reduction.template store_totals<A>(row, p.channels, p.grad_shift);
  }

  // A row of one plane; adds to two vectors of sums.
  template <class U>
  void line_backward(const S* x, const U* u, int64_t count, int64_t c, S* to, A* sums) const {
    const Vec<A> factor = Vec<A>{} + scale.data()[c], offset = Vec<A>{} + shift.data()[c];
    Vec<A> sum[2] = {load(sums), load(sums + kLanes<A>)};
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>)
      store(to + i, backward_vector(load(u + i), load(x + i), factor, offset, sum));
    if (i < count) {
      const Vec<A> value = load_some(x + i, count - i);
      store_some(to + i, backward_vector(load_some(u + i, count - i), value, factor, offset, sum), count - i);
    }
    store(sums, sum[0]);
    store(sums + kLanes<A>, sum[1]);
  }

  void backward_planes() const {
    const Pixels lines = pixels_of(p.grad_output);
    const Buffer<A> sums(2 * p.batch * p.channels);  // of each plane
    parallel_for(call, p.batch * p.channels, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / p.channels, c = task % p.channels;
        A plane_sums[2 * kLanes<A>] = {};
        for (int64_t h = 0; h < lines.height; ++h)
          line_backward(pixel<S>(p.input, n, h, 0) + c * p.input.stride_c,
                        pixel<S>(p.grad_output, n, h, 0) + c * p.grad_output.stride_c, lines.width, c,
                        mutable_pixel<S>(p.grad_input, n, h, 0) + c * p.grad_input.stride_c, plane_sums);
        for (int64_t s = 0; s < 2; ++s) sums.data()[2 * task + s] = sum_lanes<A>(load(plane_sums + s * kLanes<A>));
      }
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
