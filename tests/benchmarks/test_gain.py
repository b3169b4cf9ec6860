"""The table of what continuing gains: means over seeds, the interval of each, and the weights before once."""

import pytest

from benchmarks.continuing import gain, steps
from benchmarks.speed.clock import Effort
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Comparison, Results, Row, Score


def run(folder, before, after, *, seconds):
    folder.mkdir(parents=True)
    rows = {"pretrained": after} | ({} if before is None else {"before": before})
    table = {name: {probe: Score(value) for probe in gain.PROBES} for name, value in rows.items()}
    other = before or 1.0
    comparison = Comparison("better", after, "before", other, after - other, -0.5, 2.5, 9, 24)
    results = Results(table=table, comparisons=(comparison,), sentences=("…",))
    run_folder.write_json(folder / "results.json", results.to_json())
    run_folder.append_metrics(folder, Row(4, 1.0, 1.0, 1.0, 0.1, seconds))


def test_the_rows_are_means_over_seeds(tmp_path):
    run(tmp_path / "digits/1-0", 60.0, 62.0, seconds=600)
    run(tmp_path / "digits/1-1", 60.0, 65.0, seconds=720)
    run(tmp_path / "digits/scratch-0", None, 50.0, seconds=300)
    (tmp_path / "digits/1-2").mkdir()  # not finished
    gains = "+2.0 (−0.5 to +2.5); +5.0 (−0.5 to +2.5)"
    assert gain.table(tmp_path)[2:] == [
        "| digits | before |  | 1 | 60.0 | 60.0 |  | 60.0 | 60.0 |",
        f"| digits | continued, length 1 | 11 | 2 | 63.5 | 63.5 | {gains} | 63.5 | 63.5 |",
        "| digits | scratch | 5 | 1 | 50.0 | 50.0 |  | 50.0 | 50.0 |",
    ]


@pytest.mark.parametrize("there", [True, False])
def test_runs_that_are_there_are_only_read(tmp_path, monkeypatch, there):
    asked = []
    monkeypatch.setattr(gain.subprocess, "run", lambda command, check: asked.append(command))
    if there:
        run(tmp_path / "run", 60.0, 62.0, seconds=1)
    gain.pretrain(tmp_path / "run", "data", "--seed", "3")
    assert len(asked) == (not there)
    assert all("--out" in command and "--seed" in command for command in asked)


def test_every_kind_of_step_is_timed_against_the_whole_network():
    found = steps.ratios("test_resnet", 32, 4, Effort(2, "cpu", quick=True))
    assert list(found) == list(steps.KINDS)
    assert all(len(each) == 2 and min(each) > 0 for each in found.values())
