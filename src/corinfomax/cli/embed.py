"""The features of every image, in a file."""

from __future__ import annotations

import shlex

from corinfomax.cli import inputs
from corinfomax.cli.options import Embed
from corinfomax.evaluation import features


def run(command: Embed) -> int:
    """Write the features of every image of every split."""
    features.check_ending(command.out)
    device = inputs.device_of(command.where.device)
    given = inputs.weights_of(command.weights, command.network, device)
    parts = inputs.every(command.data, command.where, given.recipe)
    vectors = {
        name: features.features(given.backbone, part, given.recipe, device=device, progress=f"embedding {name}")
        for name, part in parts.items()
    }
    features.write(command.out, vectors, parts)
    count, width = sum(map(len, parts.values())), vectors["train"].shape[1]
    print(f"{command.out}: {count:,} images × {width} features, splits {', '.join(parts)}")
    if command.out.suffix == ".parquet":
        file = shlex.quote(str(command.out))
        print(f"to look at them: uvx embedding-atlas {file} --x x --y y  (or --vector features, a map of neighbours)")
    return 0
