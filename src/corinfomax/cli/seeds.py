"""`pretrain --seeds`: the same run from several seeds, one after the other, and one page with their mean and spread."""

from collections.abc import Callable, Sequence
from pathlib import Path

from corinfomax.report import seeds
from corinfomax.runtime import run_folder


def train_seeds(out: Path, numbers: Sequence[int], train_one: Callable[[int, Path], int]) -> int:
    """Train each seed in its folder OUT/seed-N and summarise them; gives the first exit code that is not 0."""
    if len(set(numbers)) < max(2, len(numbers)):
        raise ValueError("--seeds takes two or more different numbers; one alone is --seed")
    runs = [out / f"seed-{number}" for number in numbers]
    for number, run in zip(numbers, runs, strict=True):
        print(f"\nseed {number}: {run}")
        if (code := train_one(number, run)) != 0:
            return code

    results = {run.name: run_folder.read_results(run) for run in runs}
    print(f"\n{seeds.as_text(results)}")
    page, pages = out / "report.html", [run.name for run in runs if (run / "report.html").exists()]
    run_folder.write_text(page, seeds.as_page(results, title=out.absolute().name, pages=pages))
    print(f"report: {page}")
    return 0
