// torch.ops.gsto_ops.upsample_cross_entropy and its backward on CUDA. The schemas are defined in gsto_ops.
#include "cuda/upsample_cross_entropy.h"

#include "cuda/binding.h"
#include "labels.h"

namespace gsto::cuda {
namespace {

// `target` and `weight` are contiguous.
void set_maps(LossMaps& p, const Call& call, const Tensor& target, const OptionalTensor& weight, int64_t ignore_index,
              bool align_corners) {
  p.label_type = label_type_of(call.op, target, call.input);
  const Resampling r = label_resampling(call.op, call.input, target, align_corners);
  p.format = call.format;
  p.batch = call.batch;
  p.channels = call.channels;
  p.rows = r.rows;
  p.cols = r.cols;
  p.ignore_index = ignore_index;
  p.input = call.input.data_ptr();
  // Those of a dense map, as call.input may have others where a size is 1.
  const bool last = call.format.channels_last;
  p.stride_n = call.pixels * call.channels;
  p.stride_c = last ? 1 : call.pixels;
  p.stride_w = last ? call.channels : 1;
  p.stride_h = call.width * p.stride_w;
  STD_TORCH_CHECK(p.stride_h < (int64_t{1} << 31) && target.size(1) * target.size(2) < (int64_t{1} << 31) - 64,
                  "gsto_ops::", call.op,
                  ": the CUDA kernels take less than 2^31 logits per row and labels per image, got input of shape ",
                  shape_of(call.input), " and target of shape ", shape_of(target));
  p.target = target.data_ptr();
  call.check("weight", weight, {call.channels}, true);
  p.weight = static_cast<const float*>(data_of(weight));
}

OptionalTensor contiguous_if_given(const OptionalTensor& weight) {
  return weight.has_value() ? OptionalTensor(contiguous(*weight)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                           int64_t ignore_index, StringHandle reduction_handle, bool align_corners) {
  const Call call("upsample_cross_entropy", input);
  const Reduction reduction = reduction_of(call.op, reduction_handle);
  const Tensor labels = contiguous(target);
  const OptionalTensor weights = contiguous_if_given(weight);
  UpsampleCrossEntropyParams p{};
  set_maps(p, call, labels, weights, ignore_index, align_corners);
  p.taps = plan_loss_taps(p.rows);
  const int64_t blocks = loss_blocks(p, p.taps);
  const std::vector<int64_t> pixels = {target.size(0), target.size(1), target.size(2)};
  const bool each = reduction == Reduction::kNone, mean = reduction == Reduction::kMean;
  const Tensor logsumexp = call.new_floats(pixels);
  const Tensor loss = call.new_floats(each ? pixels : std::vector<int64_t>{});
  const Tensor mass = call.new_floats(mean ? std::vector<int64_t>{} : std::vector<int64_t>{0});
  const Tensor sums = call.new_floats({each ? 0 : blocks, 2});
  p.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  p.loss = each ? static_cast<float*>(loss.data_ptr()) : nullptr;
  p.sums = each ? nullptr : static_cast<float*>(sums.data_ptr());
  call.launched(launch_upsample_cross_entropy(p, call.stream));
  if (!each) {
    TotalLossParams total{};
    total.sums = p.sums;
    total.blocks = blocks;
    total.loss = static_cast<float*>(loss.data_ptr());
    total.mass = mean ? static_cast<float*>(mass.data_ptr()) : nullptr;
    call.launched(launch_total_loss(total, call.stream));
  }
  return {loss, logsumexp, mass};
}

Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const Tensor& logsumexp, const Tensor& mass, int64_t ignore_index, StringHandle reduction_handle,
                bool align_corners) {
  const Call call("upsample_cross_entropy_backward", input);
  const Reduction reduction = reduction_of(call.op, reduction_handle);
  const Tensor labels = contiguous(target);
  const OptionalTensor weights = contiguous_if_given(weight);
  UpsampleCrossEntropyBackwardParams p{};
  set_maps(p, call, labels, weights, ignore_index, align_corners);
  const std::vector<int64_t> pixels = {target.size(0), target.size(1), target.size(2)};
  call.check("logsumexp", logsumexp, pixels, true);
  call.check("grad_loss", grad_loss, reduction == Reduction::kNone ? pixels : std::vector<int64_t>{}, true);
  const Tensor normalizer = contiguous(logsumexp), grads = contiguous(grad_loss);
  p.logsumexp = static_cast<const float*>(normalizer.data_ptr());
  p.grad_loss = static_cast<const float*>(grads.data_ptr());
  p.grad_is_map = reduction == Reduction::kNone;
  if (reduction == Reduction::kMean) {
    call.check("mass", mass, {}, true);
    p.mass = static_cast<const float*>(mass.data_ptr());
  }
  const Tensor grad_input = call.new_map(call.channels, call.height, call.width);
  p.grad_input = grad_input.data_ptr();
  plan_loss_backward(p);
  call.launched(launch_upsample_cross_entropy_backward(p, call.stream));
  return grad_input;
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&gsto::cuda::forward));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&gsto::cuda::backward));
}
