"""What is wrong with the images, what training would take, and the list of what to leave out."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path

from corinfomax import network
from corinfomax.cli import errors, inputs
from corinfomax.cli.options import Doctor
from corinfomax.doctor import findings, inspect
from corinfomax.images import sources
from corinfomax.recipes import published
from corinfomax.runtime import run_folder, shell
from corinfomax.training import timing


def run(command: Doctor) -> int:
    """Look at the images, say what is wrong with them and what training would take, and write the list to leave out."""
    if not 0 <= command.seconds < math.inf:
        raise ValueError(f"--seconds is {command.seconds:g}; how long to time steps is 0 or above")
    where, skip = command.where, inputs.left_out(command.where)
    if command.out is not None:
        findings.check_out(command.out, where.skip)
    device = inputs.device_of(where.device)
    splits = sources.find(command.data, root=where.root, download=where.download, skip=skip, cache=where.cache)
    order = sorted(splits, key=("train", "val", "test").index)
    inputs.tell_left_out(command.data, where)
    survey = sources.survey(command.data, root=where.root, skip=skip, cache=where.cache)
    chosen, recipe, why = published.choose(command.data, survey.images, survey.short_side, cuda=device.type == "cuda")
    recipe = replace(recipe, precision=network.precision(recipe, device))
    # Timed first: on a CPU the peak of memory is then that of training, before the images are looked at.
    recipe = inputs.fit_batch(recipe, survey.images)
    pace = None
    if command.seconds:
        try:
            pace = timing.pace(recipe, device, seconds=command.seconds)
        except (MemoryError, RuntimeError) as error:
            if not errors.out_of_memory(error):
                raise
            print(f"recipe {chosen} needs more memory than there is: pretrain with a smaller --batch or --micro-batch")
    parts = [inspect.examine(name, splits[name], recipe.cache_side) for name in order]
    found = findings.findings(parts, recipe)
    lines = findings.skip_list(found, command.data, skip)
    gone = skip.union(*(finding.skip for finding in found))

    print(*map(findings.overview, parts), sep="\n")
    for finding in found:
        print(f"{'to mend' if finding.grave else 'remark'}: {finding.text}")
    if not found:
        print("nothing is wrong with these images")
    print(f"recipe {why}")
    if pace is not None:
        print(timing.foreseen(pace, recipe, len(set(parts[0].paths) - gone), device))
    print(f"the decoded copies take {sum(part.cached for part in parts) / 1e6:,.0f} MB of disk")
    words = [shell.command("pretrain", command.data), *inputs.typed_where(where)]
    out = command.out or Path(inputs.SKIPPED)
    if lines is not None:
        text = "\n".join(lines) + "\n"
        if command.out is None and out != where.skip:
            out = findings.place(out, text)
        run_folder.write_text(out, text)
        print(f"{out}: {len(gone):,} images to leave out, and why; others that may be left out are comments in it")
    if gone:
        words.append(f"--skip {shlex.quote(str(out))}")
    if (colours := findings.channels(parts[0])) is not None:
        words += [f"--{name} " + " ".join(f"{value:.4f}" for value in each) for name, each in colours._asdict().items()]
    print("→ " + " ".join(words))
    return int(any(finding.grave for finding in found))
