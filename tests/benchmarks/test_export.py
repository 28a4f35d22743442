"""gsto export: files that run without this package, checked against the network."""

import pytest
import torch
from torch import nn

from gsto_benchmarks import cli, export
from gsto_benchmarks.errors import ExportError
from gsto_models import save_checkpoint
from gsto_models.aspp import AtrousPyramid
from gsto_models.config import TASKS, Options, Trunk
from gsto_models.hrnet import HRNet
from gsto_models.pyramid_pooling import PyramidPooling

TINY = Trunk(width=4, stage1_blocks=1, modules=(1, 1, 1), blocks=1)
PAPER = Options(gated_fusion=True, gated_transition=(2, 3), transition_form="paper", gate_bias_init=1.0)
POSE = Options(multi_scale_output=False, upsampling="nearest")


class Head(nn.Module):
    """A head of PSPNet or DeepLabV3 on a backbone that is one convolution."""

    def __init__(self, head):
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, 3, stride=8, padding=1)
        self.head = head

    def forward(self, x):
        return self.head(self.backbone(x))[0]


def options(gate):
    return {"gate": gate, "auxiliary": False, "gate_bias": True, "scale_equalizer": False}


NETWORKS = {
    "paper": lambda: HRNet(TINY, 5, TASKS["segmentation"], PAPER),
    "pose": lambda: HRNet(TINY, 17, TASKS["pose"], POSE),
    "PPM": lambda: Head(PyramidPooling(16, 5, **options("supervised"))),
    "ASPP": lambda: Head(AtrousPyramid(16, 5, output_stride=8, **options("unsupervised"))),
}


def network(name):
    model = NETWORKS[name]()
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 1, 3)
    return model.eval()


FILES = [("paper", ".onnx"), ("PPM", ".onnx"), ("pose", ".pt2"), ("ASPP", ".pt2")]


@pytest.mark.parametrize("name, suffix", FILES)
def test_all_sizes_stay_open(name, suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime", reason="the packages of the extra [export] are not installed")
    out = tmp_path / f"file{suffix}"
    text = export.export_network(network(name), out, (64, 96))
    assert "open: batch, height, width; fixed: nothing" in text
    for shape in ("2x3x64x96", "1x3x96x96", "3x3x71x115"):
        assert f"{shape}: differs" in text
    run = export._runner(out)
    assert run(torch.randn(1, 3, 64, 64)).shape[0] == 1


def test_a_fixed_size(tmp_path):
    pytest.importorskip("onnxruntime", reason="the packages of the extra [export] are not installed")
    import onnx

    out = tmp_path / "folder" / "file.onnx"
    text = export.export_network(network("PPM"), out, (64, 96), open_axes="none")
    assert "open: nothing; fixed: batch, height, width" in text and "1x3x64x96: differs" in text
    model = onnx.load(out)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 64, 96]
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}, "standard operators alone"


def test_what_cannot_stay_open_is_said(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x[:, :, : int(x.mean())]  # a size that depends on the pixels

    with pytest.raises(ValueError, match=r"cannot be traced with open batch; choose fewer \(--open batch or none\): "):
        export.export_network(Fixed().eval(), tmp_path / "file.pt2", (64, 96), open_axes="batch")


def test_a_wrong_program_is_not_left_behind(tmp_path, monkeypatch):
    out = tmp_path / "file.pt2"
    monkeypatch.setattr(export, "_runner", lambda out: lambda image: torch.zeros(1))
    with pytest.raises(ExportError, match=r"the exported program is wrong: 1x3x64x96: differs .* by 1\.0e"):
        export.export_network(network("ASPP"), out, (64, 96), open_axes="none")
    assert not out.exists()


def test_the_command_says_in_one_line_that_a_program_is_wrong(tmp_path, monkeypatch, capsys):
    out = tmp_path / "file.pt2"
    monkeypatch.setattr(export, "load_network", lambda *args, **options: network("ASPP"))
    monkeypatch.setattr(export, "_runner", lambda out: lambda image: torch.zeros(1))
    assert cli.main(["export", str(out), "--open", "none", "--size", "32x64"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"gsto: {out} is removed: the exported program is wrong: 1x3x32x64") and error.count("\n") == 1
    )
    assert not out.exists()


def test_the_command(tmp_path, capsys):
    """From a weight file: the form of the gates, the classes and the task are the file's."""
    from gsto_models import create_model

    weights = save_checkpoint(create_model("hrnetv2_w18_small_v2", num_classes=3), tmp_path / "weights.pth")
    out = tmp_path / "file.pt2"
    command = [
        "export",
        str(out),
        "--model",
        "hrnetv2_w18_small_v2",
        "--ckpt",
        str(weights),
        "--open",
        "none",
        "--size",
        "32x64",
    ]
    assert cli.main(command) == 0
    assert "1x3x32x64: differs" in capsys.readouterr().out
    assert torch.export.load(out).module()(torch.zeros(1, 3, 32, 64)).shape == (1, 3, 8, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["OUT.pt", "--model", "hrnetv2_w18_small_v2"], "must end in .onnx or .pt2"),
        (["OUT.pt2"], "a model name is needed"),
        (["OUT.pt2", "--model", "hrnet"], "unknown model name 'hrnet'"),
        (["OUT.pt2", "--model", "hrnetv2_w18", "--ckpt", "missing.pth"], "missing.pth"),
    ],
)
def test_one_line_about_what_is_wrong(arguments, message, tmp_path, capsys):
    assert cli.main(["export", *(a.replace("OUT", str(tmp_path / "file")) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_sizes_are_checked(tmp_path, capsys):
    for size in ("12", "64x", "16x64"):
        with pytest.raises(SystemExit):
            cli.main(["export", str(tmp_path / "file.pt2"), "--model", "hrnetv2_w18", "--size", size])
        assert f"must be HEIGHTxWIDTH, both at least 32, got '{size}'" in capsys.readouterr().err


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"ONNX needs onnx, onnxscript, onnxruntime: pip install 'gsto_ops\[export\]'"
    ):
        export.export_network(network("ASPP"), tmp_path / "file.onnx", (64, 96))
