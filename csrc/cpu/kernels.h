// What the compiled variants of the CPU kernels share with the code that chooses and calls them. No torch header.
#pragma once

#include "cpu/resample.h"
#include "gated_scale_transfer.h"

namespace gsto::cpu {

using Task = void (*)(int64_t begin, int64_t end, void* context);

struct Call {
  GatedScaleTransferParams params;
  AxisView rows, cols;                        // input -> output
  AxisView rows_transposed, cols_transposed;  // output -> input
  int64_t threads = 1;
  void (*parallel_for)(int64_t tasks, Task task, void* context) = nullptr;
};

struct Kernels {
  const char* name;
  void (*gated_scale_transfer)(const Call&);
  void (*gated_scale_transfer_backward)(const Call&);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// GCC switches instruction sets inside a translation unit (#pragma GCC target), which keeps std code out of the switch.
#define GSTO_X86_VARIANTS 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace gsto::cpu
