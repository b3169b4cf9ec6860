"""The backbone for others, and how it was verified."""

from __future__ import annotations

from pathlib import Path

from corinfomax.cli.options import Export
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint, export


def run(command: Export) -> int:
    """Write the backbone for others, and say how it was verified."""
    export.check_extra(command.format)
    network, saved = checkpoint.load_network(command.weights)
    given = command.weights.absolute()
    run = given if given.is_dir() else given.parent.parent if given.parent.name == "checkpoints" else None
    # What a run says of itself is true of its last weights alone.
    is_last = run is not None and [run_folder.step_of(path) for path in run_folder.checkpoints(run)[-1:]] == [
        saved.step
    ]
    told = None if run is None or not is_last else run / "results.json"
    results = run_folder.read_json(told) if told is not None and told.exists() else {}
    name = given.stem if run is None else run.name if is_last else f"{run.name}-step-{saved.step}"
    out = command.out or Path(name + {"timm": "-timm", "onnx": ".onnx", "state-dict": ".safetensors"}[command.format])
    done = export.export(network.backbone, saved, out, command.format, results=results)
    print(
        f"{done.path}: {done.tensors} tensors, loaded {done.loader} in a fresh process; its features there differ from "
        f"those here by at most {done.difference:.1e}"
    )
    return 0
