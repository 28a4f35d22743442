"""``gsto_ops::update_running_statistics_``: what batch norms in training mode do to their buffers, all norms of a sum at once.

It records no gradient. The number of batches stays on the device: nothing waits for it.
"""

from functools import partial
from typing import Any

import torch

from .. import reference
from .autograd import dispatch
from .library import define, libraries, operators

SCHEMA = (
    "(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] num_batches_tracked, Tensor[] mean, Tensor[] var, "
    "SymInt[] pixels, Tensor[] counts, float? momentum) -> ()"
)


def _fake(*operands: Any) -> None:
    return None


define(
    "update_running_statistics_",
    "update_running_statistics",
    "forward",
    SCHEMA,
    reference.update_running_statistics_,
    _fake,
)


def _count_versions(operands: tuple[Any, ...]) -> None:
    """For autograd to refuse gradients that need the values of before: the kernels write behind its back."""
    torch.autograd.graph.increment_version([*operands[0], *operands[1], *operands[2]])


def _in_place(overload: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, *operands: Any) -> None:
    _count_versions(operands)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *operands)


def _call(overload: torch._ops.OpOverload, *operands: Any) -> None:
    """The operator without the dispatcher's way through Python (4 us), where no layer above autograd has a say."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        overload(*operands)
        return
    _count_versions(operands)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        dispatch(overload._handle, *operands)


for namespace, library in libraries.items():
    overload = getattr(torch.ops, namespace).update_running_statistics_.default
    library.impl("update_running_statistics_", partial(_in_place, overload), "ADInplaceOrView", with_keyset=True)
    operators[namespace].update_running_statistics_ = partial(_call, overload)
