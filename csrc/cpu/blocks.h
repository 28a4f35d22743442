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

// KiB of a block's rows where channels_last memory is shrunk: at 128 a window takes 512 KiB of L2. In blocks of 16 the
// transposed up2 of 48 channels of 128 x 256 takes as long from warm caches, and 0.55 ms instead of 0.42 from cold
// ones.
constexpr int64_t kLongRuns = 128;

// The blocks of a map resampled along both axes. Their size does not depend on the number of threads.
template <class A>
struct Blocks {
  AxisView rows, cols;
  int64_t batch, height, width;  // of a full block
  int64_t per_col, per_row;

  // Columns: so many KiB of the wider one of input and output, for L1. Rows: so that 32 threads have a block, but an
  // eighth at least; the rows that two blocks need are made in both.
  Blocks(int64_t n, const AxisView& r, const AxisView& c, int64_t channels, int64_t kilobytes = 16)
      : rows(r), cols(c), batch(n) {
    const int64_t pixel = padded<A>(channels) * static_cast<int64_t>(sizeof(A));
    const int64_t shrink = most(1, cols.in / cols.out);
    width = least(cols.out, most(16, (kilobytes << 10) / (pixel * shrink) / 16 * 16));
    per_row = (cols.out + width - 1) / width;
    const int64_t parts = most(1, least(8, 32 / most(1, batch * per_row)));
    height = (rows.out + parts - 1) / parts;
    per_col = (rows.out + height - 1) / height;
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
        resample_columns<false>(cols_, block.col0, block.col1, as_run(source(filled), row_), row_,
                                window_.data() + (filled - base) * size, step_);
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
  AxisView rows_;
  Columns<A> cols_;
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

// Enlarging with two taps at most into channels_last memory: two input rows are mixed to one, which is stretched into
// its place. So the output is written in sequence: 6.3 MB of memory that is in no cache take 0.13 ms, and 0.24 in
// blocks. up2 of 48 channels to 128 x 256, float32: 0.15 ms and cold 0.25; in blocks 0.16 and 0.45.
template <class S, class A = Accumulate<S>, class Source>
inline void enlarge_to(const Call& call, int64_t batch, const AxisView& rows, const AxisView& cols, int64_t channels,
                       const TensorView& to, const Source& source) {
  const int64_t row = padded<A>(channels), width = cols.in * row;
  const int64_t height = most(8, (rows.out * batch + 31) / 32), bands = (rows.out + height - 1) / height;
  // The pixels at the end of a row whose last vectors would write too much.
  const int64_t inner = most(0, cols.out - (row - 1) / channels), outer = cols.out - inner;
  parallel_for(call, batch * bands, [&](int64_t begin, int64_t end) {
    const Columns<A> columns(cols);
    const Buffer<A> tiles(2 * width), mixed(width), tile(outer * row);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands, first = task % bands * height;
      const auto run_of = [&](int64_t i) {
        return as_run(source(n, i, 0, cols.in, tiles.data() + i % 2 * width), row);
      };
      decltype(run_of(0)) held[2] = {};  // row i is in i % 2
      for (int64_t o = first, next = 0; o < least(rows.out, first + height); ++o) {
        const int64_t start = rows.start[o], taps = rows.taps(o);
        for (next = most(next, start); next < start + taps; ++next) held[next % 2] = run_of(next);
        const auto &upper = held[start % 2], &lower = held[(start + taps - 1) % 2];
        mix_rows(rows.weights<A>(o), taps, upper, lower, row, cols.in, mixed.data());
        S* at = mutable_pixel<S>(to, n, o, 0);
        if (inner > 0) resample_columns<true>(columns, 0, inner, Run<A>{mixed.data(), row}, row, at, channels);
        if (outer == 0) continue;
        const Run<A> rest{mixed.data() + cols.start[inner] * row, row};
        resample_columns<false>(columns, inner, cols.out, rest, row, tile.data(), row);
        for (int64_t i = 0; i < outer; ++i)
          store_channels(at + (inner + i) * channels, channels, tile.data() + i * row);
      }
    }
  });
}

// A whole map, resampled into memory of any layout.
template <class S, class A = Accumulate<S>, class Source>
inline void resample_to(const Call& call, int64_t batch, const AxisView& rows, const AxisView& cols, int64_t channels,
                        const TensorView& to, const Source& source) {
  const bool dense = to.stride_c == 1 && to.stride_w == channels;
  if (dense && cols.in < cols.out && rows.most_taps <= 2 && cols.most_taps <= 2)
    return enlarge_to<S>(call, batch, rows, cols, channels, to, source);
  const int64_t row = padded<A>(channels);
  const Blocks<A> blocks(batch, rows, cols, channels, dense ? kLongRuns : 16);
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
