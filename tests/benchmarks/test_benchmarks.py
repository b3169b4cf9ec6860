"""The benchmarks compute every figure, compare like with like, and tell what is worse."""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

import faults
from benchmarks import __main__ as command
from benchmarks.reliability import faults as reliability
from benchmarks.speed import augmentation, loss, markdown, metrics, sparse, steps
from benchmarks.speed.clock import Effort, alternate, of_workers
from benchmarks.speed.metrics import Metric, metric, regressions
from corinfomax import CorInfoMaxLoss

ROOT = Path(__file__).parents[2]
NEEDED = {"kornia": "views", "lightly": "step"}
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]


def figure(ratio, *, low=None, high=None, **changes):
    base = Metric("loss", "a loss", "autograd", ratio, low or ratio, high or ratio, 5, 1.0, ratio, "ms")
    return base._replace(**changes)


def test_a_figure_is_the_median_of_the_rounds_ratios():
    # The second round met a busy machine: both were slow, their ratio is as good as the others'.
    m = metric("loss", "name", "other", [1.0, 10.0, 1.0], [3.0, 20.0, 4.0], unit="ms", at_least=2.5, aim=5.0)
    assert (m.ratio, m.low, m.high, m.n) == (3.0, 2.5, 3.5, 3)
    assert (m.ours, m.theirs) == (1.0, 4.0)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (figure(2.0, low=1.9, high=2.1), True),
        (figure(2.0, low=1.9, high=4.2), False),  # the spreads touch
        (figure(3.7, low=3.7, high=3.7), False),  # less than a tenth
        (figure(6.0), False),
        (figure(2.0, name="a new loss"), False),
    ],
)
def test_a_regression_is_told_in_words(now, told):
    said = regressions([now], [figure(4.0, low=3.9, high=4.1)])
    assert said == (
        ["a loss, against autograd: 2.00 (1.90 – 2.10, n = 5), before 4.00 (3.90 – 4.10, n = 5): 50 % worse"] * told
    )


def test_a_figure_that_went_missing_is_told_if_its_suite_ran():
    old = [figure(4.0), figure(4.0, name="another loss"), figure(1.0, suite="views")]
    (said,) = metrics.missing([figure(4.0)], old)
    assert "another loss" in said and "not measured" in said


def test_figures_come_back_from_their_file(tmp_path):
    found, path = [figure(2.0, at_least=1.0), figure(3.0, suite="views")], tmp_path / "baseline.json"
    metrics.write(path, found, {"processor": "p"})
    assert metrics.read(path) == (found, {"processor": "p"})
    path.write_text('{"metrics": [{"name": 1}], "machine": {}}')
    with pytest.raises(ValueError, match=r"baseline\.json holds no benchmark figures"):
        metrics.read(path)


def test_the_page_says_what_was_reached():
    goals = {"at_least": 3.0, "aim": 5.0}
    found = [
        figure(2.0, name="a", **goals),
        figure(3.0, name="b", **goals),
        figure(5.0, name="c", **goals),
        figure(9.0),
    ]
    page = markdown.page(found, {"arithmetic": "float32", "clock": "processor seconds"})
    targets = page.split("## Targets")[1].split("## The loss")[0]
    last = [line.split("|")[-2].strip() for line in targets.splitlines() if line.startswith("| ")]
    assert last[2:] == ["no", "yes", "the aim"]
    assert "all networks ran in float32" in page and "shared" in page
    other = markdown.page(found, {"arithmetic": "bfloat16", "clock": "seconds"})
    assert "Our networks ran in bfloat16" in other and "shared" not in other


def test_the_plain_loss_is_ours():
    """Otherwise the two would not do the same work."""
    ours, plain = CorInfoMaxLoss(8), loss.Plain(8)
    for seed in range(3):
        rows = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pairs = [[row.clone().requires_grad_() for row in rows] for _ in range(2)]
        values = [ours(*pairs[0]).loss, plain(*pairs[1])]
        torch.testing.assert_close(*values, rtol=1e-12, atol=0)  # float64 both, two orders of adding up
        mine, theirs = (torch.autograd.grad(value, pair) for value, pair in zip(values, pairs, strict=True))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def statistics_of(views):
    """Mean level, and the energy of differences between neighbours, which blur takes away; one number a view."""
    return torch.tensor([[x.mean(), (x[..., 1:] - x[..., :-1]).square().mean().sqrt()] for x in views])


@pytest.mark.parametrize("rival", ["torchvision", "pillow", "kornia"])
def test_the_rivals_views_are_of_the_same_distribution(rival):
    if rival in ABSENT:
        pytest.skip("needs kornia")
    torch.manual_seed(0)
    pixels = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if rival == "kornia":
        theirs = augmentation.kornia_pair(pixels, 32)()
    else:
        theirs = augmentation.pil_pair(pixels, 32, pillow_blur=rival == "pillow")()
    ours = augmentation.ours(pixels, 32)()
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    mine, other = statistics_of(ours), statistics_of(theirs)
    # Brightness and the crop's scale differ from image to image: over 128 of noise the mean level varies by 0.05, the
    # energy by 0.05 of 0.5 (blurred) and 0.9. A view that lost its blur, or got one, would be off by three quarters.
    torch.testing.assert_close(mine[:, 0], other[:, 0], atol=0.25, rtol=0)
    torch.testing.assert_close(mine[:, 1], other[:, 1], atol=0, rtol=0.3)


def test_a_million_images_take_no_room(tmp_path):
    cache = sparse.million(tmp_path, 10_000, 64)
    status = next(tmp_path.rglob("pixels.bin")).stat()
    assert status.st_size == 10_000 * 3 * 64 * 64 and status.st_blocks * 512 < 2**20
    pixels, sizes = cache.batch(torch.tensor([0, 9_999]))
    assert pixels.shape == (2, 3, 64, 64) and sizes.tolist() == [[64, 64]] * 2


def test_a_tree_of_links_is_a_data_set(tmp_path):
    from corinfomax.images import cache
    from corinfomax.images.sources import Data

    data = Data(sparse.tree(tmp_path, 50, classes=5), holdout=0.0, cache=tmp_path / "c")
    loaded = cache.load(data, side=8, progress=False)
    assert len(loaded.train) == 50 and len(loaded.train.classes) == 5


def test_time_goes_to_the_one_who_computes():
    def long():
        torch.randn(400, 400) @ torch.randn(400, 400)

    seconds = alternate({"short": lambda: None, "long": long}, Effort(3, "cpu", False), least=0.01)
    assert [len(samples) for samples in seconds.values()] == [3, 3]
    assert min(seconds["long"]) > 10 * max(seconds["short"]) > 0
    assert of_workers([os.getpid()]) > 0


def test_every_suite_runs_and_what_is_worse_is_told(tmp_path, capsys):
    suites = [name for name in command.SUITES if name not in [NEEDED[name] for name in ABSENT]]
    baseline, page = tmp_path / "baseline.json", tmp_path / "page.md"
    words = ["--quick", "--clock", "cpu", "--threads", "1", "--baseline", str(baseline), "--page", str(page)]
    threads = torch.get_num_threads()
    try:
        assert command.main([*suites, *words, "--write"]) == 0
        found, machine = metrics.read(baseline)
        assert {m.suite for m in found} == set(suites)
        for m in found:
            numbers = (m.ratio, m.low, m.high, m.ours, m.theirs)
            assert all(math.isfinite(number) and number > 0 for number in numbers), m
            assert m.low <= m.ratio <= m.high
            assert f"| {m.name} | {m.against} | **{markdown.ratio(m.ratio)}** |" in page.read_text()
        assert machine["clock"] == "processor seconds" and machine["torch"] == torch.__version__.partition("+")[0]

        better = [m._replace(ratio=99 * m.ratio, low=99 * m.low, high=99 * m.high) for m in found]
        metrics.write(baseline, better, machine)
        capsys.readouterr()
        assert command.main(["loss", *words]) == 1
        assert "% worse" in capsys.readouterr().out
        assert metrics.read(baseline)[0] == better  # only --write writes
        metrics.write(baseline, better, machine | {"processor": "another"})
        assert command.main(["loss", *words, "--write"]) == 1
        assert "the other figures are of another, and a page is of one machine" in capsys.readouterr().out
        assert metrics.read(baseline)[0] == better
    finally:
        torch.set_num_threads(threads)


def test_the_committed_page_is_that_of_the_committed_baseline():
    found, machine = metrics.read(ROOT / "benchmarks" / "speed" / "baseline.json")
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf-8") == markdown.page(found, machine)
    assert {m.suite for m in found} == set(command.SUITES)


def test_the_whole_step_has_the_published_network():
    recipe = steps.whole(Effort(1, "cpu", False))
    assert (recipe.batch, recipe.size, recipe.backbone.name, recipe.backbone.small_stem) == (256, 32, "resnet18", True)


def junit(path, states):
    """A junit file as pytest writes it, of tests with their states."""
    inner = {"passed": "", "failed": "<failure/>", "error": "<error/>", "no GPU": '<skipped message="no GPU"/>'}
    cases = [
        f'<testcase classname="tests.{file}" name="{name}">{inner[state]}</testcase>' for file, name, state in states
    ]
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def test_every_promise_counts_its_cases(tmp_path, monkeypatch):
    promises = (
        reliability.Promise("one", "a", ("test_a",)),
        reliability.Promise("two", "b", ("test_a::test_x", "test_b::test_z")),
        reliability.Promise("three", "c", ("test_a::test_x[1",)),
    )
    monkeypatch.setattr(reliability, "PROMISES", promises)
    states = [("test_a", "test_x[1]", "passed"), ("test_a", "test_x[2]", "no GPU"), ("test_a", "test_y", "passed")]
    states += [("test_b", "test_z", "error"), ("test_b", "test_zz", "failed")]
    proofs = reliability.prove(junit(tmp_path / "a.xml", states))
    assert [(proof.cases, proof.passed) for proof in proofs.values()] == [(3, 2), (3, 1), (1, 1)]
    text = reliability.table(proofs)
    assert "| one | a | `test_a.py` | 3 | 2 passed; 1 skipped: no GPU |" in text
    assert "| two | b | `test_a.py`, `test_b.py` | 3 | 1 passed; **1 failed**; 1 skipped: no GPU |" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{reliability.BEGIN}old\n{reliability.END}after\n")
    monkeypatch.setattr(reliability, "PAGE", page)
    assert reliability.main(["--junit", str(tmp_path / "a.xml"), "--write"]) == 1
    assert page.read_text() == f"before\n{reliability.BEGIN}{text}{reliability.END}after\n"
    with pytest.raises(ValueError, match="no result of test_b::test_z, which is to prove: two"):
        reliability.prove(junit(tmp_path / "b.xml", states[:3]))


def test_every_promise_names_tests_that_are_there():
    here = Path(__file__).parents[1]
    for promise in reliability.PROMISES:
        for test in promise.tests:
            file, _, name = test.partition("[")[0].partition("::")
            if "[" in test:
                assert test.partition("[")[2] in faults.KINDS
            assert f"def {name}(" in (here / f"{file}.py").read_text() if name else (here / f"{file}.py").exists(), test
    assert reliability.BEGIN in reliability.PAGE.read_text() and reliability.END in reliability.PAGE.read_text()
