"""A recipe chosen and fitted to what it meets: typed settings, the network, the images, the device."""

import shlex
from collections.abc import Collection
from dataclasses import replace

import timm
import torch

from corinfomax import network
from corinfomax.checkup.symmetry import TURN, Symmetry, adjustable, symmetry
from corinfomax.cli import inputs
from corinfomax.images.cache import Images
from corinfomax.images.levels import SetLevels
from corinfomax.images.sources import Data, Survey
from corinfomax.recipes import fields, published
from corinfomax.recipes.fields import RGB, Backbone, Recipe
from corinfomax.runtime import processes
from corinfomax.runtime.records import Start, WeightsOptions
from corinfomax.weights.load import LoadedBackbone, RecordedError, load_backbone


def choose_recipe(
    name: str | None, data: Data, typed: Recipe, flags: Collection[str], device: torch.device
) -> tuple[str, Recipe]:
    """Name and recipe with the typed settings: the named one, or one for images and device, printed."""
    cuda, reason = device.type == "cuda", None
    if name is not None:
        base = published.find_recipe(name)  # its errors come before every image is looked at
    survey = survey_in_turn(data)
    if name is None:
        name, base, reason = published.choose(data.title, survey.images, survey.short_side, cuda=cuda)

    shaped = base = with_levels(base, survey.levels)
    if "backbone.name" in flags and typed.backbone.name != base.backbone.name:
        shaped = _other_network(base, typed.backbone.name)
    recipe = fields.override(shaped, typed, flags & fields.flags(base).keys())
    if reason is not None:
        changes = fields.difference(recipe, base)
        print(f"recipe {reason}{f', with {shlex.join(changes)}' if changes else ''}; --recipe names another")
    return name, recipe


def survey_in_turn(data: Data) -> Survey:
    """The survey of the images: one process of each machine looks at them, the others read what it kept."""
    with processes.first_of_machine():
        return data.survey()


def load_init(name: str, prefix: str | None, typed: Recipe, flags: Collection[str]) -> LoadedBackbone:
    """The weights of --init, printed; typed settings tell what weights of others do not record."""
    # what was typed of the network and its input
    names = {"backbone.name": "architecture", "backbone.small-stem": "small_stem"}
    names |= {flag: flag for flag in ("size", "mean", "std", "interpolation")}
    values = fields.flags(typed)
    options = WeightsOptions(prefix=prefix, **{names[flag]: values[flag] for flag in flags & names.keys()})

    # The weights keep their own size, and --size is that of the run; but a ViT is resized once, as it is loaded.
    if options.architecture is not None:
        network.check_name(options.architecture)
    own = replace(options, size=None)
    fixed = options.architecture is not None and not network.is_resizable(Backbone(name=options.architecture))
    loaded = _load(name, own if fixed else options)
    if options.size is not None and not network.is_resizable(loaded.recipe.backbone):
        loaded = _load(name, own)

    # training builds the network anew
    print(f"starting from {loaded.summary}")
    if not network.is_described(loaded.backbone, loaded.recipe):
        changed = f"{name} is a changed {loaded.recipe.backbone.name} (model_args in its config.json)"
        raise ValueError(f"{changed}: only timm's own form of it can be continued")
    return loaded._replace(assumed_input=loaded.assumed_input or "mean" in flags or "std" in flags)


def _load(name: str, options: WeightsOptions) -> LoadedBackbone:
    """The weights; those that record their network and input leave the settings to the run."""
    try:
        return load_backbone(name, options)
    except RecordedError:
        if options.prefix is not None:
            raise
        return load_backbone(name)
    except ValueError as error:
        message = str(error).replace("--architecture", "--backbone.name").replace("--small", "--backbone.small")
        raise ValueError(message) from error


def adapt_recipe(
    name: str | None, start: LoadedBackbone, data: Data, typed: Recipe, flags: Collection[str], device: torch.device
) -> tuple[str, Recipe]:
    """Name and recipe of a run that continues from weights: their network and input; the rest as named, or `adapt`."""
    # the recipe
    survey, weights = survey_in_turn(data), start.recipe
    levels = survey.levels
    adapts = weights.pixels == RGB and levels.pixels.channels != 1 and not levels.pixels.is_rgb
    if not adapts:
        weights = inputs.fit_pixels(weights, data)
    if name is None:
        vit, cuda = network.has_fixed_size(weights.backbone), device.type == "cuda"
        one_size = vit and not network.is_resizable(weights.backbone)
        size = typed.size if "size" in flags else weights.size
        name, base = published.adapt(vit, size, survey.images, survey.short_side, cuda=cuda, one_size=one_size)
    else:
        base = published.find_recipe(name)

    # the network and its input, then what was typed
    shaped = replace(base, test_scale=1.0, backbone=weights.backbone, mean=weights.mean, std=weights.std)
    shaped = replace(shaped, interpolation=weights.interpolation, pixels=weights.pixels)
    if adapts:
        shaped = with_levels(shaped, levels)
        if shaped.pixels.is_bytes and shaped.pixels.colours:  # colours as the weights know them
            mean, std = weights.mean + shaped.mean[3:], weights.std + shaped.std[3:]
            shaped = replace(shaped, mean=mean, std=std)
    recipe = fields.override(shaped, typed, flags & fields.flags(base).keys())
    if network.has_fixed_size(weights.backbone) and recipe.size != weights.size:
        if not network.is_resizable(weights.backbone):
            raise ValueError(f"{weights.backbone.name} takes images of {weights.size} px alone: --size {weights.size}")
        print(f"position embeddings resized from {weights.size} to {recipe.size} px")
    if replace(recipe.backbone, drop_path=0.0) != replace(weights.backbone, drop_path=0.0):
        words = " ".join(sorted(f"--{flag}" for flag in flags if flag.startswith("backbone.")))
        raise ValueError(f"the weights fix the network ({weights.backbone.name}): leave out {words}")

    # the warm-up keeps its share of a run of another length
    if "optim.warmup-epochs" not in flags and "epochs" in flags:
        warmup = shaped.optim.warmup_epochs * recipe.epochs / shaped.epochs
        recipe = replace(recipe, optim=replace(recipe.optim, warmup_epochs=warmup))
    images = f"{survey.images:,} images of {survey.short_side} px"
    print(f"recipe {name} at {recipe.size} px, {recipe.epochs:g} epochs, for {images}; --recipe names another")
    return name, recipe


def with_levels(recipe: Recipe, levels: SetLevels) -> Recipe:
    """The recipe for images of these levels, with the statistics of their channels."""
    if levels.mean is None or levels.std is None:
        return recipe
    return replace(recipe, pixels=levels.pixels, mean=levels.mean, std=levels.std)


def adapt_channels(start: LoadedBackbone, recipe: Recipe) -> LoadedBackbone:
    """The starting weights with a first convolution for the recipe's channels, as timm adapts it; printed."""
    if start.recipe.pixels.channels == recipe.pixels.channels:
        return start
    own = replace(start.recipe, pixels=recipe.pixels, mean=recipe.mean, std=recipe.std)
    print(f"first convolution adapted from {start.recipe.pixels.channels} to {own.pixels.channels} channels")
    return start._replace(backbone=network.with_channels(start.backbone, own), recipe=own)


def start_record(start: LoadedBackbone, name: str, prefix: str | None, recipe: Recipe, flags: Collection[str]) -> Start:
    """The record of the weights of --init, with the typed words that load them again."""
    words = {"backbone.name": ["--backbone.name", recipe.backbone.name], "prefix": ["--prefix", prefix or ""]}
    words["backbone.small-stem"] = ["--backbone.small-stem"] if recipe.backbone.small_stem else []
    return start.start(name, *(word for flag in words if flag in flags for word in words[flag]))


def fit_batch(recipe: Recipe, count: int) -> Recipe:
    """The recipe with a batch of at most all images."""
    if count >= recipe.batch:
        return recipe
    if count < 2:
        raise ValueError(f"{count} image is not enough to train on: a batch needs at least 2")
    print(f"batch {recipe.batch} is more than the {count} images: using batch {count}")
    return replace(recipe, batch=count)


def fit_symmetry(recipe: Recipe, images: Images, parts: Collection[str]) -> Recipe:
    """The recipe with views that mirror and turn only what looks the same mirrored and turned; printed.

    `parts` of the views may be changed: "flip" and "rotate".
    """
    parts = adjustable(recipe).intersection(parts)
    if not parts:
        return recipe
    found = symmetry(images, recipe) if processes.rank() == 0 else None
    found = Symmetry(*processes.largest(*(found or (0.0, 0.0, 0.0))))  # the first process's, for all
    if not found.judged:
        return recipe
    if "flip" in parts and not found.mirrors:
        print(f"{found.mirror_seen}: views are not mirrored; --views.0.flip 0.5 --views.1.flip 0.5 mirrors them")
        recipe = fields.with_views(recipe, flip=0.0)
    if "rotate" in parts and found.turns:
        undo = "--views.0.rotate 0 --views.1.rotate 0 keeps them upright"
        print(f"{found.turn_seen}: views turn by up to {TURN:g} degrees; {undo}")
        recipe = fields.with_views(recipe, rotate=TURN)
    return recipe


def fit_cache(recipe: Recipe, data: Data) -> Recipe:
    """The recipe with cached images large enough for its views, as far as the files are."""
    largest = recipe.test_side if recipe.from_files else max(recipe.size, recipe.test_side)
    side = min(data.survey().short_side, largest * 8 // 7) if largest > recipe.cache_side else 0
    if side <= recipe.cache_side:
        return recipe
    print(f"views of {largest} px need cached images above {recipe.cache_side} px: using --cache-side {side}")
    return replace(recipe, cache_side=side)


def _other_network(base: Recipe, name: str) -> Recipe:
    """`base` with another network in timm's own shape; a ResNet keeps the stem, which belongs to the images' size."""
    network.check_name(name)
    backbone = Backbone(name=name)
    if name.partition(".")[0] in timm.list_models(module="resnet"):
        backbone = replace(base.backbone, name=name, layers=None, channels=None)
    one_size = network.has_fixed_size(backbone)
    return replace(base, backbone=backbone, test_scale=1.0 if one_size else base.test_scale)


def fit_views(recipe: Recipe, flags: Collection[str]) -> Recipe:
    """The recipe with views that its network can take; prints the network's size.

    Raises ValueError, with the side that would do, for a typed --size or --test-scale that cannot be met.
    """
    name = recipe.backbone.name
    if network.has_fixed_size(recipe.backbone) and recipe.test_side != recipe.size:
        raise ValueError(f"{name} takes images of one size: --test-scale must be 1, not {recipe.test_scale:g}")
    size = network.measure(recipe.backbone, recipe.size)
    if size is None:
        side = network.smallest_side(recipe.backbone, recipe.size)
        if "size" in flags:
            raise ValueError(f"{name} cannot take views of {recipe.size} px: try --size {side}")
        print(f"{name} cannot take views of {recipe.size} px: using --size {side}")
        recipe = replace(recipe, size=side)
        size = network.measure(recipe.backbone, side)
        assert size is not None
    if network.measure(recipe.backbone, recipe.test_side) is None:
        raise ValueError(f"{name} cannot take test views of {recipe.test_side} px: --test-scale 1")

    stem = " with a small stem" if recipe.backbone.small_stem else ""
    print(f"network {name}{stem}: {size.weights / 1e6:.1f} million weights, {size.features:,} features")
    return recipe
