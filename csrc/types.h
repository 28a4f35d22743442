// What the kernels of all devices share. No torch header: device code includes this file too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GSTO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GSTO_HOST_DEVICE inline
#endif

namespace gsto {

enum class ScalarType { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum class ResampleMode { kBilinear, kAvg, kNearest };

enum class LabelType { kInt64, kInt32, kUint8 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace gsto
