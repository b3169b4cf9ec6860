"""`corinfomax tune`: views that suit the images, by short runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corinfomax.cli.arguments import DATA, IMAGES, PATH, SETTINGS, DataOptions
from corinfomax.recipes.published import RECIPES

if TYPE_CHECKING:
    import torch

    from corinfomax.cli.train import Plan


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search for views that suit the images.

    Short runs try other crops, rotations, mirroring, colours and blur, alone and together, and a probe on training
    images compares them. Without labels they try crops and blur, compared by a measure of the features. The result is a
    recipe file for pretrain. The same command with the same --out goes on where it stopped.
    """

    data: DATA
    minutes: float = 20.0
    """Time for the whole search."""
    recipe: str | None = None
    """A named recipe, or a file, whose views are changed; default is pretrain's choice."""
    init: str | None = None
    """Weights to start from, as for pretrain."""
    prefix: str | None = None
    """Prefix of their tensor names, in a file with several networks."""
    out: PATH = None
    """Folder of the results; default is a new one in ./runs."""
    images: IMAGES = DataOptions()
    settings: SETTINGS = RECIPES["cpu-small"].recipe

    def run(self, typed: frozenset[str]) -> int:
        from corinfomax.cli import inputs, pretrain
        from corinfomax.runtime import processes, run_folder

        if not self.minutes > 0:
            raise ValueError(f"--minutes is {self.minutes:g}; it must be above 0")
        if processes.started() > 1:
            raise ValueError("tune trains in one process: start it without torchrun")
        device = inputs.choose_device(self.images.device, gigabytes=self.images.memory)
        command = pretrain.Pretrain(
            data=self.data,
            recipe=self.recipe,
            init=self.init,
            prefix=self.prefix,
            images=self.images,
            settings=self.settings,
        )
        plan = pretrain.plan_run(command, typed, device)
        name = f"{Path(plan.data.title).stem.replace(' ', '-') or 'images'}-tuned"
        if self.out is not None and (self.out / "recipe.json").exists():
            raise ValueError(f"{self.out} holds a run: choose another --out")
        out = self.out or run_folder.fresh_folder(Path("runs"), name)
        out.mkdir(parents=True, exist_ok=True)
        with run_folder.locked(out):
            return _tune(self, plan, out, device)


def _tune(command: Tune, plan: "Plan", out: Path, device: "torch.device") -> int:
    """Search in the locked folder `out`, and write the recipe and the page."""
    from corinfomax.cli import inputs, messages, train
    from corinfomax.recipes import fields
    from corinfomax.report import tuned
    from corinfomax.runtime import run_folder
    from corinfomax.search import options, scores, search
    from corinfomax.search.trials import Trials

    splits = inputs.load_splits(plan.data, plan.recipe, command.images)
    recipe = train.fit_run(plan, splits, device)
    choices = options.options_for(recipe, labelled=scores.has_labels(splits.train))
    try:
        weights = None if plan.start_record is None else plan.start_record.digest
        with Trials(
            out,
            recipe,
            splits.train,
            choices,
            plan.start,
            weights=weights,
            minutes=command.minutes,
            device=device,
        ) as trials:
            print(trials.about)
            found = search.search(choices, trials.run, epochs=trials.epochs, seconds=60 * command.minutes)
    except KeyboardInterrupt:
        print(f"stopped; the same command with --out {out} goes on")
        return 130

    # the recipe first, so that nothing after it can lose it
    chosen = search.choose(found)
    best = options.with_options(recipe, [option for option in choices if option.name in chosen.options])
    path = out / "tuned.json"
    run_folder.write_json(path, {"recipe": fields.to_json(best), "options": chosen.options})
    print(f"\n{tuned.as_text(found, chosen, trials.measure)}\n")
    page = out / "report.html"
    run_folder.write_text(page, tuned.as_page(found, chosen, trials.measure, title=Path(plan.data.title).name))
    start = ["--init", command.init] if command.init is not None else []
    print(f"recipe: {path}\nreport: {page}")
    print(f"to train with it: {messages.command('pretrain', command.data, *start, '--recipe', str(path))}")
    return 0
