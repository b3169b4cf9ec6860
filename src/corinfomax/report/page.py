"""The page of a run as self-contained HTML: assets inlined, text escaped, nothing fetched."""

import gzip
import hashlib
import json
import math
import shlex
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from corinfomax import __version__
from corinfomax.diagnosis.verdict import GOOD
from corinfomax.images import in_memory, levels
from corinfomax.recipes import fields
from corinfomax.recipes.fields import RGB, PixelFormat, Recipe
from corinfomax.recipes.published import RECIPES
from corinfomax.report.charts import charts
from corinfomax.report.content import Content, Neighbourhood
from corinfomax.runtime.records import Facts, Options, Verdict

SCRIPTS = ("uplot/uPlot.iife.min.js", "theme.js", "charts.js", "map.js", "tables.js")
STYLES = ("uplot/uPlot.min.css", "report.css")


def render(content: Content) -> str:
    """The page of a run."""
    # the highest mean of each probe
    best_scores: dict[str, float] = {}
    for scores in content.results.table.values():
        for probe, score in scores.items():
            best_scores[probe] = max(score.mean, best_scores.get(probe, score.mean))

    # curves, maps and spectra go to the scripts, all else to the template
    recipe, facts = content.subject.recipe, content.subject.facts
    run_charts = charts(content.rows, recipe)
    payload = {"charts": run_charts, "spectra": content.spectra, "map": _map_payload(content)}
    values = {**content._asdict(), **content.subject._asdict(), "best_scores": best_scores, "charts": run_charts}
    values |= {"steps": recipe.steps(facts.images), "settings": settings(recipe, facts.recipe_name)}
    values |= {"tone": tone(content.results.verdict), "payload": as_script(payload)}
    values["false_colours"] = levels.colours_shown(recipe.pixels)
    values["title"] = f"{Path(facts.data).stem or facts.data} · {facts.recipe_name}"
    values["command"] = repeat_command(content.subject.run, facts, recipe)
    return fill("report.html", SCRIPTS, STYLES, **values)


def render_neighbours(
    neighbourhoods: Sequence[Neighbourhood], *, data: str, images: int, pixels: PixelFormat = RGB
) -> str:
    """The page of queries with their nearest neighbours among the images of `data`."""
    values = {"title": f"Nearest neighbours in {data}", "neighbourhoods": neighbourhoods, "images": images}
    values["false_colours"] = levels.colours_shown(pixels)
    return fill("neighbors.html", (), STYLES[1:], **values)


def fill(template: str, scripts: Sequence[str], styles: Sequence[str], **values: object) -> str:
    """The template with its scripts and styles, which the content-security policy accepts by their hashes."""
    policy = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    for kind, names in (("script", scripts), ("style", styles)):
        texts = [_asset(name) for name in names]
        values[f"{kind}s"] = list(map(Markup, texts))
        hashes = [b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        policy += f"; {kind}-src " + (" ".join(f"'sha256-{text}'" for text in hashes) or "'none'")

    loader = jinja2.FunctionLoader(_asset)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"visible": visible, "number": number, "duration": duration}
    text = environment.get_template(template).render(values, policy=policy, version=__version__)
    return text.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are not UTF-8


def _asset(name: str) -> str:
    return (files("corinfomax.report") / "assets" / name).read_text(encoding="utf-8")


def as_script(value: object) -> Markup:
    """JSON inside a script element: no character can end the element or begin a comment."""
    text = json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)  # ASCII: lone surrogates become escapes
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _plain(value: object) -> object:
    """A value of JSON's types: numbers to five digits, null for nan and infinity, objects for named tuples."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def visible(text: str) -> str:
    """Text on one line: control characters, which can hide or reorder text, become symbols or codes."""
    # 0x2400 starts Unicode's symbols for control characters.
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def number(value: float, digits: int = 1) -> str:
    """A number with so many decimals; a dash for nan and infinity."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "–"


def duration(seconds: float) -> str:
    """A time span in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def tone(verdict: Verdict | None) -> str:
    """The colour class of a verdict: good, pending or bad."""
    if verdict is None or verdict.kind in ("too few to say", "still warming up", "recovered"):
        return "pending"
    return "good" if verdict.kind in GOOD else "bad"


def settings(recipe: Recipe, name: str) -> list[tuple[str, object, object]]:
    """Flag and value of every setting, and its value in the published recipe of this name, if there is one."""
    usual = fields.flags(RECIPES[name].recipe if name in RECIPES else recipe)
    return [(f"--{flag}", value, usual[flag]) for flag, value in fields.flags(recipe).items()]


def repeat_command(run: Path, facts: Facts, recipe: Recipe) -> str:
    """The command for the same run in a new folder: images, options, named recipe, and changes to that recipe.

    For images in memory it is a call of `corinfomax.pretrain`.
    """
    if facts.data.startswith(in_memory.NAME):
        return _repeat_call(facts, recipe)

    # images
    command = ["corinfomax", "pretrain", facts.data]
    command += ["--init", facts.start.name, *facts.start.words] if facts.start is not None else []
    places = {"root": facts.root, "cache": facts.cache, "holdout": facts.holdout, "test-split": facts.test_split}
    places |= {"stack": facts.stack, "channels": facts.channels}
    for flag, value in places.items():
        if value is not None:
            command += [f"--{flag}", str(value)]
    if facts.skip is not None:
        command += ["--skip", str(run / facts.skip)]

    # settings; without a published recipe every difference from the defaults
    command += fields.difference(facts.options, Options())
    base = Recipe()
    if facts.recipe_name in RECIPES:
        base = RECIPES[facts.recipe_name].recipe
        command += ["--recipe", facts.recipe_name]
    if facts.start is not None:  # its weights fix the network
        base = replace(base, backbone=recipe.backbone)
    return shlex.join([*command, *fields.difference(recipe, base)])


def _repeat_call(facts: Facts, recipe: Recipe) -> str:
    """The function call for the same run on images in memory."""
    published = facts.recipe_name in RECIPES
    base = RECIPES[facts.recipe_name].recipe if published else Recipe()
    settings: dict[str, object] = {"recipe": facts.recipe_name} if published else {}
    if facts.start is not None:
        settings["init"] = facts.start.name
        if "--prefix" in facts.start.words:
            settings["prefix"] = facts.start.words[facts.start.words.index("--prefix") + 1]
    settings |= {} if facts.holdout is None else {"holdout": facts.holdout}
    settings |= fields.changes(facts.options, Options()) | fields.changes(recipe, base)
    keywords = [f"{flag.replace('.', '_').replace('-', '_')}={value!r}" for flag, value in settings.items()]
    return f"corinfomax.pretrain({', '.join(['images', *keywords])})"


def _map_payload(content: Content) -> dict[str, object]:
    """The map for its script; arrays are base64 of little-endian numbers."""
    # paths, and labels when all images have one
    splits = list(content.pool.splits.values())
    ends = accumulate(map(len, splits))  # the row after the last of each split
    names = [visible(path) for images in splits for path in images.paths]
    classes = splits[0].classes  # the same in all splits
    labels = [images.labels for images in splits if images.labels is not None]
    labelled = bool(classes) and len(labels) == len(splits)

    layouts = []
    for name, caption, plane, rows in content.layouts:
        xy = _packed((plane.numpy() * 65535).round().clip(0, 65535), "<u2")
        shown = None if rows is None else _packed(rows.numpy(), "<u4")
        layouts.append({"name": name, "caption": caption, "xy": xy, "rows": shown})
    return {
        "images": len(content.pool),
        "splits": [{"name": name, "end": end} for name, end in zip(content.pool.splits, ends, strict=True)],
        "layouts": layouts,
        "classes": [visible(name) for name in classes],
        "labels": _packed(np.concatenate(labels), "<u2") if labelled else None,
        "colours": _packed(content.colours.numpy(), "u1"),
        "names": b64encode(gzip.compress(json.dumps(names).encode(), mtime=0)).decode(),
        "thumbnail_rows": _packed(np.array(list(content.thumbnails)), "<u4"),
        "thumbnails": list(content.thumbnails.values()),
    }


def _packed(values: np.ndarray, kind: str) -> str:
    """Base64 of an array as a NumPy type."""
    return b64encode(np.ascontiguousarray(values.astype(kind)).tobytes()).decode()
