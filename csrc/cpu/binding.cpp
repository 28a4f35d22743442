#include "cpu/binding.h"

#include <algorithm>

namespace gsto::cpu {
namespace {

gsto::ScalarType scalar_type(const char* op, const Tensor& input) {
  switch (input.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return gsto::ScalarType::kFloat32;
    case torch::headeronly::ScalarType::Double:
      return gsto::ScalarType::kFloat64;
    case torch::headeronly::ScalarType::BFloat16:
      return gsto::ScalarType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return gsto::ScalarType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "gsto_ops::", op, ": input of shape ", shape_of(input), " has dtype ", input.scalar_type(),
                      "; the CPU kernel takes float32, float64, bfloat16 and float16");
  }
}

torch::headeronly::ScalarType statistics_type(const Tensor& input) {
  const auto wide = torch::headeronly::ScalarType::Double;
  return input.scalar_type() == wide ? wide : torch::headeronly::ScalarType::Float;
}

// A schema's string. torch's conversion to std::string leaks one string per call (2.11 to 2.13), hence the handle.
std::string text_of(StringHandle handle) {
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  const std::string copy(text);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

ResampleMode resample_mode(const char* op, StringHandle handle) {
  const std::string mode = text_of(handle);
  if (mode == "avg") return ResampleMode::kAvg;
  if (mode == "nearest") return ResampleMode::kNearest;
  STD_TORCH_CHECK(mode == "bilinear", "gsto_ops::", op, ": mode must be bilinear, avg or nearest, got ", mode);
  return ResampleMode::kBilinear;
}

void parallel_for(int64_t tasks, Task task, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, task, context));
}

void serial_for(int64_t tasks, Task task, void* context) { task(0, tasks, context); }

}  // namespace

TensorView view(const Tensor& tensor) {
  TensorView v;
  v.data = tensor.data_ptr();
  if (tensor.dim() > 0) v.stride_n = tensor.stride(0);
  if (tensor.dim() == 4) {
    v.stride_c = tensor.stride(1);
    v.stride_h = tensor.stride(2);
    v.stride_w = tensor.stride(3);
  }
  return v;
}

TensorView view(const OptionalTensor& tensor) { return tensor.has_value() ? view(*tensor) : TensorView{}; }

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

Operator::Operator(const char* op, const Tensor& map) : name(op), input(map), dtype(scalar_type(op, map)) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0, "gsto_ops::", op,
                  ": input must be (N, C, H, W) with C, H and W of at least 1, got ", shape_of(input));
  batch = input.size(0);
  channels = input.size(1);
  height = input.size(2);
  width = input.size(3);
}

void Operator::check(const char* argument, const Tensor& tensor, const std::vector<int64_t>& shape,
                     bool statistics) const {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string wanted;
  for (size_t d = 0; d < shape.size(); ++d) {
    same = same && tensor.size(static_cast<int64_t>(d)) == shape[d];
    wanted += (d ? ", " : "") + std::to_string(shape[d]);
  }
  STD_TORCH_CHECK(same, "gsto_ops::", name, ": ", argument, " must have shape (", wanted, ") for input of shape ",
                  shape_of(input), ", got ", shape_of(tensor));
  const auto type = statistics ? statistics_type(input) : input.scalar_type();
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_cpu(), "gsto_ops::", name, ": ", argument, " of dtype ",
                  tensor.scalar_type(), " must be a CPU tensor of dtype ", type, " for input of dtype ",
                  input.scalar_type());
}

void Operator::check(const char* argument, const OptionalTensor& tensor, const std::vector<int64_t>& shape,
                     bool statistics) const {
  if (tensor.has_value()) check(argument, *tensor, shape, statistics);
}

std::tuple<int64_t, int64_t> Operator::output_size(const std::vector<int64_t>& size) const {
  STD_TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0, "gsto_ops::", name, ": size must be positive, got (",
                  size.at(0), ", ", size.at(1), ") for input of shape ", shape_of(input));
  return {size[0], size[1]};
}

bool Operator::relu(StringHandle handle) const {
  const std::string activation = text_of(handle);
  STD_TORCH_CHECK(activation == "relu" || activation == "none", "gsto_ops::", name,
                  ": activation must be none or relu, got ", activation);
  return activation == "relu";
}

// channels_last when the input's channels are adjacent, else contiguous (gsto_ops/ops/library.py).
Tensor Operator::new_map(int64_t map_channels, int64_t map_height, int64_t map_width) const {
  const bool channels_last = input.stride(1) == 1 && input.stride(3) > 1;
  return torch::stable::empty(
      {batch, map_channels, map_height, map_width}, input.scalar_type(), std::nullopt, input.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

Tensor Operator::new_tensor(const std::vector<int64_t>& shape) const {
  return torch::stable::empty(shape, input.scalar_type(), std::nullopt, input.device());
}

Tensor Operator::new_statistics(int64_t size) const {
  return torch::stable::empty({size}, statistics_type(input), std::nullopt, input.device());
}

Call Operator::call(int64_t out_pixels) const {
  Call call;
  // PyTorch's own grain size: waking threads takes as long as that many elements.
  const bool small = batch * channels * std::max(height * width, out_pixels) < 32768;
  call.parallel_for = small ? serial_for : parallel_for;
  return call;
}

Resampling::Resampling(const Operator& op, int64_t out_height, int64_t out_width, StringHandle mode, bool align_corners,
                       std::optional<double> scale_h, std::optional<double> scale_w)
    : Resampling(op, out_height, out_width, resample_mode(op.name, mode), align_corners, scale_h, scale_w) {}

Resampling::Resampling(const Operator& op, int64_t out_height, int64_t out_width, ResampleMode mode, bool align_corners,
                       std::optional<double> scale_h, std::optional<double> scale_w)
    : call_(op.call(out_height * out_width)),
      rows_(op.height, out_height, mode, align_corners, scale_h),
      cols_(op.width, out_width, mode, align_corners, scale_w) {}

Call Resampling::forward() const {
  Call call = call_;
  call.rows = rows_.view();
  call.cols = cols_.view();
  return call;
}

Call Resampling::backward() {
  rows_transposed_ = rows_.transposed();
  cols_transposed_ = cols_.transposed();
  Call call = forward();
  call.rows_transposed = rows_transposed_->view();
  call.cols_transposed = cols_transposed_->view();
  return call;
}

}  // namespace gsto::cpu
