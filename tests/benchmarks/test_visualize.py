import cv2
import numpy as np
import pytest
import torch

from gsto_benchmarks import cli
from gsto_benchmarks.networks import load_network
from gsto_benchmarks.segmentation import SegmentationTask, make_scene
from gsto_benchmarks.segmentation.montage import Panel, class_colors, save_montage
from gsto_benchmarks.visualize import look, visualize
from gsto_models import create_model, save_checkpoint

GSTO, PLAIN = "gsto_hrnet_w18_small_v2", "hrnetv2_w18_small_v2"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    pixels, _ = make_scene(3, size=(64, 96))
    path = tmp_path_factory.mktemp("image") / "street.png"
    cv2.imwrite(str(path), np.ascontiguousarray(pixels[..., ::-1]))
    return path


@pytest.fixture(scope="module")
def image():
    return make_scene(3, size=(64, 96))[0]


def test_everything_is_kept(image):
    network = create_model(GSTO, num_classes=5).eval()
    insight = look(network, image)
    shapes = {stage: [branch.shape for branch in branches] for stage, branches in insight.branches.items()}
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert shapes == {"stage2": sizes[:2], "stage3": sizes[:3], "stage4": sizes}
    assert len(insight.gates) == 4 + 3 * 9 + 2 * 16 + 2 and insight.gates["att3"].shape == (4, 6)
    assert {name: classes.shape for name, classes in insight.class_maps.items()} == {
        "last_layer_stage2": (16, 24),
        "last_layer_stage3": (16, 24),
    }
    assert insight.prediction.shape == (64, 96)
    assert not any(module._forward_hooks for module in network.modules())


def test_branches_are_means_over_channels(image):
    network, seen = create_model(PLAIN, num_classes=5).eval(), []
    network.stage4.register_forward_hook(lambda module, args, output: seen.extend(output))
    insight = look(network, image)
    for found, branch in zip(insight.branches["stage4"], seen, strict=True):
        np.testing.assert_allclose(found, branch[0].numpy().mean(0), rtol=1e-5)
    assert not insight.gates and not insight.class_maps


@pytest.mark.parametrize(
    ("name", "options", "gates", "class_maps"),
    [
        (
            GSTO,
            {"transition_form": "paper"},
            65,
            ["transition2.2.transfer.predictor", "transition3.3.transfer.predictor"],
        ),
        ("pspnet_r50", {"gate": "supervised"}, 4, ["head.predictor"]),
    ],
)
def test_other_networks(image, name, options, gates, class_maps):
    insight = look(create_model(name, num_classes=5, **options).eval(), image)
    assert len(insight.gates) == gates and insight.branches and insight.prediction.shape == (64, 96)
    assert list(insight.class_maps) == class_maps and not insight.pose


def test_pose_shows_heatmaps(image):
    network = create_model(PLAIN, task="pose").eval()
    insight = look(network, image)
    assert insight.pose and insight.prediction.dtype == np.float32 and insight.prediction.shape == (64, 96)


def test_pictures_of_two_networks(scene, tmp_path, capsys):
    out = tmp_path / "pictures"
    arguments = ["visualize", "--model", GSTO, "--compare", PLAIN, "--image", str(scene), "--out", str(out)]
    assert cli.main(arguments) == 0
    names = [f"street_{name}.png" for name in ("branches", "gates", "predictions")]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    for name in names:
        pixels = cv2.imread(str(out / name))
        assert pixels.shape[1] > 400 and pixels.std() > 20
    both = cv2.imread(str(out / names[0])).shape[1]
    visualize({GSTO: create_model(GSTO).eval()}, [scene], out)
    assert cv2.imread(str(out / names[0])).shape[1] == both / 2


def test_no_picture_of_gates_without_gates(scene, tmp_path):
    files = visualize({PLAIN: create_model(PLAIN).eval()}, [scene], tmp_path)
    assert [file.name for file in files] == ["street_branches.png", "street_predictions.png"]


def test_trainer_s_checkpoint_brings_its_options(tmp_path, image):
    task = SegmentationTask(4, GSTO, gate_form="released", gate_bias_init=4.0, gated_transition=[3])
    path = tmp_path / "run.ckpt"
    torch.save(
        {
            "state_dict": task.state_dict(),
            "hyper_parameters": dict(task.hparams),
            "pytorch-lightning_version": "2.5.0",
        },
        path,
    )
    network = load_network(GSTO, path)
    assert np.array_equal(look(network, image).prediction, look(task.network.eval(), image).prediction)
    assert not network.training
    with pytest.raises(ValueError, match=f"holds a {GSTO}, not a {PLAIN}"):
        load_network(PLAIN, path)


def test_weight_file_brings_its_classes_and_gate_form(tmp_path, image):
    model = create_model(GSTO, num_classes=7, gate_form="released")
    network = load_network(GSTO, save_checkpoint(model, tmp_path / "file.pth"))
    assert np.array_equal(look(network, image).prediction, look(model.eval(), image).prediction)


def test_montage(tmp_path):
    red = np.full((4, 8, 3), (255, 0, 0), np.uint8)
    steps = np.repeat(np.arange(2.0), 4)[None]
    file = save_montage(tmp_path / "a.png", [("title", [[Panel("red", red), Panel("steps", steps, "gate")]])], (4, 8))
    pixels = cv2.imread(str(file))[..., ::-1]
    row = pixels[100]
    assert (row[6:226] == (255, 0, 0)).all()
    assert (row[240] == (68, 1, 84)).all() and (row[440] == (253, 231, 37)).all()  # the ends of viridis
    assert len({tuple(color) for color in class_colors(60)}) == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "gsto_hrnet_w18_smal_v2"], "did you mean gsto_hrnet_w18_small_v2"),
        (["--model", PLAIN, "--ckpt", "missing.pth"], "missing.pth: no such file"),
        (["--model", PLAIN, "--ckpt2", "missing.pth"], "--ckpt2 needs --compare"),
        (["--model", PLAIN, "--image", "missing.png"], "missing.png: no such image"),
        (["--model", PLAIN, "--image", "a/x.png", "b/x.jpg"], "2 images are called x"),
        (["--model", PLAIN, "--image", __file__], "not an image that can be decoded"),
    ],
)
def test_one_line_about_what_is_wrong(options, message, scene, tmp_path, capsys):
    assert cli.main(["visualize", "--image", str(scene), "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
