// What the bindings of the CUDA operators share: checks, outputs and workspaces from torch's allocator, and launches by
// their plans. torch's stable ABI only. With GSTO_EMULATE_CUDA the same bindings serve CPU tensors, through the
// emulator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstring>

#include "cuda/kernels.h"
#include "operator.h"

#if defined(GSTO_EMULATE_CUDA)
#define GSTO_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(gsto_emulated, CPU, m)
#else
#define GSTO_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(gsto_ops, CUDA, m)
#endif

namespace gsto::cuda {

// Of the map between two passes: see images_per_chunk(). The emulator's maps are small.
#if defined(GSTO_EMULATE_CUDA)
constexpr int64_t kChunkBytes = int64_t{16} << 10;
#else
constexpr int64_t kChunkBytes = int64_t{16} << 20;
#endif

// Whether float32 products may use TF32 is asked of this function at every float32 call; the stable ABI does not show
// torch's own setting. Never, until it is set.
void set_tf32_policy(bool (*allowed)());

// The device of a tensor, which is the current one as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);

  cudaStream_t stream = nullptr;

 private:
#if !defined(GSTO_EMULATE_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Throws unless it is cudaSuccess.
void check_launch(const char* op, const Tensor& input, cudaError_t error);

// One call of an operator: its name, its input, and what follows from the input.
class Call : public OnDevice {
 public:
  Call(const char* op, const Tensor& input);

  const char* op;
  Tensor input;  // dense in its format; a sliced or expanded one is copied
  Format format;
  int64_t batch, pixels;
  int channels, height, width;
  int element_size, sms;

  // Throws unless the tensor has the shape, and the input's dtype and device.
  void check(const char* name, const OptionalTensor& tensor, Sizes shape, bool is_float32 = false) const;
  Resampling resampling(Sizes size, StringHandle mode, bool align_corners, std::optional<double> scale_h,
                        std::optional<double> scale_w) const;

  // A map in the input's format, dense, for the kernels to read. (The copy is the price of any other layout.)
  Tensor dense(const Tensor& map) const;
  // How a pass over maps of the input's shape, of so many images, goes: with sums, every block leaves partial results.
  StripPlan plan_strips_of(int64_t images, const std::vector<const void*>& maps, bool has_sums) const;
  Tensor new_map(int64_t channels, int64_t height, int64_t width, int64_t images = -1) const;  // in the input's format
  Tensor new_tensor(Sizes shape) const;  // contiguous, of the input's dtype
  Tensor new_floats(Sizes shape) const;  // contiguous float32: results and workspaces
  void launched(cudaError_t error) const { check_launch(op, input, error); }

  // z = act(W (g x) + bias) of a (N, C, H, W) map, with the gate made (gate_weight), given (gate alone) or absent.
  struct Gate {
    OptionalTensor weight, bias, values;
  };
  void project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Gate& gate, bool relu,
               const Tensor& z, float* statistics = nullptr) const;
  // dest = R act(g x); makes the gate.
  void gate_resample(const Gate& gate, bool relu, const Resampling& r, const Tensor& dest) const;
  void resample(const Resampling& r, const Tensor& source, const Tensor& dest, const OptionalTensor& gate,
                bool relu) const;
  // dest = m R^T source with m = [mask > 0], or 1.
  void resample_transposed(const Resampling& r, const Tensor& source, const Tensor& dest,
                           const OptionalTensor& mask) const;
  void resample_with(ResampleParams params, const Resampling& r, const Tensor& source, const Tensor& dest,
                     int blocks = 0) const;
  TapPlan plan_taps(const Resampling& r, bool transposed) const;

  struct GateGradients {
    Tensor input, weight, bias;
  };
  struct GateOperands {
    const Tensor& gate;
    const Tensor& gate_weight;
    const OptionalTensor& grad_gate;
  };
  GateGradients new_gate_gradients(const Tensor& gate_weight) const;
  // From du = R^T source.
  void gate_backward(const Resampling& r, const Tensor& source, const GateOperands& operands, bool relu,
                     const GateGradients& grads) const;
  // From dz, with du = W^T dz.
  void project_backward(const Gradient& dz, const Tensor& weight, const GateOperands& operands,
                        const GateGradients& grads) const;
  // du = W^T dz of a map of `per_image` pixels.
  void project_transposed(const Gradient& dz, const Tensor& weight, int64_t per_image, const Tensor& du) const;
  Resampling identity() const;
  // The gate (N, 1, H, W) may be one of the gates of a (N, K, H, W).
  void weight_gradient(const Gradient& dz, const Tensor& x, const OptionalTensor& gate, int64_t pixels,
                       const Tensor& weight, const Tensor& grad_weight, const OptionalTensor& grad_bias) const;
  void sum_rows(const Tensor& sums, int64_t rows, int64_t count, int64_t tail_begin, void* to, void* tail,
                ScalarType dtype) const;

 private:
  ProjectBackwardParams product_backward(const Gradient& dz, const Tensor& weight, int64_t per_image,
                                         const Tensor& du) const;
};

bool is_channels_last(const Tensor& map);
// The largest power of two, at most 16, that divides all the addresses.
int alignment_of(const std::vector<const void*>& maps);

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(as_dense(*tensor)) : std::nullopt;
}

inline const void* data_of(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

}  // namespace gsto::cuda
