"""What is most like given pictures."""

from __future__ import annotations

from corinfomax.cli import inputs
from corinfomax.cli.options import Neighbors
from corinfomax.report import neighbors, page
from corinfomax.runtime import run_folder


def run(command: Neighbors) -> int:
    """Say and show what is most like each picture."""
    if not command.query or command.count < 1:
        raise ValueError("name at least one picture with --query, and a --count of at least 1")
    device = inputs.device_of(command.where.device)
    given = inputs.weights_of(command.weights, command.network, device)
    parts = inputs.every(command.data, command.where, given.recipe)
    pool = neighbors.pool_of(parts)
    found = neighbors.search(given.backbone, pool, given.recipe, command.query, k=command.count, device=device)
    for one in found:
        print(neighbors.as_text(one, pool))
    text = neighbors.as_page(found, pool, data=command.data)
    run_folder.write_whole(command.out, lambda temporary: page.write_text(temporary, text))
    print(f"page: {command.out}")
    return 0
