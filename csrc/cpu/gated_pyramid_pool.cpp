// torch.ops.gsto_ops.gated_pyramid_pool and its backward on the CPU. The schemas are those of gsto_ops/ops.
#include "cpu/binding.h"
#include "pyramid.h"

namespace gsto::cpu {
namespace {

// The parameters, and the cuts that they point to.
struct PyramidCall {
  Operator op;
  std::vector<int64_t> bins, row_cuts, col_cuts;
  int64_t windows = 0;
  GatedPyramidPoolParams p;

  PyramidCall(const char* name, const Tensor& input, const Tensor& gate_weight, std::vector<int64_t> sizes)
      : op(name, input), bins(std::move(sizes)) {
    STD_TORCH_CHECK(!bins.empty(), "gsto_ops::", name, ": bins must not be empty");
    for (const int64_t b : bins) {
      STD_TORCH_CHECK(b > 0, "gsto_ops::", name, ": bins must be positive, got ", b);
      windows += b * b;
    }
    const int64_t levels = static_cast<int64_t>(bins.size());
    op.check("gate_weight", gate_weight, {levels, op.channels, 1, 1});
    // Few bins: eighths of the rows, so that one image occupies many threads.
    row_cuts = cut_axis(op.height, bins);
    if (row_cuts.size() <= 8) row_cuts = cut_axis(op.height, bins, 8);
    col_cuts = cut_axis(op.width, bins);
    p.dtype = op.dtype;
    p.batch = op.batch;
    p.channels = op.channels;
    p.height = op.height;
    p.width = op.width;
    p.levels = levels;
    p.bins = bins.data();
    p.row_cells = static_cast<int64_t>(row_cuts.size()) - 1;
    p.col_cells = static_cast<int64_t>(col_cuts.size()) - 1;
    p.row_cuts = row_cuts.data();
    p.col_cuts = col_cuts.data();
    p.input = view(input);
    p.gate_weight = view(gate_weight);
  }

  // (N, C, windows) as a map of one row.
  static TensorView map_view(const Tensor& pooled) {
    TensorView v;
    v.data = pooled.data_ptr();
    v.stride_n = pooled.stride(0);
    v.stride_c = pooled.stride(1);
    v.stride_w = pooled.stride(2);
    return v;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight, OptionalTensor gate_bias,
                                   std::vector<int64_t> bins) {
  PyramidCall call("gated_pyramid_pool", input, gate_weight, std::move(bins));
  GatedPyramidPoolParams& p = call.p;
  call.op.check("gate_bias", gate_bias, {p.levels});
  p.gate_bias = view(gate_bias);
  const Tensor pooled = call.op.new_tensor({p.batch, p.channels, call.windows});
  const Tensor gate = call.op.new_tensor({p.batch, p.levels, p.height, p.width});
  p.pooled = PyramidCall::map_view(pooled);
  p.gate = view(gate);
  call.op.run(chosen_kernels().gated_pyramid_pool, call.op.call(p.height * p.width), p);
  return {pooled, gate};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_pooled, OptionalTensor grad_gate, const Tensor& input,
                                            const Tensor& gate, const Tensor& gate_weight, std::vector<int64_t> bins) {
  PyramidCall call("gated_pyramid_pool_backward", input, gate_weight, std::move(bins));
  GatedPyramidPoolParams& p = call.p;
  call.op.check("grad_pooled", grad_pooled, {p.batch, p.channels, call.windows});
  call.op.check("gate", gate, {p.batch, p.levels, p.height, p.width});
  call.op.check("grad_gate", grad_gate, {p.batch, p.levels, p.height, p.width});
  p.grad_pooled = PyramidCall::map_view(grad_pooled);
  p.gate = view(gate);
  p.grad_gate = view(grad_gate);

  const Tensor grad_input = call.op.new_map(p.channels, p.height, p.width);
  const Tensor grad_gate_weight = call.op.new_tensor({p.levels, p.channels, 1, 1});
  const Tensor grad_gate_bias = call.op.new_tensor({p.levels});
  p.grad_input = view(grad_input);
  p.grad_gate_weight = grad_gate_weight.data_ptr();
  p.grad_gate_bias = grad_gate_bias.data_ptr();
  call.op.run(chosen_kernels().gated_pyramid_pool_backward, call.op.call(p.height * p.width), p);
  return {grad_input, grad_gate_weight, grad_gate_bias};
}

}  // namespace
}  // namespace gsto::cpu

STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CPU, m) {
  m.impl("gated_pyramid_pool", TORCH_BOX(&gsto::cpu::forward));
  m.impl("gated_pyramid_pool_backward", TORCH_BOX(&gsto::cpu::backward));
}
