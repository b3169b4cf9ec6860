"""Continuing from weights: what is frozen stays, the rest moves at its own rate, and runs resume as from scratch."""

import functools
import math
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import DropPath

import tiny
from corinfomax import network as networks
from corinfomax.diagnosis import measures, verdict
from corinfomax.evaluation import table
from corinfomax.recipes.fields import Backbone, Tuning
from corinfomax.runtime import run_folder
from corinfomax.training import optimizer
from corinfomax.training import step as learner
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")
BACKBONE = Backbone(name="test_resnet")  # five blocks, the stem included
RECIPE = replace(tiny.RECIPE, backbone=BACKBONE, size=32)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return tiny.splits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(9)
    model = networks.build_backbone(BACKBONE)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:  # no norm is zero, or what is before it has no gradient
                tensor.uniform_(0.5, 1.5)
    return networks.start_tensors(model)


def tuned(**tuning):
    return replace(RECIPE, tuning=Tuning(**tuning))


def moved(network, start):
    """Names of the backbone's tensors that differ from the start, apart from counts."""
    state = network.state_dict()
    return {name for name in start if state[name].is_floating_point() and not state[name].equal(start[name])}


def statistics(names):
    return {name for name in names if "running_" in name}


def test_a_run_begins_with_the_weights_it_is_given(start):
    network = learner.build(RECIPE, CPU, start=start).network
    assert not moved(network, start)
    assert moved(learner.build(RECIPE, CPU).network, start)


@pytest.mark.parametrize(("blocks", "count"), [(0.01, 1), (0.2, 1), (0.5, 2), (0.7, 4), (1.0, 5)])
def test_only_the_last_blocks_move(splits, start, tmp_path, blocks, count):
    network = tiny.run(splits, tmp_path / "run", tuned(blocks=blocks), start=start)
    groups = networks.blocks_of(network.backbone)
    assert len(groups) == 5 and groups[0][0].startswith("conv1")
    frozen = groups[: 5 - count]
    still = {f"backbone.{name}" for block in frozen for name in block}
    trained = {f"backbone.{name}" for block in groups for name in block} - still
    assert moved(network, start) - statistics(start) == trained

    # The statistics of a frozen block's BatchNorm stay with it.
    norms = {name.rpartition(".")[0] for name in still}
    kept = {name for name in statistics(start) if name.rpartition(".")[0] in norms}
    assert moved(network, start) & kept == set()
    assert moved(network, start) & statistics(start) == statistics(start) - kept


@pytest.mark.parametrize("look", [0, 2])
def test_kept_statistics_stay_while_weights_move(splits, start, tmp_path, look):
    network = tiny.run(splits, tmp_path / "run", tuned(batch_norm="keep"), start=start, diagnoses=look, scores=look)
    assert statistics(moved(network, start)) == set()
    assert len(moved(network, start)) == len([name for name, _ in network.backbone.named_parameters()])


def test_the_projector_is_trained_alone_first(splits, start, tmp_path):
    recipe = tuned(projector_share=0.5, batch_norm="keep")  # 5 of 10 steps
    run = tmp_path / "run"
    tiny.run(splits, run, recipe, start=start, checkpoint_minutes=0.0, keep=20)
    states = {step: checkpoint.load_checkpoint(run_folder.checkpoint_path(run, step)).network for step in (1, 5, 6)}
    assert all(states[5][name].equal(start[name]) for name in start)
    assert not all(states[6][name].equal(start[name]) for name in start)
    assert not states[5]["projector.0.weight"].equal(states[1]["projector.0.weight"])


def test_the_backbones_rate_rises_after_the_projector():
    recipe = replace(tuned(projector_share=0.5), epochs=4, optim=replace(RECIPE.optim, warmup_epochs=1))
    shares = [optimizer.backbone_share(recipe, step, steps_per_epoch=4) for step in range(13)]
    assert shares == [0] * 8 + [0.25, 0.5, 0.75, 1, 1]
    assert optimizer.backbone_share(RECIPE, 0, steps_per_epoch=4) == 1


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_each_block_has_its_own_learning_rate(name):
    recipe = tuned(lr_scale=0.1, layer_decay=0.5, blocks=0.8)
    network = learner.build(recipe, CPU).network
    built = optimizer.build(network, replace(recipe.optim, name=name, decay_norms=False), tuning=recipe.tuning)
    optimizer.set_learning_rate(built, 2.0, 0.5)
    rates = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    names = dict(network.named_parameters())
    assert built.param_groups[0]["lr"] == 2.0  # the projector's, which the metrics show
    assert {rates[id(p)] for name, p in names.items() if name.startswith("projector")} == {2.0}
    for depth, block in enumerate(reversed(networks.blocks_of(network.backbone))):
        for p in (names[f"backbone.{name}"] for name in block):
            assert rates.get(id(p)) == (pytest.approx(0.1 * 0.5**depth) if depth < 4 else None)
    assert all((decays[id(p)] == 0) == (p.ndim <= 1) for p in names.values() if p.requires_grad)


def test_without_a_tuning_the_optimiser_has_two_groups():
    groups = learner.build(RECIPE, CPU).optimizer.param_groups
    assert [len({p.ndim > 1 for p in group["params"]}) for group in groups] == [1, 1]
    assert [p.ndim > 1 for group in groups for p in group["params"][:1]] == [True, False]


@pytest.mark.parametrize("step", [3, 5, 7])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_stopped_run_ends_as_if_it_had_never_stopped(splits, start, tmp_path, step, micro_batch):
    recipe = tuned(blocks=0.6, projector_share=0.5, lr_scale=0.3, layer_decay=0.7, batch_norm="keep")
    recipe = replace(recipe, micro_batch=micro_batch)
    train = functools.partial(tiny.run, splits, recipe=recipe, checkpoint_minutes=0.0, keep=20)
    train(tmp_path / "whole", start=start)
    saved = checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / "whole", step))
    train(tmp_path / "stopped", resume=saved)
    whole, stopped = (checkpoint.load_last(tmp_path / name)[1] for name in ("whole", "stopped"))
    for part in ("network", "criterion", "optimizer", "loop"):
        assert tiny.equal_states(getattr(whole, part), getattr(stopped, part)), part


def test_micro_batches_are_exact_when_statistics_are_kept(splits, start, tmp_path):
    recipe = replace(tuned(projector_share=0.4, batch_norm="keep"), precision="float64", epochs=1)
    whole = tiny.run(splits, tmp_path / "whole", recipe, start=start).state_dict()
    parts = tiny.run(splits, tmp_path / "parts", replace(recipe, micro_batch=2), start=start).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "resnet18"])
def test_every_parameter_is_in_one_block(name):
    model = timm.create_model(name, num_classes=0)
    names = [name for block in networks.blocks_of(model) for name in block]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    last = networks.blocks_of(model)[-1]
    assert set(last) & {list(model.state_dict())[-1], [name for name, _ in model.named_parameters()][-1]}


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"blocks": 0.0}, "blocks is 0.0; it is a share, above 0 and at most 1"),
        ({"blocks": 8.0}, "blocks is 8.0; it is a share, above 0 and at most 1"),
        ({"average": 1.5}, "average is 1.5; it is a share, above 0 and at most 1"),
        ({"lr_scale": 0.0}, "lr_scale is 0.0; it must be above 0"),
        ({"layer_decay": 1.2}, "layer_decay is 1.2; it must be above 0 and at most 1"),
        ({"projector_share": 1.0}, "projector_share is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_impossible_settings_are_named(tuning, message):
    with pytest.raises(ValueError, match=message):
        Tuning(**tuning)


def test_the_start_is_measured_before_the_first_step(splits, start, tmp_path):
    recipe = tuned(batch_norm="keep")
    network = tiny.run(splits, tmp_path / "run", recipe, start=start, diagnoses=2, scores=2)
    rows = run_folder.read_metrics(tmp_path / "run")
    first = rows[0]
    assert [row.step for row in rows] == list(range(11))
    assert math.isnan(first.loss) and first.seconds == 0 and "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    assert verdict.best_step(rows, range(11)) != 0 and verdict.judge(rows[:1], recipe, steps=10) is None

    # of the weights as they were
    untrained = learner.build(recipe, CPU, start=start).network
    assert first.knn == table.quick_knn(untrained.backbone, splits, recipe, device=CPU)
    sample = measures.choose_sample(splits, recipe, device=CPU, start=untrained.backbone)
    assert (
        first.look
        == measures.look(untrained, sample, recipe, device=CPU)
        != measures.look(network, sample, recipe, device=CPU)
    )

    # a run from random weights has no such row
    tiny.run(splits, tmp_path / "random", recipe, diagnoses=2, scores=2)
    assert run_folder.read_metrics(tmp_path / "random")[0].step == 1


def test_a_run_that_begins_again_has_one_row_of_the_start(splits, start, tmp_path):
    run = tmp_path / "run"
    tiny.run(splits, run, RECIPE, start=start, scores=2)
    run_folder.forget_after(run, 5)
    assert [row.step for row in run_folder.read_metrics(run)] == [0, 1, 2, 3, 4, 5]
    run_folder.forget_after(run, 0)
    assert run_folder.read_metrics(run) == []


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_final_weights_lie_between_start_and_end(splits, start, tmp_path, share):
    end = tiny.run(splits, tmp_path / "end", tuned(blocks=0.6), start=start).state_dict()
    options = {"checkpoint_minutes": 0.0, "keep": 20}
    tiny.run(splits, tmp_path / "run", tuned(blocks=0.6, average=share), start=start, **options)
    saved = checkpoint.load_last(tmp_path / "run")[1].network
    for name, tensor in end.items():
        if name in start and tensor.is_floating_point():
            torch.testing.assert_close(saved[name], start[name] + share * (tensor - start[name]), rtol=0, atol=1e-6)
        else:
            assert saved[name].equal(tensor)  # the projector, and counts

    # stopped before the last step, it ends the same
    before = checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / "run", 9))
    tiny.run(splits, tmp_path / "resumed", tuned(blocks=0.6, average=share), start=start, resume=before)
    assert tiny.equal_states(checkpoint.load_last(tmp_path / "resumed")[1].network, saved)


def test_the_pull_moves_weights_of_the_backbone_towards_the_start(start):
    learned = learner.build(tuned(pull=2.0, lr_scale=0.5, blocks=0.6), CPU, start=start)
    weights = {name: p for name, p in learned.network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in weights.values():
            parameter.add_(1.0)
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    optimizer.set_learning_rate(learned.optimizer, 0.1)
    optimizer.pull(learned.optimizer, learned.start, 2.0)
    for name, parameter in weights.items():
        moved = 0.1 if name in start else 0.0  # 0.1 · 0.5 · 2 of the way, which is 1
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, moved), rtol=0, atol=1e-6)


def test_a_run_that_is_pulled_stays_near_its_start_and_resumes_the_same(splits, start, tmp_path):
    def distance(network):
        state = network.state_dict()
        names = [name for name, _ in network.named_parameters() if name in start]
        return sum(float((state[name] - start[name]).square().sum()) for name in names) ** 0.5

    recipe = tuned(pull=10.0, batch_norm="keep")
    free = tiny.run(splits, tmp_path / "free", tuned(batch_norm="keep"), start=start)
    whole = tiny.run(splits, tmp_path / "whole", recipe, start=start, checkpoint_minutes=0.0, keep=20)
    assert 0 < distance(whole) < 0.7 * distance(free)
    half = checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / "whole", 5))
    resumed = tiny.run(splits, tmp_path / "resumed", recipe, start=start, resume=half)
    assert tiny.equal_states(whole.state_dict(), resumed.state_dict())


VIT = replace(tiny.RECIPE, backbone=Backbone(name="test_vit", drop_path=0.3), size=32, batch=8)


def test_stochastic_depth_skips_blocks_that_are_trained_and_a_resumed_run_skips_the_same(splits, tmp_path):
    paths = {
        name: module.training
        for name, module in learner.build(replace(VIT, tuning=Tuning(blocks=0.4)), CPU).network.named_modules()
        if isinstance(module, DropPath)
    }
    frozen = {name for name, training in paths.items() if not training}
    assert paths and frozen and frozen < paths.keys() and max(frozen) < min(paths.keys() - frozen)

    # skipping changes the run, and is the same when it is resumed
    whole = tiny.run(splits, tmp_path / "whole", VIT, checkpoint_minutes=0.0, keep=20).state_dict()
    still = tiny.run(splits, tmp_path / "still", replace(VIT, backbone=Backbone(name="test_vit"))).state_dict()
    assert not tiny.equal_states(whole, still)
    half = checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / "whole", 5))
    resumed = tiny.run(splits, tmp_path / "resumed", VIT, resume=half).state_dict()
    assert tiny.equal_states(whole, resumed)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_probability_to_skip_is_below_one(share):
    with pytest.raises(ValueError, match="drop_path"):
        Backbone(drop_path=share)
