// The gate's backward on one tile of pixels, for every kernel that has du = d/d(g x) at hand:
//   dl = (du . x + grad_gate) g (1 - g),  dx = g du + rho dl,  and the sums of dl x and dl over the pixels.
#pragma once

#include "cuda/tile.h"

namespace gsto::cuda {

struct GateBackwardOperands {
  const void* input;
  const void* gate;
  const void* gate_weight;
  const void* grad_gate;  // or null
  bool relu;              // x acted through relu(g x)
  void* grad_input;
};

constexpr int kGateScratch = 4 * kTilePixels + 4 * kTilePixels;  // floats: reductions, then dots, gates, dl

// A unit of du comes in two steps: du.load(p, channel, count) may start loads, du.get(what it returned, p, channel,
// count, values) ends them. totals: C + 1 sums in shared memory. `whole`: see load_vector; for x and grad_input.
template <class T, bool kLast, class Whole, class Du>
GSTO_DEVICE void gate_backward_tile(const GateBackwardOperands& o, const PixelTile& tile, int channels, float* scratch,
                                    float* totals, Whole whole, const Du& du) {
  float* dots = scratch + 4 * kTilePixels;
  float* gates = dots + kTilePixels;
  float* dlogits = gates + kTilePixels;
  const T* input = static_cast<const T*>(o.input);
  T* grad_input = static_cast<T*>(o.grad_input);

  struct Unit {
    Vec16 x;
    decltype(du.load(0, 0, 0)) gradient;
  };
  const auto offset_at = [&](int p, int channel) {
    return offset_of<kLast>(tile.image, channels, tile.pixels(), channel, tile.index(p));
  };
  const auto load = [&](int p, int channel) {
    Unit unit = {};
    const int count = unit_count<T, kLast>(tile, channels, p, channel);
    if (count > 0) {
      unit.x = load_vector(input + offset_at(p, channel), count, whole);
      unit.gradient = du.load(p, channel, count);
    }
    return unit;
  };
  const auto unpack_unit = [&](const Unit& unit, int p, int channel, int count, float (&x)[kVector<T>],
                               float (&u)[kVector<T>]) {
    unpack<T>(unit.x, x);
    du.get(unit.gradient, p, channel, count, u);
    if (o.relu) {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) u[j] = x[j] > 0 ? u[j] : 0.f;
    }
  };

  sum_channels<T, kLast, 1, kVector<T>>(channels, scratch, dots, load,
                                        [&](int p, int channel, const Unit& unit, auto& sums) {
                                          const int count = unit_count<T, kLast>(tile, channels, p, channel);
                                          if (count == 0) return;
                                          float x[kVector<T>], u[kVector<T>];
                                          unpack_unit(unit, p, channel, count, x, u);
#pragma unroll
                                          for (int j = 0; j < kVector<T>; ++j)
                                            if (j < count) sums[0][kLast ? 0 : j] += x[j] * u[j];
                                        });

  const int tid = static_cast<int>(threadIdx.x);
  if (tid < kTilePixels) {
    float gate = 0, dlogit = 0;
    if (tile.valid(tid, 1) != 0) {
      const int64_t pixel = tile.image * tile.pixels() + tile.index(tid);
      gate = load_scalar<T>(o.gate, pixel);
      dlogit = dots[tid] + (o.grad_gate != nullptr ? load_scalar<T>(o.grad_gate, pixel) : 0.f);
      dlogit *= gate * (1.f - gate);
    }
    gates[tid] = gate;
    dlogits[tid] = dlogit;
  }
  sync_threads();
  if (tid < 32) {
    float sum = dlogits[tid] + dlogits[tid + 32];
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (tid == 0) totals[channels] += sum;
  }

  walk_units<T, kLast, 1>(0, channels, scratch, totals, 0, [&](int p, int channel, auto& sums) {
    const int count = unit_count<T, kLast>(tile, channels, p, channel);
    if (count == 0) return;
    float x[kVector<T>], u[kVector<T>];
    unpack_unit(load(p, channel), p, channel, count, x, u);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      if (j >= count) continue;
      const int pixel = kLast ? p : p + j;
      const float dlogit = dlogits[pixel];
      u[j] = gates[pixel] * u[j] + load_scalar<T>(o.gate_weight, kLast ? channel + j : channel) * dlogit;
      sums[0][kLast ? j : 0] += dlogit * x[j];
    }
    store_unit(grad_input + offset_at(p, channel), count, whole.value, u);
  });
  sync_threads();
}

template <class T, bool kLast>
GSTO_DEVICE bool gate_backward_whole(const GateBackwardOperands& o, int channels, int width) {
  const int64_t row = kLast ? channels : width;
  return vectorizable<T>(o.input, row) && vectorizable<T>(o.grad_input, row);
}

}  // namespace gsto::cuda
