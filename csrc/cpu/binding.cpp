#include "cpu/binding.h"

#include <algorithm>
#include <atomic>

namespace gsto::cpu {
namespace {

torch::headeronly::ScalarType statistics_type(const Tensor& input) {
  const auto wide = torch::headeronly::ScalarType::Double;
  return input.scalar_type() == wide ? wide : torch::headeronly::ScalarType::Float;
}

// Memory that a task does not get is reported by the calling thread: torch would lose the exception's type.
void parallel_for(int64_t tasks, Task task, void* context) {
  struct Guarded {
    Task task;
    void* context;
    std::atomic<bool> out_of_memory;
  } guarded{task, context, {false}};
  const Task run = [](int64_t begin, int64_t end, void* data) {
    Guarded& guarded = *static_cast<Guarded*>(data);
    try {
      guarded.task(begin, end, guarded.context);
    } catch (const std::bad_alloc&) {
      guarded.out_of_memory = true;
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, run, &guarded));
  if (guarded.out_of_memory) throw std::bad_alloc();
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

Operator::Operator(const char* op, const Tensor& map)
    : name(op), input(map), dtype(scalar_type(op, map, true, "the CPU kernel")) {
  check_map(op, input);
  batch = input.size(0);
  channels = input.size(1);
  height = input.size(2);
  width = input.size(3);
}

void Operator::check(const char* argument, const Tensor& tensor, Sizes shape, bool statistics) const {
  check_shape(name, argument, tensor, shape, input);
  const auto type = statistics ? statistics_type(input) : input.scalar_type();
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_cpu(), "gsto_ops::", name, ": ", argument, " of dtype ",
                  tensor.scalar_type(), " must be a CPU tensor of dtype ", type, " for input of dtype ",
                  input.scalar_type());
}

void Operator::check(const char* argument, const OptionalTensor& tensor, Sizes shape, bool statistics) const {
  if (tensor.has_value()) check(argument, *tensor, shape, statistics);
}

// channels_last when the input's channels are adjacent, else contiguous (gsto_ops/ops/library.py).
Tensor Operator::new_map(int64_t map_channels, int64_t map_height, int64_t map_width) const {
  return allocate(name, input, {batch, map_channels, map_height, map_width}, input.scalar_type(), !is_planar(input));
}

Tensor Operator::new_tensor(Sizes shape) const { return allocate(name, input, shape, input.scalar_type()); }

Tensor Operator::new_statistics(Sizes shape) const { return allocate(name, input, shape, statistics_type(input)); }

Call Operator::call(int64_t out_pixels) const {
  Call call;
  // PyTorch's own grain size: waking threads takes as long as that many elements.
  const bool small = batch * channels * std::max(height * width, out_pixels) < 32768;
  call.parallel_for = small ? serial_for : parallel_for;
  return call;
}

ResamplingTables::ResamplingTables(const Operator& op, const Resampling& resampling)
    : resampling_(resampling),
      call_(op.call(int64_t{resampling.rows.out} * resampling.cols.out)),
      rows_(resampling.rows, false),
      cols_(resampling.cols, false) {}

Call ResamplingTables::forward() const {
  Call call = call_;
  call.rows = rows_.view();
  call.cols = cols_.view();
  return call;
}

Call ResamplingTables::backward() {
  rows_transposed_.emplace(resampling_.rows, true);
  cols_transposed_.emplace(resampling_.cols, true);
  Call call = forward();
  call.rows_transposed = rows_transposed_->view();
  call.cols_transposed = cols_transposed_->view();
  return call;
}

bool is_planar(const Tensor& map) { return !(map.stride(1) == 1 && map.stride(3) > 1); }

Tensor with_lines(const Tensor& map, bool planar) {
  const int64_t unit = planar ? 1 : map.size(1);
  const bool pixels = map.size(3) == 1 || map.stride(3) == unit;
  if (pixels && (planar || map.stride(1) == 1)) return map;
  return as_dense(map, !planar);
}

}  // namespace gsto::cpu
