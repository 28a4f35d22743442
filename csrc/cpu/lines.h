// Lines: maps as runs of contiguous values, for passes that treat every value alike but for its channel. A line is a
// row of pixels (channels_last: all channels, pixel after pixel) or a row of one plane (NCHW). What depends on the
// channel is an array of one period, after which the channels' pattern meets whole vectors again. Included once per
// instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// As many values as there is room for, made in place. (Code per instruction set keeps away from std's containers.)
template <class T>
class Array {
 public:
  explicit Array(int64_t room) : values_(static_cast<T*>(malloc(static_cast<size_t>(most(1, room)) * sizeof(T)))) {
    if (values_ == nullptr) throw std::bad_alloc();
  }
  ~Array() {
    clear();
    free(values_);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  template <class... Args>
  void add(Args&&... args) {
    new (values_ + size_++) T{static_cast<Args&&>(args)...};
  }
  void clear() {
    while (size_ > 0) values_[--size_].~T();
  }
  T& operator[](int64_t i) { return values_[i]; }
  const T& operator[](int64_t i) const { return values_[i]; }
  int64_t size() const { return size_; }

 private:
  T* values_;
  int64_t size_ = 0;
};

inline int64_t common_divisor(int64_t a, int64_t b) { return b == 0 ? a : common_divisor(b, a % b); }

template <class S>
struct Lines {
  using A = Accumulate<S>;
  static constexpr int64_t lanes = kLanes<A>;

  bool planar;
  int64_t batch, channels, height, width;
  int64_t groups;         // lines per row of pixels
  int64_t size;           // values of a line
  int64_t unit;           // values of a pixel in a line
  int64_t period;         // of a line's channels, in whole vectors
  int64_t rows_per_task;  // few rows of an image keep their neighbours in cache; a plane is one task

  // `vectors`: of a plane's period; one will do but for sums, each of which has to wait for the one before it.
  Lines(bool p, int64_t n, int64_t c, int64_t h, int64_t w, int64_t vectors = 1)
      : planar(p),
        batch(n),
        channels(c),
        height(h),
        width(w),
        groups(p ? c : 1),
        size(p ? w : w * c),
        unit(p ? 1 : c),
        period(p ? vectors * lanes : c * (lanes / common_divisor(c, lanes))),
        rows_per_task(p ? h : least(8, h)) {}

  int64_t used() const { return planar ? 1 : channels; }  // channels of a group
  int64_t values() const { return batch * channels * height * width; }
  int64_t tasks() const { return batch * groups * ((height + rows_per_task - 1) / rows_per_task); }

  // Calls f(n, group, first row, end) for tasks begin .. end - 1.
  template <class F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    const int64_t blocks = (height + rows_per_task - 1) / rows_per_task;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % blocks * rows_per_task, image = task / blocks;
      f(image / groups, image % groups, row, least(height, row + rows_per_task));
    }
  }

  S* line(const TensorView& t, int64_t n, int64_t group, int64_t h) const {
    return static_cast<S*>(t.data) + n * t.stride_n + h * t.stride_h + group * t.stride_c;
  }

  // Values of every group: the patterns of a group start at group * period.
  int64_t pattern_size() const { return groups * period; }

  // The pattern of value(channel); and that of one group, whose first channel is 0. Each value is found once.
  template <class F>
  void fill(A* pattern, const F& value) const {
    for (int64_t g = 0; g < groups; ++g)
      fill_group(pattern + g * period, [&](int64_t c) { return value(g * used() + c); });
  }
  template <class F>
  void fill_group(A* pattern, const F& value) const {
    if (planar) return fill_pixels(pattern, period, value(0));
    for (int64_t c = 0; c < channels; ++c) pattern[c] = value(c);
    for (int64_t i = channels; i < period; ++i) pattern[i] = pattern[i - channels];
  }

  // Sums of every place in the pattern to sums of the channels.
  void fold(const A* pattern, A* sums) const {
    for (int64_t g = 0; g < groups; ++g) fold_group(pattern + g * period, sums + g * used());
  }
  void fold_group(const A* pattern, A* sums) const {
    if (planar) {
      Vec<A> sum = {};
      for (int64_t i = 0; i < period; i += lanes) sum += load(pattern + i);
      sums[0] = sum_lanes<A>(sum);
      return;
    }
    for (int64_t c = 0; c < channels; ++c) sums[c] = pattern[c];
    for (int64_t first = channels; first < period; first += channels)
      for (int64_t c = 0; c < channels; ++c) sums[c] += pattern[first + c];
  }

  // Calls f(first value, its place in the period, valid values) for the vectors of a line.
  template <class F>
  void vectors(const F& f) const {
    const int64_t end = size, step = period;  // in registers, whatever f writes
    int64_t i = 0;
    if (step == lanes) {
      for (; i + lanes <= end; i += lanes) f(i, 0, lanes);
    } else {
      for (; i + step <= end; i += step)
        for (int64_t j = 0; j < step; j += lanes) f(i + j, j, lanes);
    }
    for (int64_t j = 0; i + j < end; j += lanes) f(i + j, j, least(lanes, end - i - j));
  }

  // Adds to kSums patterns, `row` values apart: f(first value, its place, valid values, sums) returns nothing and adds
  // to kSums vectors. Every place of the pattern is worked on in turn, so that its sums stay in registers.
  template <int kSums, class F>
  void add_up(A* sums, int64_t row, const F& f) const {
    for_vectors<A>(period, [&](int64_t j, auto vectors) { add_up_columns<kSums, vectors>(j, sums, row, f); });
  }

 private:
  template <int kSums, int kVectors, class F>
  void add_up_columns(int64_t j, A* sums, int64_t row, const F& f) const {
    Vec<A> sum[kVectors][kSums];
    for (int v = 0; v < kVectors; ++v)
      for (int s = 0; s < kSums; ++s) sum[v][s] = load(sums + s * row + j + v * lanes);
    int64_t i = j;
    for (; i + kVectors * lanes <= size; i += period)
      for (int v = 0; v < kVectors; ++v) f(i + v * lanes, j + v * lanes, lanes, sum[v]);
    for (int v = 0; v < kVectors; ++v)  // the line's end
      if (i + v * lanes < size) f(i + v * lanes, j + v * lanes, least(lanes, size - i - v * lanes), sum[v]);
    for (int v = 0; v < kVectors; ++v)
      for (int s = 0; s < kSums; ++s) store(sums + s * row + j + v * lanes, sum[v][s]);
  }
};

template <class S, class A = Accumulate<S>>
inline Vec<A> load_valid(const S* from, int64_t valid) {
  return valid == kLanes<A> ? load(from) : load_some(from, valid);
}

// Of a line in memory; asks for what lies ahead.
template <class S, class A = Accumulate<S>>
inline Vec<A> read_valid(const S* from, int64_t valid) {
  ask_ahead(from);
  return load_valid(from, valid);
}

template <class S, class A = Accumulate<S>>
inline void store_valid(S* to, Vec<A> value, int64_t valid) {
  if (valid == kLanes<A>) {
    store(to, value);
  } else {
    store_some(to, value, valid);
  }
}

// The first values of a vector, and zeros behind them.
template <class A>
inline Vec<A> first_values(Vec<A> value, int64_t valid) {
  for (int64_t i = valid; i < kLanes<A>; ++i) value[i] = 0;
  return value;
}

// A line of pixels of `unit` values, resampled.
template <class A>
inline void resample_line(const Columns<A>& columns, const A* from, int64_t unit, A* to) {
  const AxisView& axis = columns.axis;
  if (unit % kLanes<A> == 0) return resample_columns<false>(columns, 0, axis.out, Run<A>{from, unit}, unit, to, unit);
  for (int64_t o = 0; o < axis.out; ++o) {
    const A* weights = axis.weights<A>(o);
    const A* first = from + axis.start[o] * unit;
    const int64_t taps = axis.taps(o);
    if (unit > 1) {
      combine<true>(weights, taps, first, unit, unit, to + o * unit);
    } else {
      A sum = 0;
      for (int64_t t = 0; t < taps; ++t) sum += weights[t] * first[t];
      to[o] = sum;
    }
  }
}

// A line as values of the accumulate type: in place where it has them.
template <class S, class A = Accumulate<S>>
inline const A* line_values(const S* line, int64_t size, A* buffer) {
  if constexpr (std::is_same_v<S, A>) {
    return line;
  } else {
    load_channels(line, size, buffer);
    return buffer;
  }
}

}  // namespace gsto::cpu::GSTO_ISA
