// torch.ops.gsto_ops.channel_statistics on CUDA. The schema is defined in gsto_ops.
#include "cuda/binding.h"

namespace gsto::cuda {
namespace {

std::tuple<Tensor, Tensor> channel_statistics(const Tensor& input) {
  const Call call("channel_statistics", input);
  const Tensor mean = call.new_floats({call.channels}), variance = call.new_floats({call.channels});
  const void* map = call.input.data_ptr();
  ChannelStatisticsParams p{};
  p.format = call.format;
  p.plan = call.plan_strips_of(call.batch, {map}, true);
  p.channels = call.channels;
  p.pixels = call.pixels;
  const int64_t tiles = int64_t{p.plan.fold} * p.plan.blocks;
  const Tensor statistics = call.new_floats({2, call.channels, tiles});
  p.input = map;
  p.statistics = static_cast<float*>(statistics.data_ptr());
  call.launched(launch_channel_statistics(p, call.stream));
  MergeStatisticsParams m{};
  m.statistics = p.statistics;
  m.channels = call.channels;
  m.tiles = tiles;
  m.tiles_per_image = p.plan.blocks;
  // In elements of a channel: a row has one (channels_last, where each pixel of a fold counts as an image) or a unit.
  const int64_t row = call.format.channels_last ? 1 : p.plan.width;
  m.tile_pixels = p.plan.span * row;
  m.pixels = p.plan.rows * row;
  m.mean = static_cast<float*>(mean.data_ptr());
  m.variance = static_cast<float*>(variance.data_ptr());
  call.launched(launch_merge_statistics(m, call.stream));
  return {mean, variance};
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) { m.impl("channel_statistics", TORCH_BOX(&gsto::cuda::channel_statistics)); }
