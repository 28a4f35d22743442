// What the bindings of upsample_cross_entropy share on all devices. torch's stable ABI only.
#pragma once

#include "operator.h"

namespace gsto {

// The type of the labels, which belong to these logits.
inline LabelType label_type_of(const char* op, const Tensor& target, const Tensor& input) {
  STD_TORCH_CHECK(target.dim() == 3 && target.size(0) == input.size(0) && target.device() == input.device(),
                  "gsto_ops::", op, ": target must have shape (", input.size(0),
                  ", H, W) and the device of input of shape ", shape_of(input), ", got ", shape_of(target));
  const auto type = target.scalar_type();
  if (type == torch::headeronly::ScalarType::Long) return LabelType::kInt64;
  if (type == torch::headeronly::ScalarType::Int) return LabelType::kInt32;
  STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Byte, "gsto_ops::", op,
                  ": target must be int64, int32 or uint8, got ", type);
  return LabelType::kUint8;
}

inline Resampling label_resampling(const char* op, const Tensor& input, const Tensor& target, bool align_corners) {
  return resampling_of(op, input, {target.size(1), target.size(2)}, ResampleMode::kBilinear, align_corners);
}

enum class Reduction { kMean, kSum, kNone };

inline Reduction reduction_of(const char* op, StringHandle handle) {
  const std::string name = text_of(handle);
  STD_TORCH_CHECK(name == "mean" || name == "sum" || name == "none", "gsto_ops::", op,
                  ": reduction must be mean, sum or none, got ", name);
  return name == "mean" ? Reduction::kMean : name == "sum" ? Reduction::kSum : Reduction::kNone;
}

}  // namespace gsto
