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

// gate = sigmoid(gate_weight . x + gate_bias) for the pixels of a tile, which become gate * x. gate holds whole
// vectors.
template <class A>
inline void gate_pixels(A* tile, const A* gate_weight, A gate_bias, int64_t row, int64_t count, A* gate) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t p = 0; p < count; p += lanes) {
    const int64_t valid = least(lanes, count - p);
    A logits[lanes] = {};
    dot_pixels(tile + p * row, gate_weight, 0, row, valid, logits);
    store(gate + p, sigmoid<A>(load(logits) + gate_bias));
    scale_pixels(tile + p * row, gate + p, row, valid);
  }
}

// The same for kVectors vectors of pixels of an NCHW image, to an NCHW image, without transposition. `valid` is the
// number of pixels; it is less than whole vectors only where kVectors == 1. scratch holds kVectors vectors per channel:
// planes are often a power of two apart, and would evict each other from the caches before the second pass.
template <class S, int kVectors, class A = Accumulate<S>>
inline void gate_planes(const S* input, int64_t input_plane, const A* gate_weight, A gate_bias, int64_t channels,
                        int64_t valid, A* scratch, S* gate, S* output, int64_t output_plane) {
  constexpr int64_t lanes = kLanes<A>, width = kVectors * lanes;
  const bool whole = kVectors > 1 || valid == width;
  Vec<A> g[kVectors];
  for (int v = 0; v < kVectors; ++v) g[v] = Vec<A>{} + gate_bias;
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      const S* from = input + c * input_plane + v * lanes;
      const Vec<A> x = whole ? load(from) : load_some(from, valid);
      store(scratch + c * width + v * lanes, x);
      g[v] += gate_weight[c] * x;
    }
  }
  const auto write = [&](S* to, int v, Vec<A> value) {
    whole ? store(to + v * lanes, value) : store_some(to, value, valid);
  };
  for (int v = 0; v < kVectors; ++v) {
    g[v] = sigmoid<A>(g[v]);
    write(gate, v, g[v]);
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int v = 0; v < kVectors; ++v)
      write(output + c * output_plane, v, g[v] * load(scratch + c * width + v * lanes));
}

// Its backward. gate and grad_gate hold whole vectors, zero beyond `valid`; grad_gate becomes the gradient of the
// logits. Writes grad_input and adds to weight_sums, one vector per channel. scratch holds 2 * kVectors vectors per
// channel.
template <class S, int kVectors, class A = Accumulate<S>>
inline void gate_planes_backward(const S* grad_output, int64_t grad_output_plane, const S* input, int64_t input_plane,
                                 const A* gate_weight, int64_t channels, int64_t valid, A* scratch, const A* gate,
                                 A* grad_gate, A* weight_sums, S* grad_input, int64_t grad_input_plane) {
  constexpr int64_t lanes = kLanes<A>, width = kVectors * lanes;
  const bool whole = kVectors > 1 || valid == width;
  const auto read = [&](const S* from, int v) { return whole ? load(from + v * lanes) : load_some(from, valid); };
  Vec<A> g[kVectors], grad[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    g[v] = load(gate + v * lanes);
    grad[v] = load(grad_gate + v * lanes);
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> u = read(grad_output + c * grad_output_plane, v), x = read(input + c * input_plane, v);
      store(scratch + (2 * c) * width + v * lanes, u);
      store(scratch + (2 * c + 1) * width + v * lanes, x);
      grad[v] += u * x;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    grad[v] *= g[v] * (A(1) - g[v]);
    store(grad_gate + v * lanes, grad[v]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec<A> sum = load(weight_sums + c * lanes);
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> u = load(scratch + (2 * c) * width + v * lanes), x = load(scratch + (2 * c + 1) * width + v * lanes);
      sum += grad[v] * x;
      const Vec<A> result = g[v] * u + gate_weight[c] * grad[v];
      S* to = grad_input + c * grad_input_plane;
      whole ? store(to + v * lanes, result) : store_some(to, result, valid);
    }
    store(weight_sums + c * lanes, sum);
  }
}

}  // namespace gsto::cpu::GSTO_ISA
