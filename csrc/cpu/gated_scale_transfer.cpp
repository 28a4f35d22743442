// torch.ops.gsto_ops.gated_scale_transfer and its backward on the CPU. The schemas are defined in
// gsto_ops/registration.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/resample.h"

namespace {

using gsto::GatedScaleTransferParams;
using gsto::ResampleMode;
using gsto::TensorView;
using gsto::cpu::Axis;
using gsto::cpu::Call;
using torch::stable::Tensor;

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

TensorView view(const std::optional<Tensor>& tensor) { return tensor.has_value() ? view(*tensor) : TensorView{}; }

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

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

// The gsto_ops Python functions check their arguments and explain themselves. These checks keep a direct call of
// torch.ops.gsto_ops from reading outside of a tensor.
void check(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
           const Tensor& input) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string wanted;
  for (size_t d = 0; d < shape.size(); ++d) {
    same = same && tensor.size(static_cast<int64_t>(d)) == shape[d];
    wanted += (d ? ", " : "") + std::to_string(shape[d]);
  }
  STD_TORCH_CHECK(same, "gsto_ops::", op, ": ", name, " must have shape (", wanted, ") for input of shape ",
                  shape_of(input), ", got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type() && tensor.is_cpu(), "gsto_ops::", op, ": ", name,
                  " of dtype ", tensor.scalar_type(), " must be a CPU tensor of the input's dtype ",
                  input.scalar_type());
}

void check(const char* op, const char* name, const std::optional<Tensor>& tensor, const std::vector<int64_t>& shape,
           const Tensor& input) {
  if (tensor.has_value()) check(op, name, *tensor, shape, input);
}

// The parameters that forward and backward share.
GatedScaleTransferParams common_params(const char* op, const Tensor& input, const Tensor& gate_weight,
                                       const std::optional<Tensor>& weight, int64_t out_height, int64_t out_width) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0, "gsto_ops::", op,
                  ": input must be (N, C, H, W) with C, H and W of at least 1, got ", shape_of(input));
  STD_TORCH_CHECK(out_height > 0 && out_width > 0, "gsto_ops::", op, ": size must be positive, got (", out_height, ", ",
                  out_width, ") for input of shape ", shape_of(input));
  GatedScaleTransferParams p;
  p.dtype = scalar_type(op, input);
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.out_channels = weight.has_value() ? weight->size(0) : p.channels;
  p.in_height = input.size(2);
  p.in_width = input.size(3);
  p.out_height = out_height;
  p.out_width = out_width;
  check(op, "gate_weight", gate_weight, {1, p.channels, 1, 1}, input);
  check(op, "weight", weight, {p.out_channels, p.channels, 1, 1}, input);
  p.input = view(input);
  p.gate_weight = view(gate_weight);
  p.weight = view(weight);
  return p;
}

// The schema's mode. torch's conversion to std::string leaks one string per call (2.11 to 2.13), hence the handle.
ResampleMode resample_mode(const char* op, StringHandle handle) {
  const char* text = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  const std::string mode(text);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  if (mode == "avg") return ResampleMode::kAvg;
  if (mode == "nearest") return ResampleMode::kNearest;
  STD_TORCH_CHECK(mode == "bilinear", "gsto_ops::", op, ": mode must be bilinear, avg or nearest, got ", mode);
  return ResampleMode::kBilinear;
}

// The layout of results: channels_last when the input's channels are adjacent, else contiguous
// (gsto_ops/registration.py).
torch::headeronly::MemoryFormat layout_of(const Tensor& input) {
  const bool channels_last = input.stride(1) == 1 && input.stride(3) > 1;
  return channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
}

Tensor new_map(const Tensor& input, const std::vector<int64_t>& shape, torch::headeronly::MemoryFormat format) {
  return torch::stable::empty(shape, input.scalar_type(), std::nullopt, input.device(), std::nullopt, format);
}

void parallel_for(int64_t tasks, gsto::cpu::Task task, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, task, context));
}

void run(void (*kernel)(const Call&), const GatedScaleTransferParams& params, const Axis& rows, const Axis& cols,
         const Axis& rows_transposed, const Axis& cols_transposed) {
  kernel({params, rows.view(), cols.view(), rows_transposed.view(), cols_transposed.view(),
          torch::stable::get_num_threads(), parallel_for});
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight, std::optional<Tensor> gate_bias,
                                   std::optional<Tensor> weight, std::optional<Tensor> bias, std::vector<int64_t> size,
                                   StringHandle mode_handle, bool align_corners, std::optional<double> scale_h,
                                   std::optional<double> scale_w) {
  const char* op = "gated_scale_transfer";
  const ResampleMode mode = resample_mode(op, mode_handle);
  GatedScaleTransferParams p = common_params(op, input, gate_weight, weight, size.at(0), size.at(1));
  STD_TORCH_CHECK(weight.has_value() || !bias.has_value(), "gsto_ops::", op, ": bias without weight");
  check(op, "gate_bias", gate_bias, {1}, input);
  check(op, "bias", bias, {p.out_channels}, input);
  p.gate_bias = view(gate_bias);
  p.bias = view(bias);

  const Tensor output = new_map(input, {p.batch, p.out_channels, p.out_height, p.out_width}, layout_of(input));
  const Tensor gate =
      new_map(input, {p.batch, 1, p.in_height, p.in_width}, torch::headeronly::MemoryFormat::Contiguous);
  p.output = view(output);
  p.gate = view(gate);

  const Axis rows(p.in_height, p.out_height, mode, align_corners, scale_h);
  const Axis cols(p.in_width, p.out_width, mode, align_corners, scale_w);
  run(gsto::cpu::chosen_kernels().gated_scale_transfer, p, rows, cols, rows, cols);
  return {output, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, std::optional<Tensor> grad_gate,
                                                            const Tensor& input, const Tensor& gate,
                                                            const Tensor& gate_weight, std::optional<Tensor> weight,
                                                            StringHandle mode_handle, bool align_corners,
                                                            std::optional<double> scale_h,
                                                            std::optional<double> scale_w) {
  const char* op = "gated_scale_transfer_backward";
  const ResampleMode mode = resample_mode(op, mode_handle);
  STD_TORCH_CHECK(grad_output.dim() == 4, "gsto_ops::", op, ": grad_output must be (N, C', H', W'), got ",
                  shape_of(grad_output));
  GatedScaleTransferParams p = common_params(op, input, gate_weight, weight, grad_output.size(2), grad_output.size(3));
  check(op, "grad_output", grad_output, {p.batch, p.out_channels, p.out_height, p.out_width}, input);
  check(op, "gate", gate, {p.batch, 1, p.in_height, p.in_width}, input);
  check(op, "grad_gate", grad_gate, {p.batch, 1, p.in_height, p.in_width}, input);
  p.grad_output = view(grad_output);
  p.gate = view(gate);
  p.grad_gate = view(grad_gate);

  const auto contiguous = torch::headeronly::MemoryFormat::Contiguous;
  const Tensor grad_input = new_map(input, {p.batch, p.channels, p.in_height, p.in_width}, layout_of(input));
  const Tensor grad_gate_weight = new_map(input, {1, p.channels, 1, 1}, contiguous);
  const Tensor grad_gate_bias = new_map(input, {1}, contiguous);
  const bool projects = weight.has_value();
  const Tensor grad_weight = new_map(
      input, projects ? std::vector<int64_t>{p.out_channels, p.channels, 1, 1} : std::vector<int64_t>{0}, contiguous);
  const Tensor grad_bias = new_map(input, {projects ? p.out_channels : 0}, contiguous);
  p.grad_input = view(grad_input);
  p.grad_gate_weight = grad_gate_weight.data_ptr();
  p.grad_gate_bias = grad_gate_bias.data_ptr();
  p.grad_weight = grad_weight.data_ptr();
  p.grad_bias = grad_bias.data_ptr();

  const Axis rows(p.in_height, p.out_height, mode, align_corners, scale_h);
  const Axis cols(p.in_width, p.out_width, mode, align_corners, scale_w);
  run(gsto::cpu::chosen_kernels().gated_scale_transfer_backward, p, rows, cols, rows.transposed(), cols.transposed());
  return {grad_input, grad_gate_weight, grad_gate_bias, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("gated_scale_transfer", TORCH_BOX(&forward));
  m.impl("gated_scale_transfer_backward", TORCH_BOX(&backward));
}
