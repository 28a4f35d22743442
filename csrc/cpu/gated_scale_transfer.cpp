// torch.ops.gsto_ops.gated_scale_transfer and its backward on the CPU. The schemas are those of gsto_ops/ops.
#include "cpu/binding.h"

namespace gsto::cpu {
namespace {

GatedScaleTransferParams common_params(const Operator& op, const Tensor& gate_weight, const OptionalTensor& weight,
                                       const OptionalTensor& bias, StringHandle activation) {
  GatedScaleTransferParams p;
  p.relu = is_relu(op.name, activation);
  STD_TORCH_CHECK(weight.has_value() || !bias.has_value(), "gsto_ops::", op.name, ": bias without weight");
  p.dtype = op.dtype;
  p.batch = op.batch;
  p.channels = op.channels;
  p.out_channels = weight.has_value() ? weight->size(0) : op.channels;
  p.in_height = op.height;
  p.in_width = op.width;
  op.check("gate_weight", gate_weight, {1, p.channels, 1, 1});
  op.check("weight", weight, {p.out_channels, p.channels, 1, 1});
  op.check("bias", bias, {p.out_channels});
  p.input = view(op.input);
  p.gate_weight = view(gate_weight);
  p.weight = view(weight);
  p.bias = view(bias);
  return p;
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight, OptionalTensor gate_bias,
                                   OptionalTensor weight, OptionalTensor bias, StringHandle activation,
                                   std::vector<int64_t> size, StringHandle mode, bool align_corners,
                                   std::optional<double> scale_h, std::optional<double> scale_w) {
  const Operator op("gated_scale_transfer", input);
  GatedScaleTransferParams p = common_params(op, gate_weight, weight, bias, activation);
  const Resampling r = resampling_of(op.name, input, size, mode, align_corners, scale_h, scale_w);
  const ResamplingTables tables(op, r);
  p.out_height = r.rows.out;
  p.out_width = r.cols.out;
  op.check("gate_bias", gate_bias, {1});
  p.gate_bias = view(gate_bias);

  const Tensor output = op.new_map(p.out_channels, p.out_height, p.out_width);
  const Tensor gate = op.new_tensor({p.batch, 1, p.in_height, p.in_width});
  p.output = view(output);
  p.gate = view(gate);
  op.run(chosen_kernels().gated_scale_transfer, tables.forward(), p);
  return {output, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, OptionalTensor grad_gate, const Tensor& input, const Tensor& gate,
    const Tensor& gate_weight, OptionalTensor weight, OptionalTensor bias, StringHandle activation, StringHandle mode,
    bool align_corners, std::optional<double> scale_h, std::optional<double> scale_w) {
  const Operator op("gated_scale_transfer_backward", input);
  GatedScaleTransferParams p = common_params(op, gate_weight, weight, bias, activation);
  STD_TORCH_CHECK(grad_output.dim() == 4, "gsto_ops::", op.name, ": grad_output must be (N, C', H', W'), got ",
                  shape_of(grad_output));
  const Resampling r =
      resampling_of(op.name, input, {grad_output.size(2), grad_output.size(3)}, mode, align_corners, scale_h, scale_w);
  ResamplingTables tables(op, r);
  p.out_height = r.rows.out;
  p.out_width = r.cols.out;
  op.check("grad_output", grad_output, {p.batch, p.out_channels, p.out_height, p.out_width});
  op.check("gate", gate, {p.batch, 1, p.in_height, p.in_width});
  op.check("grad_gate", grad_gate, {p.batch, 1, p.in_height, p.in_width});
  p.grad_output = view(grad_output);
  p.gate = view(gate);
  p.grad_gate = view(grad_gate);

  const bool projects = weight.has_value();
  const Tensor grad_input = op.new_map(p.channels, p.in_height, p.in_width);
  const Tensor grad_gate_weight = op.new_tensor({1, p.channels, 1, 1});
  const Tensor grad_gate_bias = op.new_tensor({1});
  const Tensor grad_weight =
      op.new_tensor(projects ? std::vector<int64_t>{p.out_channels, p.channels, 1, 1} : std::vector<int64_t>{0});
  const Tensor grad_bias = op.new_tensor({projects ? p.out_channels : 0});
  p.grad_input = view(grad_input);
  p.grad_gate_weight = grad_gate_weight.data_ptr();
  p.grad_gate_bias = grad_gate_bias.data_ptr();
  p.grad_weight = grad_weight.data_ptr();
  p.grad_bias = grad_bias.data_ptr();
  op.run(chosen_kernels().gated_scale_transfer_backward, tables.backward(), p);
  return {grad_input, grad_gate_weight, grad_gate_bias, grad_weight, grad_bias};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("gated_scale_transfer", TORCH_BOX(&gsto::cpu::forward));
  m.impl("gated_scale_transfer_backward", TORCH_BOX(&gsto::cpu::backward));
}
