"""What the operators' registrations share: the library, the layout rule, autocast.

Each operator has a file of its own with its schema, default kernel, fake kernel and autograd formula, and is defined twice:

- ``torch.ops.gsto_ops``: the plain PyTorch form is the default kernel (CompositeExplicitAutograd), so every operator runs on
  every device; the compiled extensions override it for the devices that they have kernels for.
- ``torch.ops.gsto_triton``: the same operator with Triton's kernels, so that both can be called in one process.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .autograd import differentiable
from .batching import vmap_rule

libraries = {name: torch.library.Library(name, "DEF") for name in ("gsto_ops", "gsto_triton")}
# By namespace, the operators as functions: what torch.ops has, with less time per eager call (autograd.py).
operators = {name: SimpleNamespace() for name in libraries}
# The arguments that say how to resample, the same in every schema; scale_h and scale_w are F.interpolate's scale_factor.
RESAMPLING = "str mode, bool align_corners, float? scale_h, float? scale_w"


def layout_of(input: Tensor) -> torch.memory_format:
    """The memory format that results take from ``input``: channels_last when its channels are adjacent, else contiguous."""
    channels_last = input.stride(1) == 1 and input.stride(3) > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def scale_of(scale_h: float | None, scale_w: float | None) -> tuple[float, float] | None:
    return None if scale_h is None or scale_w is None else (scale_h, scale_w)


def empty_like_layout(input: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor of this shape in the layout of ``input``: what the native kernels allocate."""
    return input.new_empty(shape).to(memory_format=layout_of(input))


def register(
    name: str,
    schema: str,
    kernel: Callable,
    fake: Callable,
    backward_schema: str,
    backward_kernel: Callable,
    backward_fake: Callable,
    setup_context: Callable,
    backward: Callable,
    autocast: bool = True,
    maps: Sequence[str] = (),
    formula: Callable | None = None,
    triton: bool = True,
) -> None:
    """Defines ``name`` and ``name_backward`` in both namespaces with all that the dispatcher asks of them.

    ``backward`` is called with ``name_backward`` of the namespace of the forward call, the context, and the grads.
    ``maps`` is for ``torch.vmap``, see ``batching.vmap_rule``. ``formula`` is the operator in plain PyTorch,
    where ``kernel`` is not. Without ``triton`` there are no Triton kernels: ``kernel`` runs in both namespaces.
    """
    define(name, name, "forward", schema, kernel, fake, maps, triton)
    define(f"{name}_backward", name, "backward", backward_schema, backward_kernel, backward_fake, triton=triton)
    for namespace, library in libraries.items():
        packet = getattr(torch.ops, namespace)
        overload, backward_overload = getattr(packet, name).default, getattr(packet, f"{name}_backward").default
        function = differentiable(library, overload, formula or kernel, setup_context, backward, backward_overload)
        setattr(operators[namespace], name, function)
        if autocast:
            for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
                library.impl(name, _autocast_kernel(getattr(packet, name), device_type, key), key)


def define(
    operator: str,
    file: str,
    function: str,
    schema: str,
    kernel: Callable,
    fake: Callable,
    maps: Sequence[str] = (),
    triton: bool = True,
) -> None:
    """Defines ``operator`` in both namespaces; Triton's kernel of it is ``function`` in ``gsto_ops/triton/{file}.py``."""
    for namespace, library in libraries.items():
        library.define(operator + schema)
        if namespace == "gsto_ops" or not triton:
            library.impl(operator, kernel, "CompositeExplicitAutograd")
        else:
            for key in ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",):
                library.impl(operator, partial(_triton_kernel, file, function), key)
        torch.library.register_fake(f"{namespace}::{operator}", fake, lib=library)
        overload = getattr(getattr(torch.ops, namespace), operator).default
        setattr(operators[namespace], operator, overload)
        torch.library.register_vmap(f"{namespace}::{operator}", partial(vmap_rule, overload, maps), lib=library)


def _triton_kernel(name: str, direction: str, *args: Any) -> Any:
    # Imported at the first call: importing gsto_ops needs no Triton.
    return getattr(importlib.import_module(f"gsto_ops.triton.{name}"), direction)(*args)


def autocast_operands(device_type: str, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """``operands`` in autocast's dtype; as everywhere in PyTorch, float64 tensors and non-tensors stay as they are."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(operand: Any) -> Any:
        eligible = isinstance(operand, Tensor) and operand.is_floating_point() and operand.dtype != torch.float64
        return operand.to(dtype) if eligible else operand

    return tuple(cast(operand) for operand in operands)


def _autocast_kernel(operator: Callable, device_type: str, key: str) -> Callable:
    # torch.library.register_autocast casts to one fixed dtype; this follows the dtype of the surrounding torch.autocast.
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return operator(*autocast_operands(device_type, args))

    return kernel
