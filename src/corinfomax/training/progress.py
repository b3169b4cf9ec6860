"""Progress of a run on the terminal."""

import time
from collections.abc import Sequence

from corinfomax.diagnosis import verdict
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import bars, processes
from corinfomax.runtime.records import Kind, Row

LINE_SECONDS = 20  # between lines without a terminal


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then. Only the first process prints."""

    def __init__(self, recipe: Recipe, first: int, steps: int, rows: Sequence[Row]) -> None:
        self.recipe, self.first, self.steps = recipe, first, steps
        self.kind: Kind | None = None
        self._seconds_before = max((row.seconds for row in rows), default=0.0)
        self._started = self._printed = time.monotonic()
        self._bar = bars.tqdm(
            initial=first * recipe.batch,
            total=steps * recipe.batch,
            unit="img",
            unit_scale=True,
            desc="pretraining",
            disable=not bars.shown() or processes.rank() > 0,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds; earlier parts of a resumed run included."""
        return self._seconds_before + time.monotonic() - self._started

    def show(self, rows: Sequence[Row], waited: float) -> None:
        """Show the last row; `waited` is the time in seconds that steps waited for images."""
        self._announce_verdict(rows)
        row, text = rows[-1], self._text(rows[-1], waited)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(row.step * self.recipe.batch - self._bar.n)

        # without a terminal: a line every LINE_SECONDS, at every score and at the end
        now = time.monotonic()
        due = now - self._printed > LINE_SECONDS or row.knn is not None or row.step == self.steps
        if due and self._bar.disable and processes.rank() == 0:
            self._printed = now
            speed = (row.step - self.first) / (now - self._started)  # in steps
            minutes_left = (self.steps - row.step) / speed / 60
            images = f"{speed * self.recipe.batch:.0f} images/s"
            print(f"step {row.step}/{self.steps} · {images} · {minutes_left:.1f} min left · {text}", file=bars.lines())

    def _text(self, row: Row, waited: float) -> str:
        """Loss, gap, score, verdict, and the share of time spent waiting for images from 1 % on."""
        phrases = [f"loss {row.loss:.3f}", f"attraction {row.attraction:.5f}"]
        if row.gap is not None:
            phrases.append(f"{row.gap:.3f} above 2·ln D")
        if row.knn is not None:
            phrases.append(f"kNN {row.knn:.1f} %")
        if self.kind is not None:
            phrases.append(self.kind)
        if (share := waited / (time.monotonic() - self._started)) >= 0.01:
            phrases.append(f"{100 * share:.0f} % of the time waiting for images")
        return " · ".join(phrases)

    def _announce_verdict(self, rows: Sequence[Row]) -> None:
        """Print the verdict when its kind has changed; the verdict on the whole run is the command's to print."""
        if processes.rank() > 0:
            return
        judged = verdict.judge(rows, self.recipe, steps=self.steps)
        if judged is not None and judged.kind != self.kind and rows[-1].step < self.steps:
            self._bar.write(f"step {rows[-1].step}: {judged.text}", file=bars.lines())
            self.kind = judged.kind
