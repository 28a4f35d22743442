"""Triton's interpreter for the tests of Triton kernels: sweeps in a process of their own, and what they compare with."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# The interpreter truncates to bfloat16 where GPUs round: twice the error of one rounding, in every map on the way.
TINY = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}


def run_sweeps(file, at_least):
    """Runs the functions sweep_* of a test file in the interpreter, which is chosen when triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "python_functions=sweep_*"]
    done = subprocess.run(
        [*command, file],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least and "skipped" not in done.stdout


def prepare():
    """Mends and speeds up the interpreter of this process."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    multiply_bfloat16(interpreter)
    patch_once(interpreter)


def multiply_bfloat16(interpreter):
    """Makes tl.dot of the interpreter right for bfloat16, which NumPy lacks: it would multiply the numbers' bit patterns."""
    import triton.language as tl

    original = interpreter.InterpreterBuilder.create_dot

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.view("uint16").astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self, a, b, *others):
        return original(self, wide(a), wide(b), *others)

    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_once(interpreter):
    """Halves the interpreter's time: it would patch triton.language anew at every call of a device function, which the launch of
    the kernel has done already. Functions of triton's own modules see other names for it: those are patched once."""
    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if not module.startswith("gsto_ops.") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def assert_close(found, exact, eager, name, tiny, usual):
    """Within twice the error of PyTorch in the same dtype, and a few roundings, in units of the largest or a usual value."""
    assert found.shape == exact.shape, f"{name}: shape {tuple(found.shape)}, not {tuple(exact.shape)}"
    unit = exact.abs().max().clamp_min(usual)
    error = ((found.double() - exact).abs().max() / unit).item()
    allowed = 2 * ((eager.double() - exact).abs().max() / unit).item() + tiny
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
