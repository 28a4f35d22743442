// channel_statistics. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// Mean and variance of every channel. Sums are taken around the mean of the task's first pixels, and the tasks' moments
// are combined by the formula of Chan, Golub and LeVeque, their means as distances from the map's first pixel: no
// difference of large sums, and none of large means.
template <class S>
struct ChannelStatistics {
  using A = Accumulate<S>;
  static constexpr int64_t kSample = 1024;  // pixels

  const Call& call;
  const ChannelStatisticsParams& p;

  void run() const {
    const Lines<S> lines(p.planar, p.batch, p.channels, p.height, p.width, 4);
    Lines<S> sample = lines;
    sample.size = least(lines.size, kSample * lines.unit);
    const int64_t period = lines.period, used = lines.used();
    const Buffer<A> origin(p.channels);
    for (int64_t c = 0; c < p.channels && p.batch > 0; ++c)
      origin.data()[c] = load_some(pixel<S>(p.input, 0, 0, 0) + c * p.input.stride_c, 1)[0];
    // Of each slot: mean, squares (the sum of squared differences), and pixels, for every channel; all slots' channels
    // are merged in the end, so that small maps have few.
    Reduction<A> reduction(lines.tasks(), 3 * p.channels, lines.values() / 4);
    reduction.run(call, [&](int64_t begin, int64_t end, A* moments) {
      const Buffer<A> sums(2 * period), centre(period), channel(3 * used);
      lines.visit(begin, end, [&](int64_t n, int64_t group, int64_t first, int64_t last) {
        const auto clear = [&] { fill_pixels(sums.data(), 2 * period, A(0)); };
        clear();
        const S* line = lines.line(p.input, n, group, first);
        sample.template add_up<1>(sums.data(), 0, [&](int64_t i, int64_t, int64_t valid, auto& sum) {
          sum[0] += load_valid(line + i, valid);
        });
        lines.fold_group(sums.data(), channel.data());
        const A sampled = static_cast<A>(sample.size / lines.unit);
        lines.fill_group(centre.data(), [&](int64_t c) { return channel.data()[c] / sampled; });
        clear();
        for (int64_t h = first; h < last; ++h) {
          const S* values = lines.line(p.input, n, group, h);
          lines.template add_up<2>(sums.data(), period, [&](int64_t i, int64_t j, int64_t valid, auto& sum) {
            Vec<A> d = read_valid(values + i, valid) - load(centre.data() + j);
            if (valid < kLanes<A>) d = first_values<A>(d, valid);
            sum[0] += d;
            sum[1] += d * d;
          });
        }
        lines.fold_group(sums.data(), channel.data());
        lines.fold_group(sums.data() + period, channel.data() + used);
        const A pixels = static_cast<A>((last - first) * p.width);
        for (int64_t c = 0; c < used; ++c) {
          const A shift = channel.data()[c] / pixels;
          merge(moments, group * used + c, pixels, centre.data()[c] - origin.data()[group * used + c] + shift,
                channel.data()[used + c] - shift * channel.data()[c]);
        }
      });
    });
    const Buffer<A> total(3 * p.channels);
    for (int64_t i = 0; i < 3 * p.channels; ++i) total.data()[i] = 0;
    for (int64_t s = 0; s < reduction.slots(); ++s)
      for (int64_t c = 0; c < p.channels; ++c) {
        const A* slot = reduction.slot(s);
        merge(total.data(), c, slot[2 * p.channels + c], slot[c], slot[p.channels + c]);
      }
    for (int64_t c = 0; c < p.channels; ++c) {
      const A pixels = total.data()[2 * p.channels + c];
      static_cast<A*>(p.mean)[c] =
          pixels > 0 ? origin.data()[c] + total.data()[c] : A(NAN);  // as torch.var_mean of nothing
      static_cast<A*>(p.var)[c] = pixels > 0 ? most_of(total.data()[p.channels + c] / pixels, A(0)) : A(NAN);
    }
  }

  static A most_of(A a, A b) { return a < b ? b : a; }  // a NaN stays one

  void merge(A* moments, int64_t c, A pixels, A mean, A squares) const {
    if (pixels == 0) return;
    A &own_mean = moments[c], &own_squares = moments[p.channels + c], &own_pixels = moments[2 * p.channels + c];
    const A share = pixels / (own_pixels + pixels), difference = mean - own_mean;
    own_squares += squares + difference * difference * share * own_pixels;
    own_mean += difference * share;
    own_pixels += pixels;
  }
};

inline void channel_statistics(const Call& call, const ChannelStatisticsParams& params) {
  with_storage_type(params.dtype, [&](auto type) { ChannelStatistics<decltype(type)>{call, params}.run(); });
}

}  // namespace gsto::cpu::GSTO_ISA
