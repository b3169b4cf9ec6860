"""The parts of a step: their sentences follow from the timings, and the timings are those of training."""

import json
import time
from dataclasses import replace

import pytest
import torch

import tiny
from benchmarks.speed import parts
from benchmarks.speed.parts import PARTS, Setting, Timings, advice, as_text, efficiency
from corinfomax import network
from corinfomax.recipes.published import RECIPES
from corinfomax.training import batches, timing
from corinfomax.training.step import build

CPU = torch.device("cpu")
SETTING = Setting(batch=100, device="cpu", threads=2, cores=2)


def timings(*, loop=1.0, ready=None, **parts):
    """Three equal rounds; a step takes a second, all of it in the update except for `parts`."""
    ready = loop - sum(parts.values()) if ready is None else ready
    seconds = {"forward": ready / 3, "backward": ready * 2 / 3, **parts}
    samples = {part: [seconds.get(part, 0.0)] * 3 for part in PARTS}
    return Timings(samples, [ready] * 3, [loop] * 3)


FED = "Bound by what feeds the network"


@pytest.mark.parametrize(
    ("measured", "changes", "words"),
    [
        (timings(views=0.3), {}, [FED, "waits 30 %", "making views takes 30 %", "--size"]),
        (timings(views=0.1, read=0.25), {}, [FED, "waits 35 %", "reading takes 25 %", "--cache-side"]),
        (timings(ready=1.0, loop=1.6), {}, [FED, "waits 38 %", "bookkeeping takes 38 %", "--log-steps"]),
        (timings(views=0.04), {}, ["Bound by the network, 96 % of a step", "smaller network", "a GPU"]),
        (timings(), {"device": "cuda"}, ["Bound by the network, 100 %", "a faster device"]),
        (timings(views=0.3), {"threads": 1}, [FED, "OMP_NUM_THREADS=2", "1 of 2 cores"]),
        (timings(), {"threads": 1}, ["Bound by the network, and torch", "OMP_NUM_THREADS=2"]),
        (timings(views=0.3), {"threads": 1, "load": 1.5}, ["views"]),  # another program uses the other core
        (timings(views=0.3), {"threads": 1, "device": "cuda"}, ["views"]),  # there the CPU's threads do not compute
    ],
)
def test_the_advice_follows_from_the_numbers(measured, changes, words):
    sentence = advice(measured, SETTING._replace(**changes))
    assert sentence.count(". ") == 0 and sentence.endswith(".")  # one sentence
    for word in words:
        assert word in sentence


def test_efficiency_is_the_updates_share_of_the_loop():
    assert efficiency(timings(views=0.2, read=0.1)) == pytest.approx(0.7)
    # A round that met a busy machine is slow in both: the ratio does not suffer.
    assert efficiency(Timings({}, [0.8, 8.0, 0.8, 4.0], [1.0, 10.0, 1.0, 5.0])) == pytest.approx(0.8)
    # Feeding that overlaps the update costs nothing: the loop is then no longer than the update.
    assert efficiency(timings(ready=0.7, views=0.3, loop=0.69)) == 1.0


def test_the_table_has_every_part_with_its_share_and_the_bound():
    text = as_text(timings(views=0.25), SETTING)
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:7]}
    assert list(rows) == list(PARTS)
    assert rows["views"] == ["views", "250.0", "250.0", "–", "250.0", "2,500.0", "25", "%"]
    assert "100 images/s; the network alone would do 133: the pipeline's efficiency is 0.75" in text
    assert f"→ {FED}" in text
    assert "differ" not in text and "other programs" not in text and "decoding" not in text


def test_medians_and_quartiles_are_those_of_the_rounds():
    loop = [0.003, 0.001, 0.002, 0.005, 0.004]
    text = as_text(timings()._replace(ready=loop, loop=loop), SETTING)
    assert "whole training loop             3.0           2.0 – 4.0          30.0   100 %" in text
    assert "trust only the shares" in text


def test_notes_on_the_machine():
    busy = as_text(timings(), SETTING._replace(load=6.0))
    assert "other programs use about 6.0 of the 2 cores" in busy
    assert "40 µs an image on all cores" in as_text(timings(), SETTING._replace(decode=4e-5))


def test_measured_is_what_training_runs(monkeypatch):
    original = batches.apply_views

    def slow(*arguments):
        time.sleep(0.05)
        return original(*arguments)

    images = timing.made_up(tiny.RECIPE)
    monkeypatch.setattr(batches, "apply_views", slow)
    measured = parts.measure(tiny.RECIPE, images, CPU, seconds=0.1)
    assert list(measured.parts) == list(PARTS)
    assert {len(samples) for samples in (*measured.parts.values(), measured.ready, measured.loop)} == {parts.ROUNDS}
    assert min(map(min, measured.parts.values())) >= 0
    assert sorted(measured.parts["views"])[2] > 0.05  # where the sleep is …
    ready, loop = (sorted(samples)[2] for samples in (measured.ready, measured.loop))
    assert loop > ready + 0.03  # … training pays it, and the update alone does not


def test_it_times_a_recipe_on_made_up_images_and_on_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "cpu-small", RECIPES["cpu-small"]._replace(recipe=tiny.RECIPE))
    out = tmp_path / "parts.json"
    parts.main(["--seconds", "0.1", "--device", "cpu", "--out", str(out)])
    text = capsys.readouterr().out
    assert "images/s" in text and "→" in text and "decoding" not in text
    content = json.loads(out.read_text())
    assert content["setting"]["batch"] == 8 and len(content["timings"]["loop"]) == parts.ROUNDS
    assert content["recipe"]["size"] == 16 and "Bound by" in content["advice"]

    tiny.folder(tmp_path / "data", {"": 12})
    parts.main(["cpu-small", "--data", str(tmp_path / "data"), "--seconds", "0.1", "--device", "cpu"])
    assert "decoding" in capsys.readouterr().out


def test_the_measurement_leaves_the_network_as_it_was():
    learner = build(timing.without_learning(tiny.RECIPE), CPU)
    before = {name: p.clone() for name, p in learner.network.named_parameters()}
    parts._time_parts(tiny.RECIPE, learner, timing.made_up(tiny.RECIPE), 0, CPU)
    assert tiny.equal_states(before, dict(learner.network.named_parameters()))


@pytest.mark.gpu
def test_on_a_gpu_each_part_waits_for_the_device():
    device = torch.device("cuda")
    recipe = replace(tiny.RECIPE, precision=network.choose_precision(replace(tiny.RECIPE, precision="auto"), device))
    measured = parts.measure(recipe, timing.made_up(recipe), device, seconds=1.0)
    seconds = {part: sorted(samples)[2] for part, samples in measured.parts.items()}
    # Launching alone takes microseconds: a forward pass that was not waited for would be far below the update's half.
    assert sum(seconds[part] for part in PARTS[2:]) > 0.7 * sorted(measured.ready)[2]
    assert 0 < efficiency(measured) <= 1
