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

template <class A>
inline void project(const A* tile, int64_t count, int64_t channels, const A* weight, int64_t out_channels, A* result) {
  gemm(Gemm<A>{count, padded<A>(out_channels), channels, tile, padded<A>(channels), 1, weight, padded<A>(out_channels),
               result, padded<A>(out_channels), false});
}

}  // namespace gsto::cpu::GSTO_ISA
