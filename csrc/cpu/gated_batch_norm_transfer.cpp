// torch.ops.gsto_ops.gated_batch_norm_transfer and its backward on the CPU: the kernels of gated_projection and
// affine_scale_transfer one after the other, with the norm's few numbers per channel in between. The schemas are those
// of gsto_ops/ops.
#include <cmath>

#include "cpu/binding.h"

namespace gsto::cpu {
namespace {

// Rows of C' numbers of the accumulate type: float, or double where the maps are.
template <class A>
class Rows {
 public:
  Rows(int64_t rows, int64_t channels) : channels_(channels), values_(static_cast<size_t>(rows * channels)) {}
  A* operator[](int64_t row) { return values_.data() + row * channels_; }
  TensorView view(int64_t row) {
    TensorView v;
    v.data = (*this)[row];
    v.stride_n = 1;
    return v;
  }

 private:
  int64_t channels_;
  std::vector<A> values_;
};

// The vectors of a norm: views of (C',).
struct Norm {
  TensorView weight, bias, mean, var;
  double eps;

  template <class A>
  static A at(const TensorView& vector, int64_t c) {
    return static_cast<const A*>(vector.data)[c * vector.stride_n];
  }
  template <class A>
  A inverse_deviation(int64_t c) const {
    return A(1) / std::sqrt(at<A>(var, c) + static_cast<A>(eps));
  }
  // norm(x) = scale x + shift
  template <class A>
  void to_affine(int64_t channels, A* scale, A* shift) const {
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = at<A>(weight, c) * inverse_deviation<A>(c);
      shift[c] = at<A>(bias, c) - at<A>(mean, c) * scale[c];
    }
  }
};

template <class A>
void transfer(const Operator& middle, const Norm& norm, const Resampling& resampling, AffineScaleTransferParams& p) {
  Rows<A> rows(2, p.channels);
  norm.to_affine(p.channels, rows[0], rows[1]);
  p.scale = rows.view(0);
  p.shift = rows.view(1);
  middle.run(chosen_kernels().affine_scale_transfer, ResamplingTables(middle, resampling).forward(), p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const Tensor& gate_weight, OptionalTensor gate_bias, const Tensor& weight,
    const Tensor& norm_weight, const Tensor& norm_bias, double eps, StringHandle activation, std::vector<int64_t> size,
    StringHandle mode, bool align_corners, std::optional<double> scale_h, std::optional<double> scale_w) {
  const Operator op("gated_batch_norm_transfer", input);
  const bool relu = is_relu(op.name, activation);
  const Resampling r = resampling_of(op.name, input, size, mode, align_corners, scale_h, scale_w);
  GatedProjectionParams p = gated_projection_params(op, gate_weight, weight);
  op.check("gate_bias", gate_bias, {1});
  op.check("norm_weight", norm_weight, {p.out_channels}, true);
  op.check("norm_bias", norm_bias, {p.out_channels}, true);
  p.gate_bias = view(gate_bias);

  const Tensor projected = op.new_map(p.out_channels, p.in_height, p.in_width);
  const Tensor gate = op.new_tensor({p.batch, 1, p.in_height, p.in_width});
  const Tensor mean = op.new_statistics({p.out_channels}), var = op.new_statistics({p.out_channels});
  const Tensor output = op.new_map(p.out_channels, r.rows.out, r.cols.out);
  p.output = view(projected);
  p.gate = view(gate);
  p.mean = view(mean);
  p.var = view(var);
  op.run(chosen_kernels().gated_projection, op.call(op.height * op.width), p);

  const Operator middle(op.name, projected);
  const Norm norm{view(norm_weight), view(norm_bias), p.mean, p.var, eps};
  AffineScaleTransferParams q = affine_scale_transfer_params(middle, relu);
  q.output = view(output);
  if (op.dtype == gsto::ScalarType::kFloat64)
    transfer<double>(middle, norm, r, q);
  else
    transfer<float>(middle, norm, r, q);
  return {output, projected, gate, mean, var};
}

// From the gradients of scale and shift those of the norm's weight and bias, and of mean and variance.
template <class A>
void backward_through(const Operator& op, const Operator& middle, const Norm& norm, const Resampling& resampling,
                      AffineScaleTransferParams& q, GatedProjectionParams& p, A* grad_weight, A* grad_bias) {
  const int64_t channels = p.out_channels;
  Rows<A> rows(5, channels);
  norm.to_affine(channels, rows[0], rows[1]);
  q.scale = rows.view(0);
  q.shift = rows.view(1);
  q.grad_scale = rows[2];
  q.grad_shift = grad_bias;
  middle.run(chosen_kernels().affine_scale_transfer_backward, ResamplingTables(middle, resampling).backward(), q);
  for (int64_t c = 0; c < channels; ++c) {
    const A inverse = norm.inverse_deviation<A>(c), scale = rows[0][c];
    const A grad_scale = rows[2][c] - Norm::at<A>(norm.mean, c) * grad_bias[c];
    grad_weight[c] = grad_scale * inverse;
    rows[3][c] = -grad_bias[c] * scale;
    rows[4][c] = A(-0.5) * grad_scale * scale * inverse * inverse;
  }
  p.grad_mean = rows.view(3);
  p.grad_var = rows.view(4);
  op.run(chosen_kernels().gated_projection_backward, op.call(op.height * op.width), p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& gate_weight, const Tensor& weight,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& projected, const Tensor& gate, const Tensor& mean,
    const Tensor& var, double eps, StringHandle activation, StringHandle mode, bool align_corners,
    std::optional<double> scale_h, std::optional<double> scale_w) {
  const Operator op("gated_batch_norm_transfer_backward", input);
  const bool relu = is_relu(op.name, activation);
  STD_TORCH_CHECK(grad_output.dim() == 4, "gsto_ops::", op.name, ": grad_output must be (N, C', H', W'), got ",
                  shape_of(grad_output));
  const Resampling r =
      resampling_of(op.name, input, {grad_output.size(2), grad_output.size(3)}, mode, align_corners, scale_h, scale_w);
  GatedProjectionParams p = gated_projection_params(op, gate_weight, weight);
  op.check("grad_output", grad_output, {p.batch, p.out_channels, r.rows.out, r.cols.out});
  op.check("projected", projected, {p.batch, p.out_channels, p.in_height, p.in_width});
  op.check("gate", gate, {p.batch, 1, p.in_height, p.in_width});
  op.check("norm_weight", norm_weight, {p.out_channels}, true);
  op.check("norm_bias", norm_bias, {p.out_channels}, true);
  op.check("mean", mean, {p.out_channels}, true);
  op.check("var", var, {p.out_channels}, true);

  const Operator middle(op.name, projected);
  AffineScaleTransferParams q = affine_scale_transfer_params(middle, relu);
  const Tensor grad_projected = middle.new_map(p.out_channels, p.in_height, p.in_width);
  q.grad_output = view(grad_output);
  q.grad_input = view(grad_projected);

  const Tensor grad_input = op.new_map(p.channels, p.in_height, p.in_width);
  const Tensor grad_gate_weight = op.new_tensor({1, p.channels, 1, 1});
  const Tensor grad_gate_bias = op.new_tensor({1});
  const Tensor grad_weight = op.new_tensor({p.out_channels, p.channels, 1, 1});
  const Tensor grad_norm_weight = op.new_statistics({p.out_channels});
  const Tensor grad_norm_bias = op.new_statistics({p.out_channels});
  p.output = q.input;
  p.gate = view(gate);
  p.mean = view(mean);
  p.grad_output = q.grad_input;
  p.grad_input = view(grad_input);
  p.grad_gate_weight = grad_gate_weight.data_ptr();
  p.grad_gate_bias = grad_gate_bias.data_ptr();
  p.grad_weight = grad_weight.data_ptr();
  const Norm norm{view(norm_weight), view(norm_bias), p.mean, view(var), eps};
  void *of_weight = grad_norm_weight.data_ptr(), *of_bias = grad_norm_bias.data_ptr();
  if (op.dtype == gsto::ScalarType::kFloat64)
    backward_through(op, middle, norm, r, q, p, static_cast<double*>(of_weight), static_cast<double*>(of_bias));
  else
    backward_through(op, middle, norm, r, q, p, static_cast<float*>(of_weight), static_cast<float*>(of_bias));
  return {grad_input, grad_gate_weight, grad_gate_bias, grad_weight, grad_norm_weight, grad_norm_bias};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("gated_batch_norm_transfer", TORCH_BOX(&gsto::cpu::forward));
  m.impl("gated_batch_norm_transfer_backward", TORCH_BOX(&gsto::cpu::backward));
}
