"""The benchmark of the time per call: every case is right, and has a row."""

import sys

from gsto_benchmarks.kernels import overhead


def test_every_case_has_a_row(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["overhead", "--rounds", "1"])
    overhead.main()
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {case}" for case in overhead.CASES]
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split(" | ")[1:])
