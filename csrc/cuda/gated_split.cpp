// torch.ops.gsto_ops.gated_split and its backward on CUDA. The schemas are defined in gsto_ops.
//
// Backward, a few images at a time for L2 to keep the maps in between: du_k = W_k^T dz_k per projection, then one pass
// for the gates and dx; the weights' gradients at the end.
#include "cuda/binding.h"

namespace gsto::cuda {
namespace {

using Tensors = std::vector<Tensor>;

int64_t gates_of(const Call& call, const Tensor& gate_weight, const OptionalTensor& weight, int64_t projections,
                 int64_t copies, int64_t carriers = 0) {
  const int64_t gates = gate_weight.dim() > 0 ? gate_weight.size(0) : 0;
  STD_TORCH_CHECK(gates >= 1 && gates <= kMaxGates, "gsto_ops::", call.op, ": gate_weight must have 1 to ", kMaxGates,
                  " gates on CUDA, got ", shape_of(gate_weight));
  call.check("gate_weight", gate_weight, {gates, call.channels, 1, 1});
  STD_TORCH_CHECK(copies >= 0 && carriers >= 0 && projections + copies + carriers <= gates, "gsto_ops::", call.op, ": ",
                  projections, " projections, ", copies, " copies and ", carriers, " carriers need as many gates, got ",
                  gates);
  STD_TORCH_CHECK(weight.has_value() == (projections > 0), "gsto_ops::", call.op, ": weight must ",
                  projections > 0 ? "be there" : "be None", " for ", projections, " projections");
  return gates;
}

std::tuple<Tensors, Tensors, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& gate_weight,
                                                             OptionalTensor gate_bias, OptionalTensor weight,
                                                             std::vector<int64_t> split, int64_t copies,
                                                             StringHandle activation, int64_t carriers) {
  const char* op = "gated_split";
  const bool relu = is_relu(op, activation);
  const Call call(op, input);
  const int64_t projections = static_cast<int64_t>(split.size());
  const int64_t gates = gates_of(call, gate_weight, weight, projections, copies, carriers);
  GatedSplitParams p{};
  int64_t rows = 0;
  for (int64_t k = 0; k < projections; ++k) {
    STD_TORCH_CHECK(split[k] > 0, "gsto_ops::", op, ": split must be positive, got ", split[k]);
    p.row_begin[k] = static_cast<int>(rows);
    rows += split[k];
  }
  p.row_begin[projections] = static_cast<int>(rows);
  call.check("gate_bias", gate_bias, {gates});
  call.check("weight", weight, {rows, call.channels, 1, 1});

  const Tensor gate = call.new_tensor({call.batch, gates, call.height, call.width});
  const Tensor mean = call.new_floats({rows}), variance = call.new_floats({rows});
  const Tensor rho = as_dense(gate_weight);
  const OptionalTensor bias = contiguous(gate_bias), matrix = contiguous(weight);
  Tensors projected, gated;
  for (int64_t k = 0; k < projections; ++k) {
    projected.push_back(call.new_map(split[k], call.height, call.width));
    p.projected[k] = projected[k].data_ptr();
  }
  for (int64_t k = 0; k < copies; ++k) {
    gated.push_back(call.new_map(call.channels, call.height, call.width));
    p.copied[k] = gated[k].data_ptr();
  }
  const int64_t tiles_per_image = ceil_div(call.pixels, kTilePixels), tiles = tiles_per_image * call.batch;
  const Tensor statistics = call.new_floats({2, rows, tiles});
  p.format = call.format;
  p.batch = call.batch;
  p.pixels = call.pixels;
  p.channels = call.channels;
  p.gates = static_cast<int>(gates);
  p.projections = static_cast<int>(projections);
  p.copies = static_cast<int>(copies);
  p.input = call.input.data_ptr();
  p.gate_weight = rho.data_ptr();
  p.gate_bias = data_of(bias);
  p.relu = relu;
  p.gate = gate.data_ptr();
  p.weight = data_of(matrix);
  p.statistics = static_cast<float*>(statistics.data_ptr());
  int64_t row_tiles = 0;
  for (const int64_t count : split) row_tiles += ceil_div(count, kTileRows);
  p.row_tiles_per_block = row_tiles_per_block(tiles, static_cast<int>(row_tiles * kTileRows), call.sms);
  call.launched(launch_gated_split(p, call.stream));
  if (rows > 0) {
    MergeStatisticsParams m{};
    m.statistics = p.statistics;
    m.channels = static_cast<int>(rows);
    m.tiles = tiles;
    m.tiles_per_image = tiles_per_image;
    m.tile_pixels = kTilePixels;
    m.pixels = call.pixels;
    m.mean = static_cast<float*>(mean.data_ptr());
    m.variance = static_cast<float*>(variance.data_ptr());
    call.launched(launch_merge_statistics(m, call.stream));
  }
  for (int64_t k = 0; k < carriers; ++k) gated.push_back(new_carrier(op, input));
  return {projected, gated, gate, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensors grad_projected, Tensors grad_gated,
                                                    OptionalTensor grad_gate, const Tensor& input, const Tensor& gate,
                                                    const Tensor& gate_weight, OptionalTensor weight,
                                                    StringHandle activation) {
  const char* op = "gated_split_backward";
  const bool relu = is_relu(op, activation);
  const Call call(op, input);
  const size_t projections = grad_projected.size(), copies = grad_gated.size();
  const int64_t gates =
      gates_of(call, gate_weight, weight, static_cast<int64_t>(projections), static_cast<int64_t>(copies));
  call.check("gate", gate, {call.batch, gates, call.height, call.width});
  call.check("grad_gate", grad_gate, {call.batch, gates, call.height, call.width});
  int64_t rows = 0;
  for (Tensor& grad : grad_projected) {
    check_map(op, grad);
    call.check("a gradient of projected", grad, {call.batch, grad.size(1), call.height, call.width});
    rows += grad.size(1);
    grad = call.dense(grad);
  }
  for (Tensor& grad : grad_gated) {
    call.check("a gradient of gated", grad, {call.batch, call.channels, call.height, call.width});
    grad = call.dense(grad);
  }
  call.check("weight", weight, {rows, call.channels, 1, 1});

  const Tensor grad_input = call.new_map(call.channels, call.height, call.width);
  const Tensor grad_gate_weight = call.new_tensor({gates, call.channels, 1, 1}),
               grad_gate_bias = call.new_tensor({gates});
  Tensor grad_weight = weight.has_value() ? call.new_tensor({rows, call.channels, 1, 1}) : call.new_tensor({0});
  const Tensor rho = as_dense(gate_weight), all_gates = as_dense(gate);
  const OptionalTensor dgate = contiguous(grad_gate);
  Tensor matrix = weight.has_value() ? as_dense(*weight) : Tensor();
  Tensors weights;  // of the projections
  for (int64_t k = 0, row = 0; k < static_cast<int64_t>(projections); row += grad_projected[k].size(1), ++k)
    weights.push_back(torch::stable::narrow(matrix, 0, row, grad_projected[k].size(1)));

  const int64_t image_bytes = int64_t{call.channels} * call.pixels * call.element_size;
  const int64_t step = projections == 0
                           ? call.batch
                           : images_per_chunk(call.batch, image_bytes * static_cast<int64_t>(projections), kChunkBytes);
  Tensors between;
  for (size_t k = 0; k < projections; ++k)
    between.push_back(call.new_map(call.channels, call.height, call.width, std::min(step, call.batch)));
  const auto blocks_of = [&](int64_t images) {
    return persistent_blocks(images * ceil_div(call.pixels, kTilePixels), call.sms);
  };
  const int64_t last = call.batch == 0 ? 0 : (call.batch - 1) % step + 1;  // images of the last chunk
  const int64_t parts = call.batch == 0 ? 0 : (call.batch - last) / step * blocks_of(step) + blocks_of(last);
  const int64_t words = gates * (call.channels + 1);
  const Tensor sums = call.new_floats({parts, words});
  float* next = static_cast<float*>(sums.data_ptr());
  for (int64_t first = 0; first < call.batch; first += step) {
    const int64_t count = std::min(step, call.batch - first);
    const auto slice = [&](Tensor map, int64_t from) {
      return count == map.size(0) ? map : torch::stable::narrow(map, 0, from, count);
    };
    const Call part(op, slice(call.input, first));
    Tensors held;
    GatedSplitBackwardParams p{};
    for (size_t k = 0; k < projections; ++k) {
      held.insert(held.end(), {slice(grad_projected[k], first), slice(between[k], 0)});
      Gradient dz;
      dz.grad = held[2 * k].data_ptr();
      part.project_transposed(dz, weights[k], call.pixels, held[2 * k + 1]);
      p.grad[k] = held[2 * k + 1].data_ptr();
    }
    for (size_t k = 0; k < copies; ++k) {
      held.push_back(slice(grad_gated[k], first));
      p.grad[projections + k] = held.back().data_ptr();
    }
    const Tensor part_gates = slice(all_gates, first), result = slice(grad_input, first);
    const OptionalTensor part_dgate = dgate.has_value() ? OptionalTensor(slice(*dgate, first)) : std::nullopt;
    p.format = call.format;
    p.batch = count;
    p.pixels = call.pixels;
    p.channels = call.channels;
    p.gates = static_cast<int>(gates);
    p.grads = static_cast<int>(projections + copies);
    p.input = part.input.data_ptr();
    p.gate = part_gates.data_ptr();
    p.gate_weight = rho.data_ptr();
    p.grad_gate = data_of(part_dgate);
    p.relu = relu;
    p.grad_input = result.data_ptr();
    p.sums = next;
    p.blocks = blocks_of(count);
    next += p.blocks * words;
    call.launched(launch_gated_split_backward(p, call.stream));
  }
  const int64_t gate_weights = gates * call.channels;
  call.sum_rows(sums, parts, words, gate_weights, grad_gate_weight.data_ptr(), grad_gate_bias.data_ptr(),
                call.format.dtype);
  for (int64_t k = 0, row = 0; k < static_cast<int64_t>(projections); row += grad_projected[k].size(1), ++k) {
    Gradient dz;
    dz.grad = grad_projected[k].data_ptr();
    Tensor every = all_gates;
    const Tensor grad = torch::stable::narrow(grad_weight, 0, row, grad_projected[k].size(1));
    call.weight_gradient(dz, call.input, torch::stable::narrow(every, 1, k, 1), call.pixels, weights[k], grad,
                         std::nullopt);
  }
  return {grad_input, grad_gate_weight, grad_gate_bias, grad_weight};
}

}  // namespace
}  // namespace gsto::cuda

GSTO_CUDA_OPERATORS(m) {
  m.impl("gated_split", TORCH_BOX(&gsto::cuda::forward));
  m.impl("gated_split_backward", TORCH_BOX(&gsto::cuda::backward));
}
