// What the bindings of all devices share: an operator's arguments, read and checked. torch's stable ABI only. The
// gsto_ops Python functions check their arguments and explain themselves; the checks here keep a direct call of
// torch.ops.gsto_ops from reading outside of a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "axis.h"

namespace gsto {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + ")";
}

// A schema's string. torch's conversion to std::string leaks one string per call (2.11 to 2.13), hence the handle.
inline std::string text_of(StringHandle handle) {
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  const std::string copy(text);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

inline void check_map(const char* op, const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) > 0 && input.size(2) > 0 && input.size(3) > 0, "gsto_ops::", op,
                  ": input must be (N, C, H, W) with C, H and W of at least 1, got ", shape_of(input));
}

inline void check_shape(const char* op, const char* argument, const Tensor& tensor, Sizes shape, const Tensor& input) {
  const Sizes given = tensor.sizes();
  bool same = given.size() == shape.size();
  for (size_t d = 0; same && d < shape.size(); ++d) same = given[d] == shape[d];
  if (same) return;
  std::string wanted;
  for (size_t d = 0; d < shape.size(); ++d) wanted += (d ? ", " : "") + std::to_string(shape[d]);
  STD_TORCH_CHECK(false, "gsto_ops::", op, ": ", argument, " must have shape (", wanted, ") for input of shape ",
                  shape_of(input), ", got ", shape_of(tensor));
}

inline ScalarType scalar_type(const char* op, const Tensor& input, bool takes_float64, const char* kernels) {
  const auto type = input.scalar_type();
  if (type == torch::headeronly::ScalarType::Float) return ScalarType::kFloat32;
  if (type == torch::headeronly::ScalarType::BFloat16) return ScalarType::kBFloat16;
  if (type == torch::headeronly::ScalarType::Half) return ScalarType::kFloat16;
  STD_TORCH_CHECK(
      type == torch::headeronly::ScalarType::Double && takes_float64, "gsto_ops::", op, ": input of shape ",
      shape_of(input), " has dtype ", type, "; ", kernels,
      takes_float64 ? " takes float32, float64, bfloat16 and float16" : " takes float32, bfloat16 and float16");
  return ScalarType::kFloat64;
}

// The strides of a dense tensor of at most 4 dimensions.
inline std::array<int64_t, 4> dense_strides(Sizes shape, bool channels_last) {
  if (channels_last) return {shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1]};
  std::array<int64_t, 4> strides{};
  int64_t step = 1;
  for (size_t d = shape.size(); d-- > 0; step *= shape[d] > 0 ? shape[d] : 1) strides[d] = step;
  return strides;
}

// torch's allocation, whose own error does not say what was asked for. Not torch::stable::empty, which looks the
// operator up by its name: 1 us more.
inline Tensor allocate(const char* op, const Tensor& input, Sizes shape, torch::headeronly::ScalarType dtype,
                       bool channels_last = false) {
  try {
    const auto strides = dense_strides(shape, channels_last);
    const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    int32_t device_type = 0, device_index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(input.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(input.get(), &device_index));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                    type, device_type, device_index, &made));
    return Tensor(made);
  } catch (const std::exception& error) {
    std::string wanted;
    for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(false, "gsto_ops::", op, ": allocating (", wanted, ") of dtype ", dtype,
                    " failed for input of shape ", shape_of(input), "; is there enough memory? ", error.what());
  }
}

// Zeros of the shape of `input` that are one element in memory: see gsto_ops/ops/gated_split.py.
inline Tensor new_carrier(const char* op, const Tensor& input) {
  Tensor zero = allocate(op, input, {1, 1, 1, 1}, input.scalar_type());  // as_strided takes as many dimensions
  torch::stable::zero_(zero);
  const Sizes shape = input.sizes();
  const std::array<int64_t, 4> strides{};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_as_strided(zero.get(), shape.data(), strides.data(), &made));
  return Tensor(made);
}

// The tensor, or a dense copy. torch::stable::contiguous also looks up an operator, where there is nothing to do as
// well.
inline Tensor as_dense(const Tensor& tensor, bool channels_last = false) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  const auto wanted = dense_strides(sizes, channels_last);
  bool dense = true;
  for (size_t d = 0; d < sizes.size(); ++d) dense = dense && (sizes[d] == 1 || strides[d] == wanted[d]);
  using torch::headeronly::MemoryFormat;
  return dense
             ? tensor
             : torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline bool is_relu(const char* op, StringHandle handle) {
  const std::string activation = text_of(handle);
  STD_TORCH_CHECK(activation == "none" || activation == "relu", "gsto_ops::", op,
                  ": activation must be none or relu, got ", activation);
  return activation == "relu";
}

// The resampling of a call along both axes.
struct Resampling {
  Axis rows, cols;
  bool identity() const { return is_identity(rows) && is_identity(cols); }
  bool shrinks() const { return int64_t{rows.out} * cols.out < int64_t{rows.in} * cols.in; }
};

inline Resampling resampling_of(const char* op, const Tensor& input, Sizes size, ResampleMode mode, bool align_corners,
                                std::optional<double> scale_h = std::nullopt,
                                std::optional<double> scale_w = std::nullopt) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 64;  // pixels of an axis are counted in 32 bits
  STD_TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0, "gsto_ops::", op, ": size must be positive, got (",
                  size.at(0), ", ", size.at(1), ") for input of shape ", shape_of(input));
  STD_TORCH_CHECK(size[0] < kLimit && size[1] < kLimit && input.size(2) < kLimit && input.size(3) < kLimit,
                  "gsto_ops::", op, ": heights and widths must be less than ", kLimit, ", got input of shape ",
                  shape_of(input), " and size (", size[0], ", ", size[1], ")");
  return {make_axis(input.size(2), size[0], mode, align_corners, scale_h.value_or(0)),
          make_axis(input.size(3), size[1], mode, align_corners, scale_w.value_or(0))};
}

inline Resampling resampling_of(const char* op, const Tensor& input, Sizes size, StringHandle handle,
                                bool align_corners, std::optional<double> scale_h, std::optional<double> scale_w) {
  const std::string name = text_of(handle);
  STD_TORCH_CHECK(name == "bilinear" || name == "avg" || name == "nearest", "gsto_ops::", op,
                  ": mode must be bilinear, avg or nearest, got ", name);
  const ResampleMode mode = name == "avg"       ? ResampleMode::kAvg
                            : name == "nearest" ? ResampleMode::kNearest
                                                : ResampleMode::kBilinear;
  return resampling_of(op, input, size, mode, align_corners, scale_h, scale_w);
}

}  // namespace gsto
