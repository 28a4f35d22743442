// The second phases: rows of partial sums into a gradient, tiles' statistics into a batch's, all in a fixed order.
// Traffic: the partial sums once; plans keep them under a few percent of the maps.
#include "cuda/tile.h"

namespace gsto::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kStrands = kThreads / kColumns;

// 32 columns per block; four strands of rows per column, each summed in four accumulators for the loads to overlap.
template <class T>
GSTO_KERNEL(kThreads, 4)
sum_rows(const SumRowsParams p) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int column = static_cast<int>(threadIdx.x) % kColumns, strand = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  float sum[4] = {};
  if (i < p.count) {
    const float* from = p.from + i;
    int64_t row = strand;
    for (; row + 3 * kStrands < p.rows; row += 4 * kStrands) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += from[(row + j * kStrands) * p.stride];
    }
    for (; row < p.rows; row += kStrands) sum[0] += from[row * p.stride];
  }
  sums[threadIdx.x] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  sync_threads();
  if (strand != 0 || i >= p.count) return;
  float total = 0;
#pragma unroll
  for (int s = 0; s < kStrands; ++s) total += sums[s * kColumns + column];
  if (i < p.tail_begin) {
    from_float(total, static_cast<T*>(p.to)[i]);
  } else if (p.tail != nullptr) {
    from_float(total, static_cast<T*>(p.tail)[i - p.tail_begin]);
  }
}

struct Statistics {
  float count = 0, mean = 0, squares = 0;

  GSTO_DEVICE void merge(float other_count, float other_mean, float other_squares) {
    const float total = count + other_count;
    if (other_count == 0 || total == 0) return;
    const float delta = other_mean - mean;
    mean += delta * (other_count / total);
    squares += other_squares + delta * delta * count * (other_count / total);
    count = total;
  }
};

// One block per channel: every thread merges a run of tiles, then the threads' results are merged pairwise.
GSTO_KERNEL(kThreads, 4)
merge_statistics(const MergeStatisticsParams p) {
  Statistics* all = reinterpret_cast<Statistics*>(shared_memory());
  const int tid = static_cast<int>(threadIdx.x), channel = static_cast<int>(blockIdx.x);
  const float* means = p.statistics + channel * p.tiles;
  const float* squares = p.statistics + (p.channels + channel) * p.tiles;
  const int last_count = static_cast<int>(p.pixels - (p.tiles_per_image - 1) * kTilePixels);
  Statistics mine;
  for (int64_t tile = tid; tile < p.tiles; tile += kThreads) {
    const bool last = tile % p.tiles_per_image == p.tiles_per_image - 1;
    mine.merge(static_cast<float>(last ? last_count : kTilePixels), means[tile], squares[tile]);
  }
  all[tid] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (tid < half) all[tid].merge(all[tid + half].count, all[tid + half].mean, all[tid + half].squares);
  }
  if (tid == 0) {
    p.mean[channel] = all[0].mean;
    p.variance[channel] = all[0].squares / all[0].count;
  }
}

GSTO_KERNEL(kThreads, 4)
statistics_gradient(const StatisticsGradientParams p) {
  const int c = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (c >= p.channels) return;
  const float count = static_cast<float>(p.count);
  const float c1 = p.grad_variance != nullptr ? 2.f * p.grad_variance[c] / count : 0.f;
  p.c1[c] = c1;
  p.c0[c] = (p.grad_mean != nullptr ? p.grad_mean[c] / count : 0.f) - c1 * p.mean[c];
}

}  // namespace

cudaError_t launch_sum_rows(const SumRowsParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((params.count + kColumns - 1) / kColumns));
  const auto run = [&](auto kernel) {
    return launch(kernel, grid, kThreads, kThreads * sizeof(float), stream, params);
  };
  switch (params.dtype) {
    case ScalarType::kFloat32:
      return run(sum_rows<float>);
    case ScalarType::kBFloat16:
      return run(sum_rows<BFloat16>);
    case ScalarType::kFloat16:
      return run(sum_rows<Float16>);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_merge_statistics(const MergeStatisticsParams& params, cudaStream_t stream) {
  return launch(merge_statistics, dim3(static_cast<unsigned>(params.channels)), kThreads, kThreads * sizeof(Statistics),
                stream, params);
}

cudaError_t launch_statistics_gradient(const StatisticsGradientParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((params.channels + kThreads - 1) / kThreads));
  return launch(statistics_gradient, grid, kThreads, 0, stream, params);
}

}  // namespace gsto::cuda
