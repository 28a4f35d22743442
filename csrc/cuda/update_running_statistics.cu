// What batch norms in training mode do to their buffers: see UpdateRunningStatisticsParams. A block per norm.
// Traffic: a few hundred numbers; the launch is what it costs.
#include "cuda/kernels.h"

namespace gsto::cuda {
namespace {

GSTO_DEVICE double value_at(const Vector& values, int64_t i) {
  i *= values.stride;
  switch (values.dtype) {
    case ScalarType::kFloat64:
      return static_cast<const double*>(values.data)[i];
    case ScalarType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(values.data)[i]);
    case ScalarType::kFloat16:
      return to_float(static_cast<const Float16*>(values.data)[i]);
    default:
      return static_cast<const float*>(values.data)[i];
  }
}

GSTO_DEVICE void set(const Vector& values, int64_t i, double value) {
  i *= values.stride;
  switch (values.dtype) {
    case ScalarType::kFloat64:
      static_cast<double*>(values.data)[i] = value;
      break;
    case ScalarType::kBFloat16:
      from_float(static_cast<float>(value), static_cast<BFloat16*>(values.data)[i]);
      break;
    case ScalarType::kFloat16:
      from_float(static_cast<float>(value), static_cast<Float16*>(values.data)[i]);
      break;
    default:
      static_cast<float*>(values.data)[i] = static_cast<float>(value);
  }
}

GSTO_KERNEL(kThreads, 4)
update_running_statistics(const UpdateRunningStatisticsParams p) {
  const RunningStatistics& norm = p.norm[blockIdx.x];
  int64_t* batches = reinterpret_cast<int64_t*>(shared_memory());
  if (threadIdx.x == 0) *batches = ++*norm.batches;
  double share = p.momentum;
  if (p.cumulative) {
    sync_threads();
    share = 1 / static_cast<double>(*batches);
  }
  const double n = norm.count.data != nullptr ? value_at(norm.count, 0) : norm.pixels;
  for (int64_t c = threadIdx.x; c < norm.channels; c += kThreads) {
    set(norm.running_mean, c, moved(value_at(norm.running_mean, c), value_at(norm.mean, c), share));
    set(norm.running_var, c, moved(value_at(norm.running_var, c), n / (n - 1) * value_at(norm.var, c), share));
  }
}

}  // namespace

cudaError_t launch_update_running_statistics(const UpdateRunningStatisticsParams& params, cudaStream_t stream) {
  return launch(update_running_statistics, dim3(static_cast<unsigned>(params.norms)), kThreads, sizeof(int64_t), stream,
                params);
}

}  // namespace gsto::cuda
