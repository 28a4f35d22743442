"""``torch.vmap`` over the operators: one call on a larger batch where that is the same, else one call per element."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Dims = tuple[Any, ...]  # one per value: the mapped dimension, None, or for a list a list of these


def vmap_rule(overload: torch._ops.OpOverload, maps: Sequence[str], info: Any, in_dims: Dims, *args: Any) -> Any:
    """The operator over the mapped dimensions, as ``torch.library.register_vmap`` asks for it.

    ``maps`` names the arguments (N, ...) of which every image makes the same image of all results: where nothing else is mapped,
    the mapped dimension and N become one batch. Gradients of weights and batch statistics are sums over one call's images,
    so operators with such results, and mapped weights, take one call per element. What an operator writes to has to be mapped.
    """
    arguments = overload._schema.arguments[: len(args)]  # left out at the end: its default
    names = [argument.name for argument in arguments]
    size = info.batch_size
    mapped = [name for name, dims in zip(names, in_dims, strict=True) if _is_mapped(dims)]
    if size == 0:
        raise ValueError(f"vmap of {overload} over {', '.join(mapped)} needs at least one element, got none")
    for argument, dims in zip(arguments, in_dims, strict=True):
        if argument.is_write and None in (dims if isinstance(dims, (list, tuple)) else [dims]):
            raise RuntimeError(
                f"vmap: {overload} cannot write to {argument.name} unless it is mapped, as {', '.join(mapped)} are: give every "
                "element its own (torch.func.stack_module_state)"
            )
    if set(mapped) <= set(maps):
        folded = [
            _each(_fold, value, dims, size) if name in maps else value
            for name, value, dims in zip(names, args, in_dims, strict=True)
        ]
        outputs = _each(_unfold, overload(*folded), None, size)
    else:
        elements = [
            overload(*(_each(_pick, value, dims, element) for value, dims in zip(args, in_dims, strict=True)))
            for element in range(size)
        ]
        outputs = _stack(elements)
    return outputs, _each(lambda *_: 0, outputs, None, 0)


def _each(function: Callable, value: Any, dims: Any, number: int) -> Any:
    """``function`` of a tensor, or of every tensor in a list or tuple; anything else as it is."""
    if isinstance(value, Tensor):
        return function(value, dims, number)
    if isinstance(value, (list, tuple)):
        every = dims if isinstance(dims, (list, tuple)) else [dims] * len(value)
        return type(value)(_each(function, v, d, number) for v, d in zip(value, every, strict=True))
    return value


def _is_mapped(dims: Any) -> bool:
    return any(map(_is_mapped, dims)) if isinstance(dims, (list, tuple)) else dims is not None


def _fold(value: Tensor, dim: int | None, size: int) -> Tensor:
    value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


def _unfold(value: Tensor, dim: None, size: int) -> Tensor:
    return value.unflatten(0, (size, value.shape[0] // size))


def _pick(value: Tensor, dim: int | None, element: int) -> Tensor:
    return value if dim is None else value.select(dim, element)


def _stack(elements: Sequence[Any]) -> Any:
    """Tensors stacked; of lists and tuples of tensors, the same with every entry stacked. No results: none."""
    if elements[0] is None:
        return None
    if isinstance(elements[0], Tensor):
        return torch.stack(list(elements))
    return type(elements[0])(_stack(parts) for parts in zip(*elements, strict=True))
