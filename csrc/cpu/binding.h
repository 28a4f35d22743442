// What the bindings of the CPU operators share: checks, results and resampling. torch's stable ABI only.
#pragma once

#include <new>

#include "cpu/dispatch.h"
#include "operator.h"

namespace gsto::cpu {

TensorView view(const Tensor& tensor);
TensorView view(const OptionalTensor& tensor);

// Lines of maps (cpu/lines.h): whether they are rows of planes, which is so for all but channels_last; and the map, or
// a copy where its lines are not contiguous: sliced pixels, the other layout, expanded gradients.
bool is_planar(const Tensor& map);
Tensor with_lines(const Tensor& map, bool planar);

// One call of an operator: its name, its input, and what follows from the input.
class Operator {
 public:
  Operator(const char* name, const Tensor& input);

  const char* name;
  const Tensor& input;
  gsto::ScalarType dtype;
  int64_t batch, channels, height, width;

  // Throws unless the tensor has the shape, and the input's dtype, or that of statistics.
  void check(const char* argument, const Tensor& tensor, Sizes shape, bool statistics = false) const;
  void check(const char* argument, const OptionalTensor& tensor, Sizes shape, bool statistics = false) const;

  // Results: a map in the input's layout, a contiguous tensor of its dtype, one of float32 (float64 for float64).
  Tensor new_map(int64_t map_channels, int64_t map_height, int64_t map_width) const;
  Tensor new_tensor(Sizes shape) const;
  Tensor new_statistics(Sizes shape) const;

  // Runs a kernel; memory that it cannot get is an error with the operator's name.
  template <class Params>
  void run(Kernel<Params> kernel, const Call& call, const Params& params) const {
    try {
      kernel(call, params);
    } catch (const std::bad_alloc&) {
      STD_TORCH_CHECK(false, "gsto_ops::", name, ": out of memory for maps in between, input of shape ",
                      shape_of(input));
    }
  }

  // A call whose output maps have so many pixels; it has no resampling tables yet.
  Call call(int64_t out_pixels) const;
};

// The tables of a resampling, which live as long as this.
class ResamplingTables {
 public:
  ResamplingTables(const Operator& op, const Resampling& resampling);
  Call forward() const;
  Call backward();

 private:
  Resampling resampling_;
  Call call_;
  AxisTable rows_, cols_;
  std::optional<AxisTable> rows_transposed_, cols_transposed_;
};

// What the calls of these operators have in common, forward and backward: the input, its sizes, and the parameters
// given.
GatedProjectionParams gated_projection_params(const Operator& op, const Tensor& gate_weight, const Tensor& weight);
AffineScaleTransferParams affine_scale_transfer_params(const Operator& op, bool relu);

}  // namespace gsto::cpu
