"""`corinfomax tune`: a search from the command line to a recipe that pretrain takes."""

import json

import pytest

import tiny
from corinfomax.cli.main import main
from corinfomax.recipes import published
from corinfomax.runtime import run_folder
from corinfomax.search import options, trials
from corinfomax.training import loop, timing
from corinfomax.weights import checkpoint

SOME = ("crops from 50 %", "turned by any angle", "colours kept")


@pytest.fixture(autouse=True)
def few_options(monkeypatch):
    """Three options, for tests that end in seconds."""
    every = options.options_for
    monkeypatch.setattr(
        options, "options_for", lambda recipe, labelled: [o for o in every(recipe, labelled=labelled) if o.name in SOME]
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("images"), {"train": 40, "test": 24})


def words(data, out, *more):
    return ["tune", str(data), "--minutes", "0.01", "--out", str(out), *tiny.KNOBS, *more]


def test_a_search_ends_with_a_recipe_for_pretrain(data, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert main(words(data, out)) == 0
    said = capsys.readouterr().out
    record = run_folder.read_object(out / "search.json")
    assert [trial["round"] for trial in record["trials"]] == [0] * 4 + [1] * 4 + [2] * 3
    assert "ridge probe on 40 training images" in said
    assert not (out / "trial").exists()

    # a labelled red or green needs its colour
    chosen = run_folder.read_object(out / "tuned.json")["options"]
    assert all(name in SOME for name in chosen)
    page = (out / "report.html").read_text()
    assert all(name in page for name in SOME)

    # the recipe of its file, in a run and in the list of settings
    file = str(out / "tuned.json")
    run = tmp_path / "run"
    assert main(["pretrain", str(data), "--recipe", file, "--out", str(run), "--no-report", "--no-evaluate"]) == 0
    assert checkpoint.recorded(run)[0].views == published.find_recipe(file).views
    assert main(["recipes", file]) == 0
    assert "--views.0.crop-area" in capsys.readouterr().out


def test_a_stopped_search_goes_on_with_what_is_recorded(data, tmp_path, monkeypatch, capsys):
    out, train, runs = tmp_path / "tuned", loop.pretrain, []

    def counted(*args, **kwargs):
        runs.append(args)
        if len(runs) == 6:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(trials.timing, "speed", lambda *_, **__: timing.Speed(0.01, 2, None))
    monkeypatch.setattr(trials.loop, "pretrain", counted)
    assert main(words(data, out)) == 130
    assert f"--out {out}" in capsys.readouterr().out
    before = run_folder.read_object(out / "search.json")["trials"]
    assert len(before) == 5
    assert not (out / "tuned.json").exists()
    assert main(words(data, out)) == 0
    assert run_folder.read_object(out / "search.json")["trials"][:5] == before
    assert len(runs) == 6 + 6
    assert [args[0].seed for args in runs] == [0] * 4 + [1, 1] + [1] * 3 + [2] * 3

    # another search does not go on in its folder
    assert main(words(data, out, "--seed", "3")) == 2
    assert "holds a search" in capsys.readouterr().err


def test_images_without_labels(data, tmp_path, capsys):
    flat = tiny.folder(tmp_path / "flat", {"": 40}, labelled=False)
    assert main(words(flat, tmp_path / "tuned")) == 0
    said = capsys.readouterr().out
    assert "without labels" in said and "colours kept" not in said and "turned" not in said


@pytest.mark.parametrize("labelled", [True, False])
def test_views_with_which_runs_diverge_are_not_chosen(labelled, tmp_path, monkeypatch):
    train = loop.pretrain

    def diverging(recipe, *args, **kwargs):
        if recipe.views[0].crop_area[0] == 0.5:
            raise FloatingPointError("loss is nan")
        return train(recipe, *args, **kwargs)

    monkeypatch.setattr(trials.loop, "pretrain", diverging)
    data, out = tiny.folder(tmp_path / "images", {"train" if labelled else "": 40}, labelled=labelled), tmp_path / "out"
    assert main(words(data, out)) == 0
    tried = run_folder.read_object(out / "search.json")["trials"]
    scores = {tuple(trial["options"]): trial["score"] for trial in tried if trial["round"] == 0}
    assert min(scores, key=scores.get) == ("crops from 50 %",)


def test_a_run_is_not_written_over(data, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "report.html").write_text("mine")
    assert main(words(data, tmp_path)) == 2
    assert "holds a run" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot read the recipe"), ("{", "holds no recipe"), ('{"recipe": {"epochs": 3}}', "holds no recipe")],
)
def test_a_recipe_file_that_is_none(content, problem, data, tmp_path, capsys):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    assert main(["pretrain", str(data), "--recipe", str(path), "--out", str(tmp_path / "run")]) == 2
    assert problem in capsys.readouterr().err


def test_the_time_must_be_some(data, tmp_path, capsys):
    assert main(["tune", str(data), "--minutes", "0", "--out", str(tmp_path / "tuned")]) == 2
    assert "--minutes" in capsys.readouterr().err
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
