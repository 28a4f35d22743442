#include "cuda/binding.h"

#include <atomic>

namespace gsto::cuda {
namespace {

bool never() { return false; }

std::atomic<bool (*)()> tf32_allowed{&never};

int multiprocessors(int device) {
#if defined(GSTO_EMULATE_CUDA)
  (void)device;
  return 1;  // so that small tests have blocks that take several tiles
#else
  int count = 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#endif
}

Tensor fresh(Tensor tensor) {
#if defined(GSTO_EMULATE_CUDA)
  std::memset(tensor.data_ptr(), 0xff,
              static_cast<size_t>(tensor.numel()) * tensor.element_size());  // NaN in every type
#endif
  return tensor;
}

}  // namespace

bool is_channels_last(const Tensor& map) { return map.stride(1) == 1 && map.stride(3) > 1; }

int alignment_of(const std::vector<const void*>& maps) {
  uintptr_t bits = 16;
  for (const void* map : maps) bits |= reinterpret_cast<uintptr_t>(map);
  return static_cast<int>(bits & (~bits + 1));
}

void set_tf32_policy(bool (*allowed)()) { tf32_allowed = allowed; }

#if defined(GSTO_EMULATE_CUDA)
OnDevice::OnDevice(const Tensor&) {}
#else
OnDevice::OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
  stream = static_cast<cudaStream_t>(current);
}
#endif

void check_launch(const char* op, const Tensor& input, cudaError_t error) {
  if (error == cudaSuccess) return;
#if defined(GSTO_EMULATE_CUDA)
  const char* message = emulator::last_error();
#else
  const char* message = cudaGetErrorString(error);
#endif
  STD_TORCH_CHECK(false, "gsto_ops::", op, ": the launch of a kernel failed for input of shape ", shape_of(input), ": ",
                  message);
}

Call::Call(const char* name, const Tensor& given) : OnDevice(given), op(name), input(given) {
  check_map(op, given);
  STD_TORCH_CHECK(given.size(1) < (int64_t{1} << 24) && given.size(2) * given.size(3) < (int64_t{1} << 31) - 64,
                  "gsto_ops::", op,
                  ": the CUDA kernels take less than 2^24 channels and 2^31 pixels per image, got input of shape ",
                  shape_of(given));
  format.dtype = scalar_type(op, given, false, "the CUDA kernel");
  format.channels_last = is_channels_last(given);
  format.tf32 = format.dtype == ScalarType::kFloat32 && tf32_allowed.load()();
  batch = given.size(0);
  channels = static_cast<int>(given.size(1));
  height = static_cast<int>(given.size(2));
  width = static_cast<int>(given.size(3));
  pixels = int64_t{height} * width;
  element_size = static_cast<int>(given.element_size());
  input = dense(given);
  sms = multiprocessors(given.get_device_index());
}

void Call::check(const char* name, const OptionalTensor& tensor, Sizes shape, bool is_float32) const {
  if (!tensor.has_value()) return;
  check_shape(op, name, *tensor, shape, input);
  const auto dtype = is_float32 ? torch::headeronly::ScalarType::Float : input.scalar_type();
  STD_TORCH_CHECK(tensor->scalar_type() == dtype && tensor->device() == input.device(), "gsto_ops::", op, ": ", name,
                  " must have dtype ", dtype, " and be on the input's device, got ", tensor->scalar_type());
}

Resampling Call::resampling(Sizes size, StringHandle mode, bool align_corners, std::optional<double> scale_h,
                            std::optional<double> scale_w) const {
  const Resampling r = resampling_of(op, input, size, mode, align_corners, scale_h, scale_w);
  STD_TORCH_CHECK(size[0] * size[1] < (int64_t{1} << 31) - 64, "gsto_ops::", op,
                  ": the CUDA kernels make less than 2^31 pixels per image, got size (", size[0], ", ", size[1],
                  ") for input of shape ", shape_of(input));
  return r;
}

Tensor Call::dense(const Tensor& map) const { return as_dense(map, format.channels_last); }

StripPlan Call::plan_strips_of(int64_t images, const std::vector<const void*>& maps, bool has_sums) const {
  // With sums one wave of blocks; else blocks that are short enough for the last wave not to matter.
  return plan_strips(images, channels, pixels, format.channels_last, element_size, alignment_of(maps),
                     int64_t{has_sums ? kSumResident : 4 * kStripResident} * sms);
}

Tensor Call::new_map(int64_t map_channels, int64_t map_height, int64_t map_width, int64_t images) const {
  const std::vector<int64_t> shape = {images < 0 ? batch : images, map_channels, map_height, map_width};
  return fresh(allocate(op, input, shape, input.scalar_type(), format.channels_last));
}

Tensor Call::new_tensor(Sizes shape) const { return fresh(allocate(op, input, shape, input.scalar_type())); }

Tensor Call::new_floats(Sizes shape) const {
  return fresh(allocate(op, input, shape, torch::headeronly::ScalarType::Float));
}

void Call::project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Gate& gate, bool relu,
                   const Tensor& z, float* statistics) const {
  ProjectParams p{};
  const int64_t per_image = x.size(2) * x.size(3);
  p.format = format;
  const PixelRows rows = pixel_rows(batch, per_image, format.channels_last);
  p.batch = rows.images;
  p.pixels = rows.pixels;
  p.channels = static_cast<int>(x.size(1));
  p.input = x.data_ptr();
  p.gate_weight = data_of(gate.weight);
  p.gate_bias = data_of(gate.bias);
  p.gate = gate.values.has_value() ? gate.values->data_ptr() : nullptr;
  p.row_tiles_per_block = 1;
  if (z.defined()) {
    p.out_channels = static_cast<int>(z.size(1));
    p.weight = weight.data_ptr();
    p.bias = data_of(bias);
    p.relu = relu;
    p.output = z.data_ptr();
    p.statistics = statistics;
    p.row_tiles_per_block = row_tiles_per_block(ceil_div(p.pixels, kTilePixels) * p.batch, p.out_channels, sms);
  }
  launched(launch_project(p, stream));
}

TapPlan Call::plan_taps(const Resampling& r, bool transposed) const {
  const TapPlan plan = plan_resample(r.rows, r.cols, transposed, format.channels_last, element_size);
  STD_TORCH_CHECK(plan.fits, "gsto_ops::", op, ": resampling input of shape ", shape_of(input), " between (", r.rows.in,
                  ", ", r.cols.in, ") and (", r.rows.out, ", ", r.cols.out,
                  ") needs more than 96 KiB of weights per tile on CUDA");
  return plan;
}

void Call::gate_resample(const Gate& gate, bool relu, const Resampling& r, const Tensor& dest) const {
  // Windows of 64 pixels and more are summed by many blocks each; smaller ones by one.
  if (r.rows.mode == ResampleMode::kAvg && !relu && pixels >= int64_t{64} * r.rows.out * r.cols.out && batch <= 65535) {
    PyramidParams p{};
    p.pyramid.levels = 1;
    p.pyramid.bins_h[0] = r.rows.out;
    p.pyramid.bins_w[0] = r.cols.out;
    if (plan_pyramid(p.pyramid, batch, channels, height, width, element_size, sms)) {
      const Pyramid& pyramid = p.pyramid;
      const Tensor sums = new_floats({batch * pyramid.row_cuts * pyramid.bands * pyramid.col_cuts, channels});
      p.format = format;
      p.batch = batch;
      p.channels = channels;
      p.height = height;
      p.width = width;
      p.input = input.data_ptr();
      p.gate_weight = data_of(gate.weight);
      p.gate_bias = data_of(gate.bias);
      p.gate = gate.values->data_ptr();
      p.sums = static_cast<float*>(sums.data_ptr());
      p.pooled = dest.data_ptr();
      p.pooled_channels_last = format.channels_last;
      launched(launch_pyramid(p, stream));
      return;
    }
  }
  const TapPlan plan = plan_gate_resample(r.rows, r.cols, channels, format.channels_last, element_size);
  if (!plan.fits) {  // the inputs of one result have too many gates for shared memory: gates first, then a second
                     // reading
    project(input, Tensor(), std::nullopt, gate, false, Tensor());
    resample(r, input, dest, gate.values, relu);
    return;
  }
  GateResampleParams p{};
  p.format = format;
  p.batch = batch;
  p.channels = channels;
  p.rows = r.rows;
  p.cols = r.cols;
  p.input = input.data_ptr();
  p.gate_weight = data_of(gate.weight);
  p.gate_bias = data_of(gate.bias);
  p.gate = gate.values->data_ptr();
  p.relu = relu;
  p.dest = dest.data_ptr();
  p.tiling = plan.tiling;
  p.row_taps = plan.row_taps;
  p.col_taps = plan.col_taps;
  p.region_pixels = plan.region_pixels;
  launched(launch_gate_resample(p, stream));
}

void Call::resample_with(ResampleParams p, const Resampling& r, const Tensor& source, const Tensor& dest,
                         int blocks) const {
  const TapPlan plan = plan_taps(r, p.transposed);
  p.format = format;
  p.batch = batch;
  p.channels = static_cast<int>(dest.size(1));
  p.rows = r.rows;
  p.cols = r.cols;
  p.source = source.data_ptr();
  p.dest = dest.data_ptr();
  p.tiling = plan.tiling;
  p.row_taps = plan.row_taps;
  p.col_taps = plan.col_taps;
  const int64_t tiles = batch * tiles_of(plan.tiling);
  p.blocks = blocks > 0 ? blocks : static_cast<int>(tiles);
  // Few tiles: the channels are spread over blocks, 64 bytes of them at least.
  p.channel_groups = static_cast<int>(
      std::min(ceil_div(p.channels, kTilePixels), ceil_div(int64_t{2} * kResident * sms, std::max<int64_t>(1, tiles))));
  launched(launch_resample(p, stream));
}

void Call::resample(const Resampling& r, const Tensor& source, const Tensor& dest, const OptionalTensor& gate,
                    bool relu) const {
  ResampleParams p{};
  p.gate = data_of(gate);
  p.relu = relu;
  resample_with(p, r, source, dest);
}

void Call::resample_transposed(const Resampling& r, const Tensor& source, const Tensor& dest,
                               const OptionalTensor& mask) const {
  ResampleParams p{};
  p.transposed = true;
  p.relu = mask.has_value();
  p.mask = data_of(mask);
  resample_with(p, r, source, dest);
}

Call::GateGradients Call::new_gate_gradients(const Tensor& gate_weight) const {
  return {new_map(channels, height, width), new_tensor({1, gate_weight.size(1), 1, 1}), new_tensor({1})};
}

void Call::gate_backward(const Resampling& r, const Tensor& source, const GateOperands& operands, bool relu,
                         const GateGradients& grads) const {
  GateBackwardParams p{};
  p.format = format;
  p.batch = batch;
  p.channels = channels;
  p.rows = r.rows;
  p.cols = r.cols;
  p.identity = r.identity();
  if (p.identity) {  // one long row per image
    p.rows = make_axis(1, 1, ResampleMode::kBilinear, false, 0);
    p.cols = make_axis(pixels, pixels, ResampleMode::kBilinear, false, 0);
    p.tiling = {1, static_cast<int>(pixels), 1, kTilePixels};
    p.row_taps = p.col_taps = 1;
  } else {
    const TapPlan plan = plan_taps(r, true);
    p.tiling = plan.tiling;
    p.row_taps = plan.row_taps;
    p.col_taps = plan.col_taps;
  }
  p.source = source.data_ptr();
  p.input = input.data_ptr();
  p.gate = operands.gate.data_ptr();
  p.gate_weight = operands.gate_weight.data_ptr();
  p.grad_gate = data_of(operands.grad_gate);
  p.relu = relu;
  p.grad_input = grads.input.data_ptr();
  p.blocks = persistent_blocks(batch * tiles_of(p.tiling), sms);
  const Tensor sums = new_floats({p.blocks, channels + 1});
  p.sums = static_cast<float*>(sums.data_ptr());
  launched(launch_gate_backward(p, stream));
  sum_rows(sums, p.blocks, channels + 1, channels, grads.weight.data_ptr(), grads.bias.data_ptr(), format.dtype);
}

// du = W^T dz for `per_image` pixels; the gate's part is added by the fused form below.
ProjectBackwardParams Call::product_backward(const Gradient& dz, const Tensor& weight, int64_t per_image,
                                             const Tensor& du) const {
  ProjectBackwardParams p{};
  p.format = format;
  const PixelRows rows = pixel_rows(batch, per_image, format.channels_last);
  p.batch = rows.images;
  p.pixels = rows.pixels;
  p.channels = channels;
  p.out_channels = static_cast<int>(weight.size(0));
  p.gradient = dz;
  p.weight = weight.data_ptr();
  p.grad_input = du.data_ptr();
  const int64_t tiles = ceil_div(p.pixels, kTilePixels) * p.batch;
  p.blocks = static_cast<int>(tiles);
  p.row_tiles_per_block = row_tiles_per_block(tiles, channels, sms);
  return p;
}

void Call::project_transposed(const Gradient& dz, const Tensor& weight, int64_t per_image, const Tensor& du) const {
  launched(launch_project_backward(product_backward(dz, weight, per_image, du), stream));
}

void Call::project_backward(const Gradient& dz, const Tensor& weight, const GateOperands& operands,
                            const GateGradients& grads) const {
  if (!fuses_project_backward(channels)) {
    project_transposed(dz, weight, pixels, grads.input);
    gate_backward(identity(), grads.input, operands, false, grads);
    return;
  }
  ProjectBackwardParams p = product_backward(dz, weight, pixels, grads.input);
  p.input = input.data_ptr();
  p.gate = operands.gate.data_ptr();
  p.gate_weight = operands.gate_weight.data_ptr();
  p.grad_gate = data_of(operands.grad_gate);
  p.blocks = persistent_blocks(p.blocks, sms);
  p.row_tiles_per_block = static_cast<int>(ceil_div(channels, kTileRows));
  const Tensor sums = new_floats({p.blocks, channels + 1});
  p.sums = static_cast<float*>(sums.data_ptr());
  launched(launch_project_backward(p, stream));
  sum_rows(sums, p.blocks, channels + 1, channels, grads.weight.data_ptr(), grads.bias.data_ptr(), format.dtype);
}

Resampling Call::identity() const {
  return {make_axis(height, height, ResampleMode::kBilinear, false, 0),
          make_axis(width, width, ResampleMode::kBilinear, false, 0)};
}

void Call::weight_gradient(const Gradient& dz, const Tensor& x, const OptionalTensor& gate, int64_t per_image,
                           const Tensor& weight, const Tensor& grad_weight, const OptionalTensor& grad_bias) const {
  WeightGradientParams p{};
  p.format = format;
  p.gate = data_of(gate);
  p.gate_stride = gate.has_value() && batch > 1 ? gate->stride(0) : per_image;
  // One of several gates per pixel is not dense over the images, which then stay apart.
  const PixelRows rows = pixel_rows(batch, per_image, format.channels_last && p.gate_stride == per_image);
  p.batch = rows.images;
  p.pixels = rows.pixels;
  p.channels = channels;
  p.out_channels = static_cast<int>(weight.size(0));
  p.gradient = dz;
  p.input = x.data_ptr();
  const SplitPlan plan = plan_weight_gradient(p.batch, p.pixels, p.channels, p.out_channels, sms);
  p.splits = plan.splits;
  p.split_pixels = plan.split_pixels;
  const int64_t size = int64_t{p.out_channels} * p.channels, ranges = p.batch * p.splits;
  const Tensor sums = new_floats({ranges, size + p.out_channels});
  p.sums = static_cast<float*>(sums.data_ptr());
  launched(launch_weight_gradient(p, stream));
  sum_rows(sums, ranges, size + p.out_channels, size, grad_weight.data_ptr(),
           grad_bias.has_value() ? grad_bias->data_ptr() : nullptr, format.dtype);
}

void Call::sum_rows(const Tensor& sums, int64_t rows, int64_t count, int64_t tail_begin, void* to, void* tail,
                    ScalarType dtype) const {
  SumRowsParams p{static_cast<const float*>(sums.data_ptr()), rows, count, count, dtype, to, tail, tail_begin};
  launched(launch_sum_rows(p, stream));
}

}  // namespace gsto::cuda

#if defined(GSTO_EMULATE_CUDA)
namespace {

void set_allow_tf32(bool allow) {
  gsto::cuda::set_tf32_policy(allow ? +[] { return true; } : +[] { return false; });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsto_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_allow_tf32", TORCH_BOX(&set_allow_tf32));
}
#endif
