"""Train every case of `cases.py` and hold the verdict against what is right: the table of docs/verdict.md, as markdown.

    corinfomax pretrain data/tiny-imagenet-64-100c --backbone.name test_vit3 --size 64 --epochs 3 --out weights/vit
    python -m benchmarks.verdict.judged --root data --weights weights --out runs/verdict

Some runs continue from that ViT, and from tf_efficientnet_lite0-imagenet1k.safetensors in the same folder. Runs that
are in --out already are only judged. About a CPU minute a case on one thread; `--share 0 2` and `--share 1 2` beside it
train half of them each, and `--judge` then makes the table of all. `--only Muon kernel` takes those with one of these
words in their names.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.verdict.cases import CASES, Case, probe, unspoilt
from corinfomax.diagnosis import verdict
from corinfomax.network import start_tensors
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts, Options
from corinfomax.training import loop

CPU = torch.device("cpu")


class Outcome(NamedTuple):
    """What was said of one run, and when."""

    last: str
    """What was said at the end."""
    said: list[tuple[float, str]]
    """Share of the run and kind, after every row."""
    before: float | None
    """Ridge probe of the weights that it started from."""
    ridge: float | None
    advice: str


def run_case(case: Case, folder: Path, root: Path, cache: Path, weights: Path) -> None:
    """Train into `folder`, and score the backbone by a ridge probe, and the one it started from."""
    splits, start, recipe = case.splits(root, cache), case.start(weights), case.recipe
    if start is not None:
        recipe = replace(recipe, test_scale=1.0, backbone=start.recipe.backbone)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    results: dict[str, object] = {}
    try:
        options = Options(log_steps=10, checkpoint_minutes=60.0, scores=0)
        tensors = None if start is None else start_tensors(start.backbone)
        facts = Facts(start=None if start is None else start.start(str(case.init)))
        network = loop.pretrain(recipe, splits, folder, device=CPU, options=options, facts=facts, start=tensors)
        sound = replace(case, spoil=unspoilt).splits(root, cache)  # what it learnt, on images as they are
        most = 5000 if start is None else 2000  # networks of ImageNet are slower than ours
        if start is not None:
            results["before"] = probe(start.backbone, sound, recipe, most=most)
        results["ridge"] = probe(network.backbone, sound, recipe, most=most)
    except FloatingPointError as error:
        results["error"] = str(error)
    for path in run_folder.checkpoints(folder):
        path.unlink()
    run_folder.write_json(folder / "done.json", results)


def judge_case(case: Case, folder: Path) -> Outcome:
    """The verdict after every row of the metrics, as the terminal has it, and at the end."""
    rows, done = run_folder.read_metrics(folder), json.loads((folder / "done.json").read_text())
    steps = case.recipe.epochs * (case.images // case.recipe.batch)
    said = []
    for place, row in enumerate(rows):
        found = verdict.judge(rows[: place + 1], case.recipe, steps=steps)
        if found is not None:
            said.append((row.step / steps, found.kind))
    last = verdict.judge(rows, case.recipe, steps=steps, ended=True, error=done.get("error"))
    assert last is not None
    if "error" in done:
        said.append((rows[-1].step / steps if rows else 0.0, last.kind))
    return Outcome(last.kind, said, done.get("before"), done.get("ridge"), last.advice)


def first_named(case: Case, outcome: Outcome) -> float | None:
    """The share of the run after which a bad run was first called what it is."""
    return next((share for share, kind in outcome.said if kind in case.right), None)


def right_at_the_end(case: Case, outcome: Outcome) -> bool:
    """Whether the last word is what the run is, or what it was where it has recovered."""
    return outcome.last in case.right or (case.recovers and outcome.last == "recovered")


def table(outcomes: dict[str, Outcome]) -> str:
    """Every case as a row, and below it the counts."""
    lines = [
        "| run | seen | ridge, % | what it is | first called so at | said at the end |",
        "|---|---|---:|---|---:|---|",
    ]
    for name, outcome in outcomes.items():
        case = CASES[name]
        named = first_named(case, outcome)
        what = "good" if case.good else " or ".join(sorted(case.right))
        what = what.replace("complete collapse or dimensional collapse", "collapse")
        when = "" if case.good else "never" if named is None else f"{named:.0%}"
        ridge = " → ".join(f"{score:.1f}" for score in (outcome.before, outcome.ridge) if score is not None) or "–"
        mark = "" if right_at_the_end(case, outcome) else "**"
        last = outcome.last
        seen = "yes" if case.tuned else "no"
        lines.append(f"| {name} | {seen} | {ridge} | {what} | {when} | {mark}{last}{mark} |")
    for seen in (True, False):
        some = {name: o for name, o in outcomes.items() if CASES[name].tuned == seen}
        good = [o for name, o in some.items() if CASES[name].good]
        bad = {name: o for name, o in some.items() if not CASES[name].good}
        kept = sum(o.last in verdict.GOOD for o in good)
        alarms = sum(any(kind not in verdict.GOOD for _, kind in o.said) for o in good)
        ended = sum(right_at_the_end(CASES[name], o) for name, o in bad.items())
        when = [first_named(CASES[name], o) for name, o in bad.items()]
        named, early = (
            sum(share is not None for share in when),
            sum(share is not None and share <= 0.2 for share in when),
        )
        lines.append(
            f"\n{'Seen' if seen else 'Unseen'}: {kept} of {len(good)} good runs end as good, and {alarms} of them had "
            f"an alarm on the way; {named} of {len(bad)} bad runs are called what they are, {early} of them within the "
            f"first 20 %, and the last word on {ended} is right."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="folder of the weights to continue from")
    parser.add_argument("--cache", type=Path, default=None, help="folder of decoded images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th case from I")
    parser.add_argument("--only", nargs="*", default=[""], metavar="WORD", help="cases named with one of these")
    parser.add_argument("--judge", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as commands do
    outcomes = {}
    first, every = options.share
    chosen = [name for name in CASES if any(word in name for word in options.only)]
    for name in chosen[first::every]:
        case = CASES[name]
        folder = options.out / name.replace("/", "over").replace(" ", "-")
        if not (folder / "done.json").exists():
            if options.judge:
                continue
            run_case(case, folder, options.root, options.cache, options.weights)
        outcomes[name] = judge_case(case, folder)
    print(table(outcomes))
    for name, outcome in outcomes.items():
        changes = [said for before, said in itertools.pairwise([(0.0, ""), *outcome.said]) if said[1] != before[1]]
        print(f"\n{name}: {', '.join(f'{share:.0%} {kind}' for share, kind in changes)}; {outcome.advice}")


if __name__ == "__main__":
    main()
