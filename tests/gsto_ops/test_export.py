"""torch.export of the functions: PyTorch's own operators unless a backend was chosen by name, for every size."""

import pytest
import torch
from torch import nn

import gsto_ops

AUTO = torch.export.Dim.AUTO
SIZES = [(2, 6, 12, 8), (1, 6, 7, 9), (3, 6, 5, 16)]


class Call(nn.Module):
    """One function, with operands that do not depend on the input."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.operands = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x):
        return self.function(x, *self.operands)


GATE, BIAS, WEIGHT = (1, 6, 1, 1), (1,), (4, 6, 1, 1)
CALLS = {
    "up": Call(lambda x, r, b, w: gsto_ops.gated_scale_transfer(x, r, b, w, scale_factor=2), GATE, BIAS, WEIGHT),
    "nearest": Call(lambda x, r: gsto_ops.gated_scale_transfer(x, r, scale_factor=2, mode="nearest"), GATE),
    "down": Call(
        lambda x, r, b, w: gsto_ops.gated_scale_transfer(x, r, b, w, scale_factor=0.5, mode="avg"), GATE, BIAS, WEIGHT
    ),
    "fixed size": Call(lambda x, r: gsto_ops.gated_scale_transfer(x, r, size=(3, 5), mode="avg"), GATE),
    "supervised": Call(
        lambda x, p, r: gsto_ops.supervised_gated_scale_transfer(x, p, None, r, scale_factor=2),
        (3, 6, 1, 1),
        (1, 3, 1, 1),
    ),
    "pyramid": Call(lambda x, r: gsto_ops.gated_pyramid_pool(x, r, bins=[1, 2, 3])[0], (3, 6, 1, 1)),
    "affine": Call(
        lambda x, s, t: gsto_ops.affine_scale_transfer(x, s, t, activation="relu", scale_factor=2), (6,), (6,)
    ),
    "module": gsto_ops.GatedScaleTransfer(6, 4, scale_factor=2, num_classes=3).eval(),
}


def exported(module):
    return torch.export.export(module, (torch.randn(SIZES[0]),), dynamic_shapes=({0: AUTO, 2: AUTO, 3: AUTO},))


def namespaces(program):
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("call", CALLS)
def test_exported_programs_need_nothing_but_torch(call):
    program = exported(CALLS[call])
    assert namespaces(program) == {"aten"}
    run = program.module()
    for size in SIZES:
        x = torch.randn(size)
        torch.testing.assert_close(run(x), CALLS[call](x), atol=1e-5, rtol=1e-5)


def test_a_backend_chosen_by_name_stays():
    if "cpu" not in gsto_ops.available_backends():
        pytest.skip("the C++ extension is not built")
    with gsto_ops.use_backend("cpu"):
        program = exported(CALLS["up"])
    assert "gsto_ops" in namespaces(program)
    x = torch.randn(SIZES[1])
    torch.testing.assert_close(program.module()(x), CALLS["up"](x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("call", ["up", "down", "pyramid"])
def test_onnx(call, tmp_path):
    """Windows and steps follow the size of the input at run time."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the packages of the extra [export] are not installed")
    file = tmp_path / "call.onnx"
    torch.onnx.export(exported(CALLS[call]), verbose=False).save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = torch.randn(size)
        expected = CALLS[call](x)
        expected = expected if isinstance(expected, list) else [expected]
        outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for actual, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), wanted.detach(), atol=1e-4, rtol=1e-4)
