// Whole maps: how a pass walks over one, temporary ones, and the projection. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// The pixels that a pass without resampling works on: chunks of rows, or of the whole image where the strides allow it.
struct Pixels {
  int64_t batch, height, width, chunk, chunks_per_row;

  Pixels(int64_t n, int64_t h, int64_t w, bool collapse, int64_t tile)
      : batch(n),
        height(collapse ? 1 : h),
        width(collapse ? h * w : w),
        chunk(tile),
        chunks_per_row((width + tile - 1) / tile) {}

  int64_t tasks() const { return batch * height * chunks_per_row; }

  template <class F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t w = task % chunks_per_row * chunk;
      const int64_t line = task / chunks_per_row;
      f(line / height, line % height, w, least(chunk, width - w));
    }
  }
};

// Where only gates are applied to NCHW memory: pixels per task, and vectors of pixels taken from each plane at once.
// Runs of 512 bytes took half the time of runs of 256 (48 x 128 x 256, float32, in L3).
constexpr int64_t kPlaneChunk = 1024;
constexpr int kPlaneVectors = 512 / kVectorBytes;

// Calls f(n, h, w, vectors as a constant, pixels) for groups of pixels.
template <class A, class F>
inline void visit_planes(const Pixels& pixels, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t lanes = kLanes<A>, group = kPlaneVectors * lanes;
  pixels.visit(begin, end, [&](int64_t n, int64_t h, int64_t w, int64_t count) {
    int64_t i = 0;
    for (; i + group <= count; i += group) f(n, h, w + i, std::integral_constant<int, kPlaneVectors>(), group);
    for (; i < count; i += lanes) f(n, h, w + i, std::integral_constant<int, 1>(), least(lanes, count - i));
  });
}

inline bool planar(const TensorView& t) { return t.stride_w == 1 && t.stride_c != 1; }

inline bool collapsible(const TensorView& t, int64_t height, int64_t width) {
  return t.data == nullptr || height == 1 || t.stride_h == width * t.stride_w;
}

// A temporary (N, H, W, C) map in the accumulate type.
template <class A>
struct Map {
  Buffer<A> values;
  int64_t image, row;

  Map(int64_t batch, int64_t pixels, int64_t channels)
      : values(batch * pixels * padded<A>(channels)), image(pixels * padded<A>(channels)), row(padded<A>(channels)) {}

  A* at(int64_t n, int64_t p) const { return values.data() + n * image + p * row; }
  TensorView view(int64_t width) const { return {values.data(), image, 1, width * row, row}; }
};

// Factors in the summed dimension of a product over so many values.
template <class S>
inline int64_t steps(int64_t count) {
  return kPairs<S> ? (count + 1) / 2 : count;
}

// The left operand of a product: a run of pixels, `row` factors apart.
template <class S>
struct Left {
  const Factor<S>* data;
  int64_t row;
};

// Whether the pixels of this map are pairs of channels where they lie.
template <class S>
inline bool has_pairs(const TensorView& t, int64_t channels) {
  return kPairs<S> && t.stride_c == 1 && t.stride_w % 2 == 0 && channels % 2 == 0;
}

// Whether they are left operands: these pairs, or channels that need no conversion.
template <class S>
inline bool is_left_operand(const TensorView& t, int64_t channels) {
  return has_pairs<S>(t, channels) || (std::is_same_v<S, Factor<S>> && t.stride_c == 1);
}

// A tile as the left operand: itself, or rounded to bfloat16 in the buffer.
template <class S, class A = Accumulate<S>>
inline Left<S> left_operand(const A* tile, int64_t count, int64_t row, Factor<S>* buffer) {
  if constexpr (kPairs<S>) {
    for (int64_t i = 0; i < count * row; i += kLanes<A>)
      store_rounded(reinterpret_cast<BFloat16*>(buffer) + i, load(tile + i));
    return {buffer, row / 2};
  } else {
    return {tile, row};
  }
}

// Rows of a matrix as factors of a sum over the rows: themselves, or pairs of neighbouring ones in the buffer.
template <class S, class A = Accumulate<S>>
inline const Factor<S>* summed_rows(const A* rows, int64_t count, int64_t row, Factor<S>* buffer) {
  if constexpr (kPairs<S>) {
    for (int64_t i = 0; i < count; i += 2, buffer += row, rows += 2 * row)
      for (int64_t c = 0; c < row; c += kLanes<A>)
        store(buffer + c, make_pairs(load(rows + c), i + 1 < count ? load(rows + row + c) : Vec<A>{}));
    return buffer - steps<S>(count) * row;
  } else {
    return rows;
  }
}

// The same of channels_last pixels in memory, where factors are pairs; `row` values each, padded with zeros.
template <class S>
inline const Factor<S>* summed_pixels(const S* pixels, int64_t stride, int64_t channels, int64_t count, int64_t row,
                                      Factor<S>* buffer) {
  static_assert(kPairs<S>);
  constexpr int64_t lanes = kLanes<Accumulate<S>>;
  for (int64_t i = 0; i < count; i += 2) {
    const S *first = pixels + i * stride, *second = first + stride;
    Factor<S>* to = buffer + i / 2 * row;
    for (int64_t c = 0; c < channels; c += 2 * lanes) {
      Bits low, high;
      const int64_t present = least(2 * lanes, channels - c);
      ask_ahead(first + c);
      ask_ahead(second + c);
      pair_runs(first + c, second + c, present, i + 1 < count ? present : 0, low, high);
      store(to + c, low);
      if (c + lanes < row) store(to + c + lanes, high);
    }
  }
  return buffer;
}

template <class S, class A = Accumulate<S>>
inline void project(const Left<S>& left, int64_t count, int64_t channels, const Factor<S>* weight, int64_t out_channels,
                    A* result) {
  gemm(Gemm<Factor<S>>{count, padded<A>(out_channels), steps<S>(channels), left.data, left.row, 1, weight,
                       padded<A>(out_channels), result, padded<A>(out_channels), false});
}

}  // namespace gsto::cpu::GSTO_ISA
