// The one header through which the kernels see their platform. Under nvcc it maps to CUDA; with GSTO_EMULATE_CUDA the
// same sources compile as plain C++ and cuda/emulator.h runs every thread of a block as a fiber, which is how the
// kernels are tested on machines without a GPU.
//
// Kernels are templates `GSTO_KERNEL(threads, blocks) void name(const Params p)`; their shared memory is all dynamic,
// so that the emulator knows its exact size.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(GSTO_EMULATE_CUDA)
#include "cuda/emulator.h"
#elif !defined(__CUDACC__)
#include <cuda_runtime_api.h>  // the bindings, which call launchers
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GSTO_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define GSTO_DEVICE __device__ __forceinline__
#endif

namespace gsto::cuda {

struct alignas(16) Vec16 {
  uint32_t words[4];
};

#if !defined(GSTO_EMULATE_CUDA)
// While one is set (by cuda/module.cpp, on the calling thread), launches report their kernel to it and do nothing else.
struct LaunchProbe {
  virtual void see(const void* kernel, int threads, size_t shared_bytes) = 0;

 protected:
  ~LaunchProbe() = default;
};
LaunchProbe*& launch_probe();
#endif

#if defined(GSTO_EMULATE_CUDA)

inline char* shared_memory() { return emulator::shared_memory(); }
inline void sync_threads(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  emulator::sync_threads(line, file);
}
inline float shuffle_xor(float value, int mask) { return emulator::shuffle_xor(value, mask); }
template <class V>  // a pointer to a vector; the emulator checks its alignment
V* aligned(V* address) {
  emulator::check_aligned(address, sizeof(V));
  return address;
}
inline float fast_exp(float v) { return std::exp(v); }

inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) { return emulator::bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(Float16 v) { return emulator::half_to_float(v.bits); }
inline void from_float(float v, float& to) { to = v; }
inline void from_float(float v, BFloat16& to) { to.bits = emulator::float_to_bfloat16(v); }
inline void from_float(float v, Float16& to) { to.bits = emulator::float_to_half(v); }

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transpose) {
  emulator::load_matrices(to, row, transpose);
}
inline void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  emulator::mma_m16n8k16(acc, a, b, [](uint16_t bits) { return to_float(BFloat16{bits}); });
}
inline void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  emulator::mma_m16n8k16(acc, a, b, [](uint16_t bits) { return to_float(Float16{bits}); });
}
inline uint32_t to_tf32(float v) { return emulator::to_tf32(v); }
inline void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_m16n8k8(acc, a, b);
}

// Copies 16 bytes, of which the first `bytes` exist (the rest becomes zero), to shared memory behind the thread's back.
inline void copy_async(void* to, const void* from, int bytes) { emulator::copy_async(to, from, bytes); }
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>  // waits until at most so many of the thread's committed groups are under way
void wait_copies() {
  emulator::wait_copies(kPending);
}

template <class P>
cudaError_t launch(void (*kernel)(P), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, const P& params) {
  return emulator::launch(grid, threads, shared_bytes, [&] { kernel(params); });
}

#elif defined(__CUDACC__)

GSTO_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char gsto_shared_memory[];
  return gsto_shared_memory;
}
GSTO_DEVICE void sync_threads() { __syncthreads(); }
GSTO_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class V>
GSTO_DEVICE V* aligned(V* address) {
  return address;
}
GSTO_DEVICE float fast_exp(float v) { return __expf(v); }  // two instructions; relative error 2^-21 + |v| 2^-23

GSTO_DEVICE float to_float(float v) { return v; }
GSTO_DEVICE float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
GSTO_DEVICE float to_float(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
GSTO_DEVICE void from_float(float v, float& to) { to = v; }
GSTO_DEVICE void from_float(float v, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
GSTO_DEVICE void from_float(float v, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(v)); }

GSTO_DEVICE void load_matrices(uint32_t (&to)[4], const void* row, bool transpose) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (transpose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}
GSTO_DEVICE void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
GSTO_DEVICE void mma(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
GSTO_DEVICE uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
GSTO_DEVICE void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

GSTO_DEVICE void copy_async(void* to, const void* from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
GSTO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
GSTO_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// An empty grid is a legal call (an empty batch) and launches nothing. A probe sees the kernel instead of the GPU.
template <class P>
cudaError_t launch(void (*kernel)(P), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const P& params) {
  if (launch_probe() != nullptr) {
    launch_probe()->see(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
    return cudaSuccess;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more than that has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<P*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)), arguments,
                          shared_bytes, stream);
}

#endif

}  // namespace gsto::cuda
