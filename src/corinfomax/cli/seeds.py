"""`pretrain --seeds`: the same run from several seeds, one after the other, and one page with their mean and spread."""

from dataclasses import replace

from corinfomax.cli import resume
from corinfomax.cli.pretrain import Pretrain
from corinfomax.report import seeds
from corinfomax.runtime import run_folder


def train_seeds(command: Pretrain, typed: frozenset[str]) -> int:
    """Train once with each seed, in OUT/seed-N; runs that are complete are kept, and others resumed."""
    if command.out is None:
        raise ValueError("--seeds needs --out: a folder for the runs, one inside it for each seed")
    if command.resume is not None:
        raise ValueError(f"--seeds resumes by itself: type the same command again, with --out {command.resume}")
    if len(set(command.seeds)) < max(2, len(command.seeds)):
        raise ValueError("--seeds takes two or more different numbers; one alone is --seed")

    runs = [command.out / f"seed-{seed}" for seed in command.seeds]
    for seed, run in zip(command.seeds, runs, strict=True):
        print(f"\nseed {seed}: {run}")
        one = replace(command, seeds=(), out=run, settings=replace(command.settings, seed=seed))
        one_typed = (typed - {"seeds"}) | {"seed"}
        if (run / "recipe.json").exists():
            if resume.is_complete(run, one, one_typed):
                print("complete")
                continue
            one, one_typed = resume.as_resumed(one, one_typed)
        if (code := one.train(one_typed)[0]) != 0:
            return code

    # the summary
    results = {run.name: run_folder.read_results(run) for run in runs}
    print(f"\n{seeds.as_text(results)}")
    page = command.out / "report.html"
    run_folder.write_text(page, seeds.as_page(results, title=command.out.absolute().name))
    print(f"report: {page}")
    return 0
