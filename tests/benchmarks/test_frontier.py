"""The comparison of objectives: its search, what it counts as the same cost, and its tables."""

import json
from dataclasses import replace

import pytest

from benchmarks.objectives import compared, frontier, methods, speeds
from benchmarks.objectives.methods import ABLATIONS, CHOSEN, DATA, METHODS, Method, ablated, changed, merged
from corinfomax.recipes import fields

START = METHODS["corinfomax"].start


def test_changes_reach_every_part_and_the_later_one_counts():
    both = merged(
        {"optim": {"lr": 0.3, "weight_decay": 0.0}, "": {"batch": 64}}, {"optim": {"lr": 1.0}, "": {"crops": 3}}
    )
    assert both == {"optim": {"lr": 1.0, "weight_decay": 0.0}, "": {"batch": 64, "crops": 3}}
    recipe = changed(START, merged(both, {"views": {"blur": 0.5}}))
    assert (recipe.optim.lr, recipe.batch, recipe.crops) == (1.0, 64, 3)
    assert [view.blur for view in recipe.views] == [0.5, 0.5]
    assert recipe.views[0].crop_area == START.views[0].crop_area


@pytest.mark.parametrize("name", METHODS)
def test_what_was_chosen_and_every_option_is_a_recipe(name):
    method = METHODS[name]
    for data in methods.DATA:
        speeds.settings(name, data)
    best = changed(method.start, CHOSEN[name])
    for options in (*method.options, *method.late, *method.again):
        for change in options(best):
            assert isinstance(changed(best, change), fields.Recipe)
            json.dumps(change)


def test_every_ablation_changes_little_of_what_they_begin_with():
    for change in ABLATIONS:
        recipe = changed(START, ablated(change))
        words = [word for word in fields.typed(recipe, changed(START, ablated({}))) if word.startswith("--")]
        assert 1 <= len(words) <= 4, words  # name, rate and decay of an optimiser, and one more
    assert len({json.dumps(ablated(change)) for change in ABLATIONS}) == len(ABLATIONS)


def climbing(monkeypatch, score):
    """The search where a trial's score is a function of its recipe; which recipes it tried, in order."""
    tried = []

    def trial(method, changes, splits, seed):
        recipe = changed(method.start, changes)
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
    climbing(monkeypatch, lambda recipe: 10 + 0.4 * (recipe.optim.lr > START.optim.lr))
    assert frontier.tune(method, None) == {}
    climbing(monkeypatch, lambda recipe: 10 + 0.6 * (recipe.optim.lr > START.optim.lr))
    assert frontier.tune(method, None) == {"optim": {"lr": 2 * START.optim.lr}}


@pytest.mark.parametrize("name", METHODS)
def test_measured_are_all_costs_that_the_search_comes_by(name):
    """But for rates and weights, which cost nothing, every option leads to a kind of step that `measure` asks for."""
    method = METHODS[name]
    asked = {
        kind
        for changes in speeds.searched(method)
        for kind in speeds.kinds(name, speeds.TRIAL_DATA, changed(method.start, changes))
    }
    reached = [{}]
    for options in method.options:
        reached += [
            merged(changes, change) for changes in reached for change in options(changed(method.start, changes))
        ]
        reached = list({json.dumps(changes, sort_keys=True): changes for changes in reached}.values())[:400]
    for changes in reached:
        assert set(speeds.kinds(name, speeds.TRIAL_DATA, changed(method.start, changes))) <= asked, changes


def test_steps_of_growing_views_cost_their_shares(monkeypatch):
    recipe = replace(START, early_sizes=(12, 16), early_shares=(0.5, 0.25))
    seconds = {12: 1.0, 16: 2.0, 24: 8.0}
    known = {
        speeds._text(kind): {"seconds": seconds[kind.size]} for kind in speeds.kinds("corinfomax", "cifar10", recipe)
    }
    monkeypatch.setattr(speeds, "speeds", lambda: known)
    assert speeds.seconds_a_step("corinfomax", "cifar10", recipe) == pytest.approx(0.5 * 1 + 0.25 * 2 + 0.25 * 8)
    with pytest.raises(SystemExit, match=r"benchmarks\.frontier measure"):
        speeds.seconds_a_step("corinfomax", "cifar10", replace(recipe, batch=7))


def test_measure_takes_the_steps_of_the_methods_asked_for(monkeypatch, tmp_path):
    class Stepper:
        def __init__(self, name, recipe, splits):
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
            {"kind": "run", "method": method, "changes": compared.as_json(CHOSEN[method]), "data": "cifar10"}
            | {"minutes": minutes, "seed": seed, "steps": 1, "crops": 1, "tflops": 1.0}
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
    assert "| 52.5 ± 0.0 (3) | 60.0 ± 0.0 (3) | 70.0 ± 0.0 (2) |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_every_set_of_images_has_a_title():
    assert set(compared.TITLES) == set(DATA)


def test_the_tables_say_what_the_rows_say():
    def scored(linear):
        return {"linear": linear, "kNN": linear - 5, "10 a class": linear - 20}

    rows = [
        {"kind": "run", "method": "simclr", "data": "cifar10", "minutes": 10.0, "seed": seed, "steps": 3000}
        | {"crops": 768_000, "tflops": 33.0, "changes": changes}
        | scored(points + seed)
        for seed in range(3)
        for changes, points in ((compared.as_json(CHOSEN["simclr"]), 60.0), ({"optim": {"lr": 9.0}}, 90.0))
    ]  # those of settings that are not chosen any more count for nothing
    rows += [
        {"kind": "ablation", "method": "corinfomax", "changes": json.loads(json.dumps(ablated(change))), "seed": seed}
        | {"steps": 600 - 100 * bool(change)}
        | scored(50.0 + seed - 2 * bool(change))
        for change in ({}, ABLATIONS[0])
        for seed in (1, 2)
    ]
    rows += [
        {"kind": "trial", "method": "vicreg", "changes": {}, "seed": 0, "steps": steps} | scored(linear)
        for steps, linear in ((700, 48.0), (600, 46.0))
    ]
    assert compared.table(rows, "cifar10", 10.0)[2:] == [
        "| SimCLR | 56.0 ± 1.0 | 61.0 ± 1.0 | 41.0 ± 1.0 | 3 | 3,000 | 768 k | 33 |"
    ]
    assert compared.by_minutes(rows, "cifar10") == []
    sooner = {**rows[0], "minutes": 2.5, "linear": 51.0}
    assert compared.by_minutes([*rows, sooner, {**sooner, "method": "paper", "changes": {}}], "cifar10") == [
        "| linear, % (seeds), after processor minutes | 2.5 | 10 |",
        "|---|---:|---:|",
        "| CorInfoMax, the paper's settings | 51.0 (1) | – |",
        "| SimCLR | 51.0 (1) | 61.0 ± 1.0 (3) |",
    ]
    none, one = compared.ablations(rows)[2:]
    assert none == "| none | 600 | 51.5 ± 0.7 | 46.5 ± 0.7 | 31.5 ± 0.7 | – | 2 |"
    assert one == "| `--backbone.no-zero-init-last` | 500 | 49.5 ± 0.7 | 44.5 ± 0.7 | 29.5 ± 0.7 | −2.0 | 2 |"
    assert compared.trials(rows)[2:] == ["| vicreg | – | 600 | 46.0 | 41.0 |"]
