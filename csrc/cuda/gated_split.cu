// All that leaves one branch of a gated fusion, from one read: see GatedSplitParams. With projections, a block keeps 64
// pixels of x in flight through the product (the logits are summed from the product's own tiles), and then reads them
// again for the copies; without, it reads them twice, too. The second reading is 64 pixels later: from L1, or L2.
// Traffic per pixel: C elements of x, the sum of the C_k written, C per copy, K gates; x again from L1/L2 once per 64
// further rows of W and once for the copies; 8 bytes per projected channel and 64 pixels for the statistics.
#include "cuda/gated_split.h"
#include "cuda/project_tile.h"

namespace gsto::cuda {
namespace {

GSTO_DEVICE float gate_of(float logit, bool relu) { return sigmoid(relu && logit < 0 ? 0.f : logit); }

// copied_k = gate_k x for a tile; gates[gate * 64 + pixel] are in shared memory.
template <class T, bool kLast>
GSTO_DEVICE void write_copies(const GatedSplitParams& p, const PixelTile& tile, const float* gates) {
  using L = Lanes<T, kLast>;
  constexpr int kBatch = kLast ? 1 : 4;  // channel steps at once; channels_last has 4 passes at once
  const int64_t row = kLast ? p.channels : p.pixels;
  const bool whole = vectorizable<T>(p.input, row);
  for (int base = 0; base < p.channels; base += kBatch * L::kChannelStep) {
    Vec16 x[kBatch][L::kPasses] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int channel = L::channel(base + b * L::kChannelStep);
#pragma unroll
      for (int pass = 0; pass < L::kPasses; ++pass) {
        const int pixel = L::pixel(pass), count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
        if (channel >= p.channels || count == 0) continue;
        const int64_t at = offset_of<kLast>(tile.image, p.channels, p.pixels, channel, tile.index(pixel));
        x[b][pass] = load_vector(static_cast<const T*>(p.input) + at, count, whole);
      }
    }
    for (int k = 0; k < p.copies; ++k) {
      T* copied = static_cast<T*>(p.copied[k]);
      const float* gate = gates + (p.projections + k) * kTilePixels;
      const bool copied_whole = vectorizable<T>(copied, row);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int channel = L::channel(base + b * L::kChannelStep);
#pragma unroll
        for (int pass = 0; pass < L::kPasses; ++pass) {
          const int pixel = L::pixel(pass), count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
          if (channel >= p.channels || count == 0) continue;
          float values[kVector<T>];
          unpack<T>(x[b][pass], values);
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) values[j] *= gate[kLast ? pixel : pixel + j];
          const int64_t at = offset_of<kLast>(tile.image, p.channels, p.pixels, channel, tile.index(pixel));
          store_unit(copied + at, count, copied_whole, values);
        }
      }
    }
  }
}

template <class T>
GSTO_DEVICE void store_gate(const GatedSplitParams& p, const PixelTile& tile, int gate, int pixel, float value) {
  if (tile.valid(pixel, 1) == 0) return;
  from_float(value, static_cast<T*>(p.gate)[(tile.image * p.gates + gate) * p.pixels + tile.index(pixel)]);
}

// Gates and copies.
template <class T, bool kLast>
GSTO_KERNEL(kThreads, 4)
split_gates(const GatedSplitParams p) {
  float* weights = reinterpret_cast<float*>(shared_memory());
  float* scratch = weights + kGatesAtOnce * padded_row(p.channels);
  float* logits = scratch + kGatesAtOnce * 4 * kTilePixels;
  float* gates = logits + kGatesAtOnce * kTilePixels;
  const int tid = static_cast<int>(threadIdx.x);
  const PixelTile tile(Tiling{1, static_cast<int>(p.pixels), 1, kTilePixels}, blockIdx.x);
  const T* input = static_cast<const T*>(p.input);
  for (int first = 0; first < p.gates; first += kGatesAtOnce) {
    sync_threads();
    load_gate_weights<T>(p.gate_weight, first, p.gates, p.channels, weights);
    sync_threads();
    with_access(vectorizable<T>(p.input, kLast ? p.channels : p.pixels), [&](auto whole) {
      sum_channels<T, kLast, kGatesAtOnce, kVector<T>>(
          p.channels, scratch, logits,
          [&](int pixel, int channel) {
            const int count = unit_count<T, kLast>(tile, p.channels, pixel, channel);
            if (count == 0) return Vec16{};
            return load_vector(input + offset_of<kLast>(tile.image, p.channels, p.pixels, channel, tile.index(pixel)),
                               count, whole);
          },
          [&](int, int channel, const Vec16& loaded, auto& sums) {
            float x[kVector<T>];
            unpack<T>(loaded, x);
#pragma unroll
            for (int g = 0; g < kGatesAtOnce; ++g) {
              float weight[kVector<T>];
              gate_weights_at<T, kLast>(weights + g * padded_row(p.channels), channel, weight);
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j) sums[g][kLast ? 0 : j] += x[j] * weight[j];
            }
          });
    });
    for (int i = tid; i < kGatesAtOnce * kTilePixels; i += kThreads) {
      const int gate = first + i / kTilePixels, pixel = i % kTilePixels;
      if (gate >= p.gates) continue;
      const float bias = p.gate_bias != nullptr ? load_scalar<T>(p.gate_bias, gate) : 0.f;
      const float value = gate_of(logits[i] + bias, p.relu);
      gates[gate * kTilePixels + pixel] = value;
      store_gate<T>(p, tile, gate, pixel, value);
    }
  }
  sync_threads();
  write_copies<T, kLast>(p, tile, gates);
}

// Projections; and gates and copies, if there are no more gates than it can sum on the way: else it reads the gates.
template <class T, bool kLast, Float32Product kProduct>
GSTO_KERNEL(kThreads, kProductBlocks)
split_project(const GatedSplitParams p) {
  using Shared = ProjectShared<T, kLast>;
  char* memory = shared_memory();
  float* staged = reinterpret_cast<float*>(memory);
  float* gates = reinterpret_cast<float*>(memory + Shared::kUnion);
  float* weights = gates + kMaxGates * kTilePixels;
  const int tid = static_cast<int>(threadIdx.x);
  const PixelTile pixels(Tiling{1, static_cast<int>(p.pixels), 1, kTilePixels}, blockIdx.x);
  const bool makes_gates = p.gates <= kGatesAtOnce;
  if (makes_gates) {
    load_gate_weights<T>(p.gate_weight, 0, p.gates, p.channels, weights);
  } else {
    for (int i = tid; i < p.projections * kTilePixels; i += kThreads) {
      const int64_t gate = pixels.image * p.gates + i / kTilePixels;
      const int pixel = i % kTilePixels;
      gates[i] = pixels.valid(pixel, 1) != 0 ? load_scalar<T>(p.gate, gate * p.pixels + pixels.index(pixel)) : 0.f;
    }
  }
  const int64_t pixel0 = pixels.w0;
  const int count = p.pixels - pixel0 < kTilePixels ? static_cast<int>(p.pixels - pixel0) : kTilePixels;
  const Feature<T> x = feature_of<T, kLast>(p.input, pixels.image, p.pixels, p.channels).shifted(pixel0);

  // Every projection has row tiles of its own, and so one gate.
  const int first = static_cast<int>(blockIdx.y) * p.row_tiles_per_block, last = first + p.row_tiles_per_block;
  int tile = 0;
  for (int k = 0; k < p.projections; ++k) {
    const int rows = p.row_begin[k + 1] - p.row_begin[k];
    const Feature<T> w = feature_of<T, true>(
        static_cast<const T*>(p.weight) + static_cast<int64_t>(p.row_begin[k]) * p.channels, 0, rows, p.channels);
    for (int row0 = 0; row0 < rows; row0 += kTileRows, ++tile) {
      if (tile < first || tile >= last) continue;
      const bool sums_logits = makes_gates && tile == first;
      Accumulators acc;
      acc.clear();
      float logits[kGatesAtOnce] = {};  // two threads per pixel, each with half of the channels of a step
      multiply<T, kProduct, typename Shared::A, typename Shared::B>(
          w, row0, x, 0, p.channels, memory, acc, [&](int k0, const T*, const T* b) {
            if (!sums_logits) return;
            const int begin = tid % 2 * (kTileK<T> / 2);
            const int channels = p.channels - k0 - begin;
#pragma unroll 4
            for (int c = 0; c < kTileK<T> / 2; ++c) {
              if (c >= channels) continue;
              const float value = to_float(b[Shared::B::Tile::at(tid / 2, begin + c)]);
#pragma unroll
              for (int g = 0; g < kGatesAtOnce; ++g)
                logits[g] += weights[g * padded_row(p.channels) + k0 + begin + c] * value;
            }
          });
      if (sums_logits) {
#pragma unroll
        for (int g = 0; g < kGatesAtOnce; ++g) {
          const float logit = logits[g] + shuffle_xor(logits[g], 1);
          if (tid % 2 != 0 || g >= p.gates) continue;
          const float bias = p.gate_bias != nullptr ? load_scalar<T>(p.gate_bias, g) : 0.f;
          const float gate = gate_of(logit + bias, p.relu);
          gates[g * kTilePixels + tid / 2] = gate;
          if (blockIdx.y == 0) store_gate<T>(p, pixels, g, tid / 2, gate);
        }
        sync_threads();
      }
      const bool whole = vectorizable<T>(p.projected[k], kLast ? rows : p.pixels);
      ProductTile to = {p.projected[k], rows, p.pixels, pixels.image, pixel0, count, row0, whole};
      to.statistics = true;
      finish_tile<T, kLast>(acc, gates + k * kTilePixels, staged, to, [&](int m, float mean, float squares) {
        float* of = p.statistics + static_cast<int64_t>(p.row_begin[k] + m) * gridDim.x + blockIdx.x;
        of[0] = mean;
        of[static_cast<int64_t>(p.row_begin[p.projections]) * gridDim.x] = squares;
      });
    }
  }
  if (makes_gates && blockIdx.y == 0) write_copies<T, kLast>(p, pixels, gates);
}

}  // namespace

cudaError_t launch_gated_split(const GatedSplitParams& params, cudaStream_t stream) {
  const unsigned tiles = static_cast<unsigned>((params.pixels + kTilePixels - 1) / kTilePixels * params.batch);
  const size_t weights = static_cast<size_t>(kGatesAtOnce * padded_row(params.channels));
  if (params.projections == 0 || params.gates > kGatesAtOnce) {
    const size_t words = weights + 5 * kGatesAtOnce * kTilePixels + static_cast<size_t>(params.gates * kTilePixels);
    const cudaError_t error = dispatch(params.format, [&](auto type, auto last) {
      return launch(split_gates<decltype(type), last.value>, dim3(tiles), kThreads, words * sizeof(float), stream,
                    params);
    });
    if (error != cudaSuccess || params.projections == 0) return error;
  }
  int row_tiles = 0;
  for (int k = 0; k < params.projections; ++k)
    row_tiles += (params.row_begin[k + 1] - params.row_begin[k] + kTileRows - 1) / kTileRows;
  const int groups = (row_tiles + params.row_tiles_per_block - 1) / params.row_tiles_per_block;
  return dispatch_product(params.format, [&](auto type, auto last, auto product) {
    using T = decltype(type);
    const size_t bytes = ProjectShared<T, last.value>::kUnion + (kMaxGates * kTilePixels + weights) * sizeof(float);
    return launch(split_project<T, last.value, product.value>, dim3(tiles, static_cast<unsigned>(groups)), kThreads,
                  bytes, stream, params);
  });
}

}  // namespace gsto::cuda
