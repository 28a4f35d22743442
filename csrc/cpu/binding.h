// What the bindings of the CPU operators share: checks, results and resampling. torch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace gsto::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

TensorView view(const Tensor& tensor);
TensorView view(const OptionalTensor& tensor);
std::string shape_of(const Tensor& tensor);

// One call of an operator: its name, its input, and what follows from the input. The gsto_ops Python functions check
// their arguments and explain themselves; the checks here keep a direct call of torch.ops.gsto_ops from reading outside
// of a tensor.
class Operator {
 public:
  Operator(const char* name, const Tensor& input);

  const char* name;
  const Tensor& input;
  gsto::ScalarType dtype;
  int64_t batch, channels, height, width;

  // Throws unless the tensor has the shape, and the input's dtype, or that of statistics.
  void check(const char* argument, const Tensor& tensor, const std::vector<int64_t>& shape,
             bool statistics = false) const;
  void check(const char* argument, const OptionalTensor& tensor, const std::vector<int64_t>& shape,
             bool statistics = false) const;
  // The size of results, checked.
  std::tuple<int64_t, int64_t> output_size(const std::vector<int64_t>& size) const;
  bool relu(StringHandle activation) const;

  // Results: a map in the input's layout, a contiguous tensor of its dtype, a vector of float32 (float64 for float64).
  Tensor new_map(int64_t map_channels, int64_t map_height, int64_t map_width) const;
  Tensor new_tensor(const std::vector<int64_t>& shape) const;
  Tensor new_statistics(int64_t size) const;

  // A call whose output maps have so many pixels; it has no resampling tables yet.
  Call call(int64_t out_pixels) const;
};

// The resampling of a call along both axes.
class Resampling {
 public:
  Resampling(const Operator& op, int64_t out_height, int64_t out_width, StringHandle mode, bool align_corners,
             std::optional<double> scale_h, std::optional<double> scale_w);
  Call forward() const;
  Call backward();  // the tables live as long as this

 private:
  Resampling(const Operator& op, int64_t out_height, int64_t out_width, ResampleMode mode, bool align_corners,
             std::optional<double> scale_h, std::optional<double> scale_w);

  Call call_;
  Axis rows_, cols_;
  std::optional<Axis> rows_transposed_, cols_transposed_;
};

}  // namespace gsto::cpu
