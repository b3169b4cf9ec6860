"""A trained backbone in files that load without this package, each verified in a fresh process."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import timm
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from corinfomax.network import backbone_for, has_fixed_size
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Backbone, Recipe
from corinfomax.runtime import extras, run_folder
from corinfomax.runtime.records import Results, Start
from corinfomax.runtime.seeds import generator
from corinfomax.weights import card
from corinfomax.weights.checkpoint import Checkpoint

ExportFormat = Literal["timm", "onnx", "state-dict"]
MAX_DIFFERENCE = 1e-4  # of a feature after reloading, relative to the largest feature if that is above 1
TRIAL_BATCHES = (3, 1)  # images per trial batch: two sizes, in case a file has one built in
# Networks of the same names and arithmetic in timm and torchvision.
TORCHVISION = tuple(Backbone(name=f"resnet{depth}") for depth in (18, 34, 50, 101, 152))


class Exported(NamedTuple):
    """A verified file or folder."""

    path: Path
    tensors: int
    difference: float  # largest of a feature, between the fresh process and this one
    loader: str  # such as "by timm alone"


def export_backbone(
    backbone: nn.Module, saved: Checkpoint, out: Path, form: ExportFormat, *, results: Results
) -> Exported:
    """Write `backbone`, in eval mode on the CPU, to `out`, and reload it in a process that cannot import this package.

    `timm` is a folder for `timm.create_model("local-dir:…", pretrained=True)`, with a model card of `results`. timm has
    no arguments for a small stem, so load.py comes with it, a few lines on timm alone. `state-dict` is one .safetensors
    file with timm's names, torchvision's for its ResNets. `onnx` turns any number of images into features. Raises
    ValueError, and writes nothing, if features differ by over MAX_DIFFERENCE, `out` exists, or an extra is missing.
    """
    if out.exists():
        raise ValueError(f"{out} already exists; name another with --out, or remove it")
    if form == "onnx" and not all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime")):
        raise ValueError(extras.missing("ONNX", "onnxscript and onnxruntime", extra="onnx"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        # Write beside `out`.
        path, recipe = Path(folder) / out.name, saved.recipe
        if form == "timm":
            loader = _write_folder(path, backbone, saved, results)
        elif form == "state-dict":
            loader = f"by {_library(recipe)} alone"
            write_tensors(path, backbone, recipe, saved.facts.start)
        else:
            loader = "by onnxruntime alone"
            _write_onnx(path, backbone, recipe)

        # Verify, then move.
        difference = _feature_difference(path, backbone, recipe, form)
        if not difference <= MAX_DIFFERENCE:  # nan too
            raise ValueError(f"{out} was not kept: loaded {loader}, its features differ by {difference:.1e}")
        path.replace(out)
    return Exported(out, len(backbone.state_dict()), difference, loader)


def _write_folder(path: Path, backbone: nn.Module, saved: Checkpoint, results: Results) -> str:
    """Write a folder as on timm's hub: weights, config.json, model card, and load.py for a small stem."""
    # The network and the preprocessing of test images.
    recipe, timms = saved.recipe, timm.get_pretrained_cfg(saved.recipe.backbone.name)
    assert timms is not None
    inputs = {
        "input_size": [recipe.pixels.channels, recipe.test_side, recipe.test_side],
        "fixed_input_size": timms.fixed_input_size,
    }
    inputs |= {"crop_pct": 0.875, "crop_mode": "center"}  # timm resizes to ⌊size · 8/7⌋
    inputs |= {"interpolation": recipe.interpolation, "mean": recipe.mean, "std": recipe.std}
    layers = {"num_classes": 0, "first_conv": timms.first_conv, "classifier": timms.classifier}
    network = {"architecture": recipe.backbone.name.partition(".")[0], "num_classes": 0}
    network |= {"num_features": backbone.num_features, "model_args": _timm_arguments(recipe)}
    start = saved.facts.start
    if start is not None:
        inputs |= _origin(start)
    config = {**network, "pretrained_cfg": {"tag": "corinfomax", "custom_load": False, **inputs, **layers}}

    # The files.
    path.mkdir()
    write_tensors(path / "model.safetensors", backbone, recipe)
    run_folder.write_json(path / "config.json", config)
    plain = not recipe.backbone.small_stem
    if not plain:
        (path / "load.py").write_text(loading_code(recipe), encoding="utf-8")
    (path / "README.md").write_text(card.markdown(saved, results, plain=plain), encoding="utf-8")
    return "by timm alone" if plain else "by its load.py and timm alone"


def _write_onnx(path: Path, backbone: nn.Module, recipe: Recipe) -> None:
    """Write an ONNX program with a free batch size."""
    side, shapes = recipe.test_side, ({0: torch.export.Dim("batch")},)
    images = (torch.zeros(2, recipe.pixels.channels, side, side),)
    program = torch.onnx.export(
        backbone, images, input_names=["images"], output_names=["features"], dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    program.model.metadata_props.update(format="pt", recipe=json.dumps(fields.to_json(recipe)))
    program.save(str(path), external_data=False)


def write_tensors(path: Path, backbone: nn.Module, recipe: Recipe, start: Start | None = None) -> None:
    """Write the backbone's tensors with their recipe and the licence of the weights they began from, if any.

    Whole, and readable for everyone: save_file would allow its owner only.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in backbone.state_dict().items()}
    metadata = {"format": "pt", "recipe": json.dumps(fields.to_json(recipe))}
    if start is not None:
        metadata["origin"] = json.dumps(_origin(start))
    content = save(tensors, metadata)
    run_folder.write_whole(path, lambda temporary: temporary.write_bytes(content))


def _origin(start: Start) -> dict[str, str | None]:
    """Licence, source and paper of the starting weights, under timm's names."""
    return {"license": start.license, "origin_url": start.source, "paper_ids": start.paper}


def _timm_arguments(recipe: Recipe) -> dict[str, int | list[int]]:
    """Arguments of timm.create_model for the network, but for its name."""
    backbone, channels = recipe.backbone, recipe.pixels.channels
    lists = {"layers": backbone.layers, "channels": backbone.channels}
    arguments: dict[str, int | list[int]] = {"num_classes": 0}
    arguments |= {name: list(value) for name, value in lists.items() if value is not None}
    arguments |= {"img_size": recipe.size} if has_fixed_size(backbone) else {}
    return arguments | ({"in_chans": channels} if channels != 3 else {})


def _library(recipe: Recipe) -> str:
    """The library whose network the recipe's is: torchvision has some of timm's, for RGB."""
    return "torchvision" if recipe.backbone in TORCHVISION and recipe.pixels.channels == 3 else "timm"


def loading_code(recipe: Recipe) -> str:
    """Python source without this package: its `backbone(path)` builds the network with the tensors of that file."""
    # after a narrow stem the first block is another too
    backbone = recipe.backbone
    width = len(backbone_for(recipe).get_parameter("conv1.weight")) if backbone.small_stem else 64
    arguments = ", ".join(f"{key}={value!r}" for key, value in _timm_arguments(recipe).items())
    values = {"name": backbone.name.partition(".")[0], "width": width, "channels": recipe.pixels.channels}
    return card.template("load.py.jinja").render(
        backbone=backbone, arguments=arguments, library=_library(recipe), **values
    )


def _feature_difference(path: Path, backbone: nn.Module, recipe: Recipe, form: ExportFormat) -> float:
    """Largest difference of a feature after reloading, relative to the largest feature if that is above 1."""
    rng = generator(recipe.seed, "export")
    side = recipe.test_side
    images = torch.randn(sum(TRIAL_BATCHES), recipe.pixels.channels, side, side, generator=rng)
    with torch.inference_mode():
        before = torch.cat([backbone(x) for x in images.split(TRIAL_BATCHES)])

    # Reload in a fresh process without this package, in a folder of its own.
    loader = "load.py" if form == "timm" and recipe.backbone.small_stem else form
    script = card.template("verify.py.jinja").render(loader=loader, batches=TRIAL_BATCHES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"images": images}, folder / "images.safetensors")
        (folder / "main.py").write_text(script, encoding="utf-8")
        (folder / "load.py").write_text(loading_code(recipe), encoding="utf-8")
        command = [sys.executable, "main.py", str(path.absolute())]
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason was printed").splitlines()[-1]
            raise ValueError(f"{path.name} was not kept: a fresh process cannot load it: {reason}")
        after = load_file(folder / "features.safetensors")["features"]
    return float((before - after).abs().max() / before.abs().max().clamp_min(1))
