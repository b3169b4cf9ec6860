"""The model card: what a backbone was trained on and how, what it scored, and how to use it."""

from __future__ import annotations

import json
from typing import Any

from corinfomax.recipes import fields
from corinfomax.weights.checkpoint import Checkpoint

FRONT = """---
library_name: timm
tags:
- image-feature-extraction
- self-supervised
- timm
---
"""


METHODS = {
    "corinfomax": "CorInfoMax (arXiv 2209.07999)",
    "kernel": "CorInfoMax's log det with an exponential kernel",
    "ldmi": "log-determinant mutual information (arXiv 2209.07999)",
    "vicreg": "VICReg (arXiv 2105.04906)",
    "barlow-twins": "Barlow Twins (arXiv 2103.03230)",
    "simclr": "SimCLR (arXiv 2002.05709)",
    "sigreg": "SIGReg, LeJEPA (arXiv 2511.08544)",
}


def markdown(saved: Checkpoint, results: dict[str, Any], *, plain: bool) -> str:
    """The card of a checkpoint as README.md, with what results.json knows; `plain` is what timm alone can load."""
    recipe, facts = saved.recipe, saved.facts
    about = {
        "Method": f"{METHODS[recipe.loss.name]}: self-supervised, no label was used",
        "Network": f"{recipe.backbone.name} of timm, without classifier" + ("" if plain else ", with a small stem"),
        "Images": f"{facts['images']:,} of `{_name(facts['data'])}`, fingerprint {facts['fingerprint']}",
        "Training": f"recipe {facts['recipe_name']}, {recipe.epochs:g} epochs of batches of {recipe.batch}, "
        f"{fields.sides(recipe)}; these are the weights after step {saved.step:,}",
        "Made with": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }
    parts = [
        FRONT,
        f"# {recipe.backbone.name}, pretrained without labels\n",
        "\n".join(f"- **{name}**: {value}" for name, value in about.items()),
        "\n## Use\n",
        _use(recipe, plain=plain),
        *_verdict(results),
        *_scores(results),
        "\n## Every knob\n",
        f"```json\n{json.dumps(fields.to_json(recipe), indent=2)}\n```\n",
    ]
    return "\n".join(parts)


def _name(data: Any) -> str:
    """The data's own name, without the folders of whoever trained on it."""
    return str(data).replace("\\", "/").rstrip("/").rpartition("/")[2].replace("`", "'")


def _use(recipe: fields.Recipe, *, plain: bool) -> str:
    if plain:
        load = """import timm

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()"""
        why = ""
    else:
        load = """import runpy

import timm

model = runpy.run_path("THIS_FOLDER/load.py")["backbone"]()"""
        why = """
Its first convolution is 3×3 and it has no max-pool, which timm's arguments cannot say: `load.py` builds it, with timm
alone and every tensor in its place. `timm.create_model` on this folder stops with an error rather than load it wrongly.
"""
    lower = ""
    if recipe.precision in ("bfloat16", "float16"):
        lower = f" Scores here are of features in {recipe.precision}; float32's, as above, differ by its rounding."
    return f"""```python
{load}
transform = timm.data.create_transform(
    input_size=(3, {recipe.test_side}, {recipe.test_side}),
    interpolation="bicubic",
    crop_pct=0.875,
    mean={recipe.mean},
    std={recipe.std},
)
features = model(transform(image.convert("RGB"))[None])  # image is one of Pillow's
```
{why}
In training, images whose short side is above {recipe.cache_side} px were first reduced to that.{lower}"""


def _verdict(results: dict[str, Any]) -> list[str]:
    verdict = results.get("verdict")
    if verdict is None:
        return []
    return ["\n## Did it work?\n", f"{verdict['kind']}: {verdict['evidence']} {verdict['advice']}"]


def _scores(results: dict[str, Any]) -> list[str]:
    scores = results.get("scores")
    if not scores:
        return ["\n## Scores\n", "None: there were no labels to score with, or nobody asked."]
    probes = list(dict.fromkeys(probe for found in scores.values() for probe in found))
    rows = [["%", *probes], ["---", *("---:" for _ in probes)]]
    for name, found in scores.items():
        rows.append([name, *(_cell(found.get(probe)) for probe in probes)])
    said = " ".join(comparison["sentence"] for comparison in results.get("comparisons", []))
    return [
        "\n## Scores\n",
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        f"\nOn {results['test']:,} images, the probes fitted on {results['train']:,}; in brackets the 95 % interval "
        f"over test images. {said}",
    ]


def _cell(score: dict[str, float] | None) -> str:
    if score is None:
        return "–"
    bounds = f" ({score['low']:.1f}–{score['high']:.1f})" if "low" in score and "high" in score else ""
    return f"{score['mean']:.1f}{bounds}"
