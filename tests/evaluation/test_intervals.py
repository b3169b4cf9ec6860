"""Intervals against closed forms, retrieval against brute force and scikit-learn, and what is said of a comparison."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from corinfomax.evaluation import intervals


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("chunk", [1, 700, 2**24])
def test_average_precision_equals_brute_force_and_sklearn(rng, monkeypatch, chunk):
    monkeypatch.setattr(intervals, "COSINES", chunk)
    features, labels = torch.randn(60, 5, generator=rng), torch.randint(7, (60,), generator=rng)
    features += 2 * torch.randn(7, 5, generator=rng)[labels]
    labels[3] = 9  # the only one of its class
    got = intervals.average_precision(features, labels)
    unit = features / features.norm(dim=1, keepdim=True)
    for query in range(60):
        others = [i for i in range(60) if i != query]
        cosine = [float(unit[query] @ unit[i]) for i in others]
        relevant = [int(labels[i] == labels[query]) for i in others]
        if not any(relevant):
            assert query == 3 and got[query].isnan()
            continue
        hits, total = 0, 0.0
        for place, i in enumerate(sorted(range(59), key=lambda i: -cosine[i]), 1):
            hits += relevant[i]
            total += relevant[i] * hits / place
        assert float(got[query]) == pytest.approx(total / sum(relevant), abs=1e-6)
        assert float(got[query]) == pytest.approx(average_precision_score(relevant, cosine), abs=1e-6)


def test_average_precision_on_digits_equals_sklearn():
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:400], dtype=torch.float32), torch.tensor(labels[:400])
    got = intervals.average_precision(x, y)
    unit = pixels[:400] / np.linalg.norm(pixels[:400], axis=1, keepdims=True)
    cosine = unit @ unit.T
    want = [
        average_precision_score(np.delete(labels[:400] == labels[q], q), np.delete(cosine[q], q)) for q in range(400)
    ]
    assert 100 * float(got.mean()) == pytest.approx(100 * np.mean(want), abs=0.01)


def test_equal_rows_keep_their_order_and_the_query_stays_out():
    # Of the three others, in their order, the one of the query's class is second, third, first, second.
    got = intervals.average_precision(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    assert got.tolist() == pytest.approx([1 / 2, 1 / 3, 1, 1 / 2])
    got = intervals.average_precision(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
    assert got.tolist() == pytest.approx([1, 1, 1 / 3, 1 / 3])


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_interval_of_a_share_is_the_binomials(monkeypatch, share):
    monkeypatch.setattr(intervals, "RESAMPLES", 20_000)
    n = 400
    values = (torch.arange(n) < share * n).double()[:, None]
    (low, high) = intervals.central_intervals(intervals.resample_means(values, seed=1))[0]
    # Resampling zeros and ones is drawing from the binomial; its quantiles are a grid of 1/n.
    deviation = math.sqrt(share * (1 - share) / n)
    assert low == pytest.approx(share - 1.96 * deviation, abs=1.5 / n)
    assert high == pytest.approx(share + 1.96 * deviation, abs=1.5 / n)


def test_the_interval_covers_the_truth_as_often_as_it_says(rng, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    covered = 0
    for seed in range(300):
        values = (torch.rand(200, 1, generator=rng) < 0.7).double()
        low, high = intervals.central_intervals(intervals.resample_means(values, seed=seed))[0]
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 300 <= 0.98  # 0.95 ± three deviations of 300 tries


def test_resamples_are_shared_by_columns_repeatable_and_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    values = torch.randn(50, 2, generator=rng, dtype=torch.float64)
    means = intervals.resample_means(torch.cat([values, values[:, :1] - values[:, 1:]], 1), seed=3)
    torch.testing.assert_close(means[:, 2], means[:, 0] - means[:, 1])
    assert means.std(0).min() > 0
    assert not means[:, :2].equal(intervals.resample_means(values, seed=4))
    monkeypatch.setattr(intervals, "COSINES", 50 * 7)
    torch.testing.assert_close(intervals.resample_means(values, seed=3), means[:, :2])


def test_images_without_a_value_are_left_out(rng):
    values = torch.rand(40, 1, generator=rng, dtype=torch.float64)
    holed = torch.cat([values, torch.full((40, 1), torch.nan, dtype=torch.float64)])
    low, high = intervals.central_intervals(intervals.resample_means(holed, seed=0))[0]
    want_low, want_high = intervals.central_intervals(intervals.resample_means(values, seed=0))[0]
    assert (low, high) == pytest.approx((want_low, want_high), abs=0.03)


def outcomes(right: int, n: int) -> torch.Tensor:
    return (torch.arange(n) < right).float()


@pytest.mark.parametrize(
    ("ours", "untrained", "pixels", "verdict", "other", "begins"),
    [
        (800, 600, 500, "better", "untrained", "Pretraining helped: the linear probe reaches 80.0 % on these features"),
        (800, 600, 700, "better", "raw pixels", "Pretraining helped"),
        (600, 602, 300, "unclear", "untrained", "Too little to say"),
        (600, 610, 300, "worse", "untrained", "Pretraining did harm"),
        (500, 400, 900, "worse", "raw pixels", "Pretraining did harm"),
    ],
)
def test_what_is_said_of_a_comparison(ours, untrained, pixels, verdict, other, begins):
    others = {"untrained": outcomes(untrained, 1000), "raw pixels": outcomes(pixels, 1000)}
    got = intervals.compare(outcomes(ours, 1000), others, seed=0)
    assert (got.verdict, got.other) == (verdict, other)
    assert got.low <= got.difference <= got.high
    sentence = intervals.pretraining_sentence(got, got)
    assert sentence.startswith(begins) and sentence.endswith(".") and sentence.count(". ") == 0
    for number in (got.score, got.other_score):
        assert f"{number:.1f} %" in sentence
    if verdict != "unclear":
        assert f"{abs(got.difference):.1f} points {'more' if verdict == 'better' else 'fewer'}" in sentence


def test_a_probe_that_says_the_opposite_is_heard():
    better, worse = (
        intervals.compare(outcomes(n, 1000), {"raw pixels": outcomes(700, 1000)}, seed=0) for n in (800, 600)
    )
    said = intervals.pretraining_sentence(better, worse)
    assert (
        said.startswith("Pretraining helped") and "; but kNN does worse on them, 60.0 and 70.0 % on raw pixels" in said
    )
    said = intervals.pretraining_sentence(worse, better)
    assert said.startswith("Pretraining did harm") and "; but kNN does better on them" in said
    unclear = intervals.compare(outcomes(700, 1000), {"x": outcomes(700, 1000).flip(0)}, seed=0)
    said = intervals.pretraining_sentence(unclear, worse)
    assert said.startswith("Pretraining made no clear difference") and "; but kNN does worse on them" in said
    for agreeing in (better, intervals.compare(outcomes(700, 1000), {"x": outcomes(701, 1000)}, seed=0)):
        assert "kNN" not in intervals.pretraining_sentence(better, agreeing)


def test_chance_is_no_difference(rng):
    verdicts = [
        intervals.compare(
            (torch.rand(500, generator=rng) < 0.6).float(),
            {"x": (torch.rand(500, generator=rng) < 0.6).float()},
            seed=s,
        )
        for s in range(40)
    ]
    assert sum(c.verdict != "unclear" for c in verdicts) <= 6  # 2 expected at 5 %
    unclear = next(c for c in verdicts if c.verdict == "unclear")
    assert intervals.pretraining_sentence(unclear, unclear).startswith("Pretraining made no clear difference")


def test_a_handful_of_images_decides_nothing():
    got = intervals.compare(torch.ones(5), {"x": torch.zeros(5)}, seed=0)
    assert got.verdict == "unclear" and got.low == 100
    assert "the two differ on only 5 of 5 test images" in intervals.pretraining_sentence(got, got)
    assert intervals.compare(torch.ones(6), {"x": torch.zeros(6)}, seed=0).verdict == "better"


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 0), (5, 0), (6, 0), (9, 2), (10, 2), (40, 61), (5000, 5200)])
def test_the_sign_test_equals_scipy(wins, losses):
    want = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert intervals.sign_test(wins, losses) == pytest.approx(want, rel=1e-9)
    assert intervals.sign_test(losses, wins) == pytest.approx(want, rel=1e-9)


def test_a_narrow_interval_alone_decides_nothing():
    """Nine of eleven: every resample that matters is above 0, but a coin does as well in 6.5 % of its tries."""
    ours = torch.cat([torch.ones(9), torch.zeros(2), torch.ones(19)])
    got = intervals.compare(ours, {"x": torch.cat([torch.zeros(9), torch.ones(21)])}, seed=0)
    assert got.low > 0 and got.decided == 11 and got.verdict == "unclear"
    assert intervals.pretraining_sentence(got, got).startswith("Pretraining made no clear difference")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_few_test_images_never_say_that_pretraining_helped(count):
    got = intervals.compare(torch.ones(count), {"x": torch.zeros(count)}, seed=0)
    assert got.verdict == "unclear"
    assert intervals.pretraining_sentence(got, got).startswith("Too little to say")


def test_a_rival_is_named_with_its_numbers():
    got = intervals.compare(outcomes(600, 1000), {"timm:resnet18": outcomes(700, 1000)}, seed=0)
    sentence = intervals.rival_sentence(got)
    assert "pretrained is worse than timm:resnet18: 60.0 and 70.0 %, 10.0 points fewer" in sentence
    assert re.search(r"−1[12]\.\d to −[89]\.\d", sentence)


def test_all_right_on_a_few_images_is_no_certainty():
    low, high = intervals.wilson(100.0, 12)
    assert (low, high) == (pytest.approx(75.75, abs=0.01), pytest.approx(100.0))
    assert intervals.wilson(0.0, 12) == (pytest.approx(0.0), pytest.approx(24.25, abs=0.01))
    assert intervals.wilson(50.0, 100) == (pytest.approx(40.38, abs=0.01), pytest.approx(59.62, abs=0.01))
