// The kernels, for the instruction set named by GSTO_ISA and GSTO_VECTOR_BYTES; one variant includes this once.
// The order matters: each of these is written in terms of the ones before it.
// clang-format off
#include "cpu/vec.h"
#include "cpu/gemm.h"
#include "cpu/tiles.h"
#include "cpu/gate.h"
#include "cpu/rows.h"
#include "cpu/blocks.h"
#include "cpu/maps.h"
#include "cpu/operands.h"
#include "cpu/lines.h"
#include "cpu/planes.h"
#include "cpu/gated_pixels.h"
#include "cpu/gated_scale_transfer_kernel.h"
#include "cpu/gated_projection_kernel.h"
#include "cpu/class_map_kernel.h"
#include "cpu/affine_scale_transfer_kernel.h"
#include "cpu/pyramid_cells.h"
#include "cpu/pyramid_planes.h"
#include "cpu/gated_pyramid_pool_kernel.h"
#include "cpu/batch_norm_sum_kernel.h"
#include "cpu/channel_statistics_kernel.h"
#include "cpu/gated_split_kernel.h"
#include "cpu/upsample_cross_entropy_kernel.h"


namespace gsto::cpu::GSTO_ISA {
constexpr Kernels kernels(const char* name) {
  return {name,
          gated_scale_transfer,
          gated_scale_transfer_backward,
          gated_projection,
          gated_projection_backward,
          affine_scale_transfer,
          affine_scale_transfer_backward,
          gated_pyramid_pool,
          gated_pyramid_pool_backward,
          channel_statistics,
          batch_norm_sum,
          batch_norm_sum_backward,
          batch_norm_sum_backward_terms,
          gated_split,
          gated_split_backward,
          upsample_cross_entropy,
          upsample_cross_entropy_backward,
          class_map,
          class_map_backward};
}
}  // namespace gsto::cpu::GSTO_ISA
// clang-format on
