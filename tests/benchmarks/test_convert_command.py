import pytest
import torch

from gsto_benchmarks import cli
from gsto_models import create_model, load_checkpoint

NAME = "hrnetv2_w18_small_v2"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A trainer's checkpoint: wrapped, prefixed, ordinary BatchNorm."""
    model = create_model(NAME, num_classes=5)
    torch.nn.init.normal_(model.bn1.weight)
    path = tmp_path_factory.mktemp("weights") / "trained.ckpt"
    torch.save({"state_dict": {f"network.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, path)
    return path


def weights(path):
    model = create_model(NAME, num_classes=5)
    load_checkpoint(model, path)
    return model.state_dict()


def test_there_and_back(file, tmp_path, capsys):
    released, native = tmp_path / "new" / "released.pth", tmp_path / "native.pth"
    assert cli.main(["convert", str(file), str(released), "--to", "released"]) == 0
    assert f"looks like {NAME}" in capsys.readouterr().out
    names = list(torch.load(released, weights_only=True))
    assert all(name.startswith("model.") for name in names)
    assert cli.main(["convert", str(released), str(native)]) == 0
    assert "in-place ABN" in capsys.readouterr().out
    before, after = weights(file), torch.load(native, weights_only=True)
    assert set(after) == {name for name in before if "num_batches_tracked" not in name}
    sign = before["bn1.weight"].sign()
    assert (sign < 0).any()
    assert torch.equal(after["bn1.weight"], before["bn1.weight"] * sign)
    assert torch.equal(after["conv1.weight"], before["conv1.weight"] * sign[:, None, None, None])


def test_source_can_be_given(file, tmp_path, capsys):
    out = tmp_path / "out.pth"
    assert cli.main(["convert", str(file), str(out), "--source", "inplace_abn"]) == 0
    assert "source='inplace_abn'" in capsys.readouterr().out
    assert torch.equal(torch.load(out, weights_only=True)["bn1.weight"], weights(file)["bn1.weight"].abs() + 1e-5)


def test_safetensors(file, tmp_path):
    pytest.importorskip("safetensors", reason="the package safetensors is not installed")
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(file), str(out)]) == 0
    before, after = weights(file), weights(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_line_about_what_is_wrong(file, tmp_path, capsys):
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"not weights")
    for given, message in (
        (tmp_path / "none.pth", "none.pth: no such file"),
        (junk, "junk.pth: not a file of tensors"),
    ):
        assert cli.main(["convert", str(given), str(tmp_path / "out.pth")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("gsto: ") and "Traceback" not in error
    with pytest.raises(SystemExit):
        cli.main(["convert", str(file), str(tmp_path / "out.pth"), "--to", "relesed"])
    assert "native" in capsys.readouterr().err
