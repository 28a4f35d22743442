// A CUDA block on the CPU: every thread is a fiber, barriers and warp-wide operations switch between them. What it
// finds: shared memory read before it was written (it starts as NaN), writes past its end (guard zones), and barriers
// that only some of the threads reach. Blocks with an odd index run their threads in descending order, so that a
// missing barrier shows in one of the two directions. Vector accesses are checked for their alignment.
// cuda/emulator.cpp has the scheduler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define GSTO_KERNEL(threads, min_blocks) void
#define GSTO_DEVICE inline

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The built-in variables of the thread that runs now.
extern dim3 threadIdx, blockIdx, gridDim;

namespace gsto::cuda::emulator {

cudaError_t launch(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);
const char* last_error();  // what stopped the last launch that failed

char* shared_memory();
void sync_threads(int line, const char* file);
// Lets the 32 lanes of the warp exchange values: returns all of them, in lane order, valid until the next exchange.
const void* exchange(const void* value, size_t bytes);

// Stops the launch where a thread accesses so many bytes at an address that the hardware would refuse.
void check_aligned(const void* address, size_t bytes);

// Asynchronous copies happen when they are waited for, as late as the hardware may make them.
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int pending);

inline float bits_to_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t float_to_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline uint16_t float_to_bfloat16(float v) {
  const uint32_t bits = float_to_bits(v);
  if (v != v) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = h >> 15 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

inline uint16_t float_to_half(float v) {
  const uint16_t sign = static_cast<uint16_t>(float_to_bits(v) >> 16 & 0x8000);
  const float a = std::fabs(v);
  if (v != v) return sign | 0x7e00;
  if (a >= 65520.f) return sign | 0x7c00;
  if (a < 6.103515625e-05f)
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(a, 24))));
  uint32_t bits = float_to_bits(a);
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)));
}

inline uint32_t to_tf32(float v) { return (float_to_bits(v) + 0x1000) & 0xffffe000; }

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

inline float shuffle_xor(float value, int mask) {
  return static_cast<const float*>(exchange(&value, sizeof value))[lane() ^ mask];
}

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transpose) {
  const auto* rows = static_cast<const uint16_t* const*>(exchange(&row, sizeof row));
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t word = 0;
    for (int j = 0; j < 2; ++j) {
      const int major = lane() / 4, minor = 2 * (lane() % 4) + j;
      const uint16_t element = transpose ? rows[8 * matrix + minor][major] : rows[8 * matrix + major][minor];
      word |= static_cast<uint32_t>(element) << 16 * j;
    }
    to[matrix] = word;
  }
}

struct Operands {
  uint32_t a[4], b[2];
};

// The fragments' layouts are those of the PTX manual, mma.m16n8k16 (16-bit elements) and mma.m16n8k8 (tf32).
template <class Convert>
void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Convert convert) {
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* all = static_cast<const Operands*>(exchange(&mine, sizeof mine));
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), col = 2 * (lane() % 4) + i % 2;
    float sum = acc[i];
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2, shift = 16 * (k % 2);
      const uint32_t left = all[row % 8 * 4 + quad].a[row / 8 + 2 * (k / 8)] >> shift;
      const uint32_t right = all[col * 4 + quad].b[k / 8] >> shift;
      sum += convert(static_cast<uint16_t>(left)) * convert(static_cast<uint16_t>(right));
    }
    acc[i] = sum;
  }
}

inline void mma_m16n8k8(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* all = static_cast<const Operands*>(exchange(&mine, sizeof mine));
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), col = 2 * (lane() % 4) + i % 2;
    float sum = acc[i];
    for (int k = 0; k < 8; ++k)
      sum += bits_to_float(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]) *
             bits_to_float(all[col * 4 + k % 4].b[k / 4]);
    acc[i] = sum;
  }
}

}  // namespace gsto::cuda::emulator
