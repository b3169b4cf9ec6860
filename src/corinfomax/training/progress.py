"""Where a run is, on the terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from corinfomax.diagnosis import verdict
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes
from corinfomax.training import batches


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, recipe: Recipe, first: int, steps: int, rows: list[dict[str, Any]]) -> None:
        self.recipe, self.first, self.steps, self.batch = recipe, first, steps, recipe.batch
        self.rows = rows
        self.before = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        self.kind: verdict.Kind | None = None
        self.started = self.told = time.monotonic()
        self.bar = tqdm(
            initial=first * self.batch,
            total=steps * self.batch,
            unit="img",
            unit_scale=True,
            desc="pretraining",
            disable=not sys.stderr.isatty() or processes.rank() > 0,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def best(self) -> int | None:
        """After how many steps the look was that is best so far."""
        return verdict.best_step(self.rows, (row["step"] for row in self.rows))

    @property
    def seconds(self) -> float:
        """Time spent on training, that before a resume with it."""
        return self.before + time.monotonic() - self.started

    def show(self, row: dict[str, Any], waited: float) -> None:
        """Tell where the run is: speed, time left, the loss, how far the spread is from its bound; and what share of
        the time it `waited`, in seconds, for images, where that is worth a word."""
        text = f"loss {row['loss']:.3f} · attraction {row['attraction']:.5f}"
        if "gap" in row:
            text += f" · {row['gap']:.3f} above 2·ln D"
        if "knn" in row:
            text += f" · kNN {row['knn']:.1f} %"
        self.rows.append(row)
        self.judge()
        if self.kind is not None:
            text += f" · {self.kind}"
        if (share := waited / (time.monotonic() - self.started)) >= 0.01:
            text += f" · {share:.0%} of the time waiting for images"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(row["step"] * self.batch - self.bar.n)
        now = time.monotonic()
        due = now - self.told > 20 or "knn" in row or row["step"] == self.steps
        if due and self.bar.disable and processes.rank() == 0:
            self.told = now
            speed = (row["step"] - self.first) / (now - self.started)
            before, done, whole = (
                batches.work(self.recipe, step, self.steps) for step in (self.first, row["step"], self.steps)
            )
            left = (whole - done) / (done - before) * (now - self.started)
            print(
                f"step {row['step']}/{self.steps} · {speed * self.batch:.0f} images/s · "
                f"{left / 60:.1f} min left · {text}",
                file=sys.stderr,
            )

    def judge(self) -> None:
        """Say what the run looks like when that has changed; after the last step the command says it."""
        if processes.rank() > 0:
            return
        found = verdict.judge(self.rows, self.recipe, steps=self.steps)
        if found is not None and found.kind != self.kind and self.rows[-1]["step"] < self.steps:
            self.bar.write(f"step {self.rows[-1]['step']}: {found.text}", file=sys.stderr)
            self.kind = found.kind
