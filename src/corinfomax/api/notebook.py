"""Results as HTML for a notebook: inline styles that suit light and dark pages, text escaped."""

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from corinfomax.evaluation import table
from corinfomax.report.page import tone, visible
from corinfomax.runtime.records import Results, Score, Verdict

COLOURS = {"good": "#2e9e5b", "pending": "#b07d00", "bad": "#d64541"}
RIGHT = "text-align: right; padding: .15em .7em; white-space: nowrap"


def run(path: Path, verdict: Verdict | None, scores: Results | None, report: Path | None) -> str:
    """The verdict in its colour, the scores, and a link to the page."""
    kind = "no verdict yet" if verdict is None else verdict.kind
    colour = COLOURS[tone(verdict)]
    parts = [f'<div style="font-size: 1.3em; font-weight: 600; color: {colour}">{escape(kind.capitalize())}</div>']
    if verdict is not None:
        parts.append(_paragraphs([verdict.evidence, verdict.advice]))
    if scores is not None:
        parts.append(scores_table(scores))
    if report is not None:
        place = os.path.relpath(report).replace(os.sep, "/")  # Jupyter serves files below the notebook
        parts.append(f'<div>Page: <a href="{escape(place)}" target="_blank">{escape(visible(place))}</a></div>')
    parts.append(f"<div><code>{escape(visible(os.path.relpath(path)))}</code></div>")
    body = "\n".join(parts)
    return f'<div style="border-left: 5px solid {colour}; padding-left: 1em">\n{body}\n</div>'


def scores_table(results: Results) -> str:
    """The table with the best of each column in bold, its legend, and the sentences."""
    probes = list(dict.fromkeys(probe for scores in results.table.values() for probe in scores))
    best = {probe: max(scores[probe].mean for scores in results.table.values() if probe in scores) for probe in probes}
    head = "".join(f'<th style="{RIGHT}">{escape(name)}</th>' for name in ("%", *probes))
    rows = []
    for name, scores in results.table.items():
        cells = [_cell(scores.get(probe), best[probe]) for probe in probes]
        rows.append(f'<tr><th style="text-align: left">{escape(visible(name))}</th>{"".join(cells)}</tr>')
    body = "\n".join(rows)
    legend = f'<div style="opacity: .7; font-size: .9em">{escape(table.LEGEND)}</div>'
    text = _paragraphs((*results.remarks, *results.sentences))
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n{legend}\n{text}"


def _cell(score: Score | None, best: float) -> str:
    text = escape(table.cell(score))
    return f'<td style="{RIGHT}">{f"<b>{text}</b>" if score is not None and score.mean == best else text}</td>'


def _paragraphs(sentences: Iterable[str]) -> str:
    return "\n".join(
        f'<div style="max-width: 75ch; margin: .3em 0">{escape(visible(text))}</div>' for text in sentences
    )
