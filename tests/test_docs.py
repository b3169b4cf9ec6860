"""The pages for users: the site builds, links lead somewhere, commands parse, and tables agree with the code."""

import ast
import dataclasses
import functools
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

import corinfomax
from corinfomax.cli.parse import Command, parse
from corinfomax.recipes import fields
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime.records import DataMeasures, Kind, Measures

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
GUIDES = [ROOT / "README.md", *DOCS]  # pages whose commands and flags are those of today
FOLDERS = "docs dev benchmarks examples tests".split()
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
MOST_LINES = 200


def name(page):
    return page.relative_to(ROOT).as_posix()


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=name)


def read(page):
    return page.read_text("utf-8")


def prose(page):
    """The text of a page without its fenced blocks."""
    return FENCE.sub("", read(page))


def spans(page):
    """Inline code, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def rows(page, heading):
    """Cells of the first table below a heading, without its first two lines."""
    table = re.search(r"(?:^\|.*\n)+", read(page).partition(f"\n{heading}\n")[2], re.MULTILINE)
    assert table is not None, f"{name(page)} has no table below {heading}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]


# --- the site ---


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if find_spec(module) is None:
            pytest.skip(f"needs {module}, of the docs extra")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    for page in DOCS:
        html = (tmp_path / f"{page.stem}.html").read_text("utf-8")
        fetched = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', html)
        assert not fetched, f"{name(page)} fetches {fetched}"


def test_the_api_page_shows_every_public_name():
    text = read(ROOT / "docs/python.md")
    lists = re.findall(r"^ +members: \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    shown = [*re.findall(r"\w+", " ".join(lists)), *re.findall(r"^::: corinfomax\.(\w+)", text, re.MULTILINE)]
    assert sorted(shown) == sorted(corinfomax.__all__)


@each(DOCS)
def test_a_page_is_short(page):
    assert len(read(page).splitlines()) <= MOST_LINES


# --- links ---


def anchor(heading):
    """GitHub's anchor of a heading, which mkdocs.yml asks for too."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page):
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def dead_links(page):
    """Links of a page that lead nowhere; those to other sites must have the form of an address."""
    text = re.sub(r"`[^`]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if "://" in target:
            if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", target):
                yield target
            continue
        path, _, fragment = target.partition("#")
        place = page.parent / path if path else page
        if not place.exists() or (fragment and fragment not in anchors(place)):
            yield target


@each(PAGES)
def test_links_lead_somewhere(page):
    assert not list(dead_links(page))


def test_dead_links_are_found(tmp_path):
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    other.write_text("# A `page`, two\n\n```sh\n# no heading\n```\n")
    page.write_text(
        "# Top\n[x](b.md#a-page-two) [x](#top) [y](b.md#no-heading) [y](c.md) [y](#a) [y](https://a b) `[](d)`"
    )
    assert list(dead_links(page)) == ["b.md#no-heading", "c.md", "#a", "https://a b"]


# --- commands and flags ---


def commands(page):
    """Words after `corinfomax` of every command: lines of shell blocks, and inline code with an argument."""
    blocks = [block.replace("\\\n", " ") for language, block in FENCE.findall(read(page)) if language == "sh"]
    inline = [span for span in spans(page) if span.startswith("corinfomax ") and len(span.split()) > 2]
    for line in [*"\n".join(blocks).splitlines(), *inline]:
        words = shlex.split(line, comments=True)
        if "corinfomax" in words:
            yield tuple(words[words.index("corinfomax") + 1 :])


@functools.cache
def problem(words):
    """The exit code of words that do not parse, else 0."""
    try:
        parse(words)
    except SystemExit as stop:
        return stop.code or 0
    return 0


@each(GUIDES)
def test_commands_parse(page):
    assert not [words for words in commands(page) if problem(words)]


def test_the_guides_have_commands_of_every_kind():
    kinds = {words[0] for page in GUIDES for words in commands(page)}
    assert kinds >= {kind.__name__.lower() for kind in get_args(Command) if not kind.__name__.startswith("Report")}


@functools.cache
def known_flags():
    """Every flag of every command, without dashes."""
    names = set()
    for kind in get_args(Command):
        for field in dataclasses.fields(kind):
            nested = dataclasses.is_dataclass(field.default)
            names |= fields.flags(field.default).keys() if nested else {field.name.replace("_", "-")}
    return names


def typed_flags(text):
    """Flags in a piece of code, without dashes and without the `no-` of a switch."""
    flags = re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text)
    return {re.sub(r"(^|\.)no-", r"\1", flag) for flag in flags}


@each(GUIDES)
def test_flags_exist(page):
    named = [span for span in spans(page) if span.startswith("--") or "corinfomax " in span]
    named += [f"corinfomax {block}" for language, block in FENCE.findall(read(page)) if language == "text"]
    flags = set().union(*(typed_flags(text.partition("corinfomax ")[2] or text) for text in named))
    assert flags <= known_flags(), f"unknown: {sorted(flags - known_flags())}"


def test_unknown_flags_are_found():
    assert typed_flags("--optim.lr 0.3 --no-evaluate --loss.no-normalize a--b") == {
        "optim.lr",
        "evaluate",
        "loss.normalize",
    }
    assert {
        "optim.lr",
        "evaluate",
        "loss.normalize",
        "views.1.flip",
        "against",
        "skip",
        "architecture",
    } <= known_flags()
    assert "teacher" not in known_flags()


# --- tables that repeat the code ---


def test_the_recipes_are_those_of_the_code():
    table = {cells[0].strip("`"): cells[1:] for cells in rows(ROOT / "docs/recipes.md", "## The recipes")}
    assert table.keys() == RECIPES.keys()
    for key, (_, size, epochs, batch, optimizer, paper, ours) in table.items():
        recipe, entry = RECIPES[key].recipe, RECIPES[key]
        assert (size, epochs, batch) == (str(recipe.size), f"{recipe.epochs:g}", str(recipe.batch)), key
        assert optimizer == recipe.optim.name and paper == ("–" if entry.paper is None else f"{entry.paper:.2f}"), key
        assert ours != "not run yet" or not entry.measured, key


def test_every_verdict_has_its_meaning():
    meanings = [cells[0] for cells in rows(ROOT / "docs/verdict.md", "## What each verdict means")]
    kinds = set()
    for part in get_args(Kind):
        kinds |= {*get_args(part)} or {part}
    assert set(meanings) == kinds and len(meanings) == len(kinds)


@pytest.mark.parametrize(("heading", "record"), [("## The network", Measures), ("## The images", DataMeasures)])
def test_every_measure_is_explained(heading, record):
    first = " ".join(cells[0] for cells in rows(ROOT / "docs/measures.md", heading))
    assert sorted(re.findall(r"`(\w+)`", first)) == sorted(record._fields)


@functools.cache
def texts_of_the_code():
    """Every literal text in the package, the parts of formatted ones too."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "src").rglob("*.py")]
    literals = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\0".join(literal.value for literal in literals if isinstance(literal.value, str))


def is_said(piece):
    """True if the code has this piece of a message, perhaps in two parts."""
    texts, cuts = texts_of_the_code(), range(6, len(piece) - 5)
    return piece in texts or any(piece[:cut] in texts and piece[cut:] in texts for cut in cuts)


def test_the_messages_are_those_of_the_code():
    page = ROOT / "docs/troubleshooting.md"
    quoted = re.findall(r"^\| (`.*?) \| ", read(page), re.MULTILINE)
    pieces = [piece.strip() for cell in quoted for span in re.findall(r"`([^`]+)`", cell) for piece in span.split("…")]
    assert len(pieces) > 50 and not is_said("no picture found in")
    assert not [piece for piece in pieces if piece and not is_said(piece)]
