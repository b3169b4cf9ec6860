"""A search over views within some minutes: every option alone, the best ones together, and the leaders once more.

Short runs are compared in pairs: all runs of a round have the same length and the same seed.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from corinfomax.runtime.records import Trial
from corinfomax.search.options import Option

Names = tuple[str, ...]  # of options; () is the recipe as it is
TOGETHER = 3  # runs of the second round, beside the recipe's own
AGAIN = 2  # runs of the third round, beside the recipe's own
LONGER = 2.0  # length of a run in the last two rounds, in runs of the first
MARGIN = 1.0  # standard errors by which other views must lead the recipe's own

Run = Callable[[int, Names, float], Trial]
"""Train in this round with these options for so many epochs, and score."""


class Choice(NamedTuple):
    """The options to use, with the lead of the best ones over the recipe's own views."""

    options: Names
    lead: float
    error: float  # standard error of the lead


def search(options: Sequence[Option], run: Run, *, epochs: float, seconds: float) -> list[Trial]:
    """Every trial of a search. Runs of the first round last `epochs`; the others fill the time that is left."""
    first = [run(0, names, epochs) for names in ((), *((option.name,) for option in options))]
    epochs = _epochs_left(first, seconds, TOGETHER + 1 + AGAIN + 1)
    second = [run(1, names, epochs) for names in ((), *combinations(options, first))]
    leaders = sorted(second[1:], key=lambda trial: -trial.score)[:AGAIN]
    epochs = _epochs_left(first + second, seconds, AGAIN + 1)
    third = [run(2, names, epochs) for names in ((), *(trial.options for trial in leaders))]
    return first + second + third


def runs_at_once(options: Sequence[Option]) -> float:
    """The length of a search, in runs of its first round."""
    return 1 + len(options) + LONGER * (TOGETHER + 1 + AGAIN + 1)


def _epochs_left(done: Sequence[Trial], seconds: float, runs: int) -> float:
    """Epochs of each of the runs that are left, for all to end in time; at least those of the first round."""
    training, total = sum(trial.training for trial in done), sum(trial.seconds for trial in done)
    scoring = (total - training) / len(done)
    each = (seconds - total) / runs - scoring
    return max(done[0].epochs, each * sum(trial.epochs for trial in done) / training)


def combinations(options: Sequence[Option], first: Sequence[Trial]) -> list[Names]:
    """Options to try together: the best one, the best two, and the best of each part, if they helped alone.

    If fewer helped, the best others fill the places, each alone.
    """
    base, *alone = first
    by_score = sorted(zip(options, alone, strict=True), key=lambda pair: -pair[1].score)
    best: dict[str, Option] = {}  # of each part
    for option, _ in by_score:
        best.setdefault(option.part, option)
    helped = [option.name for option, trial in by_score if option in best.values() and trial.score > base.score]
    joined = [tuple(helped[:count]) for count in sorted({1, 2, len(helped)}) if 0 < count <= len(helped)]
    others = [trial.options for _, trial in by_score if trial.options not in joined]
    return [*joined, *others][:TOGETHER]


def choose(trials: Sequence[Trial]) -> Choice:
    """The options with the best mean over the last two rounds; none unless their lead is clear."""
    last = [trial for trial in trials if trial.round > 0]
    scores = {trial.options: [other.score for other in last if other.options == trial.options] for trial in last}
    means = {names: fmean(values) for names, values in scores.items() if len(values) == 2}
    best = max(means, key=lambda names: (means[names], not names))
    lead = means[best] - means[()]
    error = (fmean(trial.error**2 for trial in last) / 2) ** 0.5
    return Choice(best if lead > MARGIN * error else (), lead, error)
