"""The compiled CPU kernels of gated_scale_transfer against float64 mathematics in plain PyTorch, for every instruction set."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gsto_ops
from gsto_ops.ops import gated_scale_transfer as registration

_C = pytest.importorskip("gsto_ops._C", reason="the C++ extension is not there", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.gsto_ops.gated_scale_transfer
BACKWARD = torch.ops.gsto_ops.gated_scale_transfer_backward
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = (("bilinear", False), ("bilinear", True), ("avg", False), ("nearest", False))
NAMES = ("output", "gate", "grad_input", "grad_gate_weight", "grad_gate_bias", "grad_weight", "grad_bias")

# batch, C, C', (H, W), output size or explicit scale factors
CASES = {
    "up2, projected": (2, 18, 36, (7, 9), (14, 18)),
    "up8, wide map": (1, 36, 5, (3, 40), (24, 320)),
    "down2, odd": (3, 130, 19, (9, 11), (5, 6)),
    "down, windows overlap": (1, 36, None, (8, 12), (5, 7)),
    "down4, several blocks": (1, 130, 18, (36, 72), (9, 18)),
    "identity, projected": (3, 1, 3, (5, 5), (5, 5)),
    "identity, gate only": (2, 18, None, (6, 53), (6, 53)),
    "up in one axis, down in the other": (1, 20, 7, (6, 6), (13, 4)),
    "one pixel out": (2, 5, None, (3, 50), (1, 1)),
    "one pixel in": (2, 5, 4, (1, 1), (6, 3)),
    "empty batch": (0, 4, 3, (5, 5), (10, 10)),
    "scale up, not whole": (1, 18, 9, (7, 10), (1.7, 2.3)),
    "scale down, not whole": (2, 18, 9, (17, 20), (0.37, 0.61)),
}


def resample(x: Tensor, target: tuple, mode: str, align_corners: bool) -> Tensor:
    """F.interpolate and F.adaptive_avg_pool2d; a target of floats is a pair of scale factors."""
    by_scale = isinstance(target[0], float)
    if mode == "avg":
        size = [math.floor(n * s) for n, s in zip(x.shape[-2:], target, strict=True)] if by_scale else target
        return F.adaptive_avg_pool2d(x, size)
    given = {"scale_factor" if by_scale else "size": target}
    if mode == "bilinear":
        return F.interpolate(x, **given, mode=mode, align_corners=align_corners)
    # The index that F.interpolate takes for float32, whatever the dtype of x is.
    index = torch.arange(x.shape[2] * x.shape[3], dtype=torch.float32).view(1, 1, *x.shape[-2:])
    index = F.interpolate(index, **given, mode="nearest").long()
    return x.flatten(2)[..., index.flatten()].unflatten(2, index.shape[-2:])


def plain(operands: list, target: tuple, mode: str, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, gate_weight, gate_bias, weight, bias = operands
    logit = F.conv2d(x, gate_weight, gate_bias)
    gate = torch.sigmoid(logit)
    y = gate * x
    if weight is not None:
        y = F.conv2d(y, weight, bias)
    return resample(y, target, mode, align_corners), gate, logit


def kernel(operands: list, target: tuple, mode: str, align_corners: bool) -> tuple[Tensor, Tensor]:
    scale_h, scale_w, size = None, None, target
    if isinstance(target[0], float):
        size = [math.floor(n * s) for n, s in zip(operands[0].shape[-2:], target, strict=True)]
        scale_h, scale_w = target
    return OP(*operands, "none", size, mode, align_corners, scale_h, scale_w)


def make_operands(batch, channels, out_channels, size, dtype, memory_format=torch.contiguous_format) -> list:
    def parameter(*shape: int) -> Tensor:
        return (torch.randn(*shape) / channels**0.5).to(dtype)

    x = torch.randn(batch, channels, *size).to(dtype).to(memory_format=memory_format)
    projection = [parameter(out_channels, channels, 1, 1), parameter(out_channels)] if out_channels else [None, None]
    return [x, parameter(1, channels, 1, 1), parameter(1), *projection]


def gradients(function, operands: list, dtype: torch.dtype, *resampling) -> tuple[list[Tensor], Tensor | None]:
    """All outputs and gradients in the order of NAMES, in float64; and the gradient of the logit, where there is one."""
    leaves = [None if o is None else o.detach().to(dtype).requires_grad_() for o in operands]
    output, gate, *logit = function(leaves, *resampling)
    if logit:
        logit[0].retain_grad()
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(operands[0].dtype).to(dtype) for o in (output, gate)]
    torch.autograd.backward([output, gate], grads)
    results = [output, gate, *(leaf.grad for leaf in leaves if leaf is not None)]
    return [r.detach().double() for r in results], logit[0].grad if logit else None


def check_against_float64(operands: list, *resampling) -> None:
    """Error at most twice that of the same computation in plain PyTorch, plus a few roundings of what is summed."""
    dtype = operands[0].dtype
    exact, grad_logit = gradients(plain, operands, torch.float64, *resampling)
    rounded, _ = gradients(plain, operands, dtype, *resampling)
    found, _ = gradients(kernel, operands, dtype, *resampling)
    terms = {  # the size of the terms in the sums over all pixels, which may cancel
        "grad_gate_weight": (grad_logit * operands[0].double()).abs().sum((0, 2, 3)).max() if grad_logit.numel() else 0,
        "grad_gate_bias": grad_logit.abs().sum(),
    }
    for name, e, r, f in zip(NAMES, exact, rounded, found, strict=False):
        assert f.shape == e.shape, name
        if e.numel():
            error, usual = (f - e).abs().max(), (r - e).abs().max()
            size = max(1.0, float(e.abs().max()), float(terms.get(name, 0)))
            # In float64 plain PyTorch is the reference itself, so the roundings of long sums are all ours.
            bound = 2 * usual + (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps * size
            assert error <= bound, (
                f"{name}: error {error:.3g}, plain PyTorch {usual:.3g}, bound {bound:.3g}, {resampling}"
            )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(instruction_set: str, dtype: torch.dtype, case: str):
    *shape, target = CASES[case]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        operands = make_operands(*shape, dtype, memory_format)
        for mode, align_corners in MODES:
            check_against_float64(operands, target, mode, align_corners)


VIEWS = {
    "rows and columns sliced": lambda x: x[:, :, 1:-1, 2:-3],
    "every second column": lambda x: x[..., ::2],
    "channels sliced": lambda x: x[:, 3:21],
    "height and width transposed": lambda x: x.transpose(2, 3),
    "channels and width transposed": lambda x: x.transpose(1, 3),
    "batch and channels expanded": lambda x: x[:1, :1].expand(2, 5, -1, -1),
    "one column expanded": lambda x: x[..., :1].expand(-1, -1, -1, 20),
    "channels_last, sliced": lambda x: x.to(memory_format=torch.channels_last)[:, 1:20, 1:, 1:-1],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("target", [(16, 21), (4, 5), None], ids=str)
@pytest.mark.parametrize("projected", [True, False])
def test_any_strides(view: str, target: tuple | None, projected: bool):
    x = VIEWS[view](torch.randn(2, 24, 11, 18))
    _, gate_weight, gate_bias, weight, bias = make_operands(0, x.shape[1], 9, (1, 1), torch.float32)
    # Parameters that are views as well.
    weight = torch.stack([weight, weight], dim=1)[:, 0].flip(0).transpose(0, 1).clone().transpose(0, 1)
    operands = [
        x,
        gate_weight.expand(1, -1, 1, 1),
        gate_bias.expand(2)[:1],
        *([weight, bias] if projected else [None, None]),
    ]
    leaves = [None if o is None else o.double().requires_grad_() for o in operands]
    size = target or tuple(x.shape[-2:])
    output, gate = kernel(operands, size, "bilinear", False)
    expected, expected_gate, _ = plain(leaves, size, "bilinear", False)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate.double(), expected_gate, rtol=1e-5, atol=1e-6)

    # Gradients with the strides that sum().backward() and permuting layers make.
    grad_gate = torch.tensor(0.5).expand(gate.shape)
    for grad_output in (
        torch.tensor(0.25).expand(output.shape),
        torch.randn(*output.shape[:2], *size[::-1]).transpose(2, 3),
    ):
        found = BACKWARD(
            grad_output, grad_gate, x, gate, *operands[1:2], *operands[3:], "none", "bilinear", False, None, None
        )
        wanted = torch.autograd.grad(
            [expected, expected_gate],
            [o for o in leaves if o is not None],
            [grad_output.double(), grad_gate.double()],
            retain_graph=True,
        )
        for name, f, w in zip(NAMES[2:], found, wanted, strict=False):
            torch.testing.assert_close(f.double(), w, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_no_gradient_of_the_gate_is_a_zero_gradient():
    x, gate_weight, _, weight, _ = make_operands(2, 18, 7, (6, 5), torch.float32)
    gate = torch.rand(2, 1, 6, 5)
    arguments = (x, gate, gate_weight, weight, None, "none", "bilinear", False, None, None)
    grad_output = torch.randn(2, 7, 12, 10)
    for without, zero in zip(
        BACKWARD(grad_output, None, *arguments), BACKWARD(grad_output, gate * 0, *arguments), strict=True
    ):
        assert torch.equal(without, zero)


@pytest.mark.parametrize("shape", [(2, 18, 7, 9), (2, 1, 7, 9), (2, 18, 1, 1), (2, 18, 7, 1), (1, 18, 1, 9)], ids=str)
@pytest.mark.parametrize("out_channels", [None, 1, 6])
def test_layout_of_results_is_that_of_the_fake_kernel(shape: tuple[int, ...], out_channels: int | None):
    base = torch.randn(shape)
    views = [
        base,
        base.to(memory_format=torch.channels_last),
        base.transpose(2, 3).contiguous().transpose(2, 3),
        base[:1].expand(shape),
    ]
    for x in views:
        operands = [x, *make_operands(0, shape[1], out_channels, (1, 1), torch.float32)[1:]]
        arguments = (*operands, "none", [5, 6], "bilinear", False, None, None)
        fake = registration._fake(*(t.to("meta") if isinstance(t, Tensor) else t for t in arguments))
        output, gate = OP(*arguments)
        assert (output.stride(), gate.stride()) == (fake[0].stride(), fake[1].stride())
        operands = (x, gate, operands[1], *operands[3:])
        arguments = (torch.randn_like(output), None, *operands, "none", "bilinear", False, None, None)
        fake = registration._backward_fake(*(t.to("meta") if isinstance(t, Tensor) else t for t in arguments))
        for found, wanted in zip(BACKWARD(*arguments), fake, strict=True):
            assert (found.shape, found.stride()) == (wanted.shape, wanted.stride())


@pytest.mark.parametrize("case", ["up2", "down2", "down2, gate only", "identity", "gate only"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: str, memory_format: torch.memory_format):
    out_channels = None if "gate only" in case else 24
    size = {"up2": (96, 80), "down2": (24, 20)}.get(case.split(",")[0], (48, 40))
    operands = make_operands(2, 36, out_channels, (48, 40), torch.float32, memory_format)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(gradients(kernel, operands, torch.float32, size, "bilinear", False)[0])
    for result in results[1:]:
        for name, first, other in zip(NAMES, results[0], result, strict=False):
            assert torch.equal(first, other), name


@pytest.mark.parametrize("case", [case for case in CASES if "not whole" not in case])
def test_every_element_is_written(case: str, fresh_memory_is_nan):
    *shape, size = CASES[case]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        operands = make_operands(*shape, torch.float32, memory_format)
        for mode, align_corners in MODES:
            output, gate = OP(*operands, "none", size, mode, align_corners, None, None)
            grads = BACKWARD(
                torch.ones_like(output),
                None,
                operands[0],
                gate,
                operands[1],
                *operands[3:],
                "none",
                mode,
                align_corners,
                None,
                None,
            )
            for name, result in zip(NAMES, (output, gate, *grads), strict=True):
                assert not result.isnan().any(), (name, mode)


def test_bilinear_with_few_taps_skips_pixels_but_gates_them_all():
    # 12 -> 3 touches columns 1, 2 of every 4 (an independent fact: centre 1.5 of each 4 pixels).
    x = torch.randn(1, 4, 12, 12)
    operands = [x, torch.randn(1, 4, 1, 1), None, None, None]
    output, gate = OP(*operands, "none", [3, 3], "bilinear", False, None, None)
    gated = torch.sigmoid((x * operands[1]).sum(1, keepdim=True)) * x
    touched = gated.unfold(2, 4, 4).unfold(3, 4, 4)[..., 1:3, 1:3]
    torch.testing.assert_close(output, touched.mean((-1, -2)))
    torch.testing.assert_close(gate * x, gated)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gate_of_large_logits_and_nan(instruction_set: str, memory_format: torch.memory_format):
    logits = torch.tensor([-3e38, -1e4, -88.0, 0.0, 88.0, 1e4, 3e38, math.nan, -math.inf, math.inf]).repeat(1, 3, 4, 2)
    gate_weight = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    finite = logits.isfinite()
    x = torch.where(finite, logits, logits.nan_to_num(0, 0, 0)).contiguous(memory_format=memory_format)
    x[0, 0] = logits[0, 0]
    gate = OP(x, gate_weight, None, None, None, "none", [4, 20], "bilinear", False, None, None)[1]
    torch.testing.assert_close(gate[0, 0], torch.sigmoid(logits[0, 0]), equal_nan=True, rtol=3e-7, atol=1e-37)


def test_sigmoid_is_accurate(instruction_set: str):
    logits = torch.linspace(-87, 40, 100_003).view(1, 1, 1, -1)
    gate = OP(logits, torch.ones(1, 1, 1, 1), None, None, None, "none", [1, 100_003], "bilinear", False, None, None)[1]
    exact = torch.sigmoid(logits.double())
    assert ((gate - exact) / exact).abs().max() < 4e-7


def without_subnormals(values: Tensor) -> Tensor:
    return torch.where(values.abs() < torch.finfo(values.dtype).smallest_normal, torch.zeros_like(values), values)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_conversions_are_exact(
    instruction_set: str, dtype: torch.dtype, memory_format: torch.memory_format
):
    every_value = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 32, 32)
    x = every_value.contiguous(memory_format=memory_format)
    gate_weight = torch.zeros(1, 64, 1, 1, dtype=dtype)
    open_gate = torch.full((1,), 60.0, dtype=dtype)  # sigmoid(60) is 1 in float32
    finite = torch.where(x.isfinite(), x, torch.ones_like(x))
    output = OP(finite, gate_weight, open_gate, None, None, "none", [32, 32], "bilinear", False, None, None)[0]
    assert torch.equal(output, finite)

    # Rounding: one channel times one weight is exact in float32, so the result is its rounding by PyTorch.
    values = x.reshape(1, 1, 256, 256)
    values = torch.where(values.isnan(), torch.zeros_like(values), values).contiguous(memory_format=memory_format)
    values = torch.where(values.isfinite(), values, torch.ones_like(values))
    for factor in (1.37, 2.0**-9 * 1.01, 2.0**9 * 1.01):
        weight = torch.full((1, 1, 1, 1), factor, dtype=dtype)
        arguments = (
            torch.zeros(1, 1, 1, 1, dtype=dtype),
            open_gate,
            weight,
            None,
            "none",
            [256, 256],
            "bilinear",
            False,
            None,
            None,
        )
        exact = values.float()
        if instruction_set == "avx512_bf16" and dtype == torch.bfloat16:
            # The product of pairs takes subnormal numbers for zeros, as F.conv2d does on such a machine.
            exact = without_subnormals(without_subnormals(exact) * weight.float())
        else:
            exact = exact * weight.float()
        assert torch.equal(OP(values, *arguments)[0], exact.to(dtype))


def test_bad_calls_of_the_operator_itself():
    operands = make_operands(1, 4, 3, (5, 5), torch.float32)
    resampling = ("none", [5, 5], "bilinear", False, None, None)
    bad = {
        "input of shape .* has dtype": [o.int() for o in operands],
        "gate_weight must have shape": [operands[0], operands[1][:, :2], *operands[2:]],
        "weight must have shape": [*operands[:3], operands[3][:, :2], operands[4]],
        "bias must have shape": [*operands[:4], operands[4][:2]],
        "bias without weight": [*operands[:3], None, operands[4]],
        "gate_bias of dtype": [*operands[:2], operands[2].double(), *operands[3:]],
        "input must be": [operands[0][0], *operands[1:]],
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=f"gsto_ops::gated_scale_transfer: {message}"):
            OP(*arguments, *resampling)
    with pytest.raises(RuntimeError, match="mode must be bilinear, avg or nearest, got cubic"):
        OP(*operands, "none", [5, 5], "cubic", False, None, None)
    with pytest.raises(RuntimeError, match="activation must be none or relu, got gelu"):
        OP(*operands, "gelu", [5, 5], "avg", False, None, None)
    with pytest.raises(RuntimeError, match="size must be positive"):
        OP(*operands, "none", [0, 5], "avg", False, None, None)


def test_build_info_and_choice_of_instruction_set():
    info = _C.build_info()
    assert info["instruction_set"] in info["instruction_sets_here"]
    assert info["instruction_sets_here"][-1] == "baseline"
    with pytest.raises(ValueError, match=r"instruction set must be one of .*baseline.* got 'mmx'"):
        _C.use_instruction_set("mmx")
    assert _C.build_info()["instruction_set"] == info["instruction_set"]


def test_public_function_runs_the_kernel():
    operands = make_operands(2, 18, 9, (6, 5), torch.float32)
    with gsto_ops.use_backend("cpu"):
        output, gate = gsto_ops.gated_scale_transfer(*operands, scale_factor=2, return_gate=True)
    expected, expected_gate, _ = plain(operands, (12, 10), "bilinear", False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gate, expected_gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_have_64_bits(instruction_set: str, dtype: torch.dtype, tmp_path):
    """Images, channels, rows and columns that lie more than 2^31 elements apart, in a file that is almost all holes."""
    far = 2**31 + 24
    for axis in range(4):
        shape = [3, 18, 4, 5]
        strides = [360, 1, 90, 18]
        strides[axis] = far
        path = tmp_path / f"{axis}.bin"
        storage = torch.from_file(str(path), shared=True, size=(shape[axis] - 1) * far + 1080, dtype=dtype)
        x = storage.as_strided(shape, strides)
        values = torch.randn(shape).to(dtype)
        x.copy_(values)
        operands = [x, *make_operands(3, 18, 7, (4, 5), dtype)[1:]]
        output, gate = kernel(operands, (8, 10), "bilinear", False)
        expected, expected_gate = kernel([values, *operands[1:]], (8, 10), "bilinear", False)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gate, expected_gate)
        del storage, x, operands
        path.unlink()


def test_failed_allocations_name_operator_and_shapes():
    x, gate_weight = torch.randn(64, 256, 1, 1), torch.randn(1, 256, 1, 1)
    with pytest.raises(
        RuntimeError, match=r"gated_scale_transfer: allocating \(64, 256, 30000, 40000\) .* shape \(64, 256, 1, 1\)"
    ):
        OP(x, gate_weight, None, None, None, "none", [30000, 40000], "nearest", False, None, None)

    # Address space for the results (130 MiB), but not for the float32 map before the resampling (256 MiB).
    code = """
import resource, torch, gsto_ops
torch.set_num_threads(2)
x = torch.randn(1, 2, 1024, 1024, dtype=torch.bfloat16)
gate_weight, weight = torch.randn(1, 2, 1, 1).bfloat16(), torch.randn(64, 2, 1, 1).bfloat16()
small = x[:, :, :32, :32]
arguments = (gate_weight, None, weight, None, "none")
torch.ops.gsto_ops.gated_scale_transfer(small, *arguments, [16, 64], "bilinear", False, None, None)  # threads have started
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)
try:
    torch.ops.gsto_ops.gated_scale_transfer(x, *arguments, [512, 2048], "bilinear", False, None, None)
except RuntimeError as error:
    print(error)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of the address space are Linux's")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "gsto_ops::gated_scale_transfer: out of memory" in result.stdout, result.stdout + result.stderr
    assert "input of shape (1, 2, 1024, 1024)" in result.stdout
