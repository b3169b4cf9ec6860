"""A failed step names its first bad layer, and its file has everything that the step began with."""

import functools
import math
from dataclasses import replace

import pytest
import torch

import tiny
from benchmarks.speed.views import make_views
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts
from corinfomax.training import batches, failure, loop, optimizer
from corinfomax.training import step as learner
from corinfomax.training.step import NotFiniteError
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")
CURE = "a lower learning rate or a larger batch usually helps"
run_tiny = functools.partial(tiny.run, log_steps=4, checkpoint_minutes=0.0)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return tiny.splits(tmp_path_factory.mktemp("data"))


@pytest.fixture
def message(splits, tmp_path):
    """Run until the failure; the error's clauses."""

    def run(recipe=tiny.RECIPE):
        with pytest.raises(NotFiniteError) as failed:
            run_tiny(splits, tmp_path, recipe)
        *clauses, cure, file = str(failed.value).split("; ")
        assert cure == CURE
        assert file == f"the batch is saved in {tmp_path / f'failed-step-{failed.value.step}.safetensors'}"
        return clauses

    return run


def around_step(monkeypatch, step, *, before=lambda learner: None, after=lambda learner, numbers: numbers):
    """Change the learner before one step, and its numbers after it, whenever that step is trained."""
    real = loop.update

    def update(recipe, learner, views, at, device, **options):
        if at != step:
            return real(recipe, learner, views, at, device, **options)
        before(learner)
        return after(learner, real(recipe, learner, views, at, device, **options))

    monkeypatch.setattr(loop, "update", update)


def fill(name, value):
    """Put a value into the first row of a layer's weight."""

    def change(learner):
        with torch.no_grad():
            learner.network.get_parameter(name)[0] = value

    return change


class Poison(torch.autograd.Function):
    """The identity, with nan for a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("layer", ["backbone.conv1", "backbone.layer2.0.conv2", "projector.0"])
def test_a_layer_with_a_nan_weight_is_named(message, tmp_path, monkeypatch, layer, micro_batch):
    around_step(monkeypatch, 6, before=fill(f"{layer}.weight", math.nan))
    *projections, first = message(replace(tiny.RECIPE, micro_batch=micro_batch))
    assert projections[0].startswith("step 6 at learning rate") and "smallest eigenvalue" in projections[-1]
    assert first == f"the first bad output is {layer}"
    assert (
        checkpoint.load_checkpoint(tmp_path / "failed-step-6.safetensors").network[f"{layer}.weight"].isfinite().all()
    )


def test_a_run_that_diverges_names_its_first_layer(message):
    """The first step makes the weights huge, the second one's outputs are infinite."""
    wild = replace(tiny.RECIPE, optim=replace(tiny.RECIPE.optim, lr=1e30, start_lr=1e30))
    first_words, *_, layer = message(wild)
    assert first_words.startswith("step 1 at learning rate 1e+30: z1 has nan or infinity")
    assert layer.startswith("the first bad output is backbone.")


@pytest.mark.parametrize(("micro_batch", "passes"), [(None, 2), (4, 4)])
def test_a_layer_is_named_in_the_last_forward_pass_too(message, monkeypatch, micro_batch, passes):
    """The last pass of the step gets nan for its images."""
    real, calls = learner.match_dtype, []

    def ready(x, model):
        calls.append(x)
        return real(x, model) * (math.nan if len(calls) == passes else 1.0)

    around_step(monkeypatch, 0, before=lambda _: calls.clear())
    monkeypatch.setattr(learner, "match_dtype", ready)
    assert message(replace(tiny.RECIPE, micro_batch=micro_batch))[-1] == "the first bad output is backbone.conv1"


@pytest.mark.parametrize("name", ["backbone.layer1.0.conv1.weight", "projector.0.weight"])
def test_a_parameter_with_an_infinite_gradient_is_named(message, monkeypatch, name):
    """Every other gradient is finite, although clipping would make them all nan."""

    def build(*arguments, **options):
        learns = learner.build(*arguments, **options)
        learns.network.get_parameter(name).register_hook(lambda gradient: gradient * math.inf)
        return learns

    monkeypatch.setattr(loop, "build", build)
    clauses = message(replace(tiny.RECIPE, optim=replace(tiny.RECIPE.optim, clip=1.0)))
    assert clauses[0].startswith("the gradient norm became ") and " in step 0 (loss " in clauses[0]
    assert clauses[-1] == f"every output is finite, and the first bad gradient is that of {name}"


def test_the_first_bad_gradient_is_where_the_backward_pass_goes_wrong(message, monkeypatch):
    """From layer3's output on back every gradient is nan."""

    def build(*arguments, **options):
        learns = learner.build(*arguments, **options)
        learns.network.backbone.layer3.register_forward_hook(lambda module, inputs, output: Poison.apply(output))
        return learns

    monkeypatch.setattr(loop, "build", build)
    first = message()[-1].rpartition(" ")[2]
    layers = [name for name, _ in learner.build(tiny.RECIPE, CPU).network.named_parameters() if ".layer3." in name]
    assert first == layers[-1]


def test_weights_that_the_update_spoils_are_named(message, monkeypatch):
    def spoil(learner, numbers):
        fill("backbone.layer1.0.conv1.weight", math.inf)(learner)
        return numbers

    around_step(monkeypatch, 7, after=spoil)
    clauses = message()
    assert clauses[0].startswith("the weights became infinite in step 7 (loss ")
    assert clauses[-1] == (
        "every output and gradient is finite, and the first bad weight is backbone.layer1.0.conv1.weight"
    )


def test_a_failure_seen_late_is_saved_as_it_was_before_its_step(splits, message, tmp_path, monkeypatch):
    """Seen in the row after step 8, it was in step 6: the file is bit for bit the checkpoint after six steps."""
    failures = []

    def once(learner, numbers):
        if not failures:
            failures.append(numbers[1].fill_(math.nan))
        return numbers

    around_step(monkeypatch, 6, after=once)
    clauses = message()
    assert clauses[0].startswith("the loss became ") and " in step 6 (loss " in clauses[0]
    assert "attraction nan" in clauses[0] and "smallest eigenvalue" in clauses[0]
    assert clauses[-1] == "it did not fail again"
    assert [row.step for row in run_folder.read_metrics(tmp_path)] == [4]
    saved = run_folder.checkpoints(tmp_path)
    assert [run_folder.step_of(path) for path in saved] == [4, 5, 6]  # none after the bad step

    good, failed = (
        checkpoint.load_checkpoint(saved[-1]),
        checkpoint.load_checkpoint(tmp_path / "failed-step-6.safetensors"),
    )
    for part in ("network", "criterion", "optimizer"):
        assert tiny.equal_states(getattr(good, part), getattr(failed, part)), part
    indices = batches.indices(tiny.RECIPE, 6, 40)
    pixels, sizes = splits.train.batch(indices)
    assert tiny.equal_states(failed.loop, {"indices": indices, "pixels": pixels, "sizes": sizes})
    assert (failed.step, failed.recipe) == (6, tiny.RECIPE)
    assert failed.facts.failure.startswith(clauses[0])


def test_the_saved_step_trained_again_is_that_of_the_run(message, tmp_path, monkeypatch):
    numbers_of_run = []

    def bad(learner, numbers):
        numbers_of_run.append(numbers.clone())
        return numbers * math.nan

    around_step(monkeypatch, 6, after=bad)
    assert message()[-1] == "every output, gradient and weight is finite by itself"
    failed = checkpoint.load_checkpoint(tmp_path / "failed-step-6.safetensors")
    learns = learner.build(failed.recipe, CPU)
    learner.put_back(learns, failed)
    lr = optimizer.learning_rate(failed.recipe.optim, 6, steps_per_epoch=5, epochs=2)
    optimizer.set_learning_rate(learns.optimizer, lr)
    views = make_views(failed.recipe, failed.loop["pixels"], failed.loop["sizes"], 6, CPU)
    again = learner.update(failed.recipe, learns, views, 6, CPU)
    assert [numbers.tolist() for numbers in numbers_of_run] == [again.tolist()] * 2


def test_an_error_on_the_way_joins_the_message(splits, tmp_path):
    learns = learner.build(tiny.RECIPE, CPU)
    good, fault = learner.capture(learns, 3, tiny.RECIPE), NotFiniteError(4, "the loss became nan")

    def broken(step, recipe):
        raise RuntimeError(f"step {step} is lost\nwith a second line")

    error = failure.explain(fault, learns, good, broken, splits.train, tmp_path, Facts())
    assert str(error) == f"the loss became nan; repeating the step ended with RuntimeError: step 3 is lost; {CURE}"
    assert error.step == 4 and not list(tmp_path.iterdir())

    # the file is written before the step is repeated
    good = good._replace(step=4)
    error = failure.explain(fault, learns, good, broken, splits.train, tmp_path, Facts())
    assert str(error).endswith(
        f"step 4 is lost; {CURE}; the batch is saved in {tmp_path / 'failed-step-4.safetensors'}"
    )
    (tmp_path / "file").touch()
    error = failure.explain(fault, learns, good, broken, splits.train, tmp_path / "file", Facts())
    assert f"{CURE}; the batch is not saved: " in str(error)


def test_a_gradient_that_is_no_number_stops_the_run(message, tmp_path, monkeypatch):
    forward = CorInfoMaxLoss.forward

    def poisoned(self, *views):
        terms = forward(self, *views)
        return terms._replace(loss=Poison.apply(terms.loss))

    monkeypatch.setattr(CorInfoMaxLoss, "forward", poisoned)
    clauses = message()
    assert clauses[0].startswith("the gradient norm became nan in step 0 (loss ")
    last = [name for name, _ in learner.build(tiny.RECIPE, CPU).network.named_parameters()][-1]
    assert clauses[-1] == f"every output is finite, and the first bad gradient is that of {last}"
    assert not run_folder.checkpoints(tmp_path) and not run_folder.read_metrics(tmp_path)


def small_network():
    inner = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 2))
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), inner)
    with torch.no_grad():
        inner[1].weight[0, 0] = math.inf
        network[0].bias.fill_(9)  # so that no input of that weight is 0
    return network


def test_every_output_is_recorded_in_order():
    network = small_network()
    with failure.watched(network) as outputs:
        network(torch.ones(2, 3))
        network(torch.ones(2, 3))
    finite = {"0": True, "1.0": True, "1.1": False, "1": False, "the whole network": False}
    assert outputs == 2 * list(finite.items())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_compiled_network_is_watched_without_compiling_it_again():
    network, graphs = small_network(), []
    network.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    network(torch.ones(2, 3))
    with failure.watched(network) as outputs:
        network(torch.ones(2, 3))
    assert [name for name, _ in outputs] == ["0", "1.0", "1.1", "1", "the whole network"]
    assert len(graphs) == 1
