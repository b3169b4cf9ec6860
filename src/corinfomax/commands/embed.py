"""The features of every image, in a file."""

from __future__ import annotations

import shlex

from corinfomax import embed
from corinfomax.commands import inputs
from corinfomax.options import Embed


def run(command: Embed) -> int:
    """Write the features of every image of every split."""
    embed.check_ending(command.out)
    device = inputs.device_of(command.where.device)
    given = inputs.weights_of(command.weights, command.network, device)
    parts = inputs.every(command.data, command.where, given.recipe)
    vectors = {
        name: embed.features(given.backbone, part, given.recipe, device=device, progress=f"embedding {name}")
        for name, part in parts.items()
    }
    embed.write(command.out, vectors, parts)
    count, width = sum(map(len, parts.values())), vectors["train"].shape[1]
    print(f"{command.out}: {count:,} images × {width} features, splits {', '.join(parts)}")
    if command.out.suffix == ".parquet":
        file = shlex.quote(str(command.out))
        print(f"to look at them: uvx embedding-atlas {file} --x x --y y  (or --vector features, a map of neighbours)")
    return 0
