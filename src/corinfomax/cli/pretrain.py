"""`corinfomax pretrain`: from images to weights, verdict, scores and page."""

import contextlib
import dataclasses
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from corinfomax.cli import messages
from corinfomax.cli.arguments import GROUP, IMAGES, OPTIONAL_DATA, PATH, SETTINGS, DataOptions
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe, Tuning
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime.records import Options, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from corinfomax.cli.train import Plan
    from corinfomax.images.files import Source


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a backbone on images without labels.

    Labels, if there are any, score it at the end. DATA is a folder (flat, nested, or split/class/…), an archive of one
    (.zip, .tar), a folder of such shards, a list (.txt, .csv), or one of the named sets: mnist5k, cifar10, cifar100,
    tiny-imagenet, imagenet100, imagenet100-temi, imagenet1k.

    Without --recipe one is chosen for the images and the device. Any of its settings can be changed, such as
    --epochs 20 --optim.lr 0.1; rarely used ones are listed by corinfomax recipes NAME.

    A run begins with random weights, or continues from others with --init; the scores then say whether that helped.
    """

    data: OPTIONAL_DATA = None
    recipe: str | None = None
    """A named recipe (`corinfomax recipes` lists them), or a file of tune."""
    init: str | None = None
    """Weights to start from: a run, a file, a folder, or timm:NETWORK."""
    prefix: str | None = None
    """Prefix of their tensor names, in a file with several networks."""
    out: PATH = None
    """Run folder; default is a new one in ./runs."""
    resume: PATH = None
    """Resume the run in this folder; DATA then says where images moved."""
    seeds: tuple[int, ...] = ()
    """Train with each of these seeds and average the scores; needs --out."""
    images: IMAGES = DataOptions()
    options: Annotated[Options, GROUP] = Options()
    settings: SETTINGS = RECIPES["cpu-small"].recipe

    def run(self, typed: frozenset[str]) -> int:
        if not self.seeds:
            return self.train(typed)[0]
        if self.resume is not None:
            raise ValueError(f"--seeds resumes by itself: type the same command again, with --out {self.resume}")
        if self.out is None:
            raise ValueError("--seeds needs --out: a folder for the runs, one inside it for each seed")
        from corinfomax.cli.seeds import train_seeds
        from corinfomax.runtime import processes

        if processes.started() > 1:
            raise ValueError("--seeds trains in one process: start torchrun once for each --seed")

        def train_one(seed: int, run: Path) -> int:
            command = replace(self, seeds=(), out=run, settings=replace(self.settings, seed=seed))
            rest = command.remaining((typed - {"seeds"}) | {"seed"})
            if rest is None:
                print("complete")
                return 0
            return rest[0].train(rest[1])[0]

        return train_seeds(self.out, self.seeds, train_one)

    def remaining(
        self, typed: frozenset[str], source: "Source | None" = None
    ) -> "tuple[Pretrain, frozenset[str]] | None":
        """The command, with its typed flags, that begins the run in its folder `out`, or goes on with it.

        None if the run is complete; ValueError if a typed setting is not that of the run. Images in another place may
        be others: the run then goes on, which compares them.
        """
        if self.out is None or not (self.out / "recipe.json").exists():
            return self, typed
        from corinfomax.cli import resume
        from corinfomax.images.sources import Data

        # a path of weights is recorded as an absolute one
        init = str(Path(self.init).absolute()) if self.init is not None and Path(self.init).exists() else self.init
        values = fields.flags(self.settings) | {"recipe": self.recipe, "init": init}
        values |= {"holdout": self.images.holdout, "test-split": self.images.test_split}
        values |= {"stack": self.images.stack, "channels": self.images.channels}
        resume.check_same(self.out, {flag: values[flag] for flag in typed & values.keys()})
        name = self.data if source is None else source
        if resume.is_complete(self.out) and (name is None or resume.has_images(self.out, Data(name, self.images.root))):
            return None
        command = replace(self, resume=self.out, out=None, recipe=None, init=None, prefix=None)
        return command, typed & resume.CHANGEABLE

    def train(
        self,
        typed: frozenset[str],
        *,
        source: "Source | None" = None,
        on_row: "Callable[[Row], object]" = lambda row: None,
    ) -> tuple[int, Path]:
        """Train in this process or in all that torchrun started; gives the exit code and the run folder.

        `source` is images in memory instead of DATA. The first process prints, calls `on_row` with each row of
        metrics, and does the rest.
        """
        from corinfomax.cli import inputs, train
        from corinfomax.runtime import processes, run_folder

        with (
            processes.join(inputs.choose_device(self.images.device, gigabytes=self.images.memory)) as device,
            contextlib.ExitStack() as stack,
        ):
            run, first = self.resume or self.out, processes.rank() == 0
            if not first:
                nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))

            # The first process locks the run folder before anything in it is read, and before hours of decoding.
            elif self.resume is not None and self.resume.is_dir():
                stack.enter_context(run_folder.locked(self.resume))
            elif self.resume is None and self.out is not None:
                stack.enter_context(run_folder.new_run(self.out))

            # plan and training
            plan = plan_run(self, typed, device, source)
            if first:
                train.print_footprint(plan, device)
            if run is None and first:
                folder = f"{Path(plan.data.title).stem.replace(' ', '-') or 'images'}-{plan.recipe_name}"
                run = run_folder.fresh_folder(Path("runs"), folder)
                stack.enter_context(run_folder.new_run(run))
            run = run or Path("runs")
            try:
                trained = train.train(run, plan, device, on_row)
            except KeyboardInterrupt:
                if not (run / "recipe.json").exists():
                    raise
                print(f"stopped\nto resume: {messages.command('pretrain', '--resume', str(run))}")
                trained = None

        if trained is None:
            return 130, run
        return train.conclude(trained, plan.data, device) if first else 0, run


def plan_run(
    command: Pretrain, typed: frozenset[str], device: "torch.device", source: "Source | None" = None
) -> "Plan":
    """The run as typed, or as recorded when it is resumed; ValueError for a flag that would make it another run."""
    from corinfomax.cli import fit, inputs, train
    from corinfomax.training import loop, trackers
    from corinfomax.weights import checkpoint, load

    # what a resumed run has recorded
    name, options, images, resumed = command.data, command.options, command.images, None
    if command.resume is not None:
        fixed = {
            *fields.flags(Recipe()),
            *"recipe init prefix out holdout test-split skip stack channels download".split(),
        }
        if changing := sorted(typed & fixed):
            rule = f"a resumed run keeps its recipe and its splits: --{changing[0]} cannot go with --resume"
            raise ValueError(f"{rule}. It takes DATA, --root, --cache, --device, --memory and how to log and save")
        if command.resume.is_file():
            run = command.resume.absolute().parent.parent
            raise ValueError(f"{command.resume} is a file; --resume takes the folder of a run, such as {run}")
        resumed = checkpoint.load_resumable(command.resume)
        again = ("pretrain", "FOLDER", "--resume", str(command.resume))
        if name is None and source is None:
            name = inputs.images_of_run(resumed.facts, *again)
        images = inputs.options_of_run(images, command.resume, resumed.facts)
        typed_again = [field.name for field in dataclasses.fields(Options) if field.name.replace("_", "-") in typed]
        options = replace(resumed.facts.options, **{option: getattr(options, option) for option in typed_again})

    # images, weights and recipe
    images_named = name if source is None else source
    if images_named is None:
        raise ValueError("name the images: corinfomax pretrain DATA, or resume a run: --resume RUN")
    if command.prefix is not None and command.init is None:
        raise ValueError("--prefix needs --init: it chooses one of several networks in that file")
    if options.track is not None:
        trackers.check(options.track)
    data = inputs.find_data(images_named, images)
    start = None
    if resumed is not None:
        recipe_name, recipe = resumed.facts.recipe_name, resumed.recipe
        if command.resume is not None and resumed.facts.start is not None:
            start = load.load_start(command.resume)
    elif command.init is not None:
        start = fit.load_init(command.init, command.prefix, command.settings, typed)
        recipe_name, recipe = fit.adapt_recipe(command.recipe, start, data, command.settings, typed, device)
        start = fit.adapt_channels(start, recipe)
    else:
        recipe_name, recipe = fit.choose_recipe(command.recipe, data, command.settings, typed, device)
    if resumed is None:
        print(*data.survey().levels.notes, sep="\n", end="\n" if data.survey().levels.notes else "")
        recipe = fit.fit_cache(fit.fit_views(recipe, typed), data)
    loop.check_parts(recipe)
    if start is None and recipe.tuning != Tuning():
        named = sorted(flag for flag in typed if flag.startswith("tuning."))
        subject = f"--{named[0]} is for runs that continue" if named else f"recipe {recipe_name} continues"
        raise ValueError(f"{subject} from weights: name them with --init")
    record = None if resumed is None else resumed.facts.start
    if start is not None and command.init is not None:
        record = fit.start_record(start, command.init, command.prefix, recipe, typed)
    fitted = frozenset[str]()
    if resumed is None and command.recipe is None:
        # turning was measured from random weights alone
        parts = {"flip", "rotate"} if start is None else {"flip"}
        fitted = frozenset(parts - {flag.rpartition(".")[2] for flag in typed})
    return train.Plan(data, images, recipe, recipe_name, options, resumed, start, record, fitted)
