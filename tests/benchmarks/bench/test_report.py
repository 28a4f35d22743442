"""Results of gsto bench, and their comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gsto_benchmarks.bench import compare, pictures, report
from gsto_benchmarks.cli import main
from gsto_benchmarks.errors import UsageError


def row(name, ms, width=0.1, **more):
    return {"case": name, "ms": ms, "low": ms - width, "high": ms + width, **more}


def test_spread_is_the_middle_half():
    assert report.spread([5.0, 1.0, 2.0, 3.0, 100.0]) == {"ms": 3.0, "low": 2.0, "high": 5.0}
    assert report.spread([2.0]) == {"ms": 2.0, "low": 2.0, "high": 2.0}


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (12.34, "12.3"),
        (0.07136, "0.0714"),
        (1.2e-5, "1.20e-05"),
        (12345.6, "12,346"),
        (float("nan"), "-"),
        (None, "-"),
    ],
)
def test_three_digits(value, text):
    assert report.cell(value) == text


def test_written_and_read_again(tmp_path):
    rows = [row("a", 1.0, error=float("nan")), row("b", 2.0, gpus=4)]
    figure = pictures.bars(rows, "case", "case", "ms", "Cases")
    files = report.write(tmp_path / "new" / "folder", "cases", "Cases", rows, {"times": figure}, ["A note."])
    assert [file.name for file in files] == ["cases.json", "cases.md", "cases-times.png"]
    record = report.read(files[0])
    assert record["rows"][0] == {**row("a", 1.0), "error": None} and record["rows"][1]["gpus"] == 4
    assert record["machine"]["torch"] and record["machine"]["cores"] >= 1
    page = files[1].read_text()
    assert "| b | 2.00 | 1.90 | 2.10 | - | 4 |" in page and "A note." in page and "](cases-times.png)" in page


def test_revision_is_that_of_the_code():
    folder = Path(report.__file__).parent
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode:
        pytest.skip("the package is not in a git checkout")
    assert commit.stdout.startswith(report.machine()["revision"].rstrip("+"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a result of gsto bench"),
        ("[]", "it has no name, machine, rows"),
        ('{"name": "x", "rows": []}', "it has no machine"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        report.read(file)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        report.write(tmp_path / "file", "x", "X", [row("a", 1.0)])


@pytest.mark.parametrize(
    "old, new, word",
    [
        (row("a", 1.0), row("a", 2.0), "slower"),
        (row("a", 2.0), row("a", 1.0), "faster"),
        (row("a", 1.0, 0.6), row("a", 2.0, 0.6), ""),  # the spreads overlap
        (row("a", 1.0, 0.001), row("a", 1.02, 0.001), ""),  # within the tolerance
        (row("a", 1.0, 0.001), row("a", 1.04, 0.001), "slower"),
    ],
)
def test_verdict(old, new, word):
    assert compare.verdict(old, new, 0.03) == word


def results(folder, **cases):
    return str(report.write(folder, "cases", "Cases", [row(name, ms) for name, ms in cases.items()])[0])


def test_compare_flags_what_became_slower(tmp_path, capsys):
    old, new = results(tmp_path / "old", a=1.0, b=2.0, gone=1.0), results(tmp_path / "new", a=1.0, b=3.0)
    assert main(["bench", "compare", old, new]) == 1
    output = capsys.readouterr().out
    assert "1 of 2 rows are slower" in output and "1.500" in output and "1 in the old, 0 in the new" in output
    assert main(["bench", "compare", new, old]) == 0
    assert "faster" in capsys.readouterr().out
    assert main(["bench", "compare", old, new, "--tolerance", "0.6"]) == 0


def test_compare_says_where_machines_differ(tmp_path, capsys):
    old, new = results(tmp_path / "old", a=1.0), results(tmp_path / "new", a=1.0)
    record = json.loads(Path(new).read_text())
    record["machine"]["cpu"] = "another"
    Path(new).write_text(json.dumps(record))
    assert main(["bench", "compare", old, new]) == 0
    assert "The machines differ in cpu" in capsys.readouterr().out


def test_wrong_comparisons_are_named(tmp_path, capsys):
    old, new = results(tmp_path / "old", a=1.0), results(tmp_path / "new", b=1.0)
    other = str(report.write(tmp_path, "other", "Other", [row("a", 1.0)])[0])
    for command, message in (
        ([old, new], "no row is in both results"),
        ([old, other], "different benchmarks: cases and other"),
        ([old, "nothing.json"], "nothing.json: no such file"),
        ([old, new, "--tolerance", "-1"], "--tolerance must be >= 0"),
        ([old, new, "--", "nonsense"], "got 'nonsense'"),
        (["no-such-revision", "HEAD", "--", "loading"], "no-such-revision: neither a file nor a git revision"),
    ):
        assert main(["bench", "compare", *command]) == 2
        assert message in capsys.readouterr().err


def test_rows_that_say_the_same_are_refused():
    with pytest.raises(UsageError, match="two rows say that they are a"):
        compare.timed({"name": "x", "rows": [row("a", 1.0), row("a", 2.0)]})


def test_several_runs_become_one():
    runs = [{"name": "x", "rows": [row("a", ms)]} for ms in (1.0, 2.0)]
    assert compare.merged(runs)["rows"] == [{"case": "a", "ms": 1.5, "low": 0.9, "high": 2.1}]


def test_two_revisions(monkeypatch, capsys):
    """The build of a commit is what runs: HEAD against itself, without compiled operators."""
    found = subprocess.run(["git", "-C", compare.SOURCE, "rev-parse", "HEAD"], capture_output=True)
    if found.returncode:
        pytest.skip("the package is not in a git checkout")
    monkeypatch.setenv("GSTO_BUILD_NATIVE", "0")
    monkeypatch.setattr(compare, "TURNS", 1)
    benchmark = ["loading", "lip", "--files", "2", "--workers", "0", "--seconds", "0.02"]
    assert main(["bench", "compare", "HEAD", "HEAD", "--tolerance", "100", "--", *benchmark]) == 0
    output = capsys.readouterr().out
    assert output.count("building") == 1 and output.count("running HEAD") == 2 and "lip" in output
    assert f"revision {found.stdout.decode()[:12]}\n" in output


def test_summary(tmp_path, capsys):
    rows = []
    for contestant, ms, error in (("cuda", (1.0, 3.0, None), 1e-4), ("eager", (4.0, 4.0, 4.0), 0.5)):
        for case, time in enumerate(ms):
            what = {
                "operator": "gated_split",
                "case": str(case),
                "dtype": "bfloat16",
                "pass": "forward",
                "way": "graph",
            }
            ratios = {"x_floor": time, "x_eager": time and 4 / time, "error": error}
            rows.append({**what, "contestant": contestant, "ms": time, **ratios})
    report.write(tmp_path, "ops", "Operators", rows)
    network = {
        "run": "training step",
        "trunk": "w48",
        "input": "8 x 512x1024",
        "network": "GSTO-HRNet, fused",
        "way": "graphed",
    }
    numbers = {"ratio": 0.875, "images_per_s": 91.0, "peak_gib": 11.5, "kernels": None}
    report.write(tmp_path, "step-w48", "Step", [{**network, "ms": 88.0, **numbers}])
    assert main(["bench", "summary", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    operators = next(line for line in lines if "gated_split" in line)
    assert [word for word in operators.split() if word[0].isdigit()] == [
        "2",
        "3",
        "2.00",
        "3.00",
        "2.67",
        "1.33",
        "1.00e-04",
    ]
    assert not any("eager" in line and "bfloat16" in line for line in lines)
    assert any("GSTO-HRNet, fused" in line and "88.0" in line and "0.875" in line for line in lines)


def test_summary_of_nothing(tmp_path, capsys):
    assert main(["bench", "summary", str(tmp_path)]) == 2
    assert "no results of gsto bench in it" in capsys.readouterr().err


def test_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "gsto_benchmarks.bench.loading", raising=False)
    assert main(["bench", "loading"]) == 2
    assert "bench loading needs the package cv2: pip install 'gsto_ops[train]'" in capsys.readouterr().err
