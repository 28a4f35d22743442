"""What ``upsample_cross_entropy`` says to arguments that cannot work, and its compiled operator to a direct call with them."""

import pytest
import torch

import gsto_ops

OPS = torch.ops.gsto_ops
IGNORE = 255
X, T = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.int64)
BAD = {
    "input must have 4 dimensions": lambda f: f(X[0], T),
    "input must be a floating-point": lambda f: f(X.long(), T),
    "target must be a torch.Tensor": lambda f: f(X, [0]),
    r"target must be torch.int64, torch.int32, torch.uint8, got torch.float32": lambda f: f(X, T.float()),
    r"target must have shape \(2, H, W\)": lambda f: f(X, T[:1]),
    r"got \(2, 1, 8, 10\)": lambda f: f(X, T[:, None]),
    r"got \(2, 0, 10\)": lambda f: f(X, T[:, :0]),
    "target must be on the device of input, cpu, got meta": lambda f: f(X, T.to("meta")),
    r"weight must have shape \(3,\)": lambda f: f(X, T, torch.ones(4)),
    "weight must be torch.float32 where input is torch.bfloat16": lambda f: f(
        X.bfloat16(), T, torch.ones(3).bfloat16()
    ),
    "weight must be torch.float64": lambda f: f(X.double(), T, torch.ones(3)),
    "ignore_index must be an int, got 2.5": lambda f: f(X, T, ignore_index=2.5),
    "reduction must be one of .*, got 'average'": lambda f: f(X, T, reduction="average"),
    "align_corners must be a bool": lambda f: f(X, T, align_corners=1),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message](gsto_ops.upsample_cross_entropy)


@pytest.mark.parametrize(
    "message, change",
    [
        (r"target must have shape \(2, H, W\)", {1: T[:1]}),
        ("target must be int64", {1: T.double()}),
        ("weight must have shape", {2: torch.ones(2)}),
        ("reduction must be mean, sum or none, got all", {4: "all"}),
    ],
)
def test_direct_calls_of_the_compiled_operator_are_checked(instruction_set, message, change):
    arguments = [X, T, torch.ones(3), IGNORE, "sum", False]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(RuntimeError, match=f"upsample_cross_entropy: {message}"):
        OPS.upsample_cross_entropy(*arguments)


def test_direct_calls_of_the_compiled_backward_are_checked(instruction_set):
    logsumexp, mass, one = torch.zeros(2, 8, 10), torch.tensor(1.0), torch.tensor(1.0)
    call = OPS.upsample_cross_entropy_backward
    for message, arguments in {
        "grad_loss must have shape": (one, X, T, None, logsumexp, mass, IGNORE, "none", False),
        "grad_loss of dtype": (one.double(), X, T, None, logsumexp, mass, IGNORE, "sum", False),
        "logsumexp must have shape": (one, X, T, None, logsumexp[:, 1:], mass, IGNORE, "sum", False),
        "mass must have shape": (one, X, T, None, logsumexp, mass[None], IGNORE, "mean", False),
    }.items():
        with pytest.raises(RuntimeError, match=f"upsample_cross_entropy_backward: {message}"):
            call(*arguments)
    with pytest.raises(IndexError, match="label 3"):
        call(one, X, T + 3, None, logsumexp, mass, IGNORE, "sum", False)
