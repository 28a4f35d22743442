"""The GPU kernels of ``upsample_cross_entropy`` on the CPU against float64: Triton's in its interpreter, CUDA's in the emulator.

The interpreter is chosen when triton is imported, so its sweep runs in a process of its own. Memory that no kernel has written
holds NaN in both.
"""

import importlib
import math

import interpreted
import pytest
import torch
import torch.nn.functional as F

from gsto_ops import reference

IGNORE = 255
# (N, C, h, w), (H, W), align_corners: what each is for is in its name.
CASES = {
    "up4": ((2, 5, 4, 6), (16, 24), False),
    "up4, blocks of classes, rows and columns": ((1, 20, 11, 19), (44, 76), False),
    "up, not whole": ((2, 3, 5, 7), (13, 17), False),
    "align_corners": ((1, 4, 3, 5), (7, 18), True),
    "identity": ((2, 7, 5, 9), (5, 9), False),
    "down, not whole": ((1, 3, 9, 23), (4, 9), False),
    "down, logits that no label sees": ((1, 2, 21, 40), (2, 3), True),
    "more labels than a window of columns has": ((1, 2, 1, 2), (3, 300), False),
    "a row of logits": ((1, 2, 1, 5), (9, 40), False),
    "one label": ((2, 4, 3, 3), (1, 1), False),
    "one class": ((1, 1, 3, 4), (5, 9), False),
    "empty batch": ((0, 4, 5, 5), (10, 10), False),
}


def every_case(forward, backward):
    """Every case, with dtypes, layouts, types of labels, reductions and class weights in turn."""
    for i, (name, (shape, size, align_corners)) in enumerate(CASES.items()):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        reduction = ("mean", "none", "sum")[(i + i // 3) % 3]
        labels = (torch.int64, torch.uint8, torch.int32)[(i + i // 6) % 3]
        layout = (torch.contiguous_format, torch.channels_last)[i // 2 % 2]
        check(forward, backward, name, shape, size, align_corners, dtype, layout, labels, reduction, i % 4 < 2)


def check(forward, backward, name, shape, size, align_corners, dtype, layout, labels, reduction, weighted):
    logits = (2 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)
    target = torch.randint(0, shape[1], (shape[0], *size))
    target[torch.rand(target.shape) < 0.3] = IGNORE
    target.view(-1)[:1] = 0
    target = target.to(labels)
    weight = torch.rand(shape[1]) + 0.5 if weighted else None
    seed = torch.randn(target.shape if reduction == "none" else ())
    loss, logsumexp, mass = forward(logits, target, weight, IGNORE, reduction, align_corners)
    options = (IGNORE, reduction, align_corners)
    grad = backward(seed, logits, target, weight, logsumexp, mass, *options)
    assert grad.stride() == reference_stride(logits) and grad.dtype == dtype, name
    wide = None if weight is None else weight.double()
    exact = reference.upsample_cross_entropy(logits.double(), target, wide, *options)
    exact_grad = reference.upsample_cross_entropy_backward(
        seed.double(), logits.double(), target, wide, *exact[1:], *options
    )
    for found, right in zip((loss, logsumexp, mass), exact, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")
    # Triton's interpreter truncates to bfloat16 where GPUs round.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    largest = float(exact_grad.abs().max()) if grad.numel() else 0.0
    torch.testing.assert_close(
        grad.double(), exact_grad, rtol=tolerance, atol=tolerance * largest + 1e-6, msg=lambda m: f"{name}: {m}"
    )


def reference_stride(logits):
    return torch.ops.gsto_ops.upsample_cross_entropy_backward(
        torch.zeros(()), logits, torch.zeros(logits.shape[0], 1, 1, dtype=torch.int64), None,
        torch.zeros(logits.shape[0], 1, 1), torch.ones(()), IGNORE, "sum", False,
    ).stride()  # fmt: skip


def defined_results(forward, backward):
    """Labels that are no class give NaN, -inf masks a class, nothing labelled is zero, huge logits do not overflow."""
    logits = torch.randn(1, 4, 4, 6)
    target = torch.zeros(1, 8, 12, dtype=torch.int64)
    target[0, 3, 5] = 4
    loss, logsumexp, mass = forward(logits, target, torch.ones(4), IGNORE, "none", False)
    assert loss.isnan().nonzero().tolist() == [[0, 3, 5]]
    assert backward(torch.ones_like(loss), logits, target, None, logsumexp, mass, IGNORE, "none", False).isnan().any()
    for reduction in ("mean", "sum"):
        assert forward(logits, target, None, IGNORE, reduction, False)[0].isnan()

    target[:] = IGNORE
    loss, logsumexp, mass = forward(logits, target, None, IGNORE, "mean", False)
    assert loss == 0 and mass == 0
    assert not backward(torch.ones(()), logits, target, None, logsumexp, mass, IGNORE, "mean", False).any()

    target = torch.randint(0, 3, (1, 4, 6))
    logits[:, 3] = -math.inf
    loss, logsumexp, mass = forward(logits, target, None, IGNORE, "mean", False)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :3], target))
    grad = backward(torch.ones(()), logits, target, None, logsumexp, mass, IGNORE, "mean", False)
    assert not grad[:, 3].any() and grad[:, :3].any()

    logits = 1e4 * torch.randn(1, 4, 4, 6)
    target = torch.randint(0, 4, (1, 8, 12))
    loss = forward(logits, target, None, IGNORE, "none", False)[0]
    up = F.interpolate(logits.double(), size=(8, 12), mode="bilinear")
    torch.testing.assert_close(loss.double(), F.cross_entropy(up, target, reduction="none"), rtol=1e-5, atol=1e-2)


def strided_maps(forward, backward):
    """Labels, log-sum-exp and gradients that are no dense maps; logits in any memory."""
    logits, target = torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 9, 11))
    seed = torch.randn(2, 9, 11)
    other = lambda t: torch.stack([t, t], -1)[..., 0].transpose(0, 2).contiguous().transpose(0, 2)  # noqa: E731
    sliced = torch.cat([logits, logits], 1).to(memory_format=torch.channels_last)[:, 3:]
    results = []
    for x, t, s in ((logits, target, seed), (sliced, other(target), other(seed))):
        loss, logsumexp, mass = forward(x, t, None, IGNORE, "none", False)
        if x is sliced:
            logsumexp = other(logsumexp)
        results.append((loss, backward(s, x, t, None, logsumexp, mass, IGNORE, "none", False)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


CHECKS = [every_case, defined_results, strided_maps]


def test_triton_kernels_in_the_interpreter():
    interpreted.run_sweeps(__file__, at_least=len(CHECKS))


@pytest.mark.parametrize("check_of", CHECKS, ids=lambda f: f.__name__)
def sweep_triton_kernels(check_of, fresh_memory_is_nan):
    interpreted.prepare()
    kernels = importlib.import_module("gsto_ops.triton.upsample_cross_entropy")
    check_of(kernels.forward, kernels.backward)


@pytest.mark.parametrize("check_of", CHECKS, ids=lambda f: f.__name__)
def test_cuda_kernels(check_of, cuda_operators):
    check_of(cuda_operators.upsample_cross_entropy, cuda_operators.upsample_cross_entropy_backward)
