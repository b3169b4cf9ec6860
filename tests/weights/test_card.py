"""The model card, whole."""

import json
from pathlib import Path

import tiny
from corinfomax.recipes import fields
from corinfomax.runtime.records import Facts, Results, Score, Start, Verdict
from corinfomax.weights import card
from corinfomax.weights.checkpoint import Checkpoint

START = Start("/home/someone/hub/model.pth", "0123456789abcdef0123", "mit", "https://example.org", "arXiv:1")
FACTS = Facts("/home/someone/`photos`", "adapt", 4000, "abc", {"timm": "1.0", "torch": "2.11"}, start=START)
RESULTS = Results(
    verdict=Verdict("healthy", "Its rank grew to 7 <of 8>.", "Train on.", {}),
    table={"pretrained": {"linear": Score(71.26), "kNN": Score(61.25, None, 60.0, 62.5)}, "raw pixels": {}},
    sentences=("Pretraining helped: a lot.",),
    remarks=("The classes are few.",),
    train=4000,
    test=1200,
)


def test_the_whole_card():
    saved = Checkpoint(tiny.RECIPE, 1234, FACTS, {}, {}, {})
    text, _, settings = card.markdown(saved, RESULTS, plain=False).partition("## Settings\n\n")
    assert text == Path(__file__).with_name("expected_card.md").read_text("utf-8")
    assert fields.from_json(json.loads(settings.removeprefix("```json").removesuffix("```\n"))) == tiny.RECIPE
