"""The result of a search over views, as text and as a page."""

from collections.abc import Sequence
from typing import NamedTuple

from corinfomax.report import page
from corinfomax.runtime.records import Trial
from corinfomax.search.search import Choice

AS_IT_IS = "the recipe's own views"


class Row(NamedTuple):
    """The scores of some views by round; None where they were not run."""

    name: str
    scores: tuple[float | None, ...]
    chosen: bool


def as_text(trials: Sequence[Trial], choice: Choice, measure: str) -> str:
    """The scores as a table, and what follows, for a terminal."""
    rows = _rows(trials, choice)
    width = max(len(row.name) for row in rows)
    rounds = len(rows[0].scores)
    lines = [f"{'views':<{width}}" + "".join(f"{f'round {number + 1}':>10}" for number in range(rounds))]
    for row in rows:
        cells = "".join(f"{'' if score is None else f'{score:.2f}':>10}" for score in row.scores)
        lines.append(f"{row.name:<{width}}{cells}".rstrip())
    return "\n".join([*lines, measure, "", conclusion(trials, choice)])


def conclusion(trials: Sequence[Trial], choice: Choice) -> str:
    """The choice in a sentence."""
    lead = f"{choice.lead:+.2f} ± {choice.error:.2f}".replace("-", "−")
    if not choice.options:
        return f"Keep the recipe's own views: none of the others are clearly better (best lead {lead})."
    return f"Chosen: {' + '.join(choice.options)} ({lead} against the recipe's own views)."


def as_page(trials: Sequence[Trial], choice: Choice, measure: str, *, title: str) -> str:
    """One HTML page: the choice, a chart of the first round, and every score."""
    base, *alone = [trial for trial in trials if trial.round == 0]
    gains = sorted(((trial.options[0], trial.score - base.score) for trial in alone), key=lambda pair: -pair[1])
    values = {
        "title": f"Views for {title}",
        "conclusion": conclusion(trials, choice),
        "tone": "good" if choice.options else "pending",
        "measure": measure,
        "gains": gains,
        "largest": max((abs(gain) for _, gain in gains), default=0.0) or 1.0,
        "rows": _rows(trials, choice),
        "minutes": sum(trial.seconds for trial in trials) / 60,
    }
    return page.fill("tuned.html", (), page.STYLES[1:], **values)


def _rows(trials: Sequence[Trial], choice: Choice) -> list[Row]:
    """A row for each choice of options, the best last round first, and those before below."""
    rounds = 1 + max(trial.round for trial in trials)
    scores: dict[tuple[str, ...], dict[int, float]] = {}
    for trial in trials:
        scores.setdefault(trial.options, {})[trial.round] = trial.score
    order = sorted(scores, key=lambda names: (max(scores[names]), scores[names][max(scores[names])]), reverse=True)
    return [
        Row(
            " + ".join(names) or AS_IT_IS,
            tuple(scores[names].get(number) for number in range(rounds)),
            names == choice.options,
        )
        for names in order
    ]
