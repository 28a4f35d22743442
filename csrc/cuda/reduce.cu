// The second phases: rows of partial sums into a gradient, tiles' statistics into a batch's, all in a fixed order.
// Traffic: the partial sums once; plans keep them under a few percent of the maps.
#include "cuda/statistics.h"
#include "cuda/tile.h"

namespace gsto::cuda {
namespace {

// Columns per block: 8 of them fill a sector, and their 16 strands of rows are 4 times shorter than those of 32, whose
// blocks suffice where there are many columns.
template <int kColumns>
constexpr int kStrands = kThreads / kColumns;

// Strands of rows per column, each summed in eight accumulators for the loads to overlap.
template <class T, int kColumns>
GSTO_KERNEL(kThreads, 4)
sum_rows(const SumRowsParams p) {
  constexpr int kStep = kStrands<kColumns>, kAhead = 8;
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int column = static_cast<int>(threadIdx.x) % kColumns, strand = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  float sum[kAhead] = {};
  if (i < p.count) {
    const float* from = p.from + i;
    int64_t row = strand;
    for (; row + (kAhead - 1) * kStep < p.rows; row += kAhead * kStep) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) sum[j] += from[(row + j * kStep) * p.stride];
    }
    for (; row < p.rows; row += kStep) sum[0] += from[row * p.stride];
  }
  sums[threadIdx.x] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  sync_threads();
  if (strand != 0 || i >= p.count) return;
  float total = 0;
#pragma unroll
  for (int s = 0; s < kStep; ++s) total += sums[s * kColumns + column];
  if (i < p.tail_begin) {
    if (p.variance != nullptr) total /= sqrtf(p.variance[i] + p.eps);
    from_float(total, static_cast<T*>(p.to)[i]);
  } else if (p.tail != nullptr) {
    from_float(total, static_cast<T*>(p.tail)[i - p.tail_begin]);
  }
}

// One block per channel: every thread merges a run of tiles, then the threads' results are merged pairwise.
GSTO_KERNEL(kThreads, 4)
merge_statistics(const MergeStatisticsParams p) {
  Statistics* all = reinterpret_cast<Statistics*>(shared_memory());
  const int tid = static_cast<int>(threadIdx.x), channel = static_cast<int>(blockIdx.x);
  const float* means = p.statistics + channel * p.tiles;
  const float* squares = p.statistics + (p.channels + channel) * p.tiles;
  const float whole_count = static_cast<float>(p.tile_pixels),
              last_count = static_cast<float>(p.pixels - (p.tiles_per_image - 1) * p.tile_pixels);
  const int tiles_per_image = static_cast<int>(p.tiles_per_image);
  Statistics mine;
#pragma unroll 4
  for (int tile = tid; tile < static_cast<int>(p.tiles); tile += kThreads) {
    const bool last = tile % tiles_per_image == tiles_per_image - 1;
    mine.merge(last ? last_count : whole_count, means[tile], squares[tile]);
  }
  merge_threads(mine, all);
  if (tid == 0) {
    const bool any = all[0].count > 0;  // of nothing: NaN, as torch.var_mean has it
    p.mean[channel] = any ? all[0].mean : nanf("");
    p.variance[channel] = any ? all[0].squares / all[0].count : nanf("");
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

template <int kColumns>
cudaError_t run_sum_rows(const SumRowsParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((params.count + kColumns - 1) / kColumns));
  const auto run = [&](auto kernel) {
    return launch(kernel, grid, kThreads, kThreads * sizeof(float), stream, params);
  };
  switch (params.dtype) {
    case ScalarType::kFloat32:
      return run(sum_rows<float, kColumns>);
    case ScalarType::kBFloat16:
      return run(sum_rows<BFloat16, kColumns>);
    case ScalarType::kFloat16:
      return run(sum_rows<Float16, kColumns>);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_sum_rows(const SumRowsParams& params, cudaStream_t stream) {
  return params.count < 4096 ? run_sum_rows<8>(params, stream) : run_sum_rows<32>(params, stream);
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
