"""`pretrain`, `evaluate` and `doctor` as functions, and a run as an object."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from corinfomax.api import notebook, settings
from corinfomax.api.encoder import Embedding, Encoder, Place, as_name, as_source, load
from corinfomax.checkup.result import Checkup
from corinfomax.cli import inputs, messages, process
from corinfomax.cli.arguments import DataOptions
from corinfomax.cli.doctor import Doctor
from corinfomax.cli.evaluate import Evaluate
from corinfomax.cli.export import Export
from corinfomax.cli.pretrain import Pretrain
from corinfomax.evaluation import table
from corinfomax.images.in_memory import Labels
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes, run_folder
from corinfomax.runtime.records import Facts, Results, Row, Verdict
from corinfomax.weights import checkpoint


class Scores(Results):
    """The scores of features beside baselines, `table[features][probe]`, with comparisons in words."""

    def __repr__(self) -> str:
        return "\n".join((table.as_text(self.table), table.LEGEND, "", *self.remarks, *self.sentences))

    def _repr_html_(self) -> str:
        return notebook.scores_table(self)


class Run:
    """A run in its folder: its results, and the next steps with it."""

    def __init__(self, path: Place) -> None:
        """The run in the folder `path`; FileNotFoundError if there is none."""
        self.path = Path(path).expanduser().absolute()
        if not (self.path / "recipe.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no run: there is no recipe.json in it")

    @property
    def _recorded(self) -> tuple[Recipe, Facts]:
        return checkpoint.recorded(self.path)

    @property
    def recipe(self) -> Recipe:
        """Every setting of the run."""
        return self._recorded[0]

    @property
    def facts(self) -> Facts:
        """Images, versions and options of the run."""
        return self._recorded[1]

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict in words, without labels; None before the end, or without any look."""
        return run_folder.read_results(self.path).verdict

    @property
    def scores(self) -> Scores | None:
        """The table of scores; None without labels, or before the end."""
        results = run_folder.read_results(self.path)
        return Scores(*results) if results.table else None

    @property
    def metrics(self) -> list[Row]:
        """Losses and label-free measures during training; `row.numbers()` is a flat dictionary, for a data frame."""
        return run_folder.read_metrics(self.path)

    @property
    def report(self) -> Path | None:
        """The page of the run; None if it was not written."""
        path = self.path / "report.html"
        return path if path.exists() else None

    @property
    def best(self) -> Path:
        """The best checkpoint by the label-free measures, else the last; the start if continuing did not help."""
        results, saved = run_folder.read_results(self.path), run_folder.checkpoints(self.path)
        if results.keep_start:
            return run_folder.start_path(self.path)
        best = self.path / results.best_checkpoint if results.best_checkpoint else None
        if best is not None and best.exists():
            return best
        if not saved:
            raise FileNotFoundError(f"{self.path} holds no checkpoint yet")
        return saved[-1]

    @cached_property
    def encoder(self) -> Encoder:
        """The run's weights as `load` gives them."""
        return load(self.path)

    @property
    def backbone(self) -> nn.Module:
        """The trained backbone, a timm network in eval mode: its last weights, or the start if that was better."""
        return self.encoder.backbone

    def embed(self, data: Any = None, **options: Any) -> Embedding:
        """The features of images, as `Encoder.embed` gives them; of the run's own without `data`."""
        return self.encoder.embed(*self._images(data, options), **options)

    def evaluate(self, data: Any = None, **options: Any) -> Scores:
        """The scores on labelled images, as `evaluate` gives them; on the run's own without `data`."""
        return evaluate(self.path, *self._images(data, options), **options)

    def export(self, format: Literal["timm", "onnx", "state-dict"] = "timm", out: Place | None = None) -> Path:
        """Write the backbone for use without this package; gives the folder or file, verified in a fresh process."""
        with process.borrowed():
            return Export(weights=self.path, format=format, out=None if out is None else Path(out)).write().path

    def _images(self, data: Any, options: dict[str, Any]) -> tuple[Any]:
        """The images of a call: those given, or the run's own with their options."""
        if data is not None:
            return (data,)
        facts = self.facts
        own = inputs.options_of_run(DataOptions(), self.path, facts)
        given = {name: value for name, value in vars(own).items() if value != getattr(DataOptions(), name)}
        options |= {name: value for name, value in given.items() if name not in options}
        return (inputs.images_of_run(facts, "embed", str(self.path), "FOLDER"),)

    def __repr__(self) -> str:
        return f"Run({messages.from_here(self.path)!r})"

    def __str__(self) -> str:
        verdict, scores = self.verdict, self.scores
        lines = [repr(self), f"verdict: {verdict.text}" if verdict else "no verdict yet"]
        return "\n".join(lines if scores is None else [*lines, "", str(scores)])

    def _repr_html_(self) -> str:
        return notebook.run(self.path, self.verdict, self.scores, self.report)


def pretrain(
    data: Any = None,
    *,
    labels: Labels | None = None,
    recipe: str | None = None,
    init: Place | None = None,
    prefix: str | None = None,
    out: Place | None = None,
    resume: bool = False,
    device: str = "auto",
    on_row: Callable[[Row], object] = lambda row: None,
    **options: Any,
) -> Run:
    """Pretrain a backbone on images without labels, as `corinfomax pretrain` does: the same run, bit for bit.

    `data` is a folder, archive, list or named set, or images in memory (as for `Encoder.embed`), whose classes are
    `labels`; labels score the run at its end and never train it. `init` is weights to start from. The run goes into the
    folder `out`, by default a new one in ./runs; with `resume` a run in `out` is continued, or just opened when it is
    complete. `on_row` gets each row of metrics; an error in it ends the run after a checkpoint. Every flag of the
    command is an option with underscores: `epochs=50, optim_lr=0.3, holdout=0.1, evaluate=False`.

    Raises TypeError for an unknown option, ValueError (images: DataError) with the cure, FloatingPointError when
    training diverges, and KeyboardInterrupt after Ctrl-C, once a checkpoint is saved.
    """
    given = settings.read("pretrain", options, "recipe", "options", "images")
    source = None if data is None else as_source(data, labels)
    named = {"recipe": recipe, "init": None if init is None else str(init), "prefix": prefix}
    command = Pretrain(
        data=None if data is None or source is not None else as_name(data),
        out=None if out is None else Path(out).expanduser(),
        images=dataclasses.replace(given.images, device=device),
        options=given.options,
        settings=given.recipe,
        recipe=recipe,
        init=named["init"],
        prefix=prefix,
    )
    typed = given.typed | {name for name, value in named.items() if value is not None}
    if resume:
        if command.out is None:
            raise ValueError("resume=True continues the run in a folder: name it with out=…")
        if (rest := command.remaining(typed, source)) is None:
            return Run(command.out)
        command, typed = rest
    if processes.started() > 1 and command.out is None and command.resume is None:
        raise ValueError("several processes need one folder for the run: name it with out=…")
    with process.borrowed():
        code, folder = command.train(typed, source=source, on_row=on_row)
    if code == 130:
        raise KeyboardInterrupt(f"stopped; to continue: corinfomax.pretrain(…, out={str(folder)!r}, resume=True)")
    return Run(folder)


def evaluate(
    weights: Place | Run,
    data: Any,
    *,
    labels: Labels | None = None,
    against: Place | Sequence[Place] = (),
    fine_tune: bool = False,
    published_probe: bool = False,
    probe_epochs: int | None = None,
    probe_baselines: bool = False,
    device: str = "auto",
    **options: Any,
) -> Scores:
    """Score frozen features on labelled images, beside an untrained network, raw pixels and other weights.

    `weights` and `against` are as for `load`, `data` and `labels` as for `pretrain`. `fine_tune` adds fine-tuning on
    1 % and 10 % of the labels, `published_probe` the paper's augmented linear probe (hours without a GPU), for
    `probe_epochs` if given, and with `probe_baselines` on the baselines too. Options are those of `load` and of the
    images, such as `holdout=0.2`. ValueError without labels.
    """
    given = settings.read("evaluate", options, "network", "images")
    others = [against] if isinstance(against, str | os.PathLike) else against
    source = as_source(data, labels)
    command = Evaluate(
        weights=os.fspath(weights.path if isinstance(weights, Run) else weights),
        data="" if source is not None else as_name(data),
        against=tuple(map(str, others)),
        fine_tune=fine_tune,
        published_probe=published_probe,
        probe_epochs=probe_epochs,
        probe_baselines=probe_baselines,
        network=given.network,
        images=dataclasses.replace(given.images, device=device),
    )
    with process.borrowed():
        return Scores(*command.score(source))


def doctor(
    data: Any,
    *,
    labels: Labels | None = None,
    seconds: float = 5.0,
    device: str = "auto",
    **options: Any,
) -> Checkup:
    """Check every image before training, and forecast its time in `seconds` of trial; 0 skips that.

    `findings` are the problems, each with its images, `skip` the paths to leave out, and `ok` is False if something
    would stop training or falsify its scores. Writes no file.
    """
    given = settings.read("doctor", options, "images")
    source = as_source(data, labels)
    images = dataclasses.replace(given.images, device=device)
    command = Doctor(data="" if source is not None else as_name(data), seconds=seconds, images=images)
    with process.borrowed():
        return command.check(source)
