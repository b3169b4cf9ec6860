"""The command line: what each of its commands does, in order."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from corinfomax import __version__, knobs, recipes, runs, slurm, verdict
from corinfomax.knobs import Recipe
from corinfomax.options import (
    Bench,
    Doctor,
    Embed,
    Evaluate,
    Export,
    Neighbors,
    Pretrain,
    Recipes,
    Report,
    Where,
    parse,
)
from corinfomax.recipes import RECIPES

if TYPE_CHECKING:
    import torch

    from corinfomax.checkpoint import Checkpoint
    from corinfomax.images import Images, Splits
    from corinfomax.networks import Network

SKIPPED = "skip.txt"
"""The list of images to leave out: what doctor writes unless told where, and a run's own copy in its folder."""

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

# torch takes seconds to import; every command imports what needs it inside, so that --help and mistakes answer at once.


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 doctor found what must be mended, 2 a mistake, said in a sentence,
    130 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        match parse(argv):
            case Pretrain() as command:
                return run_pretrain(command, argv)
            case Evaluate() as command:
                return run_evaluate(command)
            case Embed() as command:
                return run_embed(command)
            case Neighbors() as command:
                return run_neighbors(command)
            case Export() as command:
                return run_export(command)
            case Report() as command:
                return run_report(command)
            case Recipes() as command:
                return show_recipes(command)
            case Bench() as command:
                return run_bench(command, argv)
            case Doctor() as command:
                return run_doctor(command)
    except KeyboardInterrupt:
        print("corinfomax: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("CORINFOMAX_TRACEBACK"):
            raise
        said = error.strerror if isinstance(error, OSError) and error.filename is None else None
        print(f"corinfomax: {said or error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            print(f"corinfomax: torch.compile failed; go on without --compile ({_last_line(error)})", file=sys.stderr)
            return 2
        if not _out_of_memory(error):
            raise
        print(
            "corinfomax: out of memory; a smaller --batch or --size, or a smaller network, needs less "
            f"({str(error).partition(chr(10))[0] or type(error).__name__})",
            file=sys.stderr,
        )
        return 2
    raise AssertionError("every command is handled above")


def _out_of_memory(error: Exception) -> bool:
    """Whether that is what torch means, on a GPU or a CPU."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)


def _last_line(error: Exception) -> str:
    """Of a compiler's message, what says most in fewest words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "Error" in line or "not found" in line), lines[0] if lines else "no reason given"
    )


def run_pretrain(command: Pretrain, argv: list[str]) -> int:
    """The whole job: training in this process or in all that torchrun started, and the rest in the first of them."""
    if command.sbatch is not None:
        nodes, gpus = command.sbatch
        print(slurm.script(slurm.without_flag(argv, "--sbatch", 2), nodes=nodes, gpus=gpus), end="")
        return 0

    from corinfomax import distributed

    if command.replay is not None:
        return _replay(command)
    with distributed.group(_device(command.where.device)) as device, contextlib.ExitStack() as quiet:
        first = distributed.rank() == 0
        if not first:
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(Path(os.devnull).open("w"))))
        trained = _train(command, argv, device)
    if trained is None:
        return 130
    if first:
        _finish(trained)
    return 0


def _replay(command: Pretrain) -> int:
    """Show the step that a run broke off in."""
    from corinfomax import replay

    assert command.replay is not None
    if command != replace(Pretrain(), replay=command.replay, where=command.where):
        raise ValueError("--replay does one step of a file and nothing else: beside it only --device")
    print(replay.as_text(replay.replay(command.replay, _device(command.where.device))))
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


def _train(command: Pretrain, argv: list[str], device: torch.device) -> Trained | None:
    """Images, recipe, run folder, training; None when it was asked to stop."""
    from corinfomax import checkpoint, distributed, files, networks, sources, track, train

    resumed: checkpoint.Checkpoint | None = None
    data, where, recipe, name = command.data, command.where, command.knobs, command.recipe
    if command.resume is not None:
        data, where, resumed = _resumed(command)
        command = _as_it_ran(command, argv, resumed.facts)
        recipe, name = resumed.recipe, resumed.facts["recipe_name"]
    if data is None:
        raise ValueError("name the images: corinfomax pretrain DATA, or --resume RUN to go on with a run")
    if command.log_steps < 1 or command.keep < 1 or min(command.scores, command.diagnoses) < 0:
        raise ValueError("--log-steps and --keep must be at least 1, --scores and --diagnoses at least 0")
    if command.track is not None:
        track.check(command.track)
    if name is None:
        survey = sources.survey(data, root=where.root, download=where.download, skip=_left_out(where))
        name, base, why = recipes.choose(data, survey.images, survey.short_side, cuda=device.type == "cuda")
        again = parse(argv, base)  # the same words, now over the chosen recipe
        assert isinstance(again, Pretrain)
        recipe = again.knobs
        print(f"recipe {why}; --recipe names another")
    first = distributed.rank() == 0
    early = _new_run(command.out, "") if first and command.resume is None and command.out is not None else None
    if resumed is None:
        recipe = _fit_copies(recipe, data, where)
    with distributed.first_of_machine():  # one decodes, the others read its cache
        splits = _load(data, where, recipe.cache_side)
    recipe = _fit_batch(recipe, len(splits.train))
    recipe = replace(recipe, precision=networks.precision(recipe, device))  # a resumed run keeps it on other hardware
    if recipe.optim.warmup_epochs >= recipe.epochs > 1:
        print(f"the warm-up, {recipe.optim.warmup_epochs:g} epochs, is as long as the run: --optim.warmup-epochs 1")
    facts = {
        "data": sources.absolute(data),  # a run may be resumed from anywhere
        "root": None if where.root is None else str(where.root.absolute()),
        "cache": None if where.cache is None else str(where.cache.absolute()),
        "holdout": where.holdout,
        "test_split": where.test_split,
        "skip": None if where.skip is None else SKIPPED,
        "recipe_name": name,
        "images": len(splits.train),
        "fingerprint": splits.train.fingerprint,
        "versions": _versions(),
        "options": {name: getattr(command, name) for name in KEPT_OPTIONS},
    }
    if resumed is not None and resumed.facts["fingerprint"] != facts["fingerprint"]:
        raise ValueError(
            f"the images of {data} are not those that {command.resume} was trained on; put those back, or name where "
            f"they are now: corinfomax pretrain DATA --resume {command.resume}"
        )
    if command.resume is not None:
        run = command.resume
    elif first:
        run = early or _new_run(None, f"{Path(data).stem or 'images'}-{name}")
    else:
        run = command.out or Path("runs")  # the first process writes there, this one does not
    pace = train.Pace(command.log_steps, command.checkpoint_minutes, command.keep, command.scores, command.diagnoses)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        tell: track.Tell = lambda row: None  # noqa: E731
        if first:
            stack.enter_context(runs.held(run))
        if first and resumed is None:
            if where.skip is not None:  # the run's own copy: what was left out stays known when the list is changed
                runs.write_text(run / SKIPPED, files.names_as_text(sorted(_left_out(where))))
            runs.write_json(run / "recipe.json", {"recipe": knobs.to_json(recipe), "facts": facts, "command": argv})
        elif first and resumed is not None:
            runs.forget_after(run, resumed.step)
            print(f"going on with {run} after step {resumed.step}")
        if first and command.track is not None:
            told = {flag: str(value) for flag, value in knobs.flags(recipe)}
            tell = stack.enter_context(track.to(command.track, run, told))
        try:
            network = train.pretrain(
                recipe,
                splits,
                run,
                device=device,
                pace=pace,
                facts=facts,
                resume=resumed,
                tell=tell,
                compiled=command.compile,
            )
        except train.Interrupted as stop:
            print(f"stopped; {stop.checkpoint} has all that was done\nto go on: {_go_on(run)}")
            return None
        except FloatingPointError as error:
            if first:
                _conclude(run, recipe, len(splits.train), error=str(error))
            distributed.wait()  # the first to end would have torchrun end the others before they have spoken
            raise
        except OSError as error:
            raise OSError(f"{error.strerror or error}; when that is mended: {_go_on(run)}") from error
    if first:
        print(f"trained in {(time.monotonic() - started) / 60:.1f} min: {runs.checkpoints(run)[-1]}")
    return Trained(data, run, network, recipe, facts, splits, device, command)


def _finish(trained: Trained) -> None:
    """The verdict first, so that nothing after it can cost it; then scores where there are labels, and the page."""
    from corinfomax import evaluate, train

    data, run, network, recipe, facts, splits, device, command = trained
    _conclude(run, recipe, len(splits.train))
    if command.evaluate and train.scorable(splits):
        _tell(evaluate.evaluate(network.backbone, splits, recipe, device=device), splits, run / "results.json")
    if command.report:
        _report_if_possible(run, network, recipe, facts, splits, device)
    root = [] if facts["root"] is None else ["--root", facts["root"]]
    print(f"feature vectors: {shlex.join(['corinfomax', 'embed', str(run), data, *root])}")


def _conclude(run: Path, recipe: Recipe, images: int, *, error: str | None = None) -> None:
    """Say and keep whether the run worked, and which of its checkpoints is best."""
    rows, steps = runs.read_metrics(run), recipe.epochs * (images // recipe.batch)
    found = verdict.judge(rows, recipe, steps=steps, ended=True, error=error)
    if found is None:
        return
    print(f"\nverdict: {found.text}\n")
    results: dict[str, Any] = {"verdict": found._asdict()}
    kept = {runs.step_of(path): path for path in runs.checkpoints(run)}
    best = verdict.best_step(rows, kept)
    if best is not None:
        results["best_checkpoint"] = kept[best].relative_to(run).as_posix()
        if best < max(kept):
            print(f"best checkpoint by {verdict.BEST}, before the last: {kept[best]}")
    runs.add_json(run / "results.json", results)


def _new_run(out: Path | None, name: str) -> Path:
    if out is None:
        return runs.fresh_folder(Path("runs"), name)
    if runs.checkpoints(out) or runs.read_metrics(out):
        raise ValueError(f"{out} holds a run already; --resume {out} goes on with it, another --out starts anew")
    out.mkdir(parents=True, exist_ok=True)
    return out


def run_evaluate(command: Evaluate) -> int:
    """Score weights on labelled images, beside baselines and other weights."""
    import torch

    from corinfomax import evaluate, weights

    device = _device(command.where.device)
    names = (command.weights, *command.against)
    loaded = []
    for name in names:
        given = weights.load(name, architecture=command.architecture, small_stem=command.small_stem, size=command.size)
        print(f"loaded {given.said}")
        backbone = given.backbone.to(device).to(memory_format=torch.channels_last)
        loaded.append(given._replace(backbone=backbone))
    ours, others = loaded[0], loaded[1:]
    splits = _load(command.data, command.where, ours.recipe.cache_side)
    evaluate.check_labels(splits)
    sides = {ours.recipe.cache_side: splits}
    for other in others:
        if (side := other.recipe.cache_side) not in sides:
            sides[side] = _splits(command.data, command.where, side)
    called = evaluate.distinct_names(command.against)
    rivals = [
        evaluate.Contender(name, other.backbone, other.recipe, sides[other.recipe.cache_side])
        for name, other in zip(called, others, strict=True)
    ]
    result = evaluate.evaluate(
        ours.backbone,
        splits,
        ours.recipe,
        device=device,
        published_probe=command.published_probe,
        fine_tune=command.fine_tune,
        rivals=rivals,
    )
    _tell(result, splits, command.out)
    return 0


def run_embed(command: Embed) -> int:
    """Write the features of every image of every split."""
    import torch

    from corinfomax import checkpoint, embed

    embed.check_ending(command.out)
    device = _device(command.where.device)
    network, saved = checkpoint.load_network(command.weights)
    backbone = network.backbone.to(device).to(memory_format=torch.channels_last)
    parts = _every(command.data, command.where, saved.recipe.cache_side)
    vectors = {
        name: embed.features(backbone, part, saved.recipe, device=device, progress=f"embedding {name}")
        for name, part in parts.items()
    }
    embed.write(command.out, vectors, parts)
    count, width = sum(map(len, parts.values())), vectors["train"].shape[1]
    print(f"{command.out}: {count:,} images × {width} features, splits {', '.join(parts)}")
    if command.out.suffix == ".parquet":
        file = shlex.quote(str(command.out))
        print(f"to look at them: uvx embedding-atlas {file} --x x --y y  (or --vector features, a map of neighbours)")
    return 0


def run_neighbors(command: Neighbors) -> int:
    """Say and show what is most like each picture."""
    import torch

    from corinfomax import neighbors, page, weights

    if not command.query or command.count < 1:
        raise ValueError("name at least one picture with --query, and a --count of at least 1")
    device = _device(command.where.device)
    given = weights.load(command.weights, architecture=command.architecture)
    print(f"loaded {given.said}")
    parts = _every(command.data, command.where, given.recipe.cache_side)
    pool = neighbors.pool_of(parts)
    backbone = given.backbone.to(device).to(memory_format=torch.channels_last)
    found = neighbors.search(backbone, pool, given.recipe, command.query, k=command.count, device=device)
    for one in found:
        print(neighbors.as_text(one, pool))
    text = neighbors.as_page(found, pool, data=command.data)
    runs.write_whole(command.out, lambda temporary: page.write_text(temporary, text))
    print(f"page: {command.out}")
    return 0


def run_report(command: Report) -> int:
    """Write the page of a run."""
    from corinfomax import checkpoint, report

    if not command.run.is_dir():
        raise ValueError(f"{command.run} is no folder; name that of a run: corinfomax report RUN")
    device = _device(command.where.device)
    network, saved = checkpoint.load_network(command.run)
    where = _where_it_was(command.where, command.run, saved.facts)
    splits = _load(command.data or saved.facts["data"], where, saved.recipe.cache_side)
    same = splits.train.fingerprint == saved.facts["fingerprint"]
    if not same:
        print("these are not the images that the run was trained on: the page has no contact sheet of its views")
    subject = report.Subject(command.run, network, saved.recipe, saved.step, saved.facts, splits, same)
    out = report.write(subject, command.out or command.run / "report.html", device=device)
    print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def _report_if_possible(
    run: Path, network: Network, recipe: Recipe, facts: dict[str, Any], splits: Splits, device: torch.device
) -> None:
    """The page at the end of a run; what goes wrong with it is a sentence, since the run itself is done and kept."""
    step = recipe.epochs * (len(splits.train) // recipe.batch)
    try:
        from corinfomax import report

        subject = report.Subject(run, network, recipe, step, facts, splits, same_images=True)
        out = report.write(subject, run / "report.html", device=device)
    except Exception as error:  # whatever it is
        print(f"no report: {type(error).__name__}: {error}; corinfomax report {run} tries again", file=sys.stderr)
    else:
        print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")


def run_export(command: Export) -> int:
    """Write the backbone for others, and say how it was verified."""
    from corinfomax import checkpoint, export

    export.check_extra(command.format)
    network, saved = checkpoint.load_network(command.weights)
    given = command.weights.absolute()
    run = given if given.is_dir() else given.parent.parent if given.parent.name == "checkpoints" else None
    # What a run says of itself is true of its last weights alone.
    is_last = run is not None and [runs.step_of(path) for path in runs.checkpoints(run)[-1:]] == [saved.step]
    told = None if run is None or not is_last else run / "results.json"
    results = runs.read_json(told) if told is not None and told.exists() else {}
    name = given.stem if run is None else run.name if is_last else f"{run.name}-step-{saved.step}"
    out = command.out or Path(name + {"timm": "-timm", "onnx": ".onnx", "state-dict": ".safetensors"}[command.format])
    done = export.export(network.backbone, saved, out, command.format, results=results)
    print(
        f"{done.path}: {done.tensors} tensors, loaded {done.loader} in a fresh process; its features there differ from "
        f"those here by at most {done.difference:.1e}"
    )
    return 0


def show_recipes(command: Recipes) -> int:
    """The list of recipes, or one recipe's every knob."""
    if command.name is None:
        print(f"{'recipe':<17}{'paper':>7}{'ours':>14}  what it is")
        for name, entry in RECIPES.items():
            paper = f"{entry.paper:.2f}" if entry.paper is not None else "–"
            ours = entry.measured[0] if entry.measured else None
            shown = "not run yet" if ours is None else f"{ours.value:.1f}" + (f" ± {ours.sd:.1f}" if ours.sd else "")
            print(f"{name:<17}{paper:>7}{shown:>14}  {entry.about}")
        print("\ntop-1 of a linear probe, %; corinfomax recipes NAME shows every knob and what ours was measured on")
        return 0
    recipe, entry = recipes.named(command.name), RECIPES[command.name]
    print(f"{command.name}: {entry.about}\ndata: {entry.data}")
    if entry.paper is not None:
        print(f"the paper's linear probe: {entry.paper:.2f} %")
    for m in entry.measured:
        sd = f" ± {m.sd:.1f}" if m.sd is not None else ""
        print(f"ours: {m.score} {m.value:.1f}{sd} % (n = {m.n}, {m.data}, {m.hardware}, {m.minutes:g} min, {m.commit})")
    print()
    for flag, value in knobs.flags(recipe):
        print(f"  --{flag:<26} {value}")
    return 0


def run_bench(command: Bench, argv: list[str]) -> int:
    """Time a training step, say what bounds it and what to change."""
    from corinfomax import bench, bottleneck, networks, sources

    if not 0 < command.seconds < math.inf:
        raise ValueError(f"--seconds is {command.seconds:g}; how long to measure is above 0")
    device = _device(command.where.device)
    data, where, recipe, decode = command.data, command.where, command.knobs, None
    if command.recipe is None:
        if data is None:
            name = "cifar10" if device.type == "cuda" else "cpu-small"
            base, why = RECIPES[name].recipe, f"{name}: {RECIPES[name].about}"
        else:
            survey = sources.survey(data, root=where.root, download=where.download, skip=_left_out(where))
            _, base, why = recipes.choose(data, survey.images, survey.short_side, cuda=device.type == "cuda")
        again = parse(argv, base)
        assert isinstance(again, Bench)
        recipe = again.knobs
        print(f"recipe {why}; --recipe names another")
    if data is None:
        pictures = bench.made_up(recipe)
    else:
        pictures = _load(data, where, recipe.cache_side).train
        decode = bench.decoding(sources.find(data, root=where.root, skip=_left_out(where))["train"], recipe.cache_side)
        recipe = _fit_batch(recipe, len(pictures))
    recipe = replace(recipe, precision=networks.precision(recipe, device))
    setting = bench.describe(recipe, pictures, device, decode=decode)
    print(
        f"{recipe.backbone.name} at {recipe.size} px, batch {recipe.batch}, {setting.precision}, on {setting.device}, "
        f"{setting.threads} threads of {setting.cores} cores, torch {_versions()['torch']}\n"
    )
    timings = bench.measure(recipe, pictures, device, seconds=command.seconds)
    print(bottleneck.as_text(timings, setting))
    if command.out is not None:
        runs.write_json(command.out, {**bottleneck.as_json(timings, setting), "recipe": knobs.to_json(recipe)})
    return 0


def run_doctor(command: Doctor) -> int:
    """Look at the images, say what is wrong with them and what training would take, and write the list to leave out."""
    from corinfomax import bench, examine, health, networks, sources

    if not 0 <= command.seconds < math.inf:
        raise ValueError(f"--seconds is {command.seconds:g}; how long to time steps is 0 or above")
    where, skip = command.where, _left_out(command.where)
    if command.out is not None:
        health.check_out(command.out, where.skip)
    device = _device(where.device)
    splits = sources.find(command.data, root=where.root, download=where.download, skip=skip)
    order = sorted(splits, key=("train", "val", "test").index)
    _tell_left_out(command.data, where)
    survey = sources.survey(command.data, root=where.root, skip=skip)
    chosen, recipe, why = recipes.choose(command.data, survey.images, survey.short_side, cuda=device.type == "cuda")
    recipe = replace(recipe, precision=networks.precision(recipe, device))
    # Timed first: on a CPU the peak of memory is then that of training, before the images are looked at.
    recipe = _fit_batch(recipe, survey.images)
    pace = None
    if command.seconds:
        try:
            pace = bench.pace(recipe, device, seconds=command.seconds)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            print(f"recipe {chosen} needs more memory than there is: pretrain with a smaller --batch or --micro-batch")
    parts = [examine.examine(name, splits[name], recipe.cache_side) for name in order]
    found = health.findings(parts, recipe)
    lines = health.skip_list(found, command.data, skip)
    gone = skip.union(*(finding.skip for finding in found))

    print(*map(health.overview, parts), sep="\n")
    for finding in found:
        print(f"{'to mend' if finding.grave else 'remark'}: {finding.text}")
    if not found:
        print("nothing is wrong with these images")
    print(f"recipe {why}")
    if pace is not None:
        print(bench.foreseen(pace, recipe, len(set(parts[0].paths) - gone), device))
    print(f"the decoded copies take {sum(part.cached for part in parts) / 1e6:,.0f} MB of disk")
    words = ["corinfomax pretrain", shlex.quote(command.data), *_typed_where(where)]
    out = command.out or Path(SKIPPED)
    if lines is not None:
        text = "\n".join(lines) + "\n"
        if command.out is None and out != where.skip:
            out = health.place(out, text)
        runs.write_text(out, text)
        print(f"{out}: {len(gone):,} images to leave out, and why; others that may be left out are comments in it")
    if gone:
        words.append(f"--skip {shlex.quote(str(out))}")
    if (colours := health.channels(parts[0])) is not None:
        words += [f"--{name} " + " ".join(f"{value:.4f}" for value in each) for name, each in colours._asdict().items()]
    print("→ " + " ".join(words))
    return int(any(finding.grave for finding in found))


def _typed_where(where: Where) -> list[str]:
    """What was typed about the images and the device, but for the list to skip, as words of a command."""
    words = []
    for field in dataclasses.fields(where):
        value = getattr(where, field.name)
        if field.name == "skip" or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return words


def _go_on(run: Path) -> str:
    """The command that goes on with a run, for as many processes as there are."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    program = ["corinfomax"] if here == 1 else ["torchrun", "--nproc-per-node", str(here), "-m", "corinfomax"]
    return shlex.join([*program, "pretrain", "--resume", str(run)])


def _as_it_ran(command: Pretrain, argv: list[str], facts: dict[str, Any]) -> Pretrain:
    """The options that the run had, but for those that are typed now: --resume RUN alone goes on as it was."""
    typed = {word.partition("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-") for word in argv}
    kept = facts.get("options", {})  # runs of older versions have none
    return replace(command, **{name: value for name, value in kept.items() if name.replace("_", "-") not in typed})


def _fit_copies(recipe: Recipe, data: str, where: Where) -> Recipe:
    """The recipe with cached copies large enough for its views, where the images are."""
    from corinfomax import sources

    largest = max(recipe.size, recipe.test_side)
    if largest <= recipe.cache_side:
        return recipe
    survey = sources.survey(data, root=where.root, download=where.download, skip=_left_out(where))
    side = min(survey.short_side, largest * 8 // 7)
    if side <= recipe.cache_side:
        return recipe
    print(f"views of {largest} px need larger copies than of {recipe.cache_side} px: --cache-side {side}")
    return replace(recipe, cache_side=side)


def _resumed(command: Pretrain) -> tuple[str, Where, Checkpoint]:
    """The data, where it lies, and the last checkpoint of the run to go on with."""
    from corinfomax import checkpoint

    run, where = command.resume, command.where
    assert run is not None
    fresh = Pretrain()
    kept = {name: getattr(fresh, name) for name in ("recipe", "out", "knobs")}
    lying = replace(where, holdout=None, test_split=None, skip=None, download=False)
    if command != replace(command, **kept, where=lying):
        raise ValueError(
            "a resumed run keeps its recipe and its splits: beside --resume only how often it logs, where the images "
            "are now, and the device"
        )
    loaded = checkpoint.load_begun(run)
    return command.data or loaded.facts["data"], _where_it_was(where, run, loaded.facts), loaded


def _where_it_was(where: Where, run: Path, facts: dict[str, Any]) -> Where:
    """Where a run found its images, which it left out and which it tested on; what is typed now comes first."""
    root, cache = (
        given or (None if facts[name] is None else Path(facts[name]))
        for name, given in (("root", where.root), ("cache", where.cache))
    )
    return replace(
        where,
        root=root,
        cache=cache,
        holdout=facts["holdout"] if where.holdout is None else where.holdout,
        test_split=facts["test_split"] if where.test_split is None else where.test_split,
        skip=where.skip or (run / facts["skip"] if facts.get("skip") else None),
    )


def _load(data: str, where: Where, side: int) -> Splits:
    splits = _splits(data, where, side)
    _tell_left_out(data, where)
    for name, split in zip(("train", "test"), splits, strict=True):
        if split is not None:
            _tell_skipped(name, split)
    test = f", {len(splits.test):,} to score on" if splits.test is not None else ""
    classes = f", {len(splits.train.classes)} classes (for scoring only)" if splits.train.classes else ""
    print(f"{len(splits.train):,} images to train on{test}{classes}")
    if splits.train.labels is not None and splits.test is not None and splits.test.labels is None:
        print("no scores: the images to score on have no labels; --holdout 0.1 scores on some of the training images")
    return splits


def _splits(data: str, where: Where, side: int) -> Splits:
    from corinfomax import images

    return images.load(
        data,
        side=side,
        holdout=where.holdout,
        root=where.root,
        download=where.download,
        cache=where.cache,
        test_split=where.test_split,
        skip=_left_out(where),
    )


def _left_out(where: Where) -> frozenset[str]:
    """The paths that --skip names."""
    from corinfomax import files

    return frozenset() if where.skip is None else files.read_names(where.skip)


def _tell_left_out(data: str, where: Where) -> None:
    """How many images --skip left out, and which of its names are none of the data's."""
    from corinfomax import files, sources

    if where.skip is None:
        return
    names = _left_out(where)
    there = {path for source in sources.find(data, root=where.root).values() for path in source.paths}
    print(f"{len(names & there):,} images left out, as {where.skip} says")
    if unknown := sorted(names - there):
        print(
            f"{len(unknown):,} of the {len(names):,} names in {where.skip} are of no image in {data}, first "
            f"{files.quoted(unknown[0])}; paths start from the folder that DATA names"
        )


def _every(data: str, where: Where, side: int) -> dict[str, Images]:
    """Every split, with a word on what was left out."""
    from corinfomax import images

    parts = images.load_every(
        data, side=side, root=where.root, download=where.download, cache=where.cache, skip=_left_out(where)
    )
    _tell_left_out(data, where)
    for name, part in parts.items():
        _tell_skipped(name, part)
    return parts


def _tell_skipped(name: str, split: Images) -> None:
    from corinfomax import files

    if split.skipped:
        path, reason = split.skipped[0]
        print(f"{len(split.skipped)} unreadable images left out of {name}, such as {files.quoted(path)}: {reason}")


def _fit_batch(recipe: Recipe, count: int) -> Recipe:
    if count >= recipe.batch:
        return recipe
    if count < 2:
        raise ValueError(f"{count} image is not enough to train on: a batch needs at least 2")
    print(f"batch {recipe.batch} is more than the {count} images: batch {count}")
    return replace(recipe, batch=count)


def _tell(result: Any, splits: Splits, path: Path | None) -> None:
    from corinfomax import evaluate

    assert splits.test is not None
    print(f"\n{evaluate.as_text(result.table)}\n{evaluate.LEGEND}\n")
    print(f"{len(splits.train):,} images with labels to fit each probe, {len(splits.test):,} others to score it")
    print("\n".join(result.sentences))
    if path is not None:
        runs.add_json(path, {**evaluate.as_json(result), "train": len(splits.train), "test": len(splits.test)})
        print(f"written to {path}")


def _device(name: str) -> torch.device:
    import torch

    from corinfomax import distributed

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = distributed.own(torch.device(name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {name!r}: {reason}") from error
    return device


def _versions() -> dict[str, str]:
    import timm
    import torch

    return {
        "corinfomax": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
