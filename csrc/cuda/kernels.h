// The kernels' parameters and launchers. Feature maps are dense, NCHW or channels_last, all of one call in the same
// layout and dtype; the gate is contiguous (N, 1, H, W). Workspaces are float32. Every launcher returns CUDA's error
// code; nothing synchronises or allocates.
#pragma once

#include "axis.h"
#include "cuda/platform.h"
#include "plans.h"

namespace gsto::cuda {

// dtype and layout of all feature maps of a call.
struct Format {
  ScalarType dtype = ScalarType::kFloat32;
  bool channels_last = false;
  bool tf32 = false;  // float32 products may run on the tensor cores
};

// A gradient dz = grad + c0[channel] + c1[channel] * z, z and the coefficients being absent for a plain one. That is
// how the gradients of a batch's mean and variance reach dz without a pass of their own.
struct Gradient {
  const void* grad = nullptr;
  const void* z = nullptr;
  const float* c0 = nullptr;
  const float* c1 = nullptr;
};

// z = act(W (g x) + bias), and the gate.   Reads x once (again per further 64 output channels, from L1/L2), writes z
// and g.
struct ProjectParams {
  Format format;
  int64_t batch, pixels;  // pixels per image
  int channels, out_channels;
  const void* input;
  const void* weight;       // (C', C)
  const void* bias;         // (C',) or null
  const void* gate_weight;  // (C,): the gate is computed and written to `gate`; or null
  const void* gate_bias;    // (1,) or null
  void* gate;               // with gate_weight null: read, or not there at all
  bool relu;
  void* output;       // null: the gate alone
  float* statistics;  // (2, C', tiles): mean and sum of squared differences of every tile of 64 pixels, or null
  int row_tiles_per_block;
};
cudaError_t launch_project(const ProjectParams& params, cudaStream_t stream);

// du = W^T dz; then, with `input`, the gate's backward, dx = g du + rho dl with dl = (du . x + grad_gate) g (1 - g),
// and the sums over pixels of dl x and of dl. Reads dz and x once, writes dx once. Without `input` du itself is
// written.
struct ProjectBackwardParams {
  Format format;
  int64_t batch, pixels;
  int channels, out_channels;
  Gradient gradient;
  const void* weight;
  const void* input;
  const void* gate;
  const void* gate_weight;
  const void* grad_gate;  // or null
  void* grad_input;
  float* sums;  // (blocks, C + 1)
  int blocks, row_tiles_per_block;
};
cudaError_t launch_project_backward(const ProjectBackwardParams& params, cudaStream_t stream);

// Partial sums of grad_weight = sum_p dz (g x)^T and grad_bias = sum_p dz over ranges of pixels. Reads dz and x once
// per 64 x 64 tile of the weight.
struct WeightGradientParams {
  Format format;
  int64_t batch, pixels;
  int channels, out_channels;
  Gradient gradient;
  const void* input;
  const void* gate;     // or null: 1
  int64_t gate_stride;  // from image to image
  float* sums;          // (batch * splits, C' * C + C')
  int splits;           // ranges per image
  int64_t split_pixels;
};
cudaError_t launch_weight_gradient(const WeightGradientParams& params, cudaStream_t stream);

// dest = R act(scale * (g * source) + shift), every operand of it optional; transposed, dest = scale * m * R^T source
// with m = [act passes at scale * mask + shift], and the sums over pixels of m R^T source * (mask - mean) and of m R^T
// source. Reads the source once (its halos from L1/L2), writes dest once.
struct ResampleParams {
  Format format;
  int64_t batch;
  int channels;
  Axis rows, cols;
  bool transposed;
  const void* source;
  void* dest;
  const void* gate;    // forward only
  const float* scale;  // (C,)
  const float* shift;
  bool relu;
  const void* mask;   // transposed only: the map before the activation
  const float* mean;  // transposed only: (C,) or null: 0
  float* sums;        // transposed only: (blocks, 2, C) or null
  Tiling tiling;      // of dest
  int row_taps, col_taps;
  int blocks, channel_groups;
};
cudaError_t launch_resample(const ResampleParams& params, cudaStream_t stream);

// dest = R act(g x), g = sigmoid(rho . x + b): a block computes the gates of the inputs that its tile of outputs reads
// or owns, then reads those inputs again, from L1/L2. Reads x once, writes dest and g.
struct GateResampleParams {
  Format format;
  int64_t batch;
  int channels;
  Axis rows, cols;
  const void* input;
  const void* gate_weight;
  const void* gate_bias;
  void* gate;
  bool relu;
  void* dest;
  Tiling tiling;  // of dest
  int row_taps, col_taps;
  int region_pixels;  // most inputs of a tile
};
cudaError_t launch_gate_resample(const GateResampleParams& params, cudaStream_t stream);

// The gate's backward where du = R^T source is gathered on the fly: see ProjectBackwardParams for the formulas. Reads x
// once and the source (smaller, or of x's size) once, writes dx. dest may be the source when the axes are identities.
struct GateBackwardParams {
  Format format;
  int64_t batch;
  int channels;
  Axis rows, cols;
  const void* source;
  const void* input;
  const void* gate;
  const void* gate_weight;
  const void* grad_gate;
  bool relu;      // the forward was R relu(g x)
  bool identity;  // R is: then the tiling has one row, of all pixels
  void* grad_input;
  float* sums;    // (blocks, C + 1)
  Tiling tiling;  // of the input
  int row_taps, col_taps;
  int blocks;
};
cudaError_t launch_gate_backward(const GateBackwardParams& params, cudaStream_t stream);

// to[i] = sum_r from[r * stride + i], in a fixed order, over sqrt(variance[i] + eps) where given; from i = tail_begin
// on to tail[i - tail_begin], which may be null.
struct SumRowsParams {
  const float* from;
  int64_t rows, stride, count;
  ScalarType dtype;
  void* to;
  void* tail;
  int64_t tail_begin;
  const float* variance = nullptr;
  float eps = 0;
};
cudaError_t launch_sum_rows(const SumRowsParams& params, cudaStream_t stream);

// Merges the tiles' statistics (2, C, tiles) into mean and biased variance.
struct MergeStatisticsParams {
  const float* statistics;
  int channels;
  int64_t tiles, tiles_per_image, tile_pixels, pixels;  // pixels per image: the last tile of an image may be partial
  float* mean;
  float* variance;
};
cudaError_t launch_merge_statistics(const MergeStatisticsParams& params, cudaStream_t stream);

// c0 = (grad_mean - 2 grad_var mean) / count, c1 = 2 grad_var / count.
struct StatisticsGradientParams {
  const float *mean, *grad_mean, *grad_variance;  // the gradients or null
  int channels;
  double count;
  float *c0, *c1;
};
cudaError_t launch_statistics_gradient(const StatisticsGradientParams& params, cudaStream_t stream);

// K gates of one map and what they gate: projected_k = gate_k (W_k x), with the statistics of MergeStatisticsParams,
// for the first gates, copied_k = gate_k x for the next ones. Reads x once (again from L1/L2), writes all of these.
struct GatedSplitParams {
  Format format;
  int64_t batch, pixels;
  int channels, gates, projections, copies;
  const void* input;
  const void* gate_weight;  // (K, C)
  const void* gate_bias;    // (K,) or null
  bool relu;                // of the logits
  void* gate;               // (N, K, H, W)
  const void* weight;       // (sum of C_k, C)
  int row_begin[kMaxGates + 1];
  void* projected[kMaxGates];
  float* statistics;  // (2, sum of C_k, tiles)
  void* copied[kMaxGates];
  int row_tiles_per_block;
};
cudaError_t launch_gated_split(const GatedSplitParams& params, cudaStream_t stream);

// The backward of the above with du_k = d/d(gate_k x) at hand for the first `grads` gates: dl_k = (du_k . x +
// grad_gate_k) g_k (1 - g_k), dx = sum_k g_k du_k + rho_k dl_k, and partial sums over pixels of dl_k x and of dl_k.
// Reads x and the du_k once (again from L1/L2), writes dx.
struct GatedSplitBackwardParams {
  Format format;
  int64_t batch, pixels;
  int channels, gates, grads;
  const void* input;
  const void* gate;
  const void* gate_weight;
  const void* grad_gate;  // or null
  const void* grad[kMaxGates];
  bool relu;
  void* grad_input;
  float* sums;  // (blocks, K C + K)
  int blocks;
};
cudaError_t launch_gated_split_backward(const GatedSplitBackwardParams& params, cudaStream_t stream);

// A pass over maps element by element, their pixels being counted as `batch` images.
struct StripParams {
  Format format;
  StripPlan plan;
  int channels;
  int64_t pixels;  // per image
};

// Partial means and sums of squared differences (2, C, fold * blocks): see MergeStatisticsParams. Reads the map once.
struct ChannelStatisticsParams : StripParams {
  const void* input;
  float* statistics;
};
cudaError_t launch_channel_statistics(const ChannelStatisticsParams& params, cudaStream_t stream);

// What a batch norm has per channel; `variance` null: the term is taken as it is.
struct Norm {
  const float *mean, *variance, *weight, *bias;
  float eps;
};

// output = act(gate * input + sum_k ST(norm_k(term_k))), all of one size. Reads every map once, writes the output.
struct BatchNormSumParams : StripParams {
  const void* input;  // or null
  const void* gate;   // or null
  int terms;
  const void* term[kMaxTerms];
  Norm norm[kMaxTerms];
  bool relu;
  void* output;
};
cudaError_t launch_batch_norm_sum(const BatchNormSumParams& params, cudaStream_t stream);

// The same with terms of other sizes, bilinear or nearest: their taps come from L1/L2. The plan of strips is not used.
struct ResampledSumParams : BatchNormSumParams {
  int64_t batch;
  int64_t gate_stride;  // from image to image
  SumTilePlan tiles;
  Axis rows[kMaxTerms], cols[kMaxTerms];
  bool resampled[kMaxTerms];
};
cudaError_t launch_resampled_sum(const ResampledSumParams& params, cudaStream_t stream);

// dm = dy [y > 0], written where `grad_sum` is given, and partial sums over pixels of dm (term - mean), if there is a
// term, and of dm. Reads dy, y and the term once. With `norm.bias`, y is norm(term), and not read. The sums' second
// phase divides by the standard deviation.
struct BatchNormSumBackwardParams : StripParams {
  const void* grad_output;
  const void* output;  // or null: no ReLU
  const void* term;    // or null
  Norm norm;           // of the term: its mean; weight and bias, too, or neither
  void* grad_sum;      // or null
  float* sums;         // (blocks * fold, 2 or 1, C)
};
cudaError_t launch_batch_norm_sum_backward(const BatchNormSumBackwardParams& params, cudaStream_t stream);

// grad_k = scale_k (grad - sum / count - sum_k u_k / count), u_k = (term_k - mean_k) / sqrt(variance_k + eps), for
// terms that share grad; sum_k is over grad u_k. Reads grad and every term once (without sums, no term), writes the
// results. With `masked`, of a single term, grad counts where norm(term) > 0.
struct BatchNormSumTermsParams : StripParams {
  const void* grad;
  int terms;
  const void* term[kMaxTerms];
  Norm norm[kMaxTerms];
  bool masked;
  const float* sum;                  // (C,) or null: the statistics are constants
  const float* term_sum[kMaxTerms];  // (C,)
  const float* count[kMaxTerms];     // on the device, or null: pixels_counted
  float pixels_counted;
  void* grad_term[kMaxTerms];
};
cudaError_t launch_batch_norm_sum_terms(const BatchNormSumTermsParams& params, cudaStream_t stream);

// running = (1 - momentum) running + momentum batch for the mean and the unbiased variance of every norm, and one batch
// more; cumulative: 1 / batches for the momentum. No two norms have the same buffers.
struct UpdateRunningStatisticsParams {
  int norms;
  RunningStatistics norm[kMaxTerms];
  bool cumulative;
  double momentum;
};
cudaError_t launch_update_running_statistics(const UpdateRunningStatisticsParams& params, cudaStream_t stream);

// Phase one sums g_k x over the pyramid's tiles, reading x once; phase two adds up the tiles of each window.
struct PyramidParams {
  Format format;
  int64_t batch;
  int channels, height, width;
  Pyramid pyramid;
  const void* input;
  const void* gate_weight;  // (K, C)
  const void* gate_bias;    // (K,) or null
  void* gate;               // (N, K, H, W)
  float* sums;              // (N, cells_h, bands, cells_w, K, C)
  void* pooled;             // (N, C, bins), or (N, bins, C)
  bool pooled_channels_last;
};
cudaError_t launch_pyramid(const PyramidParams& params, cudaStream_t stream);

struct PyramidBackwardParams {
  Format format;
  int64_t batch;
  int channels, height, width;
  Pyramid pyramid;
  const void* grad_pooled;  // (N, C, bins)
  const void* input;
  const void* gate;
  const void* gate_weight;
  const void* grad_gate;  // or null
  float* scaled;          // (N, bins, C): grad_pooled over the windows' sizes
  void* grad_input;
  float* sums;  // (blocks, K C + K)
  int blocks;
};
cudaError_t launch_pyramid_backward(const PyramidBackwardParams& params, cudaStream_t stream);

}  // namespace gsto::cuda
