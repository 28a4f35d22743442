// Mean and variance of every channel: see ChannelStatisticsParams. A thread merges its batches of units as it goes
// (Chan), so that no large sums are subtracted; then the block's threads, and in a second phase the blocks.
// Traffic per element: 1 read; a block's partial results are a few bytes per KiB of its input.
#include "cuda/statistics.h"
#include "cuda/strips.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast, int kWidth>
GSTO_KERNEL(kThreads, kSumResident)
channel_statistics(const ChannelStatisticsParams p) {
  using S = Strip<T, kLast, kWidth>;
  constexpr int kEntries = S::kEntries;
  float* memory = reinterpret_cast<float*>(shared_memory());
  S strip(p);
  float total = 0, mean[kEntries] = {}, squares[kEntries] = {};
  strip.each([&](int64_t, const int64_t (&at)[kStripBatch], int count) {
    UnitBits<T, kWidth> units[kStripBatch];
    S::load(p.input, at, count, units);
    const float values = static_cast<float>(count * (kWidth / kEntries)), scale = 1.f / values;
    float here[kEntries] = {}, spread[kEntries] = {};
#pragma unroll
    for (int b = 0; b < kStripBatch; ++b) {
      if (b >= count) continue;
      float x[kWidth];
      unpack_bits<T, kWidth>(units[b], x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) here[j % kEntries] += x[j];
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) here[e] *= scale;
#pragma unroll
    for (int b = 0; b < kStripBatch; ++b) {
      if (b >= count) continue;
      float x[kWidth];
      unpack_bits<T, kWidth>(units[b], x);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        spread[j % kEntries] += (x[j] - here[j % kEntries]) * (x[j] - here[j % kEntries]);
    }
    const float share = values / (total + values);
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {  // Statistics::merge, whose counts are the same for all entries
      const float delta = here[e] - mean[e];
      mean[e] += delta * share;
      squares[e] += spread[e] + delta * delta * total * share;
    }
    total += values;
  });

  const int tid = static_cast<int>(threadIdx.x);
  const int64_t tiles = static_cast<int64_t>(p.plan.fold) * p.plan.blocks;
  const auto store = [&](const Statistics& s, int channel, int fold) {
    const int64_t tile = static_cast<int64_t>(fold) * p.plan.blocks + blockIdx.x % static_cast<unsigned>(p.plan.blocks);
    p.statistics[channel * tiles + tile] = s.mean;
    p.statistics[(p.channels + channel) * tiles + tile] = s.squares;
  };
  if constexpr (!kLast) {
    Statistics* all = reinterpret_cast<Statistics*>(memory);
    merge_threads(Statistics{total, mean[0], squares[0]}, all);
    if (tid == 0) store(all[0], strip.channel0, 0);
  } else {
    float *totals = memory, *means = totals + kThreads, *spreads = means + kEntries * kThreads;
    totals[tid] = total;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      means[e * kThreads + tid] = mean[e];
      spreads[e * kThreads + tid] = squares[e];
    }
    sync_threads();
    strip.each_channel(p, [&](int channel, int unit, int e) {
      Statistics s;
      for (int line = 0; line < strip.per_pass; ++line) {
        const int thread = line * p.plan.group_units + unit;
        s.merge(totals[thread], means[e * kThreads + thread], spreads[e * kThreads + thread]);
      }
      int fold;
      strip.channel_of(p, unit, e, fold);
      store(s, channel, fold);
    });
  }
}

}  // namespace

cudaError_t launch_channel_statistics(const ChannelStatisticsParams& params, cudaStream_t stream) {
  return dispatch_strips(params.format, params.plan.width, [&](auto type, auto last, auto width) {
    constexpr int kEntries = last.value ? width.value : 1;
    return launch(channel_statistics<decltype(type), last.value, width.value>, strip_grid(params), kThreads,
                  sizeof(float) * kThreads * (1 + 2 * kEntries), stream, params);
  });
}

}  // namespace gsto::cuda
