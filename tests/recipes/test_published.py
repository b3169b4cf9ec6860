"""The published rows exactly, and recipes as data."""

import dataclasses
import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from corinfomax.recipes import fields, published
from corinfomax.recipes.fields import Recipe, View
from corinfomax.recipes.published import RECIPES

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# From the paper's tables: size, backbone, small stem, epochs, batch, lr, least lr, warm-up, widths, alpha, λ, top-1.
PUBLISHED = {
    "cifar10": (32, "resnet18", True, 1000, 512, 0.5, 1e-6, 10, (2048, 2048, 64), 250, 0.01, 93.18),
    "cifar100": (32, "resnet18", True, 1000, 512, 0.5, 1e-6, 10, (4096, 4096, 128), 1000, 0.01, 71.61),
    "tiny-imagenet": (64, "resnet50", False, 800, 1024, 0.5, 1e-6, 10, (4096, 4096, 128), 500, 0.1, 54.86),
    "imagenet100-r18": (224, "resnet18", False, 400, 1024, 1.0, 5e-3, 10, (4096, 4096, 128), 500, 0.01, 80.48),
    "imagenet100-r50": (224, "resnet50", False, 200, 1024, 1.0, 5e-3, 5, (4096, 4096, 128), 500, 0.01, 82.64),
    "imagenet1k": (224, "resnet50", False, 100, 1536, 0.2, 1e-6, 10, (8192, 8192, 512), 2000, 0.1, 69.08),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name):
    entry = RECIPES[name]
    r = entry.recipe
    assert PUBLISHED[name] == (
        r.size,
        r.backbone.name,
        r.backbone.small_stem,
        r.epochs,
        r.batch,
        r.optim.lr,
        r.optim.min_lr,
        r.optim.warmup_epochs,
        r.projector.widths,
        r.loss.alpha,
        r.loss.cov_decay,
        entry.paper,
    )
    assert r.loss.mean_decay == r.loss.cov_decay
    assert (r.loss.shift, r.loss.cov_init, r.loss.normalize) == (1e-8, 1.0, True)
    assert r.projector.batch_norm == (name == "imagenet1k")
    assert (r.optim.name, r.optim.momentum, r.optim.weight_decay, r.optim.decay_norms) == ("sgd", 0.9, 1e-4, True)
    assert (r.optim.schedule, r.optim.start_lr) == ("epoch", 3e-3)
    assert (r.backbone.layers, r.backbone.channels, r.backbone.stem_stride) == (None, None, 1)
    assert (r.probe.epochs, r.probe.batch) == (100, 256)
    assert (r.probe.lr, r.probe.decay_epochs) == ((25.0, 20) if name == "imagenet1k" else (0.2, None))
    stats = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    assert (r.mean, r.std) == stats.get(name, IMAGENET)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_views(name):
    both = {
        "rotate": 0.0,
        "crop_area": (0.08, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "grey": 0.2,
        "blur_sigma": (0.1, 2.0),
    }
    first, second = map(dataclasses.asdict, RECIPES[name].recipe.views)
    assert first == {**both, "blur": 1.0, "solarize": 0.0}
    assert second == {**both, "blur": 0.1, "solarize": 0.2}


def test_published_rows_obey_the_rule_for_alpha():
    for name, row in PUBLISHED.items():
        expected = fields.ALPHA_PER_DIM * row[8][-1] * (2 if name == "cifar100" else 1)
        assert row[9] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    recipe = RECIPES[name].recipe
    assert fields.from_json(json.loads(json.dumps(fields.to_json(recipe)))) == recipe


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("size"), "size"),
        (lambda r: r.update(colour=1), "colour"),
        (lambda r: r.update(size="32"), r"recipe\.size must be"),
        (lambda r: r.update(batch=True), r"recipe\.batch must be"),
        (lambda r: r["optim"].update(name="adam"), r"recipe\.optim\.name must be"),
        (lambda r: r["loss"].update(name="vicreg"), r"recipe\.loss\.name must be"),
        (lambda r: r.pop("n_views"), r"unknown: \['n_views'\]"),
        (lambda r: r["views"].pop(), r"recipe\.views must be"),
        (lambda r: r["projector"].update(widths=[64, None]), r"recipe\.projector\.widths\[1\] must be"),
        (lambda r: r["views"][0].update(crop_area=[0.1]), r"recipe\.views\[0\]\.crop_area must be"),
        (lambda r: r.update(batch=1), "batch is 1"),
    ],
)
def test_a_damaged_recipe_is_an_error_that_names_the_field(damage, message):
    content = json.loads(json.dumps(fields.to_json(Recipe())))
    damage(content)
    with pytest.raises(ValueError, match=message):
        fields.from_json(content)
    with pytest.raises(ValueError, match="recipe must have"):
        fields.from_json(None)


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match=r"unknown recipe 'cifar-10' \(did you mean cifar10\?\).*imagenet1k"):
        published.find_recipe("cifar-10")


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["cifar10"].recipe.epochs = 3


@pytest.mark.parametrize(
    ("side", "count", "cuda", "name", "size"),
    [
        (32, 50_000, False, "cpu-small", 24),
        (500, 3_000, False, "cpu-small", 32),
        (10, 3_000, False, "cpu-small", 24),
        (32, 50_000, True, "cifar10-fast", 32),
        (64, 100_000, True, "cifar10-fast", 64),
        (500, 100_000, True, "imagenet100-r18", 224),
    ],
)
def test_the_automatic_choice_fits_size_count_and_hardware(side, count, cuda, name, size):
    chosen, recipe, why = published.choose("./somewhere", count, side, cuda=cuda)
    assert (chosen, recipe.size) == (name, size)
    assert recipe.backbone == RECIPES[name].recipe.backbone
    assert recipe.views == RECIPES[name].recipe.views
    assert 1 <= recipe.epochs <= 1000
    assert recipe.optim.warmup_epochs <= recipe.epochs / 10
    assert name in why
    more = published.choose("./somewhere", 10 * count, side, cuda=cuda)[1]
    assert more.epochs < recipe.epochs or recipe.epochs == 1 or more.epochs == recipe.epochs == 1000


def test_cifar_s_images_get_the_recipe_that_was_measured_on_them():
    assert published.choose("./somewhere", 50_000, 32, cuda=False)[1] == RECIPES["cpu-small"].recipe


def test_the_fast_recipe_is_the_paper_s_network_with_what_was_measured_on_two_cores():
    fast, paper, small = (RECIPES[name].recipe for name in ("cifar10-fast", "cifar10", "cpu-small"))
    assert (fast.backbone, fast.size, fast.batch, fast.mean) == (paper.backbone, paper.size, paper.batch, paper.mean)
    assert (fast.projector, fast.optim) == (small.projector, small.optim)
    assert (fast.views, fast.loss) == (small.views, small.loss)
    assert 4 * fast.epochs <= paper.epochs
    chosen = published.choose("cifar10", 50_000, 32, cuda=True)[1]
    assert (chosen.epochs, chosen.optim, chosen.size) == (fast.epochs, fast.optim, fast.size)


def test_the_papers_recipes_are_chosen_by_name_alone():
    for cuda in (False, True):
        assert published.choose("mnist5k", 4000, 28, cuda=cuda)[:2] == ("mnist5k", RECIPES["mnist5k"].recipe)
    assert published.choose("cifar100", 50_000, 32, cuda=True)[0] == "cifar10-fast"
    assert published.choose("cifar100", 50_000, 32, cuda=False)[0] == "cpu-small"


def test_a_shorter_probe_lowers_its_rate_at_the_same_shares():
    assert fields.with_probe_epochs(RECIPES["imagenet1k"].recipe, 10).probe.decay_epochs == 2
    assert fields.with_probe_epochs(RECIPES["imagenet1k"].recipe, 1).probe.decay_epochs == 1
    probe = fields.with_probe_epochs(RECIPES["cifar10"].recipe, 10).probe
    assert (probe.epochs, probe.decay_epochs) == (10, None)


def test_views_for_digits_keep_what_a_digit_means():
    for view in RECIPES["mnist5k"].recipe.views:
        assert view.rotate > 0
        assert view.flip == view.jitter == view.grey == 0
    assert replace(View(), flip=0.1) != View()


@pytest.mark.parametrize(
    "knobs",
    [
        {"flip": 1.1},
        {"blur": -0.1},
        {"rotate": -5.0},
        {"brightness": -0.5},
        {"hue": 0.6},
        {"crop_area": (1.0, 0.08)},
        {"crop_area": (0.5, 1.5)},
        {"crop_ratio": (0.0, 1.0)},
        {"blur_sigma": (0.0, 0.0)},
        {"blur_sigma": (0.1, 5.0)},
    ],
)
def test_impossible_views_are_errors_that_name_the_knob(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        View(**knobs)


@pytest.mark.parametrize(
    ("size", "scale", "side"),
    [(24, 5 / 3, 40), (20, 1.2, 24), (224, 1.0, 224), (30, 1.0, 30), (64, 5 / 3, 108), (4, 0.1, 4), (16, 1.25, 20)],
)
def test_test_views_are_whole_fours_unless_they_are_trainings(size, scale, side):
    recipe = Recipe(size=size, test_scale=scale)
    assert recipe.test_side == side
    assert recipe.resolution == (f"at {size} px" if side == size else f"at {size} px, tested at {side} px")


@pytest.mark.parametrize(
    "knobs",
    [
        {"std": (0.0, 1.0, 1.0)},
        {"test_scale": 0.0},
        {"epochs": 0},
        {"batch": 1},
        {"projector": published.Projector(widths=())},
        {"n_views": 1},
    ],
)
def test_impossible_recipes_are_errors(knobs):
    with pytest.raises(ValueError, match=next(iter(knobs))):
        Recipe(**knobs)


@pytest.mark.parametrize(
    ("side", "count", "short_side", "cuda", "size", "epochs"),
    [
        (224, 3_000, 128, False, 160, 7.2),
        (224, 50_000, 32, False, 96, 1.2),
        (64, 4_000, 28, False, 64, 34),
        (224, 1_000_000, 500, False, 160, 0.022),
        (224, 30, 500, False, 160, 100),
        (224, 50_000, 256, True, 224, 100),
    ],
)
@pytest.mark.parametrize("vit", [False, True])
def test_continuing_takes_minutes_on_a_cpu(vit, side, count, short_side, cuda, size, epochs):
    name, recipe = published.adapt(vit, side, count, short_side, cuda=cuda)
    assert name == ("adapt-vit" if vit else "adapt")
    assert (recipe.size, recipe.epochs) == (size, epochs)
    assert recipe.optim.warmup_epochs == epochs / 10 and recipe.tuning.projector_share == 1 / 6
    assert recipe.tuning.batch_norm == "keep" and recipe.test_scale == 1


def test_the_docs_give_the_settings_of_adapt_as_they_are():
    text = (Path(__file__).parents[2] / "docs/continuing.md").read_text()
    rows = dict(re.findall(r"^\| `--tuning\.(\S+)` \| ([^|]+?) \|", text, flags=re.MULTILINE))
    usual, vit = (fields.flags(published.find_recipe(name).tuning) for name in ("adapt", "adapt-vit"))
    assert rows.pop("layer-decay") == f"{usual.pop('layer-decay'):g}, ViTs {vit.pop('layer-decay'):g}"
    assert usual == vit
    assert rows.pop("projector-share") == f"{Fraction(usual.pop('projector-share')).limit_denominator(99)} of the steps"
    assert rows.pop("batch-norm") == f"`{usual.pop('batch-norm')}`"
    assert rows == {name: f"{value:g}" for name, value in usual.items()}
