// The gate itself. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// exp(x) for x <= 0, with a relative error below 2e-7; results under 1e-38 become 1e-38. A NaN stays one.
inline Vec<float> exponential(Vec<float> x) {
  x = x < -87.3f ? Vec<float>{} - 87.3f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = x * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log(2) in two parts
  Vec<float> poly = Vec<float>{} + 1.9875691500e-4f;
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    poly = poly * r + coefficient;
  const Vec<float> power = bit_cast<Vec<float>>((bit_cast<Bits>(shifted) << 23) + 0x3f800000u);  // 2^n
  return (poly * r * r + r + 1.0f) * power;
}

inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

template <class A>
inline Vec<A> sigmoid(Vec<A> logit) {
  const Vec<A> e = exponential(logit < 0 ? logit : -logit);  // e <= 1: large logits of either sign are safe
  return (logit < 0 ? e : Vec<A>{} + A(1)) / (A(1) + e);
}

#ifdef GSTO_BFLOAT16_INSTRUCTIONS
// dots[p] = a[p] . b for pixels of an even number of bfloat16 channels, a_stride apart. b is padded with zeros to whole
// vectors of pairs, and dots holds whole vectors.
inline void dot_pairs(const BFloat16* a, int64_t a_stride, const Pair* b, int64_t channels, int64_t count,
                      float* dots) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t pairs = channels / 2, whole = pairs / lanes * lanes;
  const __mmask16 rest = static_cast<__mmask16>((1u << (pairs - whole)) - 1);
  for (int64_t p = 0; p < count; p += lanes) {
    Vec<float> sums[lanes] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      const BFloat16* from = a + least(p + i, count - 1) * a_stride;
      for (int64_t c = 0; c < whole; c += lanes)
        sums[i] = multiply_add(sums[i], load_raw<Bits>(from + 2 * c), load(b + c));
      if (rest != 0)
        sums[i] =
            multiply_add(sums[i], bit_cast<Bits>(_mm512_maskz_loadu_epi32(rest, from + 2 * whole)), load(b + whole));
    }
    transpose<float>(sums);
    for (int64_t i = 1; i < lanes; ++i) sums[0] += sums[i];
    store(dots + p, sums[0]);
  }
}
#endif

// gate = sigmoid(gate + gate_bias). gate holds whole vectors.
template <class A>
inline void gate_logits(A* gate, A gate_bias, int64_t count) {
  for (int64_t p = 0; p < count; p += kLanes<A>) store(gate + p, sigmoid<A>(load(gate + p) + gate_bias));
}

// gate = sigmoid(gate_weight . x + gate_bias) for the pixels of a tile, and gated = gate * x, which may be the same
// tile.
template <class A>
inline void gate_pixels(const A* tile, const A* gate_weight, A gate_bias, int64_t row, int64_t count, A* gate,
                        A* gated) {
  dot_pixels(tile, gate_weight, 0, row, count, gate);
  gate_logits(gate, gate_bias, count);
  scale_pixels(tile, gate, row, count, gated);
}

// From dots[p] = d/dg . x and, in grad, the gradient of the gate itself: the gradients of the logits, in grad. Returns
// their sum.
template <class A>
inline A gate_gradients(const A* gate, const A* dots, int64_t count, A* grad) {
  Vec<A> totals = {};
  int64_t p = 0;
  for (; p + kLanes<A> <= count; p += kLanes<A>) {
    const Vec<A> g = load(gate + p), value = (load(grad + p) + load(dots + p)) * g * (A(1) - g);
    store(grad + p, value);
    totals += value;
  }
  A total = sum_lanes<A>(totals);
  for (; p < count; ++p) {
    grad[p] = (grad[p] + dots[p]) * gate[p] * (A(1) - gate[p]);
    total += grad[p];
  }
  return total;
}

// channels_last memory of at least one vector of channels needs no tile. The last vector of a pixel overlaps the one
// before it; in sums the lanes that were there already count as zero.
template <class S, class A = Accumulate<S>>
struct ChannelRuns {
  int64_t channels, whole;  // channels in whole vectors
  bool has_tail;
  decltype(Vec<A>{} < Vec<A>{}) tail_lanes;

  explicit ChannelRuns(int64_t c)
      : channels(c), whole(c / kLanes<A> * kLanes<A>), has_tail(whole < c), tail_lanes(tail_mask(c - whole)) {}

  static auto tail_mask(int64_t count) {
    A numbers[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) numbers[i] = static_cast<A>(i);
    return load(numbers) >= Vec<A>{} + static_cast<A>(kLanes<A> - count);
  }

  int64_t tail() const { return channels - kLanes<A>; }
  Vec<A> load_tail(const S* from) const { return tail_lanes ? load(from + tail()) : Vec<A>{}; }

  // dots[p] = a[p] . b[p]; b_stride == 0 takes the same b for every pixel. dots holds whole vectors.
  template <class T>
  void dot(const S* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count, A* dots) const {
    constexpr int64_t lanes = kLanes<A>;
    for (int64_t p = 0; p < count; p += lanes) {
      Vec<A> sums[lanes];
      for (int64_t i = 0; i < lanes; ++i) {  // pixel after pixel, as they lie in memory
        const S* at = a + least(p + i, count - 1) * a_stride;
        const T* with = b + least(p + i, count - 1) * b_stride;
        Vec<A> sum = {};
        for (int64_t c = 0; c < whole; c += lanes) {
          sum += load(at + c) * load(with + c);
          ask_ahead(at + c);
          if (b_stride) ask_ahead(with + c);
        }
        if (has_tail) sum += load_tail(at) * load(with + tail());
        sums[i] = sum;
      }
      transpose<A>(sums);
      for (int64_t i = 1; i < lanes; ++i) sums[0] += sums[i];
      store(dots + p, sums[0]);
    }
  }

  // gate as above, output = gate * input.
  void gate(const S* input, int64_t input_stride, const A* gate_weight, A gate_bias, int64_t count, A* gate, S* output,
            int64_t output_stride) const {
    dot(input, input_stride, gate_weight, 0, count, gate);
    gate_logits(gate, gate_bias, count);
    for (int64_t p = 0; p < count; ++p) {
      const S* from = input + p * input_stride;
      S* to = output + p * output_stride;
      for (int64_t c = 0; c < whole; c += kLanes<A>) store(to + c, gate[p] * load(from + c));
      if (has_tail) store(to + tail(), gate[p] * load(from + tail()));
    }
  }

  // grad_input = gate * grad_output + grad_logit * gate_weight for a vector of channels; adds grad_logit * input to
  // sums.
  template <class T>
  void input_gradient(const T* grad_output, int64_t grad_output_stride, const S* input, int64_t input_stride,
                      const A* gate_weight, const A* gate, const A* grad_logit, int64_t count, A* sums, S* grad_input,
                      int64_t grad_input_stride) const {
    const auto work = [&](int64_t c, auto vectors, auto is_tail) {
      Vec<A> weight[vectors], sum[vectors];
      for (int v = 0; v < vectors; ++v) {
        weight[v] = load(gate_weight + c + v * kLanes<A>);
        sum[v] = load(sums + c + v * kLanes<A>);
      }
      for (int64_t p = 0; p < count; ++p) {
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = c + v * kLanes<A>;
          const S* from = input + p * input_stride;
          sum[v] += grad_logit[p] * (is_tail ? load_tail(from) : load(from + at));
          store(grad_input + p * grad_input_stride + at,
                gate[p] * load(grad_output + p * grad_output_stride + at) + grad_logit[p] * weight[v]);
        }
      }
      for (int v = 0; v < vectors; ++v) store(sums + c + v * kLanes<A>, sum[v]);
    };
    for_vectors<A>(whole, [&](int64_t c, auto vectors) { work(c, vectors, std::false_type()); });
    if (has_tail) work(tail(), std::integral_constant<int, 1>(), std::true_type());
  }
};

}  // namespace gsto::cpu::GSTO_ISA
