"""The comparison of objectives: its search, what it counts as the same cost, and its tables."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.objectives import compared, frontier, methods, rivals, speeds
from benchmarks.objectives.methods import ABLATIONS, CHOSEN, DATA, METHODS, Method, Setting, ablated, changed, merged
from corinfomax.recipes import fields

START = METHODS["corinfomax"].start


def test_changes_reach_every_part_and_the_later_one_counts():
    both = merged(
        {"optim": {"lr": 0.3, "weight_decay": 0.0}, "": {"batch": 64}}, {"optim": {"lr": 1.0}, "": {"n_views": 3}}
    )
    assert both == {"optim": {"lr": 1.0, "weight_decay": 0.0}, "": {"batch": 64, "n_views": 3}}
    recipe, weights = changed(START, merged(both, {"views": {"blur": 0.5}, "rival": {"weights": (2.0,)}}))
    assert (recipe.optim.lr, recipe.batch, recipe.n_views, weights) == (1.0, 64, 3, (2.0,))
    assert [view.blur for view in recipe.views] == [0.5, 0.5]
    assert recipe.views[0].crop_area == START.recipe.views[0].crop_area


@pytest.mark.parametrize("name", METHODS)
def test_what_was_chosen_and_every_option_is_a_recipe(name):
    method = METHODS[name]
    for data in methods.DATA:
        speeds.settings(name, data)
    best = changed(method.start, CHOSEN[name])
    for options in (*method.options, *method.late, *method.again):
        for change in options(best):
            assert isinstance(changed(best, change), Setting)
            json.dumps(change)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_its_criterion(name):
    setting = changed(METHODS[name].start, CHOSEN[name])
    if name not in rivals.AUTHORS:
        assert METHODS[name].criterion(setting) is None and setting.weights == ()
        return
    pytest.importorskip("lightly")
    torch.manual_seed(0)
    views = torch.randn(setting.recipe.n_views, 8, 4)
    torch.manual_seed(1)
    got = METHODS[name].criterion(setting)(*views).loss
    torch.manual_seed(1)
    assert got.equal(rivals.Rival(name, setting.weights)(*views).loss)
    assert setting.weights == CHOSEN[name].get("rival", {}).get("weights", rivals.AUTHORS[name])


def test_every_ablation_changes_little_of_what_they_begin_with():
    for change in ABLATIONS:
        recipe, usual = (changed(START, ablated(each)).recipe for each in (change, {}))
        words = [word for word in fields.difference(recipe, usual) if word.startswith("--")]
        assert 1 <= len(words) <= 4, words  # name, rate and decay of an optimiser, and one more
    assert len({json.dumps(ablated(change)) for change in ABLATIONS}) == len(ABLATIONS)


def climbing(monkeypatch, score):
    """The search where a trial's score is a function of its recipe; which recipes it tried, in order."""
    tried = []

    def trial(method, changes, splits, seed):
        recipe = changed(method.start, changes).recipe
        tried.append(recipe)
        return score(recipe)

    monkeypatch.setattr(frontier, "trial", trial)
    return tried


def test_the_search_goes_on_for_as_long_as_it_helps(monkeypatch):
    method = Method("corinfomax", START, (methods._decays,), again=(methods._rates,))
    tried = climbing(monkeypatch, lambda recipe: 10 - abs(recipe.optim.lr - 4.8) + (recipe.optim.weight_decay == 1e-4))
    assert frontier.tune(method, None) == {"optim": {"weight_decay": 1e-4, "lr": 4.8}}
    assert max(recipe.optim.lr for recipe in tried) == 9.6


@pytest.mark.parametrize("part", ["late", "again"])
def test_later_parts_of_the_search_do_not_follow_chance(part, monkeypatch):
    method = Method("corinfomax", START, **{part: (methods._rates,)})
    climbing(monkeypatch, lambda recipe: 10 + 0.4 * (recipe.optim.lr > START.recipe.optim.lr))
    assert frontier.tune(method, None) == {}
    climbing(monkeypatch, lambda recipe: 10 + 0.6 * (recipe.optim.lr > START.recipe.optim.lr))
    assert frontier.tune(method, None) == {"optim": {"lr": 2 * START.recipe.optim.lr}}


@pytest.mark.parametrize("name", METHODS)
def test_measured_are_all_costs_that_the_search_comes_by(name):
    """But for rates and weights, which cost nothing, every option leads to a kind of step that `measure` asks for."""
    method = METHODS[name]

    def kind(changes):
        return speeds.kind_of(name, speeds.TRIAL_DATA, changed(method.start, changes).recipe)

    asked = {kind(changes) for changes in speeds.searched(method)}
    reached = [{}]
    for options in method.options:
        reached += [
            merged(changes, change) for changes in reached for change in options(changed(method.start, changes))
        ]
        reached = list({json.dumps(changes, sort_keys=True): changes for changes in reached}.values())[:400]
    for changes in reached:
        assert kind(changes) in asked, changes


def test_the_committed_speeds_are_those_of_every_run_and_trial():
    for name, method in METHODS.items():
        for data in methods.DATA:
            if data != "cifar10-resnet18" or name in ("kernel", "corinfomax", "simclr"):  # the others never ran there
                assert speeds.seconds_a_step(name, data, speeds.settings(name, data).recipe) > 0
        for changes in speeds.searched(method):
            assert speeds.seconds_a_step(name, speeds.TRIAL_DATA, changed(method.start, changes).recipe) > 0
    with pytest.raises(SystemExit, match=r"benchmarks\.objectives\.frontier measure"):
        speeds.seconds_a_step("corinfomax", "cifar10", replace(START.recipe, batch=7))


def test_measure_takes_the_steps_of_the_methods_asked_for(monkeypatch, tmp_path):
    class Stepper:
        def __init__(self, name, setting, splits):
            assert name == "simclr"

        def seconds(self, steps):
            return 0.5

    monkeypatch.setattr(speeds, "Stepper", Stepper)
    monkeypatch.setattr(speeds, "SPEEDS", tmp_path / "speeds.json")
    speeds.measure(dict.fromkeys(methods.DATA), ["simclr"], rounds=1)
    known = [json.loads(kind) for kind in speeds.speeds()]
    assert known and all(kind[0] == "simclr" for kind in known)


def test_a_trial_is_read_back_where_it_had_as_many_steps(monkeypatch, tmp_path):
    row = {"kind": "trial", "method": "corinfomax", "changes": {}, "seed": 0, "steps": 109, "linear": 43.21}
    (tmp_path / "rows").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(frontier, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(frontier, "seconds_a_step", lambda *_: 60 * frontier.TRIAL_MINUTES / 100)
    assert frontier.trial(METHODS["corinfomax"], {}, None, 0) == 43.21
    monkeypatch.setattr(frontier, "seconds_a_step", lambda *_: 60 * frontier.TRIAL_MINUTES / 98)
    with pytest.raises(AttributeError):  # it would train, and there are no images
        frontier.trial(METHODS["corinfomax"], {}, None, 0)


def test_the_table_is_of_the_longest_of_budgets_with_as_many_methods_in_three_seeds(monkeypatch, tmp_path):
    def ran(minutes, seeds, method="paper"):
        return [
            {"kind": "run", "method": method, "changes": CHOSEN[method], "data": "cifar10"}
            | {"minutes": minutes, "seed": seed, "steps": 1, "views": 1, "tflops": 1.0}
            | {"linear": 50.0 + minutes, "kNN": 1.0, "10 a class": 1.0}
            for seed in range(seeds)
        ]

    found = [*ran(2.5, 3), *ran(2.5, 2, "kernel"), *ran(10.0, 3), *ran(20.0, 2)]
    monkeypatch.setattr(frontier, "rows", lambda: found)
    monkeypatch.setattr(compared, "plot", lambda *_: None)
    page = tmp_path / "results.md"
    page.write_text(f"before\n{frontier.BEGIN}\nold\n{frontier.END}\nafter\n")
    frontier.write(page, tmp_path / "plot.svg")
    text = page.read_text()
    assert "### CIFAR-10 (JPEG copy), 10 processor minutes" in text
    assert "| 52.5 ± 0.0 | 60.0 ± 0.0 | 70.0 ± 0.0 (2) | 1.0 ± 0.0 | 1.0 ± 0.0 | 1 |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_every_set_of_images_has_a_title():
    assert set(compared.TITLES) == set(DATA)


def test_the_tables_say_what_the_rows_say():
    def scored(linear):
        return {"linear": linear, "kNN": linear - 5, "10 a class": linear - 20}

    rows = [
        {"kind": "run", "method": "simclr", "data": "cifar10", "minutes": 10.0, "seed": seed, "steps": 3000}
        | {"views": 768_000, "tflops": 33.0, "changes": changes}
        | scored(points + seed)
        for seed in range(3)
        for changes, points in ((CHOSEN["simclr"], 60.0), ({"optim": {"lr": 9.0}}, 90.0))
    ]  # those of settings that are not chosen any more count for nothing
    assert compared.table(rows, "cifar10", 10.0, seeds=3) == [
        "| % | linear, 10 min | kNN, 10 min | 10 a class, 10 min | steps | views | TFLOP |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| SimCLR | 61.0 ± 1.0 | 56.0 ± 1.0 | 41.0 ± 1.0 | 3,000 | 768 k | 33 |",
    ]
    sooner = {**rows[0], "minutes": 2.5, "linear": 51.0}
    other = {**rows[0], "method": "paper", "changes": {}}
    assert compared.table([*rows, sooner, other], "cifar10", 10.0, seeds=3)[2:] == [
        "| CorInfoMax, the paper's settings | – | 60.0 (1) | 55.0 (1) | 40.0 (1) | 3,000 | 768 k | 33 |",
        "| SimCLR | 51.0 (1) | 61.0 ± 1.0 | 56.0 ± 1.0 | 41.0 ± 1.0 | 3,000 | 768 k | 33 |",
    ]


def test_rows_of_the_first_version_have_the_names_of_today():
    old = {"changes": {"loss": {"weights": [2.0, 1.0]}, "": {"crops": 3}}, "crops": 7}
    assert compared.from_json(json.dumps(old)) == {
        "changes": {"rival": {"weights": (2.0, 1.0)}, "": {"n_views": 3}},
        "views": 7,
    }


def test_every_method_has_committed_rows():
    assert {row["method"] for row in compared.runs_of(frontier.rows())} == set(METHODS)
