"""Gradients are clipped and scaled, a criterion can be the caller's own, and nothing bad is saved."""

import functools
import math
from dataclasses import replace

import pytest
import torch

import tiny
from benchmarks.speed.views import make_views
from corinfomax.cli.main import main
from corinfomax.objective.covariance import Terms
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts, Options
from corinfomax.training import loop
from corinfomax.training import step as learner
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return tiny.splits(tmp_path_factory.mktemp("data"))


run_tiny = functools.partial(tiny.run, log_steps=4, checkpoint_minutes=0.0)


def knobs(**optim):
    return replace(tiny.RECIPE, optim=replace(tiny.RECIPE.optim, **optim))


def test_weights_that_are_no_numbers_are_never_saved(splits, tmp_path):
    learns = learner.build(tiny.RECIPE, CPU)
    none = torch.empty(0, 4, dtype=torch.float64)
    recorder = loop.Recorder(tmp_path, tiny.RECIPE, learns, Options(), Facts(), None, CPU)
    assert learner.find_fault(learns, none, 3) is None
    recorder.done = 3
    recorder.save()
    next(iter(learns.network.parameters())).data[0] = math.inf
    fault = learner.find_fault(learns, none, 4)
    assert fault.step == 3 and "the weights became infinite in step 3" in str(fault)
    recorder.done = 4
    recorder.save()
    assert [run_folder.step_of(path) for path in run_folder.checkpoints(tmp_path)] == [3]


def test_clipping_in_the_loop_and_its_norm_in_the_metrics(splits, tmp_path):
    """Plain SGD: a step is no longer than lr · clip; the first row's norm is that of the gradient before clipping."""
    recipe = knobs(clip=0.01, momentum=0.0, weight_decay=0.0, start_lr=0.05)
    before = learner.build(recipe, CPU).network
    run_tiny(splits, tmp_path / "clipped", recipe, log_steps=1, keep=10)
    run_tiny(splits, tmp_path / "free", knobs(momentum=0.0, weight_decay=0.0, start_lr=0.05), log_steps=1)
    clipped, free = (run_folder.read_metrics(tmp_path / name) for name in ("clipped", "free"))
    assert clipped[0].gradient_norm == free[0].gradient_norm > 0.01
    assert clipped[1].loss != free[1].loss
    after = checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / "clipped", 1)).network
    moved = torch.cat([(after[name] - p.detach()).flatten() for name, p in before.named_parameters()]).norm()
    assert float(moved) == pytest.approx(0.05 * 0.01, rel=1e-3)


def halved(recipe, device, **options):
    """The learner of a float16 run, on the CPU, where it is slow for all but the tiniest network."""
    whole = learner.build(replace(recipe, precision="float32"), device, **options)
    return whole._replace(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))


def test_a_float16_run_resumes_bitwise_with_its_scale(splits, tmp_path, monkeypatch):
    recipe = replace(tiny.RECIPE, precision="float16")
    monkeypatch.setattr(loop, "build", halved)
    run_tiny(splits, tmp_path / "whole", recipe, keep=10)
    rows = run_folder.read_metrics(tmp_path / "whole")
    assert [row.scale for row in rows] == [2.0**11, 2.0**12, 2.0**13]  # doubled every three steps
    stopped = tmp_path / "stopped"
    saved = checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / "whole", 5))
    run_tiny(splits, stopped, recipe, resume=saved)
    ours, theirs = (checkpoint.load_last(tmp_path / name)[1] for name in ("stopped", "whole"))
    for part in ("network", "criterion", "optimizer", "loop"):
        assert tiny.equal_states(getattr(ours, part), getattr(theirs, part)), part
    assert float(ours.loop["scale"]) == 2.0**13 and int(ours.loop["growth_tracker"]) == 1


class Distance(torch.nn.Module):
    """A criterion of the caller's own: the distance between views, by a weight that is its state."""

    def __init__(self, floor=None):
        super().__init__()
        self.floor = floor
        self.register_buffer("weight", torch.tensor(3.0))

    def forward(self, *views):
        distance = torch.stack(views).var(0).mean()
        return Terms(self.weight * distance, distance, 0 * distance)


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("floor", [None, 0.0])
def test_a_criterion_of_the_callers_own_trains_and_resumes(splits, tmp_path, floor, micro_batch):
    recipe = replace(tiny.RECIPE, n_views=3, micro_batch=micro_batch)
    train = functools.partial(run_tiny, splits, recipe=recipe, log_steps=1, keep=10, scores=2, diagnoses=2)
    train(tmp_path / "whole", criterion=Distance(floor))
    saved = checkpoint.load_checkpoint(run_folder.checkpoint_path(tmp_path / "whole", 5))
    train(tmp_path / "stopped", criterion=Distance(floor), resume=saved)
    whole, stopped = (checkpoint.load_last(tmp_path / name)[1] for name in ("whole", "stopped"))
    assert whole.criterion.keys() == {"weight"}
    for part in ("network", "criterion", "optimizer", "loop"):
        assert tiny.equal_states(getattr(whole, part), getattr(stopped, part)), part
    rows = run_folder.read_metrics(tmp_path / "whole")
    assert rows[-1].loss == pytest.approx(3 * rows[-1].attraction)
    assert rows[-1].loss < rows[0].loss
    assert all((row.big_bang is not None) == (floor is not None) and row.gap is None for row in rows)
    assert rows[-1].look is not None


def test_a_criterion_without_a_floor_is_named_by_its_terms_alone(splits, tmp_path):
    criterion = Distance()
    criterion.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"the loss became nan in step 0 \(loss nan, attraction \d") as caught:
        run_tiny(splits, tmp_path, criterion=criterion)
    assert "big bang" not in str(caught.value) and "eigenvalue" not in str(caught.value)


def test_the_scale_changes_nothing_but_what_overflows(splits):
    """The update of a scaled gradient is that of float16 without a scale, up to what float16 cannot hold."""
    recipe = replace(tiny.RECIPE, precision="float16")
    pixels, sizes = splits.train.batch(torch.arange(8))
    pair = make_views(recipe, pixels, sizes, 0, CPU)
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
    assert fault is not None and "gradient norm became" in str(fault)


def test_float16_elsewhere_than_on_cuda_is_one_sentence(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    words = ["pretrain", str(data), "--out", str(tmp_path / "run"), "--precision", "float16", "--device", "cpu"]
    assert main([*words, "--batch", "8", "--size", "16", "--cache-side", "16"]) == 2
    assert "float16 needs CUDA, the device is cpu: try --precision bfloat16" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_lower_precision_trains_on_cuda(splits, tmp_path, precision):
    recipe = replace(knobs(clip=1.0), precision=precision)
    options = Options(log_steps=2, scores=0, diagnoses=0)
    loop.pretrain(recipe, splits, tmp_path, device=torch.device("cuda"), options=options)
    rows = run_folder.read_metrics(tmp_path)
    assert rows[-1].step == 10 and all(math.isfinite(row.loss) for row in rows)
    assert all((row.scale is not None) == (precision == "float16") for row in rows)
