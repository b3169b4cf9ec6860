"""Several runs that differ in their seed: scores with mean and standard deviation, as text and as a page."""

from collections.abc import Collection, Mapping
from statistics import fmean, stdev

from corinfomax.evaluation import table
from corinfomax.report import page
from corinfomax.runtime.records import Results, Score, Table


def mean_table(results: Mapping[str, Results]) -> Table:
    """Mean and standard deviation over the runs of every score that all of them have."""
    tables = [result.table for result in results.values()]
    rows = [name for name in tables[0] if all(name in scores for scores in tables)]
    means: Table = {name: {} for name in rows}
    for name in rows:
        for probe in tables[0][name]:
            values = [scores[name][probe].mean for scores in tables if probe in scores[name]]
            if len(values) == len(tables):
                means[name][probe] = Score(fmean(values), stdev(values))
    return means


def as_text(results: Mapping[str, Results]) -> str:
    """The verdict of each run and the table, for a terminal."""
    lines = [f"{name}: {_verdict(result)}" for name, result in results.items()]
    if means := mean_table(results):
        lines += ["", table.as_text(means), f"mean over {len(results)} seeds; ±: standard deviation over them"]
    return "\n".join(lines)


def as_page(results: Mapping[str, Results], *, title: str, pages: Collection[str] = ()) -> str:
    """One HTML page with the table, and the verdict and sentence of each run, with a link where it is in `pages`."""
    means = mean_table(results)
    probes = list(dict.fromkeys(probe for scores in means.values() for probe in scores))
    best = {probe: max(scores[probe].mean for scores in means.values() if probe in scores) for probe in probes}
    runs = [
        (name, page.tone(result.verdict), _verdict(result), result.sentences[:1]) for name, result in results.items()
    ]
    values = {"title": f"{title}, {len(runs)} seeds", "means": means, "best": best, "runs": runs, "pages": pages}
    return page.fill("seeds.html", (), page.STYLES[1:], **values)


def _verdict(result: Results) -> str:
    return "no verdict" if result.verdict is None else result.verdict.text
