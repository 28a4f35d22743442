"""``torch.ops.gsto_ops``: schemas, fake kernels, autograd and autocast of the operators, for every device.

The plain PyTorch form is the operators' default kernel (CompositeExplicitAutograd), so they run on any device; the compiled
extension overrides it for the devices that it has kernels for.
"""

import torch
from torch import Tensor

from . import reference

library = torch.library.Library("gsto_ops", "DEF")
_RESAMPLING = "str mode, bool align_corners, float? scale_h, float? scale_w"
library.define(
    "gated_scale_transfer(Tensor input, Tensor gate_weight, Tensor? gate_bias, Tensor? weight, Tensor? bias, SymInt[2] size, "
    f"{_RESAMPLING}) -> (Tensor output, Tensor gate)"
)
library.define(
    "gated_scale_transfer_backward(Tensor grad_output, Tensor? grad_gate, Tensor input, Tensor gate, Tensor gate_weight, "
    f"Tensor? weight, {_RESAMPLING}) -> (Tensor grad_input, Tensor grad_gate_weight, Tensor grad_gate_bias, "
    "Tensor grad_weight, Tensor grad_bias)"
)


def layout_of(input: Tensor) -> torch.memory_format:
    """The memory format that results take from ``input``: channels_last when its channels are adjacent, else contiguous."""
    channels_last = input.stride(1) == 1 and input.stride(3) > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def _scale(scale_h: float | None, scale_w: float | None) -> tuple[float, float] | None:
    return None if scale_h is None or scale_w is None else (scale_h, scale_w)


@torch.library.impl("gsto_ops::gated_scale_transfer", "CompositeExplicitAutograd", lib=library)
def _forward(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    size: tuple[int, int],
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, Tensor]:
    output, gate = reference.gated_scale_transfer(
        input, gate_weight, gate_bias, weight, bias, (size[0], size[1]), mode, align_corners, _scale(scale_h, scale_w)
    )
    return output.contiguous(memory_format=layout_of(input)), gate.contiguous()


@torch.library.impl("gsto_ops::gated_scale_transfer_backward", "CompositeExplicitAutograd", lib=library)
def _backward(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    mode: str,
    align_corners: bool,
    scale_h: float | None,
    scale_w: float | None,
) -> tuple[Tensor, ...]:
    grad_input, *grads = reference.gated_scale_transfer_backward(
        grad_output, grad_gate, input, gate, gate_weight, weight, mode, align_corners, _scale(scale_h, scale_w)
    )
    return grad_input.contiguous(memory_format=layout_of(input)), *(grad.contiguous() for grad in grads)


@torch.library.register_fake("gsto_ops::gated_scale_transfer", lib=library)
def _forward_fake(input, gate_weight, gate_bias, weight, bias, size, mode, align_corners, scale_h, scale_w):  # type: ignore[no-untyped-def]
    batch, channels, height, width = input.shape
    channels = channels if weight is None else weight.shape[0]
    output = input.new_empty((batch, channels, *size)).to(memory_format=layout_of(input))
    return output, input.new_empty((batch, 1, height, width))


@torch.library.register_fake("gsto_ops::gated_scale_transfer_backward", lib=library)
def _backward_fake(grad_output, grad_gate, input, gate, gate_weight, weight, *resampling):  # type: ignore[no-untyped-def]
    return (
        input.new_empty(input.shape).to(memory_format=layout_of(input)),
        input.new_empty(gate_weight.shape),
        input.new_empty(1),
        input.new_empty(0 if weight is None else weight.shape),
        input.new_empty(0 if weight is None else weight.shape[0]),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, gate_weight, gate_bias, weight, bias, _, *ctx.resampling = inputs
    # The input and the gate are all that the backward pass keeps; the parameters are alive anyway.
    ctx.save_for_backward(input, output[1], gate_weight, gate_bias, weight, bias)
    ctx.size = tuple(output[0].shape[-2:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_output: Tensor | None, grad_gate: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    input, gate, gate_weight, gate_bias, weight, bias = ctx.saved_tensors
    mode, align_corners, scale_h, scale_w = ctx.resampling
    no_more = (None,) * (1 + len(ctx.resampling))
    if grad_output is None and grad_gate is None:
        return (None,) * 5 + no_more
    if grad_output is None:
        channels = input.shape[1] if weight is None else weight.shape[0]
        grad_output = input.new_zeros(()).expand(input.shape[0], channels, *ctx.size)
    if torch.is_grad_enabled():  # create_graph=True: a differentiable backward, in plain PyTorch
        operands = (input, gate_weight, gate_bias, weight, bias)
        outputs = reference.gated_scale_transfer(*operands, ctx.size, mode, align_corners, _scale(scale_h, scale_w))
        wanted = [i for i, operand in enumerate(operands) if operand is not None and ctx.needs_input_grad[i]]
        pairs = [(o, g) for o, g in zip(outputs, (grad_output, grad_gate), strict=True) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [operands[i] for i in wanted],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        by_index = dict(zip(wanted, found, strict=True))
        return *(by_index.get(i) for i in range(5)), *no_more
    grads = torch.ops.gsto_ops.gated_scale_transfer_backward(
        grad_output, grad_gate, input, gate, gate_weight, weight, mode, align_corners, scale_h, scale_w
    )
    present = (True, True, gate_bias is not None, weight is not None, bias is not None)
    return *(grad if there else None for grad, there in zip(grads, present, strict=True)), *no_more


torch.library.register_autograd("gsto_ops::gated_scale_transfer", _autograd, setup_context=_setup_context, lib=library)


def autocast_operands(device_type: str, operands: tuple) -> tuple:
    """``operands`` in autocast's dtype; as everywhere in PyTorch, float64 tensors and non-tensors stay as they are."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(operand):  # type: ignore[no-untyped-def]
        eligible = isinstance(operand, Tensor) and operand.is_floating_point() and operand.dtype != torch.float64
        return operand.to(dtype) if eligible else operand

    return tuple(cast(operand) for operand in operands)


def _register_autocast(device_type: str, key: str) -> None:
    # torch.library.register_autocast casts to one fixed dtype; this follows the dtype of the surrounding torch.autocast.
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):  # type: ignore[no-untyped-def]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.gsto_ops.gated_scale_transfer(*autocast_operands(device_type, args))

    library.impl("gated_scale_transfer", kernel, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
