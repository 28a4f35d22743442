"""Bad input of the public functions: each error names the argument, what was given and what is allowed.

Those of gated_scale_transfer and its parameters are in test_functional.py, of the loss in test_upsample_cross_entropy_errors.py.
"""

import pytest
import torch
from torch import nn

import gsto_ops

X = torch.ones(2, 6, 4, 4)
GATE, GATES, WEIGHT = torch.ones(1, 6, 1, 1), torch.ones(3, 6, 1, 1), torch.ones(8, 6, 1, 1)
NORM, CONV = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1, bias=False)
SPLIT = {"weight": WEIGHT, "split": [3, 5], "copies": 1}
LAYERS = [[None, [nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)]], [None, None]]


def transfer(**changes):
    return gsto_ops.gated_scale_transfer(**{"input": X, "gate_weight": GATE, "size": 4} | changes)


def affine(**changes):
    return gsto_ops.affine_scale_transfer(
        **{"input": X, "scale": torch.ones(6), "shift": torch.ones(6), "size": 4} | changes
    )


def batch_norm_transfer(**changes):
    tensors = {"input": X, "gate_weight": GATE, "gate_bias": None, "weight": WEIGHT}
    norm = {"norm_weight": torch.ones(8), "norm_bias": torch.ones(8)}
    return gsto_ops.gated_batch_norm_transfer(**tensors | norm | {"size": 4} | changes)


def norm_transfer(**changes):
    given = {"gate_weight": GATE, "gate_bias": None, "projection": CONV, "norm": nn.GroupNorm(2, 8), "size": 4}
    return gsto_ops.gated_norm_transfer(X, **given | changes)


def split(**changes):
    return gsto_ops.gated_split(X, GATES, **SPLIT | changes)


def fusion(**changes):
    gates = [[[nn.Conv2d(6, 1, 1)]] * 2]
    return gsto_ops.gated_fusion(**{"inputs": [X, X[:, :, :2, :2]], "transfers": LAYERS[:1], "gates": gates} | changes)


def norm_sum(**changes):
    return gsto_ops.norm_sum(**{"input": X, "terms": [X, X], "norms": [NORM, NORM]} | changes)


def projected_sum(**changes):
    return gsto_ops.projected_sum(**{"inputs": [X, X[:, :2]], "weight": torch.ones(5, 8, 1, 1)} | changes)


STATISTICS = (torch.ones(5), torch.ones(5))
CASES = [
    (
        transfer,
        {"input": X.to_sparse()},
        TypeError,
        r"input must be a dense tensor \(torch.strided\), got torch.sparse_coo",
    ),
    (transfer, {"bias": 3}, ValueError, "bias belongs to the projection: .* got 3"),
    (transfer, {"gate_bias": 1.0}, TypeError, "gate_bias must be a torch.Tensor, got float"),
    (transfer, {"weight": [1.0]}, TypeError, "weight must be a torch.Tensor, got list"),
    (affine, {"scale": None}, TypeError, "scale must be a torch.Tensor, got None"),
    (affine, {"shift": None}, TypeError, "shift must be a torch.Tensor, got None"),
    (affine, {"scale": torch.ones(5)}, ValueError, r"scale must have shape \(6,\).* got \(5,\)"),
    (affine, {"scale": torch.ones(6).half()}, TypeError, "scale must be torch.float32 where .* got torch.float16"),
    (batch_norm_transfer, {"eps": -1.0}, ValueError, "eps must be a number >= 0, got -1.0"),
    (batch_norm_transfer, {"eps": None}, ValueError, "eps must be a number >= 0, got None"),
    (
        batch_norm_transfer,
        {"norm_weight": torch.ones(8).int()},
        TypeError,
        "norm_weight must be a floating.* torch.int32",
    ),
    (batch_norm_transfer, {"norm_bias": torch.ones(3)}, ValueError, r"norm_bias must have shape \(8,\), .* got \(3,\)"),
    (batch_norm_transfer, {"weight": None}, TypeError, "weight must be a torch.Tensor, got None"),
    (batch_norm_transfer, {"weight": torch.ones(8, 5, 1, 1)}, ValueError, r"weight must have shape \(any, 6, 1, 1\)"),
    (batch_norm_transfer, {"gate_weight": GATES}, ValueError, r"gate_weight must have shape \(1, 6, 1, 1\)"),
    (batch_norm_transfer, {"input": X[0]}, ValueError, "input must have 4 dimensions"),
    (
        batch_norm_transfer,
        {"input": X[:1, :, :1, :1]},
        ValueError,
        r"more than one value per channel, got \(1, 8, 1, 1\)",
    ),
    (batch_norm_transfer, {"activation": "gelu"}, ValueError, "activation must be 'relu' or None, got 'gelu'"),
    (batch_norm_transfer, {"norm_bias": 1.0}, TypeError, "norm_bias must be a floating-point torch.Tensor, got float"),
    (norm_transfer, {"projection": None}, TypeError, "projection must be a 1x1 torch.nn.Conv2d, got NoneType"),
    (norm_transfer, {"projection": nn.Conv2d(6, 8, 3)}, ValueError, r"weight must have shape .* got \(8, 6, 3, 3\)"),
    (norm_transfer, {"norm": "batch"}, TypeError, "norm must be a torch.nn.Module or None, got 'batch'"),
    (norm_transfer, {"activation": "gelu"}, ValueError, "activation must be 'relu' or None, got 'gelu'"),
    (split, {"split": 8}, ValueError, "split must be a list of positive ints, got 8"),
    (split, {"split": [3.0, 5.0]}, ValueError, r"split must be a list of positive ints, got \[3.0, 5.0\]"),
    (split, {"split": [8, 0]}, ValueError, r"split must be a list of positive ints, got \[8, 0\]"),
    (split, {"split": [3, 4]}, ValueError, r"split must add up to the 8 rows of weight, got \(3, 4\)"),
    (split, {"split": [2] * 4}, ValueError, r"split must have at most 3 heights, one per gate, got \(2, 2, 2, 2\)"),
    (split, {"copies": 2}, ValueError, "copies and carriers must be 0 to 1 together, .* got 2 and 0"),
    (split, {"carriers": -1}, ValueError, "copies and carriers must be 0 to 1 together, .* got 1 and -1"),
    (split, {"copies": None}, TypeError, "copies and carriers must be ints, got None and 0"),
    (
        fusion,
        {"transfers": [LAYERS[0][:1]]},
        ValueError,
        r"transfers must have a row .* of 2 inputs, got rows of \[1\]",
    ),
    (
        fusion,
        {"transfers": LAYERS + LAYERS},
        ValueError,
        r"transfers must have .* 1 to 2 outputs.* rows of \[2, 2, 2, 2\]",
    ),
    (fusion, {"gates": []}, ValueError, r"gates must have a row for each .* got rows of \[\]"),
    (
        norm_sum,
        {"terms": X},
        TypeError,
        "terms must be a list of maps and norms a list of modules, got Tensor and list",
    ),
    (norm_sum, {"norms": NORM}, TypeError, "norms a list of modules, got list and BatchNorm2d"),
    (norm_sum, {"norms": []}, ValueError, "terms must be at least one map, and norms as many modules, got 2 and 0"),
    (norm_sum, {"terms": [X, X[:, 1:]]}, ValueError, r"terms\[1\] must be .* got \(2, 5, 4, 4\)"),
    (norm_sum, {"terms": [X[:1, :, :1, :1]] * 2, "input": None}, ValueError, "more than (1|one) value per channel"),
    (norm_sum, {"terms": [X, None]}, TypeError, r"terms\[1\] must be a torch.Tensor, got NoneType"),
    (norm_sum, {"terms": [X, X.to("meta")]}, ValueError, r"terms\[1\] must be on the device .* cpu, got meta"),
    (norm_sum, {"norms": [NORM, None]}, TypeError, r"norms\[1\] must be a torch.nn.Module, got NoneType"),
    (norm_sum, {"norms": [NORM, nn.BatchNorm2d(5)]}, ValueError, r"norms\[1\] must have 6 channels as the maps, got 5"),
    (norm_sum, {"statistics": [None]}, ValueError, "statistics must be None or one entry for each of 2 terms, got 1"),
    (
        norm_sum,
        {"statistics": [None, STATISTICS]},
        ValueError,
        r"statistics\[1\] must be .* shape \(6,\), got \[\(5,\)",
    ),
    (norm_sum, {"carrier": X}, ValueError, r"carrier must .* got \(2, 6, 4, 4\) for no gate"),
    (
        norm_sum,
        {"gate": X[:, :1], "carrier": X[:, :, :2]},
        ValueError,
        r"carrier must .* got \(2, 6, 2, 4\) for a gate",
    ),
    (norm_sum, {"mode": "cubic"}, ValueError, "mode must be 'bilinear' or 'nearest', got 'cubic'"),
    (projected_sum, {"inputs": X}, TypeError, "inputs must be a list of maps, got Tensor"),
    (projected_sum, {"inputs": []}, ValueError, "inputs must be at least one map, got none"),
    (projected_sum, {"inputs": [X, 3]}, TypeError, r"inputs\[1\] must be a torch.Tensor, got int"),
    (
        projected_sum,
        {"inputs": [X, X[:1, :2]]},
        ValueError,
        r"inputs must have the same N, got shapes .*\(1, 2, 4, 4\)",
    ),
    (
        projected_sum,
        {"inputs": [X, X[:, :2].double()]},
        TypeError,
        "weight must have the dtype of input, torch.float64",
    ),
    (projected_sum, {"weight": None}, TypeError, "weight must be a torch.Tensor, got None"),
    (
        projected_sum,
        {"weight": torch.ones(5, 6, 1, 1)},
        ValueError,
        r"weight must .* inputs of \[6, 2\] channels, got \(5, 6",
    ),
    (projected_sum, {"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\), \(out_channels,\), got \(4,\)"),
    (projected_sum, {"inputs": [X], "mode": "avg"}, ValueError, "mode must be 'bilinear' or 'nearest', got 'avg'"),
]


@pytest.mark.parametrize(
    "function", dict.fromkeys(function for function, *_ in CASES), ids=lambda function: function.__name__
)
def test_what_the_cases_change_is_right(function):
    function()


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"), CASES, ids=[f"{f.__name__} {[*c]}" for f, c, *_ in CASES]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(function, changes, error, message, backend):
    with gsto_ops.use_backend(backend), pytest.raises(error, match=message):
        function(**changes)
