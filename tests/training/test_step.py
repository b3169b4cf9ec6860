"""What is not finite is found, kept and seen again; gradients are clipped and scaled; nothing bad is saved."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tiny
from corinfomax.cli.main import main
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.recipes.fields import Loss
from corinfomax.runtime import run_folder
from corinfomax.training import batches, loop, replay
from corinfomax.training import step as learner
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return tiny.splits(tmp_path_factory.mktemp("data"))


run_tiny = functools.partial(tiny.run, log_steps=4, checkpoint_minutes=0.0)


def knobs(**optim):
    return replace(tiny.RECIPE, optim=replace(tiny.RECIPE.optim, **optim))


class Poison(torch.autograd.Function):
    """Nothing on the way there, nan on the way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def poison_gradients(monkeypatch):
    forward = CorInfoMaxLoss.forward

    def poisoned(self, z1, z2, **knobs):
        terms = forward(self, z1, z2, **knobs)
        return terms._replace(loss=Poison.apply(terms.loss))

    monkeypatch.setattr(CorInfoMaxLoss, "forward", poisoned)


def test_a_failure_seen_late_is_kept_as_it_was_before_its_step(splits, tmp_path, monkeypatch):
    """Seen after step 8, the row's; it was in step 6: the file is bit for bit the checkpoint after six steps."""
    real = loop.update

    def bad_in_step_6(recipe, learner, pair, step, device):
        numbers = real(recipe, learner, pair, step, device)
        if step == 6:
            numbers[1] = math.nan
        return numbers

    monkeypatch.setattr(loop, "update", bad_in_step_6)
    with pytest.raises(FloatingPointError, match=r"in step 6 \(loss .*attraction nan.*smallest eigenvalue.*--replay"):
        run_tiny(splits, tmp_path)
    assert [row["step"] for row in run_folder.read_metrics(tmp_path)] == [4]
    saved = run_folder.checkpoints(tmp_path)
    assert [run_folder.step_of(path) for path in saved] == [4, 5, 6]  # with the bad step in hand none is saved
    good, kept = checkpoint.load(saved[-1]), checkpoint.load(tmp_path / "failed-step-6.safetensors")
    for part in ("network", "criterion", "optimizer"):
        assert tiny.equal_states(getattr(good, part), getattr(kept, part)), part
    indices = batches.indices(tiny.RECIPE, 6, 40)
    assert kept.loop["indices"].equal(indices)
    assert kept.loop["pixels"].equal(splits.train.batch(indices)[0])
    seen = replay.replay(tmp_path / "failed-step-6.safetensors", CPU)
    assert not seen.failed
    assert "it did not fail again" in replay.as_text(seen)


def test_the_replay_is_the_step_of_the_run(splits, tmp_path, monkeypatch):
    """Every number of the step, bit for bit, though clipping is left out of it."""
    told = {}
    real = loop.update

    def bad_in_step_6(recipe, learner, pair, step, device):
        told[step] = real(recipe, learner, pair, step, device)
        return told[step] * math.nan if step == 6 else told[step].clone()

    monkeypatch.setattr(loop, "update", bad_in_step_6)
    with pytest.raises(FloatingPointError):
        run_tiny(
            splits, tmp_path, replace(knobs(clip=0.1), early_sizes=(12,), early_shares=(0.8,))
        )  # step 6 of 10 is an early one
    seen = replay.replay(tmp_path / "failed-step-6.safetensors", CPU)
    assert list(seen.numbers.values()) == told[6].tolist()
    norm = math.sqrt(sum(gradient**2 for _, _, gradient in seen.layers))
    assert norm == pytest.approx(seen.numbers["gradient_norm"], rel=1e-5)


def test_a_gradient_that_is_no_number_stops_the_run(splits, tmp_path, monkeypatch):
    poison_gradients(monkeypatch)
    with pytest.raises(FloatingPointError, match=r"the gradient's norm became nan in step 0 \(loss \d.*eigenvalue"):
        run_tiny(splits, tmp_path, log_steps=1)
    assert not run_folder.checkpoints(tmp_path)
    assert not run_folder.read_metrics(tmp_path)
    seen = replay.replay(tmp_path / "failed-step-0.safetensors", CPU)
    assert seen.failed and seen.first is None
    assert math.isfinite(seen.numbers["loss"])
    assert all(math.isnan(gradient) and math.isfinite(weight) for _, weight, gradient in seen.layers)


def test_the_replay_command_names_the_first_layer_that_is_not_finite(splits, tmp_path, capsys):
    with pytest.raises(FloatingPointError, match=r"step 1, at learning rate 1e\+30.*smallest eigenvalue"):
        run_tiny(splits, tmp_path, knobs(lr=1e30, start_lr=1e30))
    path = tmp_path / "failed-step-1.safetensors"
    assert main(["pretrain", "--replay", str(path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "first output that is not finite: backbone." in said and "in forward pass 1" in said
    assert "backbone.conv1.weight" in said and "loss nan" in said
    assert main(["pretrain", "--replay", str(path), "--epochs", "3"]) == 2
    assert "--replay does one step of a file and nothing else" in capsys.readouterr().err
    run_tiny(splits, tmp_path / "good")
    assert main(["pretrain", "--replay", str(run_folder.checkpoint_path(tmp_path / "good", 10))]) == 2
    assert "is a checkpoint, no failed step" in capsys.readouterr().err


def test_the_first_module_is_the_one_where_it_begins():
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 2)))
    with torch.no_grad():
        network[1][1].weight[0, 0] = math.inf
    with replay.first_not_finite(network) as found:
        network(torch.ones(2, 3))
        network(torch.ones(2, 3))
    assert found[:3] == ["1.1 in forward pass 1", "1 in forward pass 1", "the network in forward pass 1"]
    assert not network._forward_hooks and not network[1][1]._forward_hooks


def test_weights_that_are_no_numbers_are_never_saved(splits, tmp_path):
    learns = learner.build(tiny.RECIPE, CPU)
    none = torch.empty(0, 4, dtype=torch.float64)
    assert learner.find_fault(learns, none, 3) is None
    loop.save(tmp_path, learns, none, 3, tiny.RECIPE, {}, [], 3)
    next(iter(learns.network.parameters())).data[0] = math.inf
    fault = learner.find_fault(learns, none, 4)
    assert fault.step == 3 and "the weights became infinite in step 3" in str(fault)
    loop.save(tmp_path, learns, none, 4, tiny.RECIPE, {}, [], 3)
    assert [run_folder.step_of(path) for path in run_folder.checkpoints(tmp_path)] == [3]


def test_clipping_in_the_loop_and_its_norm_in_the_metrics(splits, tmp_path):
    """Plain SGD: a step is no longer than lr · clip; the first row's norm is that of the gradient before clipping."""
    recipe = knobs(clip=0.01, momentum=0.0, weight_decay=0.0, start_lr=0.05)
    before = learner.build(recipe, CPU).network
    run_tiny(splits, tmp_path / "clipped", recipe, log_steps=1, keep=10)
    run_tiny(splits, tmp_path / "free", knobs(momentum=0.0, weight_decay=0.0, start_lr=0.05), log_steps=1)
    clipped, free = (run_folder.read_metrics(tmp_path / name) for name in ("clipped", "free"))
    assert clipped[0]["gradient_norm"] == free[0]["gradient_norm"] > 0.01
    assert clipped[1]["loss"] != free[1]["loss"]
    after = checkpoint.load(run_folder.checkpoint_path(tmp_path / "clipped", 1)).network
    moved = torch.cat([(after[name] - p.detach()).flatten() for name, p in before.named_parameters()]).norm()
    assert float(moved) == pytest.approx(0.05 * 0.01, rel=1e-3)


def halved(recipe, device, *, compiled=False):
    """The learner of a float16 run, on the CPU, where it is slow for all but the tiniest network."""
    whole = learner.build(replace(recipe, precision="float32"), device, compiled=compiled)
    return whole._replace(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))


def test_a_float16_run_resumes_bitwise_with_its_scale(splits, tmp_path, monkeypatch):
    recipe = replace(tiny.RECIPE, precision="float16")
    monkeypatch.setattr(loop, "build", halved)
    run_tiny(splits, tmp_path / "whole", recipe, keep=10)
    rows = run_folder.read_metrics(tmp_path / "whole")
    assert [row["scale"] for row in rows] == [2.0**11, 2.0**12, 2.0**13]  # doubled every three steps
    stopped = tmp_path / "stopped"
    saved = checkpoint.load(run_folder.checkpoint_path(tmp_path / "whole", 5))
    run_tiny(splits, stopped, recipe, resume=saved)
    ours, theirs = (checkpoint.load(checkpoint.last(tmp_path / name)) for name in ("stopped", "whole"))
    for part in ("network", "criterion", "optimizer", "loop"):
        assert tiny.equal_states(getattr(ours, part), getattr(theirs, part)), part
    assert float(ours.loop["scale"]) == 2.0**13 and int(ours.loop["growth_tracker"]) == 1


TAUGHT = replace(tiny.RECIPE, teacher=0.7)


def test_a_run_with_a_teacher_resumes_bitwise(splits, tmp_path):
    run_tiny(splits, tmp_path / "whole", TAUGHT, keep=10)
    run_tiny(splits, tmp_path / "alone", tiny.RECIPE)
    saved = checkpoint.load(run_folder.checkpoint_path(tmp_path / "whole", 5))
    run_tiny(splits, tmp_path / "stopped", TAUGHT, resume=saved)
    ours, theirs, alone = (checkpoint.load(checkpoint.last(tmp_path / name)) for name in ("stopped", "whole", "alone"))
    for part in ("network", "criterion", "optimizer", "loop"):
        assert tiny.equal_states(getattr(ours, part), getattr(theirs, part)), part
    assert not tiny.equal_states(theirs.network, alone.network)
    followed = {name.removeprefix("teacher/") for name in theirs.loop if name.startswith("teacher/")}
    assert followed == set(theirs.network)
    assert not any(name.startswith("teacher/") for name in alone.loop)


def test_the_teacher_is_the_networks_moving_average_and_what_views_are_drawn_to(splits):
    pixels, sizes = splits.train.batch(torch.arange(8))
    learns = learner.build(TAUGHT, CPU)
    average = {name: p.detach().clone() for name, p in learns.network.named_parameters()}
    for step in range(4):
        pair = batches.make_views(TAUGHT, pixels, sizes, step, CPU)
        was = copy.deepcopy((learns.network, learns.teacher, learns.criterion))
        numbers = learner.update(TAUGHT, learns, pair, step, CPU)
        network, teacher, criterion = was
        z1, z2, t1, t2 = (F.normalize(model(x), dim=1) for model in (network, teacher) for x in pair)
        # Views are drawn to the teacher's other view; what spreads them is their own.
        want = ((z1 - t2).square().sum() + (z2 - t1).square().sum()) / 2 / z1.numel()
        assert float(numbers[1]) == pytest.approx(want.item(), rel=1e-4)
        assert float(numbers[2]) == pytest.approx(criterion(z1, z2).big_bang.item(), rel=1e-5)
        past = min(0.7, (1 + step) / (10 + step))
        for name, p in learns.network.named_parameters():
            average[name] = past * average[name] + (1 - past) * p.detach()
            torch.testing.assert_close(learns.teacher.get_parameter(name), average[name])
    assert past == 4 / 13 and not any(p.requires_grad for p in learns.teacher.parameters())


def test_a_teacher_in_micro_batches_sees_the_same_parts(splits):
    recipe = replace(TAUGHT, micro_batch=4, precision="float64")
    pixels, sizes = splits.train.batch(torch.arange(8))
    learns = learner.build(recipe, CPU)
    for step in range(3):
        pair = [x.double() for x in batches.make_views(recipe, pixels, sizes, step, CPU)]
        network, teacher, criterion = copy.deepcopy((learns.network, learns.teacher, learns.criterion))
        numbers = learner.update(recipe, learns, pair, step, CPU)
    z = [torch.cat([network(part) for part in x.split(4)]) for x in pair]
    with torch.no_grad():
        taught = [torch.cat([teacher(part) for part in x.split(4)]) for x in pair]
        other = [teacher(x) for x in pair]
    terms = criterion(*z, teacher=taught)
    terms.loss.backward()
    norm = torch.nn.utils.get_total_norm(p.grad for p in network.parameters())
    assert numbers[:3].tolist() == pytest.approx([term.item() for term in terms], rel=1e-9)
    assert float(numbers[3]) == pytest.approx(float(norm), rel=1e-7)
    assert criterion(*z, teacher=other).loss.item() != pytest.approx(terms.loss.item(), rel=1e-3)


def test_other_objectives_have_no_teacher():
    with pytest.raises(ValueError, match=r"vicreg.* knows no --teacher"):
        learner.build_criterion(replace(tiny.RECIPE, loss=Loss(name="vicreg"), teacher=0.9))
    with pytest.raises(ValueError, match="the weight of its past is from 0 to below 1"):
        replace(tiny.RECIPE, teacher=1.0)


def test_the_scale_changes_nothing_but_what_overflows(splits):
    """The update of a scaled gradient is that of float16 without a scale, up to what float16 cannot hold."""
    recipe = replace(tiny.RECIPE, precision="float16")
    pixels, sizes = splits.train.batch(torch.arange(8))
    pair = batches.make_views(recipe, pixels, sizes, 0, CPU)
    numbers, states = [], []
    for scale in (1.0, 2.0**8, 2.0**60):
        learns = halved(recipe, CPU)._replace(scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        before = {name: p.detach().clone() for name, p in learns.network.named_parameters()}
        numbers.append(learner.update(recipe, learns, pair, 0, CPU))
        states.append({name: p.detach() - before[name] for name, p in learns.network.named_parameters()})
        assert learner.find_fault(learns, numbers[-1][None], 1) is None
    assert float(numbers[0][3]) == pytest.approx(float(numbers[1][3]), rel=0.02)
    assert not numbers[2][3].isfinite()  # left out, and the scale is halved
    assert learns.scaler.get_scale() == 2.0**59
    assert not any(change.any() for change in states[2].values())
    for name, change in states[1].items():
        torch.testing.assert_close(change, states[0][name], rtol=0.05, atol=0.02 * float(states[0][name].abs().max()))
    assert states[1]["projector.0.weight"].any()
    learns.scaler.load_state_dict(learns.scaler.state_dict() | {"scale": 0.5})
    fault = learner.find_fault(learns, numbers[2][None], 1)
    assert fault is not None and "gradient's norm became" in str(fault)


def test_float16_elsewhere_than_on_cuda_is_one_sentence(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    words = ["pretrain", str(data), "--out", str(tmp_path / "run"), "--precision", "float16", "--device", "cpu"]
    assert main([*words, "--batch", "8", "--size", "16", "--cache-side", "16"]) == 2
    assert "float16 trains on CUDA alone, this is cpu: --precision bfloat16" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_lower_precision_trains_on_cuda(splits, tmp_path, precision):
    recipe = replace(knobs(clip=1.0), precision=precision)
    pace = loop.Pace(log_steps=2, scores=0, diagnoses=0)
    loop.pretrain(recipe, splits, tmp_path, device=torch.device("cuda"), pace=pace, facts={})
    rows = run_folder.read_metrics(tmp_path)
    assert rows[-1]["step"] == 10 and all(math.isfinite(row["loss"]) for row in rows)
    assert all(("scale" in row) == (precision == "float16") for row in rows)


@pytest.mark.parametrize(
    ("processes", "micro_batch", "order", "parts"),
    [
        (1, None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], None),
        (1, 4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 4),
        (2, None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], None),
        (2, 5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], None),
        (2, 2, [0, 1, 5, 6, 2, 3, 7, 8, 4, 9], 4),
    ],
)
def test_one_process_sees_the_parts_that_several_saw(processes, micro_batch, order, parts):
    found, size = replay.as_one(10, processes, micro_batch)
    assert (found.tolist(), size) == (order, parts)
