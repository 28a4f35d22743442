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

// Numbers of any dtype and stride.
struct Vector {
  void* data = nullptr;
  int64_t stride = 0;
  ScalarType dtype = ScalarType::kFloat32;
};

// What a batch norm in training mode updates, and by what.
struct RunningStatistics {
  Vector running_mean, running_var, mean, var;  // (C,)
  Vector count;                                 // one number, or absent: pixels
  int64_t channels = 0;
  int64_t* batches = nullptr;
  double pixels = 0;
};

GSTO_HOST_DEVICE double moved(double running, double batch, double share) {
  return (1 - share) * running + share * batch;
}

}  // namespace gsto
