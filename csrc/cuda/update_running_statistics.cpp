// torch.ops.gsto_ops.update_running_statistics_ on CUDA. The schema is defined in gsto_ops.
#include "cuda/binding.h"
#include "running_statistics.h"

namespace gsto::cuda {
namespace {

void update(Tensors running_mean, Tensors running_var, Tensors num_batches_tracked, Tensors mean, Tensors var,
            std::vector<int64_t> pixels, Tensors counts, std::optional<double> momentum) {
  const char* op = "update_running_statistics_";
  const std::vector<RunningStatistics> norms =
      running_statistics_of(op, running_mean, running_var, num_batches_tracked, mean, var, pixels, counts);
  UpdateRunningStatisticsParams p{};
  p.cumulative = !momentum.has_value();
  p.momentum = momentum.value_or(0);
  for (size_t k = 0; k < norms.size(); ++k) {
    p.norm[p.norms++] = norms[k];
    // The blocks of a launch run in any order: a norm that is there twice takes two.
    bool last = k + 1 == norms.size() || p.norms == kMaxTerms;
    for (int i = 0; !last && i < p.norms; ++i) last = norms[k + 1].batches == p.norm[i].batches;
    if (!last) continue;
    const OnDevice device(mean[k]);
    check_launch(op, mean[k], launch_update_running_statistics(p, device.stream));
    p.norms = 0;
  }
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) { m.impl("update_running_statistics_", TORCH_BOX(&gsto::cuda::update)); }
