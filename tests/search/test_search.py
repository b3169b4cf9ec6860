"""The search over views, with scores that follow a rule instead of training."""

import pytest

from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime.records import Trial
from corinfomax.search import options, search

RECIPE = Recipe(views=(View(crop_area=(0.25, 1.0)), View(crop_area=(0.25, 1.0), blur=0.1)))
OPTIONS = options.options_for(RECIPE)
NAMES = [option.name for option in OPTIONS]
HALF, MOST = "crops from 50 %", "crops from 75 %"


class World:
    """Scores that are sums of effects; training takes a second an epoch, scoring a second."""

    def __init__(self, effects, *, error=0.5):
        self.effects, self.error, self.asked = effects, error, []

    def run(self, number, names, epochs):
        self.asked.append((number, names, epochs))
        score = 50 + sum(self.effects.get(name, -1.0) for name in names)
        return Trial(number, names, epochs, score, self.error, epochs, epochs + 1)


def test_every_option_makes_both_views_alike_in_its_part():
    for option in OPTIONS:
        first, second = options.with_options(RECIPE, [option]).views
        assert (first, second) != RECIPE.views
        assert all(getattr(first, name) == getattr(second, name) == value for name, value in option.changes.items())


def test_options_of_one_part_are_alternatives():
    assert [option.name for option in OPTIONS if option.part == "crops"] == ["crops from 8 %", HALF, MOST]
    files = Recipe(from_files=True, views=(View(), View()))
    assert all(option.part != "rotation" for option in options.options_for(files))


def test_views_that_turn_already_may_turn_less_or_more():
    turning = fields.with_views(RECIPE, rotate=45.0)
    names = [option.name for option in options.options_for(turning) if option.part == "rotation"]
    assert names == ["upright", "turned by any angle"]


def test_without_labels_symmetry_and_colours_are_not_searched():
    assert {option.part for option in options.options_for(RECIPE, labelled=False)} == {"crops", "blur"}


def test_effects_that_add_up_are_found():
    world = World({MOST: 4.0, HALF: 3.0, "not mirrored": 2.0, "colours kept": 0.5})
    trials = search.search(OPTIONS, world.run, epochs=1.0, seconds=100.0)
    assert set(search.choose(trials).options) == {MOST, "not mirrored", "colours kept"}
    assert all(
        len({options.part for options in OPTIONS if options.name in t.options}) == len(t.options) for t in trials
    )


def test_interactions_are_seen_in_the_second_round():
    world = World({MOST: 4.0, "not mirrored": 2.0})
    alone = world.run

    def run(number, names, epochs):
        trial = alone(number, names, epochs)
        return trial._replace(score=trial.score - 5) if len(names) > 1 else trial

    assert search.choose(search.search(OPTIONS, run, epochs=1.0, seconds=100.0)).options == (MOST,)


@pytest.mark.parametrize("gain", [-1.0, 0.0, 0.2])
def test_the_recipe_is_kept_without_a_clear_lead(gain):
    world = World(dict.fromkeys(NAMES, gain))
    chosen = search.choose(search.search(OPTIONS, world.run, epochs=1.0, seconds=100.0))
    assert chosen.options == () if gain < 0.2 else chosen.lead > 0


def test_the_time_is_used_and_kept():
    world = World({})
    trials = search.search(OPTIONS, world.run, epochs=2.0, seconds=120.0)
    assert sum(trial.seconds for trial in trials) == pytest.approx(120, rel=0.01)
    assert {epochs for number, _, epochs in world.asked if number == 0} == {2.0}
    later = {round(epochs, 6) for number, _, epochs in world.asked if number > 0}
    assert len(later) == 1 and later.pop() > 2


@pytest.mark.parametrize("speed", [0.7, 1.5])
def test_a_machine_that_changes_after_the_first_round_does_not_change_the_length(speed):
    world = World({})

    def run(number, names, epochs):
        trial = world.run(number, names, epochs)
        return trial._replace(training=epochs / speed, seconds=epochs / speed + 1) if number > 0 else trial

    trials = search.search(OPTIONS, run, epochs=2.0, seconds=120.0)
    assert sum(trial.seconds for trial in trials) == pytest.approx(120, rel=0.15)


def test_without_time_the_later_rounds_are_as_long_as_the_first():
    world = World({})
    search.search(OPTIONS, world.run, epochs=3.0, seconds=1.0)
    assert {epochs for _, _, epochs in world.asked} == {3.0}
