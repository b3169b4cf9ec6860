"""The parts of a run's page, computed from its network and images: features, neighbours, maps and thumbnails."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corinfomax.diagnosis import measures
from corinfomax.evaluation import maps, similar
from corinfomax.evaluation.features import extract_features
from corinfomax.evaluation.similar import Neighbours
from corinfomax.images.levels import colours_shown
from corinfomax.recipes.fields import Recipe, View
from corinfomax.report import content, page
from corinfomax.report.content import Card, Content, Layout, Subject
from corinfomax.report.thumbnails import Pool, view_pixels, webp_text, webp_thumbnails
from corinfomax.runtime import run_folder
from corinfomax.runtime.seeds import generator, key
from corinfomax.training import batches
from corinfomax.views.operations import ViewParameters

MAX_EMBEDDED = 60_000  # images: more would take time and show nothing new
MAX_MAPPED = 10_000  # images of a neighbour map, which takes minutes for more
MAX_THUMBNAILS = 5_000  # images of the map with a thumbnail
MAP_BUDGET = 3_500_000  # characters of the map's thumbnails: the page of 50,000 images stays far under 8 MB
GALLERY_BUDGET = 800_000  # characters of all thumbnails in the galleries
SHEET_IMAGES, SHEET_SIDE = 16, 128  # the contact sheet: images, and pixels of each
QUERIES, NEIGHBOURS = 12, 6  # nearest neighbours to show: queries, and images per query
SHOWN_OUTLIERS, CROWD = 18, 10  # outliers to show, and neighbours that decide whether an image is one
DIRECTIONS = 128  # leading directions of the features in the search among all images
COLOUR_SIDE = 8  # pixels of the side of the thumbnails whose mean is an image's colour


def write_page(subject: Subject, out: Path, *, device: torch.device) -> Path:
    """Write the page of a run to `out`, whole or not at all.

    The network ends in eval mode. OSError or ValueError when the run folder cannot be read.
    """
    run_folder.write_text(out, page.render(gather_content(subject, device=device)))
    return out


def gather_content(subject: Subject, *, device: torch.device) -> Content:
    """Everything that the page of a run shows."""
    subject = subject._replace(run=subject.run.resolve())
    results, rows = run_folder.read_results(subject.run), run_folder.read_metrics(subject.run)
    if results.best_checkpoint is not None and not (subject.run / results.best_checkpoint).is_file():
        results = results._replace(best_checkpoint=None)

    # features and projections of a sample of all images
    recipe = subject.recipe
    splits = {name: images for name, images in subject.splits._asdict().items() if images is not None}
    pool = Pool(splits).sample(MAX_EMBEDDED, generator(recipe.seed, "report"))
    features, spectra = _spectra(subject, pool, device)

    # relations between the images; the crowd decides on outliers, the queries are shown
    unit = similar.centred(features)
    crowd = similar.nearest_neighbours(maps.leading(unit, dims=DIRECTIONS), k=CROWD)
    queries = torch.linspace(0, len(pool) - 1, min(QUERIES, len(pool))).round().long().unique()
    nearest = similar.nearest_neighbours(unit, k=NEIGHBOURS, queries=queries)
    galleries = _galleries(pool, queries.tolist(), nearest, crowd)

    # maps, with thumbnails of some images and the colour of all
    layouts = _layouts(features, recipe)
    small = pool.thumbnails(torch.arange(len(pool)), side=COLOUR_SIDE).mean((2, 3))
    colours = (255 * (small if colours_shown(recipe.pixels) is None else _stretched(small))).round().byte()
    mapped = _spread_rows(layouts[0].plane, MAX_THUMBNAILS, generator(recipe.seed, "pictured"))
    thumbnails = dict(zip(mapped, webp_thumbnails(pool, mapped, budget=MAP_BUDGET), strict=True))

    sheet, total = contact_sheet(subject, device=device) if subject.same_images else [], sum(map(len, splits.values()))
    return Content(subject, results, rows, spectra, sheet, pool, total, layouts, colours, thumbnails, *galleries)


def _spectra(subject: Subject, pool: Pool, device: torch.device) -> tuple[Float[Tensor, "n f"], list[content.Spectrum]]:
    """The features of the pool, and the spectra of features and projections."""
    network, recipe, blocks = subject.network.to(device).eval(), subject.recipe, []
    for name, images in pool.splits.items():
        title = f"features of {name}"
        blocks.append(extract_features(network.backbone, images, recipe, device=device, progress=title))
    features = torch.cat(blocks)

    # projections as the loss gets them, of whole images instead of views
    dtype = next(network.projector.parameters()).dtype
    with torch.inference_mode():
        z = torch.cat([network.projector(rows.to(device, dtype)).float().cpu() for rows in features.split(4096)])
        z = torch.nn.functional.normalize(z, dim=1) if recipe.loss.normalize else z

    spectra = []
    for name, x in (("backbone features", features.double()), ("projections", z.double())):
        shares, rank = measures.covariance_spectrum(x).tolist(), float(measures.effective_rank(x))
        spectra.append(content.Spectrum(name, shares, rank))
    return features, spectra


def _layouts(features: Float[Tensor, "n f"], recipe: Recipe) -> list[Layout]:
    """Principal components of all images, and a neighbour map of some when PaCMAP is installed."""
    plane, share = maps.principal(features)
    layouts = [Layout("PCA", f"{100 * share.sum().item():.0f} % of the variance", _unit_square(plane))]

    # a neighbour map: PaCMAP needs more rows than a row's neighbours, and a distance above 0
    if find_spec("pacmap") is not None and len(features) > 3 * CROWD and bool((features != features[0]).any()):
        order = torch.randperm(len(features), generator=generator(recipe.seed, "map"))
        rows = order[:MAX_MAPPED].sort().values
        plane = maps.neighbour_map(features[rows], seed=key(recipe.seed, "map"))
        is_sample = len(rows) < len(features)
        caption = "near images stay near" + (f"; {len(rows):,} of {len(features):,} images" if is_sample else "")
        layouts.append(Layout("PaCMAP", caption, _unit_square(plane), rows if is_sample else None))
    return layouts


def _stretched(x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """Mean colours of images whose levels may fill a small part of their range, over all of [0, 1]."""
    low, high = x.amin(0), x.amax(0)
    return (x - low) / (high - low).clamp_min(1e-6)


def _unit_square(plane: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Points moved and scaled into the unit square, both axes by one factor."""
    low, high = plane.amin(0), plane.amax(0)
    scale = (high - low).max().clamp_min(1e-30)
    return (plane - (low + high) / 2) / scale + 0.5


def _spread_rows(plane: Float[Tensor, "n 2"], count: int, generator: torch.Generator) -> list[int]:
    """Rows spread over a map: one from each cell of a grid first, to cover lonely points, then any others."""
    # the cell of each point, in random order
    order = torch.randperm(len(plane), generator=generator)
    side = max(1, int(count**0.5))
    cell = (plane[order] * side).long().clamp(0, side - 1) @ torch.tensor([side, 1])

    # the first of each cell is a random member
    _, first = np.unique(cell.numpy(), return_index=True)
    remaining = np.setdiff1d(np.arange(len(plane)), first)
    return sorted(order[np.concatenate((first, remaining))[:count]].tolist())


def _galleries(
    pool: Pool, queries: list[int], nearest: Neighbours, crowd: Neighbours
) -> tuple[list[content.Neighbourhood], list[Card]]:
    """The neighbourhoods and the outliers, with all their images within one budget."""
    outliers = crowd.cosine.mean(1).argsort()[:SHOWN_OUTLIERS].tolist()
    rows = sorted({*queries, *outliers}.union(*nearest.rows.tolist()))
    webps = webp_thumbnails(pool, rows, budget=GALLERY_BUDGET)
    cards = {row: Card(pool.path(row), pool.label(row), text) for row, text in zip(rows, webps, strict=True)}

    neighbourhoods = []
    for query, rows, cosines in zip(queries, nearest.rows.tolist(), nearest.cosine.tolist(), strict=True):
        neighbours = [cards[row]._replace(cosine=c) for row, c in zip(rows, cosines, strict=True)]
        neighbourhoods.append(content.Neighbourhood(cards[query], neighbours))

    lonely = [cards[row]._replace(cosine=float(crowd.cosine[row].mean())) for row in outliers]
    return neighbourhoods, lonely


def contact_sheet(subject: Subject, *, device: torch.device) -> list[content.SheetRow]:
    """Images of the last training step, with the very views that the network got of them."""
    # the batch of that step, as training reads it
    recipe, pool = subject.recipe, Pool({"train": subject.splits.train})
    batch = batches.read_batch(recipe, subject.splits.train, max(0, subject.step - 1), device, slice(SHEET_IMAGES))
    wholes = [pool.levels(row) for row in batch.indices.tolist()]
    shown = [view_pixels(x, recipe, wholes) for x in batches.apply_views(recipe, batch, device)]

    # one row per image, with a caption for each view
    sheet = []
    for i, row in enumerate(batch.indices.tolist()):
        described = []
        for v, (view, parameters) in enumerate(zip(shown, batch.parameters, strict=True)):
            caption = view_caption(recipe.views[v % 2], parameters, batch.sizes[i], i, colours=recipe.pixels.colours)
            described.append((webp_text(view[i], SHEET_SIDE, quality=85), caption))
        sheet.append(content.SheetRow(pool.path(row), webp_text(pool.pixels(row), SHEET_SIDE), described))
    return sheet


def view_caption(view: View, p: ViewParameters, size: Int[Tensor, " 2"], i: int, *, colours: bool = True) -> str:
    """The random operations of image i's view in words, in their order; `size` is the image's height and width."""
    _, _, height, width = p.box[i].tolist()
    phrases = {
        f"crop {100 * height * width / float(size.prod()):.0f} %": True,
        f"rotated {round(float(p.angle[i]))}°".replace("-", "−"): view.rotate,
        "flipped": p.flip[i],
        "jitter": p.jitter[i],
        "grey": colours and p.grey[i],
        f"blur {float(p.sigma[i]):.1f} px": p.blur[i],
        "solarised": colours and p.solarize[i],
    }
    return " · ".join(phrase for phrase, applied in phrases.items() if applied)
