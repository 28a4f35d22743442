// torch.ops.gsto_ops.class_map and its backward on the CPU. The schemas are those of gsto_ops/ops.
#include "cpu/binding.h"

namespace gsto::cpu {
namespace {

ClassMapParams common_params(const Operator& op, const Tensor& class_weight) {
  ClassMapParams p;
  p.dtype = op.dtype;
  p.batch = op.batch;
  p.channels = op.channels;
  STD_TORCH_CHECK(class_weight.dim() == 4, "gsto_ops::", op.name, ": class_weight must be (c0, C, 1, 1), got ",
                  shape_of(class_weight));
  p.out_channels = class_weight.size(0);
  p.in_height = op.height;
  p.in_width = op.width;
  op.check("class_weight", class_weight, {p.out_channels, p.channels, 1, 1});
  p.input = view(op.input);
  p.weight = view(class_weight);
  return p;
}

Tensor forward(const Tensor& input, const Tensor& class_weight, OptionalTensor class_bias) {
  const Operator op("class_map", input);
  ClassMapParams p = common_params(op, class_weight);
  op.check("class_bias", class_bias, {p.out_channels});
  p.bias = view(class_bias);

  const Tensor output = op.new_map(p.out_channels, p.in_height, p.in_width);
  p.output = view(output);
  op.run(chosen_kernels().class_map, op.call(op.height * op.width), p);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& class_weight) {
  const Operator op("class_map_backward", input);
  ClassMapParams p = common_params(op, class_weight);
  op.check("grad_output", grad_output, {p.batch, p.out_channels, p.in_height, p.in_width});
  p.grad_output = view(grad_output);

  const Tensor grad_input = op.new_map(p.channels, p.in_height, p.in_width);
  const Tensor grad_class_weight = op.new_tensor({p.out_channels, p.channels, 1, 1});
  const Tensor grad_class_bias = op.new_tensor({p.out_channels});
  p.grad_input = view(grad_input);
  p.grad_weight = grad_class_weight.data_ptr();
  p.grad_bias = grad_class_bias.data_ptr();
  op.run(chosen_kernels().class_map_backward, op.call(op.height * op.width), p);
  return {grad_input, grad_class_weight, grad_class_bias};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("class_map", TORCH_BOX(&gsto::cpu::forward));
  m.impl("class_map_backward", TORCH_BOX(&gsto::cpu::backward));
}
