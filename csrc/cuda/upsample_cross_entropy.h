// Parameters, plans and launchers of the loss's kernels. Like kernels.h, without torch. Cells: the rows of labels that
// lie between logit rows k and k + 1 are cell k, columns alike.
#pragma once

#include <vector>

#include "cuda/kernels.h"

namespace gsto::cuda {

constexpr int kLossClasses = 8;  // that a block of the backward pass holds in its 128 registers; 10 spill

// All maps are dense: those of labels (N, H, W), the logits and their gradient in their format.
struct LossMaps {
  Format format;
  LabelType label_type;
  int64_t batch;
  int channels;
  Axis rows, cols;
  int64_t ignore_index;
  const void* input;  // (N, C, h, w)
  int64_t stride_n, stride_c, stride_h, stride_w;
  const void* target;   // (N, H, W)
  const float* weight;  // (C,) or null
};

// The log-sum-exp of every label's logits and the loss, or the sums of loss and weight per block. Reads the logits and
// labels once, writes 4 bytes per label, or 8.
struct UpsampleCrossEntropyParams : LossMaps {
  float* logsumexp;  // (N, H, W)
  float* loss;       // (N, H, W) or null
  float* sums;       // (blocks, 2) or null
  int taps;          // rows of logits that the rows of labels of a thread read
};
cudaError_t launch_upsample_cross_entropy(const UpsampleCrossEntropyParams& params, cudaStream_t stream);

// The loss from the sums; with `mass` it is divided by the sum of the weights, which is written there.
struct TotalLossParams {
  const float* sums;
  int64_t blocks;
  float *loss, *mass;
};
cudaError_t launch_total_loss(const TotalLossParams& params, cudaStream_t stream);

// The gradient. Reads the logits, labels, log-sum-exp and grad_loss once per kLossClasses classes (from L2 after the
// first), and the cells between two blocks twice; writes the gradient once.
struct UpsampleCrossEntropyBackwardParams : LossMaps {
  const float* logsumexp;
  const float* grad_loss;  // (N, H, W), or one number
  bool grad_is_map;
  const float* mass;   // divides grad_loss, or null
  void* grad_input;    // with the logits' strides
  int height, logits;  // of a block: rows and columns of the gradient
  int classes;
};
cudaError_t launch_upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams& params,
                                                   cudaStream_t stream);

// Rows of labels per thread: 4 read 3 rows of logits where there are 3 labels or more per logit, 4 where there are 2.
// Fewer labels per logit leave nothing to share.
inline int loss_rows(int taps) { return taps > 2 ? 4 : 1; }

inline int plan_loss_taps(const Axis& rows) {
  int most = 1;
  for (int h = 0; h < rows.out; h += 4)
    most = std::max(most, taps_of(rows, std::min(h + 3, rows.out - 1)).end() - taps_of(rows, h).start);
  return most > 4 ? 2 : std::max(most, 3);
}

inline int64_t loss_blocks(const LossMaps& p, int taps) {
  return p.batch * ceil_div(p.rows.out, 4 * loss_rows(taps)) * ceil_div(p.cols.out, 32);
}

// As many columns of logits as the labels of kThreads columns belong to; a single one may have more labels than that.
// Eight rows: one cell more is computed than belongs to them, 12 %.
inline void plan_loss_backward(UpsampleCrossEntropyBackwardParams& p) {
  std::vector<int> begin(static_cast<size_t>(p.cols.in) + 1, 0);  // of the cells
  for (int k = 1, o = 0; k <= p.cols.in; ++k) {
    while (o < p.cols.out && taps_of(p.cols, o).start < k) ++o;
    begin[static_cast<size_t>(k)] = o;
  }
  const auto widest = [&](int logits) {
    int labels = 0;
    for (int j = 0; j < p.cols.in; j += logits)
      labels = std::max(labels, begin[static_cast<size_t>(std::min(j + logits, p.cols.in))] -
                                    begin[static_cast<size_t>(std::max(j - 1, 0))]);
    return labels;
  };
  const int64_t estimate = int64_t{kThreads} * p.cols.in / p.cols.out + 1;
  p.logits = static_cast<int>(std::min<int64_t>({estimate, p.cols.in, kThreads}));
  while (p.logits > 1 && widest(p.logits) > kThreads) --p.logits;
  p.height = p.logits == 1 && widest(1) > kThreads ? 1 : 8;
  p.classes = static_cast<int>(ceil_div(p.channels, ceil_div(p.channels, kLossClasses)));
}

}  // namespace gsto::cuda
