"""`corinfomax bench`: the time of a training step on this machine, part by part."""

import math
from dataclasses import dataclass, replace

from corinfomax.cli.arguments import IMAGES, OPTIONAL_DATA, PATH, SETTINGS, DataOptions
from corinfomax.recipes import fields
from corinfomax.recipes.published import RECIPES


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a training step on this machine, part by part.

    Uses synthetic images of the recipe's size without DATA. Takes the settings that pretrain takes.
    """

    data: OPTIONAL_DATA = None
    recipe: str | None = None
    """A named recipe; `corinfomax recipes` lists them."""
    seconds: float = 30.0
    """Time to measure; at least five rounds."""
    out: PATH = None
    """Write the timings to this JSON file."""
    images: IMAGES = DataOptions()
    settings: SETTINGS = RECIPES["cpu-small"].recipe

    def run(self, typed: frozenset[str]) -> int:
        import torch

        from corinfomax import network
        from corinfomax.cli import fit, inputs
        from corinfomax.runtime import run_folder
        from corinfomax.training import timing

        if not 0 < self.seconds < math.inf:
            raise ValueError(f"--seconds is {self.seconds:g}; it must be above 0")
        if self.out is not None:
            run_folder.check_writable(self.out)
        device = inputs.choose_device(self.images.device, gigabytes=self.images.memory)
        data = None if self.data is None else inputs.find_data(self.data, self.images)
        _, recipe = fit.choose_recipe(self.recipe, data, self.settings, typed, device)
        recipe = fit.fit_views(recipe, typed)
        if recipe.from_files:
            raise ValueError("bench times steps that read cached images: leave out --from-files")

        # the images, and what decoding them costs
        decode = None
        if data is None:
            images = timing.made_up(recipe)
        else:
            images = inputs.load_splits(data, recipe, self.images).train
            decode = timing.decoding(data.splits()["train"], recipe.cache_side)
            recipe = fit.fit_batch(recipe, len(images))

        # the timings
        recipe = replace(recipe, precision=network.choose_precision(recipe, device, training=True))
        setting = timing.describe(recipe, device, decode=decode)
        about = f"{recipe.backbone.name} at {recipe.size} px, batch {recipe.batch}, {recipe.precision}"
        threads = f"{setting.threads} threads on {setting.cores} cores"
        print(f"{about}, on {setting.device}, {threads}, torch {torch.__version__}\n")
        timings = timing.measure(recipe, images, device, seconds=self.seconds)
        print(timing.as_text(timings, setting))
        if self.out is not None:
            content = {"setting": setting._asdict(), "timings": timings._asdict(), "recipe": fields.to_json(recipe)}
            run_folder.write_json(self.out, {**content, "advice": timing.advice(timings, setting)})
        return 0
