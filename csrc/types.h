// What the kernels of all devices share. No torch header: device code includes this file too.
#pragma once

namespace gsto {

enum class ScalarType { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum class ResampleMode { kBilinear, kAvg, kNearest };

}  // namespace gsto
