"""The model card of an exported backbone: its training, its scores, and the code that loads it."""

import json
import re
from importlib.resources import files

import jinja2

from corinfomax.recipes import fields
from corinfomax.runtime.records import Results, Score
from corinfomax.weights.checkpoint import Checkpoint

OBJECTIVES = {
    "corinfomax": "CorInfoMax (arXiv 2209.07999)",
    "kernel": "CorInfoMax with the log det of an exponential kernel",
}


def markdown(saved: Checkpoint, results: Results, *, plain: bool) -> str:
    """The card of a checkpoint as README.md; `plain` means that timm alone can load the folder."""
    # a card of the weights before training has the scores alone
    recipe, facts, start = saved.recipe, saved.facts, saved.facts.start
    outcome = "did not help"
    if start is not None and saved.step == 0:
        if "before" not in results.table:
            outcome = "went wrong" + (f" ({results.verdict.kind})" if results.verdict is not None else "")
        names = {"pretrained": "continued (not in this folder)", "before": "**these weights**"}
        table = {names.get(name, name): scores for name, scores in results.table.items()}
        results = results._replace(verdict=None, sentences=(), comparisons=(), table=table)

    # the table of scores: a header, its rule, and the rows
    probes = list(dict.fromkeys(probe for scores in results.table.values() for probe in scores))
    rows = [["%", *probes], ["---", *["---:"] * len(probes)]]
    rows += [[name, *(_score_cell(scores.get(probe)) for probe in probes)] for name, scores in results.table.items()]

    # every way in which the network's shape is not timm's own
    sizes = {"layers": recipe.backbone.layers, "channels": recipe.backbone.channels}
    shape = [f"{name} {' '.join(map(str, value))}" for name, value in sizes.items() if value is not None]
    shape += ["a small stem"] if recipe.backbone.small_stem else []

    licence = (start and start.license) or ""
    values = {"step": saved.step, "recipe": recipe, "facts": facts, "results": results, "plain": plain, "short": _short}
    values |= {"scores": rows, "shape": shape, "settings": json.dumps(fields.to_json(recipe), indent=2)}
    values |= {
        "outcome": outcome,
        "objective": OBJECTIVES[recipe.loss.name],
        "data": _short(facts.data).replace("`", "'"),
    }
    values["licence"] = licence if re.fullmatch(r"[\w.+-]+", licence) else ""  # an identifier, as the hub reads it
    return template("card.md.jinja").render(values)


def template(name: str) -> jinja2.Template:
    """A text of the folder templates, to be filled."""
    text = (files("corinfomax.weights") / "templates" / name).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.from_string(text)


def _short(name: str) -> str:
    """The name of weights or images, of a path the last part."""
    return name if name.startswith("timm:") else name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _score_cell(score: Score | None) -> str:
    if score is None:
        return "–"
    interval = "" if score.low is None or score.high is None else f" ({score.low:.1f}–{score.high:.1f})"
    return f"{score.mean:.1f}{interval}"
