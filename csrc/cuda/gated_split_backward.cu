// The backward of gated_split once the du_k are maps: see GatedSplitBackwardParams. A block reads a tile twice, first
// for the dot products, then for the results; 64 pixels of 5 maps are 30 KiB at 48 channels, which L1 keeps.
// Traffic per pixel: C elements of x and of every du_k, C of dx, 2 K for the gates; all but dx again from L1/L2, x once
// more per du_k.
#include "cuda/gated_split.h"

namespace gsto::cuda {
namespace {

template <class T, bool kLast>
GSTO_KERNEL(kThreads, 3)
split_backward(const GatedSplitBackwardParams p) {
  constexpr int kSumScratch = kGatesAtOnce * 4 * 8 * kVector<T>;
  const int row = padded_row(p.channels), weight_rows = (p.gates + kGatesAtOnce - 1) / kGatesAtOnce * kGatesAtOnce;
  float* weights = reinterpret_cast<float*>(shared_memory());
  float* scratch = weights + weight_rows * row;
  float* dots = scratch + kSumScratch;
  float* gates = dots + kTilePixels;
  float* dlogits = gates + weight_rows * kTilePixels;
  float* totals = dlogits + weight_rows * kTilePixels;  // (weight_rows, C), then (K,)
  float* bias_totals = totals + weight_rows * p.channels;
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < weight_rows * p.channels + p.gates; i += kThreads) totals[i] = 0;
  for (int i = tid; i < weight_rows * kTilePixels; i += kThreads) gates[i] = dlogits[i] = 0;
  for (int first = 0; first < p.gates; first += kGatesAtOnce)
    load_gate_weights<T>(p.gate_weight, first, p.gates, p.channels, weights + first * row);

  const T* input = static_cast<const T*>(p.input);
  const Tiling tiling = {1, static_cast<int>(p.pixels), 1, kTilePixels};
  bool all_whole = true;
  for (int k = 0; k < p.grads; ++k) all_whole = all_whole && vectorizable<T>(p.grad[k], 0);
  const int64_t line = kLast ? p.channels : p.pixels;
  all_whole = all_whole && vectorizable<T>(p.input, line) && vectorizable<T>(p.grad_input, line);
  const int64_t tiles = p.batch * tiles_of(tiling);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const PixelTile tile(tiling, index);
    const auto offset_at = [&](int pixel, int channel) {
      return offset_of<kLast>(tile.image, p.channels, p.pixels, channel, tile.index(pixel));
    };
    with_access(all_whole, [&](auto whole) {
      struct Unit {
        Vec16 x, du;
      };
      for (int k = 0; k < p.gates; ++k) {
        const T* grad = static_cast<const T*>(k < p.grads ? p.grad[k] : nullptr);
        if (grad != nullptr) {
          sum_channels<T, kLast, 1, kVector<T>>(
              p.channels, scratch, dots,
              [&](int pixel, int channel) {
                Unit unit = {};
                const int count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
                if (count == 0) return unit;
                const int64_t at = offset_at(pixel, channel);
                unit.x = load_vector(input + at, count, whole);
                unit.du = load_vector(grad + at, count, whole);
                return unit;
              },
              [&](int, int, const Unit& unit, auto& sums) {  // elements that do not exist are zeros
                float x[kVector<T>], du[kVector<T>];
                unpack<T>(unit.x, x);
                unpack<T>(unit.du, du);
#pragma unroll
                for (int j = 0; j < kVector<T>; ++j) sums[0][kLast ? 0 : j] += x[j] * du[j];
              });
        }
        if (tid < kTilePixels) {
          float gate = 0, dlogit = 0;
          if (tile.valid(tid, 1) != 0) {
            const int64_t at = (tile.image * p.gates + k) * p.pixels + tile.index(tid);
            gate = load_scalar<T>(p.gate, at);
            dlogit =
                (grad != nullptr ? dots[tid] : 0.f) + (p.grad_gate != nullptr ? load_scalar<T>(p.grad_gate, at) : 0.f);
            dlogit *= gate * (1.f - gate);
            if (p.relu && !(gate > 0.5f)) dlogit = 0;  // sigmoid(ReLU) is 0.5 where the ReLU is closed
          }
          gates[k * kTilePixels + tid] = gate;
          dlogits[k * kTilePixels + tid] = dlogit;
        }
        sync_threads();
        if (tid < 32) {
          float sum = dlogits[k * kTilePixels + tid] + dlogits[k * kTilePixels + tid + 32];
          for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
          if (tid == 0) bias_totals[k] += sum;
        }
      }

      // dx, with the sums of the first gates on the way; the others' in further walks.
      for (int first = 0; first < p.gates; first += kGatesAtOnce) {
        float* to = totals + first * p.channels;
        walk_units<T, kLast, kGatesAtOnce>(
            0, p.channels, scratch, to, p.channels, [&](int pixel, int channel, auto& sums) {
              const int count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
              if (count == 0) return;
              const int64_t at = offset_at(pixel, channel);
              float x[kVector<T>], dx[kVector<T>] = {};
              unpack<T>(load_vector(input + at, count, whole), x);
              for (int begin = first; begin < (first == 0 ? p.gates : first + 1); begin += kGatesAtOnce) {
                Vec16 du[kGatesAtOnce] = {};
                if (first == 0) {
#pragma unroll
                  for (int g = 0; g < kGatesAtOnce; ++g)
                    if (begin + g < p.grads)
                      du[g] = load_vector(static_cast<const T*>(p.grad[begin + g]) + at, count, whole);
                }
#pragma unroll
                for (int g = 0; g < kGatesAtOnce; ++g) {
                  float u[kVector<T>], weight[kVector<T>];
                  unpack<T>(du[g], u);
                  gate_weights_at<T, kLast>(weights + (begin + g) * row, channel, weight);
#pragma unroll
                  for (int j = 0; j < kVector<T>; ++j) {
                    const int of = (begin + g) * kTilePixels + (kLast ? pixel : pixel + j);
                    dx[j] += gates[of] * u[j] + weight[j] * dlogits[of];
                    if (begin == first) sums[g][kLast ? j : 0] += dlogits[of] * x[j];
                  }
                }
              }
              if (first == 0) store_unit(static_cast<T*>(p.grad_input) + at, count, whole.value, dx);
            });
      }
      sync_threads();
    });
  }
  sync_threads();
  const int64_t words = static_cast<int64_t>(p.gates) * (p.channels + 1);
  for (int i = tid; i < words; i += kThreads)
    p.sums[blockIdx.x * words + i] = i < p.gates * p.channels ? totals[i] : bias_totals[i - p.gates * p.channels];
}

}  // namespace

cudaError_t launch_gated_split_backward(const GatedSplitBackwardParams& params, cudaStream_t stream) {
  const int weight_rows = (params.gates + kGatesAtOnce - 1) / kGatesAtOnce * kGatesAtOnce;
  return dispatch(params.format, [&](auto type, auto last) {
    using T = decltype(type);
    const int words = weight_rows * (padded_row(params.channels) + 2 * kTilePixels + params.channels) +
                      kGatesAtOnce * 4 * 8 * kVector<T> + kTilePixels + params.gates;
    return launch(split_backward<T, last.value>, dim3(static_cast<unsigned>(params.blocks)), kThreads,
                  static_cast<size_t>(words) * sizeof(float), stream, params);
  });
}

}  // namespace gsto::cuda
