// torch.ops.gsto_ops.affine_scale_transfer and its backward on CUDA: R act(scale x + shift), one pass each way. The
// schemas are defined in gsto_ops.
#include "cuda/binding.h"

namespace gsto::cuda {
namespace {

Tensor forward(const Tensor& input, const Tensor& scale, const Tensor& shift, StringHandle activation,
               std::vector<int64_t> size, StringHandle mode, bool align_corners, std::optional<double> scale_h,
               std::optional<double> scale_w) {
  const Call call("affine_scale_transfer", input);
  const bool relu = is_relu(call.op, activation);
  const Resampling r = call.resampling(size, mode, align_corners, scale_h, scale_w);
  call.check("scale", scale, {call.channels}, true);
  call.check("shift", shift, {call.channels}, true);
  const Tensor factors = as_dense(scale), offsets = as_dense(shift);
  const Tensor output = call.new_map(call.channels, size[0], size[1]);
  ResampleParams p{};
  p.scale = static_cast<const float*>(factors.data_ptr());
  p.shift = static_cast<const float*>(offsets.data_ptr());
  p.relu = relu;
  call.resample_with(p, r, call.input, output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale,
                                            const Tensor& shift, StringHandle activation, StringHandle mode,
                                            bool align_corners, std::optional<double> scale_h,
                                            std::optional<double> scale_w) {
  const Call call("affine_scale_transfer_backward", input);
  STD_TORCH_CHECK(grad_output.dim() == 4, "gsto_ops::", call.op, ": grad_output must have 4 dimensions, got ",
                  shape_of(grad_output));
  const bool relu = is_relu(call.op, activation);
  const Resampling r =
      call.resampling({grad_output.size(2), grad_output.size(3)}, mode, align_corners, scale_h, scale_w);
  call.check("grad_output", grad_output, {call.batch, call.channels, r.rows.out, r.cols.out});
  call.check("scale", scale, {call.channels}, true);
  call.check("shift", shift, {call.channels}, true);
  const Tensor factors = as_dense(scale), offsets = as_dense(shift);
  const Tensor dy = call.dense(grad_output);
  const Tensor grad_input = call.new_map(call.channels, call.height, call.width);
  const Tensor grad_scale = call.new_floats({call.channels}), grad_shift = call.new_floats({call.channels});

  const int blocks = persistent_blocks(call.batch * tiles_of(call.plan_taps(r, true).tiling), call.sms);
  const Tensor sums = call.new_floats({blocks, 2, call.channels});
  ResampleParams p{};
  p.transposed = true;
  p.scale = static_cast<const float*>(factors.data_ptr());
  p.shift = static_cast<const float*>(offsets.data_ptr());
  p.relu = relu;
  p.mask = call.input.data_ptr();
  p.sums = static_cast<float*>(sums.data_ptr());
  call.resample_with(p, r, dy, grad_input, blocks);
  call.sum_rows(sums, blocks, 2 * call.channels, call.channels, grad_scale.data_ptr(), grad_shift.data_ptr(),
                ScalarType::kFloat32);
  return {grad_input, grad_scale, grad_shift};
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) {
  m.impl("affine_scale_transfer", TORCH_BOX(&gsto::cuda::forward));
  m.impl("affine_scale_transfer_backward", TORCH_BOX(&gsto::cuda::backward));
}
