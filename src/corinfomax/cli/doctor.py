"""`corinfomax doctor`: problems in the images, and the forecast of training."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from corinfomax.cli import messages
from corinfomax.cli.arguments import DATA, IMAGES, PATH, SKIP_LIST, DataOptions
from corinfomax.recipes import fields, published

if TYPE_CHECKING:
    from corinfomax.checkup.result import Checkup
    from corinfomax.images.files import Source


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check every image before training, and forecast its time.

    Prints unreadable files, duplicates, leaks between splits, odd images, and writes a list to leave out with --skip.
    The exit code is 1 if a finding would stop training or falsify its scores: unreadable images, training images that
    are also in val or test, classes that only those have, levels lost in decoding. Other findings are remarks.
    """

    data: DATA
    out: PATH = None
    """The list to write; default skip.txt here, if there is anything to skip."""
    seconds: float = 5.0
    """Time for the forecast; 0 skips it."""
    images: IMAGES = DataOptions()

    def run(self, typed: frozenset[str]) -> int:
        from corinfomax.checkup import findings
        from corinfomax.runtime import run_folder

        if self.out is not None:
            findings.check_overwrite(self.out, self.images.skip)
        run_folder.check_writable(self.out or Path(SKIP_LIST))
        checkup = self.check()
        print(checkup)
        if checkup.remaining < 2:
            return 1
        self._print_next(checkup)
        return int(not checkup.ok)

    def check(self, source: "Source | None" = None) -> "Checkup":
        """Inspect every image and time the recipe. `source` is images in memory instead of DATA."""
        from corinfomax import network
        from corinfomax.checkup import findings, inspect
        from corinfomax.checkup.result import Checkup
        from corinfomax.cli import fit, inputs
        from corinfomax.runtime import memory
        from corinfomax.training import footprint, timing

        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"--seconds is {self.seconds:g}; it must be 0 or above")
        device = inputs.choose_device(self.images.device, gigabytes=self.images.memory)
        data = inputs.find_data(source or self.data, self.images)
        splits, survey = data.splits(), data.survey()
        inputs.print_skipped(data, self.images.skip, {})

        # The forecast comes first: on a CPU the peak of memory is then that of training.
        cuda = device.type == "cuda"
        name, recipe, reason = published.choose(data.title, survey.images, survey.short_side, cuda=cuda)
        recipe = fit.with_levels(recipe, survey.levels)
        precision = network.choose_precision(recipe, device, training=True)
        recipe = fit.fit_batch(replace(recipe, precision=precision), survey.images)
        forecast, speed = footprint.warning(recipe, device) if self.seconds else None, None
        try:
            if self.seconds and forecast is None:
                speed = timing.speed(recipe, device, seconds=self.seconds)
        except (MemoryError, RuntimeError) as error:
            if not messages.is_out_of_memory(error):
                raise
            forecast = f"recipe {name} does not fit into memory: pretrain with a smaller --batch or --micro-batch"
        memory.give_back()

        # Every image, once.
        order = sorted(splits, key=("train", "val", "test").index)
        inspections = [inspect.inspect_split(name, splits[name], recipe.cache_side, recipe.pixels) for name in order]
        all_findings = findings.collect_findings(inspections, recipe)
        all_findings += [findings.Finding("reading", note) for note in data.notes]
        all_findings += [findings.Finding("levels", note) for note in survey.levels.notes]
        skipped = data.skip.union(*(finding.skip for finding in all_findings))
        remaining = len(set(inspections[0].paths) - skipped)
        if speed is not None and remaining > 1:
            forecast = timing.forecast(speed, replace(recipe, batch=min(recipe.batch, remaining)), remaining, device)
        return Checkup(
            splits=tuple(map(findings.overview, inspections)),
            findings=tuple(all_findings),
            recipe=reason,
            forecast=forecast or "",
            cache_bytes=sum(part.decoded_bytes for part in inspections),
            skip=skipped,
            skip_lines=tuple(findings.skip_list(all_findings, data.title, data.skip) or ()),
            remaining=remaining,
            colours=findings.colour_statistics(inspections[0]) or {},
        )

    def _print_next(self, checkup: "Checkup") -> None:
        """Write the list of images to skip, and print the command that trains without them."""
        from corinfomax.checkup import findings
        from corinfomax.images.files import some
        from corinfomax.runtime import run_folder

        words = ["pretrain", self.data, *fields.difference(replace(self.images, skip=None), DataOptions())]
        out = self.out or Path(SKIP_LIST)
        if checkup.skip_lines:
            text = "\n".join(checkup.skip_lines) + "\n"
            if self.out is None and out != self.images.skip:
                out = findings.unused_path(out, text)
            run_folder.write_text(out, text)
            count = some(len(checkup.skip), "image")
            print(f"{out}: {count} to skip, with reasons; images that may be skipped are comments")
        if checkup.skip:
            words += ["--skip", str(out)]
        for name, values in checkup.colours.items():
            words += [f"--{name}", *(f"{value:.4f}" for value in values)]
        print(f"→ {messages.command(*words)}")
