"""The forecast of a run, from a few steps on made-up images."""

import time
from dataclasses import replace

import pytest
import torch

import tiny
from corinfomax.recipes.fields import PixelFormat
from corinfomax.training import batches, timing
from corinfomax.training.timing import Speed, forecast

CPU = torch.device("cpu")


def test_the_speed_is_that_of_training(monkeypatch):
    original = batches.apply_views

    def slow(*arguments):
        time.sleep(0.05)
        return original(*arguments)

    monkeypatch.setattr(batches, "apply_views", slow)
    speed = timing.speed(tiny.RECIPE, CPU, seconds=0.0)
    assert speed.step > 0.05 and speed.steps == 2
    assert speed.memory is None or speed.memory > 1e7


@pytest.mark.parametrize(("channels", "steps"), [(1, 255), (5, 4095)])
def test_the_speed_is_that_of_images_of_the_recipe(channels, steps):
    pixels = PixelFormat(channels=channels, colours=False, high=(4095.0,), steps=(steps,))
    recipe = replace(tiny.RECIPE, pixels=pixels, mean=(0.5,) * channels, std=(0.2,) * channels)
    images = timing.made_up(recipe)
    batch, sizes = images.batch(torch.tensor([1, len(images) - 1]))
    assert batch.shape == (2, channels, recipe.cache_side, recipe.cache_side) and (sizes == recipe.cache_side).all()
    assert images.pixels.dtype == getattr(torch, pixels.dtype)
    assert timing.speed(recipe, CPU, seconds=0.0).step > 0


@pytest.mark.parametrize(("step", "duration"), [(0.5, "8.3 min"), (60.0, "16.7 hours")])
def test_the_forecast_is_steps_times_seconds(step, duration):
    recipe = replace(tiny.RECIPE, epochs=100, batch=8)
    sentence = forecast(Speed(step, 6, 2_500_000_000), recipe, 84, CPU)  # ten steps an epoch
    assert f"about {duration} and 2.5 GB of memory on this cpu" in sentence
    assert f"1,000 steps of 8, each {1e3 * step:,.0f} ms (6 steps on" in sentence
    assert "memory" not in forecast(Speed(step, 6, None), recipe, 84, CPU)
