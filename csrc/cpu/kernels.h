// What the compiled variants of the CPU kernels share with the code that chooses and calls them. No torch header.
#pragma once

#include "cpu/params.h"
#include "cpu/resample.h"

namespace gsto::cpu {

using Task = void (*)(int64_t begin, int64_t end, void* context);

// What an operator's kernel gets besides its parameters.
struct Call {
  AxisView rows, cols;                        // input -> output
  AxisView rows_transposed, cols_transposed;  // output -> input: backward only
  void (*parallel_for)(int64_t tasks, Task task, void* context) = nullptr;
};

template <class Params>
using Kernel = void (*)(const Call&, const Params&);

struct Kernels {
  const char* name;
  Kernel<GatedScaleTransferParams> gated_scale_transfer, gated_scale_transfer_backward;
  Kernel<GatedProjectionParams> gated_projection, gated_projection_backward;
  Kernel<AffineScaleTransferParams> affine_scale_transfer, affine_scale_transfer_backward;
  Kernel<GatedPyramidPoolParams> gated_pyramid_pool, gated_pyramid_pool_backward;
  Kernel<ChannelStatisticsParams> channel_statistics;
  Kernel<BatchNormSumParams> batch_norm_sum, batch_norm_sum_backward, batch_norm_sum_backward_terms;
  Kernel<GatedSplitParams> gated_split, gated_split_backward;
  Kernel<UpsampleCrossEntropyParams> upsample_cross_entropy, upsample_cross_entropy_backward;
  Kernel<ClassMapParams> class_map, class_map_backward;
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
// GCC switches instruction sets inside a translation unit (#pragma GCC target), which keeps std code out of the switch.
#define GSTO_X86_VARIANTS 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;  // products of bfloat16 pairs
#endif

}  // namespace gsto::cpu
