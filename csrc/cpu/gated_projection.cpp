// torch.ops.gsto_ops.gated_projection and its backward on the CPU. The schemas are those of gsto_ops/ops.
#include "cpu/binding.h"

namespace gsto::cpu {

GatedProjectionParams gated_projection_params(const Operator& op, const Tensor& gate_weight, const Tensor& weight) {
  GatedProjectionParams p;
  p.dtype = op.dtype;
  p.batch = op.batch;
  p.channels = op.channels;
  STD_TORCH_CHECK(weight.dim() == 4, "gsto_ops::", op.name, ": weight must be (C', C, 1, 1), got ", shape_of(weight));
  p.out_channels = weight.size(0);
  p.in_height = op.height;
  p.in_width = op.width;
  op.check("gate_weight", gate_weight, {1, p.channels, 1, 1});
  op.check("weight", weight, {p.out_channels, p.channels, 1, 1});
  p.input = view(op.input);
  p.gate_weight = view(gate_weight);
  p.weight = view(weight);
  return p;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight,
                                                   OptionalTensor gate_bias, const Tensor& weight) {
  const Operator op("gated_projection", input);
  GatedProjectionParams p = gated_projection_params(op, gate_weight, weight);
  op.check("gate_bias", gate_bias, {1});
  p.gate_bias = view(gate_bias);

  const Tensor output = op.new_map(p.out_channels, p.in_height, p.in_width);
  const Tensor gate = op.new_tensor({p.batch, 1, p.in_height, p.in_width});
  const Tensor mean = op.new_statistics({p.out_channels}), var = op.new_statistics({p.out_channels});
  p.output = view(output);
  p.gate = view(gate);
  p.mean = view(mean);
  p.var = view(var);
  op.run(chosen_kernels().gated_projection, op.call(op.height * op.width), p);
  return {output, gate, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, OptionalTensor grad_gate,
                                                    OptionalTensor grad_mean, OptionalTensor grad_var,
                                                    const Tensor& input, const Tensor& gate, const Tensor& gate_weight,
                                                    const Tensor& weight, const Tensor& output, const Tensor& mean) {
  const Operator op("gated_projection_backward", input);
  GatedProjectionParams p = gated_projection_params(op, gate_weight, weight);
  op.check("grad_output", grad_output, {p.batch, p.out_channels, p.in_height, p.in_width});
  op.check("output", output, {p.batch, p.out_channels, p.in_height, p.in_width});
  op.check("gate", gate, {p.batch, 1, p.in_height, p.in_width});
  op.check("grad_gate", grad_gate, {p.batch, 1, p.in_height, p.in_width});
  op.check("mean", mean, {p.out_channels}, true);
  op.check("grad_mean", grad_mean, {p.out_channels}, true);
  op.check("grad_var", grad_var, {p.out_channels}, true);
  p.grad_output = view(grad_output);
  p.output = view(output);
  p.gate = view(gate);
  p.grad_gate = view(grad_gate);
  p.mean = view(mean);
  p.grad_mean = view(grad_mean);
  p.grad_var = view(grad_var);

  const Tensor grad_input = op.new_map(p.channels, p.in_height, p.in_width);
  const Tensor grad_gate_weight = op.new_tensor({1, p.channels, 1, 1});
  const Tensor grad_gate_bias = op.new_tensor({1});
  const Tensor grad_weight = op.new_tensor({p.out_channels, p.channels, 1, 1});
  p.grad_input = view(grad_input);
  p.grad_gate_weight = grad_gate_weight.data_ptr();
  p.grad_gate_bias = grad_gate_bias.data_ptr();
  p.grad_weight = grad_weight.data_ptr();
  op.run(chosen_kernels().gated_projection_backward, op.call(op.height * op.width), p);
  return {grad_input, grad_gate_weight, grad_gate_bias, grad_weight};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("gated_projection", TORCH_BOX(&gsto::cpu::forward));
  m.impl("gated_projection_backward", TORCH_BOX(&gsto::cpu::backward));
}
