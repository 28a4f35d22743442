// What the kernels of gated_split share: gate weights in shared memory, as floats in rows of whole quarters.
#pragma once

#include "cuda/tile.h"

namespace gsto::cuda {

constexpr int kGatesAtOnce = 4;  // of a reading of x

GSTO_HOST_DEVICE int padded_row(int channels) { return (channels + 7) / 8 * 8; }

// to[g * padded_row(C) + c] = weight of gate first + g, of kGatesAtOnce; zeros where there is none.
template <class T>
GSTO_DEVICE void load_gate_weights(const void* weight, int first, int gates, int channels, float* to) {
  const int row = padded_row(channels);
  for (int i = static_cast<int>(threadIdx.x); i < kGatesAtOnce * row; i += kThreads) {
    const int gate = first + i / row, c = i % row;
    to[i] = gate < gates && c < channels ? load_scalar<T>(weight, static_cast<int64_t>(gate) * channels + c) : 0.f;
  }
}

// The weights of a gate for a unit's channels (one of them in NCHW).
template <class T, bool kLast>
GSTO_DEVICE void gate_weights_at(const float* row, int channel, float (&to)[kVector<T>]) {
  if constexpr (!kLast) {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) to[j] = row[channel];
  } else {
#pragma unroll
    for (int j = 0; j < kVector<T>; j += 4) {
      float four[4];
      unpack<float>(*aligned(reinterpret_cast<const Vec16*>(row + channel + j)), four);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[j + i] = four[i];
    }
  }
}

}  // namespace gsto::cuda
