// Rows of pixels: where they lie, mixed, and resampled along the columns. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class A>
inline void fill_pixels(A* to, int64_t size, A value) {
  for (int64_t c = 0; c < size; c += kLanes<A>) store(to + c, Vec<A>{} + value);
}

// A run of input pixels, `row` elements apart: a tile, or memory whose pixels are whole vectors of channels and which
// is read in order (kInOrder). Other runs may change what is read and what is made; Channels then holds the constants
// of a few vectors of channels.
template <class S, bool kInOrder = false>
struct Run {
  const S* data;
  int64_t row;

  template <int kVectors>
  struct Channels {
    Vec<Accumulate<S>> value(const S* at, int) const {
      if (kInOrder) ask_ahead(at);
      return load(at);
    }
    Vec<Accumulate<S>> result(Vec<Accumulate<S>> sum, int) const { return sum; }
  };
  template <int kVectors>
  Channels<kVectors> channels(int64_t) const {
    return {};
  }
};

template <class S>
inline bool is_run(const TensorView& t, int64_t channels) {
  return t.stride_c == 1 && channels % kLanes<Accumulate<S>> == 0;
}

// Calls f with the number of taps as a constant if it is that of bilinear enlarging (2), of its transpose by 2 (4) or
// of pooling by either; else with 0.
template <class F>
inline void with_taps(int64_t taps, const F& f) {
  if (taps == 2) return f(std::integral_constant<int, 2>());
  if (taps == 4) return f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, 0>());
}

// kVectors vectors of sum_t weights[t] * from[t * row]. kTaps is the number of taps, or 0.
template <int kTaps, int kVectors, class A, class Channels, class S, class To>
__attribute__((always_inline)) inline void combine_vectors(const A* weights, int64_t taps, const Channels& channels,
                                                           const S* from, int64_t row, To* to) {
  Vec<A> sum[kVectors] = {};
  if (kTaps)
    for (int v = 0; v < kVectors; ++v) sum[v] = weights[0] * channels.value(from + v * kLanes<A>, v);
  for (int64_t t = kTaps ? 1 : 0; t < (kTaps ? kTaps : taps); ++t)
    for (int v = 0; v < kVectors; ++v) sum[v] += weights[t] * channels.value(from + t * row + v * kLanes<A>, v);
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes<A>, channels.result(sum[v], v));
}

// to = sum_t weights[t] * from[t * step] for runs of `size` values: whole vectors, unless kExact. The last vector of an
// exact run overlaps the one before it.
template <bool kExact, class A, class To>
inline void combine(const A* weights, int64_t taps, const A* from, int64_t step, int64_t size, To* to) {
  constexpr int64_t lanes = kLanes<A>;
  const auto make = [=](int64_t c, auto vectors, To* at) {
    constexpr int count = decltype(vectors)::value;
    const typename Run<A>::template Channels<count> channels;
    with_taps(taps,
              [=](auto constant) { combine_vectors<constant, count>(weights, taps, channels, from + c, step, at); });
  };
  if (taps == 2) {  // bilinear
    const A w0 = weights[0], w1 = weights[1];
    for (int64_t c = 0; c + lanes <= size; c += lanes) store(to + c, w0 * load(from + c) + w1 * load(from + step + c));
  } else {
    for_vectors<A>(size, [=](int64_t c, auto vectors) { make(c, vectors, to + c); });
  }
  if (!kExact || size % lanes == 0) return;
  constexpr auto one = std::integral_constant<int, 1>();
  if (size >= lanes) return make(size - lanes, one, to + size - lanes);
  To last[lanes];
  make(0, one, last);
  for (int64_t i = 0; i < size; ++i) to[i] = last[i];
}

template <class A>
inline Run<A> as_run(A* tile, int64_t row) {
  return {tile, row};
}
template <class A>
inline Run<A> as_run(const A* tile, int64_t row) {
  return {tile, row};
}
template <class R>
inline const R& as_run(const R& run, int64_t) {
  return run;
}

// Columns with the ends of their runs of equally many taps.
template <class A>
struct Columns {
  AxisView axis;
  Buffer<int64_t> run_end;

  explicit Columns(const AxisView& view) : axis(view), run_end(view.out) {
    for (int64_t o = axis.out - 1; o >= 0; --o)
      run_end.data()[o] = o + 1 < axis.out && axis.taps(o + 1) == axis.taps(o) ? run_end.data()[o + 1] : o + 1;
  }

  // Calls f(taps as a constant, weights, taps, from, to) for the pixels [begin, end) of a row. The run's first pixel is
  // axis.start[begin]; the pixels made are `step` apart.
  template <class R, class To, class F>
  void visit(int64_t begin, int64_t end, const R& run, To* to, int64_t step, const F& f) const {
    const int64_t* const start = axis.start;
    const A* weights = axis.template weights<A>(begin);
    const auto* const data = run.data - start[begin] * run.row;
    const int64_t row = run.row;
    for (int64_t o = begin; o < end;) {
      const int64_t taps = axis.taps(o), last = least(end, run_end.data()[o]);
      with_taps(taps, [=](auto constant) {  // copies, which stay in registers whatever f writes
        const A* w = weights;
        To* at = to;
        for (int64_t i = o; i < last; ++i, w += constant ? constant : taps, at += step)
          f(constant, w, taps, data + start[i] * row, at);
      });
      weights += (last - o) * taps;
      to += (last - o) * step;
      o = last;
    }
  }
};

// A row resampled along the columns, in whole vectors of the `row` channels. Pixels that are closer than that are
// written in ascending order: each overwrites what the one before it wrote too much. kInOrder: whether to ask for the
// memory behind what is written.
template <bool kInOrder, class A, class R, class To>
inline void resample_columns(const Columns<A>& cols, int64_t begin, int64_t end, const R& run, int64_t row, To* to,
                             int64_t step) {
  const int64_t from_row = run.row;
  const auto ask = [](const To* at, int vectors) __attribute__((always_inline)) {
    if (!kInOrder) return;
    for (int v = 0; v < vectors; ++v) ask_ahead<true>(at + v * kLanes<A>);
  };
  if (row <= 4 * kLanes<A>) {  // few channels: the loop over pixels is compiled for their number
    for_vectors<A>(row, [&](int64_t c, auto vectors) {
      const auto channels = run.template channels<vectors>(c);
      cols.visit(begin, end, run, to, step,
                 [=](auto constant, const A* weights, int64_t taps, const auto* from, To* at) {
                   ask(at + c, vectors);
                   combine_vectors<constant, vectors>(weights, taps, channels, from + c, from_row, at + c);
                 });
    });
  } else {
    cols.visit(begin, end, run, to, step, [=](auto constant, const A* weights, int64_t taps, const auto* from, To* at) {
      for_vectors<A>(row, [=](int64_t c, auto vectors) {
        ask(at + c, vectors);
        combine_vectors<constant, vectors>(weights, taps, run.template channels<vectors>(c), from + c, from_row,
                                           at + c);
      });
    });
  }
}

// Runs of channels_last pixels where they lie. Where pixels are no whole vectors, the last one reaches into the next
// pixel: what is made of these lanes must not be used. Only a map's end, beyond which memory may not be read, is
// copied.
template <class S>
class PixelRuns {
 public:
  PixelRuns(const TensorView& t, int64_t channels, int64_t batch, int64_t height, int64_t width)
      : map_(t),
        channels_(channels),
        row_(padded<Accumulate<S>>(channels)),
        height_(height),
        end_(pixel<S>(t, batch - 1, height - 1, width - 1) + channels) {}

  Run<S, true> operator()(int64_t n, int64_t h, int64_t w, int64_t count, Accumulate<S>* buffer) const {
    if (h + 1 < height_) prefetch_pixels<S>(map_, channels_, n, h + 1, w, count);
    const S* from = pixel<S>(map_, n, h, w);
    if (from + (count - 1) * map_.stride_w + row_ <= end_) return {from, map_.stride_w};
    S* const copy = reinterpret_cast<S*>(buffer);
    for (int64_t i = 0; i < count; ++i)
      __builtin_memcpy(copy + i * row_, from + i * map_.stride_w, static_cast<size_t>(channels_) * sizeof(S));
    return {copy, row_};
  }

 private:
  const TensorView& map_;
  const int64_t channels_, row_, height_;
  const S* const end_;
};

// Calls use(source) with the source of a map for a resampling: its pixels where they lie, or in tiles, whose lanes
// beyond the channels are zeros.
template <class S, class Use>
inline void with_source(const TensorView& t, int64_t channels, int64_t batch, int64_t height, int64_t width, bool zeros,
                        const Use& use) {
  if (is_run<S>(t, channels) || (t.stride_c == 1 && !zeros)) {
    use(PixelRuns<S>(t, channels, batch, height, width));
  } else {
    use([&](int64_t n, int64_t h, int64_t w, int64_t count, Accumulate<S>* buffer) {
      if (h + 1 < height) prefetch_pixels<S>(t, channels, n, h + 1, w, count);
      return tile_of<S>(t, channels, n, h, w, count, buffer);
    });
  }
}

// A row of pixels mixed from two rows at most.
template <class R, class A>
inline void mix_rows(const A* weights, int64_t taps, const R& first, const R& second, int64_t row, int64_t count,
                     A* to) {
  const int64_t distance = second.data - first.data, change = second.row - first.row;  // from pixel to pixel
  with_taps(taps, [=](auto constant) {
    const auto* from = first.data;
    A* at = to;
    if (row <= 4 * kLanes<A>) {
      for_vectors<A>(row, [=](int64_t c, auto vectors) {
        const auto channels = first.template channels<vectors>(c);
        for (int64_t i = 0; i < count; ++i)
          combine_vectors<constant, vectors>(weights, taps, channels, from + i * first.row + c, distance + i * change,
                                             at + i * row + c);
      });
    } else {
      for (int64_t i = 0; i < count; ++i, from += first.row, at += row)
        for_vectors<A>(row, [=](int64_t c, auto vectors) {
          combine_vectors<constant, vectors>(weights, taps, first.template channels<vectors>(c), from + c,
                                             distance + i * change, at + c);
        });
    }
  });
}

}  // namespace gsto::cpu::GSTO_ISA
