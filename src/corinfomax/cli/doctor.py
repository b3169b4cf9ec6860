"""`corinfomax doctor`: problems in the images, and the forecast of training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from corinfomax.cli import messages
from corinfomax.cli.arguments import DATA, IMAGES, PATH, SKIP_LIST, DataOptions
from corinfomax.recipes import fields, published


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
        from corinfomax import network
        from corinfomax.cli import fit, inputs
        from corinfomax.doctor import findings, inspect
        from corinfomax.images.files import some
        from corinfomax.runtime import memory, run_folder
        from corinfomax.training import footprint, timing

        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"--seconds is {self.seconds:g}; it must be 0 or above")
        if self.out is not None:
            findings.check_overwrite(self.out, self.images.skip)
        run_folder.check_writable(self.out or Path(SKIP_LIST))
        device = inputs.choose_device(self.images.device, gigabytes=self.images.memory)
        data = inputs.find_data(self.data, self.images)
        splits, survey = data.splits(), data.survey()
        inputs.print_skipped(data, self.images.skip, {})

        # The forecast comes first: on a CPU the peak of memory is then that of training.
        name, recipe, reason = published.choose(self.data, survey.images, survey.short_side, cuda=device.type == "cuda")
        precision = network.choose_precision(recipe, device, training=True)
        recipe = fit.fit_batch(replace(recipe, precision=precision), survey.images)
        too_large = footprint.warning(recipe, device) if self.seconds else None
        if too_large is not None:
            print(too_large)
        try:
            timed = self.seconds and too_large is None
            speed = timing.speed(recipe, device, seconds=self.seconds) if timed else None
        except (MemoryError, RuntimeError) as error:
            if not messages.is_out_of_memory(error):
                raise
            print(f"recipe {name} does not fit into memory: pretrain with a smaller --batch or --micro-batch")
            speed = None
        memory.give_back()

        # Every image, once.
        order = sorted(splits, key=("train", "val", "test").index)
        inspections = [inspect.inspect_split(name, splits[name], recipe.cache_side) for name in order]
        all_findings = findings.collect_findings(inspections, recipe)
        all_findings += [findings.Finding("reading", note) for note in data.notes]
        skipped = data.skip.union(*(finding.skip for finding in all_findings))

        remarks = [f"{'to fix' if finding.must_fix else 'remark'}: {finding.text}" for finding in all_findings]
        print(*map(findings.overview, inspections), *(remarks or ["nothing is wrong with these images"]), sep="\n")
        print(f"recipe {reason}")
        remaining = len(set(inspections[0].paths) - skipped)
        if speed is not None and remaining > 1:
            print(timing.forecast(speed, replace(recipe, batch=min(recipe.batch, remaining)), remaining, device))
        print(f"the cached images take {sum(part.decoded_bytes for part in inspections) / 1e6:,.0f} MB of disk")
        if remaining < 2:
            print(f"no command to train: {some(remaining, 'training image')} would be left")
            return 1
        colours = findings.colour_statistics(inspections[0]) or {}
        self._print_next(findings.skip_list(all_findings, self.data, data.skip), len(skipped), colours)
        return int(any(finding.must_fix for finding in all_findings))

    def _print_next(self, lines: list[str] | None, skipped: int, colours: Mapping[str, list[float]]) -> None:
        """Write the list of images to skip, and print the command that trains without them."""
        from corinfomax.doctor import findings
        from corinfomax.images.files import some
        from corinfomax.runtime import run_folder

        words = ["pretrain", self.data, *fields.difference(replace(self.images, skip=None), DataOptions())]
        out = self.out or Path(SKIP_LIST)
        if lines is not None:
            text = "\n".join(lines) + "\n"
            if self.out is None and out != self.images.skip:
                out = findings.unused_path(out, text)
            run_folder.write_text(out, text)
            print(f"{out}: {some(skipped, 'image')} to skip, with reasons; images that may be skipped are comments")
        if skipped:
            words += ["--skip", str(out)]
        for name, values in colours.items():
            words += [f"--{name}", *(f"{value:.4f}" for value in values)]
        print(f"→ {messages.command(*words)}")
