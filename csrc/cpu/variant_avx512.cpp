#include "cpu/isa_headers.h"

#ifdef GSTO_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define GSTO_ISA avx512
#define GSTO_VECTOR_BYTES 64
#include "cpu/isa_kernels.h"

namespace gsto::cpu {
const Kernels kAvx512Kernels = avx512::kernels("avx512");
}
#endif
