#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

namespace gsto::cpu {
namespace {

bool runs_here([[maybe_unused]] const Kernels* kernels) {
#ifdef GSTO_X86_VARIANTS
  const bool bf16 = kernels == &kAvx512Bf16Kernels;
  if (kernels == &kAvx512Kernels || bf16)
    return (!bf16 || __builtin_cpu_supports("avx512bf16")) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (kernels == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{supported_kernels().front()};
  return kernels;
}

}  // namespace

std::vector<const Kernels*> compiled_kernels() {
#ifdef GSTO_X86_VARIANTS
  return {&kAvx512Bf16Kernels, &kAvx512Kernels, &kAvx2Kernels, &kBaselineKernels};
#else
  return {&kBaselineKernels};
#endif
}

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> supported;
  for (const Kernels* kernels : compiled_kernels())
    if (runs_here(kernels)) supported.push_back(kernels);
  return supported;
}

const Kernels& chosen_kernels() { return *chosen(); }

void choose_kernels(const std::string& name) {
  std::string allowed;
  for (const Kernels* kernels : supported_kernels()) {
    if (name == kernels->name) {
      chosen() = kernels;
      return;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("instruction set must be one of " + allowed + " on this machine, got '" + name + "'");
}

}  // namespace gsto::cpu
