"""`corinfomax evaluate`: scores of frozen features beside baselines and other weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import UseAppendAction

from corinfomax.cli.arguments import DATA, IMAGES, NETWORK, PATH, WEIGHTS, DataOptions
from corinfomax.runtime.records import Results, WeightsOptions

if TYPE_CHECKING:
    from corinfomax.images.files import Source


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score frozen features of any weights beside baselines.

    The images are labelled. The probes are kNN, ridge and logistic regression, few labels, and retrieval; the baselines
    are an untrained network and raw pixels. WEIGHTS and --against are a run folder or checkpoint, an exported folder, a
    state dict (.safetensors; .pth and the like, read without running code), or timm:NETWORK, downloaded if need be.
    """

    weights: WEIGHTS
    data: DATA
    against: UseAppendAction[tuple[str, ...]] = ()
    """Other weights to compare with; may be repeated."""
    fine_tune: bool = False
    """Also fine-tune on 1 % and 10 % of the labels: up to hours."""
    published_probe: bool = False
    """Also run the paper's augmented linear probe of the weights: hours without a GPU."""
    probe_epochs: int | None = None
    """Epochs of that probe; default is the recipe's, 100 in the paper."""
    probe_baselines: bool = False
    """Run that probe on the baselines too."""
    out: PATH = None
    """Add the scores to this JSON file."""
    network: NETWORK = WeightsOptions()
    images: IMAGES = DataOptions()

    def run(self, typed: frozenset[str]) -> int:
        from corinfomax.cli import inputs

        inputs.print_scores(self.score(), self.out)
        return 0

    def score(self, source: "Source | None" = None) -> Results:
        """The scores; prints what was loaded and left out. `source` is images in memory instead of DATA."""
        from corinfomax.cli import inputs
        from corinfomax.evaluation import table
        from corinfomax.recipes import fields
        from corinfomax.runtime import run_folder

        if (self.probe_epochs is not None or self.probe_baselines) and not self.published_probe:
            flag = "--probe-epochs" if self.probe_epochs is not None else "--probe-baselines"
            raise ValueError(f"{flag} is for the paper's probe: add --published-probe")
        if self.probe_epochs is not None and self.probe_epochs < 1:
            raise ValueError(f"--probe-epochs is {self.probe_epochs}; it must be at least 1")

        # the weights, then the images at the size that each of them sees
        if self.out is not None:
            run_folder.check_writable(self.out)
            run_folder.read_object(self.out)
        device = inputs.choose_device(self.images.device, gigabytes=self.images.memory)
        ours, *loaded_rivals = inputs.load_several((self.weights, *self.against), self.network, device)
        if self.out is not None and (self.out.parent / "recipe.json").exists() and self.out.name == "results.json":
            same_run = ours.run is not None and ours.run.resolve() == self.out.parent.resolve()
            if not (same_run and inputs.are_own_images(source or self.data, self.images, ours)):
                raise ValueError(f"{self.out} holds the scores of a run on its own images: name another file")
        images = inputs.options_of_own_images(self.images, source or self.data, ours)
        data = inputs.find_data(source or self.data, images)
        ours = ours._replace(recipe=inputs.fit_pixels(ours.recipe, data))
        splits = inputs.load_splits(data, ours.recipe, images)
        table.check_labels(splits)
        inputs.warn_of_input(ours, splits.train, ours.recipe, device)
        loaded, rivals = {(ours.recipe.cache_side, ours.recipe.pixels): splits}, list[table.Contender]()
        remarks: tuple[str, ...] = ()
        if ours.run is not None and ours.facts is not None and ours.facts.start is not None:
            rivals, remarks = inputs.before(ours.run, splits, ours.recipe, ours.facts, device)
            remarks = () if ours.facts.start.name in self.against else remarks  # which says to compare with it
        for name, rival in zip(table.distinct_names(self.against), loaded_rivals, strict=True):
            recipe = inputs.fit_pixels(rival.recipe, data)
            key = recipe.cache_side, recipe.pixels
            if key not in loaded:
                loaded[key] = inputs.load_images(data, recipe)
            inputs.warn_of_input(rival, loaded[key].train, recipe, device)
            rivals.append(table.Contender(name, rival.backbone, recipe, loaded[key]))

        recipe = ours.recipe
        if self.probe_epochs is not None:
            recipe = fields.with_probe_epochs(recipe, self.probe_epochs)
            rivals = [
                rival._replace(recipe=fields.with_probe_epochs(rival.recipe, self.probe_epochs)) for rival in rivals
            ]
        return table.evaluate(
            ours.backbone,
            splits,
            recipe,
            device=device,
            published_probe=self.published_probe,
            probe_baselines=self.probe_baselines,
            log=lambda line: print(line, flush=True),
            fine_tune=self.fine_tune,
            rivals=rivals,
            remarks=remarks,
        )
