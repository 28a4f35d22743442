// The operands of update_running_statistics_, read and checked for all devices.
#pragma once

#include "operator.h"

namespace gsto {

using Tensors = std::vector<Tensor>;

// One for every norm. They point into the tensors.
inline std::vector<RunningStatistics> running_statistics_of(const char* op, const Tensors& running_mean,
                                                            const Tensors& running_var,
                                                            const Tensors& num_batches_tracked, const Tensors& mean,
                                                            const Tensors& var, const std::vector<int64_t>& pixels,
                                                            const Tensors& counts) {
  const size_t norms = mean.size();
  STD_TORCH_CHECK(running_mean.size() == norms && running_var.size() == norms && num_batches_tracked.size() == norms &&
                      var.size() == norms && pixels.size() == norms && (counts.empty() || counts.size() == norms),
                  "gsto_ops::", op, ": all lists must be as long as mean, ", norms, "; counts may be empty");
  std::vector<RunningStatistics> found(norms);
  for (size_t k = 0; k < norms; ++k) {
    const auto vector_of = [&](const char* name, const Tensor& tensor, Sizes shape) -> Vector {
      check_shape(op, name, tensor, shape, mean[k]);
      STD_TORCH_CHECK(tensor.device() == mean[k].device(), "gsto_ops::", op, ": ", name,
                      " must be on the device of mean");
      return {tensor.data_ptr(), tensor.dim() > 0 ? tensor.stride(0) : 0, scalar_type(op, tensor, true, "the kernel")};
    };
    const std::vector<int64_t> channels = {mean[k].numel()};
    RunningStatistics& norm = found[k];
    norm.running_mean = vector_of("running_mean", running_mean[k], channels);
    norm.running_var = vector_of("running_var", running_var[k], channels);
    norm.mean = vector_of("mean", mean[k], channels);
    norm.var = vector_of("var", var[k], channels);
    norm.channels = channels[0];
    const Tensor& batches = num_batches_tracked[k];
    STD_TORCH_CHECK(batches.scalar_type() == torch::headeronly::ScalarType::Long && batches.numel() == 1 &&
                        batches.device() == mean[k].device(),
                    "gsto_ops::", op, ": num_batches_tracked must be one int64 on the device of mean, got ",
                    batches.scalar_type(), " of shape ", shape_of(batches));
    norm.batches = static_cast<int64_t*>(batches.data_ptr());
    norm.pixels = static_cast<double>(pixels[k]);
    if (!counts.empty()) norm.count = vector_of("counts", counts[k], {});
  }
  return found;
}

}  // namespace gsto
