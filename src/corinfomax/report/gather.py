"""A run as one HTML page: the verdict, what was measured, what the network saw and what it made of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corinfomax.diagnosis import measures
from corinfomax.evaluation import features as embed
from corinfomax.evaluation import maps, similar
from corinfomax.evaluation.similar import Near
from corinfomax.images.cache import Splits
from corinfomax.network import Network
from corinfomax.recipes.fields import Recipe, View
from corinfomax.report import page, pictures
from corinfomax.report.pictures import Pool
from corinfomax.runtime import run_folder
from corinfomax.runtime.seeds import generator, key
from corinfomax.training import batches
from corinfomax.views.operations import Parameters

MOST = 60_000  # images that are embedded: more of them say no more, and cost
MAPPED = 10_000  # images of a neighbour map, which takes minutes for more
PICTURED = 5_000  # images of the map that have a picture
MAP_BUDGET = 3_500_000  # characters of all pictures of the map: the page of 50,000 images stays far under 8 MB
PICTURE_BUDGET = 800_000  # characters of all other pictures
SEEN = 16  # images of the contact sheet
QUERIES, NEIGHBOURS = 12, 6
GROUPS, GROUP_SIZE, STRANGERS = 12, 6, 18
CROWD = 10  # neighbours that an image is judged by
COARSE = 8  # side in pixels at which twins are looked for
MAYBE = 0.95  # least correlation there
DIRECTIONS = 128  # leading directions of the features in which neighbours are looked for among all images


class Subject(NamedTuple):
    """The run that a page is about, and the images to show it on."""

    run: Path
    network: Network
    recipe: Recipe
    step: int
    """Steps that the network was trained for."""
    facts: dict[str, Any]
    splits: Splits
    same_images: bool
    """Whether `splits` is what the run was trained on."""


def write(subject: Subject, out: Path, *, device: torch.device, progress: bool = True) -> Path:
    """Write the page of a run to `out`, whole or not at all.

    The network is put into eval mode. Raises OSError or ValueError where the run folder cannot be read.
    """
    text = page.render(gather(subject, device=device, progress=progress))
    run_folder.write_whole(out, lambda temporary: page.write_text(temporary, text))
    return out


def gather(subject: Subject, *, device: torch.device, progress: bool = True) -> dict[str, Any]:
    """All that the page shows, as plain values; its name for every part is the one in the template."""
    run, recipe = subject.run, subject.recipe
    network = subject.network.to(device).eval()
    about = run_folder.read_json(run / "recipe.json")
    results = run_folder.read_json(run / "results.json") if (run / "results.json").exists() else {}
    metrics = run_folder.read_metrics(run)
    clock: dict[str, float] = {}

    parts = {name: part for name, part in subject.splits._asdict().items() if part is not None}
    pool = pictures.pool(parts, most=MOST, generator=generator(recipe.seed, "report"))
    with _timed(clock, "embedding the images"):
        features = torch.cat(
            [
                embed.features(
                    network.backbone, part, recipe, device=device, progress=f"embedding {name}" if progress else None
                )
                for name, part in zip(pool.splits, pool.parts, strict=True)
            ]
        )
        projections = _projections(network, features, recipe, device=device)
    with _timed(clock, "neighbours, twins, outliers"):
        squares = pool.squares(torch.arange(len(pool)), side=COARSE)
        unit = similar.centred(features)
        crowd = similar.nearest(_leading(unit), k=CROWD)
        twins = _twins(pool, squares, crowd)
        queries = torch.linspace(0, len(pool) - 1, min(QUERIES, len(pool))).round().long().unique()
        near = similar.nearest(unit, k=NEIGHBOURS, queries=queries)
    with _timed(clock, "maps"):
        layouts = _layouts(features, recipe)
    with _timed(clock, "pictures"):
        rows = _spread(layouts[0]["xy"], PICTURED, generator(recipe.seed, "pictured"))
        thumbs, _ = pictures.thumbnails(pool, rows, budget=MAP_BUDGET)
        album = _Album(pool, queries, near, twins, similar.strangers(crowd, most=STRANGERS), crowd)
        sheet = contact_sheet(subject, device=device) if subject.same_images else None

    return {
        "title": f"{Path(subject.facts['data']).stem or subject.facts['data']} · {subject.facts['recipe_name']}",
        "run": run.resolve().name,
        "verdict": results.get("verdict"),
        "best": _best(results, run),
        "about": about,
        "facts": subject.facts,
        "recipe": recipe,
        "step": subject.step,
        "steps": recipe.steps(subject.facts["images"]),
        "results": results,
        "metrics": metrics,
        "spectra": [_spectrum("backbone features", features), _spectrum("projections", projections)],
        "sheet": sheet,
        "same_images": subject.same_images,
        "map": {
            "layouts": layouts,
            "pool": pool,
            "colours": (squares.mean((2, 3)) * 255).round().byte().numpy(),
            "pictured": rows,
            "thumbs": thumbs,
        },
        "sampled_from": sum(map(len, parts.values())),
        **album.shown(),
        "seconds": clock,
    }


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    clock[name] = time.monotonic() - started


@torch.inference_mode()
def _projections(
    network: Network, features: Float[Tensor, "n f"], recipe: Recipe, *, device: torch.device
) -> Float[Tensor, "n d"]:
    """What the loss would be given for each image's centre view."""
    dtype = next(network.projector.parameters()).dtype
    z = torch.cat([network.projector(rows.to(device, dtype)).float().cpu() for rows in features.split(4096)])
    return torch.nn.functional.normalize(z, dim=1) if recipe.loss.normalize else z


def _leading(x: Float[Tensor, "n f"], dims: int = DIRECTIONS) -> Float[Tensor, "n g"]:
    """Unit rows in the leading directions alone, which carry nearly all of a cosine at a part of the cost."""
    if x.shape[1] <= dims:
        return x
    return torch.nn.functional.normalize(maps.principal(x, dims=dims)[0], dim=1)


def _twins(pool: Pool, squares: Float[Tensor, "n 3 s s"], crowd: Near) -> similar.Twins:
    """Pictures that are likely the same one, mirrored or not: each image's nearest by features and by pixels."""
    by_pixels = similar.nearest(_leading(similar.centred(squares.flatten(1)), 48), k=1)
    rows = torch.arange(len(pool))
    pairs = torch.cat([torch.stack((rows, near.rows[:, 0]), 1) for near in (crowd, by_pixels)])
    pairs = pairs.sort(1).values.unique(dim=0)
    pairs = pairs[_alike(squares, pairs) >= MAYBE]
    rows, places = pairs.unique(return_inverse=True)
    alike = _alike(pool.squares(rows, side=similar.FINE), places)
    return similar.grouped(pairs[alike >= similar.SURE], alike[alike >= similar.SURE])


def _alike(squares: Float[Tensor, "n 3 s s"], pairs: Int[Tensor, "m 2"]) -> Float[Tensor, " m"]:
    some = [similar.correlation(squares[a], squares[b]) for a, b in (few.unbind(1) for few in pairs.split(4096))]
    return torch.cat(some) if some else torch.zeros(0)


def _spectrum(name: str, x: Float[Tensor, "n d"]) -> dict[str, Any]:
    x = x.double()
    return {
        "name": name,
        "width": x.shape[1],
        "values": measures.covariance_spectrum(x).tolist(),
        "rank": float(measures.effective_rank(x)),
    }


def _layouts(features: Float[Tensor, "n f"], recipe: Recipe) -> list[dict[str, Any]]:
    """The maps of the features: name, coordinates in [0, 1], and the rows they are of where not of all."""
    plane, share = maps.principal(features)
    percent = 100 * share.sum().item()
    layouts = [{"name": "PCA", "about": f"{percent:.0f} % of the variance", "xy": _fitted(plane), "rows": None}]
    rows = torch.randperm(len(features), generator=generator(recipe.seed, "map"))[:MAPPED].sort().values
    whole = len(rows) == len(features)
    for name in maps.neighbour_maps():
        # They need some neighbours that are not all there is, and a distance that is not 0.
        if len(features) > 3 * CROWD and bool((features != features[0]).any()):
            plane = maps.neighbour_map(name, features[rows], seed=key(recipe.seed, "map"))
            about = "near images stay near" + ("" if whole else f"; {len(rows):,} of {len(features):,} images")
            layouts.append({"name": name, "about": about, "xy": _fitted(plane), "rows": None if whole else rows})
    return layouts


def _fitted(plane: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Moved and scaled into the unit square, both axes by one factor."""
    low, high = plane.amin(0), plane.amax(0)
    scale = (high - low).max().clamp_min(1e-30)
    return (plane - (low + high) / 2) / scale + 0.5


def _spread(plane: Float[Tensor, "n 2"], count: int, generator: torch.Generator) -> list[int]:
    """Rows spread over a map: one of each cell of a grid first, so that lonely points have their picture, then any."""
    order = torch.randperm(len(plane), generator=generator)
    if len(plane) <= count:
        return list(range(len(plane)))
    side = max(1, int(count**0.5))
    cell = (plane[order] * side).long().clamp(0, side - 1) @ torch.tensor([side, 1])
    # Stable sort by cell: the first of each run of equal cells is a random member.
    by_cell = cell.argsort(stable=True)
    first = torch.ones(len(plane), dtype=torch.bool)
    first[1:] = cell[by_cell][1:] != cell[by_cell][:-1]
    chosen = order[torch.cat((by_cell[first], by_cell[~first].sort().values))][:count]
    return sorted(chosen.tolist())


def _best(results: dict[str, Any], run: Path) -> str | None:
    """The checkpoint that label-free measures prefer, from the run folder, when it is still there."""
    best = results.get("best_checkpoint")
    return best if isinstance(best, str) and (run / best).is_file() else None


def contact_sheet(subject: Subject, *, device: torch.device) -> list[dict[str, Any]]:
    """Images of the last training step with the very views that the network was given of them."""
    recipe, images = subject.recipe, subject.splits.train
    step = max(0, subject.step - 1)
    indices = batches.indices(recipe, step, len(images))
    some = slice(0, SEEN)
    sizes = images.sizes[indices]
    steps = recipe.steps(len(images))
    crops = [
        pictures.normalised_to_bytes(x.float(), mean=recipe.mean, std=recipe.std)
        for x in batches.step_views(batches.of_step(recipe, step, steps), images, step, device, some)
    ]
    # For the captions alone: the pictures come from the training loop's own function.
    drawn = batches.draw_views(recipe, sizes, step)
    whole = Pool(("train",), (images,))
    return [
        {
            "path": images.paths[row],
            "image": pictures.webp(whole.pixels(row), 128),
            "views": [
                {
                    "image": pictures.webp(x[place], 128, quality=85),
                    "said": operations(batches.of_crop(recipe, crop), p, sizes[place], place),
                }
                for crop, (x, p) in enumerate(zip(crops, drawn, strict=True))
            ],
        }
        for place, row in enumerate(indices[some].tolist())
    ]


def operations(view: View, p: Parameters, size: Int[Tensor, " 2"], place: int) -> str:
    """What was done to one image, in words."""
    _, _, height, width = p.box[place].tolist()
    said = [f"crop {100 * height * width / float(size.prod()):.0f} %"]
    if view.rotate:
        said.append(f"turned {round(float(p.angle[place]))}°".replace("-", "−"))
    said += ["flipped"] * bool(p.flip[place]) + ["jitter"] * bool(p.jitter[place]) + ["grey"] * bool(p.grey[place])
    if p.blur[place]:
        said.append(f"blur {float(p.sigma[place]):.1f} px")
    return " · ".join(said + ["solarised"] * bool(p.solarize[place]))


class _Album(NamedTuple):
    """Which images the galleries show."""

    pool: Pool
    queries: Int[Tensor, " q"]
    near: Near
    twins: similar.Twins
    strangers: Int[Tensor, " m"]
    crowd: Near

    def shown(self) -> dict[str, Any]:
        """The galleries, each picture as large as all of them together may be."""
        groups = [group[:GROUP_SIZE] for group in self.twins.groups[:GROUPS]]
        lists = [self.queries.tolist(), *self.near.rows.tolist(), *groups, self.strangers.tolist()]
        rows = sorted({row for some in lists for row in some})
        images, _ = pictures.thumbnails(self.pool, rows, budget=PICTURE_BUDGET)
        image = dict(zip(rows, images, strict=True))

        def card(row: int, cosine: float | None = None) -> dict[str, Any]:
            part, local = self.pool.place(row)
            path, label = self.pool.parts[part].paths[local], self.pool.label(row)
            return {"path": path, "label": label, "image": image[row], "cosine": cosine}

        return {
            "neighbours": [
                {"query": card(query), "near": [card(*pair) for pair in zip(rows, cosines, strict=True)]}
                for query, rows, cosines in zip(
                    self.queries.tolist(), self.near.rows.tolist(), self.near.cosine.tolist(), strict=True
                )
            ],
            "twins": {
                "groups": [
                    {"cards": [card(row) for row in shown], "count": len(group), "alike": alike}
                    for shown, group, alike in zip(groups, self.twins.groups, self.twins.alike, strict=False)
                ],
                "count": len(self.twins.groups),
                "images": sum(map(len, self.twins.groups)),
                "across": sum(len({self.pool.place(row)[0] for row in group}) > 1 for group in self.twins.groups),
                "disagree": sum(len({self.pool.label(row) for row in group}) > 1 for group in self.twins.groups),
            },
            "strangers": [card(row, float(self.crowd.cosine[row].mean())) for row in self.strangers.tolist()],
        }
