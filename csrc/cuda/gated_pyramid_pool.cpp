// torch.ops.gsto_ops.gated_pyramid_pool and its backward on CUDA: K gates and K pooled maps. The schemas are defined in
// gsto_ops.
#include "cuda/binding.h"

namespace gsto::cuda {
namespace {

Pyramid pyramid_of(const Call& call, const std::vector<int64_t>& bins) {
  STD_TORCH_CHECK(!bins.empty() && bins.size() <= kMaxLevels, "gsto_ops::", call.op, ": bins must have 1 to ",
                  kMaxLevels, " entries on CUDA, got ", bins.size());
  STD_TORCH_CHECK(call.batch <= 65535, "gsto_ops::", call.op,
                  ": batches of at most 65535 images on CUDA, got input of shape ", shape_of(call.input));
  Pyramid pyramid;
  pyramid.levels = static_cast<int>(bins.size());
  for (size_t k = 0; k < bins.size(); ++k) {
    STD_TORCH_CHECK(bins[k] > 0 && bins[k] <= 4096, "gsto_ops::", call.op, ": bins must lie between 1 and 4096, got ",
                    bins[k]);
    pyramid.bins_h[k] = pyramid.bins_w[k] = static_cast<int>(bins[k]);
  }
  STD_TORCH_CHECK(
      plan_pyramid(pyramid, call.batch, call.channels, call.height, call.width, call.element_size, call.sms),
      "gsto_ops::", call.op, ": the bins cut input of shape ", shape_of(call.input), " into more than ", kMaxCuts,
      " cells along an axis, the limit on CUDA");
  return pyramid;
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight, OptionalTensor gate_bias,
                                   std::vector<int64_t> bins) {
  const Call call("gated_pyramid_pool", input);
  const int64_t levels = static_cast<int64_t>(bins.size());
  call.check("gate_weight", gate_weight, {levels, call.channels, 1, 1});
  call.check("gate_bias", gate_bias, {levels});
  PyramidParams p{};
  p.pyramid = pyramid_of(call, bins);
  const Pyramid& pyramid = p.pyramid;
  const Tensor pooled = call.new_tensor({call.batch, call.channels, pyramid.total_bins});
  const Tensor gate = call.new_tensor({call.batch, levels, call.height, call.width});
  const Tensor rho = as_dense(gate_weight);
  const OptionalTensor bias = contiguous(gate_bias);
  const Tensor sums =
      call.new_floats({call.batch * pyramid.row_cuts * pyramid.bands * pyramid.col_cuts, levels * call.channels});
  p.format = call.format;
  p.batch = call.batch;
  p.channels = call.channels;
  p.height = call.height;
  p.width = call.width;
  p.input = call.input.data_ptr();
  p.gate_weight = rho.data_ptr();
  p.gate_bias = data_of(bias);
  p.gate = gate.data_ptr();
  p.sums = static_cast<float*>(sums.data_ptr());
  p.pooled = pooled.data_ptr();
  call.launched(launch_pyramid(p, call.stream));
  return {pooled, gate};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_pooled, OptionalTensor grad_gate, const Tensor& input,
                                            const Tensor& gate, const Tensor& gate_weight, std::vector<int64_t> bins) {
  const Call call("gated_pyramid_pool_backward", input);
  const int64_t levels = static_cast<int64_t>(bins.size());
  PyramidBackwardParams p{};
  p.pyramid = pyramid_of(call, bins);
  call.check("grad_pooled", grad_pooled, {call.batch, call.channels, p.pyramid.total_bins});
  call.check("grad_gate", grad_gate, {call.batch, levels, call.height, call.width});
  call.check("gate", gate, {call.batch, levels, call.height, call.width});
  call.check("gate_weight", gate_weight, {levels, call.channels, 1, 1});
  const Tensor dy = as_dense(grad_pooled), rho = as_dense(gate_weight);
  const Tensor gates = as_dense(gate);
  const OptionalTensor dgate = contiguous(grad_gate);
  const Tensor grad_input = call.new_map(call.channels, call.height, call.width);
  const Tensor grad_gate_weight = call.new_tensor({levels, call.channels, 1, 1}),
               grad_gate_bias = call.new_tensor({levels});
  const Tensor scaled = call.new_floats({call.batch, p.pyramid.total_bins, call.channels});
  p.format = call.format;
  p.batch = call.batch;
  p.channels = call.channels;
  p.height = call.height;
  p.width = call.width;
  p.grad_pooled = dy.data_ptr();
  p.input = call.input.data_ptr();
  p.gate = gates.data_ptr();
  p.gate_weight = rho.data_ptr();
  p.grad_gate = data_of(dgate);
  p.scaled = static_cast<float*>(scaled.data_ptr());
  p.grad_input = grad_input.data_ptr();
  p.blocks = persistent_blocks(call.batch * ceil_div(call.pixels, kTilePixels), call.sms);
  const Tensor sums = call.new_floats({p.blocks, levels * (call.channels + 1)});
  p.sums = static_cast<float*>(sums.data_ptr());
  call.launched(launch_pyramid_backward(p, call.stream));
  const int64_t weights = levels * call.channels;
  call.sum_rows(sums, p.blocks, weights + levels, weights, grad_gate_weight.data_ptr(), grad_gate_bias.data_ptr(),
                call.format.dtype);
  return {grad_input, grad_gate_weight, grad_gate_bias};
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) {
  m.impl("gated_pyramid_pool", TORCH_BOX(&gsto::cuda::forward));
  m.impl("gated_pyramid_pool_backward", TORCH_BOX(&gsto::cuda::backward));
}
