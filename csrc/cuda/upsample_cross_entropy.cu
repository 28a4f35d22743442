// Upsampling and cross-entropy in one pass each way: see upsample_cross_entropy.h. Per head of 8 x 19 x 128 x 256
// bfloat16 logits and 512 x 1024 int64 labels: forward 60 MB, backward 70 MB; what takes the time is 80 million pairs
// of label and class, each with an exponential (22 us of an H200 at 16 per cycle and multiprocessor) and some 15 other
// instructions. A lane is a column of labels, so that a warp reads adjacent logits, or the same ones.
#include <cmath>

#include "cuda/tile.h"
#include "cuda/upsample_cross_entropy.h"

namespace gsto::cuda {
namespace {

constexpr float kLowest = -3e38f;  // for a logit of -inf, which a weight of zero would turn into NaN
constexpr int kChunk = 4;          // classes between two looks at the maximum
constexpr int kWarps = kThreads / 32;

GSTO_DEVICE int64_t load_label(const LossMaps& p, int64_t at) {
  if (p.label_type == LabelType::kInt64) return static_cast<const int64_t*>(p.target)[at];
  if (p.label_type == LabelType::kInt32) return static_cast<const int32_t*>(p.target)[at];
  return static_cast<const uint8_t*>(p.target)[at];
}

// A label and its weight in the loss: zero where it is ignored.
struct Label {
  int value = -1;  // -1: ignored, or no class
  float weight = 0;
  bool bad = false;

  GSTO_DEVICE Label() {}
  GSTO_DEVICE Label(const LossMaps& p, int64_t at) {
    const int64_t label = load_label(p, at);
    if (label == p.ignore_index) return;
    bad = label < 0 || label >= p.channels;
    if (!bad) value = static_cast<int>(label);
    weight = bad || p.weight == nullptr ? 1.f : p.weight[label];
  }
};

// The taps of a column of labels, as offsets in a row of logits.
struct Column {
  int first = 0, second = 0;
  float first_weight = 1, second_weight = 0;

  GSTO_DEVICE Column() {}
  GSTO_DEVICE Column(const LossMaps& p, int w) {
    const Taps<float> taps = taps_of(p.cols, w);
    first = taps.start * static_cast<int>(p.stride_w);
    second = first + static_cast<int>(p.stride_w);
    first_weight = taps.first;
    if (taps.count > 1) second_weight = taps.rest;
  }

  template <class T>
  GSTO_DEVICE float load(const T* row) const {
    float value = first_weight * to_float(row[first]);
    if (second_weight != 0) value += second_weight * to_float(row[second]);
    return value < kLowest ? kLowest : value;  // keeps NaN
  }
};

// The sums over the block, in every thread. All threads take part.
GSTO_DEVICE void sum_block(float (&sums)[2], float* memory) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sums[s] += shuffle_xor(sums[s], mask);
    if (threadIdx.x % 32 == 0) memory[s * kWarps + threadIdx.x / 32] = sums[s];
  }
  sync_threads();
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    sums[s] = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sums[s] += memory[s * kWarps + warp];
  }
}

// A warp makes kRows rows of 32 labels, which read kTaps rows of logits.
template <class T, int kRows, int kTaps>
GSTO_KERNEL(kThreads, 4)
upsample_cross_entropy(const UpsampleCrossEntropyParams p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int across = (p.cols.out + 31) / 32, down = (p.rows.out + kWarps * kRows - 1) / (kWarps * kRows);
  const int w = static_cast<int>(blockIdx.x % across) * 32 + lane;
  const int h0 = (static_cast<int>(blockIdx.x / across % down) * kWarps + warp) * kRows;
  const int64_t n = blockIdx.x / across / down;
  float sums[2] = {};
  if (w < p.cols.out && h0 < p.rows.out) {
    const Column column(p, w);
    const T* rows[kTaps];
    const int first = taps_of(p.rows, h0).start;
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const int i = first + k < p.rows.in ? first + k : p.rows.in - 1;
      rows[k] = static_cast<const T*>(p.input) + n * p.stride_n + i * p.stride_h;
    }
    float weights[kRows][kTaps];
    Label labels[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int h = h0 + r < p.rows.out ? h0 + r : p.rows.out - 1;
      const Taps<float> taps = taps_of(p.rows, h);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const int t = first + k - taps.start;
        weights[r][k] = t == 0 ? taps.first : t == 1 && taps.count > 1 ? taps.rest : 0.f;
      }
      if (h0 + r < p.rows.out) labels[r] = Label(p, (n * p.rows.out + h) * p.cols.out + w);
    }

    float top[kRows], total[kRows], picked[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) top[r] = kLowest, total[r] = picked[r] = 0;
    for (int c0 = 0; c0 < p.channels; c0 += kChunk) {
      float score[kChunk][kRows];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (c0 + j < p.channels) {
          float value[kTaps];
#pragma unroll
          for (int k = 0; k < kTaps; ++k) value[k] = column.load(rows[k] + (c0 + j) * p.stride_c);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            score[j][r] = 0;
#pragma unroll
            for (int k = 0; k < kTaps; ++k) score[j][r] += weights[r][k] * value[k];
            if (labels[r].value == c0 + j) picked[r] = score[j][r];
          }
        } else {
#pragma unroll
          for (int r = 0; r < kRows; ++r) score[j][r] = kLowest;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float higher = top[r];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) higher = fmaxf(higher, score[j][r]);  // a NaN shows in the sum
        total[r] *= fast_exp(top[r] - higher);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) total[r] += fast_exp(score[j][r] - higher);
        top[r] = higher;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (h0 + r >= p.rows.out) continue;
      const Label& label = labels[r];
      const float logsumexp = label.bad ? NAN : top[r] + logf(total[r]);
      const int64_t at = (n * p.rows.out + h0 + r) * p.cols.out + w;
      const float loss = label.weight != 0 ? label.weight * (logsumexp - picked[r]) : 0.f;
      p.logsumexp[at] = logsumexp;
      if (p.loss != nullptr) p.loss[at] = loss;
      sums[0] += loss;
      sums[1] += label.weight;
    }
  }
  if (p.sums == nullptr) return;
  sum_block(sums, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x != 0) return;
  p.sums[2 * static_cast<int64_t>(blockIdx.x)] = sums[0];
  p.sums[2 * static_cast<int64_t>(blockIdx.x) + 1] = sums[1];
}

GSTO_KERNEL(kThreads, 4)
total_loss(const TotalLossParams p) {
  float sums[2] = {};
  for (int64_t i = threadIdx.x; i < p.blocks; i += kThreads) {
    sums[0] += p.sums[2 * i];
    sums[1] += p.sums[2 * i + 1];
  }
  sum_block(sums, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x != 0) return;
  if (p.mass != nullptr) {
    *p.mass = sums[1];
    if (sums[1] != 0) sums[0] /= sums[1];  // no labelled pixel: 0
  }
  *p.loss = sums[0];
}

// The first label of a cell: 0 for cells before the first one, the number of labels for those behind the last.
GSTO_DEVICE int cell_begin(const Axis& axis, int cell) {
  if (cell <= 0) return 0;
  int begin, end;
  readers_of(axis, cell < axis.in ? cell - 1 : axis.in - 1, begin, end);
  return end;
}

constexpr int kPitch = kLossClasses + 1;  // floats per column of labels: odd, so that a warp's writes do not conflict

// A block makes `height` x `logits` gradients of up to kLossClasses classes. A thread is a column of labels and walks
// down the cells; of each class it holds the two rows of logits around the cell and the two sums for them. When a row
// of logits has seen both of its cells, the threads add up the columns of each logit.
template <class T>
GSTO_KERNEL(kThreads, 4)
upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams p) {
  const int tid = static_cast<int>(threadIdx.x);
  float* to_first = reinterpret_cast<float*>(shared_memory());  // what a column adds to its first tap
  float* to_second = to_first + kThreads * kPitch;
  float* result = to_second + kThreads * kPitch;                // of a logit whose labels do not fit the threads
  int* begins = reinterpret_cast<int*>(result + kLossClasses);  // of the cells from j0 - 1 on
  const int groups = (p.channels + p.classes - 1) / p.classes;
  const int across = (p.cols.in + p.logits - 1) / p.logits, down = (p.rows.in + p.height - 1) / p.height;
  const int64_t block = blockIdx.x / groups;
  const int c0 = static_cast<int>(blockIdx.x % groups) * p.classes;
  const int classes = p.channels - c0 < p.classes ? p.channels - c0 : p.classes;
  const int j0 = static_cast<int>(block % across) * p.logits, i0 = static_cast<int>(block / across % down) * p.height;
  const int logits = p.cols.in - j0 < p.logits ? p.cols.in - j0 : p.logits;
  const int i1 = p.rows.in - i0 < p.height ? p.rows.in : i0 + p.height;
  const int64_t n = block / across / down;
  const T* input = static_cast<const T*>(p.input) + n * p.stride_n + c0 * p.stride_c;
  T* grad_input = static_cast<T*>(p.grad_input) + n * p.stride_n + c0 * p.stride_c + j0 * p.stride_w;
  for (int q = tid; q < logits + 2; q += kThreads) begins[q] = cell_begin(p.cols, j0 - 1 + q);
  if (tid < kLossClasses) result[tid] = 0;
  float scale = 1;
  if (p.mass != nullptr && *p.mass != 0) scale = 1.f / *p.mass;
  sync_threads();
  const int w_end = begins[logits + 1];
  const bool windows = w_end - begins[0] > kThreads;  // then this is one logit: plan_loss_backward()

  int w0 = begins[0];
  do {
    const int w = w0 + tid;
    const bool valid = w < w_end;
    const Column column = valid ? Column(p, w) : Column();
    const auto load_row = [&](int i, float (&to)[kLossClasses]) {
      const T* row = input + (i < 0 ? 0 : i < p.rows.in ? i : p.rows.in - 1) * p.stride_h;
#pragma unroll
      for (int j = 0; j < kLossClasses; ++j) to[j] = valid && j < classes ? column.load(row + j * p.stride_c) : 0.f;
    };
    float upper[kLossClasses], lower[kLossClasses], sum[kLossClasses] = {}, next[kLossClasses] = {};
    int cell = i0 - 1;
    load_row(cell, upper);
    load_row(cell + 1, lower);

    const auto finish_cell = [&] {
      if (cell >= i0) {
#pragma unroll
        for (int j = 0; j < kLossClasses; ++j) {
          to_first[tid * kPitch + j] = column.first_weight * sum[j];
          to_second[tid * kPitch + j] = column.second_weight * sum[j];
        }
        sync_threads();
        for (int o = tid; o < logits * classes; o += kThreads) {
          const int q = p.format.channels_last ? o / classes : o % logits;
          const int j = p.format.channels_last ? o % classes : o / logits;
          float total = 0;
          const auto add = [&](const float* from, int begin, int end) {
            end = end - w0 < kThreads ? end - w0 : kThreads;
            for (int t = begin - w0 < 0 ? 0 : begin - w0; t < end; ++t) total += from[t * kPitch + j];
          };
          add(to_second, begins[q], begins[q + 1]);
          add(to_first, begins[q + 1], begins[q + 2]);
          if (windows) {
            result[j] += total;
          } else {
            from_float(total, grad_input[cell * p.stride_h + q * p.stride_w + j * p.stride_c]);
          }
        }
        sync_threads();
      }
#pragma unroll
      for (int j = 0; j < kLossClasses; ++j) sum[j] = next[j], next[j] = 0, upper[j] = lower[j];
      ++cell;
      load_row(cell + 1, lower);
    };

    const int h_end = cell_begin(p.rows, i1);
    for (int h = cell_begin(p.rows, i0 - 1); h < h_end; ++h) {
      const Taps<float> taps = taps_of(p.rows, h);
      while (cell < taps.start) finish_cell();
      if (!valid) continue;
      const int64_t at = (n * p.rows.out + h) * p.cols.out + w;
      const Label label(p, at);
      if (label.weight == 0) continue;
      const float logsumexp = p.logsumexp[at];
      const float factor = label.weight * (p.grad_loss[p.grad_is_map ? at : 0] * scale);
      const float first = taps.first, second = taps.count > 1 ? taps.rest : 0.f;
#pragma unroll
      for (int j = 0; j < kLossClasses; ++j) {
        if (j >= classes) continue;
        float value = factor * fast_exp(first * upper[j] + second * lower[j] - logsumexp);
        if (label.value == c0 + j) value -= factor;
        sum[j] += first * value;
        next[j] += second * value;
      }
    }
    while (cell < i1) finish_cell();
    w0 += kThreads;
  } while (w0 < w_end);
  if (windows && tid < classes) from_float(result[tid], grad_input[i0 * p.stride_h + tid * p.stride_c]);
}

// Calls f with a value of the maps' type; the layout is in the strides.
template <class F>
cudaError_t with_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::kFloat32) return f(float{});
  if (dtype == ScalarType::kBFloat16) return f(BFloat16{});
  if (dtype == ScalarType::kFloat16) return f(Float16{});
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_upsample_cross_entropy(const UpsampleCrossEntropyParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(loss_blocks(params, params.taps)));
  return with_type(params.format.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel) {
      return launch(kernel, grid, kThreads, 2 * kWarps * sizeof(float), stream, params);
    };
    if (params.taps == 3) return run(upsample_cross_entropy<T, 4, 3>);
    if (params.taps == 4) return run(upsample_cross_entropy<T, 4, 4>);
    return run(upsample_cross_entropy<T, 1, 2>);
  });
}

cudaError_t launch_total_loss(const TotalLossParams& params, cudaStream_t stream) {
  return launch(total_loss, dim3(1), kThreads, 2 * kWarps * sizeof(float), stream, params);
}

cudaError_t launch_upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams& params,
                                                   cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.batch * ceil_div(params.rows.in, params.height) *
                                        ceil_div(params.cols.in, params.logits) *
                                        ceil_div(params.channels, params.classes)));
  const size_t words = 2 * kThreads * kPitch + kLossClasses + static_cast<size_t>(params.logits) + 2;
  return with_type(params.format.dtype, [&](auto type) {
    return launch(upsample_cross_entropy_backward<decltype(type)>, grid, kThreads, words * sizeof(float), stream,
                  params);
  });
}

}  // namespace gsto::cuda
