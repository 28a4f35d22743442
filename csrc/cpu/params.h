// Parameters of the operators, as the CPU kernels see them. No torch header.
#pragma once

#include <cstdint>

#include "cpu/resample.h"
#include "types.h"

namespace gsto::cpu {

// A (N, C, H, W) tensor; strides count elements, and any strides are legal. data == nullptr: the tensor is not there.
struct TensorView {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

// The gate and the projection, at the input's resolution: what gated_scale_transfer, gated_projection and class_map
// share.
struct GatedParams {
  ScalarType dtype = ScalarType::kFloat32;  // of every tensor
  int64_t batch = 0;
  int64_t channels = 0;      // C
  int64_t out_channels = 0;  // C'; equals C without projection
  int64_t in_height = 0, in_width = 0;
  bool relu = false;

  TensorView input;        // (N, C, H, W)
  TensorView gate;         // (N, 1, H, W): written by forward, read by backward
  TensorView gate_weight;  // (1, C, 1, 1), absent without a gate
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

// A projection without a gate.
struct ClassMapParams : GatedParams {
  TensorView output;       // (N, C', H, W): forward only
  TensorView grad_output;  // (N, C', H, W): backward only
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

struct ChannelStatisticsParams {
  ScalarType dtype = ScalarType::kFloat32;  // of the map; the statistics are of the accumulate type
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  bool planar = false;  // see BatchNormSumParams

  TensorView input;  // (N, C, H, W)
  void* mean = nullptr;
  void* var = nullptr;
};

// A term of batch_norm_sum with its norm and its resampling.
struct NormTerm {
  int64_t height = 0, width = 0;
  bool low = false;                           // of another size than the output: resampled
  AxisView rows, cols;                        // term -> output, if low
  AxisView rows_transposed, cols_transposed;  // output -> term, if low: backward only

  TensorView map;       // (N, C, h, w)
  TensorView gathered;  // (N, C, h, w), if low: written by backward, read by backward_terms
  TensorView grad;      // (N, C, h, w): written by backward_terms
  // (C,) of the accumulate type, contiguous; absent without norms.
  const void *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  double eps = 0;
  double count = 0;  // pixels that the statistics are of: backward_terms only
};

struct BatchNormSumParams {
  ScalarType dtype = ScalarType::kFloat32;  // of the maps
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  // All maps are of one kind: their lines are contiguous, a row of pixels (channels_last), or one of a plane (planar).
  bool planar = false;
  bool relu = false;
  bool normed = false;
  NormTerm* terms = nullptr;
  int64_t term_count = 0;

  TensorView input;  // (N, C, H, W), may be absent
  TensorView gate;   // (N, 1, H, W) of any strides, may be absent
  TensorView output;

  TensorView grad_output;   // backward only, as the rest
  TensorView grad_sum;      // written by backward where there is a ReLU; read by backward_terms
  void* sums = nullptr;     // (1 + terms, C), without norms (1, C), of the accumulate type
  int64_t sums_row = 0;     // of the one term that backward_terms takes
  bool statistics = false;  // whether backward_terms includes what flows through the statistics
  // A single norm with ReLU behind it: where that was open is found from the term. backward writes no grad_sum then,
  // and backward_terms gets the gradient of the output in its place.
  bool masked_by_term = false;
};

struct GatedSplitParams {
  ScalarType dtype = ScalarType::kFloat32;  // of every tensor but the statistics
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t gates = 0;                      // K
  int64_t projections = 0, copies = 0;    // the first gates are of projections, the next ones of copies
  const int64_t* out_channels = nullptr;  // of each projection
  bool relu = false;                      // of the logits

  TensorView input;        // (N, C, H, W)
  TensorView gate_weight;  // (K, C, 1, 1)
  TensorView gate_bias;    // (K,) at stride_n, may be absent
  TensorView weight;       // (sum of out_channels, C, 1, 1), absent without projections
  TensorView gate;         // (N, K, H, W): written by forward, read by backward
  // Results of forward, gradients in backward.
  const TensorView* projected = nullptr;
  const TensorView* gated = nullptr;
  void *mean = nullptr, *var = nullptr;  // (sum of out_channels,) of the accumulate type: forward only

  TensorView grad_gate;   // (N, K, H, W), may be absent: backward only, as the rest
  TensorView grad_input;  // (N, C, H, W)
  void* grad_gate_weight = nullptr;
  void* grad_gate_bias = nullptr;
  void* grad_weight = nullptr;
};

}  // namespace gsto::cpu
