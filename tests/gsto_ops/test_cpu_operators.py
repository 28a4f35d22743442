"""The compiled CPU kernels of all operators against the reference in float64, for every instruction set.

What concerns gated_scale_transfer alone (modes, conversions, sigmoid) is in test_cpu_kernel.py.
"""

import pytest
import torch
from torch import Tensor

from gsto_ops import reference

pytest.importorskip("gsto_ops._C", reason="the C++ extension is not there", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.gsto_ops
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
MODES = (("bilinear", False), ("bilinear", True), ("avg", False), ("nearest", False))

# Of operators that resample: batch, C, C', (H, W), output size or explicit scale factors.
RESAMPLED = {
    "up2": (2, 18, 36, (7, 9), (14, 18)),
    "up8, wide map": (1, 36, 5, (3, 40), (24, 320)),
    "up2, rows of several blocks": (1, 5, None, (3, 550), (6, 1100)),
    "down2, rows of several blocks": (1, 5, None, (6, 1100), (3, 550)),
    "down2, odd": (3, 130, 19, (9, 11), (5, 6)),
    "down, windows overlap": (1, 36, None, (8, 12), (5, 7)),
    "down4, several blocks": (1, 130, 18, (36, 72), (9, 18)),
    "identity": (2, 18, 7, (6, 53), (6, 53)),
    "identity, gate only": (3, 3, None, (5, 5), (5, 5)),
    "up in one axis, down in the other": (1, 20, 7, (6, 6), (13, 4)),
    "one pixel in": (2, 5, 4, (1, 1), (6, 3)),
    "empty batch": (0, 4, 3, (5, 5), (10, 10)),
    "scale down, not whole": (2, 18, 9, (17, 20), (0.37, 0.61)),
}
PROJECTED = {
    "odd": (2, 18, 36, (7, 9)),
    "one channel": (3, 1, 1, (5, 5)),
    "one pixel": (1, 5, 3, (1, 1)),
    "many tiles": (2, 130, 19, (36, 40)),
    "empty batch": (0, 4, 3, (5, 5)),
}
POOLED = {
    "pyramid": (2, 36, (12, 18), [1, 2, 3, 6]),
    "windows overlap": (1, 130, (13, 17), [1, 2, 3, 6]),
    "more bins than pixels": (2, 5, (3, 4), [6, 1]),
    "one level": (1, 18, (40, 9), [1]),
    "seven levels, one twice": (1, 20, (9, 50), [4, 2, 2, 3, 1, 5, 9]),
    "one pixel": (2, 3, (1, 1), [1, 2]),
    "empty batch": (0, 4, (5, 5), [1, 3]),
}


def parameter(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape) / (shape[1] if len(shape) == 4 else 1) ** 0.5).to(dtype)


def projection(dtype: torch.dtype, out: int | None, channels: int, relu: bool) -> tuple[Tensor | None, Tensor | None]:
    if out is None:
        return None, None
    if relu and torch.finfo(dtype).bits == 16:
        # One input channel per output channel and no bias: no rounding moves a value across the ReLU's kink.
        weight = torch.zeros(out, channels, 1, 1)
        weight[torch.arange(out), torch.arange(out) % channels] = torch.randn(out, 1, 1) + 2
        return weight.to(dtype), torch.zeros(out, dtype=dtype)
    return parameter(dtype, out, channels, 1, 1), parameter(dtype, out)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def target_of(size: tuple, target: tuple) -> tuple:
    """(output size, scale factors or None)."""
    if isinstance(target[0], float):
        return tuple(int(n * s) for n, s in zip(size, target, strict=True)), target
    return target, None


def cases(dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> dict:
    """name -> (operator, its tensors, its other arguments)."""

    def image(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).contiguous(memory_format=layout)

    found = {}
    for name, (batch, channels, out, size, target) in RESAMPLED.items():
        out_size, factors = target_of(size, target)
        for mode, align_corners in MODES:
            resampling = (out_size, mode, align_corners, factors)
            if mode == "nearest" and factors:
                continue  # the index is float32's, whatever the dtype: test_cpu_kernel.py
            for activation in ("none", "relu"):
                tensors = (
                    image(batch, channels, *size),
                    parameter(dtype, 1, channels, 1, 1),
                    parameter(dtype, 1),
                    *projection(dtype, out, channels, activation == "relu"),
                )
                key = f"{name}, {mode}{', align_corners' if align_corners else ''}, {activation}"
                found[f"gated_scale_transfer: {key}"] = ("gated_scale_transfer", tensors, (activation, *resampling))
                wide = statistics_dtype(dtype)
                tensors = (image(batch, channels, *size), parameter(wide, channels), parameter(wide, channels))
                found[f"affine_scale_transfer: {key}"] = ("affine_scale_transfer", tensors, (activation, *resampling))
                # A norm of two pixels divides by their difference. 16 bits: test_a_batch_norm_between_two_operators.
                if out is None or size == (1, 1) or torch.finfo(dtype).bits == 16:
                    continue
                tensors = (
                    image(batch, channels, *size),
                    parameter(dtype, 1, channels, 1, 1),
                    parameter(dtype, 1),
                    parameter(dtype, out, channels, 1, 1),
                    parameter(wide, out),
                    parameter(wide, out),
                )
                others = (1e-3, activation, *resampling)
                found[f"gated_batch_norm_transfer: {key}"] = ("gated_batch_norm_transfer", tensors, others)
    for name, (batch, channels, out, size) in PROJECTED.items():
        tensors = (
            image(batch, channels, *size),
            parameter(dtype, 1, channels, 1, 1),
            parameter(dtype, 1),
            parameter(dtype, out, channels, 1, 1),
        )
        found[f"gated_projection: {name}"] = ("gated_projection", tensors, ())
        found[f"class_map: {name}"] = ("class_map", (tensors[0], tensors[3], parameter(dtype, out)), ())
    for name, (batch, channels, size, bins) in POOLED.items():
        levels = len(bins)
        tensors = (
            image(batch, channels, *size),
            parameter(dtype, levels, channels, 1, 1),
            parameter(dtype, levels),
        )
        found[f"gated_pyramid_pool: {name}"] = ("gated_pyramid_pool", tensors, (bins,))
    return found


NAMES = list(cases(torch.float32))


def kernel(operator: str, tensors: tuple, others: tuple) -> tuple[Tensor, ...]:
    if len(others) > 4:
        others = (*others[:-1], *(others[-1] or (None, None)))
    return differentiable(operator, getattr(OPS, operator)(*tensors, *others))


def plain(operator: str, tensors: tuple, others: tuple) -> tuple[Tensor, ...]:
    return differentiable(operator, getattr(reference, operator)(*tensors, *others))


def differentiable(operator: str, outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (
        outputs[:1] if operator == "gated_batch_norm_transfer" else outputs
    )  # the others are for its own backward pass


def results(function, operator: str, tensors: tuple, others: tuple, wide: bool = False) -> list[Tensor]:
    """The outputs and the gradients of all tensors, in float64."""
    leaves = [None if t is None else (t.double() if wide else t).detach().requires_grad_() for t in tensors]
    outputs = function(operator, leaves, others)
    generator = torch.Generator().manual_seed(1)
    narrow = [o.dtype if operator == "gated_projection" and o.dim() == 1 else tensors[0].dtype for o in outputs]
    grads = [
        torch.randn(o.shape, generator=generator).to(dtype).to(o.dtype)
        for o, dtype in zip(outputs, narrow, strict=True)
    ]
    torch.autograd.backward(outputs, grads)
    return [r.detach().double() for r in (*outputs, *(leaf.grad for leaf in leaves if leaf is not None))]


@pytest.mark.parametrize("operator", sorted({case[0] for case in cases(torch.float32).values()}))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(instruction_set: str, dtype: torch.dtype, operator: str):
    """Error at most twice that of the same computation in plain PyTorch, plus a few roundings of what is summed."""
    for layout in LAYOUTS:
        for name, case in cases(dtype, layout).items():
            if case[0] != operator:
                continue
            exact = results(plain, *case, wide=True)
            rounded = results(plain, *case)
            found = results(kernel, *case)
            # What is summed over pixels may cancel: its roundings are those of the largest value times many terms.
            x = case[1][0]
            largest = max([1.0, *(float(e.abs().nan_to_num().max()) for e in exact if e.numel())])
            sums = 64 * torch.finfo(statistics_dtype(dtype)).eps * largest * (1 + x.numel() / x.shape[1]) ** 0.5
            for i, (e, r, f) in enumerate(zip(exact, rounded, found, strict=True)):
                assert f.shape == e.shape, (name, i)
                assert torch.equal(f.isnan(), e.isnan()), (name, i)
                if e.numel():
                    error, usual, size = ((t.nan_to_num().abs().max()) for t in (f - e, r - e, e))
                    bound = 2 * usual + 4 * torch.finfo(dtype).eps * max(1.0, float(size)) + sums
                    assert error <= bound, (
                        f"{name}, result {i}: error {error:.3g}, plain {usual:.3g}, bound {bound:.3g}"
                    )


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_norm_between_two_operators(instruction_set: str, dtype: torch.dtype, activation: str):
    """gated_batch_norm_transfer is gated_projection and affine_scale_transfer, whose errors are tested, and scale and shift."""
    eps, wide = torch.finfo(dtype).eps, statistics_dtype(dtype)
    for layout in LAYOUTS:
        x = torch.randn(2, 18, 9, 11).to(dtype).contiguous(memory_format=layout)
        norm = parameter(wide, 7), parameter(wide, 7)
        tensors = (x, parameter(dtype, 1, 18, 1, 1), parameter(dtype, 1), parameter(dtype, 7, 18, 1, 1), *norm)
        found = []
        for fused in (True, False):
            leaves = [t.detach().requires_grad_() for t in tensors]
            resampling = (activation, (19, 30), "bilinear", False, None, None)
            if fused:
                output = OPS.gated_batch_norm_transfer(*leaves, 1e-3, *resampling)[0]
            else:
                z, _, mean, var = OPS.gated_projection(*leaves[:4])
                scale = leaves[4] * (var + 1e-3).rsqrt()
                output = OPS.affine_scale_transfer(z, scale, leaves[5] - mean * scale, *resampling)
            output.backward(torch.linspace(-1, 2, output.numel()).reshape(output.shape).to(dtype))
            grad_input, grad_gate_weight, grad_gate_bias, *others = (leaf.grad for leaf in leaves)
            # The gate's bias is the weight of one more input, which is one: its gradient may cancel to nearly nothing.
            grad_gate = torch.cat([grad_gate_weight.flatten(), grad_gate_bias])
            found.append([output.detach(), grad_input, grad_gate, *others])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, atol=4 * eps * float(expected.abs().max()), rtol=4 * eps)


VIEWS = {
    "rows and columns sliced": lambda x: x[:, :, 1:-1, 2:-3],
    "every second column": lambda x: x[..., ::2],
    "channels sliced": lambda x: x[:, 3:21],
    "height and width transposed": lambda x: x.transpose(2, 3),
    "channels and width transposed": lambda x: x.transpose(1, 3),
    "batch and channels expanded": lambda x: x[:1, :1].expand(2, 5, -1, -1),
    "channels_last, sliced": lambda x: x.to(memory_format=torch.channels_last)[:, 1:20, 1:, 1:-1],
}


def calls(x: Tensor) -> list[tuple]:
    """Calls of all operators with parameters that are views as well."""
    channels = x.shape[1]
    size = tuple(x.shape[2:])
    rho = torch.randn(3, channels, 2, 1)[1:2, :, :1]
    weight = torch.randn(channels, 9, 1, 1).transpose(0, 1)
    affine = (torch.randn(2 * channels)[::2], torch.randn(1).expand(channels))
    found = []
    for target in (size, (16, 21), (4, 5)):
        for activation in ("none", "relu"):
            resampling = (activation, target, "bilinear", False, None)
            found.append(
                ("gated_scale_transfer", (x, rho, torch.randn(2)[1:], weight, torch.randn(18)[::2]), resampling)
            )
            found.append(("gated_scale_transfer", (x, rho, None, None, None), resampling))
            found.append(("affine_scale_transfer", (x, *affine), resampling))
            norm = (torch.randn(18)[::2], torch.randn(1).expand(9))
            found.append(
                ("gated_batch_norm_transfer", (x, rho, torch.randn(2)[1:], weight, *norm), (1e-3, *resampling))
            )
    found.append(("gated_projection", (x, rho, None, weight), ()))
    found.append(("class_map", (x, weight, torch.randn(18)[::2]), ()))
    found.append(("class_map", (x, weight, None), ()))
    found.append(("gated_pyramid_pool", (x, rho.expand(3, -1, -1, -1), torch.randn(1).expand(3)), ([3, 1, 2],)))
    return found


def odd_strides(t: Tensor) -> Tensor:
    """The same values in memory that is neither NCHW nor channels_last."""
    wide = torch.stack([t, t], -1).transpose(0, -2) if t.dim() == 4 else torch.stack([t, t], -1)
    wide = wide.contiguous()
    return wide[..., 1].transpose(0, -1) if t.dim() == 4 else wide[..., 1]


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str):
    for operator, tensors, others in calls(VIEWS[view](torch.randn(2, 24, 11, 18))):
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        wide = [None if t is None else t.double().requires_grad_() for t in tensors]
        found, exact = kernel(operator, leaves, others), plain(operator, wide, others)
        grads = [odd_strides(torch.randn(e.shape)) for e in exact]
        grads[0] = torch.tensor(0.25).expand(exact[0].shape) if others and "relu" in others else grads[0]
        pairs = [(leaf, w) for leaf, w in zip(leaves, wide, strict=True) if leaf is not None]
        grad_found = torch.autograd.grad(found, [leaf for leaf, _ in pairs], grads[: len(found)])
        grad_exact = torch.autograd.grad(exact, [w for _, w in pairs], [g.double() for g in grads])
        for f, e in zip((*found, *grad_found), (*exact, *grad_exact), strict=True):
            torch.testing.assert_close(
                f.double(), e, rtol=1e-4, atol=2e-4, msg=lambda m, o=operator, k=others: f"{o}, {k}: {m}"
            )


@pytest.mark.parametrize("channels", [35, 22, 6, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_agree(instruction_set: str, dtype: torch.dtype, channels: int):
    """channels_last pixels are read where they lie, in pairs where channels are even; NCHW ones are transposed."""
    x = torch.randn(2, channels, 3, 7).to(dtype)
    rho, weight, bias = parameter(dtype, 1, channels, 1, 1), parameter(dtype, 17, channels, 1, 1), parameter(dtype, 17)
    found = []
    for layout in LAYOUTS:
        operands = (x.contiguous(memory_format=layout), rho, None, weight)
        resampled = ("gated_scale_transfer", (*operands, bias), ("relu", (9, 14), "bilinear", False, None))
        every = (resampled, ("gated_projection", operands, ()), ("class_map", (operands[0], weight, bias), ()))
        found.append([result for call in every for result in results(kernel, *call)])
    for planes, pixels in zip(*found, strict=True):
        size = max(1.0, float(planes.abs().max()))
        torch.testing.assert_close(pixels, planes, rtol=0, atol=4 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(layout: torch.memory_format):
    x = torch.randn(2, 36, 48, 40).contiguous(memory_format=layout)
    for operator, tensors, others in calls(x):
        if others and others[0] in ("none", "relu") and others[1] != (48, 40):
            others = (others[0], (96, 80) if others[1][0] == 16 else (24, 20), *others[2:])
        runs = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            runs.append(results(kernel, operator, tensors, others))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True)), (operator, others)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_is_written(layout: torch.memory_format, fresh_memory_is_nan):
    for name, case in cases(torch.float32, layout).items():
        if name.startswith(("gated_projection: empty batch", "gated_batch_norm_transfer: empty batch")):
            continue  # their mean is that of nothing
        for i, result in enumerate(results(kernel, *case)):
            assert not result.isnan().any(), (name, i)


@pytest.mark.parametrize("size", [(64, 270), (63, 269)], ids=["aligned planes", "odd"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_copies_that_pass_the_caches_by_are_those_of_small_calls(
    instruction_set: str, layout: torch.memory_format, size: tuple[int, int], fresh_memory_is_nan
):
    gate_weight = torch.randn(4, 32, 1, 1) / 6
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 32, *size).to(dtype).contiguous(memory_format=layout)
        large, *small = (
            OPS.gated_split(part, gate_weight.to(dtype), None, None, [], 4, "none")[1] for part in (x, *x.split(1))
        )
        assert sum(copy.nbytes for copy in large) > 16 << 20
        for k, copy in enumerate(large):
            assert torch.equal(copy, torch.cat([copies[k] for copies in small]))


def test_statistics_do_not_cancel(instruction_set: str):
    # Mean 1000, deviation 1: a difference of float32 sums of squares would have no digit right.
    x = torch.randn(2, 3, 64, 96) + 1000
    open_gate, weight = torch.full((1,), 60.0), torch.eye(3)[:, :, None, None]  # sigmoid(60) is 1 in float32
    output, _, mean, var = OPS.gated_projection(x, torch.zeros(1, 3, 1, 1), open_gate, weight)
    assert torch.equal(output, x)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_statistics_of_half_precision_maps_are_float32():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(1, 4, 8, 8).to(dtype)
        gate_weight, weight = torch.zeros(1, 4, 1, 1, dtype=dtype), torch.randn(3, 4, 1, 1).to(dtype)
        _, gate, mean, var = OPS.gated_projection(x, gate_weight, None, weight)
        assert (gate.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)


@pytest.mark.parametrize("bins", [[2], [1, 3]], ids=str)
def test_a_pyramid_of_planes_in_several_bands(bins: list[int]):
    """NCHW planes are worked on 4 MiB at a time; an eighth of the rows of this map is 4.3 MiB."""
    tensors = (torch.randn(1, 64, 64, 1100), torch.randn(len(bins), 64, 1, 1) / 8, torch.randn(len(bins)))
    case = ("gated_pyramid_pool", tuple(t.double() for t in tensors), (bins,))
    for found, exact in zip(results(kernel, *case), results(plain, *case), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


def test_pyramid_of_one_bin_is_the_mean_and_of_all_bins_the_map():
    # With open gates: independent facts about adaptive average pooling.
    x = torch.randn(2, 20, 5, 5)
    gate_weight, open_gate = torch.zeros(2, 20, 1, 1), torch.full((2,), 60.0)
    pooled, _ = OPS.gated_pyramid_pool(x, gate_weight, open_gate, [1, 5])
    torch.testing.assert_close(pooled[..., 0], x.mean((2, 3)))
    assert torch.equal(pooled[..., 1:], x.flatten(2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_relu_keeps_nan_and_stops_gradients(instruction_set: str, layout: torch.memory_format):
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0, float("nan")]).repeat(1, 17, 4, 5).contiguous(memory_format=layout)
    scale, shift = torch.ones(17), torch.zeros(17)
    for size in ((4, 25), (8, 50)):
        output = OPS.affine_scale_transfer(x, scale, shift, "relu", size, "nearest", False, None, None)
        expected = torch.nn.functional.interpolate(x.relu(), size=size, mode="nearest")
        torch.testing.assert_close(output, expected, equal_nan=True, rtol=0, atol=0)
        ones = torch.ones_like(output)
        arguments = (x.nan_to_num(), scale, shift, "relu", "nearest", False, None, None)
        grad, _, grad_shift = OPS.affine_scale_transfer_backward(ones, *arguments)
        copies = size[0] * size[1] // 100
        assert torch.equal(grad, copies * (x > 0).float()) and torch.equal(grad_shift, torch.full((17,), copies * 20.0))


BAD = {
    "affine_scale_transfer: scale must have shape": lambda x: OPS.affine_scale_transfer(
        x, torch.ones(2), torch.ones(4), "none", [5, 5], "avg", False, None, None
    ),
    "affine_scale_transfer: shift of dtype": lambda x: OPS.affine_scale_transfer(
        x, torch.ones(4), torch.ones(4).double(), "none", [5, 5], "avg", False, None, None
    ),
    "affine_scale_transfer: activation must be none or relu, got gelu": lambda x: OPS.affine_scale_transfer(
        x, torch.ones(4), torch.ones(4), "gelu", [5, 5], "avg", False, None, None
    ),
    "affine_scale_transfer: size must be positive": lambda x: OPS.affine_scale_transfer(
        x, torch.ones(4), torch.ones(4), "none", [0, 5], "avg", False, None, None
    ),
    "gated_projection: weight must have shape": lambda x: OPS.gated_projection(
        x, torch.ones(1, 4, 1, 1), None, torch.ones(3, 5, 1, 1)
    ),
    "gated_projection: input must be": lambda x: OPS.gated_projection(
        x[0], torch.ones(1, 4, 1, 1), None, torch.ones(3, 4, 1, 1)
    ),
    "gated_projection_backward: mean of dtype": lambda x: OPS.gated_projection_backward(
        x, None, None, None, x, x[:, :1], torch.ones(1, 4, 1, 1), torch.ones(4, 4, 1, 1), x, torch.ones(4).double()
    ),
    "class_map: class_weight must have shape": lambda x: OPS.class_map(x, torch.ones(3, 5, 1, 1), None),
    "class_map: class_weight must be": lambda x: OPS.class_map(x, torch.ones(3, 4), None),
    "class_map: class_bias must have shape": lambda x: OPS.class_map(x, torch.ones(3, 4, 1, 1), torch.ones(4)),
    "class_map_backward: grad_output must have shape": lambda x: OPS.class_map_backward(x, x, torch.ones(3, 4, 1, 1)),
    "gated_pyramid_pool: gate_weight must have shape": lambda x: OPS.gated_pyramid_pool(
        x, torch.ones(1, 4, 1, 1), None, [1, 2]
    ),
    "gated_pyramid_pool: bins must be positive": lambda x: OPS.gated_pyramid_pool(
        x, torch.ones(2, 4, 1, 1), None, [1, 0]
    ),
    "gated_pyramid_pool: bins must not be empty": lambda x: OPS.gated_pyramid_pool(x, torch.ones(0, 4, 1, 1), None, []),
    "gated_pyramid_pool_backward: grad_pooled must have shape": lambda x: OPS.gated_pyramid_pool_backward(
        torch.ones(1, 4, 2), None, x, x[:, :1], torch.ones(1, 4, 1, 1), [1]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls_of_the_operators_themselves(message: str):
    with pytest.raises(RuntimeError, match=f"gsto_ops::{message}"):
        BAD[message](torch.randn(1, 4, 5, 5))
