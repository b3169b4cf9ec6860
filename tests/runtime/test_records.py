"""Records on disk: each is read back equal, and a damaged file is named."""

import json
import os
import subprocess
import sys

import pytest

from corinfomax.runtime import run_folder
from corinfomax.runtime.records import (
    Comparison,
    DataMeasures,
    Facts,
    Look,
    Measures,
    Options,
    Results,
    Row,
    Score,
    Verdict,
)

DATA = DataMeasures(views_differ=0.4, images_differ=0.8, twins=0.0, better_input="--mean 0 0 0")
MEASURES = Measures(
    *(0.5 + i for i in range(len(Measures._fields) - 3)), spectrum=[0.75, 0.25], spectrum_features=[1.0], cka=0.9
)
BARE = Row(step=3, loss=9.5, attraction=0.25, gradient_norm=4.0, lr=0.1, seconds=1.5)
ROWS = [
    BARE,
    BARE._replace(gradient_norm=None, scale=1024.0),  # float16 skipped every update
    BARE._replace(big_bang=8.0, gap=1.0, knn=55.0, look=Look(True, DATA, MEASURES)),
    BARE._replace(look=Look(False, DATA, MEASURES._replace(ldmi=None, req=None))),
    BARE._replace(look=Look(True, DATA, None)),  # the network's output was not finite
]
RESULTS = Results(
    verdict=Verdict("healthy", "It works.", "Go on.", {"ldmi": 2.0}),
    best_checkpoint="checkpoints/step-00000003.safetensors",
    table={"pretrained": {"linear": Score(90.0, None, 88.0, 92.0), "mAP": Score(40.0)}, "untrained": {}},
    comparisons=(Comparison("better", 90.0, "raw pixels", 80.0, 10.0, 5.0, 15.0, 30, 100),),
    sentences=("Pretraining helped.",),
    remarks=("3 test images are too few for a score: one image is 33 points.",),
    train=400,
    test=100,
)


def on_disk(content):
    return json.loads(json.dumps(content))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_read_back_equal(row, tmp_path):
    run_folder.append_metrics(tmp_path, row)
    run_folder.append_metrics(tmp_path, BARE)
    assert run_folder.read_metrics(tmp_path) == [row, BARE]


def test_numbers_of_a_row_leave_out_its_step_and_spectra():
    numbers = ROWS[2].numbers()
    assert numbers["loss"] == 9.5 and numbers["knn"] == 55.0 and numbers["gradient_norm"] == 4.0
    assert numbers.keys() >= {"views_differ", "images_differ", "twins", "ldmi", "rank", "cka"}
    assert numbers.keys().isdisjoint({"step", "held_out", "better_input", "spectrum", "spectrum_features"})


@pytest.mark.parametrize("results", [RESULTS, Results(), Results(verdict=RESULTS.verdict)])
def test_results_are_read_back_equal(results, tmp_path):
    run_folder.add_json(tmp_path / "results.json", results.to_json())
    assert run_folder.read_results(tmp_path) == results


def test_facts_are_read_back_equal():
    facts = Facts("photos", "cpu-small", 40, "abc", {"torch": "2.9"}, Options(log_steps=3, track="wandb"), holdout=0.1)
    assert Facts.from_json(on_disk(facts.to_json())) == facts


@pytest.mark.parametrize("name", ["data", "recipe_name", "images", "fingerprint", "options"])
def test_a_missing_fact_is_named(name):
    content = on_disk(Facts().to_json())
    del content[name]
    with pytest.raises(ValueError, match=f"lack '{name}'"):
        Facts.from_json(content)


@pytest.mark.parametrize(
    "content", ['{"verdict": {}}', '{"verdict": {"mood": 1}}', '{"scores": 3}', "[]", '{"comparisons": [{}]}']
)
def test_damaged_results_are_an_error_that_names_the_file(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        run_folder.read_results(tmp_path)


@pytest.mark.parametrize(("steps", "keep"), [(0, 3), (10, 0)])
def test_options_out_of_range_are_refused(steps, keep):
    with pytest.raises(ValueError, match="at least 1"):
        Options(log_steps=steps, keep=keep)


@pytest.mark.skipif(os.name == "nt", reason="Windows tells nothing about another process")
def test_half_files_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        halves = [tmp_path / f".a.json.{process.pid}.part" for process in (alive, dead)]
        for half in halves:
            half.write_text("{")
        run_folder.write_text(tmp_path / "a.json", "{}")
        assert [half.exists() for half in halves] == [True, False]
        alive.kill()
