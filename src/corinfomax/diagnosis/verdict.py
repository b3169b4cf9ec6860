"""Whether a run works, in two sentences from its metrics alone: what was measured, the likely cause, what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from corinfomax.recipes.fields import ALPHA_PER_DIM, OWN, Recipe

Kind = Literal[
    "still warming up",
    "improving",
    "healthy",
    "saturated",
    "recovered",
    "complete collapse",
    "dimensional collapse",
    "over-invariant",
    "under-invariant",
    "diverging",
    "data problem",
]
GOOD: tuple[Kind, ...] = ("still warming up", "improving", "healthy", "saturated")
Row = Mapping[str, Any]

# Each threshold lies between what good and bad runs gave (docs/verdict.md), nearer to the bad ones: a good run called
# bad costs more trust than a bad one named a little later costs time.
EQUAL_IMAGES = 0.05  # variance of a pixel over the images, relative to that of all pixels; 0.5 to 1 in photographs
TWINS = 0.5  # share of images with a nearly equal one; a few in a thousand in sound data
EQUAL_VIEWS = 0.02  # distance of two views of one image relative to that of two images; 0.3 to 0.8 in our recipes
PAST_FLOOR = -0.5  # nats a dimension that the big bang is below its least value: impossible for unit rows
RISE = 1.0  # nats a dimension by which the loss is above its lowest
COLLAPSED = 0.6  # of the way from the big bang's least value to that of a zero covariance; 0.57 was seen and left again
CROWDED = 0.8  # the same way for a kernel's matrix: 0.66 with a sound probe, 0.88 and more in runs that learnt little
FEW = 4.0  # directions that a kernel's projections vary in, or a quarter of few: 13 and more in sound runs
ONE_POINT = 1e-3  # 1 − |mean projection|²: what the projections of two images have not in common
FEW_DIRECTIONS = 3.0  # nats a dimension: 0 for an even spectrum, 3 with half the directions at e^-4.4 of the others
PULLED = {"sgd": 0.03, "lars": 0.03, "adamw": 0.03, "muon": 2e-3}
"""As ONE_POINT, when training had time to spread them: 0.1 to 1 in sound runs. Steps of Muon have one length whatever
the loss's gradient: with 100 times the usual alpha it ends at 0.005 to 0.008 and learns all the same."""
INVARIANT = 0.97  # share of the variance that is between images: nothing of a view is left
UNRELATED = 0.15  # the same share: views hardly tell images apart; 0.3 to 0.9 in sound runs
APART = 1.2  # squared distance of two views, 2 for unrelated ones: a cosine below 0.4
YOUNG = 20  # steps in which the loss still forgets that its covariance began at the identity
LAGGING = 50  # steps in which BatchNorm's running statistics are not yet the network's: held-out spreads look poor
ENOUGH = 3 * LAGGING  # steps in which there are looks after LAGGING in both the first two thirds and the last
SETTLED = 0.3  # share of a run after which the scale of the projections has found its place
GROWING = 0.05  # relative gain of the best measure over the last third of the steps so far
STEADY = 0.01
LOST = 0.1  # share of a run in trouble that is worth a word when it ended well
ODD = 5.0  # times what is usual, from where on a knob is the first suspect
HIDING = 1.0  # eps of a kernel's matrix, whose diagonal is 1, from where on it is the first suspect
TEMPERATURES = (0.03, 3.0)  # of a kernel beyond which they are the first suspect; 0.125 to 0.5 learn alike
USUAL_LR = {"sgd": 1.0, "adamw": 2e-3, "lars": 10.0, "muon": 0.05}
FAST = 10  # times the usual learning rate, above which that is the first suspect
BEST = "ldmi"  # ranks checkpoints as well as any (docs/verdict.md)


class Verdict(NamedTuple):
    """What can be said of a run after its last look."""

    kind: Kind
    evidence: str
    """A sentence: what was measured, with numbers."""
    advice: str
    """A sentence: the likely cause and what to change, or what to do with a good run."""
    measures: dict[str, float]
    """What the sentences rest on."""

    @property
    def text(self) -> str:
        return f"{self.kind}: {self.evidence} {self.advice}"


def judge(
    rows: Sequence[Row], recipe: Recipe, *, steps: int, ended: bool = False, error: str | None = None
) -> Verdict | None:
    """The verdict on a run of `steps` steps from the rows of its metrics.jsonl; None before the first look.

    `ended` is a run that has all its steps; `error` is why it broke off. The first of these that holds is said: the
    data is at fault, the numbers are impossible, all images are at one point or in few directions, views make no
    difference or more than images do, the loss rises; and only then how far the run has come. Of objectives to
    compare with only the data and the error are judged: the thresholds are not known for them.
    """
    looks = [row for row in rows if "views_differ" in row]
    if error is not None:
        return (looks and _data(looks[-1])) or Verdict(
            "diverging", f"It broke off: {error.partition(';')[0]}.", _cause(recipe), {}
        )
    if not looks:
        return None
    if recipe.loss.name not in OWN:
        return _data(looks[-1])
    share = rows[-1]["step"] / steps
    return (
        _data(looks[-1])
        or _broken(rows[-1], looks[-1], recipe)
        or _collapse(rows[-1], looks[-1], recipe)
        or _invariance(rows[-1], looks[-1], recipe, share)
        or _rise(rows, recipe)
        or (_recovered(rows, recipe, steps) if ended else None)
        or _progress(looks, recipe, share, ended)
    )


def _recovered(rows: Sequence[Row], recipe: Recipe, steps: int) -> Verdict | None:
    """A run that ends well after long trouble, as one with far too high a learning rate does once that has decayed."""
    places = [place for place, row in enumerate(rows) if "views_differ" in row]
    said = [(rows[place]["step"], judge(rows[: place + 1], recipe, steps=steps)) for place in places]
    trouble = [(step, found) for step, found in said if found is not None and found.kind not in GOOD]
    if not trouble or trouble[-1][0] - trouble[0][0] < LOST * steps:
        return None
    (first, _), (last, found) = trouble[0], trouble[-1]
    evidence = f"It ends sound, but from step {first} to {last} of {steps} it was in {found.kind}."
    return Verdict(
        "recovered", evidence, f"That time was lost: {found.advice[0].lower()}{found.advice[1:]}", found.measures
    )


def best_step(rows: Iterable[Row], kept: Iterable[int]) -> int | None:
    """Which of the steps `kept` has the highest BEST measure, the latest of equals; None where none was looked at."""
    looked = {row["step"]: row[BEST] for row in rows if row.get(BEST) is not None}
    return max((step for step in kept if step in looked), key=lambda step: (looked[step], step), default=None)


def _data(look: Row) -> Verdict | None:
    measures = {name: look[name] for name in ("images_differ", "twins", "views_differ")}
    if look["images_differ"] < EQUAL_IMAGES:
        evidence = f"From image to image a pixel has {look['images_differ']:.1%} of the variance of all pixels."
        advice = "The images are all but one picture, which teaches nothing: name a folder of different ones."
    elif look["twins"] >= TWINS:
        evidence = f"Of the images looked at, {look['twins']:.0%} have a nearly equal one among the others."
        advice = "A few images are repeated over and over and can be learnt by heart: leave the copies out."
    elif look["views_differ"] < EQUAL_VIEWS:
        evidence = f"Two views of an image differ by {look['views_differ']:.1%} of what views of two images do."
        advice = (
            "There is no augmentation to see through, and nothing to learn from it: --views.0.crop-area 0.25 1 "
            "--views.0.jitter 0.8, and the same for --views.1."
        )
    else:
        return None
    return Verdict("data problem", evidence, advice, measures)


def _broken(last: Row, look: Row, recipe: Recipe) -> Verdict | None:
    least, _ = _bounds(recipe, last["step"])
    if look["spread"] is None:
        evidence = f"What the network gives is not finite after step {look['step']}."
    elif last["big_bang"] < least + PAST_FLOOR:
        evidence = f"The big bang is {last['big_bang']:.2f}, and rows of unit length cannot take it below {least:.2f}."
    else:
        return None
    return Verdict("diverging", evidence, _cause(recipe), {"loss": last["loss"], "big_bang": last["big_bang"]})


def _rise(rows: Sequence[Row], recipe: Recipe) -> Verdict | None:
    last = rows[-1]
    lowest = min((row for row in rows if row["step"] > YOUNG), key=lambda row: row["loss"], default=last)
    if last["loss"] <= lowest["loss"] + RISE:
        return None
    evidence = f"The loss rose to {last['loss']:.2f} from the {lowest['loss']:.2f} it had after step {lowest['step']}."
    return Verdict("diverging", evidence, _cause(recipe), {"loss": last["loss"], "lowest": lowest["loss"]})


def _bounds(recipe: Recipe, step: int) -> tuple[float, float]:
    """The least big bang of unit rows, with even spread, and that of rows all at one point, after `step` steps.

    −2 ln of an eigenvalue plus ε: 1/D and 0, but for what is left of the identity at which the covariance began. Those
    of a kernel's matrix are all 1 where no image is like another, and at one point one is the number of images, the
    others 0.
    """
    loss, n = recipe.loss, recipe.batch
    if loss.name == "kernel":
        point = math.log(n + loss.shift) + (n - 1) * math.log(loss.shift)
        return -2 * math.log1p(loss.shift), -2 * point / n
    left = loss.cov_decay**step
    rest = left * loss.cov_init + loss.shift
    least, most = (-2 * math.log((1 - left) * each + rest) for each in (1 / _dim(recipe), 0))
    return least, most


def _dim(recipe: Recipe) -> int:
    return recipe.projector.widths[-1]


def _collapse(last: Row, look: Row, recipe: Recipe) -> Verdict | None:
    least, most = _bounds(recipe, last["step"])
    way = (last["big_bang"] - least) / (most - least) if most > least else 0.0  # an eps beyond all else hides both
    uneven, used = unevenness(look), directions(look)
    measures = {name: look[name] for name in ("spread", "spread_gap", "rank")}
    measures |= {"big_bang": last["big_bang"], "way": way, "uneven": uneven, "directions": used}
    place = f"the big bang is at {last['big_bang']:.3g}, from {least:.3g} for even spread to {most:.3g} for none"
    if last["step"] > YOUNG and way > COLLAPSED and look["spread"] < ONE_POINT:
        evidence = (
            f"The projections of different images are one point but for {look['spread']:.0e} of their length, and "
            f"{place}."
        )
        return Verdict("complete collapse", evidence, _cause(recipe), measures)
    if last["step"] <= LAGGING:
        return None
    if recipe.loss.name == "kernel":  # whose projections spread over few directions where images do
        if way > CROWDED:
            evidence = f"The projections of most images can be foretold from those of others: {place}."
        elif used < min(FEW, _dim(recipe) / 4):
            evidence = f"The projections vary in about {used:.1f} of their {_dim(recipe)} directions."
        else:
            return None
        return Verdict("dimensional collapse", evidence, _cause(recipe, few=look[BEST] is None), measures)
    if uneven > FEW_DIRECTIONS:
        evidence = (
            f"The projections hardly use most of their {_dim(recipe)} directions: the spectrum is "
            f"{uneven:.1f} nats a direction from an even one, and {look['spectrum'][0]:.0%} of the variance is in one."
        )
        return Verdict("dimensional collapse", evidence, _cause(recipe, few=look[BEST] is None), measures)
    return None


def directions(look: Row) -> float:
    """In how many directions the projections vary: exp of the entropy of the shares of their variance."""
    shares = [share for share in look["spectrum"] if share > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def unevenness(look: Row) -> float:
    """The held-out gap freed of the projections' overall scale: 0 for an even spectrum, in nats a dimension."""
    return float(look["spread_gap"] + 2 * math.log(max(look["spread"], 1e-12)))


def _invariance(last: Row, look: Row, recipe: Recipe, share: float) -> Verdict | None:
    distance = _dim(recipe) * last["attraction"]
    measures = {"spread": look["spread"], "agreement": look["agreement"], "distance": distance}
    if (
        last["step"] > LAGGING
        and share >= SETTLED
        and (look["spread"] < PULLED[recipe.optim.name] or look["agreement"] > INVARIANT)
    ):
        evidence = (
            f"Projections of different images have all but {look['spread']:.1%} in common, and "
            f"{look['agreement']:.0%} of what is left tells images apart."
        )
        return Verdict("over-invariant", evidence, _cause(recipe), measures)
    if last["step"] > LAGGING and share >= SETTLED and look["agreement"] < UNRELATED:
        evidence = (
            f"Only {look['agreement']:.0%} of what projections differ by is between images, the rest between views of "
            "one image."
        )
        return Verdict("under-invariant", evidence, _cause_apart(recipe), measures)
    if last["step"] > YOUNG and recipe.loss.normalize and distance > APART:
        evidence = (
            f"Two views of an image have a mean cosine of {1 - distance / 2:.2f}, hardly more than two images have."
        )
        return Verdict("under-invariant", evidence, _cause_apart(recipe), measures)
    return None


def _progress(looks: Sequence[Row], recipe: Recipe, share: float, ended: bool) -> Verdict:
    last = looks[-1]
    known = [look for look in looks if look[BEST] is not None and look["step"] > LAGGING]
    measures = {name: last[name] for name in (BEST, "rank", "agreement", "spread_gap") if last[name] is not None}
    whose = "held-out images" if last["held_out"] else "the images"
    state = (
        f"views of {whose} share {last[BEST]:.2f} nats a dimension" if last[BEST] is not None else f"of {whose}"
    ) + f", {last['rank']:.0f} of {_dim(recipe)} directions are in use"
    if ended and last[BEST] is None:
        evidence = f"It ended sound: {state.removeprefix(f'of {whose}, ')}."
        advice = (
            f"With fewer than {2 * _dim(recipe)} images to look at, what views share cannot be measured: add images."
        )
        return Verdict("healthy", evidence, advice, measures)
    before = [look for look in known if look["step"] <= last["step"] * 2 / 3]
    if not before or (share < SETTLED and not ended):
        evidence = f"After {share:.0%} of the steps {state}."
        advice = (
            f"The run was too short to say more: --epochs {math.ceil(recipe.epochs * ENOUGH / last['step'])}."
            if ended
            else "Nothing looks wrong so far."
        )
        return Verdict("still warming up", evidence, advice, measures)
    top, then = max(known, key=lambda look: look[BEST]), before[-1]
    gain = (last[BEST] - then[BEST]) / max(abs(then[BEST]), 1e-3)
    evidence = (
        f"After step {last['step']} {state}, and the shared part changed by {gain:+.0%} since step {then['step']}."
    )
    kind: Kind
    if gain >= GROWING:
        kind = "improving"
        advice = (
            f"It was still learning when it ended: --epochs {2 * recipe.epochs:g} would give more."
            if ended
            else "Let it run."
        )
    elif gain < STEADY and top["step"] <= then["step"]:
        kind = "saturated"
        advice = f"Nothing was gained since step {top['step']}: stop here, or spend the time on more images."
    else:
        kind, advice = "healthy", "It has learnt what it can in this schedule." if ended else "Let it run to its end."
    return Verdict(kind, evidence, advice, measures)


def _cause(recipe: Recipe, *, few: bool = False) -> str:
    """The likeliest cause of a collapse or divergence: the first knob out of the ordinary, else that there are too
    `few` images for the projector's width, else the learning rate."""
    loss, optim = recipe.loss, recipe.optim
    usual, alpha = _alphas(recipe)
    if loss.name not in OWN:  # whose other knobs say nothing
        return f"A learning rate of {optim.lr:g} is the likely cause: --optim.lr {optim.lr / 3:.2g}."
    if not loss.normalize:
        return "Without unit rows the projections grow instead of spreading: --loss.normalize."
    if alpha > ODD * usual:
        return (
            f"An alpha of {alpha:g}, {alpha / usual:.0f} times the usual 3.906·D, pulls everything together: "
            f"--loss.alpha {usual:.0f}."
        )
    if loss.name == "kernel":
        if loss.shift > HIDING:
            return f"An eps of {loss.shift:g} hides from the log det which images are alike: --loss.eps 0.001."
        if not TEMPERATURES[0] <= loss.temperature <= TEMPERATURES[1]:
            what = "all images as alike" if loss.temperature > 1 else "no images as alike"
            return f"A temperature of {loss.temperature:g} counts {what}: --loss.temperature 0.25."
    elif loss.shift > 0.01 / _dim(recipe):
        return f"An eps of {loss.shift:g} hides empty directions from the log det: --loss.eps 1e-8."
    if loss.cov_decay > 0.5:
        return (
            f"A past that weighs {loss.cov_decay:g} leaves the log det hardly a pull on the present batch: "
            "--loss.cov-decay 0.01."
        )
    fast = optim.lr > FAST * USUAL_LR[optim.name]
    if optim.weight_decay > 0.02 and optim.name == "sgd" and not fast:
        return f"A weight decay of {optim.weight_decay:g} shrinks the weights to nothing: --optim.weight-decay 1e-4."
    if few and not fast:
        dim = _dim(recipe)
        return f"Fewer than {2 * dim} images to look at are too few to spread over {dim} directions: add images."
    cure = f"--optim.lr {min(optim.lr / 3, USUAL_LR[optim.name]):.2g}"
    also = " and --projector.batch-norm" if not recipe.projector.batch_norm else ""
    return f"A learning rate of {optim.lr:g} is the likely cause: {cure}{also}."


def _cause_apart(recipe: Recipe) -> str:
    usual, alpha = _alphas(recipe)
    if alpha < usual / 2:
        return f"An alpha of {alpha:g}, where 3.906·D is usual, hardly pulls views together: --loss.alpha {usual:.0f}."
    return (
        "The views have too little in common, or the network is too small for them: --views.0.crop-area 0.25 1, and "
        "the same for --views.1."
    )


def _alphas(recipe: Recipe) -> tuple[float, float]:
    """The usual alpha and the recipe's."""
    usual = ALPHA_PER_DIM * _dim(recipe)
    return usual, usual if recipe.loss.alpha is None else recipe.loss.alpha
