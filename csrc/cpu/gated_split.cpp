// torch.ops.gsto_ops.gated_split and its backward on the CPU. The schemas are those of gsto_ops/ops.
#include "cpu/binding.h"

namespace gsto::cpu {
namespace {

GatedSplitParams common_params(const Operator& op, const Tensor& gate_weight, const OptionalTensor& weight,
                               const std::vector<int64_t>& split, StringHandle activation) {
  GatedSplitParams p;
  p.relu = is_relu(op.name, activation);
  p.dtype = op.dtype;
  p.batch = op.batch;
  p.channels = op.channels;
  p.height = op.height;
  p.width = op.width;
  STD_TORCH_CHECK(gate_weight.dim() == 4, "gsto_ops::", op.name, ": gate_weight must be (K, C, 1, 1), got ",
                  shape_of(gate_weight));
  p.gates = gate_weight.size(0);
  op.check("gate_weight", gate_weight, {p.gates, p.channels, 1, 1});
  int64_t rows = 0;
  for (const int64_t channels : split) {
    STD_TORCH_CHECK(channels > 0, "gsto_ops::", op.name, ": split must be positive, got ", channels);
    rows += channels;
  }
  p.projections = static_cast<int64_t>(split.size());
  STD_TORCH_CHECK(weight.has_value() == (rows > 0), "gsto_ops::", op.name, ": weight must be given for a split, only");
  op.check("weight", weight, {rows, p.channels, 1, 1});
  p.out_channels = split.data();
  p.input = view(op.input);
  p.gate_weight = view(gate_weight);
  p.weight = view(weight);
  return p;
}

std::vector<TensorView> views(const std::vector<Tensor>& tensors) {
  std::vector<TensorView> found;
  for (const Tensor& tensor : tensors) found.push_back(view(tensor));
  return found;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const Tensor& gate_weight, OptionalTensor gate_bias, OptionalTensor weight,
    std::vector<int64_t> split, int64_t copies, StringHandle activation, int64_t carriers) {
  const Operator op("gated_split", input);
  GatedSplitParams p = common_params(op, gate_weight, weight, split, activation);
  STD_TORCH_CHECK(copies >= 0 && carriers >= 0 && p.projections + copies + carriers <= p.gates,
                  "gsto_ops::gated_split: copies and carriers must be 0 to ", p.gates - p.projections,
                  " together, got ", copies, " and ", carriers);
  p.copies = copies;
  op.check("gate_bias", gate_bias, {p.gates});
  p.gate_bias = view(gate_bias);

  std::vector<Tensor> projected, gated;
  int64_t rows = 0;
  for (const int64_t channels : split) {
    projected.push_back(op.new_map(channels, p.height, p.width));
    rows += channels;
  }
  for (int64_t k = 0; k < copies; ++k) gated.push_back(op.new_map(p.channels, p.height, p.width));
  const Tensor gate = op.new_tensor({p.batch, p.gates, p.height, p.width});
  const Tensor mean = op.new_statistics({rows}), var = op.new_statistics({rows});
  const std::vector<TensorView> projected_views = views(projected), gated_views = views(gated);
  p.projected = projected_views.data();
  p.gated = gated_views.data();
  p.gate = view(gate);
  p.mean = mean.data_ptr();
  p.var = var.data_ptr();
  chosen_kernels().gated_split(op.call(op.height * op.width), p);
  for (int64_t k = 0; k < carriers; ++k) gated.push_back(new_carrier(op.name, input));
  return {projected, gated, gate, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::vector<Tensor> grad_projected, std::vector<Tensor> grad_gated,
                                                    OptionalTensor grad_gate, const Tensor& input, const Tensor& gate,
                                                    const Tensor& gate_weight, OptionalTensor weight,
                                                    StringHandle activation) {
  const Operator op("gated_split_backward", input);
  std::vector<int64_t> split;
  for (const Tensor& grad : grad_projected) {
    STD_TORCH_CHECK(grad.dim() == 4, "gsto_ops::", op.name, ": grad_projected must be (N, C_k, H, W), got ",
                    shape_of(grad));
    split.push_back(grad.size(1));
    op.check("grad_projected", grad, {op.batch, grad.size(1), op.height, op.width});
  }
  GatedSplitParams p = common_params(op, gate_weight, weight, split, activation);
  p.copies = static_cast<int64_t>(grad_gated.size());
  STD_TORCH_CHECK(p.projections + p.copies <= p.gates, "gsto_ops::", op.name, ": ", p.projections, " projections and ",
                  p.copies, " copies need as many gates, got ", p.gates);
  for (const Tensor& grad : grad_gated) op.check("grad_gated", grad, {p.batch, p.channels, p.height, p.width});
  op.check("gate", gate, {p.batch, p.gates, p.height, p.width});
  op.check("grad_gate", grad_gate, {p.batch, p.gates, p.height, p.width});
  const std::vector<TensorView> projected_views = views(grad_projected), gated_views = views(grad_gated);
  p.projected = projected_views.data();
  p.gated = gated_views.data();
  p.gate = view(gate);
  p.grad_gate = view(grad_gate);

  const Tensor grad_input = op.new_map(p.channels, p.height, p.width);
  const Tensor grad_gate_weight = op.new_tensor({p.gates, p.channels, 1, 1});
  const Tensor grad_gate_bias = op.new_tensor({p.gates});
  const Tensor grad_weight =
      weight.has_value() ? op.new_tensor({weight->size(0), p.channels, 1, 1}) : op.new_tensor({0});
  p.grad_input = view(grad_input);
  p.grad_gate_weight = grad_gate_weight.data_ptr();
  p.grad_gate_bias = grad_gate_bias.data_ptr();
  p.grad_weight = grad_weight.data_ptr();
  chosen_kernels().gated_split_backward(op.call(op.height * op.width), p);
  return {grad_input, grad_gate_weight, grad_gate_bias, grad_weight};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("gated_split", TORCH_BOX(&gsto::cpu::forward));
  m.impl("gated_split_backward", TORCH_BOX(&gsto::cpu::backward));
}
