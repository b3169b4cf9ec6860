"""`corinfomax report`: the page of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from corinfomax.cli.arguments import IMAGES, PATH, DataOptions


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one offline HTML page about a run.

    It shows verdict, curves, spectrum, views, map and nearest neighbours. The neighbour map needs PaCMAP, the
    extra map.
    """

    run_folder: Annotated[Path, Positional, arg(metavar="RUN")]
    """The folder of a run."""
    data: Annotated[str | None, Positional, arg(metavar="DATA")] = None
    """Its images, if they moved, or others to show it on."""
    out: PATH = None
    """The page to write; default report.html in the run folder."""
    images: IMAGES = DataOptions()

    def run(self, typed: frozenset[str]) -> int:
        from corinfomax.cli import inputs
        from corinfomax.report import content, gather
        from corinfomax.runtime import run_folder
        from corinfomax.weights import checkpoint

        folder = self.run_folder
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; name a run's: corinfomax report RUN")
        page = self.out or folder / "report.html"
        run_folder.check_writable(page)
        device = inputs.choose_device(self.images.device, gigabytes=self.images.memory)
        network, saved = checkpoint.load_network(folder)
        options = inputs.options_of_run(self.images, folder, saved.facts)
        name = self.data or inputs.images_of_run(saved.facts, "report", str(folder), "FOLDER")
        splits = inputs.load_splits(inputs.find_data(name, options), saved.recipe, options)

        same = splits.train.fingerprint == saved.facts.fingerprint
        if not same:
            print("the run was trained on other images: the page leaves out its views")
        subject = content.Subject(folder, network, saved.recipe, saved.step, saved.facts, splits, same)
        out = gather.write_page(subject, page, device=device)
        print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")
        return 0
