// The resampling routine: every mode, forward and (with transposed tables) backward, works through it. It makes one
// block of the resampled map at a time, so that its rows stay in cache. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// Output pixels [row0, row1) x [col0, col1) of image n.
struct Block {
  int64_t n, row0, row1, col0, col1;

  int64_t height() const { return row1 - row0; }
  int64_t width() const { return col1 - col0; }
};

// The blocks of a map resampled along both axes. Their size does not depend on the number of threads.
template <class A>
struct Blocks {
  AxisView rows, cols;
  int64_t batch, height, width;  // of a full block
  int64_t per_col, per_row;

  // Columns: 16 KiB of the wider one of input and output, for L1. Rows: an eighth, so that one image occupies many
  // threads.
  Blocks(int64_t n, const AxisView& r, const AxisView& c, int64_t channels, int64_t kilobytes = 16)
      : rows(r), cols(c), batch(n) {
    const int64_t pixel = padded<A>(channels) * static_cast<int64_t>(sizeof(A));
    const int64_t shrink = most(1, cols.in / cols.out);
    width = least(cols.out, most(16, (kilobytes << 10) / (pixel * shrink) / 16 * 16));
    height = (rows.out + 7) / 8;
    per_col = (rows.out + height - 1) / height;
    per_row = (cols.out + width - 1) / width;
  }

  int64_t tasks() const { return batch * per_col * per_row; }

  Block block(int64_t task) const {
    const int64_t col = task % per_row * width, row = task / per_row % per_col * height;
    return {task / per_row / per_col, row, least(rows.out, row + height), col, least(cols.out, col + width)};
  }

  // The widest run of input columns that a block needs or owns (below).
  int64_t input_width() const {
    int64_t widest = 0;
    for (int64_t col = 0; col < cols.out; col += width) {
      const int64_t last = least(cols.out, col + width);
      widest = most(widest, most(cols.end(last - 1), owned_end(cols, last)) - owned_begin(cols, col));
    }
    return widest;
  }

  // Each input pixel is owned by one block, whether the resampling touches it or not.
  static int64_t owned_begin(const AxisView& axis, int64_t first) { return first == 0 ? 0 : axis.start[first]; }
  static int64_t owned_end(const AxisView& axis, int64_t last) { return last == axis.out ? axis.in : axis.start[last]; }
};

template <class A>
inline void fill_pixels(A* to, int64_t size, A value) {
  for (int64_t c = 0; c < size; c += kLanes<A>) store(to + c, Vec<A>{} + value);
}

// A run of input pixels, `row` elements apart: a tile, or memory whose pixels are whole vectors of channels. Derived
// classes may change a vector, which is that of channel c.
template <class S>
struct Run {
  const S* data;
  int64_t row;

  Vec<Accumulate<S>> value(const S* at, int64_t) const { return load(at); }
};

template <class S>
inline bool is_run(const TensorView& t, int64_t channels) {
  return t.stride_c == 1 && channels % kLanes<Accumulate<S>> == 0;
}

// kVectors vectors from channel c on of sum_t weights[t] * run[t], run[0] being at `from`.
template <int kVectors, class A, class R, class S, class To>
inline void combine_vectors(const A* weights, int64_t taps, const R& run, const S* from, int64_t c, To* to) {
  Vec<A> sum[kVectors] = {};
  for (int64_t t = 0; t < taps; ++t)
    for (int v = 0; v < kVectors; ++v)
      sum[v] += weights[t] * run.value(from + t * run.row + v * kLanes<A>, c + v * kLanes<A>);
  for (int v = 0; v < kVectors; ++v) store(to + v * kLanes<A>, sum[v]);
}

// to = sum_t weights[t] * from[t * step] for runs of `size` values: whole vectors, unless kExact. The last vector of an
// exact run overlaps the one before it.
template <bool kExact, class A, class To>
inline void combine(const A* weights, int64_t taps, const A* from, int64_t step, int64_t size, To* to) {
  constexpr int64_t lanes = kLanes<A>;
  if (taps == 2) {  // bilinear
    const A w0 = weights[0], w1 = weights[1];
    for (int64_t c = 0; c + lanes <= size; c += lanes) store(to + c, w0 * load(from + c) + w1 * load(from + step + c));
  } else {
    for_vectors<A>(size, [&](int64_t c, auto vectors) {
      combine_vectors<vectors>(weights, taps, Run<A>{from, step}, from + c, c, to + c);
    });
  }
  if (!kExact || size % lanes == 0) return;
  if (size >= lanes)
    return combine_vectors<1>(weights, taps, Run<A>{from, step}, from + size - lanes, 0, to + size - lanes);
  To last[lanes];
  combine_vectors<1>(weights, taps, Run<A>{from, step}, from, 0, last);
  for (int64_t i = 0; i < size; ++i) to[i] = last[i];
}

// Makes the rows of a block one after the other. `row` is the distance of the pixels that source() returns, `step` that
// of the pixels made: `row` too for tiles, the number of channels for dense memory.
template <class A>
class BlockResampler {
 public:
  BlockResampler(const Blocks<A>& blocks, int64_t row, int64_t step)
      : rows_(blocks.rows),
        cols_(blocks.cols),
        row_(row),
        step_(step),
        window_(2 * most(1, blocks.rows.most_taps) * blocks.width * step + row) {}

  // source(i) returns input row i from column cols.start[block.col0] on, as a tile or as a Run; it is asked once for
  // each row that the block touches, in ascending order. consume(o, make) gets make(to), which makes output row o.
  template <class Source, class Consume>
  void run(const Block& block, const Source& source, const Consume& consume) const {
    // Input rows, resampled along the columns. Twice the window: when it is full, its second half moves to its front,
    // so the rows that one output needs are always adjacent.
    const int64_t size = block.width() * step_, capacity = 2 * most(1, rows_.most_taps);
    int64_t base = rows_.start[block.row0], filled = base;  // the window holds rows base .. filled - 1
    for (int64_t o = block.row0; o < block.row1; ++o) {
      const int64_t start = rows_.start[o], taps = rows_.taps(o);
      if (filled < start) base = filled = start;
      for (; filled < start + taps; ++filled) {
        if (filled - base == capacity) {
          const int64_t keep = most(0, filled - start);
          __builtin_memmove(window_.data(), window_.data() + (capacity - keep) * size,
                            sizeof(A) * static_cast<size_t>(keep * size));
          base = filled - keep;
        }
        resample_columns(block, as_run(source(filled)), window_.data() + (filled - base) * size);
      }
      const A* first = window_.data() + (start - base) * size;
      consume(o, [&](auto* to) {
        const A* weights = rows_.template weights<A>(o);
        if (step_ == row_) {
          combine<false>(weights, taps, first, size, size, to);
        } else {
          combine<true>(weights, taps, first, size, size, to);
        }
      });
    }
  }

 private:
  template <class T>
  Run<A> as_run(T* tile) const {
    return {tile, row_};
  }
  template <class R>
  const R& as_run(const R& run) const {
    return run;
  }

  // Pixels that are closer than whole vectors are written in ascending order: each overwrites what the one before it
  // wrote too much.
  template <class R>
  void resample_columns(const Block& block, const R& run, A* to) const {
    const auto make = [&](int64_t o, int64_t c, auto vectors) {
      const auto* from = run.data + (cols_.start[o] - cols_.start[block.col0]) * run.row + c;
      combine_vectors<vectors>(cols_.template weights<A>(o), cols_.taps(o), run, from, c,
                               to + (o - block.col0) * step_ + c);
    };
    if (row_ <= 4 * kLanes<A>) {  // few channels: the loop over pixels is compiled for their number
      for_vectors<A>(row_, [&](int64_t c, auto vectors) {
        for (int64_t o = block.col0; o < block.col1; ++o) make(o, c, vectors);
      });
    } else {
      for (int64_t o = block.col0; o < block.col1; ++o)
        for_vectors<A>(row_, [&](int64_t c, auto vectors) { make(o, c, vectors); });
    }
  }

  AxisView rows_, cols_;
  int64_t row_, step_;
  Buffer<A> window_;
};

// Calls consume(n, h, w, count, make) for the runs of pixels of one block of the resampled map; make(to) makes the run.
// source(n, h, w, count, buffer) returns a run of input pixels, as a tile or as a Run, for which it may use the buffer.
template <class A, class Source, class Consume>
inline void resample_block(const Blocks<A>& blocks, const Block& block, const BlockResampler<A>& resampler, A* buffer,
                           const Source& source, const Consume& consume) {
  const int64_t w = blocks.cols.start[block.col0], count = blocks.cols.end(block.col1 - 1) - w;
  resampler.run(
      block, [&](int64_t i) { return source(block.n, i, w, count, buffer); },
      [&](int64_t o, const auto& make) { consume(block.n, o, block.col0, block.width(), make); });
}

// Calls use(source) with the source of a map for a resampling: its pixels where they lie, or in tiles.
template <class S, class Use>
inline void with_source(const TensorView& t, int64_t channels, int64_t height, const Use& use) {
  const auto prefetch_next = [&](int64_t n, int64_t h, int64_t w, int64_t count) {
    if (h + 1 < height) prefetch_pixels<S>(t, channels, n, h + 1, w, count);
  };
  if (is_run<S>(t, channels)) {
    use([&](int64_t n, int64_t h, int64_t w, int64_t count, Accumulate<S>*) {
      prefetch_next(n, h, w, count);
      return Run<S>{pixel<S>(t, n, h, w), t.stride_w};
    });
  } else {
    use([&](int64_t n, int64_t h, int64_t w, int64_t count, Accumulate<S>* buffer) {
      prefetch_next(n, h, w, count);
      return tile_of<S>(t, channels, n, h, w, count, buffer);
    });
  }
}

// A whole map, resampled into memory of any layout.
template <class S, class A, class Source>
inline void resample_to(const Call& call, const Blocks<A>& blocks, int64_t channels, const TensorView& to,
                        const Source& source) {
  const bool dense = to.stride_c == 1 && to.stride_w == channels;
  const int64_t row = padded<A>(channels);
  parallel_for(call, blocks.tasks(), [&](int64_t begin, int64_t end) {
    const BlockResampler<A> resampler(blocks, row, dense ? channels : row);
    const Buffer<A> buffer(blocks.input_width() * row), tile(dense ? 0 : blocks.width * row);
    for (int64_t task = begin; task < end; ++task) {
      resample_block(blocks, blocks.block(task), resampler, buffer.data(), source,
                     [&](int64_t n, int64_t h, int64_t w, int64_t count, const auto& make) {
                       if (dense) return make(mutable_pixel<S>(to, n, h, w));
                       make(tile.data());
                       store_pixels<S>(to, channels, n, h, w, count, tile.data());
                     });
    }
  });
}

}  // namespace gsto::cpu::GSTO_ISA
