// torch.ops.gsto_ops.update_running_statistics_ on the CPU: a few hundred numbers, by the calling thread. The schema is
// that of gsto_ops/ops.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "running_statistics.h"

namespace gsto::cpu {
namespace {

template <class F>
void with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::kFloat32:
      return f(float());
    case ScalarType::kFloat64:
      return f(double());
    case ScalarType::kBFloat16:
      return f(c10::BFloat16());
    case ScalarType::kFloat16:
      return f(c10::Half());
  }
}

double first_of(const Vector& values) {
  double first = 0;
  with_type(values.dtype, [&](auto type) { first = *static_cast<const decltype(type)*>(values.data); });
  return first;
}

void update_one(const Vector& running, const Vector& batch, int64_t channels, double share, double factor) {
  with_type(running.dtype, [&](auto running_type) {
    with_type(batch.dtype, [&](auto batch_type) {
      auto* to = static_cast<decltype(running_type)*>(running.data);
      const auto* from = static_cast<const decltype(batch_type)*>(batch.data);
      for (int64_t c = 0; c < channels; ++c) {
        auto& value = to[c * running.stride];
        value = static_cast<decltype(running_type)>(moved(value, factor * from[c * batch.stride], share));
      }
    });
  });
}

void update(Tensors running_mean, Tensors running_var, Tensors num_batches_tracked, Tensors mean, Tensors var,
            std::vector<int64_t> pixels, Tensors counts, std::optional<double> momentum) {
  for (const RunningStatistics& norm : running_statistics_of("update_running_statistics_", running_mean, running_var,
                                                             num_batches_tracked, mean, var, pixels, counts)) {
    const double batches = static_cast<double>(++*norm.batches);
    const double share = momentum.has_value() ? *momentum : 1 / batches;
    const double n = norm.count.data ? first_of(norm.count) : norm.pixels;
    update_one(norm.running_mean, norm.mean, norm.channels, share, 1);
    update_one(norm.running_var, norm.var, norm.channels, share, n / (n - 1));
  }
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) { m.impl("update_running_statistics_", TORCH_BOX(&gsto::cpu::update)); }
