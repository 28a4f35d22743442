// torch.ops.gsto_ops.gated_scale_transfer and its backward on CUDA. The schemas are defined in gsto_ops.
//
// R's rows sum to one, so without an activation it commutes with the projection and its bias, and the projection runs
// where there are fewer pixels. Passes over maps, forward:
//   no projection         x -> output                     one kernel
//   R shrinks, no ReLU    x -> R(g x) -> W R(g x)         the map in between has the output's pixels
//   otherwise             x -> z = act(W (g x)) -> R z    the map in between has the input's pixels; none without R
// The maps in between stay in L2, a few images at a time: DRAM sees x, the gate and the output once each.
#include "cuda/binding.h"

namespace gsto::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight, OptionalTensor gate_bias,
                                   OptionalTensor weight, OptionalTensor bias, StringHandle activation,
                                   std::vector<int64_t> size, StringHandle mode, bool align_corners,
                                   std::optional<double> scale_h, std::optional<double> scale_w) {
  const Call call("gated_scale_transfer", input);
  const bool relu = is_relu(call.op, activation);
  const Resampling r = call.resampling(size, mode, align_corners, scale_h, scale_w);
  const int64_t out_channels = weight.has_value() ? weight->size(0) : call.channels;
  STD_TORCH_CHECK(weight.has_value() || !bias.has_value(), "gsto_ops::", call.op, ": bias without weight");
  call.check("gate_weight", gate_weight, {1, call.channels, 1, 1});
  call.check("gate_bias", gate_bias, {1});
  call.check("weight", weight, {out_channels, call.channels, 1, 1});
  call.check("bias", bias, {out_channels});

  const Tensor output = call.new_map(out_channels, size[0], size[1]);
  const Tensor gate = call.new_tensor({call.batch, 1, call.height, call.width});
  const Tensor rho = as_dense(gate_weight);
  if (!weight.has_value()) {
    call.gate_resample({rho, gate_bias, gate}, relu, r, output);
    return {output, gate};
  }
  const Tensor matrix = as_dense(*weight);
  if (r.identity() && (relu || !r.shrinks())) {
    call.project(call.input, matrix, bias, {rho, gate_bias, gate}, relu, output);
    return {output, gate};
  }
  const bool pool_first = r.shrinks() && !relu;
  const int64_t channels = pool_first ? call.channels : out_channels;
  const int64_t height = pool_first ? size[0] : call.height, width = pool_first ? size[1] : call.width;
  const int64_t step = images_per_chunk(call.batch, channels * height * width * call.element_size, kChunkBytes);
  const Tensor between = call.new_map(channels, height, width, std::min(step, call.batch));
  for (int64_t first = 0; first < call.batch; first += step) {
    const int64_t count = std::min(step, call.batch - first);
    const auto slice = [&](Tensor map, int64_t from) {
      return count == map.size(0) ? map : torch::stable::narrow(map, 0, from, count);
    };
    const Call part(call.op, slice(call.input, first));
    const Tensor map = slice(between, 0), result = slice(output, first);
    const Call::Gate makes_gate = {rho, gate_bias, slice(gate, first)};
    if (pool_first) {
      part.gate_resample(makes_gate, false, r, map);
      part.project(map, matrix, bias, {}, false, result);
    } else {
      part.project(part.input, matrix, bias, makes_gate, relu, map);
      part.resample(r, map, result, std::nullopt, false);
    }
  }
  return {output, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, OptionalTensor grad_gate, const Tensor& input, const Tensor& gate,
    const Tensor& gate_weight, OptionalTensor weight, OptionalTensor bias, StringHandle activation, StringHandle mode,
    bool align_corners, std::optional<double> scale_h, std::optional<double> scale_w) {
  const Call call("gated_scale_transfer_backward", input);
  STD_TORCH_CHECK(grad_output.dim() == 4, "gsto_ops::", call.op, ": grad_output must have 4 dimensions, got ",
                  shape_of(grad_output));
  const bool relu = is_relu(call.op, activation);
  const int64_t out_height = grad_output.size(2), out_width = grad_output.size(3);
  const Resampling r = call.resampling({out_height, out_width}, mode, align_corners, scale_h, scale_w);
  const int64_t out_channels = weight.has_value() ? weight->size(0) : call.channels;
  call.check("grad_output", grad_output, {call.batch, out_channels, out_height, out_width});
  call.check("grad_gate", grad_gate, {call.batch, 1, call.height, call.width});
  call.check("gate", gate, {call.batch, 1, call.height, call.width});
  call.check("gate_weight", gate_weight, {1, call.channels, 1, 1});
  call.check("weight", weight, {out_channels, call.channels, 1, 1});
  call.check("bias", bias, {out_channels});

  const Tensor dy = call.dense(grad_output);
  const Tensor rho = as_dense(gate_weight), gates = as_dense(gate);
  const OptionalTensor dgate = contiguous(grad_gate);
  const Call::GateOperands operands = {gates, rho, dgate};
  const Call::GateGradients grads = call.new_gate_gradients(gate_weight);
  Gradient dz;
  if (!weight.has_value()) {
    if (r.identity() || r.shrinks()) {
      call.gate_backward(r, dy, operands, relu, grads);
    } else {  // many taps per pixel: gathered once, into grad_input, where the gate's backward finds them
      call.resample_transposed(r, dy, grads.input, std::nullopt);
      call.gate_backward(call.identity(), grads.input, operands, relu, grads);
    }
    return {grads.input, grads.weight, grads.bias, call.new_tensor({0}), call.new_tensor({0})};
  }
  const Tensor matrix = as_dense(*weight);
  const Tensor grad_weight = call.new_tensor({out_channels, call.channels, 1, 1}),
               grad_bias = call.new_tensor({out_channels});
  if (r.shrinks() && !relu) {
    const Tensor du = call.new_map(call.channels, out_height, out_width),
                 pooled = call.new_map(call.channels, out_height, out_width);
    dz.grad = dy.data_ptr();
    call.project_transposed(dz, matrix, out_height * out_width, du);
    call.gate_backward(r, du, operands, false, grads);
    call.resample(r, call.input, pooled, gates, false);
    call.weight_gradient(dz, pooled, std::nullopt, out_height * out_width, matrix, grad_weight, grad_bias);
    return {grads.input, grads.weight, grads.bias, grad_weight, grad_bias};
  }
  Tensor before = dy;
  if (relu) {  // which pixels passed the ReLU is known from z, made again
    const Tensor z = call.new_map(out_channels, call.height, call.width);
    call.project(call.input, matrix, bias, {std::nullopt, std::nullopt, gates}, false, z);
    before = call.new_map(out_channels, call.height, call.width);
    call.resample_transposed(r, dy, before, z);
  } else if (!r.identity()) {
    before = call.new_map(out_channels, call.height, call.width);
    call.resample_transposed(r, dy, before, std::nullopt);
  }
  dz.grad = before.data_ptr();
  call.project_backward(dz, matrix, operands, grads);
  call.weight_gradient(dz, call.input, gates, call.pixels, matrix, grad_weight, grad_bias);
  return {grads.input, grads.weight, grads.bias, grad_weight, grad_bias};
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) {
  m.impl("gated_scale_transfer", TORCH_BOX(&gsto::cuda::forward));
  m.impl("gated_scale_transfer_backward", TORCH_BOX(&gsto::cuda::backward));
}
