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

// The parameters of one call, padded with zeros to whole vectors.
template <class S, class A = Accumulate<S>>
struct Operands {
  Buffer<A> gate_weight;    // rho: (C)
  Buffer<A> bias;           // (C'), zeros when there is none
  Buffer<A> weight;         // W: (C', C)
  Buffer<A> weight_by_row;  // W transposed: (C, C'), and rho as column C' where padding leaves room for it
  A gate_bias = 0;

  explicit Operands(const GatedParams& p)
      : gate_weight(padded<A>(p.channels)),
        bias(padded<A>(p.out_channels)),
        weight(p.weight.data ? p.out_channels * padded<A>(p.channels) : 0),
        weight_by_row(p.weight.data ? p.channels * padded<A>(p.out_channels) : 0) {
    fill_padded<S>(p.gate_weight, p.gate_weight.stride_c, p.channels, gate_weight.data());
    fill_padded<S>(p.bias, p.bias.stride_n, p.bias.data ? p.out_channels : 0, bias.data(), padded<A>(p.out_channels));
    if (p.gate_bias.data) gate_bias = load_some(static_cast<const S*>(p.gate_bias.data), 1)[0];
    if (!p.weight.data) return;
    for (int64_t m = 0; m < p.out_channels; ++m) {
      TensorView filter = p.weight;
      filter.data = mutable_pixel<S>(p.weight, m, 0, 0);
      fill_padded<S>(filter, filter.stride_c, p.channels, weight.data() + m * padded<A>(p.channels));
    }
    for (int64_t k = 0; k < p.channels; ++k) {
      A* to = weight_by_row.data() + k * padded<A>(p.out_channels);
      for (int64_t m = 0; m < padded<A>(p.out_channels); ++m)
        to[m] = m < p.out_channels ? weight.data()[m * padded<A>(p.channels) + k] : A(0);
      if (p.out_channels < padded<A>(p.out_channels)) to[p.out_channels] = gate_weight.data()[k];
    }
  }
};

// Sums over all pixels. The tasks fall into slots, each with its own sums; slots and the order of the final sum depend
// on the shape alone, so the result does not depend on the number of threads.
template <class A>
class Reduction {
 public:
  Reduction(int64_t tasks, int64_t size)
      : tasks_(tasks), size_(size), slots_(slots_for(tasks, size)), sums_(slots_ * size) {}

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
  // weight costs as much as a task, but 8 slots in any case.
  static int64_t slots_for(int64_t tasks, int64_t size) {
    const int64_t fit = (int64_t{64} << 20) / (size * static_cast<int64_t>(sizeof(A)));
    return least(tasks, most(8, least(64, least(tasks / 4, fit))));
  }

  int64_t tasks_, size_, slots_;
  Buffer<A> sums_;
};

}  // namespace gsto::cpu::GSTO_ISA
