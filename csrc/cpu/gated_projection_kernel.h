// gated_projection, forward and backward. Included once per instruction set.
//
//   g = sigmoid(rho . x + b),  z = W (g x),  mean and variance of each channel of z over N, H, W
#pragma once

namespace gsto::cpu::GSTO_ISA {

// Mean and sum of squared differences from it (M2) of each channel over `count` values. Partial ones are combined by
// the formula of Chan, Golub and LeVeque: no difference of large sums.
template <class A>
struct Moments {
  A* count;  // one value at the front of its vector
  A *mean, *m2;
  int64_t row;

  static int64_t size(int64_t row) { return kLanes<A> + 2 * row; }
  Moments(A* values, int64_t r) : count(values), mean(values + kLanes<A>), m2(values + kLanes<A> + r), row(r) {}

  void add_pixels(const A* tile, int64_t pixels) const {
    const A added = static_cast<A>(pixels), share = added / (*count + added);
    for (int64_t c = 0; c < row; c += kLanes<A>) {
      Vec<A> sum = {}, squares = {};
      for (int64_t i = 0; i < pixels; ++i) sum += load(tile + i * row + c);
      const Vec<A> tile_mean = sum / added;
      for (int64_t i = 0; i < pixels; ++i) {
        const Vec<A> difference = load(tile + i * row + c) - tile_mean;
        squares += difference * difference;
      }
      merge(c, tile_mean, squares, share);
    }
    *count += added;
  }

  void add(const Moments& other) const {
    if (*other.count == 0) return;
    const A share = *other.count / (*count + *other.count);
    for (int64_t c = 0; c < row; c += kLanes<A>) merge(c, load(other.mean + c), load(other.m2 + c), share);
    *count += *other.count;
  }

 private:
  void merge(int64_t c, Vec<A> other_mean, Vec<A> other_m2, A share) const {
    const Vec<A> difference = other_mean - load(mean + c);
    store(m2 + c, load(m2 + c) + other_m2 + difference * difference * (share * *count));
    store(mean + c, load(mean + c) + difference * share);
  }
};

template <class S>
struct GatedProjection : GatedPixels<S> {
  using A = Accumulate<S>;
  using Base = GatedPixels<S>;
  using Base::call;
  using Base::out_row;

  const GatedProjectionParams& p;

  GatedProjection(const Call& c, const GatedProjectionParams& params, bool is_backward)
      : Base(c, params, is_backward), p(params) {}

  void forward() const {
    const Pixels pixels = this->forward_pixels();
    Reduction<A> reduction(pixels.tasks(), Moments<A>::size(out_row));
    reduction.run(call, [&](int64_t begin, int64_t end, A* sums) {
      const Moments<A> moments(sums, out_row);
      Base::forward(
          pixels, begin, end,
          [&](int64_t n, int64_t h, int64_t w, A* tile) {
            return tile_for<S>(p.output, p.out_channels, n, h, w, tile);
          },
          [&](int64_t n, int64_t h, int64_t w, int64_t count, const A* z) {
            moments.add_pixels(z, count);
            finish_tile<S>(p.output, p.out_channels, n, h, w, count, z);
          });
    });
    const Buffer<A> values(Moments<A>::size(out_row));
    fill_pixels(values.data(), Moments<A>::size(out_row), A(0));
    const Moments<A> total(values.data(), out_row);
    for (int64_t s = 0; s < reduction.slots(); ++s) total.add(Moments<A>(reduction.slot(s), out_row));
    for (int64_t c = 0; c < p.out_channels; ++c) {
      static_cast<A*>(p.mean.data)[c] = *total.count > 0 ? total.mean[c] : A(NAN);  // as torch.var_mean of nothing
      static_cast<A*>(p.var.data)[c] = *total.count > 0 ? total.m2[c] / *total.count : A(NAN);
    }
  }

  // dz = grad_output + (grad_mean + 2 grad_var (z - mean)) / count, on the way into the tile.
  void backward() const {
    const A count = static_cast<A>(p.batch * p.in_height * p.in_width);
    const bool from_statistics = p.grad_mean.data || p.grad_var.data;
    const Buffer<A> offset(out_row), slope(out_row), mean(out_row);
    const auto fill = [&](const TensorView& t, A factor, A* to) {
      fill_padded<A>(t, t.stride_n, t.data ? p.out_channels : 0, to, out_row);
      for (int64_t c = 0; c < out_row; ++c) to[c] *= factor;
    };
    fill(p.mean, A(1), mean.data());
    fill(p.grad_mean, A(1) / count, offset.data());
    fill(p.grad_var, A(2) / count, slope.data());
    const Pixels pixels =
        this->backward_pixels(this->pixels_per_tile(), p.grad_output, from_statistics ? p.output : TensorView{});
    Base::backward(pixels, 2, [&](int64_t n, int64_t h, int64_t w, int64_t run, A* grad) {
      load_pixels<S>(p.grad_output, p.out_channels, n, h, w, run, grad);
      if (!from_statistics) return grad;
      const A* z = tile_of<S>(p.output, p.out_channels, n, h, w, run, grad + pixels.chunk * out_row);
      for (int64_t c = 0; c < out_row; c += kLanes<A>) {
        const Vec<A> centre = load(mean.data() + c), m = load(slope.data() + c), b = load(offset.data() + c);
        for (int64_t i = c; i < run * out_row; i += out_row)
          store(grad + i, load(grad + i) + b + m * (load(z + i) - centre));
      }
      return grad;
    });
  }
};

inline void gated_projection(const Call& call, const GatedProjectionParams& params) {
  with_storage_type(params.dtype, [&](auto type) { GatedProjection<decltype(type)>(call, params, false).forward(); });
}

inline void gated_projection_backward(const Call& call, const GatedProjectionParams& params) {
  with_storage_type(params.dtype, [&](auto type) { GatedProjection<decltype(type)>(call, params, true).backward(); });
}

}  // namespace gsto::cpu::GSTO_ISA
