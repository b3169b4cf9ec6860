"""Peak memory of each command on made-up images: many small ones, some large ones, and tiles of 13 bands of 16 bits.

`python -m benchmarks.memory.commands FOLDER` makes the images there once, runs every command in a process of its own
with the recipe that is chosen for them, and prints a table. The peak is the largest resident memory (VmHWM), that of
the largest child beside it; in MB of a million bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image


class Images(NamedTuple):
    """A set to make: its number of images, their side in pixels, and what they are."""

    number: int
    side: int
    kind: str = "RGB"


BANDS = "13 bands of 16 bits"
SETS = {"small": Images(100_000, 64), "large": Images(10_000, 224), "bands": Images(20_000, 64, BANDS)}
CLASSES = 10
STEPS = 20  # of training
PROGRAM = """
import resource, sys, time
from corinfomax.cli.main import main
began = time.perf_counter()
code = main()
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print("measured", own * 1.024e-3, child * 1.024e-3, time.perf_counter() - began, file=sys.stderr)
sys.exit(code)
"""
IMPORT = (
    "import sys; from corinfomax.cli import train; from corinfomax.report import gather; sys.argv[1:] = ['recipes']\n"
)


class Peak(NamedTuple):
    """Megabytes of a command's process and of its largest child, and its seconds."""

    own: float
    child: float
    seconds: float


def pictures(folder: Path, images: Images) -> Path:
    """A folder train|test/<class>/<number> of soft colours under shapes, a tenth of them to test on."""
    count, side, kind = images
    root, rng = folder / f"{count}-{side}{'-bands' if kind == BANDS else ''}", np.random.default_rng(0)
    if root.exists():
        return root
    unfinished = folder / f"{root.name}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    for split in ("train", "test"):
        for c in range(CLASSES):
            (unfinished / split / f"class{c}").mkdir(parents=True)
    for i in range(count):
        label, split = i % CLASSES, "test" if i // CLASSES % 10 == 0 else "train"
        soft = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        pixels = np.array(soft)
        height, width = rng.integers(side // 8, side // 2, 2)
        top, left = rng.integers(0, side // 2, 2)
        pixels[top : top + height, left : left + width, label % 3] = 20 * label
        pixels ^= rng.integers(0, 16, pixels.shape, np.uint8)
        path = unfinished / split / f"class{label}" / f"{i:06}"
        if kind == BANDS:
            noise = rng.integers(0, 200, (13, side, side), np.uint16)
            values = 30 * pixels.transpose(2, 0, 1)[np.arange(13) % 3].astype(np.uint16) + noise
            tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", planarconfig="separate")
        else:
            Image.fromarray(pixels).save(path.with_suffix(".jpg"), "JPEG", quality=80)
    unfinished.rename(root)
    return root


def commands(data: Path, run: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    """Name and words of each command, in the order in which they need each other."""
    out = run.parent
    steps = [
        "--epochs",
        f"{STEPS * 256 / (0.9 * count):.4f}",
        "--optim.warmup-epochs",
        "0",
        "--no-evaluate",
        "--no-report",
    ]
    query = next((data / "test" / "class0").iterdir())
    yield "doctor", ["doctor", str(data), "--out", str(out / "skip.txt")]
    yield f"pretrain, {STEPS} steps", ["pretrain", str(data), "--out", str(run), *steps]
    yield "embed to .npz", ["embed", str(run), str(data), "--out", str(out / "vectors.npz")]
    yield "embed to .parquet", ["embed", str(run), str(data), "--out", str(out / "vectors.parquet")]
    neighbours = ["--query", str(query), "--out", str(out / "neighbors.html")]
    yield "neighbors", ["neighbors", str(run), str(data), *neighbours]
    yield "report", ["report", str(run)]
    yield "export", ["export", str(run), "--out", str(out / "exported")]
    yield "evaluate", ["evaluate", str(run), str(data)]


def measure_peak(words: Sequence[str], *, cache: Path, program: str = PROGRAM, source: Path | None = None) -> Peak:
    """Run a command; RuntimeError with its message if it fails. `source` is another version of the package."""
    environment = {**os.environ, "CORINFOMAX_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    asked = [sys.executable, "-c", program, *words]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    last = (done.stderr.strip() or "no word").splitlines()[-1]
    if not last.startswith("measured") or done.returncode > 1:  # 1: doctor found a fault
        raise RuntimeError(f"{' '.join(words)}: {last}")
    return Peak(*map(float, last.split()[1:]))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row of the table for each command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.commands", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="the images to use")
    parser.add_argument("--share", type=float, default=1.0, help="of the images to make, for a quick look")
    parser.add_argument("--only", nargs="+", help="first words of the commands to run; others must have run before")
    parser.add_argument("--source", type=Path, help="folder with another version of the package to measure")
    options = parser.parse_args(argv)
    cache = options.folder / "cache"
    print("| images | command | peak, MB | largest child, MB | seconds |\n|---|---|---:|---:|---:|")
    alone = measure_peak([], cache=cache, program=IMPORT + PROGRAM, source=options.source)
    print(f"| | imports alone | {alone.own:,.0f} | | |", flush=True)
    for name in options.sets:
        images = SETS[name]._replace(number=int(options.share * SETS[name].number))
        data = pictures(options.folder, images)
        out = options.folder / f"out-{data.name}"
        if not options.only:
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(cache, ignore_errors=True)
        out.mkdir(exist_ok=True)
        for command, words in commands(data, out / "run", images.number):
            if options.only and words[0] not in options.only:
                continue
            try:
                peak = measure_peak(words, cache=cache, source=options.source)
                cells = f"{peak.own:,.0f} | {peak.child:,.0f} | {peak.seconds:,.0f}"
            except RuntimeError as error:
                cells = f"failed: {error} | | "
            print(f"| {images.number:,} of {images.side} px, {images.kind} | {command} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
