"""The work of `corinfomax pretrain` in its run folder: images, training, verdict, scores and page."""

import contextlib
import hashlib
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from corinfomax import __version__, network
from corinfomax.cli import fit, inputs, messages
from corinfomax.cli.arguments import SKIP_LIST, DataOptions
from corinfomax.diagnosis import baselines, verdict
from corinfomax.evaluation import longer, table
from corinfomax.images import files, tables
from corinfomax.images.cache import Splits
from corinfomax.images.sources import Data
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.report.content import Subject
from corinfomax.runtime import processes, run_folder
from corinfomax.runtime.records import Facts, Options, Results, Start
from corinfomax.training import footprint, loop, trackers
from corinfomax.weights import checkpoint, export
from corinfomax.weights.checkpoint import Checkpoint
from corinfomax.weights.load import LoadedBackbone

NO_LABELS = "There are no labels, so it is unknown whether continuing helped."
WENT_WRONG = "The run went wrong: export, embed and neighbors use the weights it started from."


class Plan(NamedTuple):
    """A run before any image is decoded."""

    data: Data
    images: DataOptions
    recipe: Recipe  # before it is fitted to the number of images
    recipe_name: str
    options: Options
    resumed: Checkpoint | None  # the state to continue from
    start: LoadedBackbone | None = None  # the weights to start from
    start_record: Start | None = None
    fitted: frozenset[str] = frozenset()  # parts of the views that may be changed to suit the images


def print_footprint(plan: Plan, device: torch.device) -> None:
    """Print the micro-batch that fits into memory when a step does not, before hours of decoding."""
    images = len(plan.data.splits()["train"].paths)
    if images > 1 and plan.resumed is None:  # a resumed run keeps its recipe, so advice comes too late
        sentence = footprint.warning(replace(plan.recipe, batch=min(plan.recipe.batch, images)), device)
        if sentence is not None:
            print(sentence)


def train(run: Path, plan: Plan, device: torch.device, on_row: trackers.OnRow = lambda row: None) -> Subject | None:
    """Decode the images, record the run in its locked folder and train; None when it was stopped.

    The first process calls `on_row` with each row of metrics.
    """
    first, options = processes.rank() == 0, plan.options
    resume = messages.command("pretrain", "--resume", str(run))

    # images, recipe and facts
    with processes.first_of_machine():  # one process decodes, the others read its cache
        splits = inputs.load_splits(plan.data, plan.recipe, plan.images)
    recipe = fit_run(plan, splits, device)
    if first and plan.start is not None and plan.resumed is None:
        inputs.warn_of_input(plan.start, splits.train, recipe, device)
    facts = _record(run, plan, recipe, splits)
    start = None if plan.start is None else network.start_tensors(network.resized(plan.start.backbone, recipe))

    with contextlib.ExitStack() as stack:
        watchers = [on_row] if first else []
        if first and options.track is not None:
            config = {flag: str(value) for flag, value in fields.flags(recipe).items()}
            watchers.append(stack.enter_context(trackers.tracking(options.track, run, config)))
        try:
            trained = loop.pretrain(
                recipe,
                splits,
                run,
                device=device,
                options=options,
                facts=facts,
                resume=plan.resumed,
                on_row=lambda row: [watch(row) for watch in watchers],
                start=start,
            )
        except loop.Interrupted as stop:
            print(f"stopped; the work so far is in {stop.checkpoint}\nto resume: {resume}")
            processes.wait()  # torchrun kills the others when one rank exits
            return None
        except FloatingPointError as error:
            if first:
                _judge(run, recipe, facts, error=str(error))
                if run_folder.read_results(run).keep_start:
                    print(WENT_WRONG)
                if options.report and run_folder.checkpoints(run):  # the page up to the last checkpoint
                    trained, saved = checkpoint.load_network(run)
                    _report(Subject(run, trained, recipe, saved.step, facts, splits, same_images=True), device)
            processes.wait()
            raise
        except OSError as error:
            raise OSError(f"{messages.message(error)}; once that is fixed: {resume}") from error

    if first:
        rows = run_folder.read_metrics(run)  # they include the time before a stop
        minutes = f"{rows[-1].seconds / 60:.1f} min" if rows else "no time"
        print(f"trained in {minutes}: {run_folder.checkpoints(run)[-1]}")
    return Subject(run, trained, recipe, recipe.steps(facts.images), facts, splits, same_images=True)


def fit_run(plan: Plan, splits: Splits, device: torch.device) -> Recipe:
    """The recipe with a batch, length and precision that these images and processes allow."""
    # views, batch and length
    recipe = fit.fit_symmetry(plan.recipe, splits.train, plan.fitted)
    recipe = fit.fit_batch(recipe, len(splits.train))
    if recipe.from_files and splits.train.files is None:
        raise ValueError(f"{plan.data.title} has no files to crop from: leave out --from-files")
    if recipe.steps(len(splits.train)) < 1:
        steps = len(splits.train) // recipe.batch
        least = f"an epoch has {files.some(steps, 'step')}, so --epochs {1 / steps:.2g} makes one"
        raise ValueError(f"--epochs {recipe.epochs:g} makes no step: {least}")
    if recipe.optim.warmup_epochs >= recipe.epochs > 1:
        epochs = f"the warm-up ({recipe.optim.warmup_epochs:g} epochs) does not end before the run ({recipe.epochs:g})"
        print(f"{epochs}: try --optim.warmup-epochs 1")

    # precision, one for all processes and for every resume on other hardware
    precision = network.choose_precision(recipe, device, training=True)
    (mixed,) = processes.largest(float(precision != "bfloat16"))
    return replace(recipe, precision="float32" if mixed and recipe.precision == "auto" else precision)


def _record(run: Path, plan: Plan, recipe: Recipe, splits: Splits) -> Facts:
    """The facts of a run; writes them with the recipe, or cuts the metrics of a resumed run.

    ValueError when processes differ in recipe, images or step, or when a resumed run has other images.
    """
    data, images, resumed = plan.data, plan.images, plan.resumed
    versions = {"corinfomax": __version__, "python": platform.python_version()}
    facts = Facts(
        data=data.absolute_name,
        recipe_name=plan.recipe_name,
        images=len(splits.train),
        fingerprint=splits.train.fingerprint,
        versions=versions | {"torch": torch.__version__, "timm": timm.__version__},
        options=plan.options,
        root=None if data.absolute_root is None else str(data.absolute_root),
        cache=None if images.cache is None else str(images.cache.absolute()),
        holdout=images.holdout,
        test_split=images.test_split,
        stack=images.stack,
        channels=images.channels,
        skip=None if images.skip is None else SKIP_LIST,
        scored=_scored(splits),
        start=plan.start_record,
    )

    # one run in all processes, and the same as before
    same = {"their images": facts.fingerprint, "their recipe": json.dumps(fields.to_json(recipe))}
    same["their weights to start from"] = str(facts.start and facts.start.digest)
    processes.require_same({**same, "the step they resume from": str(resumed and resumed.step)})
    if resumed is not None and resumed.facts.fingerprint != facts.fingerprint:
        wrong = f"the images of {facts.data} are not the ones that {run} was trained on: put those back"
        again = messages.command("pretrain", "DATA", "--resume", str(run))
        raise ValueError(f"{wrong}, or say where they are: {again}")

    # the first process writes
    if processes.rank() == 0 and resumed is None:
        if facts.skip is not None:  # a copy, since the user may change the list
            run_folder.write_text(run / SKIP_LIST, tables.names_as_text(sorted(data.skip)))
        if plan.start is not None:
            export.write_tensors(run_folder.start_path(run), plan.start.backbone, plan.start.recipe, facts.start)
        run_folder.write_json(run / "recipe.json", {"recipe": fields.to_json(recipe), "facts": facts.to_json()})
    elif processes.rank() == 0 and resumed is not None:
        run_folder.forget_after(run, resumed.step)
        if resumed.step and not run_folder.read_metrics(run):
            print(f"{run / 'metrics.jsonl'} is gone: curves and verdict begin at step {resumed.step}")
        print(f"resuming {run} after step {resumed.step}")
        if resumed.facts.scored not in (None, facts.scored):
            print("test images or labels changed since the run began: its scores are of the new ones")
    return facts


def _scored(splits: Splits) -> str:
    """A digest of what the scores depend on beside the training images: test images and labels."""
    digest = hashlib.blake2b(digest_size=16)
    for images in splits:
        if images is not None:
            labels = b"" if images.labels is None else images.labels.numpy().tobytes()
            digest.update(f"{images.fingerprint} {images.classes}".encode() + labels)
    return digest.hexdigest()


def conclude(subject: Subject, data: Data, device: torch.device) -> int:
    """The verdict first, so that nothing after it can lose it; then scores if there are labels, and the page."""
    run, network, recipe, _, facts, splits, _ = subject
    try:
        _judge(run, recipe, facts)
        if facts.start is None and facts.options.diagnoses:
            _compare_untrained(subject, device)
        if facts.options.evaluate and splits.labelled:
            before, remarks = inputs.before(run, splits, recipe, facts, device) if facts.start is not None else ([], ())
            results = table.evaluate(network.backbone, splits, recipe, device=device, rivals=before, remarks=remarks)
            if facts.start is None:
                more = longer.remarks(results, recipe, recipe.steps(facts.images))
                results = results._replace(remarks=(*results.remarks, *more))
            inputs.print_scores(results, run / "results.json")
        elif facts.start is not None:
            kept = f"The weights before it are kept in {run_folder.start_path(run)}."
            images = messages.from_here(facts.data)
            compare = messages.command("evaluate", str(run), images, "--out", str(run / "results.json"))
            if run_folder.read_results(run).keep_start:
                print(WENT_WRONG)
            else:
                print(kept if splits.labelled else f"{NO_LABELS} {kept}")
            if splits.labelled and isinstance(data.name, str):
                print(f"To see whether continuing helped: {compare}")
        if facts.options.report:
            _report(subject, device)
    except KeyboardInterrupt:
        again = messages.command("pretrain", "--resume", str(run))
        print(f"stopped after training; for scores and page: {again}")
        return 130
    root = [] if facts.root is None else ["--root", facts.root]
    if isinstance(data.name, str):
        print(f"feature vectors: {messages.command('embed', str(run), data.name, *root)}")
    return 0


def _judge(run: Path, recipe: Recipe, facts: Facts, *, error: str | None = None) -> None:
    """Keep and print the verdict and the best checkpoint.

    A run that continued from weights and went wrong gives those back, until scores say otherwise.
    """
    rows, steps = run_folder.read_metrics(run), recipe.steps(facts.images)
    judged = verdict.judge(rows, recipe, steps=steps, ended=True, error=error)
    saved = {run_folder.step_of(path): path for path in run_folder.checkpoints(run)}
    best = verdict.best_step(rows, saved)
    if facts.start is not None and recipe.tuning.average < 1:
        best = max(saved, default=None)  # the weights before the last are not averaged
    best_path = None if best is None else saved[best].relative_to(run).as_posix()
    wrong = judged is not None and judged.kind not in verdict.ENDS_SOUND
    content = Results(judged, best_path).to_json()
    if facts.start is not None and table.BEFORE not in run_folder.read_results(run).table:
        content["keep_start"] = wrong
    if content:
        run_folder.add_json(run / "results.json", content)
    if judged is not None:
        print(f"\nverdict: {judged.text}\n")
    if best is not None and best < max(saved):
        print(f"best checkpoint by {verdict.BEST}, ahead of the last one: {saved[best]}")


def _compare_untrained(subject: Subject, device: torch.device) -> None:
    """Keep and print what views share in the features, beside raw pixels and the untrained network."""
    network, recipe, (train, test) = subject.network, subject.recipe, subject.splits
    images = train if test is None or len(test) < baselines.LEAST else test
    if len(images) < baselines.LEAST:
        return
    try:
        untrained = table.random_backbone(train, recipe, device=device)
        shared = baselines.shared_information(network.backbone, untrained, images, recipe, device=device)
    except Exception as error:  # the run itself is done, and its scores and page are to come
        print(f"no comparison with the untrained network: {type(error).__name__}: {error}", file=sys.stderr)
        return
    run_folder.add_json(subject.run / "results.json", Results(beside=shared.sentence).to_json())
    print(f"{shared.sentence}\n")


def _report(subject: Subject, device: torch.device) -> None:
    """Write the page; an error of its own is a message, since the run itself is done and kept."""
    try:
        from corinfomax.report import gather  # a broken plotting library must not cost the run

        out = gather.write_page(subject, subject.run / "report.html", device=device)
    except Exception as error:
        again = messages.command("report", str(subject.run))
        print(f"no report: {type(error).__name__}: {error}; to try again: {again}", file=sys.stderr)
    else:
        print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")
