"""`pretrain --seeds`: several runs in one folder, resumed by the same command, with their mean on one page."""

import re
from statistics import fmean, stdev

import pytest

import tiny
from corinfomax.cli.main import main
from corinfomax.cli.pretrain import Pretrain
from corinfomax.report import seeds
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Results, Score, Verdict
from corinfomax.weights import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("images"), {"train": 40, "test": 24})


@pytest.fixture(scope="module")
def words(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "several"
    words = [
        "pretrain",
        str(data),
        "--seeds",
        "3",
        "5",
        "--out",
        str(out),
        *tiny.KNOBS,
        "--diagnoses",
        "1",
        "--scores",
        "0",
    ]
    assert main(words) == 0
    return words


def out_of(words):
    return run_folder.Path(words[words.index("--out") + 1])


def weights_of(run):
    return checkpoint.load_network(run)[1].network


def test_each_seed_is_the_run_of_its_own(words, data, tmp_path):
    alone = tmp_path / "alone"
    assert main(["pretrain", str(data), "--seed", "5", "--out", str(alone), *words[words.index("--size") :]]) == 0
    among = out_of(words) / "seed-5"
    assert run_folder.read_results(among).table == run_folder.read_results(alone).table
    assert tiny.equal_states(weights_of(among), weights_of(alone))


def test_the_page_has_mean_and_spread(words):
    out = out_of(words)
    results = {f"seed-{seed}": run_folder.read_results(out / f"seed-{seed}") for seed in (3, 5)}
    values = [result.table["untrained"]["kNN"].mean for result in results.values()]
    page = (out / "report.html").read_text()
    assert re.search(rf"{fmean(values):.1f}</span><small>± {stdev(values):.1f}</small>", page)
    for name, result in results.items():
        assert f'href="{name}/report.html"' in page and result.verdict.evidence in page
    assert seeds.mean_table(results)["untrained"]["kNN"] == Score(fmean(values), stdev(values))


def test_the_same_command_goes_on_where_it_stopped(words, monkeypatch, capsys):
    """A complete run is kept, an incomplete one resumed; other settings are refused."""
    out = out_of(words)
    before = run_folder.checkpoints(out / "seed-3")[-1].stat().st_mtime_ns
    weights = weights_of(out / "seed-5")
    run_folder.forget_after(out / "seed-5", 0)
    assert main(words) == 0
    assert "complete" in capsys.readouterr().out
    assert run_folder.checkpoints(out / "seed-3")[-1].stat().st_mtime_ns == before
    assert tiny.equal_states(weights_of(out / "seed-5"), weights)

    monkeypatch.setattr(Pretrain, "train", None)
    assert main([*words, "--optim.lr", "0.01"]) == 2
    assert "has optim.lr 0.06, not 0.01: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--seeds", "0", "1"], "--seeds needs --out"),
        (["--seeds", "4", "--out", "x"], "two or more different numbers"),
        (["--seeds", "4", "4", "--out", "x"], "two or more different numbers"),
        (["--seeds", "0", "1", "--resume", "x", "--out", "x"], "--seeds resumes by itself"),
    ],
)
def test_seeds_that_make_no_sense_are_refused(data, tmp_path, monkeypatch, capsys, extra, said):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", str(data), *tiny.KNOBS, *extra]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_processes_train_one_seed_at_a_time(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["pretrain", str(data), "--seeds", "0", "1", "--out", str(tmp_path / "x")]) == 2
    assert "start torchrun once for each --seed" in capsys.readouterr().err


def test_runs_without_scores_have_their_verdicts_alone():
    results = {"seed-0": Results(Verdict("healthy", "Fine.", "Go on.", {})), "seed-1": Results()}
    assert seeds.as_text(results) == "seed-0: healthy: Fine. Go on.\nseed-1: no verdict"
    page = seeds.as_page(results, title="<b>")
    assert "<table" not in page and "href" not in page.partition("<body>")[2]  # --no-report: no page to lead to
