"""The comparison of penalties: its command runs, its losses are against the best penalty, and it resumes."""

import json
import sys

import pytest
import timm
import torch

import tiny
from benchmarks.probe import penalty


def row(chosen, **fixed):
    return {"images": 20, "fixed": fixed, "chosen": {penalty.OURS: chosen}, "seconds": 1.0}


def test_a_loss_is_the_distance_to_the_best_penalty():
    rows = [row("1", **{"1": 80.0, "0.1": 83.0}), row("0.1", **{"1": 80.0, "0.1": 83.0})]
    assert penalty.summary({"net": rows})[2:] == [f"| net | {penalty.OURS} | 2 | 1.50 | 3.00 | 1 |"]


def test_the_command_measures_runs_and_weights_and_reads_what_is_there(tmp_path, monkeypatch, capsys):
    data = tiny.folder(tmp_path / "data", {"train": 48, "test": 16})
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "weights.pth")
    words = [str(data), "random", str(tmp_path / "weights.pth"), "--architecture", "test_resnet", "--size", "32"]
    words += ["--images", "20", "30", "--subsets", "2", "--rivals", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["penalty", *words])
    penalty.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 4 and sum("| 1 | " in line for line in lines) == 4  # the rivals, on one subset each

    # Every penalty has its score, and the rows are there for a second call.
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    kept = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert [len(each["fixed"]) for each in kept] == [len(penalty.GRID)] * 4
    assert all(20 <= each["images"] <= 30 for each in kept)
    monkeypatch.setattr(penalty, "measure", lambda *_: pytest.fail("measured again"))
    penalty.main()
    assert capsys.readouterr().out.splitlines() == lines
