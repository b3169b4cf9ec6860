"""What twice the epochs would add."""

import pytest

import tiny
from corinfomax.evaluation import longer
from corinfomax.runtime.records import Results, Score


def scored(linear, test=1000):
    return Results(table={"pretrained": {"linear": Score(linear, 1.0)}}, train=4000, test=test)


def test_a_share_of_the_errors_goes():
    (text,) = longer.remarks(scored(60.0), tiny.RECIPE, 500)
    assert text == "Twice the epochs (--epochs 4) would take linear from 60.0 to about 64.4 (61.6 to 70.4)."


def test_where_few_errors_are_left_it_says_stop():
    (text,) = longer.remarks(scored(98.0), tiny.RECIPE, 500)
    assert text == "Stop here: twice the epochs would add about 0.2 points to linear."


@pytest.mark.parametrize(("results", "steps"), [(scored(60.0), 149), (scored(60.0, test=99), 500), (Results(), 500)])
def test_it_is_silent_about_runs_that_say_too_little(results, steps):
    assert longer.remarks(results, tiny.RECIPE, steps) == ()
