"""The Triton backend as users reach it: through the public functions, with autograd, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CODE = """
import importlib
import torch, gsto_ops
from gsto_ops import backends, reference

torch.manual_seed(0)
assert backends.select(torch.device("cpu"), torch.float32) != "triton"  # never by itself in the interpreter
x = torch.randn(2, 18, 5, 6)
rho, b = torch.randn(1, 18, 1, 1) / 4, torch.randn(1)
w, c = torch.randn(20, 18, 1, 1) / 4, torch.randn(20)
scale, shift = torch.randn(18), torch.randn(18)
gates = torch.randn(2, 18, 1, 1) / 4
target = torch.randint(0, 18, (2, 9, 7))
norm = torch.randn(20), torch.randn(20)
calls = {
    "gated_batch_norm_transfer": (
        lambda *t: gsto_ops.gated_batch_norm_transfer(*t, size=(9, 7))[:1], (x, rho, b, w, *norm)),
    "gated_scale_transfer": (
        lambda *t: gsto_ops.gated_scale_transfer(*t, activation="relu", size=(9, 7), return_gate=True), (x, rho, b, w, c)),
    "gated_projection": (gsto_ops.gated_projection, (x, rho, b, w)),
    "affine_scale_transfer": (lambda *t: (gsto_ops.affine_scale_transfer(*t, size=(2, 3), mode="avg"),), (x, scale, shift)),
    "gated_pyramid_pool": (lambda *t: (*gsto_ops.gated_pyramid_pool(*t, bins=[1, 3])[0],), (x, gates)),
    "upsample_cross_entropy": (lambda x: (gsto_ops.upsample_cross_entropy(x, target),), (x,)),
}
launched = []
for name, (function, operands) in calls.items():
    module = importlib.import_module(f"gsto_ops.triton.{name}")
    for direction in ("forward", "backward"):
        def run(*args, original=getattr(module, direction), called=f"{name} {direction}"):
            launched.append(called)
            return original(*args)
        setattr(module, direction, run)
    results = {}
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in operands]
        with gsto_ops.use_backend(backend):
            outputs = function(*leaves)
            torch.manual_seed(1)
            grads = torch.autograd.grad(outputs, leaves, [torch.randn(o.shape) for o in outputs])
        results[backend] = [*outputs, *grads]
    for actual, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    assert launched == [f"{name} forward", f"{name} backward"], launched
    launched.clear()
    print(name, "equal")
with torch.autocast("cpu", torch.bfloat16), gsto_ops.use_backend("triton"):
    assert gsto_ops.gated_scale_transfer(x, rho, b, w, c, scale_factor=2).dtype == torch.bfloat16
"""


def test_public_functions_on_triton_equal_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    names = "gated_batch_norm_transfer gated_scale_transfer gated_projection affine_scale_transfer gated_pyramid_pool"
    names += " upsample_cross_entropy"
    assert done.stdout.split() == [word for name in names.split() for word in (name, "equal")]
