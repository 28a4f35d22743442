// The instruction set that every machine of this architecture has.
#include "cpu/isa_headers.h"

#define GSTO_ISA baseline
#define GSTO_VECTOR_BYTES 16
#include "cpu/isa_kernels.h"

namespace gsto::cpu {
const Kernels kBaselineKernels = baseline::kernels("baseline");
}
