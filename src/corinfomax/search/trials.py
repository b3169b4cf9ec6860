"""The short runs of a search: each trained, scored and recorded, so that a stopped search goes on."""

import contextlib
import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from corinfomax import network
from corinfomax.images.cache import Images, Splits
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import bars, run_folder
from corinfomax.runtime.records import Options, Row, Trial
from corinfomax.search import scores, search
from corinfomax.search.options import Option, with_options
from corinfomax.training import loop, timing
from corinfomax.weights.load import LoadedBackbone

TIMED = 3.0  # seconds of training on made-up images, for the length of the runs
SHARE = 0.8  # of the time for training in the first round's plan; the rest is for scores
RECORD = "search.json"


class Trials:
    """Runs trials in a folder; a context, for its progress bar."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        images: Images,
        options: Sequence[Option],
        start: LoadedBackbone | None,
        *,
        weights: str | None,
        minutes: float,
        device: torch.device,
    ) -> None:
        """`weights` is the digest of `start`. ValueError if the folder holds another search."""
        self.out, self.recipe, self.images, self.options, self.device = out, recipe, images, options, device
        self.start = None if start is None else network.start_tensors(network.resized(start.backbone, recipe))
        self.labelled = scores.has_labels(images)
        same = {"recipe": fields.to_json(recipe), "images": images.fingerprint, "weights": weights, "minutes": minutes}
        same = json.loads(json.dumps(same))  # tuples are lists there
        record = run_folder.read_object(out / RECORD)
        if record and any(record.get(name) != value for name, value in same.items()):
            raise ValueError(f"{out} holds a search on other images or with other settings: choose another --out")
        if not record:
            record = {**same, "epochs": self._first_epochs(60 * minutes), "trials": []}
            run_folder.write_json(out / RECORD, record)
        self.epochs: float = record["epochs"]
        self.done = [Trial(**trial | {"options": tuple(trial["options"])}) for trial in record["trials"]]
        self._record = record
        self._bar = bars.tqdm(
            total=round(60 * minutes), unit="s", desc="searching", disable=not bars.shown(), dynamic_ncols=True
        )

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    @property
    def measure(self) -> str:
        """The kind of score, in words."""
        count = min(len(self.images), scores.SCORED if self.labelled else scores.FOUND_AMONG)
        if self.labelled:
            return f"ridge probe on {count:,} training images, cross-validated, top-1 in %"
        return f"without labels, how soon an image's other view is found among {count:,} images: mean −ln of its place"

    @property
    def about(self) -> str:
        """A line about the search before it begins."""
        runs = 1 + len(self.options) + search.TOGETHER + search.AGAIN + 2
        return f"{runs} runs, the first of {self.epochs:.2g} epochs each; compared by: {self.measure}"

    def run(self, number: int, names: search.Names, epochs: float) -> Trial:
        """The trial with these options in this round; its seed is the round's number."""
        for trial in self.done:
            if (trial.round, trial.options) == (number, names):
                self._bar.update(trial.seconds)
                return trial
        began = time.monotonic()
        chosen = [option for option in self.options if option.name in names]
        recipe = with_options(self.recipe, chosen)
        warmup = recipe.optim.warmup_epochs * epochs / recipe.epochs
        optim = replace(recipe.optim, warmup_epochs=max(warmup, min(1.0, epochs / 10)))
        recipe = replace(recipe, epochs=epochs, seed=self.recipe.seed + number, optim=optim)
        training, (score, error) = self._train_and_score(recipe)
        trial = Trial(number, names, epochs, score, error, training, time.monotonic() - began)
        self.done.append(trial)
        self._record["trials"] = [trial._asdict() for trial in self.done]
        run_folder.write_json(self.out / RECORD, self._record)
        self._bar.write(f"round {number + 1}: {score:6.2f}  {' + '.join(names) or 'as in the recipe'}")
        return trial

    def _train_and_score(self, recipe: Recipe) -> tuple[float, tuple[float, float]]:
        """Seconds of training, score and its standard error; a run that diverges gets the worst score."""
        folder, seconds = self.out / "trial", [0.0]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        steps = recipe.steps(len(self.images))

        def show(row: Row) -> None:
            self._bar.update(row.seconds - seconds[-1])
            seconds.append(row.seconds)

        options = Options(log_steps=max(1, steps // 50), checkpoint_minutes=1e6, keep=1, scores=0, diagnoses=0)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                trained = loop.pretrain(
                    recipe,
                    Splits(self.images, None),
                    folder,
                    device=self.device,
                    options=options,
                    on_row=show,
                    start=self.start,
                )
            if self.labelled:
                return seconds[-1], scores.by_labels(trained.backbone, self.images, recipe, device=self.device)
            return seconds[-1], scores.without_labels(trained.backbone, self.images, recipe, device=self.device)
        except loop.Interrupted:
            raise KeyboardInterrupt from None
        except FloatingPointError:
            return seconds[-1], (scores.worst(self.images), 0.0)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _first_epochs(self, seconds: float) -> float:
        """Epochs of each run in the first round, by the time of a step on this machine."""
        step = timing.speed(self.recipe, self.device, seconds=TIMED).step
        steps = SHARE * seconds / search.runs_at_once(self.options) / step
        per_epoch = len(self.images) // self.recipe.batch
        return float(f"{max(steps, 1) / per_epoch:.3g}")
