// Resampling of NCHW maps. Rows are combined where they lie, plane by plane, so that each plane is read or written in
// sequence; only the map with fewer rows is transposed, to combine its columns. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// The map whose planes start at this channel.
template <class S>
inline TensorView from_channel(TensorView t, int64_t c) {
  if (t.data) t.data = static_cast<S*>(t.data) + c * t.stride_c;
  return t;
}

// Lane i is the sum of vector i.
template <class A>
inline Vec<A> sum_each(const A* vectors) {
  Vec<A> rows[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) rows[i] = load(vectors + i * kLanes<A>);
  transpose<A>(rows);
  for (int i = 1; i < kLanes<A>; ++i) rows[0] += rows[i];
  return rows[0];
}

// Calls f(first, valid) for the vectors of a line; all but the last have a constant number of values.
template <class A, class F>
inline void for_parts(int64_t size, const F& f) {
  int64_t first = 0;
  for (; first + kLanes<A> <= size; first += kLanes<A>) f(first, std::integral_constant<int64_t, kLanes<A>>());
  if (first < size) f(first, size - first);
}

// Calls f(c, number of channels as a constant) for channels c .. end - 1.
template <class F>
inline void for_channels(int64_t c, int64_t end, const F& f) {
  for (; c + 4 <= end; c += 4) f(c, std::integral_constant<int, 4>());
  for (; c < end; ++c) f(c, std::integral_constant<int, 1>());
}

// dots[w] of kLevels lines, `next` values apart, += sum of weight(c, level, w, valid) x over the lines of kChannels
// planes.
template <int kLevels, int kChannels, class S, class A, class Weight>
inline void add_products(const S* x, int64_t plane, int64_t count, const Weight& weight, A* dots, int64_t next) {
  for_parts<A>(count, [=](int64_t w, auto valid) {
    Vec<A> value[kChannels];
    for (int64_t c = 0; c < kChannels; ++c) {
      value[c] = load_valid(x + c * plane + w, valid);
      __builtin_prefetch(x + (c + kChannels) * plane + w);
    }
    for (int64_t k = 0; k < kLevels; ++k) {
      Vec<A> sum = load(dots + k * next + w);
      for (int64_t c = 0; c < kChannels; ++c) sum += weight(c, k, w, valid) * value[c];
      store(dots + k * next + w, sum);
    }
  });
}

// Works on as many planes at a time as a vector has lanes.
template <class S>
class PlaneResampler {
  using A = Accumulate<S>;
  static constexpr int64_t lanes = kLanes<A>;

 public:
  PlaneResampler(int64_t batch, int64_t channels, const AxisView& rows, const AxisView& cols)
      : channels_(channels), groups_((channels + lanes - 1) / lanes), blocks_(batch * groups_, rows, cols, lanes) {}

  int64_t tasks() const { return blocks_.tasks(); }

  // Rows first, then columns. Calls consume(n, c, channels, h, w, count, tile) for the runs of resampled pixels of
  // tasks begin .. end - 1. value(c) returns the function that is applied to the values of a plane.
  template <class Value, class Consume>
  void rows_first(int64_t begin, int64_t end, const TensorView& from, const Value& value,
                  const Consume& consume) const {
    const int64_t most_columns = blocks_.input_width(), size = padded<A>(most_columns);
    const Buffer<A> planes(lanes * size), tile(most_columns * lanes), result(blocks_.width * lanes);
    visit(begin, end, [&](int64_t n, int64_t c, int64_t channels, const Block& block) {
      const int64_t w = blocks_.cols.start[block.col0], count = blocks_.cols.end(block.col1 - 1) - w;
      for (int64_t o = block.row0; o < block.row1; ++o) {
        for (int64_t i = 0; i < channels; ++i) {
          const S* first = pixel<S>(from, n, blocks_.rows.start[o], w) + (c + i) * from.stride_c;
          const int64_t step = from.stride_h;
          for (int64_t t = 0; t < blocks_.rows.taps(o); ++t)
            prefetch_run<false>(first + 2 * from.stride_c + t * step, count);
          combine_lines(o, count, [=](int64_t t) { return first + t * step; }, value(c + i), planes.data() + i * size);
        }
        load_pixels<A>({planes.data(), 0, size, 0, 1}, channels, 0, 0, 0, count, tile.data());
        combine_columns(block, tile.data(), result.data());
        consume(n, c, channels, o, block.col0, block.width(), result.data());
      }
    });
  }

  // Columns first, then rows. source(n, c, channels, h, w, count, buffer) makes a run of pixels as a tile; calls
  // consume(n, c, h, w, count, line) for the resampled runs of each plane, and finish(c, channels) behind each task.
  template <class Source, class Consume, class Finish>
  void columns_first(int64_t begin, int64_t end, const Source& source, const Consume& consume,
                     const Finish& finish) const {
    const int64_t capacity = most(1, blocks_.rows.most_taps), size = padded<A>(blocks_.width);
    const Buffer<A> buffer(blocks_.input_width() * lanes), tile(blocks_.width * lanes);
    const Buffer<A> window(capacity * lanes * size), line(size);  // the rows that an output needs, plane by plane
    visit(begin, end, [&](int64_t n, int64_t c, int64_t channels, const Block& block) {
      const int64_t w = blocks_.cols.start[block.col0], count = blocks_.cols.end(block.col1 - 1) - w;
      int64_t filled = 0;
      for (int64_t o = block.row0; o < block.row1; ++o) {
        const int64_t start = blocks_.rows.start[o];
        for (filled = most(filled, start); filled < blocks_.rows.end(o); ++filled) {
          source(n, c, channels, filled, w, count, buffer.data());
          combine_columns(block, buffer.data(), tile.data());
          store_pixels<A>({window.data() + filled % capacity * lanes * size, 0, size, 0, 1}, channels, 0, 0, 0,
                          block.width(), tile.data());
        }
        for (int64_t i = 0; i < channels; ++i) {
          const A* rows = window.data() + i * size;
          combine_lines(
              o, block.width(), [=](int64_t t) { return rows + (start + t) % capacity * lanes * size; },
              [=](Vec<A> v) { return v; }, line.data());
          consume(n, c + i, o, block.col0, block.width(), line.data());
        }
      }
      finish(c, channels);
    });
  }

 private:
  // Calls f(n, first channel, channels, block of the resampled map) for these tasks.
  template <class F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    for (int64_t task = begin; task < end; ++task) {
      const Block block = blocks_.block(task);
      const int64_t c = block.n % groups_ * lanes;
      f(block.n / groups_, c, least(lanes, channels_ - c), block);
    }
  }

  // A row of one plane: to = sum_t weights[t] * value(line(t)), in whole vectors.
  template <class Line, class Value>
  void combine_lines(int64_t o, int64_t size, const Line& line, const Value& value, A* to) const {
    const A* weights = blocks_.rows.template weights<A>(o);
    const int64_t taps = blocks_.rows.taps(o);
    with_taps(taps, [&](auto constant) {
      decltype(line(0)) lines[constant + 1];  // in registers, whatever is stored
      for (int64_t t = 0; t < constant; ++t) lines[t] = line(t);
      for_blocks<A>(size, [&](int64_t first, int64_t valid) {
        Vec<A> sum = {};
        for (int64_t t = 0; t < (constant ? constant : taps); ++t)
          sum += weights[t] * value(load_valid((constant ? lines[t] : line(t)) + first, valid));
        store(to + first, sum);
      });
    });
  }

  void combine_columns(const Block& block, const A* tile, A* to) const {
    const AxisView& cols = blocks_.cols;
    for (int64_t o = block.col0; o < block.col1; ++o, to += lanes) {
      const A* from = tile + (cols.start[o] - cols.start[block.col0]) * lanes;
      with_taps(cols.taps(o), [&](auto constant) {
        const typename Run<A>::template Channels<1> channels;
        combine_vectors<constant, 1>(cols.template weights<A>(o), cols.taps(o), channels, from, lanes, to);
      });
    }
  }

  int64_t channels_, groups_;
  Blocks<A> blocks_;
};

}  // namespace gsto::cpu::GSTO_ISA
