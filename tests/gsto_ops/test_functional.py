"""The public functions on the CPU's backends: values, gradients, layouts, autocast, errors. GPUs: test_sweep.py."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import gsto_ops

BACKENDS = [name for name in gsto_ops.available_backends() if name in ("cpu", "reference")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with gsto_ops.use_backend(request.param):
        yield request.param


def operands(channels=6, out_channels=4, size=(5, 7), batch=2, dtype=torch.float64, device="cpu"):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)  # noqa: E731
    return {
        "input": make(batch, channels, *size),
        "gate_weight": make(1, channels, 1, 1) / channels**0.5,
        "gate_bias": make(1),
        "weight": make(out_channels, channels, 1, 1) / channels**0.5,
        "bias": make(out_channels),
    }


def eager(
    input,
    gate_weight,
    gate_bias=None,
    weight=None,
    bias=None,
    *,
    size,
    mode="bilinear",
    align_corners=False,
    activation=None,
):
    """What a user would write today."""
    gate = torch.sigmoid(F.conv2d(input, gate_weight, gate_bias))
    output = input * gate
    if weight is not None:
        output = F.conv2d(output, weight, bias)
    if activation == "relu":
        output = output.relu()
    if mode == "avg":
        return F.adaptive_avg_pool2d(output, size), gate
    corners = {"align_corners": align_corners} if mode == "bilinear" else {}
    return F.interpolate(output, size=size, mode=mode, **corners), gate


@pytest.mark.parametrize(
    "mode, align_corners", [("bilinear", False), ("bilinear", True), ("avg", False), ("nearest", False)]
)
@pytest.mark.parametrize("size", [(5, 7), (10, 14), (2, 3), (9, 4)])
@pytest.mark.parametrize("present", ["gate only", "no bias", "all"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_values_and_gradients(backend, mode, align_corners, size, present, activation):
    tensors = operands()
    drop = {"gate only": ("gate_bias", "weight", "bias"), "no bias": ("gate_bias", "bias"), "all": ()}[present]
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name not in drop}
    options = {"size": size, "mode": mode, "align_corners": align_corners, "activation": activation}
    output, gate = gsto_ops.gated_scale_transfer(**tensors, **options, return_gate=True)
    expected, expected_gate = eager(**tensors, **options)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gate, expected_gate, atol=1e-12, rtol=1e-12)
    grads = torch.randn_like(output), torch.randn_like(gate)
    inputs = list(tensors.values())
    for outputs, seeds in [((output, gate), grads), ((output,), grads[:1])]:
        oracle = (expected, expected_gate)[: len(outputs)]
        actual = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True)
        wanted = torch.autograd.grad(oracle, inputs, seeds, retain_graph=True)
        for name, a, w in zip(tensors, actual, wanted, strict=True):
            torch.testing.assert_close(a, w, atol=1e-11, rtol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_gradient_of_the_gate_alone(backend):
    tensors = {name: tensor.requires_grad_() for name, tensor in operands().items()}
    _, gate = gsto_ops.gated_scale_transfer(**tensors, scale_factor=2, return_gate=True)
    gate.square().sum().backward()
    expected = F.conv2d(tensors["input"], tensors["gate_weight"], tensors["gate_bias"]).sigmoid().square().sum()
    wanted = torch.autograd.grad(expected, [tensors["input"], tensors["gate_weight"], tensors["gate_bias"]])
    for name, w in zip(("input", "gate_weight", "gate_bias"), wanted, strict=True):
        torch.testing.assert_close(tensors[name].grad, w)


@pytest.mark.parametrize("scale_factor", [2, 0.5, 1.7, (0.4, 3), 1])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_scale_factor_is_that_of_interpolate(backend, scale_factor, mode):
    tensors = operands(size=(7, 9))
    output = gsto_ops.gated_scale_transfer(**tensors, scale_factor=scale_factor, mode=mode)
    gated = F.conv2d(tensors["input"], tensors["gate_weight"], tensors["gate_bias"]).sigmoid() * tensors["input"]
    factors = scale_factor if isinstance(scale_factor, tuple) else (scale_factor, scale_factor)
    expected = F.interpolate(
        F.conv2d(gated, tensors["weight"], tensors["bias"]), scale_factor=[float(f) for f in factors], mode=mode
    )
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_supervised(backend, bias, dtype, atol):
    tensors = operands(dtype=dtype)
    tensors["class_weight"], tensors["class_bias"] = torch.randn(3, 6, 1, 1, dtype=dtype), torch.randn(3, dtype=dtype)
    tensors["gate_weight"] = torch.randn(1, 3, 1, 1, dtype=dtype)
    if not bias:
        tensors |= {"class_bias": None, "gate_bias": None}
    leaves = [tensor.requires_grad_() for tensor in tensors.values() if tensor is not None]
    output, class_map, gate = gsto_ops.supervised_gated_scale_transfer(
        **tensors, size=(3, 3), mode="avg", return_gate=True
    )
    expected_map = F.conv2d(tensors["input"], tensors["class_weight"], tensors["class_bias"])
    expected_gate = F.conv2d(expected_map, tensors["gate_weight"], tensors["gate_bias"]).sigmoid()
    expected = F.adaptive_avg_pool2d(F.conv2d(expected_gate * tensors["input"], tensors["weight"], tensors["bias"]), 3)
    outputs, oracle = (output, class_map, gate), (expected, expected_map, expected_gate)
    seeds = [torch.randn_like(o) for o in outputs]
    for a, e in zip(outputs, oracle, strict=True):
        torch.testing.assert_close(a, e, atol=atol, rtol=atol)
    actual, wanted = (torch.autograd.grad(o, leaves, seeds) for o in (outputs, oracle))
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, atol=10 * atol, rtol=atol)
    assert len(gsto_ops.supervised_gated_scale_transfer(**tensors, size=3)) == 2


def test_compilers_and_exporters_get_the_class_map_as_a_convolution(backend):
    x, weight, theta = torch.randn(1, 6, 4, 4), torch.randn(3, 6, 1, 1), torch.randn(1, 3, 1, 1)
    graphs = []

    def function(x):
        return gsto_ops.supervised_gated_scale_transfer(x, weight, None, theta, size=2)[1]

    def keep(graph, _):
        graphs.append(graph.code)
        return graph.forward

    torch.compile(function, backend=keep, fullgraph=True)(x)
    graphs.append(str(torch.jit.trace(function, x).inlined_graph))
    for graph in graphs:
        assert "conv" in graph and "ops.class_map" not in graph and "ops::class_map" not in graph
    with torch.profiler.profile() as profile:
        function(x)
    assert any("class_map" in event.name for event in profile.events()) == (backend == "cpu")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (10, 14), (2, 3)])
def test_layout_follows_the_input(backend, channels_last, size):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    tensors = operands()
    tensors["input"] = tensors["input"].to(memory_format=memory_format).requires_grad_()
    output = gsto_ops.gated_scale_transfer(**tensors, size=size)
    assert output.is_contiguous(memory_format=memory_format)
    output.backward(torch.randn_like(output))
    assert tensors["input"].grad.is_contiguous(memory_format=memory_format)


def test_autocast_runs_in_its_dtype(backend):
    tensors = {name: tensor.requires_grad_() for name, tensor in operands(dtype=torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        output, gate = gsto_ops.gated_scale_transfer(**tensors, size=(9, 9), return_gate=True)
        direct = torch.ops.gsto_ops.gated_scale_transfer(
            *tensors.values(), "none", (9, 9), "bilinear", False, None, None
        )[0]
        supervised = gsto_ops.supervised_gated_scale_transfer(
            tensors["input"], torch.randn(3, 6, 1, 1), None, torch.randn(1, 3, 1, 1), scale_factor=2
        )
    assert {t.dtype for t in (output, gate, direct, *supervised)} == {torch.bfloat16}
    output.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())
    expected, _ = eager(**tensors, size=(9, 9))
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(backend, batch):
    tensors = {name: tensor.requires_grad_() for name, tensor in operands(batch=batch).items()}
    output = gsto_ops.gated_scale_transfer(**tensors, scale_factor=2)
    assert output.shape == (batch, 4, 10, 14)
    output.sum().backward()
    assert tensors["weight"].grad.shape == tensors["weight"].shape
    assert batch or not tensors["weight"].grad.any()


def test_scale_transfer():
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(gsto_ops.scale_transfer(x, size=(8, 3)), F.interpolate(x, size=(8, 3), mode="bilinear"))
    torch.testing.assert_close(gsto_ops.scale_transfer(x, scale_factor=0.5, mode="avg"), F.avg_pool2d(x, 2))
    assert gsto_ops.scale_transfer(x, scale_factor=1) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert gsto_ops.scale_transfer(x.bfloat16(), scale_factor=2).dtype == torch.bfloat16


def test_meta_tensors_give_shapes():
    output = gsto_ops.gated_scale_transfer(**operands(device="meta"), size=(8, 9))
    assert output.device.type == "meta" and output.shape == (2, 4, 8, 9)


# --- bad input: each error names the argument, what was given and what is allowed ---


def call(**changes):
    return gsto_ops.gated_scale_transfer(**{**operands(dtype=torch.float32), "size": (4, 4)} | changes)


BAD = {
    "input rank": ({"input": torch.randn(6, 5, 7)}, ValueError, r"input must have 4 dimensions.*\(6, 5, 7\)"),
    "input type": ({"input": [1.0]}, TypeError, "input must be a torch.Tensor, got list"),
    "input dtype": ({"input": torch.ones(2, 6, 5, 7).long()}, TypeError, "input must be a floating-point.*int64"),
    "input empty": ({"input": torch.ones(2, 6, 0, 7)}, ValueError, r"input must have at least one.*\(2, 6, 0, 7\)"),
    "gate_weight missing": ({"gate_weight": None}, TypeError, r"gate_weight must be a torch\.Tensor, got None"),
    "gate_weight shape": (
        {"gate_weight": torch.ones(1, 5, 1, 1)},
        ValueError,
        r"gate_weight must have shape \(1, 6, 1, 1\).*\(1, 5, 1, 1\)",
    ),
    "gate_weight rank": ({"gate_weight": torch.ones(6)}, ValueError, r"gate_weight must have shape.*\(6,\)"),
    "gate_weight dtype": (
        {"gate_weight": torch.ones(1, 6, 1, 1).double()},
        TypeError,
        "gate_weight must have the dtype of input, torch.float32, got torch.float64",
    ),
    "gate_weight integer": (
        {"gate_weight": torch.ones(1, 6, 1, 1).int()},
        TypeError,
        "gate_weight must be a floating-point",
    ),
    "gate_bias shape": ({"gate_bias": torch.ones(2)}, ValueError, r"gate_bias must have shape \(1,\).*\(2,\)"),
    "weight channels": (
        {"weight": torch.ones(4, 7, 1, 1)},
        ValueError,
        r"weight must have shape \(any, 6, 1, 1\).*\(4, 7, 1, 1\)",
    ),
    "weight 3x3": ({"weight": torch.ones(4, 6, 3, 3)}, ValueError, r"weight must have shape"),
    "bias shape": ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(4,\).*\(5,\)"),
    "bias alone": ({"weight": None}, ValueError, "bias belongs to the projection"),
    "device": (
        {"weight": torch.ones(4, 6, 1, 1, device="meta")},
        ValueError,
        "weight must be on the device of input, cpu, got meta",
    ),
    "both": ({"scale_factor": 2}, ValueError, "size or scale_factor, not both"),
    "neither": ({"size": None}, ValueError, "one of size and scale_factor must be given"),
    "size zero": ({"size": (0, 4)}, ValueError, r"size must be a positive int.*\(0, 4\)"),
    "size negative": ({"size": -3}, ValueError, "size must be a positive int.*-3"),
    "size float": ({"size": 2.0}, TypeError, r"size must be a positive int.*2\.0"),
    "size triple": ({"size": (1, 2, 3)}, ValueError, r"size must be.*\(1, 2, 3\)"),
    "scale zero": ({"size": None, "scale_factor": 0}, ValueError, "scale_factor must be a positive number.*got 0"),
    "scale nan": ({"size": None, "scale_factor": float("nan")}, ValueError, "scale_factor must be.*nan"),
    "scale text": ({"size": None, "scale_factor": "2"}, TypeError, "scale_factor must be a positive number.*'2'"),
    "scale too small": ({"size": None, "scale_factor": 0.1}, ValueError, "scale_factor=0.1 makes an empty output"),
    "mode": ({"mode": "bicubic"}, ValueError, r"mode must be one of \('bilinear', 'avg', 'nearest'\), got 'bicubic'"),
    "align_corners": ({"mode": "avg", "align_corners": True}, ValueError, "align_corners=True is for mode='bilinear'"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be 'relu' or None, got 'gelu'"),
    "align_corners type": ({"align_corners": 1}, TypeError, "align_corners must be a bool, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "name, shape", [("class_weight", (3, 5, 1, 1)), ("class_bias", (2,)), ("gate_weight", (1, 6, 1, 1))]
)
def test_bad_supervised_input(name, shape):
    good = {"class_weight": torch.ones(3, 6, 1, 1), "class_bias": torch.ones(3), "gate_weight": torch.ones(1, 3, 1, 1)}
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        gsto_ops.supervised_gated_scale_transfer(torch.ones(2, 6, 4, 4), **good | {name: torch.ones(shape)}, size=2)


def test_every_backend_gives_the_same():
    tensors = operands(channels=18, out_channels=36, size=(17, 33), dtype=torch.float32)
    for size, mode in itertools.product([(8, 16), (34, 66), (17, 33)], ["bilinear", "avg", "nearest"]):
        results = []
        for name in BACKENDS:
            with gsto_ops.use_backend(name):
                results.append(gsto_ops.gated_scale_transfer(**tensors, size=size, mode=mode))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-4)
