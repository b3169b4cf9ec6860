"""A trained backbone for others to load without this package, each file verified where nothing of us is at hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from corinfomax import network
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Backbone, Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.seeds import generator
from corinfomax.weights import card
from corinfomax.weights.checkpoint import Checkpoint

Format = Literal["timm", "onnx", "state-dict"]
TOLERANCE = 1e-4  # largest difference of a feature, relative to the largest feature where that is above 1
BATCHES = (3, 1)  # images each file is tried on: more than one batch size, since a file may have one built in
TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # same names and arithmetic as timm's


class Exported(NamedTuple):
    """A file or folder that was written and verified."""

    path: Path
    tensors: int
    difference: float
    """The largest of a feature in the fresh process from the same feature here."""
    loader: str
    """What loaded it there."""


def export(backbone: nn.Module, saved: Checkpoint, out: Path, form: Format, *, results: dict[str, Any]) -> Exported:
    """Write `backbone`, in eval mode on the CPU, to `out`, and load it again in a process that cannot import us.

    `timm` is a folder that `timm.create_model("local-dir:…", pretrained=True)` loads; a small stem, which timm has no
    arguments for, comes with load.py, a few lines on timm alone. `state-dict` is one .safetensors file under timm's
    names, which are torchvision's for its ResNets. `onnx` takes any number of images and gives their features.
    `results` is the run's results.json, for the model card. The name appears once the features there are those here to
    TOLERANCE. Raises ValueError when they are not, when `out` is in the way, or when an extra is missing.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; name another with --out, or remove it")
    write: dict[Format, Callable[..., str]] = {"timm": _write_folder, "onnx": _write_onnx, "state-dict": _write_file}
    check_extra(form)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        part = Path(folder) / out.name
        loader = write[form](part, backbone, saved, results)
        difference = _verify(part, backbone, saved.recipe, form)
        if not difference <= TOLERANCE:  # nan too
            raise ValueError(f"{out} was not kept: reloaded, its features differ by {difference:.1e}, {loader}")
        part.replace(out)
    return Exported(out, len(backbone.state_dict()), difference, loader)


def check_extra(form: Format) -> None:
    """ValueError when what a format needs is not installed."""
    if form == "onnx" and not all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime")):
        raise ValueError("ONNX needs onnxscript and onnxruntime, the extra onnx: uv run --extra onnx corinfomax …")


def _write_folder(part: Path, backbone: nn.Module, saved: Checkpoint, results: dict[str, Any]) -> str:
    part.mkdir()
    _write_tensors(part / "model.safetensors", backbone, saved.recipe)
    run_folder.write_json(part / "config.json", timm_config(saved.recipe, features=int(backbone.num_features)))  # type: ignore[arg-type]
    plain = not saved.recipe.backbone.small_stem
    if not plain:
        code = loading_code(saved.recipe.backbone, saved.recipe.size)
        (part / "load.py").write_text(code, encoding="utf-8")
    (part / "README.md").write_text(card.markdown(saved, results, plain=plain), encoding="utf-8")
    return "by timm alone" if plain else "by its load.py and timm alone"


def _write_file(part: Path, backbone: nn.Module, saved: Checkpoint, results: dict[str, Any]) -> str:
    _write_tensors(part, backbone, saved.recipe)
    return "by torchvision alone" if is_torchvisions(saved.recipe.backbone) else "by timm alone"


def _write_onnx(part: Path, backbone: nn.Module, saved: Checkpoint, results: dict[str, Any]) -> str:
    images = torch.zeros(2, 3, saved.recipe.test_side, saved.recipe.test_side)
    program = torch.onnx.export(
        backbone,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    program.model.metadata_props.update(_metadata(saved.recipe))
    program.save(str(part), external_data=False)
    return "by onnxruntime alone"


def _write_tensors(path: Path, backbone: nn.Module, recipe: Recipe) -> None:
    # save_file makes a file that its owner alone may read; this one is for others.
    path.write_bytes(save(_tensors(backbone), _metadata(recipe)))


def _tensors(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in backbone.state_dict().items()}


def _metadata(recipe: Recipe) -> dict[str, str]:
    return {"format": "pt", "recipe": json.dumps(fields.to_json(recipe))}


def is_torchvisions(backbone: Backbone) -> bool:
    """Whether torchvision has this very network."""
    return backbone == Backbone(name=backbone.name) and backbone.name in TORCHVISION


def timm_config(recipe: Recipe, *, features: int) -> dict[str, Any]:
    """config.json as timm's hub has it: the network, and how an image becomes its input."""
    backbone, known = recipe.backbone, timm.get_pretrained_cfg(recipe.backbone.name)
    assert known is not None
    return {
        "architecture": backbone.name.partition(".")[0],
        "num_classes": 0,
        "num_features": features,
        "model_args": {"num_classes": 0, **_arguments(backbone, recipe.size)},
        "pretrained_cfg": {
            "tag": "corinfomax",
            "custom_load": False,
            "input_size": [3, recipe.test_side, recipe.test_side],
            "fixed_input_size": known.fixed_input_size,
            "interpolation": "bicubic",
            "crop_pct": 0.875,  # the short side is resized to ⌊size · 8/7⌋ before the centre crop
            "crop_mode": "center",
            "mean": recipe.mean,
            "std": recipe.std,
            "num_classes": 0,
            "first_conv": known.first_conv,
            "classifier": known.classifier,
        },
    }


def _arguments(backbone: Backbone, size: int) -> dict[str, Any]:
    """What timm.create_model must be told beside the name and that there are no classes."""
    options: dict[str, Any] = {
        name: list(value) for name in ("layers", "channels") if (value := getattr(backbone, name)) is not None
    }
    return options | ({"img_size": size} if network.fixed_size(backbone) else {})


def loading_code(backbone: Backbone, size: int, *, torchvision: bool = False) -> str:
    """Python source whose `backbone(path)` gives the network with the tensors of that file, without this package."""
    if torchvision:
        library = "torchvision"
        build = [f"model = torchvision.models.{backbone.name}()", "model.fc = torch.nn.Identity()"]
    else:
        library = "timm"
        options = "".join(f", {name}={value!r}" for name, value in _arguments(backbone, size).items())
        build = [f'model = timm.create_model("{backbone.name.partition(".")[0]}", num_classes=0{options})']
    if backbone.small_stem:
        width = len(network.build_backbone(backbone, size=size).get_parameter("conv1.weight"))
        build += [
            f"model.conv1 = torch.nn.Conv2d(3, {width}, 3, stride={backbone.stem_stride}, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
        if width != 64:
            build += [
                f"model.bn1 = torch.nn.BatchNorm2d({width})",
                f"model.layer1[0].conv1 = torch.nn.Conv2d({width}, {width}, 3, padding=1, bias=False)",
                "model.layer1[0].downsample = None",
            ]
    lines = "\n    ".join((*build, "model.load_state_dict(load_file(weights))", "return model.eval()"))
    return f'''"""The backbone with its trained weights: pooled features of normalised images, with {library} alone."""

from pathlib import Path

import {library}
import torch
from safetensors.torch import load_file


def backbone(weights=Path(__file__).with_name("model.safetensors")):
    {lines}
'''


def _verify(part: Path, backbone: nn.Module, recipe: Recipe, form: Format) -> float:
    """The largest difference of a feature there from the same feature here, relative where features are above 1."""
    images = torch.randn(
        sum(BATCHES), 3, recipe.test_side, recipe.test_side, generator=generator(recipe.seed, "export")
    )
    with torch.inference_mode():
        here = torch.cat([backbone(x) for x in images.split(BATCHES)])
    there = _elsewhere(part, images, recipe, form)
    if there.shape != here.shape:
        raise ValueError(f"{part.name} gives features of shape {tuple(there.shape)}, wanted {tuple(here.shape)}")
    return float((here - there).abs().max() / here.abs().max().clamp_min(1))


LOADERS = {
    "timm": 'features = timm.create_model("local-dir:" + path, pretrained=True).eval()',
    "load.py": 'features = runpy.run_path(path + "/load.py")["backbone"]()',
    "state-dict": 'features = runpy.run_path("load.py")["backbone"](path)',
    "onnx": """session = onnxruntime.InferenceSession(path)
def features(images):
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])""",
}
SCRIPT = """import sys
sys.modules["corinfomax"] = None  # importing it is an error
import runpy
import torch
from safetensors.torch import load_file, save_file
IMPORT
path = sys.argv[1]
LOAD
with torch.inference_mode():
    found = [features(images) for images in load_file("images.safetensors")["images"].split(BATCHES)]
save_file({"features": torch.cat(found).contiguous()}, "features.safetensors")
"""


def _elsewhere(part: Path, images: Float[Tensor, "n 3 s s"], recipe: Recipe, form: Format) -> Float[Tensor, "n f"]:
    """The features of the images in a fresh process, in an empty folder, that loads `part` as a stranger would."""
    way = "load.py" if form == "timm" and recipe.backbone.small_stem else form
    needs = {"timm": "import timm", "onnx": "import onnxruntime"}.get(way, "")
    script = SCRIPT.replace("IMPORT", needs).replace("LOAD", LOADERS[way]).replace("BATCHES", repr(BATCHES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"images": images}, folder / "images.safetensors")
        (folder / "main.py").write_text(script, encoding="utf-8")
        code = loading_code(recipe.backbone, recipe.size, torchvision=is_torchvisions(recipe.backbone))
        (folder / "load.py").write_text(code, encoding="utf-8")
        words = [sys.executable, "main.py", str(part.absolute())]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(f"{part.name} was not kept: a fresh process cannot load it: {said}")
        return load_file(folder / "features.safetensors")["features"]
