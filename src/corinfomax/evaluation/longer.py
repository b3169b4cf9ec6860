"""Predict the linear probe after twice the epochs, from 32 pairs of runs (docs/length.md)."""

from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.records import Results

ERRORS_LEFT = (0.74, 0.89, 0.96)  # of the errors before: a tenth of the pairs had fewer, half, nine tenths
LITTLE = 0.5  # points that are not worth the time
LEAST_STEPS = 150  # below, a run is too short to compare with those of the pairs
LEAST_TEST = 100  # test images


def remarks(results: Results, recipe: Recipe, steps: int) -> tuple[str, ...]:
    """A sentence on a run of twice the epochs; none where the scores of this one say too little."""
    score = results.table.get("pretrained", {}).get("linear")
    if score is None or steps < LEAST_STEPS or results.test < LEAST_TEST:
        return ()
    most, usual, least = (100 - share * (100 - score.mean) for share in ERRORS_LEFT)
    if usual - score.mean < LITTLE:
        return (f"Stop here: twice the epochs would add about {usual - score.mean:.1f} points to linear.",)
    epochs = f"Twice the epochs (--epochs {2 * recipe.epochs:g})"
    return (f"{epochs} would take linear from {score.mean:.1f} to about {usual:.1f} ({least:.1f} to {most:.1f}).",)
