// torch.ops.gsto_ops.affine_scale_transfer and its backward on the CPU. The schemas are those of gsto_ops/ops.
#include "cpu/binding.h"

namespace gsto::cpu {

AffineScaleTransferParams affine_scale_transfer_params(const Operator& op, bool relu) {
  AffineScaleTransferParams p;
  p.relu = relu;
  p.dtype = op.dtype;
  p.batch = op.batch;
  p.channels = op.channels;
  p.in_height = op.height;
  p.in_width = op.width;
  p.input = view(op.input);
  return p;
}

namespace {

AffineScaleTransferParams common_params(const Operator& op, const Tensor& scale, const Tensor& shift,
                                        StringHandle activation) {
  AffineScaleTransferParams p = affine_scale_transfer_params(op, is_relu(op.name, activation));
  op.check("scale", scale, {p.channels}, true);
  op.check("shift", shift, {p.channels}, true);
  p.scale = view(scale);
  p.shift = view(shift);
  return p;
}

Tensor forward(const Tensor& input, const Tensor& scale, const Tensor& shift, StringHandle activation,
               std::vector<int64_t> size, StringHandle mode, bool align_corners, std::optional<double> scale_h,
               std::optional<double> scale_w) {
  const Operator op("affine_scale_transfer", input);
  AffineScaleTransferParams p = common_params(op, scale, shift, activation);
  const Resampling r = resampling_of(op.name, input, size, mode, align_corners, scale_h, scale_w);
  const ResamplingTables tables(op, r);
  const Tensor output = op.new_map(p.channels, r.rows.out, r.cols.out);
  p.output = view(output);
  op.run(chosen_kernels().affine_scale_transfer, tables.forward(), p);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                            const Tensor& shift, StringHandle activation, StringHandle mode,
                                            bool align_corners, std::optional<double> scale_h,
                                            std::optional<double> scale_w) {
  const Operator op("affine_scale_transfer_backward", input);
  AffineScaleTransferParams p = common_params(op, scale, shift, activation);
  STD_TORCH_CHECK(grad_output.dim() == 4, "gsto_ops::", op.name, ": grad_output must be (N, C, H', W'), got ",
                  shape_of(grad_output));
  const Resampling r =
      resampling_of(op.name, input, {grad_output.size(2), grad_output.size(3)}, mode, align_corners, scale_h, scale_w);
  ResamplingTables tables(op, r);
  op.check("grad_output", grad_output, {p.batch, p.channels, r.rows.out, r.cols.out});
  p.grad_output = view(grad_output);

  const Tensor grad_input = op.new_map(p.channels, p.in_height, p.in_width);
  const Tensor grad_scale = op.new_statistics({p.channels}), grad_shift = op.new_statistics({p.channels});
  p.grad_input = view(grad_input);
  p.grad_scale = grad_scale.data_ptr();
  p.grad_shift = grad_shift.data_ptr();
  op.run(chosen_kernels().affine_scale_transfer_backward, tables.backward(), p);
  return {grad_input, grad_scale, grad_shift};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("affine_scale_transfer", TORCH_BOX(&gsto::cpu::forward));
  m.impl("affine_scale_transfer_backward", TORCH_BOX(&gsto::cpu::backward));
}
