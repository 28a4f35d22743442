"""Autograd of the operators: one ``torch.autograd.Function`` each, for the dispatcher and as a plain function.

``torch.library.register_autograd`` would do for autograd, but not for torch.func, and an eager call through it passes Python
twice more than needed, which doubles the time of a call on a tiny input (benchmarks/kernels/NOTES.md).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

# An operator's call without a look for __torch_function__ in its arguments (0.5 us): where autograd runs, that is behind it.
dispatch = torch._C._dispatch_call_boxed


def differentiable(
    library: torch.library.Library,
    overload: torch._ops.OpOverload,
    formula: Callable,
    setup_context: Callable,
    backward: Callable,
    backward_overload: torch._ops.OpOverload,
) -> Callable:
    """Registers the autograd formula of an operator; returns the operator as a function that skips the dispatcher.

    ``formula`` is the operator in plain PyTorch: what runs under forward-mode differentiation.
    ``setup_context(ctx, inputs, output)`` and ``backward(operator, ctx, *grads)``, where ``operator`` is ``backward_overload``
    or does the same, see arguments and results as the schema has them: a list of tensors is a list, in
    ``ctx.needs_input_grad`` and in what ``backward`` returns too: the gradients of the arguments up to the last tensor. An
    operator with lists may return more of them, which are not used.
    """
    schema = overload._schema
    tensors = 1 + max(i for i, argument in enumerate(schema.arguments) if "Tensor" in str(argument.type))
    in_lists, out_lists = (
        tuple(i for i, value in enumerate(values) if "List" in str(value.type) and "Tensor" in str(value.type))
        for values in (schema.arguments, schema.returns)
    )
    returns = len(schema.returns)

    # Looked up once: what follows runs at every call.
    below_autograd, handle = torch._C._AutoDispatchBelowAutograd, overload._handle
    is_wrapped, any_requires_grad = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._any_requires_grad
    has_transforms, is_tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing
    is_grad_enabled, has_torch_function = torch.is_grad_enabled, torch.overrides.has_torch_function

    # All that follows the tensors is one argument: an autograd.Function looks at each, and wants a gradient of it.
    def run(ctx: Any, *flat: Any) -> Any:
        args = flat[:-1] + flat[-1]
        with below_autograd():
            output = dispatch(handle, *args)
        setup_context(ctx, args, output)
        return output

    # An autograd.Function takes and gives tensors side by side: lists are flattened, their lengths follow as one more value.
    def run_lists(ctx: Any, *flat: Any) -> Any:
        args = flat[:-1] + flat[-1]
        if in_lists:
            lengths = flat[-2]
            args, ctx.in_lengths = _nested(flat[:-2], in_lists, lengths) + flat[-1], lengths
        with below_autograd():
            output = dispatch(handle, *args)
        setup_context(ctx, args, output)
        if not out_lists:
            return output
        flat_output = _flat(output if returns > 1 else (output,), out_lists)
        ctx.out_lengths = flat_output[-1]
        return flat_output

    def gradients(operator: Callable) -> Callable:
        return lambda ctx, *grads: (*backward(operator, ctx, *grads), None)

    def differentiate_lists(ctx: Any, *grads: Any) -> Any:
        if out_lists:
            grads = _nested(grads[:-1], out_lists, ctx.out_lengths)
        if not in_lists:
            return *backward(backward_overload, ctx, *grads)[:tensors], None
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = _nested(needed[:-2], in_lists, ctx.in_lengths)
        try:
            return *_flat(backward(backward_overload, ctx, *grads)[:tensors], in_lists)[:-1], None, None
        finally:
            ctx.needs_input_grad = needed

    with_lists = bool(in_lists or out_lists)

    class Function(torch.autograd.Function):
        forward = staticmethod(run_lists if with_lists else run)
        backward = staticmethod(differentiate_lists if with_lists else gradients(backward_overload))

    if not with_lists:
        # What the engine calls: past the search for a `backward` or `vjp` and past OpOverload's Python (0.7 us).
        Function._backward_cls.apply = gradients(partial(dispatch, backward_overload._handle))

    class LowerLevels(_SingleLevelFunction):
        backward = staticmethod(Function.backward)

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch.enable_grad():  # which forward() has turned off, for all levels of torch.func
                return Function.forward(ctx, *args)

    # Without torch.autograd.Function's Python in front of it (2 us).
    apply_function = super(torch.autograd.Function, Function).apply
    apply_lower_levels = LowerLevels.apply  # type: ignore[attr-defined]  # of C++

    def apply(args: tuple[Any, ...]) -> Any:
        operands = _flat(args[:tensors], in_lists) if in_lists else args[:tensors]
        if has_transforms():
            # The dispatcher has chosen the level of torch.func that this call belongs to, as for kernels in C++;
            # torch.autograd.Function.apply would start again at the top one.
            with enable_single_level_autograd_function():
                output = apply_lower_levels(*operands, args[tensors:])
        else:
            applied = apply_function
            for value in operands:
                # It has outlived its level of torch.func; torch.autograd.Function.apply unwraps such a tensor.
                if value is not None and isinstance(value, Tensor) and is_wrapped(value):
                    applied = Function.apply
            output = applied(*operands, args[tensors:])
        if not out_lists:
            return output
        output = _nested(output[:-1], out_lists, output[-1])
        return output if returns > 1 else output[0]

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            return formula(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return apply(args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    library.impl(overload._opname, kernel, "Autograd", with_keyset=True)

    def call(*args: Any) -> Any:
        # Whether a layer above autograd has a say: a compiler or tracer, forward mode, torch.func, a tensor subclass or mode.
        if (
            torch.compiler.is_compiling()
            or forward_ad._current_level >= 0
            or has_transforms()
            or has_torch_function(_flat(args, in_lists) if in_lists else args)
            or is_tracing()
        ):
            return overload(*args)
        if is_grad_enabled() and ((isinstance(args[0], Tensor) and args[0].requires_grad) or any_requires_grad(*args)):
            return apply(args)
        with below_autograd():
            return dispatch(handle, *args)

    return call


# Slices, not loops over the values: these two run eight times per step of every operator with lists.
def _flat(values: Sequence[Any], lists: tuple[int, ...]) -> tuple[Any, ...]:
    """The values with the lists among them unpacked, and the lengths of these lists."""
    flat: list[Any] = []
    start = 0
    for i in lists:
        flat += values[start:i]
        flat += values[i]
        start = i + 1
    flat += values[start:]
    flat.append(tuple([len(values[i]) for i in lists]))
    return tuple(flat)


def _nested(flat: Sequence[Any], lists: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Any, ...]:
    """The inverse of :func:`_flat`."""
    values: list[Any] = []
    start = 0
    for i, length in zip(lists, lengths, strict=True):
        end = start + i - len(values)
        values += flat[start:end]
        values.append(list(flat[end : end + length]))
        start = end + length
    values += flat[start:]
    return tuple(values)


def differentiable_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    operands: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of ``function(*operands)`` as a differentiable expression, for create_graph=True; slower than the kernels."""
    wanted = {i: operand for i, operand in enumerate(operands) if operand is not None and needs_grad[i]}

    def of_wanted(*values: Tensor) -> list[Tensor]:
        replaced = dict(zip(wanted, values, strict=True))
        outputs = function(*(replaced.get(i, operand) for i, operand in enumerate(operands)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [output for output, grad in zip(outputs, grads, strict=True) if grad is not None]

    pullback = torch.func.vjp(of_wanted, *wanted.values())[1]
    found = dict(zip(wanted, pullback([grad for grad in grads if grad is not None]), strict=True))
    return [found.get(i) for i in range(len(operands))]
