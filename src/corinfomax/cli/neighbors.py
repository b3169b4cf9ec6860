"""`corinfomax neighbors`: the images most similar to given ones, as text and as a page."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import UseAppendAction

from corinfomax.cli.arguments import DATA, IMAGES, NETWORK, WEIGHTS, DataOptions
from corinfomax.runtime.records import WeightsOptions


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """Show the images most similar to the queries.

    WEIGHTS are what evaluate takes: a run, a file of weights, or timm:NETWORK. The search is exact, in one pass.
    """

    weights: WEIGHTS
    data: DATA
    query: UseAppendAction[tuple[Path, ...]] = ()
    """An image file; may be repeated."""
    count: int = 12
    """Images to show for each query."""
    out: Path = Path("neighbors.html")
    """The page to write."""
    network: NETWORK = WeightsOptions()
    images: IMAGES = DataOptions()

    def run(self, typed: frozenset[str]) -> int:
        from corinfomax.cli import inputs
        from corinfomax.report import neighbors
        from corinfomax.report.thumbnails import Pool
        from corinfomax.runtime import run_folder

        if not self.query or self.count < 1:
            raise ValueError("name at least one image with --query, and a --count of at least 1")
        run_folder.check_writable(self.out)
        device, loaded, splits = inputs.load_all(self.weights, self.network, self.data, self.images)
        pool = Pool(splits)
        results = neighbors.search(loaded.backbone, pool, loaded.recipe, self.query, k=self.count, device=device)
        print(*(neighbors.matches_as_text(matches, pool) for matches in results), sep="\n")
        run_folder.write_text(self.out, neighbors.matches_as_page(results, pool, data=self.data))
        print(f"page: {self.out}")
        return 0
