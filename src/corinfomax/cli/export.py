"""`corinfomax export`: the trained backbone for use without this package, verified."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from corinfomax.cli.arguments import PATH

if TYPE_CHECKING:
    from corinfomax.weights.export import Exported


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the trained backbone for use without this package.

    A run that did not improve on its starting weights exports those; name a checkpoint to get its own. A fresh process
    loads what is written and compares the features. timm is a folder with a model card, for
    timm.create_model("local-dir:…", pretrained=True), or for its own load.py when timm has no such network. state-dict
    is one .safetensors file with timm's names, which are torchvision's for its ResNets. onnx needs the onnx extra.
    """

    weights: Annotated[Path, Positional, arg(metavar="WEIGHTS")]
    """A run folder or one of its checkpoints."""
    format: Literal["timm", "onnx", "state-dict"] = "timm"
    """Format to write."""
    out: PATH = None
    """Folder or file to write; default is the run's name, here."""

    def run(self, typed: frozenset[str]) -> int:
        done = self.write()
        verified = f"loaded {done.loader} in a fresh process, features differ by at most {done.difference:.1e}"
        print(f"{done.path}: {done.tensors} tensors; {verified}")
        return 0

    def write(self) -> "Exported":
        """Write and verify the files; prints a line if they hold the weights of the start."""
        from corinfomax.cli import messages
        from corinfomax.evaluation import table
        from corinfomax.runtime import run_folder
        from corinfomax.runtime.records import Results
        from corinfomax.weights import checkpoint, export, load

        # a run's verdict and scores belong to its last checkpoint only
        path = self.weights.absolute()
        run = path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else None
        if path.is_dir() and run_folder.read_results(path).keep_start:
            results, is_last = run_folder.read_results(path), True
            reason = "continuing did not help" if table.BEFORE in results.table else "the run went wrong"
            place = messages.from_here(path / "checkpoints")
            others = f"; the others are in {place}" if run_folder.checkpoints(path) else ""
            print(f"{reason}: exporting the weights of the start{others}")
            start, saved = load.load_start(path), checkpoint.load_resumable(path)._replace(step=0)
            backbone, saved = start.backbone, saved._replace(recipe=load.with_input_of(saved.recipe, start.recipe))
        else:
            network, saved = checkpoint.load_network(self.weights)
            backbone, steps = network.backbone, map(run_folder.step_of, run_folder.checkpoints(run) if run else ())
            is_last = max(steps, default=None) == saved.step
            results = run_folder.read_results(run) if run is not None and is_last else Results()

        name = path.stem if run is None else run.name if is_last else f"{run.name}-step-{saved.step}"
        out = self.out or Path(name + {"timm": "-timm", "onnx": ".onnx", "state-dict": ".safetensors"}[self.format])
        run_folder.check_writable(out.with_name(f"{out.name}.json") if self.format == "timm" else out)
        return export.export_backbone(backbone, saved, out, self.format, results=results)
