"""`corinfomax bench`: the words follow from the timings, and the timings are of what training runs."""

import json
import time
from dataclasses import replace

import pytest
import torch

import tiny
from corinfomax import network
from corinfomax.cli.main import main
from corinfomax.training import batches, timing
from corinfomax.training.bottleneck import PARTS, Setting, Timings, advise, as_text, look, quartiles
from corinfomax.training.step import build

CPU = torch.device("cpu")
SETTING = Setting(
    batch=100,
    size=32,
    image_bytes=3072,
    device="cpu",
    precision="float32",
    threads=2,
    cores=2,
    native_bfloat16=False,
)


def timings(*, loop=None, saved=None, rounds=3, **parts):
    """Rounds of one second a step each, all spent in the network but for what is given."""
    given = {part: parts.get(part, 0.0) for part in PARTS}
    rest = 1 - sum(given.values())
    given["forward"] += rest / 3
    given["backward"] += rest * 2 / 3
    ready = sum(given[part] for part in ("forward", "loss", "backward", "optimizer"))
    loop = sum(given.values()) if loop is None else loop
    samples = {part: [seconds] * rounds for part, seconds in given.items()}
    return Timings(
        samples, [ready] * rounds, [loop] * rounds, {name: [s] * rounds for name, s in (saved or {}).items()}
    )


@pytest.mark.parametrize(
    ("measured", "changes", "words"),
    [
        (timings(views=0.3), {}, ["--size", "300 of a step's 1,000 ms", "at most 43 % more"]),
        (timings(views=0.3, saved={"blur": 0.15, "jitter": 0.02}), {}, ["without blur", "50 % of that to blur"]),
        (timings(views=0.3, saved={"blur": 0.03}), {}, ["--size"]),
        (timings(read=0.25), {}, ["Read faster", "--cache-side", "at 1 MB/s", "at most 33 % more"]),
        (timings(loop=1.4), {}, ["--log-steps", "400 ms go to neither", "at most 40 % more"]),
        (timings(optimizer=0.5), {}, ["--batch 200", "33 % more images"]),
        (timings(loss=0.4), {}, ["last width of the projector", "the loss is 40 %"]),
        (timings(views=0.02), {}, ["Only a smaller network", "a GPU", "the network is 98 %", "at most 2 % more"]),
        (timings(), {"device": "cuda"}, ["a faster device"]),
        (timings(), {"native_bfloat16": True}, ["--precision bfloat16", "100 % of a step"]),
        (timings(), {"native_bfloat16": True, "precision": "bfloat16"}, ["Only a smaller network"]),
        (timings(views=0.3), {"threads": 1}, ["OMP_NUM_THREADS=2", "1 of 2"]),
        (timings(views=0.3), {"threads": 1, "load": 1.5}, ["views"]),  # the other core is taken
        (timings(views=0.3), {"threads": 1, "device": "cuda"}, ["views"]),  # there the CPU's threads do not compute
    ],
)
def test_the_advice_follows_from_the_numbers(measured, changes, words):
    said = advise(measured, replace(SETTING, **changes))
    assert said.count(". ") == 0 and said.endswith(".")  # one sentence
    for word in words:
        assert word in said


def test_what_follows_from_the_medians():
    now = look(timings(views=0.2, read=0.1, loop=1.5, rounds=1))
    assert now.efficiency == pytest.approx(0.7 / 1.5)
    assert now.rest == pytest.approx(0.5)
    # A loop that once met a busy machine is no reason to blame what cannot be seen.
    assert look(timings(views=0.2, rounds=4)._replace(loop=[1.0, 1.0, 1.8, 1.9])).rest == pytest.approx(0.0)
    # Feeding that overlaps the update costs nothing: the loop is then shorter than the sum of its parts.
    overlapped = look(timings(views=0.3, loop=0.7))
    assert overlapped.efficiency == pytest.approx(1.0)
    assert overlapped.rest == 0.0


def test_quartiles():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)


def test_the_table_has_every_part_with_its_share_and_says_what_the_bound_is():
    text = as_text(timings(views=0.25), SETTING)
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:7]}
    assert list(rows) == list(PARTS)
    assert rows["views"][-2:] == ["25", "%"] and "2500.0" in rows["views"]
    assert "100 images/s; the network alone would do 133: the pipeline's efficiency is 0.75" in text
    assert "what feeds the network is the bound" in text
    assert "the network is the bound" in as_text(timings(), SETTING)
    assert "differ" not in text
    steady = timings()
    assert "trust shares only" in as_text(steady._replace(loop=[1.0, 1.5, 2.0]), SETTING)
    assert "other programs want 6.0 of the 2 cores" in as_text(steady, replace(SETTING, load=6.0))
    assert "40 µs an image on all cores" in as_text(steady, replace(SETTING, decode=4e-5))


def test_measured_is_what_training_runs(monkeypatch):
    original = batches.make_views

    def slow(*arguments):
        time.sleep(0.05)
        return original(*arguments)

    images = timing.made_up(tiny.RECIPE)
    monkeypatch.setattr(batches, "make_views", slow)
    measured = timing.measure(tiny.RECIPE, images, CPU, seconds=0.1)
    assert list(measured.parts) == list(PARTS)
    assert {len(samples) for samples in (*measured.parts.values(), measured.ready, measured.loop)} == {3}
    assert min(map(min, measured.parts.values())) >= 0
    now = look(measured)
    assert now.parts["views"] > 0.05  # where the sleep is …
    assert now.loop > now.ready + 0.03  # … training pays it, and the update alone does not
    assert set(measured.operations) == {"jitter"}  # of cpu-small's views


def test_the_update_leaves_the_recipes_network_as_it_was():
    learner = build(replace(tiny.RECIPE, optim=replace(tiny.RECIPE.optim, lr=0.0)), CPU)
    before = {name: p.clone() for name, p in learner.network.named_parameters()}
    R = learner.criterion.R
    timing._step_apart(tiny.RECIPE, learner, timing.made_up(tiny.RECIPE), 0, CPU)
    assert tiny.equal_states(before, dict(learner.network.named_parameters()))
    assert not learner.criterion.R.equal(R) and learner.criterion.training


def test_the_command_on_made_up_images_and_on_a_folder(tmp_path, capsys):
    words = ["--size", "16", "--cache-side", "16", "--batch", "8", "--seconds", "0.1", "--device", "cpu"]
    words += ["--backbone.layers", "1", "1", "1", "1", "--backbone.channels", "8", "8", "8", "16"]
    words += ["--projector.widths", "32", "8"]
    out = tmp_path / "bench.json"
    assert main(["bench", *words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "recipe cpu-small" in said and "images/s" in said and "→" in said and "decoding" not in said
    content = json.loads(out.read_text())
    assert content["setting"]["batch"] == 8 and len(content["timings"]["loop"]) == 3
    assert content["recipe"]["size"] == 16

    tiny.folder(tmp_path / "data", {"": 12})
    assert main(["bench", str(tmp_path / "data"), "--recipe", "cpu-small", *words]) == 0
    assert "decoding" in capsys.readouterr().out


def test_mistakes_are_a_sentence(capsys):
    assert main(["bench", "--seconds", "0"]) == 2
    assert "--seconds" in capsys.readouterr().err
    assert main(["bench", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_each_part_waits_for_the_device():
    device = torch.device("cuda")
    recipe = replace(tiny.RECIPE, precision=network.precision(replace(tiny.RECIPE, precision="auto"), device))
    measured = timing.measure(recipe, timing.made_up(recipe), device, seconds=1.0)
    now = look(measured)
    # Launching alone takes microseconds: a forward pass that was not waited for would be far below the update's half.
    assert sum(now.parts[part] for part in PARTS[2:]) > 0.7 * now.ready
    assert 0 < now.efficiency <= 1
