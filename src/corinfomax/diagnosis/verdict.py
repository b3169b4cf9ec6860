"""The verdict on a run without labels, in two sentences: the finding, then cause and cure.

It follows from the rows of metrics.jsonl and the recipe alone. docs/verdict.md shows the runs that set the thresholds
and how often the verdict is right.
"""

import math
from collections.abc import Iterable, Sequence
from typing import get_args

from corinfomax.recipes.fields import ALPHA_PER_DIM, Recipe
from corinfomax.runtime.records import DataMeasures, Kind, Measures, Row, SoundKind, Verdict

GOOD: tuple[Kind, ...] = get_args(SoundKind)
ENDS_SOUND: tuple[Kind, ...] = (*GOOD, "recovered")
BEST = "ldmi"  # ranks checkpoints as well as any other measure (docs/measures.md)

# Each threshold lies between the values of good and bad runs, nearer to the bad ones: calling a good run bad costs
# more trust than naming a bad run a little later costs time.
EQUAL_IMAGES = 0.05  # variance of a pixel over the images, relative to all pixels; 0.5 to 1 in photographs
TWINS = 0.5  # share of images that nearly equal another; a few in a thousand in sound data
EQUAL_VIEWS = 0.02  # distance between two views of an image, relative to two images; 0.3 to 0.8 in our recipes
BELOW_BOUND = -0.5  # nats per dimension below the big bang's lower bound: impossible for unit rows
RISE = 1.0  # nats per dimension above the lowest loss
COLLAPSED = 0.6  # of the range from even spread to zero covariance; one sound run passed through 0.57
CROWDED = 0.8  # the same share for a kernel's matrix: 0.66 with a sound probe, 0.88 and more in poor runs
FEW_DIRECTIONS = 4.0  # effective directions of a kernel's projections, or D/4 when that is less; sound runs have 13+
ONE_POINT = 1e-3  # spread of projections that coincide
UNEVEN = 3.0  # nats per dimension: 0 for an even spectrum, 3 with half the directions at e^-4.4 of the others
COINCIDE = {"sgd": 0.03, "adamw": 0.03, "muon": 2e-3}
"""Spread of projections that nearly coincide in a run past its start; sound runs have 0.1 to 1. Muon's steps keep their
length whatever the gradient: with 100 times the usual alpha it ends at 0.005 to 0.008, and learns all the same."""
INVARIANT = 0.97  # agreement when no trace of a view is left
UNRELATED = 0.15  # agreement when views hardly tell images apart; 0.3 to 0.9 in sound runs
APART = 1.2  # squared distance between two views, 2 for unrelated ones: a cosine below 0.4
YOUNG = 20  # steps during which the covariance still forgets its initial identity
LAGGING = 50  # steps before BatchNorm's running statistics follow: held-out spreads look poor until then
ENOUGH = 3 * LAGGING  # steps of a run with looks after LAGGING in its first two thirds and in its last third
SETTLED = 0.3  # share of a run after which the scale of the projections has settled
GROWING = 0.05  # relative gain of the best measure over the last third of the steps so far
STEADY = 0.01
SAME = 0.9995  # linear CKA with the features of the start; sound runs of 184 steps end at 0.57 to 0.998
DISTURBED = 0.9  # the same CKA while the backbone is not trained; 0.36 with new statistics, 1 with those of the weights
FORGOTTEN = 0.5  # effective rank of the features, relative to the start; sound runs end at 0.77 and more
MOSTLY = 0.9  # share of the steps
LOST = 0.1  # share of a run in trouble worth a remark after a sound end

# Settings this far from their usual values are a likely cause.
LARGE_ALPHA = 5.0  # times 3.906·D
LARGE_EPS = 1.0  # for a kernel's matrix, whose diagonal is 1
TEMPERATURES = (0.03, 3.0)  # 0.125 to 0.5 learn alike
LARGE_DECAY = 0.02  # weight decay of SGD; decoupled decay (AdamW, Muon) is another scale
USUAL_LR = {"sgd": 1.0, "adamw": 2e-3, "muon": 0.05}
FAST = 10  # times the usual learning rate


def judge(
    rows: Sequence[Row], recipe: Recipe, *, steps: int, ended: bool = False, error: str | None = None
) -> Verdict | None:
    """The verdict on a run of `steps` steps from its rows of metrics; None before the first look.

    `ended` marks a run that has made all its steps, `error` is the message of one that broke off. The first problem
    wins: bad data, impossible numbers, a collapse, odd views, a rising loss. Without one it tells how far the run is.
    """
    looks = [row for row in rows if row.look is not None and row.step > 0]  # before, the projector is random
    look = looks[-1].look if looks else None
    problem = None if look is None else _data_problem(look.data)
    if error is not None:
        return problem or _diverging(f"The run broke off: {error.partition(';')[0]}.", recipe)
    if look is None or problem is not None:
        return problem
    last, measures = rows[-1], look.measures
    if last.big_bang is None:
        return None  # a criterion of the caller's own: the thresholds are calibrated for CorInfoMax only

    # Numbers that no sound network gives.
    lowest, _ = big_bang_range(recipe, last.step)
    if measures is None or last.big_bang < lowest + BELOW_BOUND:
        not_finite = f"The network's output is not finite after step {looks[-1].step}."
        too_low = f"The big bang is {last.big_bang:.2f}; rows of unit length cannot take it below {lowest:.2f}."
        evidence = not_finite if measures is None else too_low
        return _diverging(evidence, recipe, loss=last.loss, big_bang=last.big_bang)

    share = last.step / steps
    return (
        _collapse(last, looks[-1].step, measures, recipe)
        or _invariance(last, looks[-1].step, measures, recipe, share)
        or _features_lost(rows, recipe, steps)
        or _rising(rows, recipe)
        or (_recovered(rows, recipe, steps) or _unchanged(measures, recipe, last.step) if ended else None)
        or _progress(_comparable(looks, recipe, ended), recipe, share, ended)
    )


def _comparable(looks: Sequence[Row], recipe: Recipe, ended: bool) -> Sequence[Row]:
    """The looks that show a trend: without the last one of a run that averages its weights at the end."""
    return looks[:-1] if ended and recipe.tuning.average < 1 and len(looks) > 1 else looks


def best_step(rows: Iterable[Row], steps: Iterable[int]) -> int | None:
    """The step of `steps` with the highest BEST measure, the latest of equals; None when none was measured."""
    measured = {row.step: best for row in rows if (best := _best(row)) is not None}
    return max((step for step in steps if step in measured), key=lambda step: (measured[step], step), default=None)


def _best(row: Row) -> float | None:
    if row.step == 0:  # the projector is random
        return None
    return None if row.look is None or row.look.measures is None else row.look.measures.ldmi


def _diverging(evidence: str, recipe: Recipe, **numbers: float) -> Verdict:
    return Verdict("diverging", evidence, _cause_of_collapse(recipe), numbers)


def _data_problem(data: DataMeasures) -> Verdict | None:
    images, views = _percent(data.images_differ, 1), _percent(data.views_differ, 1)
    if data.images_differ < EQUAL_IMAGES:
        evidence = f"All images look the same: {images} of the pixels' variance is between images."
        advice = "One picture teaches nothing: name a folder of different images."
    elif data.twins >= TWINS:
        evidence = f"Most images repeat: {_percent(data.twins)} nearly equal another one."
        advice = "A few repeated images can be memorised: remove the copies; corinfomax doctor lists them."
    elif data.views_differ < EQUAL_VIEWS:
        evidence = f"Two views of an image differ by only {views} of the distance between two images."
        flags = "--views.0.crop-area 0.25 1 --views.0.jitter 0.8, and the same for --views.1"
        advice = f"Without augmentation there is nothing to learn: try {flags}."
    elif data.better_input is not None:
        evidence = f"The first BatchNorm of the weights matches images normalised with {data.better_input}, not these."
        advice = "The weights expect other input: start again with these flags."
    else:
        return None
    numbers = {name: value for name, value in data._asdict().items() if name != "better_input"}
    return Verdict("data problem", evidence, advice, numbers)


def big_bang_range(recipe: Recipe, step: int) -> tuple[float, float]:
    """The big bang of evenly spread unit rows and of rows that coincide, after `step` steps.

    It is the mean of −2 ln(eigenvalue + ε). The covariance's eigenvalues are 1/D when even and 0 at one point, apart
    from the rest of the initial identity. A kernel's are 1 when no two of n images are alike; when all are, n and 0s.
    """
    loss, n = recipe.loss, recipe.batch
    if loss.name == "kernel":
        log_det = math.log(n + loss.shift) + (n - 1) * math.log(loss.shift)
        return -2 * math.log1p(loss.shift), -2 * log_det / n
    remaining = loss.cov_decay**step
    rest = remaining * loss.cov_init + loss.shift
    return -2 * math.log((1 - remaining) * (1 / _dim(recipe)) + rest), -2 * math.log(rest)


def _collapse(last: Row, looked: int, measures: Measures, recipe: Recipe) -> Verdict | None:
    """A collapse, by the last row and the measures after step `looked`."""
    # The place of the big bang between even spread and none; an eps larger than all else hides both.
    big_bang = last.big_bang
    assert big_bang is not None
    even, collapsed = big_bang_range(recipe, last.step)
    collapsed_share = (big_bang - even) / (collapsed - even) if collapsed > even else 0.0
    place = f"the big bang is {big_bang:.3g}, between {even:.3g} for even spread and {collapsed:.3g} for none"

    # The held-out gap without the projections' overall scale, and exp of the entropy of the variance shares.
    dim, shares = _dim(recipe), [share for share in measures.spectrum if share > 0]
    gap = measures.spread_gap + 2 * math.log(max(measures.spread, 1e-12))
    used = math.exp(-sum(share * math.log(share) for share in shares))

    numbers = {name: getattr(measures, name) for name in ("spread", "spread_gap", "rank")}
    numbers |= {"big_bang": big_bang, "way": collapsed_share, "uneven": gap, "directions": used}
    if looked > YOUNG and collapsed_share > COLLAPSED and measures.spread < ONE_POINT:
        evidence = f"The projections of all images coincide (spread {measures.spread:.0e}); {place}."
        return Verdict("complete collapse", evidence, _cause_of_collapse(recipe), numbers)
    if looked <= LAGGING:
        return None

    # A kernel spreads images instead of directions, so its own matrix tells of a collapse.
    kernel = recipe.loss.name == "kernel"
    if kernel and collapsed_share > CROWDED:
        evidence = f"Most images can be predicted from the others' projections: {place}."
    elif kernel and used < min(FEW_DIRECTIONS, dim / 4):
        evidence = f"The projections vary in only about {used:.1f} of {dim} dimensions."
    elif not kernel and gap > UNEVEN:
        rest = f"of the variance ({gap:.1f} nats per dimension from an even spectrum)"
        evidence = f"Most of the {dim} dimensions are hardly used: one holds {_percent(measures.spectrum[0])} {rest}."
    else:
        return None
    advice = _cause_of_collapse(recipe, few_images=measures.ldmi is None)
    return Verdict("dimensional collapse", evidence, advice, numbers)


def _invariance(last: Row, looked: int, measures: Measures, recipe: Recipe, share: float) -> Verdict | None:
    distance, agreement = _dim(recipe) * last.attraction, _percent(measures.agreement)
    numbers = {"spread": measures.spread, "agreement": measures.agreement, "distance": distance}

    # No trace of the views, then hardly any of the images.
    settled = looked > LAGGING and share >= SETTLED
    coincide = measures.spread < COINCIDE[recipe.optim.name]
    if settled and (coincide or measures.agreement > INVARIANT):
        near = f"Projections nearly coincide (spread {_percent(measures.spread, 1)})"
        evidence = f"{near if coincide else 'Views leave no trace'}; {agreement} of the variance separates images."
        return Verdict("over-invariant", evidence, _cause_of_collapse(recipe), numbers)
    if settled and measures.agreement < UNRELATED:
        evidence = f"Only {agreement} of the variance separates images; the rest is between views."
    elif last.step > YOUNG and recipe.loss.normalize and distance > APART:
        cosine = f"{1 - distance / 2:.2f}"
        evidence = f"Two views of an image have a mean cosine of {cosine}, hardly above that of two images."
    else:
        return None

    # The cause: alpha, or the views.
    usual = ALPHA_PER_DIM * _dim(recipe)
    alpha = usual if recipe.loss.alpha is None else recipe.loss.alpha
    flags = "--views.0.crop-area 0.25 1 and --views.1.crop-area 0.25 1"
    advice = f"The views have too little in common, or the network is too small for them: try {flags}."
    if alpha < usual / 2:
        advice = f"With an alpha of {alpha:g} views are hardly pulled together: try the usual --loss.alpha {usual:.0f}."
    return Verdict("under-invariant", evidence, advice, numbers)


def _features_lost(rows: Sequence[Row], recipe: Recipe, steps: int) -> Verdict | None:
    """Features of a run from weights that are no longer those of the start, or use half of their dimensions."""
    measured = {row.step: row.look.measures for row in rows if row.look is not None and row.look.measures is not None}
    if 0 not in measured:
        return None
    start, last, tuning = measured[0], measured[max(measured)], recipe.tuning

    # While the projector is trained alone, only BatchNorm's statistics can change the features.
    alone = [m.cka for step, m in measured.items() if 0 < step <= tuning.projector_share * steps]
    cka = alone[-1] if alone else None
    if cka is not None and cka < DISTURBED:
        evidence = f"New BatchNorm statistics alone have changed the features of the start (CKA {cka:.2f})."
        return Verdict("features lost", evidence, "Keep the old ones: try --tuning.batch-norm keep.", {"cka": cka})
    if last.rank_features >= FORGOTTEN * start.rank_features:
        return None
    numbers = {"rank_features": last.rank_features, "before": start.rank_features}
    used = f"The features use about {last.rank_features:.0f} dimensions"
    advice = f"The backbone's learning rate is too high: try --tuning.lr-scale {tuning.lr_scale / 10:.2g}."
    return Verdict("features lost", f"{used}; those of the start used {start.rank_features:.0f}.", advice, numbers)


def _rising(rows: Sequence[Row], recipe: Recipe) -> Verdict | None:
    last = rows[-1]
    lowest = min((row for row in rows if row.step > YOUNG), key=lambda row: row.loss, default=last)
    if last.loss <= lowest.loss + RISE:
        return None
    evidence = f"The loss rose to {last.loss:.2f} from {lowest.loss:.2f} after step {lowest.step}."
    return _diverging(evidence, recipe, loss=last.loss, lowest=lowest.loss)


def _recovered(rows: Sequence[Row], recipe: Recipe, steps: int) -> Verdict | None:
    """A sound end after long trouble, as with a learning rate far too high until it has decayed."""
    verdicts = [(row.step, judge(rows[: i + 1], recipe, steps=steps)) for i, row in enumerate(rows) if row.look]
    trouble = [(step, verdict) for step, verdict in verdicts if verdict is not None and verdict.kind not in GOOD]
    if not trouble or trouble[-1][0] - trouble[0][0] < LOST * steps:
        return None

    (first, _), (last, verdict) = trouble[0], trouble[-1]
    evidence = f"The run ends sound, but from step {first} to {last} of {steps} its verdict was {verdict.kind}."
    return Verdict("recovered", evidence, f"Those steps were lost. {verdict.advice}", verdict.measures)


def _unchanged(measures: Measures, recipe: Recipe, steps: int) -> Verdict | None:
    """A run that ends with the features it started from."""
    if measures.cka is None or measures.cka < SAME:
        return None
    tuning, numbers = recipe.tuning, {"cka": measures.cka}
    evidence = f"The features are still those of the start (CKA {measures.cka:.5f}): only the projector has learnt."
    advice = f"The backbone's learning rate is too low: try --tuning.lr-scale {10 * tuning.lr_scale:g}."
    if tuning.projector_share > MOSTLY:
        advice = "The projector was trained alone for most of the run: try --tuning.projector-share 0.2."
    elif steps < ENOUGH:
        epochs = math.ceil(recipe.epochs * ENOUGH / steps)
        advice = f"A run of {steps} steps is too short to change them: try a new run with --epochs {epochs}."
    return Verdict("unchanged", evidence, advice, numbers)


def _progress(looks: Sequence[Row], recipe: Recipe, share: float, ended: bool) -> Verdict:
    """Progress of a sound run."""
    last, look = looks[-1], looks[-1].look
    assert look is not None and look.measures is not None
    dim, image = _dim(recipe), "a held-out image" if look.held_out else "an image"
    used = f"{look.measures.rank:.0f} of {dim} dimensions are used"
    numbers = {name: getattr(look.measures, name) for name in (BEST, "rank", "agreement", "spread_gap")}
    numbers = {name: value for name, value in numbers.items() if value is not None}

    # Too few images to compare views, or to learn from.
    best = look.measures.ldmi
    if ended and best is None:
        steps = "one step" if last.step == 1 else f"{last.step} steps"
        short = f", in a run of only {steps}" if last.step < ENOUGH else ""
        advice = f"Fewer than {2 * dim} images were measured, too few to tell how much views share{short}: add images."
        return Verdict("too few to say", f"Nothing looks wrong: {used}.", advice, numbers)

    # Too early to compare with the last look of the first two thirds.
    measured = [(row.step, value) for row in looks if (value := _best(row)) is not None and row.step > LAGGING]
    before = [(step, value) for step, value in measured if step <= last.step * 2 / 3]
    if best is None or not before or (share < SETTLED and not ended):
        shared = "" if best is None else f"two views of {image} share {best:.2f} nats per dimension; "
        epochs = math.ceil(recipe.epochs * ENOUGH / last.step)
        longer = f"The run was too short to say more: try a new run with --epochs {epochs}."
        if last.step >= ENOUGH:
            longer = "Too few measurements to say more: raise --diagnoses."
        when = f"After step {last.step}" if ended else f"After {_percent(share)} of the steps"
        evidence = f"{when} {shared}{used}."
        return Verdict("still warming up", evidence, longer if ended else "Nothing looks wrong so far.", numbers)

    # The gain since then, and the step with the most.
    (then, earlier), (top, _) = before[-1], max(measured, key=lambda pair: pair[1])
    gain = (best - earlier) / max(abs(earlier), 1e-3)
    change = f"{_percent(gain, sign='+')} since step {then}"
    evidence = f"Two views of {image} share {best:.2f} nats per dimension ({change}); {used}."
    if gain >= GROWING:
        # LDMI rises whenever the learning rate falls, so it does not predict what more epochs would add
        return Verdict("improving", evidence, "The run ended sound." if ended else "Let it run.", numbers)
    if gain < STEADY and top <= then:
        advice = f"No gain since step {top}: stop here, or spend the time on more images."
        return Verdict("saturated", evidence, advice, numbers)
    advice = "It has learnt what this schedule allows." if ended else "Let it run to the end."
    return Verdict("healthy", evidence, advice, numbers)


def _cause_of_collapse(recipe: Recipe, *, few_images: bool = False) -> str:
    """Likely cause and its cure: a setting far from its usual value, too few images, or the learning rate."""
    if advice := _odd_loss(recipe):
        return advice

    # The learning rate outranks weight decay and few images, but only when it is far too high.
    optim, dim = recipe.optim, _dim(recipe)
    fast = optim.lr > FAST * USUAL_LR[optim.name]
    if optim.name == "sgd" and optim.weight_decay > LARGE_DECAY and not fast:
        decay = f"{optim.weight_decay:g}"
        return f"A weight decay of {decay} shrinks the weights to nothing: try --optim.weight-decay 1e-4."
    if few_images and not fast:
        return f"Fewer than {2 * dim} images were measured, too few to spread over {dim} dimensions: add images."
    batch_norm = "" if recipe.projector.batch_norm else " and --projector.batch-norm"
    lr = min(optim.lr / 3, USUAL_LR[optim.name])
    return f"The learning rate {optim.lr:g} is the likely cause: try --optim.lr {lr:.2g}{batch_norm}."


def _odd_loss(recipe: Recipe) -> str | None:
    """The first setting of the loss that is far from its usual value."""
    loss, eps, (low, high) = recipe.loss, recipe.loss.shift, TEMPERATURES
    usual = ALPHA_PER_DIM * _dim(recipe)
    alpha = usual if loss.alpha is None else loss.alpha
    if not loss.normalize:
        return "Without L2 normalisation the projections grow instead of spreading: add --loss.normalize."
    if alpha > LARGE_ALPHA * usual:
        times = f"{alpha:g}, {alpha / usual:.0f} times the usual 3.906·D"
        return f"An alpha of {times}, pulls everything together: try --loss.alpha {usual:.0f}."

    # The kernel's own settings, then the covariance's.
    if loss.name == "kernel" and eps > LARGE_EPS:
        return f"An eps of {eps:g} hides from the log det which images are alike: try --loss.eps 0.001."
    if loss.name == "kernel" and not low <= loss.temperature <= high:
        number = "all" if loss.temperature > high else "no"
        return f"A temperature of {loss.temperature:g} counts {number} images as alike: try --loss.temperature 0.25."
    if loss.name == "corinfomax" and eps > 0.01 / _dim(recipe):
        return f"An eps of {eps:g} hides empty dimensions from the log det: try --loss.eps 1e-8."
    if loss.name == "corinfomax" and (past := loss.cov_decay) > 0.5:
        return f"A cov-decay of {past:g} leaves the current batch almost no weight: try --loss.cov-decay 0.01."
    return None


def _dim(recipe: Recipe) -> int:
    return recipe.projector.widths[-1]


def _percent(share: float, digits: int = 0, *, sign: str = "") -> str:
    return f"{100 * share:{sign}.{digits}f} %"
