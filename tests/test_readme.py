"""Every command and every line of Python in the README works, on small images."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import tiny
from corinfomax.cli.main import main

README = Path(__file__).resolve().parents[1] / "README.md"
SHORT = [*tiny.KNOBS, "--epochs", "0.4"]
"""What is added to a run, so that it takes a second."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a run, its export, and two photographs."""
    place = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny.folder(place / "images", {"train": 40, "test": 24})
        for name in ("a.jpg", "b.jpg", "image.jpg"):
            Image.fromarray(tiny.pictures(1)[0]).save(name)
        assert main(["pretrain", "images", "--out", "run", *SHORT]) == 0
        assert main(["export", "run", "--out", "exported"]) == 0
    return place


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    """The words of every command line, without the program that starts it and the comment behind it."""
    lines = [line.partition("  #")[0] for block in blocks("sh") for line in block.splitlines()]
    return [re.search(r"corinfomax (.*)", line)[1].strip() for line in lines if "corinfomax" in line]


def test_the_readme_is_short():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 900
    assert max(map(len, text.splitlines())) <= 160


def filled(text):
    """The text with small images and weights in the place of the reader's."""
    text = re.sub(r"path/to/[\w/]+", "images", text).replace("timm:resnet18", "exported")
    return re.sub(r"\bRUN\b", "run", text)


@pytest.mark.parametrize("command", commands())
def test_a_command_works(place, monkeypatch, command):
    monkeypatch.chdir(place)
    words = shlex.split(filled(command))
    if words[:2] == ["pretrain", "mnist5k"]:
        words += ["--epochs", "0.1", "--no-evaluate", "--no-report"]
    elif words[0] == "doctor":
        words += ["--seconds", "0.1"]
    elif words[0] == "tune":
        words += ["--minutes", "0.01", *tiny.KNOBS]
    elif words[0] == "pretrain":
        words += ["--epochs", "0.4", "--batch", "8"] if "--init" in words else SHORT
    assert main(words) == 0


def test_the_python_works(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    options = "epochs=0.4, size=16, batch=8, projector_widths=(32, 8), log_steps=1"
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(filled(code).replace("epochs=20", options), names)
    assert names["features"].shape[0] == 2
    assert "report.html" in capsys.readouterr().out
    assert names["criterion"].floor > 0
