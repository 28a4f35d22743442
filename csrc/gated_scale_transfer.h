// Parameters of gated_scale_transfer, as its kernels see them. No torch header: device code includes this file too.
#pragma once

#include <cstdint>

namespace gsto {

enum class ScalarType { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum class ResampleMode { kBilinear, kAvg, kNearest };

// A (N, C, H, W) tensor; strides count elements, and any strides are legal. data == nullptr: the tensor is not there.
struct TensorView {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

struct GatedScaleTransferParams {
  int64_t batch = 0;
  int64_t channels = 0;      // C
  int64_t out_channels = 0;  // C'; equals C without projection
  int64_t in_height = 0, in_width = 0;
  int64_t out_height = 0, out_width = 0;
  ScalarType dtype = ScalarType::kFloat32;  // of every tensor

  TensorView input;        // (N, C, H, W)
  TensorView gate;         // (N, 1, H, W): written by forward, read by backward
  TensorView gate_weight;  // (1, C, 1, 1)
  TensorView gate_bias;    // (1,) at stride_n; forward only, may be absent
  TensorView weight;       // (C', C, 1, 1), may be absent
  TensorView bias;         // (C',) at stride_n; forward only, may be absent
  TensorView output;       // (N, C', H', W'): forward only

  // Backward only. The parameters' gradients are contiguous; those of weight and bias are absent without weight.
  TensorView grad_output;  // (N, C', H', W')
  TensorView grad_gate;    // (N, 1, H, W), may be absent
  TensorView grad_input;   // (N, C, H, W)
  void* grad_gate_weight = nullptr;
  void* grad_gate_bias = nullptr;
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;
};

}  // namespace gsto
