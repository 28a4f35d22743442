// torch.ops.gsto_ops.gated_projection and its backward on CUDA: z = W (g x) with the batch's mean and variance per
// channel. The schemas are defined in gsto_ops.
#include "cuda/binding.h"

namespace gsto::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight,
                                                   OptionalTensor gate_bias, const Tensor& weight) {
  const Call call("gated_projection", input);
  const int64_t out_channels = weight.size(0);
  call.check("gate_weight", gate_weight, {1, call.channels, 1, 1});
  call.check("gate_bias", gate_bias, {1});
  call.check("weight", weight, {out_channels, call.channels, 1, 1});
  const Tensor output = call.new_map(out_channels, call.height, call.width);
  const Tensor gate = call.new_tensor({call.batch, 1, call.height, call.width});
  const Tensor mean = call.new_floats({out_channels}), variance = call.new_floats({out_channels});
  const Tensor rho = as_dense(gate_weight), matrix = as_dense(weight);

  const PixelRows rows = pixel_rows(call.batch, call.pixels, call.format.channels_last);
  const int64_t tiles_per_row = ceil_div(rows.pixels, kTilePixels), tiles = tiles_per_row * rows.images;
  const Tensor statistics = call.new_floats({2, out_channels, tiles});
  call.project(call.input, matrix, std::nullopt, {rho, gate_bias, gate}, false, output,
               static_cast<float*>(statistics.data_ptr()));
  MergeStatisticsParams p{};
  p.statistics = static_cast<const float*>(statistics.data_ptr());
  p.channels = static_cast<int>(out_channels);
  p.tiles = tiles;
  p.tiles_per_image = tiles_per_row;
  p.tile_pixels = kTilePixels;
  p.pixels = rows.pixels;
  p.mean = static_cast<float*>(mean.data_ptr());
  p.variance = static_cast<float*>(variance.data_ptr());
  call.launched(launch_merge_statistics(p, call.stream));
  return {output, gate, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, OptionalTensor grad_gate,
                                                    OptionalTensor grad_mean, OptionalTensor grad_var,
                                                    const Tensor& input, const Tensor& gate, const Tensor& gate_weight,
                                                    const Tensor& weight, const Tensor& output, const Tensor& mean) {
  const Call call("gated_projection_backward", input);
  const int64_t out_channels = weight.size(0);
  call.check("grad_output", grad_output, {call.batch, out_channels, call.height, call.width});
  call.check("grad_gate", grad_gate, {call.batch, 1, call.height, call.width});
  call.check("grad_mean", grad_mean, {out_channels}, true);
  call.check("grad_var", grad_var, {out_channels}, true);
  call.check("gate", gate, {call.batch, 1, call.height, call.width});
  call.check("gate_weight", gate_weight, {1, call.channels, 1, 1});
  call.check("weight", weight, {out_channels, call.channels, 1, 1});
  call.check("output", output, {call.batch, out_channels, call.height, call.width});
  call.check("mean", mean, {out_channels}, true);

  const Tensor dy = call.dense(grad_output), z = call.dense(output);
  const Tensor rho = as_dense(gate_weight), matrix = as_dense(weight);
  const Tensor gates = as_dense(gate), means = as_dense(mean);
  const OptionalTensor dgate = contiguous(grad_gate);
  const Tensor coefficients = call.new_floats({2, out_channels});
  Gradient dz;
  dz.grad = dy.data_ptr();
  if (grad_mean.has_value() || grad_var.has_value()) {
    const OptionalTensor dmean = contiguous(grad_mean);
    const OptionalTensor dvar = contiguous(grad_var);
    StatisticsGradientParams p{};
    p.mean = static_cast<const float*>(means.data_ptr());
    p.grad_mean = static_cast<const float*>(data_of(dmean));
    p.grad_variance = static_cast<const float*>(data_of(dvar));
    p.channels = static_cast<int>(out_channels);
    p.count = static_cast<double>(call.batch * call.pixels);
    p.c0 = static_cast<float*>(coefficients.data_ptr());
    p.c1 = p.c0 + out_channels;
    call.launched(launch_statistics_gradient(p, call.stream));
    dz.z = z.data_ptr();
    dz.c0 = p.c0;
    dz.c1 = p.c1;
  }
  const Call::GateGradients grads = call.new_gate_gradients(gate_weight);
  const Tensor grad_weight = call.new_tensor({out_channels, call.channels, 1, 1});
  call.project_backward(dz, matrix, {gates, rho, dgate}, grads);
  call.weight_gradient(dz, call.input, gates, call.pixels, matrix, grad_weight, std::nullopt);
  return {grads.input, grads.weight, grads.bias, grad_weight};
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) {
  m.impl("gated_projection", TORCH_BOX(&gsto::cuda::forward));
  m.impl("gated_projection_backward", TORCH_BOX(&gsto::cuda::backward));
}
