"""From what is known of a run to one HTML page: every string escaped, every asset inlined, nothing fetched."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import shlex
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from corinfomax import __version__
from corinfomax.diagnosis import verdict
from corinfomax.recipes import fields, published
from corinfomax.recipes.fields import ALPHA_PER_DIM, Recipe, sides

SCRIPTS = ("uplot/uPlot.iife.min.js", "theme.js", "charts.js", "map.js", "tables.js")
STYLES = ("uplot/uPlot.min.css", "report.css")
POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
POINTS = 1_000  # of a curve: more than a screen has pixels for


def render(content: dict[str, Any]) -> str:
    """The page of `content`, as `report.gather` gives it."""
    scripts, styles = ([_asset(name) for name in names] for names in (SCRIPTS, STYLES))
    policy = f"{POLICY}; script-src {' '.join(map(_hash, scripts))}; style-src {' '.join(map(_hash, styles))}"
    charts = curves(content["metrics"], content["recipe"])
    return (
        _environment()
        .get_template("report.html")
        .render(
            content,
            policy=policy,
            scripts=[Markup(text) for text in scripts],
            styles=[Markup(text) for text in styles],
            tone=tone(content["verdict"]),
            headlines=headlines(content),
            charts=charts,
            columns=_columns(content["results"].get("scores") or {}),
            knob_rows=knob_rows(content["recipe"], content["facts"]["recipe_name"]),
            command=command(content["about"]["command"], content["recipe"], content["facts"]["recipe_name"]),
            spent=spent(content),
            payload=as_script(
                {"charts": charts, "speed": speed(content), "spectra": content["spectra"], "map": _map(content["map"])}
            ),
        )
    )


def render_neighbors(rows: list[dict[str, Any]], *, data: str, images: int) -> str:
    """The page of pictures and what is most like them among `images` images; rows as in the report's gallery."""
    style = _asset("report.css")
    return (
        _environment()
        .get_template("neighbors.html")
        .render(
            rows=rows,
            data=data,
            images=images,
            labelled=any(card["label"] is not None for row in rows for card in row["near"]),
            style=Markup(style),
            policy=f"{POLICY}; style-src {_hash(style)}",
            version=__version__,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "number": number, "duration": duration}
    return environment


def write_text(path: Path, text: str) -> None:
    """As UTF-8; what a file name holds that is no text is written as its escape."""
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def _asset(name: str) -> str:
    return (files("corinfomax.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def as_script(value: Any) -> Markup:
    """JSON that may stand in a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)  # ASCII: lone surrogates are escapes too
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    """Numbers to five digits, those that JSON has no word for as null."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def visible(text: str) -> str:
    """A file name on one line: control characters, which may hide or reorder text, as their pictures or codes."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def number(value: float | None, digits: int = 1) -> str:
    """A number for people."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """A time span for people."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def tone(found: dict[str, Any] | None) -> str:
    """How the verdict is coloured."""
    if found is None or found["kind"] in ("still warming up", "recovered"):
        return "pending"
    return "good" if found["kind"] in verdict.GOOD else "bad"


def headlines(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that sum a run up."""
    recipe, metrics, results = content["recipe"], content["metrics"], content["results"]
    rows = [
        ("trained on", f"{content['facts']['images']:,} images"),
        ("network", f"{recipe.backbone.name} {sides(recipe)}"),
        ("length", f"{_epochs(recipe.epochs)}, {content['steps']:,} steps of {recipe.batch}"),
    ]
    if metrics:
        rows.append(("training took", duration(metrics[-1]["seconds"])))
        if "gap" in metrics[-1]:
            rows.append(("above 2·ln D at the end", number(metrics[-1]["gap"], 2)))
    for spectrum in content["spectra"]:
        rows.append(
            (f"effective rank of images, {spectrum['name']}", f"{spectrum['rank']:.0f} of {spectrum['width']:,}")
        )
    if scores := (results.get("scores") or {}).get("pretrained"):
        probe = "linear" if "linear" in scores else next(iter(scores))
        rows.append((f"{probe} probe", f"{scores[probe]['mean']:.1f} %"))
    return rows


def _epochs(count: float) -> str:
    return "1 epoch" if count == 1 else f"{count:,g} epochs"


# Title, what to read in it, whether it is shown at once, and its curves: name and column.
CHARTS: tuple[tuple[str, str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "alpha times attraction plus big bang", True, (("loss", "loss"),)),
    ("Its two terms", "pull of the views, and spread of all images", True,
     (("alpha · attraction", "pull"), ("big bang", "big_bang"))),
    ("Gap to 2·ln D", "how far the spread is from its least value; 0 is no collapse at all", True,
     (("of the batch", "gap"), ("of the images looked at", "spread_gap"))),
    ("Learning rate", "as scheduled", True, (("learning rate", "lr"),)),
    ("kNN score", "top-1 in percent on a sample of the held-out images", True, (("kNN, %", "knn"),)),
    ("Effective rank", "directions in use by views (RankMe)", True,
     (("backbone features", "rank_features"), ("projections", "rank"))),
    ("LiDAR", "directions that tell images apart", False,
     (("backbone features", "lidar_features"), ("projections", "lidar"))),
    ("LDMI", "information that two views share, nats a dimension", False, (("LDMI", "ldmi"),)),
    ("Agreement of views", "share of the variance that lies between images", False,
     (("agreement", "agreement"), ("spread", "spread"))),
    ("Alignment", "squared distance of two views of an image", False, (("alignment", "alignment"),)),
    ("Uniformity", "lower is more evenly spread", False, (("uniformity", "uniformity"),)),
    ("Idle dimensions", "share that hardly varies or repeats another", False,
     (("dead features", "dead_features"), ("dead projections", "dead"),
      ("duplicate features", "duplicate_features"), ("duplicate projections", "duplicate"))),
    ("α-ReQ", "exponent of the power law of the features' spectrum", False, (("α", "req"),)),
)  # fmt: skip
OTHER = {"step", "seconds", "attraction", "finite"}


def curves(metrics: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """A chart for each family of measures that metrics.jsonl holds, and one for each number that is of none."""
    alpha = recipe.loss.alpha if recipe.loss.alpha is not None else ALPHA_PER_DIM * recipe.projector.widths[-1]
    rows = [row | ({"pull": alpha * row["attraction"]} if "big_bang" in row else {}) for row in metrics]
    if not any("gap" in row for row in rows):  # an objective that spreads something else than directions
        rows = [{name: value for name, value in row.items() if name != "spread_gap"} for row in rows]
    known = OTHER | {column for *_, series in CHARTS for _, column in series}
    found: dict[str, set[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in known and _is_number(value):
                found.setdefault(name, set()).add(value)
    more = (name for name, values in sorted(found.items()) if len(values) > 1)  # what never changes is no curve
    charts = (*CHARTS, *((name.replace("_", " "), "", False, ((name, name),)) for name in more))
    return [chart for title, about, first, series in charts if (chart := _chart(rows, title, about, first, series))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _chart(
    rows: list[dict[str, Any]], title: str, about: str, first: bool, series: tuple[tuple[str, str], ...]
) -> dict[str, Any] | None:
    held = [row for row in rows if any(_is_number(row.get(column)) for _, column in series)]
    present = [(name, column) for name, column in series if any(_is_number(row.get(column)) for row in held)]
    if not present:
        return None
    # Rows are means over equally many steps, so the mean of neighbouring rows is one again.
    width = -(-len(held) // POINTS)
    buckets = [held[i : i + width] for i in range(0, len(held), width)]
    last = {
        name: next(row[column] for row in reversed(held) if _is_number(row.get(column))) for name, column in present
    }
    return {
        "title": title,
        "about": about,
        "first": first,
        "x": [bucket[-1]["step"] for bucket in buckets],
        "series": [
            {"name": name, "values": [_mean([row.get(column) for row in bucket]) for bucket in buckets]}
            for name, column in present
        ],
        "last": last,
    }


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if _is_number(value) and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def speed(content: dict[str, Any]) -> dict[str, Any] | None:
    """Images a second along the run, by the clock of metrics.jsonl; a resumed run's clock goes on."""
    rows, batch = content["metrics"], content["recipe"].batch
    passed = [
        {"step": after["step"], "speed": batch * (after["step"] - before["step"]) / seconds}
        for before, after in zip([{"step": 0, "seconds": 0.0}, *rows], rows, strict=False)
        if (seconds := after["seconds"] - before["seconds"]) > 0
    ]
    return _chart(passed, "Images a second", "", True, (("images/s", "speed"),))


def spent(content: dict[str, Any]) -> list[tuple[str, float]]:
    """Stages of the run and of this page with their seconds."""
    rows: list[tuple[str, float]] = []
    if content["metrics"]:
        rows.append(("training", content["metrics"][-1]["seconds"]))
    rows += [(name, float(value)) for name, value in (content["results"].get("seconds") or {}).items()]
    return rows + [(f"this page: {name}", value) for name, value in content["seconds"].items()]


def _columns(scores: dict[str, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(probe for row in scores.values() for probe in row))


def knob_rows(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """Every knob as the flag that sets it, its value, and that of the named recipe where it differs."""
    named = dict(fields.flags(published.RECIPES[name].recipe)) if name in published.RECIPES else {}
    return [
        {"flag": f"--{flag}", "value": value, "usual": named.get(flag, value) if named else value}
        for flag, value in fields.flags(recipe)
    ]


def command(argv: list[str], recipe: Recipe, name: str) -> str:
    """The command that repeats the run: what was typed, the recipe named, and every knob that differs from it, as one
    that was chosen for the images does; without the folder, which holds this run."""
    values = {"--recipe": 1, "--out": 1, "--resume": 1}
    values |= {f"--{f}": 0 if isinstance(value, bool) else len(str(value).split()) for f, value in fields.flags(recipe)}
    words, kept = list(argv), []
    while words:
        flag, equals, _ = (word := words.pop(0)).partition("=")
        flag = flag.replace("_", "-")
        if (name_of := next((f for f in (flag, re.sub(r"(^--|\.)no-", r"\1", flag)) if f in values), None)) is None:
            kept.append(word)
        else:  # what was typed is what the recipe has
            del words[: max(values[name_of] - bool(equals), 0)]
    named = name in published.RECIPES
    usual = published.RECIPES[name].recipe if named else Recipe()
    return shlex.join(["corinfomax", *kept, *["--recipe", name][: 2 * named], *fields.typed(recipe, usual)])


def _map(drawn: dict[str, Any]) -> dict[str, Any]:
    pool = drawn["pool"]
    labels = [part.labels for part in pool.parts]
    classes = pool.parts[0].classes
    names = [visible(path) for part in pool.parts for path in part.paths]
    return {
        "count": len(pool),
        "splits": [{"name": name, "end": end} for name, end in zip(pool.splits, pool.ends, strict=True)],
        "layouts": [
            {
                "name": layout["name"],
                "about": layout["about"],
                "xy": _packed((layout["xy"].numpy() * 65535).round().clip(0, 65535), "<u2"),
                "rows": None if layout["rows"] is None else _packed(layout["rows"].numpy(), "<u4"),
            }
            for layout in drawn["layouts"]
        ],
        "classes": [visible(name) for name in classes],
        "labels": None
        if not classes or any(part is None for part in labels)
        else _packed(np.concatenate([part.numpy() for part in labels]), "<u2"),
        "colours": _packed(drawn["colours"], "u1"),
        "names": b64encode(gzip.compress(json.dumps(names).encode(), mtime=0)).decode(),
        "pictured": _packed(np.array(drawn["pictured"]), "<u4"),
        "thumbs": drawn["thumbs"],
    }


def _packed(values: np.ndarray, kind: str) -> str:
    return b64encode(np.ascontiguousarray(values.astype(kind)).tobytes()).decode()
