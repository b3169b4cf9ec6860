"""The page of a run: its content, safety against hostile file names, and its scripts in a real browser."""

import base64
import gzip
import io
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from benchmarks.speed.views import make_views
from corinfomax.cli.main import main
from corinfomax.cli.parse import parse
from corinfomax.evaluation import maps
from corinfomax.evaluation.features import extract_features
from corinfomax.images import cache
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Optim, PixelFormat, Recipe, View
from corinfomax.recipes.published import RECIPES
from corinfomax.report import charts, gather, page, thumbnails
from corinfomax.report.content import Subject
from corinfomax.report.thumbnails import Pool
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import DataMeasures, Facts, Look, Measures, Options, Row, Verdict
from corinfomax.training import batches
from corinfomax.views import operations
from corinfomax.weights import checkpoint

KNOBS = [*tiny.KNOBS, "--log-steps", "1"]
SECTIONS = ["verdict", "scores", "curves", "spectrum", "views", "map", "neighbours"]
SECTIONS += ["outliers", "settings", "repeat"]
HOSTILE_CLASS = "<img src=x onerror=alert(1)>&amp;'\""
HOSTILE = (
    "<script>alert(1)</script>.png",  # the slash makes a folder of the first half
    "</script><!--<script>alert(2).png",
    "quo\"te' onmouseover=alert(3) x=&lt;.png",
    "{{ 7 * 7 }}{% raw %}.png",
    "new\nline\ttab\x1b[31m.png",
    "\u202egnp.exe\u2028ünï-画像.png",
    os.fsdecode(b"not-utf8-\xff.png"),
)


def neighbour_map_stand_in(x, *, seed):
    return maps.principal(x)[0].flip(1)


def pretrain(data, run, *more):
    with pytest.MonkeyPatch.context() as patch:
        # A real one compiles itself for a minute; test_similar tests it where it is installed.
        patch.setattr(gather, "find_spec", lambda name: True)
        patch.setattr(maps, "neighbour_map", neighbour_map_stand_in)
        assert main(["pretrain", str(data), "--out", str(run), *KNOBS, *more]) == 0
    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on labelled images with harmful names of files and of one class."""
    root = tmp_path_factory.mktemp("hostile")
    data = tiny.folder(root / "data", {"train": 40, "test": 12})
    for split in ("train", "test"):
        (data / split / "red").rename(data / split / HOSTILE_CLASS)
    for i, name in enumerate(HOSTILE):
        place = data / "train" / HOSTILE_CLASS / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / HOSTILE_CLASS / f"{2 * i:03}.png").rename(place)
    return data, pretrain(data, root / "run")


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    root = tmp_path_factory.mktemp("flat")
    return pretrain(tiny.folder(root / "photos", {"": 24}, labelled=False), root / "run")


class Reader(HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == self.inside:
            self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.text.append(data)


def read(run):
    return (run / "report.html").read_text(encoding="utf-8")


def payload(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_has_all_sections_in_order(hostile):
    text = read(hostile[1])
    assert [a["id"] for tag, a in Reader(text).elements if tag == "section"] == SECTIONS
    said = " ".join(Reader(text).text)
    results = run_folder.read_results(hostile[1])
    for expected in (
        results.verdict.evidence,
        results.verdict.advice,
        results.sentences[0],
        "effective rank",
        f"{results.table['raw pixels']['ridge'].mean:.1f}",
        "A green frame marks the query's class",
        "--optim.lr",
        checkpoint.load_network(hostile[1])[1].facts.fingerprint,
        "--log-steps 1 --recipe cpu-small --epochs 2 --batch 8",
    ):
        assert expected in said


def test_nothing_is_fetched_and_no_script_but_ours_may_run(hostile):
    elements = Reader(read(hostile[1])).elements
    policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            link = attributes.get(name, "#")
            assert link.startswith(("#", "data:", "checkpoints/")), link
    assert [tag for tag, _ in elements].count("script") == 1 + len(page.SCRIPTS)


def test_hostile_names_are_text(hostile):
    text = read(hostile[1])
    for raw in ("<script>alert", "onerror=alert(1)>", "\x1b", "\u202e", "\u2028", "<!--<script"):
        assert raw not in text
    reader = Reader(text)
    said = " ".join(reader.text)
    assert HOSTILE_CLASS in said  # as it is, escaped once and no more
    # The contact sheet and the galleries show some of the files, the map all of them.
    names = unpack_names(payload(text)["map"])
    for name in HOSTILE:
        assert f"train/{HOSTILE_CLASS}/{page.visible(name)}" in names
    assert "{{ 7 * 7 }}{% raw %}.png" in "".join(names)
    assert page.visible("a\nb\u202ec\udcff") == "a␊b\\u202ec\\udcff"


def unpack_names(drawn):
    return json.loads(gzip.decompress(base64.b64decode(drawn["names"])))


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&lt;", "\u2028\u2029", "\udcff", "'\"\\", "画像"])
def test_json_in_a_page_ends_no_element_and_comes_back_whole(text):
    script = page.as_script({"name": text, "inside": [text]})
    assert script.isascii()
    assert not set(script) & set("<>&")
    assert json.loads(script) == {"name": text, "inside": [text]}


def test_numbers_beyond_json_are_null_and_named_tuples_are_objects():
    assert page.as_script([float("nan"), float("inf"), 0.1234567]) == "[null,null,0.12346]"
    assert json.loads(page.as_script([charts.Curve("loss", [1.0, None], 1.0)])) == [
        {"name": "loss", "values": [1.0, None], "last": 1.0}
    ]


def test_without_labels_the_page_does_not_mention_them(flat):
    reader = Reader(read(flat))
    assert [a["id"] for tag, a in reader.elements if tag == "section"] == [s for s in SECTIONS if s != "scores"]
    seen = [value for _, a in reader.elements for name, value in a.items() if name in ("alt", "title", "aria-label")]
    said = " ".join([*reader.text, *(value for value in seen if value)]).lower()
    for word in ("class", "score", "knn", "accuracy", "labels", "labelled"):
        assert word not in said
    assert "label" not in said.replace("--label", "")


def test_the_map_holds_every_image_in_its_place(hostile):
    data, run = hostile
    drawn = payload(read(run))["map"]
    network, saved = checkpoint.load_network(run)
    splits = cache.load(data, side=16)
    paths = splits.train.paths + splits.test.paths
    assert unpack_names(drawn) == [page.visible(path) for path in paths]
    labels = np.frombuffer(base64.b64decode(drawn["labels"]), "<u2")
    assert [drawn["classes"][label] for label in labels] == [path.split("/")[1] for path in paths]
    assert drawn["splits"] == [{"name": "train", "end": 40}, {"name": "test", "end": 52}]
    xy = [np.frombuffer(base64.b64decode(layout["xy"]), "<u2").reshape(-1, 2) for layout in drawn["layouts"]]
    assert [layout["name"] for layout in drawn["layouts"]] == ["PCA", "PaCMAP"]
    assert np.ptp(xy[0], axis=0).max() == 65535  # the wider axis fills the square
    assert np.abs(xy[0][:, ::-1].astype(int) - xy[1]).max() <= 1
    # Far apart in the map are far apart in the features: the first axis is their first principal component.
    features = torch.cat([extract_features(network.backbone, part, saved.recipe) for part in splits])
    first = maps.principal(features)[0][:, 0].numpy()
    assert np.corrcoef(first, xy[0][:, 0])[0, 1] > 0.9999
    rows = np.frombuffer(base64.b64decode(drawn["thumbnail_rows"]), "<u4")
    assert rows.tolist() == list(range(52))
    colours = np.frombuffer(base64.b64decode(drawn["colours"]), "u1").reshape(-1, 3)
    place = paths.index("train/green/001.png")
    mean = np.array(Image.open(data / "train" / "green" / "001.png")).mean((0, 1))
    assert np.abs(colours[place] - mean).max() <= 2


def test_the_contact_sheet_shows_the_views_of_training(hostile, monkeypatch):
    data, run = hostile
    network, saved = checkpoint.load_network(run)
    splits = cache.load(data, side=16)
    subject = Subject(run, network, saved.recipe, saved.step, saved.facts, splits, same_images=True)
    monkeypatch.setattr(gather, "webp_text", lambda pixels, side, quality=0: pixels)
    monkeypatch.setattr(gather, "view_caption", lambda view, p, size, i, colours: p)
    sheet = gather.contact_sheet(subject, device=torch.device("cpu"))
    recipe, step = saved.recipe, saved.step - 1
    indices = batches.indices(recipe, step, 40)
    assert [row.path for row in sheet] == [splits.train.paths[i] for i in indices]
    pixels, sizes = splits.train.batch(indices)
    expected = make_views(recipe, pixels, sizes, step, torch.device("cpu"))
    for v, x in enumerate(expected):
        shown = thumbnails.view_pixels(x, recipe, list(pixels.numpy()))
        assert all((row.views[v][0] == image).all() for row, image in zip(sheet, shown, strict=True))
        # The captions describe the parameters of these very views.
        p = sheet[0].views[v][1]
        stats = {"size": recipe.size, "scaling": recipe.scaling}
        assert operations.apply(pixels, sizes, p, **stats).equal(x)


def test_a_view_has_its_operations_as_caption():
    p = operations.ViewParameters(
        angle=torch.tensor([-3.4]),
        box=torch.tensor([[0, 0, 8, 8]]),
        flip=torch.tensor([True]),
        jitter=torch.tensor([False]),
        order=torch.tensor([[0, 1, 2, 3]]),
        factors=torch.ones(1, 4),
        grey=torch.tensor([True]),
        blur=torch.tensor([True]),
        sigma=torch.tensor([1.26]),
        solarize=torch.tensor([False]),
        own=torch.ones(1, 0, 2),
    )
    caption = gather.view_caption(View(rotate=10), p, torch.tensor([16, 16]), 0)
    assert caption == "crop 25 % · rotated −3° · flipped · grey · blur 1.3 px"


def test_thumbnails_keep_to_their_budget(tmp_path):
    splits = cache.load(tiny.folder(tmp_path / "large", {"": 30}, labelled=False, side=120), side=120)
    pool = Pool({"train": splits.train})
    sides = []
    for budget in (400_000, 60_000, 20_000):
        texts = thumbnails.webp_thumbnails(pool, range(30), budget=budget)
        assert sum(map(len, texts)) <= budget
        with Image.open(io.BytesIO(base64.b64decode(texts[7]))) as image:
            sides.append(max(image.size))
    assert sides[0] == 120  # no thumbnail is enlarged
    assert sides[0] > sides[1] > sides[2]
    assert thumbnails.webp_thumbnails(pool, [], budget=1) == []


def test_a_lonely_point_of_a_large_map_has_a_thumbnail():
    plane = torch.rand(5000, 2, generator=torch.Generator().manual_seed(0)) * 0.2
    plane[1234] = torch.tensor([0.99, 0.97])
    rows = gather._spread_rows(plane, 300, torch.Generator().manual_seed(1))
    assert len(set(rows)) == 300
    assert 1234 in rows
    assert rows == sorted(rows)


def test_the_pool_draws_evenly_from_all_splits(hostile):
    splits = cache.load(hostile[0], side=16)
    pool = Pool(splits._asdict()).sample(30, torch.Generator().manual_seed(0))
    assert len(pool) == 30
    assert list(pool.splits) == ["train", "test"]
    assert [pool.path(row) for row in range(30)] == [path for images in pool.splits.values() for path in images.paths]
    assert len({pool.path(row) for row in range(30)}) == 30


def row(step, **values):
    return Row(
        **{"step": step, "loss": 1.0, "attraction": 0.1, "gradient_norm": 1.0, "lr": 0.1, "seconds": 1.0, **values}
    )


def look(**values):
    numbers = dict.fromkeys(Measures._fields, 0.5) | {"spectrum": [1.0], "spectrum_features": [1.0]}
    return Look(True, DataMeasures(1.0, 1.0, 0.0), Measures(**numbers | values))


def test_long_curves_are_thinned_to_means():
    rows = [row(i + 1, loss=float(i), knn=5.0 if i % 2 else None) for i in range(2500)]
    drawn = {chart.plot.title: chart for chart in charts.charts(rows, tiny.RECIPE)}
    loss, knn = drawn["Loss"], drawn["kNN score"]
    assert len(loss.x) == 834  # three rows a point
    assert loss.x[:2] == [3, 6]
    assert loss.curves[0].values[:2] == [1.0, 4.0]
    assert loss.curves[0].last == 2499.0
    assert set(knn.curves[0].values) == {5.0}


def test_every_number_of_a_row_has_a_chart():
    full = row(1, big_bang=2.0, gap=0.1, scale=1024.0, knn=50.0, look=look())
    hidden = {"seconds", "attraction", *DataMeasures._fields}  # its clock, drawn weighted, and constants of the data
    assert set(full.numbers()) - hidden | {"weighted_attraction"} == {
        column for plot in charts.PLOTS for column in plot.columns.values()
    }
    drawn = charts.charts([full], Recipe())
    assert [chart.plot for chart in drawn] == list(charts.PLOTS)
    assert drawn[1].curves[0].last == pytest.approx(0.1 * 3.906 * 64)  # alpha of None is 3.906·D


def test_an_objective_without_a_bound_has_no_gap():
    drawn = charts.charts([row(1, big_bang=2.0, look=look())], Recipe())
    assert "Gap to 2·ln D" not in {chart.plot.title for chart in drawn}


@pytest.mark.parametrize(
    ("kind", "tone"),
    [("healthy", "good"), ("still warming up", "pending"), ("complete collapse", "bad"), ("over-invariant", "bad")],
)
def test_the_verdict_has_its_colour(kind, tone):
    assert page.tone(Verdict(kind, "", "", {})) == tone


def test_a_collapsed_network_has_a_page_too(flat, tmp_path, capsys):
    network, saved = checkpoint.load_network(flat)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    splits = cache.load(saved.facts.data, side=16)
    subject = Subject(flat, network, saved.recipe, saved.step, saved.facts, splits, same_images=True)
    out = gather.write_page(subject, tmp_path / "page.html", device=torch.device("cpu"))
    assert "effective rank 1.0 of" in out.read_text()


def test_equal_features_have_no_map_of_neighbours(monkeypatch):
    monkeypatch.setattr(gather, "find_spec", lambda name: True)
    monkeypatch.setattr(gather.maps, "neighbour_map", lambda x, seed: x[:, :2])
    features = torch.full((40, 4), 0.5)
    assert [layout.name for layout in gather._layouts(features, tiny.RECIPE)] == ["PCA"]
    features[7] = 0.25
    assert [layout.name for layout in gather._layouts(features, tiny.RECIPE)] == ["PCA", "PaCMAP"]


def test_a_run_that_was_stopped_has_a_page_without_a_verdict(flat, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(flat, run)
    for name in ("results.json", "report.html", "metrics.jsonl"):
        (run / name).unlink()
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "holds no verdict" in text
    assert "unfinished" not in text  # all steps are done
    assert not (run / "report.html").exists()


def test_other_images_are_named_as_such(flat, tmp_path, capsys):
    other = tiny.folder(tmp_path / "other", {"": 9}, labelled=False)
    assert main(["report", str(flat), str(other), "--out", str(tmp_path / "page.html")]) == 0
    assert "the run was trained on other images" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert "The run was trained on other images" in text
    assert 'id="views"' not in text


def test_a_report_that_fails_loses_nothing_of_the_run(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(gather, "gather_content", fail)
    data = tiny.folder(tmp_path / "data", {"": 24}, labelled=False)
    assert main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS]) == 0
    err = capsys.readouterr().err
    assert "no report: MemoryError: no room" in err
    assert "Traceback" not in err
    assert (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()
    # --no-report writes none.
    assert main(["pretrain", str(data), "--out", str(tmp_path / "run2"), *KNOBS, "--no-report"]) == 0
    assert "report" not in capsys.readouterr().err


@pytest.mark.parametrize(("place", "message"), [("nowhere", "is not a folder"), ("", "holds no checkpoint")])
def test_no_run_is_a_sentence(tmp_path, capsys, place, message):
    assert main(["report", str(tmp_path / place)]) == 2
    assert message in capsys.readouterr().err


# In a real browser.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])  # CI runs as root
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a run's page; a console message, network request or dialog fails the test at its end."""
    contexts, trouble = [], []

    def open_page(run, *, width=1280, scheme="light", touch=False):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch, offline=True
        )
        contexts.append(context)
        tab = context.new_page()
        address = (run / "report.html").as_uri()
        tab.on("console", lambda message: trouble.append(message.text))
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda r: None if r.url == address or r.url.startswith("data:") else trouble.append(r.url))
        tab.goto(address)
        tab.wait_for_selector("#canvas[data-ready]")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_any_screen_and_both_themes(visit, hostile, width, scheme):
    tab = visit(hostile[1], width=width, scheme=scheme)
    tab.locator("summary").click()  # the folded charts are drawn when they are opened
    assert tab.locator(".uplot canvas").count() == tab.locator("figure.chart").count()
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    wide = "e => [...e.querySelectorAll('section *')].filter(x => !x.closest('.scroll, .uplot, #legend, .line'))"
    beyond = (
        f"({wide})(document).filter(x => x.getBoundingClientRect().right > {width}).map(x => x.outerHTML.slice(0, 99))"
    )
    assert tab.evaluate(beyond) == []
    hidden = "[...document.querySelectorAll('.plain td')].filter(td => td.getBoundingClientRect().width > 0 && "
    hidden += "td.getBoundingClientRect().right > td.closest('.scroll').getBoundingClientRect().right + 1).length"
    assert tab.evaluate(hidden) == 0, "a value that must be scrolled to is not seen on a phone"
    broken = "[...document.images].filter(i => i.src && i.complete && !i.naturalWidth).length"
    assert tab.evaluate(broken) == 0
    red, green, blue = background(tab)
    assert (red + green + blue < 200) == (scheme == "dark")


def background(tab):
    return [int(n) for n in re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))][:3]


def ink(tab, selector):
    """The pixels of a canvas as text."""
    tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return tab.evaluate(f"document.querySelector('{selector}').toDataURL()")


def test_the_theme_is_chosen_and_charts_and_map_follow(visit, hostile):
    tab = visit(hostile[1])
    seen = {}
    for expected in ("auto", "light", "dark"):
        assert tab.locator("#theme span").inner_text() == expected
        seen[expected] = (background(tab), ink(tab, "#canvas"), ink(tab, "#curves canvas"))
        tab.click("#theme")
    assert seen["auto"] == seen["light"]
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))
    assert tab.locator("#theme span").inner_text() == "auto"


def point_at_an_image(tab, wanted=None):
    """Move over the map until an image shows, of the group `wanted` if any; returns the pointer's place."""
    tab.locator("#canvas").scroll_into_view_if_needed()
    box = tab.locator("#canvas").bounding_box()
    for y in np.arange(0.05, 1, 0.06):
        for x in np.arange(0.2, 0.8, 0.04):
            at = box["x"] + x * box["width"], box["y"] + y * box["height"]
            tab.mouse.move(*at)
            if tab.locator("#tip").is_visible() and (wanted is None or tab.locator("#tip b").inner_text() == wanted):
                return at
    raise AssertionError("no image under the pointer anywhere")


def test_hovering_over_the_map_shows_the_image_and_its_name(visit, hostile):
    tab = visit(hostile[1])
    assert tab.locator("#tip").is_hidden()
    point_at_an_image(tab)
    path = tab.locator("#tip bdi").inner_text()
    assert path in {page.visible(name) for part in cache.load(hostile[0], side=16) for name in part.paths}
    assert tab.evaluate("document.querySelector('#tip img').naturalWidth") == 16
    assert tab.locator("#status").inner_text().endswith(path)
    # It is the thumbnail of that image.
    shown = tab.locator("#tip img").get_attribute("src").partition(",")[2]
    drawn = payload(read(hostile[1]))["map"]
    place = unpack_names(drawn).index(path)
    assert shown == drawn["thumbnails"][place]
    tab.mouse.move(5, 5)
    assert tab.locator("#tip").is_hidden()


def test_the_map_is_walked_by_keys_and_tapped(visit, hostile):
    tab = visit(hostile[1], width=390, touch=True)
    tab.focus("#canvas")
    tab.keyboard.press("ArrowRight")
    seen = [tab.locator("#status").inner_text()]
    for way in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp") * 2:
        tab.keyboard.press(way)
        seen.append(tab.locator("#status").inner_text())
    assert all(seen)
    assert len(set(seen)) > 2
    before = ink(tab, "#canvas")
    tab.keyboard.press("+")
    assert ink(tab, "#canvas") != before
    tab.keyboard.press("Home")
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").is_hidden()
    tab.locator("#canvas").scroll_into_view_if_needed()
    box = tab.locator("#canvas").bounding_box()
    for across in np.arange(0.1, 0.9, 0.1):  # where the points lie depends on what was learnt
        for down in np.arange(0.1, 0.9, 0.05):
            tab.touchscreen.tap(box["x"] + across * box["width"], box["y"] + down * box["height"])
            if tab.locator("#tip").is_visible():
                return
    raise AssertionError("no tap showed an image")


def test_the_legend_filters_the_map_and_layouts_switch(visit, hostile):
    tab = visit(hostile[1])
    buttons = tab.locator("#legend button")
    assert sorted(buttons.all_inner_texts()) == sorted([HOSTILE_CLASS, "green"])
    all_shown = ink(tab, "#canvas")
    green = tab.locator("#legend button", has_text="green")
    at = point_at_an_image(tab, "green")
    green.click()
    assert green.get_attribute("aria-pressed") == "false"
    some_shown = ink(tab, "#canvas")
    assert some_shown != all_shown
    tab.mouse.move(at[0], at[1] + 1)
    tab.mouse.move(*at)
    assert tab.locator("#tip").is_hidden() or tab.locator("#tip b").inner_text() == HOSTILE_CLASS
    green.click()
    tab.mouse.move(5, 5)
    assert ink(tab, "#canvas") == all_shown
    tab.click("#layout button:has-text('PCA')")
    assert ink(tab, "#canvas") != all_shown
    tab.click("#colour button:has-text('image')")
    assert tab.locator("#colour button[aria-pressed=true]").inner_text() == "image colour"


def test_settings_are_sorted_searched_and_filtered(visit, hostile):
    tab = visit(hostile[1])

    def shown(column):
        rows = tab.locator("#settings-table tbody tr:visible")
        return [row.locator("th, td").nth(column).inner_text() for row in rows.all()]

    count = len(shown(0))
    tab.click("#settings-table button:has-text('setting')")
    names = shown(0)
    assert names == sorted(names, key=str.lower)
    tab.click("#settings-table button:has-text('setting')")
    assert shown(0) == names[::-1]
    tab.click("#settings-table button:has-text('value')")
    numbers = [float(value) for value in shown(1) if re.fullmatch(r"[\d.e+-]+", value)]
    assert numbers == sorted(numbers)  # as numbers: 8 before 16
    assert tab.locator("th[aria-sort]").all_inner_texts()[0].startswith("value")
    tab.fill("#search", "optim lr")
    assert sorted(shown(0)) == ["--optim.lr", "--optim.min-lr", "--optim.start-lr"]
    assert tab.locator("#shown").inner_text() == f"3 of {count} settings"
    tab.fill("#search", "")
    tab.check("#changed")
    assert {"--size", "--batch", "--projector.widths"} <= set(shown(0))
    assert "--seed" not in shown(0)


def test_the_browser_sees_no_element_that_a_name_made(visit, hostile):
    tab = visit(hostile[1])
    assert tab.locator("script").count() == 1 + len(page.SCRIPTS)
    assert (
        tab.evaluate(
            "[...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => /^on/.test(a.name))).length"
        )
        == 0
    )
    tab.focus("#canvas")
    for way in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp") * 4:
        tab.keyboard.press(way)  # names go from the map into the page
    assert tab.locator("img[src='x']").count() == 0


def test_a_page_without_labels_works_too(visit, flat):
    tab = visit(flat, scheme="dark")
    point_at_an_image(tab)
    said = tab.evaluate("document.body.innerText").lower()
    assert "class" not in said
    assert tab.locator("#legend button").count() == 0


def test_paper_is_light(visit, flat):
    tab = visit(flat, scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert sum(int(n) for n in re.findall(r"\d+", tab.evaluate("theme.colour('ink')"))[:3]) < 150  # dark on white
    assert tab.locator("nav").is_hidden()
    assert tab.locator("#theme").is_hidden()


CHANGED = Recipe(n_views=3, views=(View(blur=0.5), View()), optim=Optim(clip=2, decay_norms=False), from_files=True)


@pytest.mark.parametrize("name", ["cifar10", "cpu-small", "one of my own"])
def test_the_command_of_the_page_repeats_the_run(tmp_path, name):
    facts = Facts(
        data="/a b",
        recipe_name=name,
        options=Options(log_steps=3, evaluate=False, track="wandb"),
        root="/sets",
        holdout=0.1,
        skip="skip.txt",
    )
    program, *words = shlex.split(page.repeat_command(tmp_path, facts, CHANGED))
    command, typed = parse(words)
    assert program == "corinfomax"
    assert (command.data, command.out, command.resume) == ("/a b", None, None)
    assert command.options == facts.options
    images = command.images
    assert (str(images.root), images.holdout, images.skip) == ("/sets", 0.1, tmp_path / "skip.txt")
    assert command.recipe == (name if name in RECIPES else None)
    base = RECIPES[name].recipe if name in RECIPES else Recipe()
    assert fields.override(base, command.settings, typed & set(fields.flags(base))) == CHANGED


def test_the_command_of_an_unchanged_run_names_its_recipe_alone():
    facts = Facts(data="cifar10", recipe_name="cifar10")
    command = page.repeat_command(Path("/run"), facts, RECIPES["cifar10"].recipe)
    assert command == "corinfomax pretrain cifar10 --recipe cifar10"


def test_settings_show_the_change_to_the_recipe():
    recipe = replace(RECIPES["cifar10"].recipe, epochs=7)
    changes = [row for row in page.settings(recipe, "cifar10") if row[1] != row[2]]
    assert changes == [("--epochs", 7, RECIPES["cifar10"].recipe.epochs)]
    assert all(value == usual for _, value, usual in page.settings(recipe, "my own"))


def test_views_of_narrow_levels_keep_them_in_pictures():
    """Of 12 bits in 16 a view shows more than the few steps of 255, in the colours of its image."""
    pixels = PixelFormat(channels=1, colours=False, high=(65535.0,), steps=(65535,))
    recipe = replace(tiny.RECIPE, pixels=pixels, mean=(0.01,), std=(0.005,))
    whole = np.arange(400, dtype=np.uint16).reshape(1, 20, 20)
    x = (torch.from_numpy(whole[None].astype(np.float32)) / 65535 - 0.01) / 0.005
    (picture,) = thumbnails.view_pixels(x, recipe, [whole])
    assert len(np.unique(picture)) > 200 and picture.shape == (20, 20, 3)
    (brighter,) = thumbnails.view_pixels(x + 0.5, recipe, [whole])
    assert brighter.mean() > picture.mean() + 30, "a brighter view is a brighter picture"
