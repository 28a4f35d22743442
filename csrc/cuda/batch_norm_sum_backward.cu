// The two passes of the backward of batch_norm_sum over maps of the output's size: see BatchNormSumBackwardParams and
// BatchNormSumTermsParams. (Terms of other sizes: resample.cu gathers their gradients and sums.)
// Traffic per element: the first pass reads dy, y and a term and writes dm, 4 in all (2 per further term: dm and it);
// the second reads dm and the terms and writes their gradients, 1 + 2 per term. Behind a single norm the sign of y is
// made again from the term: 2 and 3.
#include "cuda/strips.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast, int kWidth>
GSTO_KERNEL(kThreads, kSumResident)
batch_norm_sum_backward(const BatchNormSumBackwardParams p) {
  using S = Strip<T, kLast, kWidth>;
  constexpr int kEntries = S::kEntries;
  S strip(p);
  float* memory = reinterpret_cast<float*>(shared_memory());
  const ChannelTable<kEntries> table = {memory, p.plan.group_units};
  const bool masked = p.norm.bias != nullptr;
  if (p.term != nullptr) {
    strip.each_channel(p, [&](int channel, int unit, int j) {
      table.at(0, unit, j) = p.norm.mean[channel];
      if (masked) affine_of(p.norm, channel, table.at(1, unit, j), table.at(2, unit, j));
    });
  }
  sync_threads();
  float mean[kEntries] = {}, scale[kEntries] = {}, shift[kEntries] = {};
  float sums[2][kEntries] = {};  // of dm (term - mean), of dm
  if (p.term != nullptr && strip.row < strip.end) {
    table.get(0, strip.unit, mean);
    if (masked) {
      table.get(1, strip.unit, scale);
      table.get(2, strip.unit, shift);
    }
  }

  strip.each([&](int64_t, const int64_t (&at)[kStripBatch], int count) {
    UnitBits<T, kWidth> grads[kStripBatch] = {}, outputs[kStripBatch] = {}, terms[kStripBatch] = {};
    S::load(p.grad_output, at, count, grads);
    if (p.output != nullptr) S::load(p.output, at, count, outputs);
    if (p.term != nullptr) S::load(p.term, at, count, terms);
#pragma unroll
    for (int b = 0; b < kStripBatch; ++b) {
      if (b >= count) continue;
      float dm[kWidth], x[kWidth];
      unpack_bits<T, kWidth>(grads[b], dm);
      if (p.output != nullptr) {
        unpack_bits<T, kWidth>(outputs[b], x);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) dm[j] = x[j] > 0 ? dm[j] : 0.f;
      }
      if (p.grad_sum != nullptr) store_values<T, kWidth>(p.grad_sum, at[b], dm);
      if (p.term != nullptr) {
        unpack_bits<T, kWidth>(terms[b], x);
        if (masked) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) dm[j] = scale[j % kEntries] * x[j] + shift[j % kEntries] > 0 ? dm[j] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sums[0][j % kEntries] += dm[j] * (x[j] - mean[j % kEntries]);
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[1][j % kEntries] += dm[j];
    }
  });

  sync_threads();
  const int tid = static_cast<int>(threadIdx.x), count = p.term != nullptr ? 2 : 1;
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int e = 0; e < kEntries; ++e) memory[(s * kEntries + e) * kThreads + tid] = sums[s][e];
  sync_threads();
  const auto store = [&](int s, int channel, int fold, float sum) {
    p.sums[(strip.part(p, fold) * count + s - (2 - count)) * p.channels + channel] = sum;
  };
  if constexpr (kLast) {
    for (int s = 2 - count; s < 2; ++s) {
      strip.each_channel(p, [&](int channel, int unit, int e) {
        float sum = 0;
        for (int line = 0; line < strip.per_pass; ++line)
          sum += memory[(s * kEntries + e) * kThreads + line * p.plan.group_units + unit];
        int fold;
        strip.channel_of(p, unit, e, fold);
        store(s, channel, fold, sum);
      });
    }
  } else if (tid < 64) {  // a warp per sum
    const float* of = memory + tid / 32 * kThreads + tid % 32;
    float sum = (of[0] + of[32]) + (of[64] + of[96]);
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (tid % 32 == 0 && tid / 32 >= 2 - count) store(tid / 32, strip.channel0, 0, sum);
  }
}

// Scale; mean; the factors of term - mean and of one. Where the norm's sign masks: scale; shift; the factors of the
// normed term, scale * term + shift = scale * (term - mean) + bias, and of one. A fifth one would spill.
constexpr int kTermParameters = 4;

template <class T, bool kLast, int kWidth>
GSTO_KERNEL(kThreads, kStripResident)
batch_norm_sum_terms(const BatchNormSumTermsParams p) {
  using S = Strip<T, kLast, kWidth>;
  constexpr int kEntries = S::kEntries;
  S strip(p);
  const ChannelTable<kEntries> table = {reinterpret_cast<float*>(shared_memory()), p.plan.group_units};
  for (int k = 0; k < p.terms; ++k) {
    const Norm& norm = p.norm[k];
    strip.each_channel(p, [&](int channel, int unit, int j) {
      float scale, shift;
      affine_of(norm, channel, scale, shift);
      table.at(kTermParameters * k, unit, j) = scale;
      table.at(kTermParameters * k + 1, unit, j) = p.masked ? shift : norm.mean[channel];
      if (p.sum == nullptr) return;
      const float share = 1.f / (p.count[k] != nullptr ? *p.count[k] : p.pixels_counted);
      const float slope = -share / sqrtf(norm.variance[channel] + norm.eps) * p.term_sum[k][channel];
      const float offset = -share * scale * p.sum[channel];
      table.at(kTermParameters * k + 2, unit, j) = p.masked ? slope : scale * slope;
      table.at(kTermParameters * k + 3, unit, j) = p.masked ? offset - slope * norm.bias[channel] : offset;
    });
  }
  sync_threads();

  strip.each([&](int64_t, const int64_t (&at)[kStripBatch], int count) {
    UnitBits<T, kWidth> grads[kStripBatch] = {};
    S::load(p.grad, at, count, grads);
    for (int k = 0; k < p.terms; ++k) {
      UnitBits<T, kWidth> terms[kStripBatch] = {};
      float scale[kEntries], centre[kEntries] = {}, slope[kEntries] = {}, offset[kEntries] = {};
      table.get(kTermParameters * k, strip.unit, scale);
      if (p.sum != nullptr || p.masked) {
        S::load(p.term[k], at, count, terms);
        table.get(kTermParameters * k + 1, strip.unit, centre);
      }
      if (p.sum != nullptr) {
        table.get(kTermParameters * k + 2, strip.unit, slope);
        table.get(kTermParameters * k + 3, strip.unit, offset);
      }
#pragma unroll
      for (int b = 0; b < kStripBatch; ++b) {
        if (b >= count) continue;
        float grad[kWidth], x[kWidth];
        unpack_bits<T, kWidth>(grads[b], grad);
        unpack_bits<T, kWidth>(terms[b], x);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const int e = j % kEntries;
          const float value = p.masked ? scale[e] * x[j] + centre[e] : x[j] - centre[e];
          if (p.masked && !(value > 0)) grad[j] = 0;
          grad[j] = scale[e] * grad[j] + slope[e] * value + offset[e];
        }
        store_values<T, kWidth>(p.grad_term[k], at[b], grad);
      }
    }
  });
}

}  // namespace

cudaError_t launch_batch_norm_sum_backward(const BatchNormSumBackwardParams& params, cudaStream_t stream) {
  return dispatch_strips(params.format, params.plan.width, [&](auto type, auto last, auto width) {
    constexpr int kEntries = last.value ? width.value : 1;
    const size_t sums = 2 * kEntries * kThreads, table = ChannelTable<kEntries>::words(params.plan.group_units, 3);
    return launch(batch_norm_sum_backward<decltype(type), last.value, width.value>, strip_grid(params), kThreads,
                  sizeof(float) * (sums > table ? sums : table), stream, params);
  });
}

cudaError_t launch_batch_norm_sum_terms(const BatchNormSumTermsParams& params, cudaStream_t stream) {
  return dispatch_strips(params.format, params.plan.width, [&](auto type, auto last, auto width) {
    using Table = ChannelTable<last.value ? width.value : 1>;
    return launch(batch_norm_sum_terms<decltype(type), last.value, width.value>, strip_grid(params), kThreads,
                  sizeof(float) * Table::words(params.plan.group_units, kTermParameters * params.terms), stream,
                  params);
  });
}

}  // namespace gsto::cuda
