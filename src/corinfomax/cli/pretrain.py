"""The whole job: images, recipe, run folder and training; then verdict, scores and page."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from corinfomax import network as networks
from corinfomax.cli import evaluate, inputs
from corinfomax.cli.options import Pretrain, Where, parse
from corinfomax.diagnosis import verdict
from corinfomax.evaluation import table as scoring
from corinfomax.images import files, sources
from corinfomax.images.cache import Splits
from corinfomax.network import Network
from corinfomax.recipes import fields, published
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes, run_folder, shell
from corinfomax.training import loop, replay, trackers
from corinfomax.weights import checkpoint
from corinfomax.weights.checkpoint import Checkpoint

KEPT_OPTIONS = (
    "log_steps",
    "checkpoint_minutes",
    "keep",
    "scores",
    "diagnoses",
    "evaluate",
    "report",
    "track",
    "compile",
)
"""What a run keeps when it is resumed, beside its recipe."""


def run(command: Pretrain, argv: list[str]) -> int:
    """The whole job: training in this process or in all that torchrun started, and the rest in the first of them."""
    if command.replay is not None:
        return _replay(command)
    with processes.group(inputs.device_of(command.where.device)) as device, contextlib.ExitStack() as quiet:
        first = processes.rank() == 0
        if not first:
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(Path(os.devnull).open("w"))))
        trained = _train(command, argv, device)
    if trained is None:
        return 130
    if first:
        try:
            _finish(trained)
        except KeyboardInterrupt:
            print(f"stopped; the run is trained, and this goes on with scores and page: {_go_on(trained.run)}")
            return 130
    return 0


def _replay(command: Pretrain) -> int:
    """Show the step that a run broke off in."""
    assert command.replay is not None
    if command != replace(Pretrain(), replay=command.replay, where=command.where):
        raise ValueError("--replay does one step of a file and nothing else: beside it only --device")
    print(replay.as_text(replay.replay(command.replay, inputs.device_of(command.where.device))))
    return 0


class Trained(NamedTuple):
    """What training leaves to score, judge and report."""

    data: str
    run: Path
    network: Network
    recipe: Recipe
    facts: dict[str, Any]
    splits: Splits
    device: torch.device
    command: Pretrain
    """With the options of the run, where it was resumed."""


class Plan(NamedTuple):
    """What to train, before an image is decoded."""

    data: str
    where: Where
    recipe: Recipe
    name: str
    """The recipe's."""
    resumed: Checkpoint | None
    command: Pretrain
    """With the options of the run, where it is resumed."""


def _plan(command: Pretrain, argv: list[str], device: torch.device) -> Plan:
    """From what was typed, or from the run to go on with. ValueError for what no run can be."""
    resumed: Checkpoint | None = None
    data, where, recipe, name = command.data, command.where, command.knobs, command.recipe
    if command.resume is not None:
        data, where, resumed = _resumed(command, argv)
        command = _as_it_ran(command, argv, resumed.facts)
        recipe, name = resumed.recipe, resumed.facts["recipe_name"]
    if data is None:
        raise ValueError("name the images: corinfomax pretrain DATA, or --resume RUN to go on with a run")
    if command.log_steps < 1 or command.keep < 1 or min(command.scores, command.diagnoses) < 0:
        raise ValueError("--log-steps and --keep must be at least 1, --scores and --diagnoses at least 0")
    if not 0 <= command.checkpoint_minutes < math.inf:
        raise ValueError(f"--checkpoint-minutes is {command.checkpoint_minutes:g}; it must be at least 0, and finite")
    if command.track is not None:
        trackers.check(command.track)
    if name is None:
        survey = sources.survey(
            data, root=where.root, download=where.download, skip=inputs.left_out(where), cache=where.cache
        )
        name, base, why = published.choose(data, survey.images, survey.short_side, cuda=device.type == "cuda")
        again = parse(argv, base)  # the same words, now over the chosen recipe
        assert isinstance(again, Pretrain)
        recipe = again.knobs
        print(inputs.chosen(why, base, recipe))
    if resumed is None:
        recipe = inputs.fit_copies(recipe, data, where)
    loop.check_parts(recipe)
    return Plan(data, where, recipe, name, resumed, command)


def _train(command: Pretrain, argv: list[str], device: torch.device) -> Trained | None:
    """Images, recipe, run folder, training; None when it was asked to stop."""
    first = processes.rank() == 0
    with contextlib.ExitStack() as stack:
        run = command.resume or command.out
        # The first process writes there: held before anything in it is read, and known to be possible before the hours
        # that decoding may take.
        if first and command.resume is not None and command.resume.is_dir():
            stack.enter_context(run_folder.held(command.resume))
        elif first and command.resume is None and command.out is not None:
            stack.enter_context(run_folder.begun(command.out))
        plan = _plan(command, argv, device)
        if run is None:
            run = Path("runs")
            if first:
                run = run_folder.fresh_folder(run, f"{Path(plan.data).stem or 'images'}-{plan.name}")
                stack.enter_context(run_folder.begun(run))
        try:
            return _train_in(run, plan, argv, device)
        except KeyboardInterrupt:
            if not (run / "recipe.json").exists():
                raise
            print(f"stopped\nto go on: {_go_on(run)}")
            return None


def _train_in(run: Path, plan: Plan, argv: list[str], device: torch.device) -> Trained | None:
    """The same, in a run folder that is held."""
    data, where, recipe, _, resumed, command = plan
    first = processes.rank() == 0
    with contextlib.ExitStack() as stack:
        with processes.first_of_machine():  # one decodes, the others read its cache
            splits = inputs.load(data, where, recipe)
        recipe = inputs.fit_batch(recipe, len(splits.train))
        if recipe.from_files and splits.train.files is None:
            raise ValueError(f"{data} has no files to cut crops from, it is one array: leave out --from-files")
        if recipe.steps(len(splits.train)) < 1:
            per_epoch = len(splits.train) // recipe.batch
            raise ValueError(
                f"--epochs {recipe.epochs:g} of {per_epoch} steps each are none: --epochs {1 / per_epoch:.2g} is one"
            )
        precision = networks.precision(recipe, device)
        (mixed,) = processes.largest(float(precision != "bfloat16"))  # a process may have another kind of processor
        if mixed and recipe.precision == "auto":
            precision = "float32"
        recipe = replace(recipe, precision=precision)  # kept when resumed on other hardware
        if recipe.optim.warmup_epochs >= recipe.epochs > 1:
            print(f"the warm-up, {recipe.optim.warmup_epochs:g} epochs, is as long as the run: --optim.warmup-epochs 1")
        facts = _facts(plan, splits)
        processes.agree(
            {
                "their images": facts["fingerprint"],
                "their recipe": json.dumps(fields.to_json(recipe)),
                "the step they go on from": str(resumed and resumed.step),
            }
        )
        if resumed is not None and resumed.facts["fingerprint"] != facts["fingerprint"]:
            raise ValueError(
                f"the images of {data} are not those that {run} was trained on; put those back, or name where they "
                f"are now: {_go_on(run, 'DATA')}"
            )
        if first and resumed is None:
            if where.skip is not None:  # the run's own copy: what was left out stays known when the list is changed
                run_folder.write_text(run / inputs.SKIPPED, files.names_as_text(sorted(inputs.left_out(where))))
            run_folder.write_json(
                run / "recipe.json", {"recipe": fields.to_json(recipe), "facts": facts, "command": argv}
            )
        elif first and resumed is not None:
            run_folder.forget_after(run, resumed.step)
            if resumed.step and not run_folder.read_metrics(run):
                print(f"{run / 'metrics.jsonl'} is gone: curves and verdict begin at step {resumed.step}")
            print(f"going on with {run} after step {resumed.step}")
        tell: trackers.Tell = lambda row: None  # noqa: E731
        if first and command.track is not None:
            told = {flag: str(value) for flag, value in fields.flags(recipe)}
            tell = stack.enter_context(trackers.to(command.track, run, told))
        started = time.monotonic()
        try:
            network = loop.pretrain(
                recipe,
                splits,
                run,
                device=device,
                pace=loop.Pace(*(getattr(command, field) for field in loop.Pace._fields)),
                facts=facts,
                resume=resumed,
                tell=tell,
                compiled=command.compile,
            )
        except loop.Interrupted as stop:
            print(f"stopped; {stop.checkpoint} has all that was done\nto go on: {_go_on(run)}")
            processes.wait()  # the first to end would have torchrun end the one that writes
            return None
        except FloatingPointError as error:
            if first:
                _conclude(run, recipe, len(splits.train), error=str(error))
                if command.report and run_folder.checkpoints(run):
                    before, saved = checkpoint.load_network(run)
                    _report_if_possible(run, before, recipe, saved.step, facts, splits, device)
            processes.wait()  # the first to end would have torchrun end the others before they have spoken
            raise
        except OSError as error:
            raise OSError(f"{error.strerror or error}; when that is mended: {_go_on(run)}") from error
    if first:
        metrics = run_folder.read_metrics(run)  # which know of what was done before a stop
        seconds = metrics[-1]["seconds"] if metrics else time.monotonic() - started
        print(f"trained in {seconds / 60:.1f} min: {run_folder.checkpoints(run)[-1]}")
    return Trained(data, run, network, recipe, facts, splits, device, command)


def _facts(plan: Plan, splits: Splits) -> dict[str, Any]:
    """What a run must know to be resumed from anywhere, and to be told from others."""
    data, where, _, name, _, command = plan
    root = sources.root_of(data, where.root)
    return {
        "data": sources.absolute(data),
        "root": None if root is None else str(root),
        "cache": None if where.cache is None else str(where.cache.absolute()),
        "holdout": where.holdout,
        "test_split": where.test_split,
        "skip": None if where.skip is None else inputs.SKIPPED,
        "recipe_name": name,
        "images": len(splits.train),
        "fingerprint": splits.train.fingerprint,
        "versions": inputs.versions(),
        "options": {name: getattr(command, name) for name in KEPT_OPTIONS},
    }


def _resumed(command: Pretrain, argv: list[str]) -> tuple[str, Where, Checkpoint]:
    """The data, where it lies, and the last checkpoint of the run to go on with."""
    run, where = command.resume, command.where
    assert run is not None
    # By what was typed, not by what it made of a recipe, which it may leave as that is.
    changing = {flag for flag, _ in fields.flags(command.knobs)} | {"recipe", "out"}
    lying = replace(where, holdout=None, test_split=None, skip=None, download=False)
    if where != lying or _typed_flags(argv) & changing:
        raise ValueError(
            "a resumed run keeps its recipe and its splits: beside --resume only how often it logs, where the images "
            "are now, and the device"
        )
    loaded = checkpoint.load_begun(run)
    needed = {"data", "root", "cache", "holdout", "test_split", "recipe_name", "fingerprint"}
    if missing := sorted(needed - set(loaded.facts)):
        raise ValueError(f"{run} was not begun by this command, or is damaged: it does not say its {missing[0]}")
    return command.data or loaded.facts["data"], inputs.where_it_was(where, run, loaded.facts), loaded


def _as_it_ran(command: Pretrain, argv: list[str], facts: dict[str, Any]) -> Pretrain:
    """The options that the run had, but for those that are typed now: --resume RUN alone goes on as it was."""
    typed = _typed_flags(argv)
    kept = facts.get("options", {})  # runs of older versions have none
    return replace(command, **{name: value for name, value in kept.items() if name.replace("_", "-") not in typed})


def _typed_flags(argv: list[str]) -> set[str]:
    """The flags, of a switch as it is when it is on."""
    flags = (word.partition("=")[0].replace("_", "-").removeprefix("--") for word in argv if word.startswith("--"))
    return {flag.replace(".no-", ".").removeprefix("no-") for flag in flags}


def _finish(trained: Trained) -> None:
    """The verdict first, so that nothing after it can cost it; then scores where there are labels, and the page."""
    data, run, network, recipe, facts, splits, device, command = trained
    _conclude(run, recipe, len(splits.train))
    if command.evaluate and loop.scorable(splits):
        evaluate.tell(scoring.evaluate(network.backbone, splits, recipe, device=device), splits, run / "results.json")
    if command.report:
        step = recipe.steps(len(splits.train))
        _report_if_possible(run, network, recipe, step, facts, splits, device)
    root = [] if facts["root"] is None else ["--root", facts["root"]]
    print(f"feature vectors: {shell.command('embed', str(run), data, *root)}")


def _conclude(run: Path, recipe: Recipe, images: int, *, error: str | None = None) -> None:
    """Say and keep whether the run worked, and which of its checkpoints is best."""
    rows, steps = run_folder.read_metrics(run), recipe.steps(images)
    found = verdict.judge(rows, recipe, steps=steps, ended=True, error=error)
    results: dict[str, Any] = {}
    if found is not None:
        print(f"\nverdict: {found.text}\n")
        results["verdict"] = found._asdict()
    elif recipe.loss.name not in fields.OWN:
        print(f"\nno verdict: what its measures should be is known of CorInfoMax, not of {recipe.loss.name}\n")
    kept = {run_folder.step_of(path): path for path in run_folder.checkpoints(run)}
    best = verdict.best_step(rows, kept)
    if best is not None:
        results["best_checkpoint"] = kept[best].relative_to(run).as_posix()
        if best < max(kept):
            print(f"best checkpoint by {verdict.BEST}, before the last: {kept[best]}")
    if results:
        run_folder.add_json(run / "results.json", results)


def _report_if_possible(
    run: Path, network: Network, recipe: Recipe, step: int, facts: dict[str, Any], splits: Splits, device: torch.device
) -> None:
    """The page of a run; what goes wrong with it is a sentence, since the run itself is done and kept."""
    try:
        from corinfomax.report import gather  # so that a library of its plots that is broken costs the page alone

        subject = gather.Subject(run, network, recipe, step, facts, splits, same_images=True)
        out = gather.write(subject, run / "report.html", device=device)
    except Exception as error:  # whatever it is
        again = shell.command("report", str(run))
        print(f"no report: {type(error).__name__}: {error}; {again} tries again", file=sys.stderr)
    else:
        print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")


def _go_on(run: Path, *data: str) -> str:
    """The command that goes on with a run, for as many processes as there are here."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # what torchrun gives
    return shell.command("pretrain", *data, "--resume", str(run), processes=here)
