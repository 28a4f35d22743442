"""``upsample_cross_entropy`` on every backend against interpolation and cross-entropy in float64, and what it promises beyond.

The Triton kernels in the interpreter and the CUDA kernels in the emulator: test_triton_kernels.py, test_cuda_kernels.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gsto_ops
from gsto_ops import reference
from gsto_ops.ops import layout_of

OPS = torch.ops.gsto_ops
IGNORE = 255
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "sliced nhwc": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
# (N, C, h, w), (H, W)
SHAPES = {
    "up4": ((2, 19, 8, 12), (32, 48)),
    "up4, several blocks": ((1, 150, 17, 40), (68, 160)),
    "up8": ((1, 11, 3, 5), (24, 40)),
    "up, not whole": ((2, 20, 7, 9), (17, 31)),
    "identity": ((2, 18, 9, 13), (9, 13)),
    "down2, odd": ((3, 60, 9, 11), (5, 6)),
    "down, logits that no label sees": ((1, 7, 40, 50), (4, 5)),
    "up in one axis, down in the other": ((1, 5, 6, 30), (25, 7)),
    "one logit": ((2, 4, 1, 1), (6, 3)),
    "one label": ((2, 4, 5, 3), (1, 1)),
    "one class": ((2, 1, 4, 4), (8, 8)),
    "empty batch": ((0, 4, 5, 5), (10, 10)),
}


@pytest.fixture(
    params=[
        "reference",
        "cpu",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def backend(request):
    if reason := gsto_ops.backends.why_not(request.param):
        pytest.skip(f"backend {request.param!r} is not available: {reason}")
    with gsto_ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def two_steps(input: Tensor, target: Tensor, weight: Tensor | None = None, *, align_corners=False, **options) -> Tensor:
    """What a user would write today, in the dtype of the loss."""
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(logits, target.long(), weight, **options)


def operands(shape, size, device="cpu", dtype=torch.float64, labels=torch.int64, ignored=0.3):
    """(logits, labels with a share of ignored ones, class weights)."""
    target = torch.randint(0, shape[1], (shape[0], *size))
    target[torch.rand(target.shape) < ignored] = IGNORE
    target.view(-1)[:1] = 0  # one pixel has a label
    wide = torch.promote_types(dtype, torch.float32)
    tensors = torch.randn(shape, dtype=torch.float64).to(dtype), target.to(labels), torch.rand(shape[1]).to(wide) + 0.5
    return tuple(t.to(device) for t in tensors)


def with_gradient(function, input, *others, seed=None, **options):
    input = input.detach().requires_grad_()
    loss = function(input, *others, **options)
    seed = torch.ones_like(loss) if seed is None else seed.to(loss)
    return loss.detach(), torch.autograd.grad(loss, input, seed)[0]


def largest_term(shape, target: Tensor, options: dict) -> float:
    """Of the sums that gradients are made of: with one class they cancel, and only their roundings are left."""
    labels_per_logit = max(1, target[0].numel() // (shape[2] * shape[3]))
    divisor = float((target != IGNORE).sum()) / 2 if options["reduction"] == "mean" else 1.0
    return float(options["seed"].abs().max()) * labels_per_logit / divisor


def check_errors(ours, plain, exact, largest: float) -> None:
    """(loss, gradient): at most twice the error of plain PyTorch plus a few roundings."""
    for i, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert o.shape == e.shape
        error, allowed = float((o.double() - e).abs().max()), float((p.double() - e).abs().max())
        slack = 8 * torch.finfo(o.dtype).eps * max(float(e.abs().max()), largest * i)
        assert error <= 2 * allowed + slack, (("loss", "gradient")[i], error, allowed, slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, size", SHAPES.values(), ids=SHAPES)
def test_against_float64(backend, device, shape, size, dtype):
    """Error at most twice that of plain PyTorch in the same dtype plus a few roundings, and no run differs from another."""
    if backend in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip("float64 runs on the reference")
    logits, target, weight = operands(shape, size, device, dtype)
    for layout in LAYOUTS.values():
        for reduction, weights, align_corners in (
            ("none", weight, False),
            ("sum", None, True),
            ("mean", weight, False),
        ):
            seed = torch.randn(target.shape if reduction == "none" else ()).to(device)
            options = {"ignore_index": IGNORE, "reduction": reduction, "align_corners": align_corners, "seed": seed}
            wide = None if weights is None else weights.double()
            exact = with_gradient(two_steps, logits.double(), target, wide, **options)
            plain = with_gradient(two_steps, layout(logits), target, weights, **options)
            ours = with_gradient(gsto_ops.upsample_cross_entropy, layout(logits), target, weights, **options)
            again = with_gradient(gsto_ops.upsample_cross_entropy, layout(logits), target, weights, **options)
            assert ours[0].dtype == torch.promote_types(dtype, torch.float32) and ours[1].dtype == dtype
            assert all(torch.equal(o, a) for o, a in zip(ours, again, strict=True))
            if shape[0] == 0:
                assert not any(o.any() for o in ours)  # PyTorch's mean is NaN
            else:
                check_errors(ours, plain, exact, largest_term(shape, target, options))


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("ignore_index", [IGNORE, -100, 0])
def test_labels_and_ignore_index(backend, device, labels, ignore_index):
    logits, target, weight = operands((2, 6, 4, 5), (13, 17), device, torch.float32, labels)
    if ignore_index == -100 and labels != torch.uint8:
        target[target == IGNORE] = -100
    elif ignore_index != IGNORE:
        target[target == IGNORE] = 0
    options = {"ignore_index": ignore_index, "reduction": "mean"}
    exact = with_gradient(two_steps, logits.double(), target, weight.double(), **options)
    for found, e in zip(
        with_gradient(gsto_ops.upsample_cross_entropy, logits, target, weight, **options), exact, strict=True
    ):
        torch.testing.assert_close(found.double(), e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_equals_a_form_written_from_the_definition(backend, device, layout):
    # 2 x 2 logits on 4 x 4 labels: the samples lie at -1/4, 1/4, 3/4 and 5/4, clamped to the map.
    matrix = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    logits = torch.randn(1, 3, 2, 2)
    target = torch.arange(16).reshape(1, 4, 4) % 3
    up = torch.einsum("pi,cij,qj->pqc", matrix, logits[0], matrix).double().tolist()
    expected = [
        [math.log(sum(math.exp(v) for v in up[p][q])) - up[p][q][int(target[0, p, q])] for q in range(4)]
        for p in range(4)
    ]
    found = gsto_ops.upsample_cross_entropy(LAYOUTS[layout](logits).to(device), target.to(device), reduction="none")
    torch.testing.assert_close(found[0].cpu(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [IGNORE, 3])
def test_nothing_labelled_is_zero_with_zero_gradients(backend, device, reduction, ignore_index):
    logits = torch.randn(2, 5, 4, 6, device=device)
    target = torch.full((2, 8, 12), ignore_index, device=device)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    loss, grad = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, **options)
    assert not loss.any() and not grad.any()  # a NaN counts as true
    assert two_steps(logits, target, **options).isnan().any() == (reduction == "mean")  # what PyTorch returns


def test_weights_of_zero_are_as_good_as_ignored(backend, device):
    logits, target, weight = operands((2, 5, 4, 6), (8, 12), device, torch.float32)
    weight[2] = 0
    ignored = torch.where(target == 2, IGNORE, target)
    found, expected = (
        with_gradient(gsto_ops.upsample_cross_entropy, logits, t, weight, ignore_index=IGNORE)
        for t in (target, ignored)
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    loss, grad = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, weight * 0, ignore_index=IGNORE)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_large_logits_do_not_overflow(backend, device, scale):
    logits, target, _ = operands((1, 19, 5, 6), (20, 24), device, torch.float32)
    options = {"ignore_index": IGNORE, "reduction": "none"}
    exact = with_gradient(two_steps, logits.double() * scale, target, **options)
    found = with_gradient(gsto_ops.upsample_cross_entropy, logits * scale, target, **options)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-5 + 1e-6 * scale)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=1e-5 + 2e-6 * scale)


def test_a_class_that_cannot_be(backend, device):
    # -inf masks a class out; where the sizes are equal no interpolation spreads it.
    logits, target, _ = operands((1, 4, 6, 7), (6, 7), device, torch.float32)
    logits[:, 3] = -math.inf
    target[target == 3] = 0
    loss, grad = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, ignore_index=IGNORE)
    expected, expected_grad = with_gradient(two_steps, logits[:, :3], target, ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[:, :3], expected_grad)
    assert grad[:, 3].abs().max() < 1e-30


def test_nan_logits_are_not_hidden(backend, device):
    logits, target, _ = operands((2, 4, 6, 7), (12, 14), device, torch.float32, ignored=0)
    logits[1, 2, 3, 3] = math.nan
    loss = gsto_ops.upsample_cross_entropy(logits, target, reduction="none")
    assert torch.equal(loss.isnan(), two_steps(logits, target, reduction="none").isnan())
    assert gsto_ops.upsample_cross_entropy(logits, target).isnan()


@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("bad", [6, 100, -1])
def test_labels_that_are_no_class(backend, device, labels, bad):
    if bad < 0 and labels == torch.uint8:
        bad = 254
    logits, target, _ = operands((2, 6, 4, 5), (16, 20), device, torch.float32, labels)
    target[1, 7, 9] = bad
    call = lambda **o: gsto_ops.upsample_cross_entropy(logits.requires_grad_(), target, ignore_index=IGNORE, **o)  # noqa: E731
    if device == "cpu":
        with pytest.raises(IndexError, match=str(bad)):
            call()
        return
    loss = call(reduction="none")
    assert loss.isnan().nonzero().tolist() == [[1, 7, 9]]
    assert call().isnan() and call(reduction="sum").isnan()
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert not grad[0].isnan().any() and grad[1].isnan().any()


def test_hard_pixels_alone_get_gradients(backend, device):
    """The mining of hard examples: the loss of every pixel, a selection of them, and its gradient."""
    logits, target, weight = operands((2, 19, 6, 8), (24, 32), device, torch.float32)
    found, expected = [], []
    for function, into in ((gsto_ops.upsample_cross_entropy, found), (two_steps, expected)):
        x = logits.clone().requires_grad_()
        losses = function(x, target, weight, ignore_index=IGNORE, reduction="none")
        into.append(losses)
        hard = losses.flatten().topk(200).values
        into += torch.autograd.grad(hard.mean(), x)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6)


def views(map: Tensor) -> list[Tensor]:
    """The same (N, H, W) values in other memory."""
    return [
        torch.stack([map, map], -1)[..., 1],
        map.transpose(0, 2).contiguous().transpose(0, 2),
        torch.cat([map, map], 2)[:, :, : map.shape[2]],
    ]


def test_maps_and_weights_of_any_strides(backend, device):
    logits, target, weight = operands((2, 7, 5, 6), (9, 21), device, torch.float32)
    seed = torch.randn(target.shape, device=device)
    options = {"ignore_index": IGNORE, "reduction": "none"}
    expected = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, weight, seed=seed, **options)
    for t, g in zip(views(target), views(seed), strict=True):
        w = torch.stack([weight, weight])[:, :].t()[:, 1]
        found = with_gradient(gsto_ops.upsample_cross_entropy, logits, t, w, seed=g, **options)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-7)
    # an expanded gradient, as a sum's backward makes it, and one label map for the whole batch
    one = target[:1].expand(2, -1, -1)
    half = torch.tensor(0.5, device=device).expand(one.shape)
    found, expected = (
        with_gradient(gsto_ops.upsample_cross_entropy, logits, t, seed=g, **options)
        for t, g in ((one, half), (one.contiguous(), half.contiguous()))
    )
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape, size", SHAPES.values(), ids=SHAPES)
def test_every_element_is_written(instruction_set, fresh_memory_is_nan, layout, shape, size):
    logits, target, weight = operands(shape, size, dtype=torch.float32)
    for reduction in ("mean", "sum", "none"):
        results = OPS.upsample_cross_entropy(LAYOUTS[layout](logits), target, weight, IGNORE, reduction, False)
        assert not any(r.isnan().any() for r in results)
        seed = torch.ones_like(results[0])
        grad = OPS.upsample_cross_entropy_backward(
            seed, LAYOUTS[layout](logits), target, weight, *results[1:], IGNORE, reduction, False
        )
        assert not grad.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(instruction_set, dtype):
    for shape, size in SHAPES.values():
        if shape[0] == 0:
            continue
        logits, target, weight = operands(shape, size, dtype=dtype)
        options = {"ignore_index": IGNORE, "reduction": "none", "seed": torch.randn(target.shape)}
        exact = with_gradient(two_steps, logits.double(), target, weight.double(), **options)
        plain = with_gradient(two_steps, logits, target, weight, **options)
        with gsto_ops.use_backend("cpu"):
            ours = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, weight, **options)
        check_errors(ours, plain, exact, largest_term(shape, target, options))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_results_do_not_depend_on_the_number_of_threads(one_thread, layout):
    if reason := gsto_ops.backends.why_not("cpu"):
        pytest.skip(reason)
    logits, target, weight = operands((2, 19, 24, 40), (96, 160), dtype=torch.float32)
    runs = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        with gsto_ops.use_backend("cpu"):
            runs.append(
                with_gradient(
                    gsto_ops.upsample_cross_entropy, LAYOUTS[layout](logits), target, weight, ignore_index=IGNORE
                )
            )
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_what_is_kept_for_the_backward_pass(backend, device):
    """The small logits, the labels and 4 bytes per pixel; never the upsampled logits."""
    if backend == "reference":
        pytest.skip("the reference keeps what autograd keeps")
    logits, target, weight = operands((2, 19, 16, 32), (64, 128), device, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        gsto_ops.upsample_cross_entropy(logits.requires_grad_(), target, weight, ignore_index=IGNORE)
    size = lambda t: t.numel() * t.element_size()  # noqa: E731
    assert sorted(map(size, kept)) == sorted([size(logits), size(target), size(weight), 4 * target.numel(), 4])


def test_autocast_changes_nothing(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        logits, target, weight = operands((2, 5, 4, 6), (8, 12), device, dtype)
        expected = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, weight, ignore_index=IGNORE)
        with torch.autocast(device, torch.bfloat16):
            found = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, weight, ignore_index=IGNORE)
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == e.dtype and torch.equal(f, e)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compile_fullgraph(backend, device, reduction):
    logits, target, weight = operands((2, 5, 4, 6), (8, 12), device, torch.float32)
    options = {"ignore_index": IGNORE, "reduction": reduction}
    compiled = torch.compile(gsto_ops.upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = with_gradient(gsto_ops.upsample_cross_entropy, logits, target, weight, **options)
    for f, e in zip(with_gradient(compiled, logits, target, weight, **options), expected, strict=True):
        torch.testing.assert_close(f, e)


def operator_arguments(dtype=torch.float64):
    for reduction, weighted, align_corners in (("mean", True, False), ("sum", False, True), ("none", True, False)):
        for layout in ("nchw", "nhwc", "sliced"):
            logits, target, weight = operands((2, 3, 3, 4), (5, 7), dtype=dtype)
            logits = LAYOUTS[layout](logits).requires_grad_()
            yield logits, target, weight if weighted else None, IGNORE, reduction, align_corners


def test_opcheck():
    for arguments in operator_arguments(torch.float32):
        torch.library.opcheck(OPS.upsample_cross_entropy.default, arguments)
        loss, logsumexp, mass = OPS.upsample_cross_entropy(*arguments)
        input, *others = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
        backward = (torch.ones_like(loss), input, *others[:2], logsumexp, mass, *others[2:])
        torch.library.opcheck(
            OPS.upsample_cross_entropy_backward.default, backward, test_utils=("test_schema", "test_faketensor")
        )


def test_gradcheck_and_double_backward():
    for input, *others in operator_arguments():
        function = lambda x, others=others: OPS.upsample_cross_entropy(x, *others)[0]  # noqa: E731
        torch.autograd.gradcheck(function, (input,))
        torch.autograd.gradgradcheck(function, (input,))


def test_fake_strides_are_the_real_ones():
    for layout in LAYOUTS.values():
        for channels in (1, 4):
            logits, target, weight = operands((2, channels, 6, 5), (11, 13), dtype=torch.bfloat16)
            for reduction in ("mean", "sum", "none"):
                arguments = (layout(logits), target, weight, IGNORE, reduction, False)
                real = OPS.upsample_cross_entropy(*arguments)
                backward = (torch.ones_like(real[0]), *arguments[:3], *real[1:], *arguments[3:])
                grad = OPS.upsample_cross_entropy_backward(*backward)
                with FakeTensorMode() as mode:
                    fakes = [
                        [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given]
                        for given in (arguments, backward)
                    ]
                    fake = (*OPS.upsample_cross_entropy(*fakes[0]), OPS.upsample_cross_entropy_backward(*fakes[1]))
                for r, f in zip((*real, grad), fake, strict=True):
                    assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
                assert grad.is_contiguous(memory_format=layout_of(arguments[0]))


def test_reference_returns_what_the_backward_pass_needs():
    logits, target, weight = operands((2, 4, 5, 6), (10, 12))
    loss, logsumexp, mass = reference.upsample_cross_entropy(logits, target, weight, IGNORE, "mean")
    up = F.interpolate(logits, size=(10, 12), mode="bilinear")
    torch.testing.assert_close(logsumexp, up.exp().sum(1).log())
    torch.testing.assert_close(mass, sum(weight[c] * (target == c).sum() for c in range(4)))
    torch.testing.assert_close(loss, F.cross_entropy(up, target, weight, ignore_index=IGNORE))
