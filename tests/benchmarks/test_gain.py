"""The table of what continuing gains: means over seeds, the interval of each, and the weights before once."""

from pathlib import Path

import tiny
from benchmarks.continuing import gain, steps
from benchmarks.speed.clock import Effort
from corinfomax.network import Network
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Comparison, Results, Row, Score
from corinfomax.weights import export


def finished(folder, before, after, *, seconds):
    folder.mkdir(parents=True)
    rows = {"pretrained": after} | ({} if before is None else {"before": before})
    table = {name: {probe: Score(value) for probe in gain.PROBES} for name, value in rows.items()}
    other = before or 1.0
    comparison = Comparison("better", after, "before", other, after - other, -0.5, 2.5, 9, 24)
    results = Results(table=table, comparisons=(comparison,), sentences=("…",))
    run_folder.write_json(folder / "results.json", results.to_json())
    run_folder.append_metrics(folder, Row(4, 1.0, 1.0, 1.0, 0.1, seconds))


def record(folder, kind, seed, *scores, seconds):
    finished(folder / f"{kind}-{seed}", *scores, seconds=seconds)
    return {"set": "digits", "init": "net", "kind": kind, "seed": seed} | gain.record_of(folder / f"{kind}-{seed}")


def test_the_rows_are_means_over_seeds(tmp_path):
    records = [
        record(tmp_path, "1", 0, 60.0, 62.0, seconds=600),
        record(tmp_path, "scratch 1", 0, None, 50.0, seconds=300),
        record(tmp_path, "1", 1, 60.0, 65.0, seconds=720),
    ]
    gains, mean = "+2.0 (−0.5 to +2.5); +5.0 (−0.5 to +2.5)", "63.5 ±2.1"
    assert gain.table(records)[2:] == [
        "| digits | net, frozen |  | 1 | 60.0 | 60.0 |  | 60.0 | 60.0 |",
        f"| digits | continued, length 1 | 11 | 2 | {mean} | {mean} | {gains} | {mean} | {mean} |",
        "| digits | scratch 1 | 5 | 1 | 50.0 | 50.0 |  | 50.0 | 50.0 |",
    ]


def test_each_run_is_made_once(tmp_path, monkeypatch):
    asked = []

    def run(command, check):
        asked.append(command)
        finished(Path(command[command.index("--out") + 1]), 60.0, 62.0, seconds=60)

    monkeypatch.setattr(gain.subprocess, "run", run)
    tiny.folder(tmp_path / "pictures", {"train": 40, "test": 20})
    network = Network(tiny.RECIPE.backbone, tiny.RECIPE.projector)
    export.write_tensors(tmp_path / "net.safetensors", network.backbone, tiny.RECIPE)
    words = ["gain", "run", str(tmp_path / "net.safetensors"), "", "pictures", "--root", str(tmp_path), "--scratch"]
    words += ["--out", str(tmp_path / "runs"), "--records", str(tmp_path / "gain.jsonl"), "--lengths", "1", "3"]
    monkeypatch.setattr(gain.sys, "argv", words)
    gain.main()
    gain.main()
    assert len(asked) == 4 and len(gain.read(tmp_path / "gain.jsonl")) == 4

    # three times the epochs of the recipe's own choice, with the weights and without
    continued, longer, scratch, longer_scratch = asked
    assert "--init" in continued and "--init" in longer and "--init" not in scratch + longer_scratch
    assert "--epochs" not in continued + scratch
    assert (
        longer[longer.index("--epochs") + 1] == "300" and longer_scratch[longer_scratch.index("--epochs") + 1] == "3000"
    )


def test_every_kind_of_step_is_timed_against_the_whole_network():
    found = steps.ratios("test_resnet", 32, 4, Effort(2, "cpu", quick=True))
    assert list(found) == list(steps.KINDS)
    assert all(len(each) == 2 and min(each) > 0 for each in found.values())
