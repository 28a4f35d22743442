#include "cpu/isa_headers.h"

#ifdef GSTO_X86_VARIANTS
#pragma GCC target("avx2,fma")
#define GSTO_ISA avx2
#define GSTO_VECTOR_BYTES 32
#include "cpu/isa_kernels.h"

namespace gsto::cpu {
const Kernels kAvx2Kernels = avx2::kernels("avx2");
}
#endif
