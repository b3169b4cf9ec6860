"""The model card of an exported backbone: its training, its scores, and the code that loads it."""

from __future__ import annotations

import json
import re
from pathlib import PurePath

from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.records import Facts, Results, Score
from corinfomax.weights.checkpoint import Checkpoint

OBJECTIVES = {
    "corinfomax": "CorInfoMax (arXiv 2209.07999)",
    "kernel": "CorInfoMax with the log det of an exponential kernel",
}
PLAIN_LOADER = 'import timm\n\nmodel = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()'
SMALL_STEM_LOADER = 'import runpy\n\nimport timm\n\nmodel = runpy.run_path("THIS_FOLDER/load.py")["backbone"]()'
SMALL_STEM_NOTE = """
The network starts with a 3×3 convolution and has no max-pool. timm has no arguments for that, so `load.py` builds it
with timm alone. `timm.create_model` on this folder stops with an error instead of loading it wrongly.
"""


def markdown(saved: Checkpoint, results: Results, *, plain: bool) -> str:
    """The card of a checkpoint as README.md; `plain` means that timm alone can load the folder."""
    recipe, facts = saved.recipe, saved.facts
    if facts.start is not None and saved.step == 0:
        results = _of_start(results)
    data = facts.data.replace("\\", "/").rstrip("/").rpartition("/")[2].replace("`", "'")  # without its folders
    length = f"{recipe.epochs:g} epochs in batches of {recipe.batch}, {recipe.resolution}"
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    verdict = "" if results.verdict is None else f"\n## Verdict\n\n{results.verdict.text}\n"
    return f"""---
library_name: timm
{_license(facts)}tags:
- image-feature-extraction
- self-supervised
- timm
---

{_title(saved, data)}

- **Method**: {OBJECTIVES[recipe.loss.name]}: self-supervised, without labels
- **Network**: {_network(recipe)}
- **Images**: {facts.images:,} from `{data}`, fingerprint {facts.fingerprint}
- **Training**: recipe {facts.recipe_name}, {length}; weights after step {saved.step:,}
{_start(facts)}- **Versions**: {versions}

## Use

{_usage(recipe, plain=plain)}
{verdict}
## Scores

{_score_section(results)}

## Settings

```json
{json.dumps(fields.to_json(recipe), indent=2)}
```
"""


def _of_start(results: Results) -> Results:
    """The results of a run in the card of the weights that it started from."""
    names = {"pretrained": "continued (not in this folder)", "before": "**these weights**"}
    table = {names.get(name, name): scores for name, scores in results.table.items()}
    return results._replace(verdict=None, sentences=(), comparisons=(), table=table)


def _title(saved: Checkpoint, data: str) -> str:
    name = saved.recipe.backbone.name
    if saved.facts.start is None:
        return f"# {name}, pretrained without labels"
    if saved.step:
        return f"# {name}, continued without labels"
    unchanged = f"Continuing on the images of `{data}` did not help, so these are the weights of the start, unchanged."
    return f"# {name}, as it was before training\n\n{unchanged}"


def _license(facts: Facts) -> str:
    """The licence of the weights that the run started from, as the hub reads it; "" unless it is an identifier."""
    licence = (facts.start and facts.start.license) or ""
    return f"license: {licence}\n" if re.fullmatch(r"[\w.+-]+", licence) else ""


def _start(facts: Facts) -> str:
    """A line on the weights that the run started from: their name, licence, source and paper."""
    if facts.start is None:
        return ""
    name, checksum, licence, source, paper, _ = facts.start
    name = name if name.startswith("timm:") else PurePath(name.replace("\\", "/")).name
    about = [f"licence {licence}"] if licence else ["licence not recorded: see where you found them"]
    about += [source] if source else []
    about += [f"paper {paper}"] if paper else []
    return f"- **Start**: `{name}`, checksum {checksum[:16]}; {', '.join(about)}\n"


def _network(recipe: Recipe) -> str:
    """The network in words, with every way in which its shape is not timm's own."""
    backbone = recipe.backbone
    shape = [
        f"{name} {' '.join(map(str, value))}"
        for name, value in (("layers", backbone.layers), ("channels", backbone.channels))
        if value is not None
    ]
    shape += ["a small stem"] if backbone.small_stem else []
    return f"timm's {backbone.name} without classifier" + (f", with {', '.join(shape)}" if shape else "")


def _usage(recipe: Recipe, *, plain: bool) -> str:
    note = ""
    if recipe.precision in ("bfloat16", "float16"):
        note = f" The scores below are of {recipe.precision} features; this code gives float32, so rounding differs."
    return f"""```python
{PLAIN_LOADER if plain else SMALL_STEM_LOADER}
transform = timm.data.create_transform(
    input_size=(3, {recipe.test_side}, {recipe.test_side}),
    interpolation="{recipe.interpolation}",
    crop_pct=0.875,
    mean={recipe.mean},
    std={recipe.std},
)
features = model(transform(image.convert("RGB"))[None])  # image is a PIL.Image
```
{"" if plain else SMALL_STEM_NOTE}
Before training, images were reduced to a short side of at most {recipe.cache_side} px.{note}"""


def _score_section(results: Results) -> str:
    """A table with a row per kind of features and a column per probe, the remarks, and the comparisons in words."""
    if not results.table:
        return "Not scored: the run had no labels, or was not evaluated."

    # a header, its rule, and the rows
    probes = list(dict.fromkeys(probe for scores in results.table.values() for probe in scores))
    rows = [["%", *probes], ["---", *["---:"] * len(probes)]]
    rows += [[name, *(_score_cell(scores.get(probe)) for probe in probes)] for name, scores in results.table.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    fitted = f"Probes are fitted on {results.train:,} images and scored on {results.test:,} others"
    legend = f"{fitted}; brackets hold 95 % intervals over test images."
    return f"{table}\n\n{' '.join((legend, *results.remarks, *results.sentences))}"


def _score_cell(score: Score | None) -> str:
    if score is None:
        return "–"
    interval = "" if score.low is None or score.high is None else f" ({score.low:.1f}–{score.high:.1f})"
    return f"{score.mean:.1f}{interval}"
