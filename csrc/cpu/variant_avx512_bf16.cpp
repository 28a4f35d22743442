#include "cpu/isa_headers.h"

#ifdef GSTO_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define GSTO_ISA avx512_bf16
#define GSTO_VECTOR_BYTES 64
#define GSTO_BFLOAT16_INSTRUCTIONS
#include "cpu/isa_kernels.h"

namespace gsto::cpu {
const Kernels kAvx512Bf16Kernels = avx512_bf16::kernels("avx512_bf16");
}
#endif
