"""The loop: what it optimises, that it stops and goes on, and that nothing but the recipe decides the result."""

import functools
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import tiny
from benchmarks.speed.views import make_views
from corinfomax import network as networks
from corinfomax.images import cache
from corinfomax.network import Network
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.recipes.fields import Backbone, Loss, View
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder
from corinfomax.runtime.seeds import key
from corinfomax.training import batches, loop
from corinfomax.training import step as learner
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return tiny.splits(tmp_path_factory.mktemp("data"))


run_tiny = functools.partial(tiny.run, scores=2, diagnoses=25)


def test_a_run_writes_metrics_and_a_checkpoint(splits, tmp_path):
    network = run_tiny(splits, tmp_path)
    rows = run_folder.read_metrics(tmp_path)
    assert [row.step for row in rows] == list(range(1, 11))
    assert [row.step for row in rows if row.knn is not None] == [5, 10]
    assert [row.step for row in rows if row.look is not None][-1] == 10  # the verdict rests on the end
    for row in rows:
        alpha = 3.906 * 8
        assert row.loss == pytest.approx(alpha * row.attraction + row.big_bang)
        assert row.gap == pytest.approx(row.big_bang - 2 * math.log(8))
    loaded, saved = checkpoint.load_network(tmp_path)
    assert saved.step == 10
    assert saved.recipe == tiny.RECIPE
    assert tiny.equal_states(loaded.state_dict(), network.state_dict())
    assert run_folder.checkpoints(tmp_path)[-1] == run_folder.checkpoint_path(tmp_path, 10)


@pytest.mark.parametrize("n_views", [2, 4])
def test_metrics_are_the_loss_of_the_step_by_hand(splits, tmp_path, n_views):
    """The first two steps again, from the parts: order, views, forwards, loss, update."""
    recipe = replace(tiny.RECIPE, n_views=n_views)
    run_tiny(splits, tmp_path, recipe)
    torch.manual_seed(key(recipe.seed, "weights"))
    network = Network(recipe.backbone, recipe.projector).to(memory_format=torch.channels_last)
    criterion = CorInfoMaxLoss(8, views=n_views)
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.optim.start_lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(2):
        pixels, sizes = splits.train.batch(batches.indices(recipe, step, 40))
        views = make_views(recipe, pixels, sizes, step, CPU)
        for group in optimizer.param_groups:
            # five steps an epoch, half an epoch of warm-up: the second step is at 1/2.5 of the rise
            group["lr"] = 3e-3 + (0.05 - 3e-3) * step / 2.5
        loss = criterion(*map(network, views)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([row.loss for row in run_folder.read_metrics(tmp_path)[:2]], rel=1e-5)


def test_a_backbone_of_one_size_has_no_other_test_size(splits, tmp_path):
    recipe = replace(tiny.RECIPE, backbone=Backbone(name="vit_tiny_patch16_224"), size=32, test_scale=1.5)
    with pytest.raises(ValueError, match="has one input size and cannot be tested at another: --test-scale 1"):
        run_tiny(splits, tmp_path, recipe)


def test_every_image_is_seen_once_an_epoch_and_in_a_new_order(splits):
    recipe = tiny.RECIPE
    epochs = [torch.cat([batches.indices(recipe, 5 * e + s, 40) for s in range(5)]) for e in range(3)]
    for order in epochs:
        assert order.sort().values.equal(torch.arange(40))
    assert not epochs[0].equal(epochs[1])
    assert len(batches.indices(replace(recipe, batch=16), 1, 40)) == 16  # two batches of 16; the last 8 dropped
    assert not batches.indices(replace(recipe, seed=1), 0, 40).equal(batches.indices(recipe, 0, 40))


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(splits, tmp_path):
    first, again, other = (
        run_tiny(splits, tmp_path / name, replace(tiny.RECIPE, seed=seed)).state_dict()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert tiny.equal_states(first, again)
    assert not tiny.equal_states(first, other)


def test_a_run_of_four_views(splits, tmp_path):
    recipe = replace(tiny.RECIPE, n_views=4)
    pixels, sizes = splits.train.batch(torch.arange(8))
    views = make_views(recipe, pixels, sizes, 3, CPU)
    assert len(views) == 4
    for one, other in itertools.combinations(views, 2):
        assert not torch.allclose(one, other)
    # The first two are those of a run with two.
    for one, other in zip(views[:2], make_views(tiny.RECIPE, pixels, sizes, 3, CPU), strict=True):
        assert one.equal(other)
    solarised = replace(recipe, views=(replace(recipe.views[0], solarize=0.0), replace(recipe.views[1], solarize=1.0)))
    drawn = batches.draw_views(solarised, sizes, 3)
    assert [bool(p.solarize.all()) for p in drawn] == [False, True, False, True]
    tiny.run(splits, tmp_path / "run", recipe)
    saved = checkpoint.load_last(tmp_path / "run")[1]
    assert saved.recipe.n_views == 4 and saved.criterion["R"].shape == (4, 8, 8)


@pytest.mark.parametrize(("epochs", "steps"), [(1.5, 8), (0.4, 2), (2, 10)])
def test_the_last_epoch_may_be_a_part(splits, tmp_path, epochs, steps):
    tiny.run(splits, tmp_path / "run", replace(tiny.RECIPE, epochs=epochs))
    rows = run_folder.read_metrics(tmp_path / "run")
    assert [row.step for row in rows] == list(range(1, steps + 1))
    assert steps == 2 or rows[-1].lr < 0.01  # at the end of the cosine, which 0.4 epochs of warm-up have no time for


def test_labels_never_reach_training(splits, tmp_path):
    shuffled = cache.Splits(
        replace(splits.train, labels=splits.train.labels.flip(0)), replace(splits.test, labels=splits.test.labels * 0)
    )
    unlabelled = cache.Splits(replace(splits.train, labels=None, classes=()), None)
    states = [
        run_tiny(data, tmp_path / name).state_dict()
        for name, data in (("a", splits), ("b", shuffled), ("c", unlabelled))
    ]
    assert tiny.equal_states(states[0], states[1])
    assert tiny.equal_states(states[0], states[2])
    assert not any(row.knn is not None for row in run_folder.read_metrics(tmp_path / "c"))


@pytest.mark.parametrize(
    ("name", "precision"),
    [("sgd", "float32"), ("adamw", "float32"), ("muon", "float32"), ("muon", "bfloat16")],
)
def test_a_resumed_run_ends_as_if_it_had_never_stopped(splits, tmp_path, monkeypatch, name, precision):
    recipe = replace(tiny.RECIPE, precision=precision, optim=replace(tiny.RECIPE.optim, name=name))
    whole = run_tiny(splits, tmp_path / "whole", recipe)
    stopped = tmp_path / "stopped"
    real, steps = batches.apply_views, itertools.count()

    def stop_in_step_6(*given):
        if next(steps) == 6:
            signal.raise_signal(signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(batches, "apply_views", stop_in_step_6)
    with pytest.raises(loop.Interrupted) as interrupted:
        run_tiny(splits, stopped, recipe)
    monkeypatch.undo()
    saved = checkpoint.load_checkpoint(interrupted.value.checkpoint)
    assert saved.step == 7
    run_folder.forget_after(stopped, saved.step)
    resumed = run_tiny(splits, stopped, recipe, resume=saved)
    assert tiny.equal_states(whole.state_dict(), resumed.state_dict())
    rows = [[row._replace(seconds=0) for row in run_folder.read_metrics(tmp_path / f)] for f in ("whole", "stopped")]
    assert rows[0] == rows[1]
    ends = [checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / f, 10)) for f in ("whole", "stopped")]
    assert tiny.equal_states(ends[0].criterion, ends[1].criterion)
    assert tiny.equal_states(ends[0].optimizer, ends[1].optimizer)
    assert ends[0].optimizer


def test_only_the_last_checkpoints_stay(splits, tmp_path):
    run_tiny(splits, tmp_path, checkpoint_minutes=0.0, keep=2, diagnoses=0)
    assert [checkpoint.load_checkpoint(path).step for path in run_folder.checkpoints(tmp_path)] == [9, 10]


def test_the_best_checkpoint_stays_with_the_last(splits, tmp_path):
    run_tiny(splits, tmp_path, checkpoint_minutes=60.0, keep=1)
    rows = [row for row in run_folder.read_metrics(tmp_path) if row.look is not None]
    assert len(rows) > 5  # scheduled ones alone: the clock saves without a look
    best = max(rows, key=lambda row: (row.look.measures.ldmi, row.step)).step
    assert [run_folder.step_of(path) for path in run_folder.checkpoints(tmp_path)] == sorted({best, 10})


def test_signal_handlers_are_put_back(splits, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_tiny(splits, tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_loss_that_is_no_number_stops_the_run_with_its_parts(splits, tmp_path, monkeypatch):
    forward = CorInfoMaxLoss.forward

    def poisoned(self, z1, z2):
        terms = forward(self, z1, z2)
        return terms if self.training and z1.grad_fn is None else terms._replace(loss=terms.loss * math.nan)

    monkeypatch.setattr(CorInfoMaxLoss, "forward", poisoned)
    parts = r"became nan in step 0 .*attraction .*smallest eigenvalue.*; every output is finite"
    with pytest.raises(FloatingPointError, match=parts):
        run_tiny(splits, tmp_path)
    assert not run_folder.checkpoints(tmp_path)


def test_a_run_that_diverges_says_where_and_what_to_do(splits, tmp_path):
    recipe = replace(tiny.RECIPE, optim=replace(tiny.RECIPE.optim, lr=1e30, start_lr=1e30))
    with pytest.raises(FloatingPointError, match=r"step 0 .*first bad weight is backbone\..*; a lower learning rate"):
        run_tiny(splits, tmp_path, recipe)


def test_labels_on_one_split_alone_are_no_reason_to_stop(splits, tmp_path):
    run_tiny(cache.Splits(replace(splits.train, labels=None, classes=()), splits.test), tmp_path)
    assert len(run_folder.read_metrics(tmp_path)) == 10


def test_training_raises_the_spread_of_the_features(splits, tmp_path):
    recipe = replace(tiny.RECIPE, epochs=12)
    run_tiny(splits, tmp_path, recipe, scores=0)
    gaps = [row.gap for row in run_folder.read_metrics(tmp_path)]
    # The moments start at the identity, far from anything: compare once they have forgotten it.
    assert sum(gaps[-5:]) < sum(gaps[5:10])


def test_precision_is_the_recipes():
    assert networks.choose_precision(replace(tiny.RECIPE, precision="bfloat16"), CPU) == "bfloat16"
    assert networks.choose_precision(replace(tiny.RECIPE, precision="float32"), CPU) == "float32"


@pytest.mark.parametrize("faster", [True, False])
def test_auto_is_what_the_hardware_is_faster_in(monkeypatch, faster):
    monkeypatch.setattr(networks, "faster_in_bfloat16", lambda device: faster)
    recipe = replace(tiny.RECIPE, precision="auto", optim=replace(tiny.RECIPE.optim, name="muon"))
    assert networks.choose_precision(recipe, CPU) == ("bfloat16" if faster else "float32")
    assert learner.build(recipe, CPU).optimizer.arithmetic == (torch.bfloat16 if faster else None)
    assert learner.build(replace(recipe, precision="float32"), CPU).optimizer.arithmetic is None


def test_bfloat16_trains_too(splits, tmp_path):
    run_tiny(splits, tmp_path, replace(tiny.RECIPE, precision="bfloat16"))
    assert all(math.isfinite(row.loss) for row in run_folder.read_metrics(tmp_path))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_step(splits, tmp_path, name):
    """The recipe as it is, but for a small batch, a small image and the one step."""
    recipe = replace(RECIPES[name].recipe, batch=8, epochs=1, size=32)
    one_step = cache.Splits(splits.train.select(torch.arange(8)), None)
    network = run_tiny(one_step, tmp_path, recipe, scores=0)
    before = Network(recipe.backbone, recipe.projector).state_dict()
    assert network.state_dict().keys() == before.keys()
    (row,) = run_folder.read_metrics(tmp_path)
    assert row.lr == pytest.approx(recipe.optim.start_lr)
    assert math.isfinite(row.loss)


def test_mixed_sizes_train(tmp_path):
    root = tmp_path / "mixed"
    for i, side in enumerate((16, 20, 33)):
        tiny.folder(root / str(i), {"": 8}, labelled=False, side=side)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        path.rename(flat / f"{number}.png")
    splits = cache.load(flat, side=16, progress=False)
    run_tiny(splits, tmp_path / "run", replace(tiny.RECIPE, views=(View(blur=1.0), View(rotate=10.0))))


def test_loss_knobs_reach_the_loss(splits, tmp_path):
    recipe = replace(tiny.RECIPE, loss=Loss(alpha=7.0, cov_decay=0.3, mean_decay=0.2, eps=1e-3, cov_init=2.0))
    run_tiny(splits, tmp_path, recipe)
    row = run_folder.read_metrics(tmp_path)[0]
    assert row.loss == pytest.approx(7 * row.attraction + row.big_bang)


def wait_for(condition, process):
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_to_the_command_leaves_a_run_that_goes_on(tmp_path):
    data = tiny.folder(tmp_path / "data", {"train": 64, "test": 16})
    run = tmp_path / "run"
    knobs = ["--size", "16", "--cache-side", "16", "--batch", "8", "--epochs", "400", "--scores", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CORINFOMAX_CACHE": str(tmp_path / "cache")}

    def command(*words):
        words = [sys.executable, "-m", "corinfomax", "pretrain", *map(str, words)]
        return subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    first = command(data, "--out", run, *knobs, *tiny.NETWORK)
    wait_for(lambda: len(run_folder.read_metrics(run)) > 2, first)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=30)
    assert first.returncode == 130, err
    assert f"--resume {run}" in out
    saved = run_folder.checkpoints(run)[-1]
    step = checkpoint.load_checkpoint(saved).step
    assert 0 < step < 3200

    second = command("--resume", run)
    wait_for(lambda: run_folder.read_metrics(run)[-1].step > step + 10, second)
    second.send_signal(signal.SIGTERM)
    out, err = second.communicate(timeout=30)
    assert second.returncode == 130, err
    assert f"resuming {run} after step {step}" in out
    steps = [row.step for row in run_folder.read_metrics(run)]
    assert steps == sorted(set(steps))
    assert run_folder.step_of(run_folder.checkpoints(run)[-1]) > step
