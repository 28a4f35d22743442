// Parameters of the operators, as the CPU kernels see them. No torch header.
#pragma once

#include <cstdint>

#include "types.h"

namespace gsto::cpu {

// A (N, C, H, W) tensor; strides count elements, and any strides are legal. data == nullptr: the tensor is not there.
struct TensorView {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

// The gate and the projection, at the input's resolution: what gated_scale_transfer and gated_projection share.
struct GatedParams {
  ScalarType dtype = ScalarType::kFloat32;  // of every tensor
  int64_t batch = 0;
  int64_t channels = 0;      // C
  int64_t out_channels = 0;  // C'; equals C without projection
  int64_t in_height = 0, in_width = 0;
  bool relu = false;

  TensorView input;        // (N, C, H, W)
  TensorView gate;         // (N, 1, H, W): written by forward, read by backward
  TensorView gate_weight;  // (1, C, 1, 1)
  TensorView gate_bias;    // (1,) at stride_n; forward only, may be absent
  TensorView weight;       // (C', C, 1, 1), may be absent
  TensorView bias;         // (C',) at stride_n, may be absent

  // Backward only. The parameters' gradients are contiguous; those of weight and bias are absent without weight.
  TensorView grad_gate;   // (N, 1, H, W), may be absent
  TensorView grad_input;  // (N, C, H, W)
  void* grad_gate_weight = nullptr;
  void* grad_gate_bias = nullptr;
  void* grad_weight = nullptr;
  void* grad_bias = nullptr;  // may be absent
};

struct GatedScaleTransferParams : GatedParams {
  int64_t out_height = 0, out_width = 0;
  TensorView output;       // (N, C', H', W'): forward only
  TensorView grad_output;  // (N, C', H', W'): backward only
};

// The statistics and their gradients are (C',) at stride_n, of the accumulate type (float32; float64 for float64).
struct GatedProjectionParams : GatedParams {
  TensorView output;  // z (N, C', H, W): written by forward, read by backward
  TensorView mean;
  TensorView var;          // forward only
  TensorView grad_output;  // (N, C', H, W): backward only, as the rest
  TensorView grad_mean;    // may be absent
  TensorView grad_var;     // may be absent
};

struct AffineScaleTransferParams {
  ScalarType dtype = ScalarType::kFloat32;  // of the maps; scale, shift and their gradients are of the accumulate type
  int64_t batch = 0, channels = 0;
  int64_t in_height = 0, in_width = 0;
  bool relu = false;

  TensorView input;         // (N, C, H, W)
  TensorView scale, shift;  // (C,) at stride_n
  TensorView output;        // (N, C, H', W'): forward only

  TensorView grad_output;  // (N, C, H', W'): backward only, as the rest
  TensorView grad_input;   // (N, C, H, W)
  void* grad_scale = nullptr;
  void* grad_shift = nullptr;
};

struct GatedPyramidPoolParams {
  ScalarType dtype = ScalarType::kFloat32;  // of every tensor
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t levels = 0;                    // K
  const int64_t* bins = nullptr;         // (K,)
  int64_t row_cells = 0, col_cells = 0;  // pyramid.h
  const int64_t *row_cuts = nullptr, *col_cuts = nullptr;

  TensorView input;        // (N, C, H, W)
  TensorView gate;         // (N, K, H, W): written by forward, read by backward
  TensorView gate_weight;  // (K, C, 1, 1)
  TensorView gate_bias;    // (K,) at stride_n; forward only, may be absent
  TensorView pooled;       // (N, C, 1, sum of bins^2), contiguous: forward only

  TensorView grad_pooled;  // (N, C, 1, sum of bins^2): backward only, as the rest
  TensorView grad_gate;    // (N, K, H, W), may be absent
  TensorView grad_input;   // (N, C, H, W)
  void* grad_gate_weight = nullptr;
  void* grad_gate_bias = nullptr;
};

struct UpsampleCrossEntropyParams {
  ScalarType dtype = ScalarType::kFloat32;  // of the logits and their gradient; the rest is of the accumulate type
  LabelType label_type = LabelType::kInt64;
  int64_t batch = 0, channels = 0, in_width = 0;
  int64_t ignore_index = 0;
  int64_t* bad_label = nullptr;  // ignore_index; a label that is neither that nor a class is written here

  TensorView input;      // (N, C, h, w)
  TensorView target;     // (N, H, W): stride_c is unused, as in all maps of this shape
  TensorView weight;     // (C,) at stride_n, may be absent
  TensorView logsumexp;  // (N, H, W): written by forward, read by backward

  TensorView loss;           // (N, H, W): forward of "none" only
  double* totals = nullptr;  // the sum of the losses and of the weights: forward only

  TensorView grad_loss;   // (N, H, W), strides 0 for a scalar: backward only, as the rest
  double divisor = 1;     // of grad_loss
  TensorView grad_input;  // (N, C, h, w)
};

}  // namespace gsto::cpu
