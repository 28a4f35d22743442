"""gsto bench loading, gsto bench feed: data on its way to a network."""

import json
import time

import pytest

from gsto_benchmarks.bench import feed, loading, report
from gsto_benchmarks.cli import main


def test_loading(tmp_path, capsys):
    command = [
        "bench",
        "loading",
        "lip",
        "camvid",
        "--files",
        "2",
        "--workers",
        "0",
        "--seconds",
        "0.02",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    rows = json.loads((tmp_path / "loading.json").read_text())["rows"]
    assert [(row["dataset"], row["files"]) for row in rows] == [("lip", "400x250"), ("camvid", "360x480")]
    for row in rows:
        assert row["images_per_s_core"] == pytest.approx(1e3 / row["ms"])
        assert 0 < row["image_ms"] < row["ms"] and row["images_per_s"] > 0
    assert "images/s per core" in capsys.readouterr().out


def test_loading_real_files(data_root, tmp_path):
    command = ["bench", "loading", "camvid", "--root", str(data_root / "camvid_mini"), "--files", "2", "--workers", "0"]
    assert main([*command, "--seconds", "0.02", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "loading.json").read_text())["rows"][0]["kind"] == "real"


def test_cpu_times_leave_out_sleep():
    assert max(loading.cpu_times(lambda index: time.sleep(0.002), 2, 1e-6)) < 2


@pytest.mark.parametrize(
    "command, message",
    [
        (["loading", "nothing"], "no such data set: nothing; there are cityscapes"),
        (["loading", "--root", "x"], "--root needs the name of one data set"),
        (["loading", "lip", "--files", "0"], "--files must be at least 1, got 0"),
        (["loading", "lip", "--seconds", "0"], "--seconds must be > 0, got 0"),
        (["feed", "-c", "nothing"], "-c nothing: neither a file nor a shipped configuration"),
        (["feed", "-c", "camvid", "--steps", "1"], "--steps must be at least 3, got 1"),
        (["feed", "-c", "camvid", "--resume"], "resume, dry_run and ckpt_path are not for it"),
    ],
)
def test_wrong_use_is_named(command, message, capsys):
    assert main(["bench", *command]) == 2
    assert message in capsys.readouterr().err


def test_feed_trains_and_leaves_nothing(data_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--data.root", str(data_root / "camvid_mini"), "--data.batch_size", "2", "--data.crop_size", "[64,64]"]
    command = [
        "bench",
        "feed",
        "-c",
        "camvid",
        *settings,
        "--data.num_workers",
        "0",
        "--steps",
        "4",
        "--out",
        "results",
    ]
    assert main(command) == 0
    row = json.loads((tmp_path / "results" / "feed.json").read_text())["rows"][0]
    assert 0 < row["waiting"] < 1 and row["images_per_s"] < row["images_per_s_fed"]
    assert [file.name for file in tmp_path.iterdir()] == ["results"]
    assert "share waiting" in capsys.readouterr().out


def test_meter_tells_waits_from_steps():
    class Network:
        device = type("device", (), {"type": "cpu"})

    meter = feed.FeedMeter()
    for _ in range(4):
        time.sleep(0.02)
        meter.on_train_batch_start(None, Network, None, 0)
        time.sleep(0.005)
        meter.on_train_batch_end(None, Network, None, None, 0)
    assert len(meter.steps) == len(meter.waits) == 3
    assert all(wait >= 0.02 for wait in meter.waits) and all(step >= 0.005 for step in meter.steps)


@pytest.mark.parametrize(
    "waiting, workers, fed, text",
    [
        (0.01, 4, 101.0, "Not starved: 1.0%"),
        (0.5, 4, 200.0, "try data.num_workers 8"),
        (0.08, 4, 108.0, "try data.num_workers 5"),
        (0.5, 0, 200.0, "data.num_workers is 0"),
    ],
)
def test_verdict(waiting, workers, fed, text):
    row: report.Row = {"waiting": waiting, "workers": workers, "images_per_s": 100.0, "images_per_s_fed": fed}
    assert text in feed.verdict(row)
