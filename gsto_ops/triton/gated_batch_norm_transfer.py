"""``gated_batch_norm_transfer`` in Triton: ``gated_projection`` and ``affine_scale_transfer`` one after the other."""

from typing import Any

from torch import Tensor

from ..reference.gated_batch_norm_transfer import backward_steps, forward_steps
from . import affine_scale_transfer, gated_projection


def forward(*operands: Any) -> tuple[Tensor, ...]:
    return forward_steps(gated_projection.forward, affine_scale_transfer.forward, *operands)


def backward(*operands: Any) -> tuple[Tensor, ...]:
    return backward_steps(gated_projection.backward, affine_scale_transfer.backward, *operands)
