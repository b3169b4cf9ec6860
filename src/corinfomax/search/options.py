"""The changes of a recipe's views that a search tries, each of one part of them."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from corinfomax.recipes.fields import Recipe, with_views

ANGLES = (45.0, 180.0)  # largest rotation, in degrees each way; 180 is any angle
CROPS = (0.08, 0.25, 0.5, 0.75)  # least share of the image's area in a crop


class Option(NamedTuple):
    """A change of both views; of one part at most one option is taken."""

    part: str
    name: str
    changes: Mapping[str, float | tuple[float, float]]


def options_for(recipe: Recipe, *, labelled: bool = True) -> list[Option]:
    """Every option that changes the views of the recipe.

    Without labels only crops and blur are compared: rotation and mirroring stay as in the recipe, where pretrain fits
    them to the images' symmetry, and no measure predicts whether colours matter (docs/views.md).
    """
    first, _ = recipe.views
    crops = [area for area in CROPS if abs(area - first.crop_area[0]) > 0.02]
    options = [Option("crops", f"crops from {100 * area:g} %", {"crop_area": (area, 1.0)}) for area in crops]
    if labelled:
        if first.rotate:
            options.append(Option("rotation", "upright", {"rotate": 0.0}))
        for angle in ANGLES:
            if angle != first.rotate and not recipe.from_files:
                name = "turned by any angle" if angle == ANGLES[-1] else f"turned by up to {angle:g} degrees"
                options.append(Option("rotation", name, {"rotate": angle}))
        flip = ("not mirrored", 0.0) if any(view.flip for view in recipe.views) else ("mirrored", 0.5)
        options.append(Option("mirror", flip[0], {"flip": flip[1]}))
        changed = any(view.jitter or view.grey for view in recipe.views)
        name, jitter, grey = ("colours kept", 0.0, 0.0) if changed else ("colours changed", 0.8, 0.2)
        options.append(Option("colours", name, {"jitter": jitter, "grey": grey}))
    blur = ("not blurred", 0.0) if any(view.blur for view in recipe.views) else ("blurred", 0.5)
    options.append(Option("blur", blur[0], {"blur": blur[1]}))
    return options


def with_options(recipe: Recipe, options: Iterable[Option]) -> Recipe:
    """The recipe with these changes in both of its views."""
    for option in options:
        recipe = with_views(recipe, **option.changes)
    return recipe
