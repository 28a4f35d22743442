// Tiles: runs of pixels in one internal order, whatever the tensor's layout and dtype are. A tile is [pixel][channel]
// in the accumulate type, its channel count padded to whole vectors with zeros. Channels_last memory is copied into it,
// NCHW memory is transposed in registers on the way, anything else is gathered. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : bytes_(static_cast<size_t>(size) * sizeof(A)), data_(static_cast<A*>(take_scratch(bytes_))) {}
  ~Buffer() { give_scratch_back(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() const { return data_; }

 private:
  size_t bytes_;
  A* data_;
};

template <class F>
inline void parallel_for(const Call& call, int64_t tasks, const F& f) {
  if (tasks == 0) return;
  const Task task = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  call.parallel_for(tasks, task, const_cast<void*>(static_cast<const void*>(&f)));
}

// Results of more bytes than these are written past the caches: a reader would not find them there, and writing past
// them spares reading what was there before. Half of an L3 of 32 MiB; four copies of 48 x 128 x 256, float32, in NCHW:
// 1.25 -> 0.72 ms. Tasks that write so end with a fence, as these stores are not ordered with others.
constexpr int64_t kPastCaches = int64_t{16} << 20;

template <class T>
inline bool is_aligned(const T* to) {
  return reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
}

inline void end_of_stores() {
#ifdef GSTO_X86_VARIANTS
  _mm_sfence();
#endif
}

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class A>
inline int64_t padded(int64_t channels) {
  return (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Pixels of `channels` values that take about `kilobytes`, in whole blocks of 16.
template <class A>
inline int64_t tile_pixels(int64_t channels, int64_t kilobytes) {
  return most(16, least(256, (kilobytes << 10) / (static_cast<int64_t>(sizeof(A)) * padded<A>(channels)) / 16 * 16));
}

template <class S>
inline const S* pixel(const TensorView& t, int64_t n, int64_t h, int64_t w) {
  return static_cast<const S*>(t.data) + n * t.stride_n + h * t.stride_h + w * t.stride_w;
}
template <class S>
inline S* mutable_pixel(const TensorView& t, int64_t n, int64_t h, int64_t w) {
  return static_cast<S*>(t.data) + n * t.stride_n + h * t.stride_h + w * t.stride_w;
}

// Asks for what lies 8 KiB ahead of a place in memory that is walked through in order, where the arithmetic leaves the
// processor too few loads and stores in flight. Dot products of two maps take half the time so, from cold caches.
template <bool kWrite = false, class T>
inline void ask_ahead(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + 8192, kWrite);
}

// `count` contiguous values into whole zero-padded vectors. The last vector overlaps the one before: no partial access.
template <class S, class A = Accumulate<S>>
inline void load_channels(const S* from, int64_t count, A* to) {
  constexpr int lanes = kLanes<A>;
  if (count < lanes) {
    store(to, load_some(from, count));
    return;
  }
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    store(to + c, load(from + c));
    ask_ahead(from + c);
  }
  if (c < count) {
    store(to + c, Vec<A>{});
    store(to + count - lanes, load(from + count - lanes));
  }
}

template <class S, class A = Accumulate<S>>
inline void store_channels(S* to, int64_t count, const A* from) {
  constexpr int lanes = kLanes<A>;
  if (count < lanes) {
    store_some(to, load(from), count);
    return;
  }
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) store(to + c, load(from + c));
  if (c < count) store(to + count - lanes, load(from + count - lanes));
}

// Calls f(c, number of vectors as a constant) for runs of at most four of the vectors in [0, size). Sums over pixels
// take such a run at a time: whole cache lines in the order of memory, where one vector at a time would stride through
// it.
template <class A, class F>
inline void for_vectors(int64_t size, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * lanes <= size; c += 4 * lanes) f(c, std::integral_constant<int, 4>());
  const int64_t rest = (size - c) / lanes;
  if (rest == 3) f(c, std::integral_constant<int, 3>());
  if (rest == 2) f(c, std::integral_constant<int, 2>());
  if (rest == 1) f(c, std::integral_constant<int, 1>());
}

// Calls f(first, valid) for blocks of `lanes` pixels that cover [0, count); the last block overlaps the one before it,
// unless there is one block only, and that may be partial.
template <class A, class F>
inline void for_blocks(int64_t count, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t p = 0; p < count; p += lanes) {
    const int64_t first = p + lanes <= count ? p : most(0, count - lanes);
    f(first, least(lanes, count - first));
  }
}

// Asks for a run of channels_last pixels ahead of its use: the blocks of a resampling read short runs, rows apart,
// which the hardware does not foresee (transposed up2 of 48 channels from L3: 0.47 -> 0.25 ms). Long runs it does, and
// so many requests at once would wait for each other.
template <class S>
inline void prefetch_pixels(const TensorView& t, int64_t channels, int64_t n, int64_t h, int64_t w, int64_t count) {
  if (t.stride_c != 1 || t.stride_w != channels) return;
  const char* from = reinterpret_cast<const char*>(pixel<S>(t, n, h, w));
  const int64_t bytes = count * channels * static_cast<int64_t>(sizeof(S));
  if (bytes > 32 << 10) return;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// Asks for a run of one plane ahead of its use: the hardware does not foresee runs that are planes apart. From a cold
// cache, float32: a gate alone on 18 x 128 x 256 0.27 -> 0.15 ms forward, 0.46 -> 0.28 backward, the class map of 144
// channels 2.8 -> 2.4 and 4.4 -> 3.9; from a warm one the same or less.
template <bool kWrite, class S>
inline void prefetch_run(const S* run, int64_t width) {
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(run + i, kWrite);
}

// Asks for a run of the first planes of an NCHW map; load_pixels() asks for those of the others (pooling 48 channels,
// bfloat16: 1.6 -> 1.45 ms).
template <class S>
inline void prefetch_first_planes(const TensorView& t, int64_t channels, int64_t n, int64_t h, int64_t w,
                                  int64_t count) {
  if (t.stride_w != 1) return;
  for (int64_t c = 0; c < least(kLanes<Accumulate<S>>, channels); ++c)
    prefetch_run<false>(pixel<S>(t, n, h, w) + c * t.stride_c, count);
}

// Pixels (n, :, h, w .. w + count - 1) into a tile.
template <class S, class A = Accumulate<S>>
inline void load_pixels(const TensorView& t, int64_t channels, int64_t n, int64_t h, int64_t w, int64_t count,
                        A* tile) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t row = padded<A>(channels), stride_c = t.stride_c, stride_w = t.stride_w;
  const S* from = pixel<S>(t, n, h, w);
  if (stride_c == 1 && stride_w == row && channels == row) {
    load_channels(from, count * row, tile);  // nothing to pad: one run
  } else if (stride_c == 1) {
    for (int64_t p = 0; p < count; ++p) load_channels(from + p * stride_w, channels, tile + p * row);
  } else if (stride_w == 1) {
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t present = least(lanes, channels - c);
      for (int64_t i = c + lanes; i < least(c + 2 * lanes, channels); ++i)
        prefetch_run<false>(from + i * stride_c, count);
      for_blocks<A>(count, [=](int64_t first, int64_t valid) {
        const S* planes = from + c * stride_c + first;
        Vec<A> block[lanes];
        if (valid == lanes && present == lanes) {  // constant bounds keep the block in registers
          for (int64_t i = 0; i < lanes; ++i) block[i] = load(planes + i * stride_c);
        } else {
          // Nothing is read where there is no plane, not by an empty mask either: where that has no memory, it takes
          // 100 times as long.
          for (int64_t i = 0; i < lanes; ++i)
            block[i] = i < present ? load_some(planes + i * stride_c, valid) : Vec<A>{};
        }
        transpose<A>(block);
        A* to = tile + first * row + c;
        for (int64_t i = 0; i < valid; ++i) store(to + i * row, block[i]);
      });
    }
  } else {
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t c = 0; c < channels; c += lanes) {
        const S* values = from + p * stride_w + c * stride_c;
        store(tile + p * row + c, load_some(values, least(lanes, channels - c), stride_c));
      }
    }
  }
}

// The inverse, into memory that is channels_last (stride_c == 1) or NCHW (stride_w == 1).
template <class S, class A = Accumulate<S>>
inline void store_pixels(const TensorView& t, int64_t channels, int64_t n, int64_t h, int64_t w, int64_t count,
                         const A* tile) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t row = padded<A>(channels), stride_c = t.stride_c, stride_w = t.stride_w;
  S* to = mutable_pixel<S>(t, n, h, w);
  if (stride_c == 1 && stride_w == row && channels == row) {
    store_channels(to, count * row, tile);
    return;
  }
  if (stride_c == 1) {
    for (int64_t p = 0; p < count; ++p) store_channels(to + p * stride_w, channels, tile + p * row);
    return;
  }
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t present = least(lanes, channels - c);
    for_blocks<A>(count, [=](int64_t first, int64_t valid) {
      const A* from = tile + first * row + c;
      S* planes = to + c * stride_c + first;
      Vec<A> block[lanes];
      for (int64_t i = 0; i < lanes; ++i) block[i] = i < valid ? load(from + i * row) : Vec<A>{};
      transpose<A>(block);
      if (valid == lanes && present == lanes) {
        for (int64_t i = 0; i < lanes; ++i) store(planes + i * stride_c, block[i]);
      } else {
        for (int64_t i = 0; i < present; ++i) store_some(planes + i * stride_c, block[i], valid);
      }
    });
  }
}

// Whether runs of this map's pixels are tiles already: float or double, channels adjacent and whole vectors of them.
template <class S>
inline bool is_tiled(const TensorView& t, int64_t channels) {
  return std::is_same_v<S, Accumulate<S>> && t.stride_c == 1 && t.stride_w == channels &&
         channels == padded<Accumulate<S>>(channels);
}

// A run of pixels as a tile: in place, or loaded into the buffer.
template <class S, class A = Accumulate<S>>
inline const A* tile_of(const TensorView& t, int64_t channels, int64_t n, int64_t h, int64_t w, int64_t count,
                        A* buffer) {
  if constexpr (std::is_same_v<S, A>)
    if (is_tiled<S>(t, channels)) return pixel<S>(t, n, h, w);
  load_pixels<S>(t, channels, n, h, w, count, buffer);
  return buffer;
}

// Where to make a run of pixels: in place, or in the buffer. finish_tile() then brings them to their place.
template <class S, class A = Accumulate<S>>
inline A* tile_for(const TensorView& t, int64_t channels, int64_t n, int64_t h, int64_t w, A* buffer) {
  if constexpr (std::is_same_v<S, A>)
    if (is_tiled<S>(t, channels)) return mutable_pixel<S>(t, n, h, w);
  return buffer;
}

template <class S, class A = Accumulate<S>>
inline void finish_tile(const TensorView& t, int64_t channels, int64_t n, int64_t h, int64_t w, int64_t count,
                        const A* tile) {
  if constexpr (std::is_same_v<S, A>)
    if (tile == pixel<S>(t, n, h, w)) return;
  store_pixels<S>(t, channels, n, h, w, count, tile);
}

// One value per pixel (the gate and its gradient), any strides.
template <class S, class A = Accumulate<S>>
inline void load_scalars(const TensorView& t, int64_t n, int64_t h, int64_t w, int64_t count, A* values) {
  const S* from = pixel<S>(t, n, h, w);
  for_blocks<A>(count, [&](int64_t first, int64_t valid) {
    const bool whole = t.stride_w == 1 && valid == kLanes<A>;
    const Vec<A> v = whole ? load(from + first) : load_some(from + first * t.stride_w, valid, t.stride_w);
    for (int64_t i = 0; i < valid; ++i) values[first + i] = v[i];
  });
}

template <class S, class A = Accumulate<S>>
inline void load_optional_scalars(const TensorView& t, int64_t n, int64_t h, int64_t w, int64_t count, A* values) {
  if (t.data) return load_scalars<S>(t, n, h, w, count, values);
  for (int64_t i = 0; i < count; ++i) values[i] = 0;
}

// dots[p] = a[p] . b[p] over the channels; b_row == 0 takes the same b for every pixel.
template <class A>
inline void dot_pixels(const A* a, const A* b, int64_t b_row, int64_t row, int64_t count, A* dots) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t p = 0;
  for (; p + lanes <= count; p += lanes) {
    Vec<A> sums[lanes];
    for (int64_t i = 0; i < lanes; ++i) {  // pixel after pixel, as they lie in memory
      Vec<A> sum = {};
      for (int64_t c = 0; c < row; c += lanes) sum += load(a + (p + i) * row + c) * load(b + (p + i) * b_row + c);
      sums[i] = sum;
    }
    transpose<A>(sums);
    for (int64_t i = 1; i < lanes; ++i) sums[0] += sums[i];
    store(dots + p, sums[0]);
  }
  for (; p < count; ++p) {
    Vec<A> sum = {};
    for (int64_t c = 0; c < row; c += lanes) sum += load(a + p * row + c) * load(b + p * b_row + c);
    dots[p] = sum_lanes<A>(sum);
  }
}

// to[p] = factors[p] * from[p], which may be the same tile, or memory past the caches.
template <class A>
inline void scale_pixels(const A* from, const A* factors, int64_t row, int64_t count, A* to, bool past = false) {
  if (past && is_aligned(to)) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < row; c += kLanes<A>) store_past(to + p * row + c, load(from + p * row + c) * factors[p]);
    return;
  }
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < row; c += kLanes<A>) store(to + p * row + c, load(from + p * row + c) * factors[p]);
}

template <class V>
inline V relu(V value) {
  return value < 0 ? V{} : value;  // a NaN stays one
}

template <class A>
inline void relu_pixels(A* tile, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes<A>) store(tile + i, relu(load(tile + i)));
}

// The tile's column sums, added to sums.
template <class A>
inline void add_pixels(const A* tile, int64_t row, int64_t count, A* sums) {
  for_vectors<A>(row, [&](int64_t c, auto vectors) {
    Vec<A> sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = load(sums + c + v * kLanes<A>);
    for (int64_t p = 0; p < count; ++p)
      for (int v = 0; v < vectors; ++v) sum[v] += load(tile + p * row + c + v * kLanes<A>);
    for (int v = 0; v < vectors; ++v) store(sums + c + v * kLanes<A>, sum[v]);
  });
}

// Calls f with a value of the storage type.
template <class F>
inline void with_storage_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::kFloat32:
      return f(float{});
    case ScalarType::kFloat64:
      return f(double{});
    case ScalarType::kBFloat16:
      return f(BFloat16{});
    case ScalarType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace gsto::cpu::GSTO_ISA
