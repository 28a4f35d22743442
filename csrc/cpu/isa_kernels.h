// The kernels, for the instruction set named by GSTO_ISA and GSTO_VECTOR_BYTES; one variant includes this once.
// The order matters: each of these is written in terms of the ones before it.
// clang-format off
#include "cpu/vec.h"
#include "cpu/gemm.h"
#include "cpu/tiles.h"
#include "cpu/gate.h"
#include "cpu/blocks.h"
#include "cpu/maps.h"
#include "cpu/operands.h"
#include "cpu/gated_scale_transfer_kernel.h"
// clang-format on
