// torch.ops.gsto_ops.channel_statistics on the CPU. The schema is that of gsto_ops/ops.
#include "cpu/binding.h"

namespace gsto::cpu {
namespace {

std::tuple<Tensor, Tensor> statistics(const Tensor& input) {
  const Operator op("channel_statistics", input);
  ChannelStatisticsParams p;
  p.planar = is_planar(input);
  const Tensor map = with_lines(input, p.planar);
  p.dtype = op.dtype;
  p.batch = op.batch;
  p.channels = op.channels;
  p.height = op.height;
  p.width = op.width;
  p.input = view(map);
  if (p.planar && (p.height == 1 || p.input.stride_h == p.width)) {  // a plane is one line
    p.width *= p.height;
    p.height = 1;
  }
  const Tensor mean = op.new_statistics({op.channels}), var = op.new_statistics({op.channels});
  p.mean = mean.data_ptr();
  p.var = var.data_ptr();
  chosen_kernels().channel_statistics(op.call(op.height * op.width), p);
  return {mean, var};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) { m.impl("channel_statistics", TORCH_BOX(&gsto::cpu::statistics)); }
