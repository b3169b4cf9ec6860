"""`corinfomax embed`: the features of every image, in a file."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from corinfomax.cli.arguments import DATA, IMAGES, NETWORK, WEIGHTS, DataOptions
from corinfomax.runtime.records import WeightsOptions

SIDE = 96  # px, of the long side of a thumbnail


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write the feature vectors of every image to a file.

    WEIGHTS are what evaluate takes: a run, a file of weights, or timm:NETWORK.
    """

    weights: WEIGHTS
    data: DATA
    out: Path = Path("embeddings.npz")
    """File to write: .npz, or .parquet with the parquet extra."""
    thumbnails: bool = False
    """Add small images to the .parquet, to look at in explorers."""
    network: NETWORK = WeightsOptions()
    images: IMAGES = DataOptions()

    def run(self, typed: frozenset[str]) -> int:
        from corinfomax.cli import inputs
        from corinfomax.evaluation import features
        from corinfomax.images.files import some
        from corinfomax.report.thumbnails import Pool, webp
        from corinfomax.runtime import run_folder

        if self.thumbnails and self.out.suffix != ".parquet":
            raise ValueError("--thumbnails are for Parquet: name the file with --out vectors.parquet")
        features.check_ending(self.out)
        run_folder.check_writable(self.out)
        device, loaded, splits = inputs.load_all(self.weights, self.network, self.data, self.images)
        vectors = {}
        for name, part in splits.items():
            bar = f"embedding {name}"
            vectors[name] = features.extract_features(loaded.backbone, part, loaded.recipe, device=device, progress=bar)

        # the file, and how to look into it
        pool = Pool(splits)
        small = (webp(pool.pixels(row), SIDE) for row in range(len(pool))) if self.thumbnails else None
        features.write(self.out, vectors, splits, small)
        count, width = sum(map(len, splits.values())), vectors["train"].shape[1]
        print(f"{self.out}: {count:,} images × {width} features, splits {', '.join(splits)}")
        if self.out.suffix == ".parquet":
            paths = [path for images in splits.values() for path in images.paths if features.as_utf8(path) != path]
            if paths:
                names = some(len(paths), "name")
                print(f"spelt out because they are not UTF-8: {names}, first {features.as_utf8(paths[0])}")
            file = shlex.quote(str(self.out))
            words = "--neighbors neighbors " if count <= features.MOST_NEIGHBOURED else ""
            words += "--image thumbnail" if self.thumbnails else ""
            print(f"to explore: uvx embedding-atlas {file} --x x --y y {words}".rstrip())
        return 0
