// Parameters in the accumulate type and the deterministic reduction of their gradients. Included once per instruction
// set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// `count` values to zero-padded vectors: `size` values, or as many as it takes.
template <class S, class A = Accumulate<S>>
inline void fill_padded(const TensorView& t, int64_t stride, int64_t count, A* to, int64_t size = 0) {
  size = most(size, padded<A>(count));
  for (int64_t c = 0; c < size; c += kLanes<A>) {
    const int64_t present = most(0, least(kLanes<A>, count - c));
    store(to + c, present ? load_some(static_cast<const S*>(t.data) + c * stride, present, stride) : Vec<A>{});
  }
}

// to (columns, rows) = the transpose of from (rows, columns): whole vectors in both.
template <class A>
inline void transpose_matrix(const A* from, int64_t rows, int64_t columns, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t m = 0; m < rows; m += lanes) {
    for (int64_t c = 0; c < columns; c += lanes) {
      Vec<A> block[lanes];
      for (int64_t i = 0; i < lanes; ++i) block[i] = load(from + (m + i) * columns + c);
      transpose<A>(block);
      for (int64_t i = 0; i < lanes; ++i) store(to + (c + i) * rows + m, block[i]);
    }
  }
}

// The parameters of one call, padded with zeros to whole vectors.
template <class S, class A = Accumulate<S>>
struct Operands {
  Buffer<A> gate_weight;                             // rho: (C)
  Buffer<Factor<S>> gate_pairs;                      // the same, where factors are pairs
  Buffer<A> bias;                                    // (C'), zeros when there is none
  Buffer<A> matrix, transposed;                      // W: (C', C). (C, C'), with rho as column C' if padding allows
  Buffer<Factor<S>> matrix_pairs, transposed_pairs;  // the same, where factors are pairs
  const Factor<S>*weight = nullptr, *weight_by_row = nullptr;
  A gate_bias = 0;

  // weight_by_row is made for products with x: in forward, and in backward for a ReLU's mask.
  Operands(const GatedParams& p, bool with_x, bool with_gradients)
      : gate_weight(padded<A>(p.channels)),
        gate_pairs(kPairs<S> ? padded<A>(steps<S>(p.channels)) : 0),
        bias(padded<A>(p.out_channels)),
        matrix(p.weight.data ? padded<A>(p.out_channels) * padded<A>(p.channels) : 0),
        transposed(p.weight.data && with_x ? padded<A>(p.channels) * padded<A>(p.out_channels) : 0),
        matrix_pairs(kPairs<S> && p.weight.data && with_gradients ? steps<S>(p.out_channels) * padded<A>(p.channels)
                                                                  : 0),
        transposed_pairs(kPairs<S> && p.weight.data && with_x ? steps<S>(p.channels) * padded<A>(p.out_channels) : 0) {
    fill_padded<S>(p.gate_weight, p.gate_weight.stride_c, p.gate_weight.data ? p.channels : 0, gate_weight.data(),
                   padded<A>(p.channels));
    fill_padded<S>(p.bias, p.bias.stride_n, p.bias.data ? p.out_channels : 0, bias.data(), padded<A>(p.out_channels));
    if constexpr (kPairs<S>) {
      store(gate_pairs.data() + padded<A>(steps<S>(p.channels)) - kLanes<A>, Bits{});
      left_operand<S>(gate_weight.data(), 1, padded<A>(p.channels), gate_pairs.data());
    }
    if (p.gate_bias.data) gate_bias = load_some(static_cast<const S*>(p.gate_bias.data), 1)[0];
    if (!p.weight.data) return;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t row = padded<A>(p.channels), out_row = padded<A>(p.out_channels);
    TensorView filters = p.weight;
    filters.stride_w = p.weight.stride_n;  // a filter is a pixel of C channels
    load_pixels<S>(filters, p.channels, 0, 0, 0, p.out_channels, matrix.data());
    for (int64_t i = p.out_channels * row; i < out_row * row; i += lanes) store(matrix.data() + i, Vec<A>{});
    if (p.out_channels < out_row) {
      for (int64_t c = 0; c < row; c += lanes)
        store(matrix.data() + p.out_channels * row + c, load(gate_weight.data() + c));
    }
    if (with_gradients) weight = summed_rows<S>(matrix.data(), p.out_channels, row, matrix_pairs.data());
    if (!with_x) return;
    transpose_matrix(matrix.data(), out_row, row, transposed.data());
    weight_by_row = summed_rows<S>(transposed.data(), p.channels, out_row, transposed_pairs.data());
  }
};

// Sums over all pixels. The tasks fall into slots, each with its own sums; slots and the order of the final sum depend
// on the shape alone, so the result does not depend on the number of threads.
template <class A>
class Reduction {
 public:
  // `values`: as many as are summed, where the sums of 64 slots may be more than they are.
  Reduction(int64_t tasks, int64_t size, int64_t values = INT64_MAX)
      : tasks_(tasks), size_(size), slots_(slots_for(tasks, size, values)), sums_(slots_ * size) {}

  // Calls f(begin, end, sums) once per slot with its range of tasks.
  template <class F>
  void run(const Call& call, const F& f) {
    parallel_for(call, slots_, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        A* sums = sums_.data() + s * size_;
        for (int64_t i = 0; i < size_; ++i) sums[i] = 0;
        f(s * tasks_ / slots_, (s + 1) * tasks_ / slots_, sums);
      }
    });
  }

  // The totals of `count` channels from `first` on, to the gradient at `to`.
  template <class S>
  void store_totals(int64_t first, int64_t count, void* to) const {
    for (int64_t c = 0; c < count; c += kLanes<A>) {
      Vec<A> sum = {};
      for (int64_t s = 0; s < slots_; ++s) sum += load(sums_.data() + s * size_ + first + c);
      store_some(static_cast<S*>(to) + c, sum, least(kLanes<A>, count - c));
    }
  }

  A* slot(int64_t s) const { return sums_.data() + s * size_; }
  int64_t slots() const { return slots_; }

 private:
  // At most 64 slots (as many threads can take part) and 64 MiB of sums. At least four tasks each, as a slot of a large
  // weight costs as much as a task, and together at most a quarter of the values, but 8 slots in any case.
  static int64_t slots_for(int64_t tasks, int64_t size, int64_t values) {
    const int64_t fit = least((int64_t{64} << 20) / (size * static_cast<int64_t>(sizeof(A))), values / (4 * size));
    return least(tasks, most(8, least(64, least(tasks / 4, fit))));
  }

  int64_t tasks_, size_, slots_;
  Buffer<A> sums_;
};

}  // namespace gsto::cpu::GSTO_ISA
