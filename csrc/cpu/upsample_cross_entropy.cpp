// torch.ops.gsto_ops.upsample_cross_entropy and its backward on the CPU. The schemas are those of gsto_ops/ops.
#include <stdexcept>

#include "cpu/binding.h"
#include "labels.h"

namespace gsto::cpu {
namespace {

// A (N, H, W) map as a (N, 1, H, W) view.
TensorView pixel_view(const Tensor& map) {
  TensorView v;
  v.data = map.data_ptr();
  v.stride_n = map.stride(0);
  v.stride_h = map.stride(1);
  v.stride_w = map.stride(2);
  return v;
}

UpsampleCrossEntropyParams common_params(const Operator& op, const Tensor& target, const OptionalTensor& weight,
                                         int64_t ignore_index, int64_t* bad_label) {
  UpsampleCrossEntropyParams p;
  p.dtype = op.dtype;
  p.label_type = label_type_of(op.name, target, op.input);
  p.batch = op.batch;
  p.channels = op.channels;
  p.in_width = op.width;
  p.ignore_index = *bad_label = ignore_index;
  p.bad_label = bad_label;
  op.check("weight", weight, {p.channels}, true);
  p.input = view(op.input);
  p.target = pixel_view(target);
  p.weight = view(weight);
  return p;
}

// Python gets an IndexError, as from F.cross_entropy.
void check_labels(const Operator& op, const UpsampleCrossEntropyParams& p) {
  if (*p.bad_label == p.ignore_index) return;
  throw std::out_of_range(std::string("gsto_ops::") + op.name + ": target has label " + std::to_string(*p.bad_label) +
                          ", which is neither one of the " + std::to_string(p.channels) +
                          " classes of input nor ignore_index, " + std::to_string(p.ignore_index));
}

// A number of the accumulate type.
double number(const Operator& op, const Tensor& scalar) {
  return op.dtype == gsto::ScalarType::kFloat64 ? *static_cast<const double*>(scalar.data_ptr())
                                                : *static_cast<const float*>(scalar.data_ptr());
}

Tensor new_number(const Operator& op, double value) {
  const Tensor scalar = op.new_statistics({});
  if (op.dtype == gsto::ScalarType::kFloat64) {
    *static_cast<double*>(scalar.data_ptr()) = value;
  } else {
    *static_cast<float*>(scalar.data_ptr()) = static_cast<float>(value);
  }
  return scalar;
}

// What "mean" divides by: without a labelled pixel 1, so that the loss is 0 and not 0 / 0.
double divisor(double mass) { return mass == 0 ? 1 : mass; }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                           int64_t ignore_index, StringHandle reduction_handle, bool align_corners) {
  const Operator op("upsample_cross_entropy", input);
  const Reduction reduction = reduction_of(op.name, reduction_handle);
  int64_t bad_label;
  UpsampleCrossEntropyParams p = common_params(op, target, weight, ignore_index, &bad_label);
  const ResamplingTables tables(op, label_resampling(op.name, input, target, align_corners));
  const std::vector<int64_t> pixels = {target.size(0), target.size(1), target.size(2)};
  const Tensor logsumexp = op.new_statistics(pixels);
  std::optional<Tensor> losses;
  if (reduction == Reduction::kNone) losses = op.new_statistics(pixels);
  double totals[2] = {};
  p.logsumexp = pixel_view(logsumexp);
  if (losses.has_value()) p.loss = pixel_view(*losses);
  p.totals = totals;
  op.run(chosen_kernels().upsample_cross_entropy, tables.forward(), p);
  check_labels(op, p);
  if (reduction == Reduction::kNone) return {*losses, logsumexp, op.new_statistics({0})};
  if (reduction == Reduction::kSum) return {new_number(op, totals[0]), logsumexp, op.new_statistics({0})};
  return {new_number(op, totals[0] / divisor(totals[1])), logsumexp, new_number(op, totals[1])};
}

Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const Tensor& logsumexp, const Tensor& mass, int64_t ignore_index, StringHandle reduction_handle,
                bool align_corners) {
  const Operator op("upsample_cross_entropy_backward", input);
  const Reduction reduction = reduction_of(op.name, reduction_handle);
  int64_t bad_label;
  UpsampleCrossEntropyParams p = common_params(op, target, weight, ignore_index, &bad_label);
  ResamplingTables tables(op, label_resampling(op.name, input, target, align_corners));
  const std::vector<int64_t> pixels = {target.size(0), target.size(1), target.size(2)};
  op.check("logsumexp", logsumexp, pixels, true);
  p.logsumexp = pixel_view(logsumexp);
  if (reduction == Reduction::kNone) {
    op.check("grad_loss", grad_loss, pixels, true);
    p.grad_loss = pixel_view(grad_loss);
  } else {
    op.check("grad_loss", grad_loss, {}, true);
    p.grad_loss.data = grad_loss.data_ptr();
  }
  if (reduction == Reduction::kMean) {
    op.check("mass", mass, {}, true);
    p.divisor = divisor(number(op, mass));
  }
  const Tensor grad_input = op.new_map(p.channels, op.height, op.width);
  p.grad_input = view(grad_input);
  op.run(chosen_kernels().upsample_cross_entropy_backward, tables.backward(), p);
  check_labels(op, p);
  return grad_input;
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&gsto::cpu::forward));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&gsto::cpu::backward));
}
