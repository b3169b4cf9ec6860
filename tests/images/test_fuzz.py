"""Any bytes, any words: a clear error or a right result. Errors are ValueError or OSError, which name what is wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny
from corinfomax import network as networks
from corinfomax.cli.parse import parse
from corinfomax.cli.pretrain import Pretrain
from corinfomax.images import decode, files, tables
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.recipes import fields
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts, WeightsOptions
from corinfomax.weights import checkpoint, load

settings.register_profile(
    "quick",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("long", settings.get_profile("quick"), max_examples=3000, derandomize=False)
settings.load_profile(os.environ.get("FUZZ", "quick"))
CLEAR = (ValueError, OSError)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some of them changed, left out, repeated or cut off."""
    rng = random.Random(draw(st.integers(0, 2**32)))  # hypothesis' own numbers are small: it would damage the start
    for _ in range(rng.randint(1, 3)):
        place, some = rng.randrange(len(content) + 1), rng.randbytes(rng.randint(1, 8))
        content = rng.choice(
            [
                content[:place] + some + content[place + len(some) :],
                content[:place] + some + content[place:],
                content[:place] + content[place + len(some) :],
                content[:place],
            ]
        )
    return content


def image_bytes(form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(tiny.pictures(1)[0]).save(out, form)
    return out.getvalue()


IMAGES = {form: image_bytes(form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")}


@pytest.mark.parametrize("form", IMAGES)
@given(st.data())
def test_a_file_is_an_image_or_a_reason(tmp_path, form, data):
    content = data.draw(st.one_of(damaged(IMAGES[form]), st.binary(max_size=80).map(lambda x: IMAGES[form][:12] + x)))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    source = files.from_files(tmp_path, files.scan(tmp_path), None)
    (found,) = decode.map_images(source, lambda image: decode.decode(image, 16), False)
    if isinstance(found, str):
        assert found.strip()
    else:
        assert found.dtype == np.uint8
        assert found.shape[0] == 3
        assert 1 <= min(found.shape[1:]) <= 16


LINES = st.text(st.sampled_from("abc/.\\\"',# \t\n\r\0éü,pathlabelspt") | st.characters(), max_size=60)


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
@given(text=st.one_of(LINES, LINES.map(lambda x: "path,label\n" + x)), raw=st.binary(max_size=8))
def test_a_list_is_images_or_a_reason(tmp_path, name, text, raw):
    (tmp_path / "abc").write_bytes(b"")
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass") + raw * (len(raw) > 6))
    with contextlib.suppress(*CLEAR):
        read = tables.from_table if name.endswith(".csv") else tables.from_list
        for source in read(tmp_path / name).splits.values():
            assert source.paths


@given(text=LINES, raw=st.binary(max_size=8))
def test_a_list_to_leave_out_is_names_or_a_reason(tmp_path, text, raw):
    path = tmp_path / "skip.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass") + raw * (len(raw) > 6))
    try:
        names = tables.read_names(path)
    except CLEAR as error:
        assert "skip.txt" in str(error)
        return
    run_folder.write_text(path, tables.names_as_text(sorted(names)))
    assert tables.read_names(path) == names


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [place for key in keys for place in [(content, key), *places(content[key])]]


@given(st.data())
def test_a_recipe_file_is_a_recipe_or_a_reason(data):
    name = data.draw(st.sampled_from(sorted(RECIPES)))
    content = json.loads(json.dumps(fields.to_json(RECIPES[name].recipe)))
    for _ in range(data.draw(st.integers(0, 2))):
        container, key = data.draw(st.sampled_from(places(content)))
        container[key] = data.draw(
            st.one_of(JSON, st.sampled_from([0, -1, 1, 0.5, 1e9, 1e300, -math.inf, "sgd", [], {}]))
        )
    if data.draw(st.integers(0, 5)) == 0:
        content = data.draw(JSON)
    try:
        recipe = fields.from_json(copy.deepcopy(content))
    except ValueError as error:
        assert str(error)
        return
    assert fields.from_json(json.loads(json.dumps(fields.to_json(recipe)))) == recipe


FLAGS = sorted(fields.flags(RECIPES["cpu-small"].recipe))
VALUES = st.one_of(
    st.integers(-3, 10**6).map(str),
    st.floats().map(str),
    st.text(max_size=6),
    st.sampled_from(["None", "True", "1e400", "--", "-1", "", "0x10", "²", "nan"]),
)


@settings(max_examples=60)
@given(st.data())
def test_words_of_a_command_are_knobs_or_a_reason(capsys, data):
    flag = data.draw(st.sampled_from(FLAGS))
    words = ["pretrain", "x", f"--{flag}", *data.draw(st.lists(VALUES, min_size=0, max_size=3))]
    try:
        command, _ = parse(words)
    except ValueError as error:
        assert str(error)
    except SystemExit as stop:
        told = capsys.readouterr()
        assert (stop.code == 2 and told.err.strip()) or (stop.code == 0 and told.out.strip())  # 0: a value said --help
    else:
        assert isinstance(command, Pretrain)
        assert fields.from_json(json.loads(json.dumps(fields.to_json(command.settings)))) == command.settings


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a checkpoint, and what is in it."""
    path = tmp_path_factory.mktemp("saved") / "step-00000001.safetensors"
    network = networks.Network(tiny.RECIPE.backbone, tiny.RECIPE.projector)
    states = network.state_dict(), CorInfoMaxLoss(8).state_dict(), {}
    checkpoint.save_checkpoint(path, checkpoint.Checkpoint(tiny.RECIPE, 1, Facts(), *states))
    return path.read_bytes(), checkpoint.load_checkpoint(path)


@given(st.data())
def test_a_checkpoint_is_what_was_written_or_a_reason(tmp_path, saved, data):
    content, whole = saved
    header = 8 + int.from_bytes(content[:8], "little")
    # Half of the damage to the header, which is a small part of the file.
    some = data.draw(st.one_of(damaged(content[:header]).map(lambda x: x + content[header:]), damaged(content)))
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(some)
    try:
        found = checkpoint.load_checkpoint(path)
    except CLEAR as error:
        assert path.name in str(error)
        return
    assert (found.step, found.recipe) == (whole.step, whole.recipe)
    assert tiny.equal_states(found.network, whole.network)
    assert tiny.equal_states(found.criterion, whole.criterion)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@given(st.data())
def test_weights_are_read_or_refused_with_a_reason(tmp_path, saved, ending, data):
    out = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(2, 3)}, out)
    content = saved[0][:9000] if ending == ".safetensors" else out.getvalue()
    path = tmp_path / f"a{ending}"
    path.write_bytes(data.draw(damaged(content)))
    with contextlib.suppress(*CLEAR):
        load.load_backbone(str(path), WeightsOptions(architecture="resnet18"))


@given(st.data())
def test_metrics_are_rows_or_a_reason(tmp_path, data):
    rows = [{"step": step, "loss": 1.5, "knn": None} for step in range(1, 5)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "metrics.jsonl").write_bytes(data.draw(st.one_of(damaged(content), st.binary(max_size=60))))
    try:
        found = run_folder.read_metrics(tmp_path)
    except CLEAR as error:
        assert "metrics.jsonl" in str(error)
        return
    assert all(isinstance(row.step, int) for row in found)
