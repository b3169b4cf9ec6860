"""Where the time of a training step goes, and what to change."""

from __future__ import annotations

import math
from dataclasses import replace

from corinfomax import network
from corinfomax.cli import inputs
from corinfomax.cli.options import Bench, parse
from corinfomax.images import sources
from corinfomax.recipes import fields, published
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder
from corinfomax.training import bottleneck, timing


def run(command: Bench, argv: list[str]) -> int:
    """Time a training step, say what bounds it and what to change."""
    if not 0 < command.seconds < math.inf:
        raise ValueError(f"--seconds is {command.seconds:g}; how long to measure is above 0")
    device = inputs.device_of(command.where.device)
    data, where, recipe, decode = command.data, command.where, command.knobs, None
    if command.recipe is None:
        if data is None:
            name = "cifar10" if device.type == "cuda" else "cpu-small"
            base, why = RECIPES[name].recipe, f"{name}: {RECIPES[name].about}"
        else:
            survey = sources.survey(
                data, root=where.root, download=where.download, skip=inputs.left_out(where), cache=where.cache
            )
            _, base, why = published.choose(data, survey.images, survey.short_side, cuda=device.type == "cuda")
        again = parse(argv, base)
        assert isinstance(again, Bench)
        recipe = again.knobs
        print(inputs.chosen(why, base, recipe))
    fields.check_objective(recipe)
    if recipe.from_files:
        raise ValueError("bench measures steps fed by copies: leave out --from-files; pretrain says how long it waits")
    if data is None:
        pictures = timing.made_up(recipe)
    else:
        pictures = inputs.load(data, where, recipe).train
        decode = timing.decoding(
            sources.find(data, root=where.root, skip=inputs.left_out(where), cache=where.cache)["train"],
            recipe.cache_side,
        )
        recipe = inputs.fit_batch(recipe, len(pictures))
    recipe = replace(recipe, precision=network.precision(recipe, device))
    setting = timing.describe(recipe, pictures, device, decode=decode)
    print(
        f"{recipe.backbone.name} at {recipe.size} px, batch {recipe.batch}, {setting.precision}, on {setting.device}, "
        f"{setting.threads} threads of {setting.cores} cores, torch {inputs.versions()['torch']}\n"
    )
    timings = timing.measure(recipe, pictures, device, seconds=command.seconds)
    print(bottleneck.as_text(timings, setting))
    if command.out is not None:
        run_folder.write_json(command.out, {**bottleneck.as_json(timings, setting), "recipe": fields.to_json(recipe)})
    return 0
