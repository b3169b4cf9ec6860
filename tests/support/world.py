"""The processes of test_processes.py: world.py JOB OUT [COUNT …]; rank 0 of each world writes OUT."""

import math
import os
import socket
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tiny
from corinfomax import network as networks
from corinfomax.cli import fit
from corinfomax.cli import main as cli
from corinfomax.images import cache, levels
from corinfomax.images.sources import Data
from corinfomax.objective.covariance import CorInfoMaxLoss, Moments, corinfomax_loss
from corinfomax.objective.kernel import KernelLoss
from corinfomax.recipes.fields import Backbone, Loss, Tuning
from corinfomax.runtime import processes, run_folder
from corinfomax.runtime.records import Options
from corinfomax.training import loop
from corinfomax.training import step as learner

CPU = torch.device("cpu")
BATCH, DIM, STEPS = 24, 6, 4
BATCH_NORM_ACT = Backbone(name="test_efficientnet")


def loss_and_gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every term, gradient, moment and buffer over some steps of a network with BatchNorm in 2-D and 1-D."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.BatchNorm1d(16, momentum=None),
    )
    network = nn.Sequential(body, nn.ReLU(), nn.Linear(16, DIM)).to(dtype)
    processes.share_batch_norm(network)

    # the same batch everywhere; each process takes its share
    criterion = CorInfoMaxLoss(DIM)
    share = processes.share(BATCH)
    rng = torch.Generator().manual_seed(1)
    results = {}

    for step in range(STEPS):
        x1, x2 = torch.randn(2, BATCH, 3, 8, 8, generator=rng, dtype=torch.float64).to(dtype)
        network.zero_grad()
        terms = criterion(network(x1[share]), network(x2[share]))
        terms.loss.backward()
        processes.average_gradients(network.parameters())

        # keep everything, then descend
        results |= {f"{step} {name}": term.detach() for name, term in terms._asdict().items()}
        results |= {f"{step} gradient {name}": p.grad.clone() for name, p in network.named_parameters()}
        results |= {
            f"{step} {name}": buffer.clone() for name, buffer in (*criterion.named_buffers(), *network.named_buffers())
        }
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.05 * p.grad
    return results


def pure_loss() -> dict[str, torch.Tensor]:
    """Both losses and their moments, with the gradient to the rows of all processes."""
    views = torch.randn(3, BATCH, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    share = processes.share(BATCH)
    rows = [z[share].clone().requires_grad_() for z in views]
    terms, moments = corinfomax_loss(rows, Moments.initial(DIM, views=3), alpha=20.0)
    terms.loss.backward()
    results = {"loss": terms.loss.detach(), "gradient": gather_gradients(rows), **moments._asdict()}
    rows = [z[share].clone().requires_grad_() for z in views]
    terms = KernelLoss(DIM, temperature=0.5)(*rows)
    terms.loss.backward()
    results |= {f"kernel {name}": x.detach() for name, x in terms._asdict().items()}
    # The module scales its gradient up for the mean over processes.
    return results | {"kernel gradient": gather_gradients(rows) / processes.size()}


def gather_gradients(rows: list[torch.Tensor]) -> torch.Tensor:
    """Gradient to the rows of three views in all processes."""
    whole = torch.zeros(3, BATCH, DIM, dtype=torch.float64)
    whole[:, processes.share(BATCH)] = torch.stack([row.grad for row in rows])
    return processes.total(whole)


def run(out: Path, precision: str, **knobs: Any) -> None:
    """Train with these settings, two steps an epoch."""
    # A large batch, few dimensions and small steps: otherwise rounding grows tenfold with each step for longer. It does
    # so within one process too, when a weight changes by 1e-15.
    projector = replace(tiny.RECIPE.projector, widths=(32, 4), batch_norm=True)
    optim = replace(tiny.RECIPE.optim, lr=0.001, start_lr=0.0005, clip=2.0)
    recipe = replace(tiny.RECIPE, batch=40, projector=projector, optim=optim, precision=precision)
    recipe = replace(recipe, **knobs)
    splits = cache.load(Data(out.parent / "data", holdout=0.0, cache=out.parent / "cache"), side=16, progress=False)
    out.mkdir(exist_ok=True)
    options = Options(log_steps=1, scores=0, diagnoses=0)
    start = tensors_to_keep() if recipe.tuning.batch_norm == "keep" else None
    loop.pretrain(recipe, splits, out, device=CPU, options=options, start=start)


def tensors_to_keep() -> dict[str, torch.Tensor]:
    """Tensors of a network whose BatchNorm no process on a CPU can share, so that its statistics must stay."""
    torch.manual_seed(3)
    return networks.start_tensors(networks.build_backbone(BATCH_NORM_ACT))


def fail(out: Path) -> None:
    """Make the last process's first view nan in step 5; each process writes its error down, after step 8."""
    splits = cache.load(Data(out.parent / "data", holdout=0.0, cache=out.parent / "cache"), side=16, progress=False)
    real, calls = learner.match_dtype, []

    def poisoned(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
        calls.append(x)
        # once in the run, once when the loop repeats the steps after the fourth
        bad = len(calls) in (11, 19) and processes.rank() == processes.size() - 1
        return real(x, model) * (math.nan if bad else 1.0)

    learner.match_dtype = poisoned
    run = out.parent / "failed"
    run.mkdir(exist_ok=True)
    try:
        loop.pretrain(tiny.RECIPE, splits, run, device=CPU, options=Options(log_steps=4, scores=0, diagnoses=0))
    except FloatingPointError as error:
        out.with_name(f"{out.name}-{processes.rank()}").write_text(str(error))


def hang(out: Path) -> None:
    """Silence the last process after two steps, as if its machine were lost; rank 0 writes its error down."""
    splits = cache.load(Data(out.parent / "data", holdout=0.0, cache=out.parent / "cache"), side=16, progress=False)
    real, calls = learner.match_dtype, []

    def silent(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 5 and processes.rank() == 1:
            time.sleep(14)
            os._exit(0)
        return real(x, model)

    learner.match_dtype = silent
    run = out.parent / "silent"
    run.mkdir(exist_ok=True)
    began = time.monotonic()
    try:
        loop.pretrain(tiny.RECIPE, splits, run, device=CPU, options=Options(log_steps=4, scores=0, diagnoses=0))
    except ConnectionError as error:
        out.write_text(f"{error} after {time.monotonic() - began:.0f} s")


def differ(out: Path) -> None:
    """Wait longer than the step timeout; then run the command with images, recipe and precision that differ by rank."""
    if processes.rank() == 0:
        time.sleep(6)
    processes.wait()
    shared = ["pretrain", "--cache", str(out.parent / "cache"), "--holdout", "0", "--no-evaluate", "--no-report"]
    images = out.parent / f"images-{processes.rank()}"
    cli.main([*shared, str(images), "--out", str(out.parent / "run"), *tiny.KNOBS])
    seed = str(processes.rank())
    cli.main([*shared, str(out.parent / "images-0"), "--out", str(out.parent / "again"), *tiny.KNOBS, "--seed", seed])
    networks.faster_in_bfloat16 = lambda device: processes.rank() == 0
    cli.main([*shared, str(out.parent / "images-0"), "--out", str(out.parent / "mixed"), *tiny.KNOBS])


def survey(out: Path) -> None:
    """Survey 16-bit images as the command does; each process writes down how many it measured, and the answer."""
    measured, real = [], levels.image_levels

    def counted(*arguments: Any) -> levels.ImageLevels:
        measured.append(real(*arguments))
        return measured[-1]

    levels.image_levels = counted
    found = fit.survey_in_turn(Data(out.parent / "data", cache=out.parent / "cache"))
    out.with_name(f"{out.name}-{processes.rank()}").write_text(f"{len(measured)} measured: {found}")


def work(job: str, out: Path) -> None:
    """Do the job as one process of a world."""
    if job in ("hang", "differ"):
        processes.STEP_TIMEOUT = timedelta(seconds=3)
    with processes.join(CPU):
        if job == "fail":
            fail(out)
            return
        if job == "hang":
            hang(out)
            return
        if job == "differ":
            differ(out)
            return
        if job == "survey":
            survey(out)
            return
        if job == "uneven":
            processes.share(BATCH + 1)

        # "all"
        results = {
            "double": loss_and_gradients(torch.float64),
            "float": loss_and_gradients(torch.float32),
            "pure": pure_loss(),
        }
        run(out.with_name(f"float32-{out.stem}"), "float32", epochs=2)
        run(out.with_name(f"float64-{out.stem}"), "float64", epochs=5)
        run(out.with_name(f"kernel-{out.stem}"), "float64", epochs=3, loss=Loss(name="kernel"))
        tuning = Tuning(blocks=0.4, projector_share=1 / 3, lr_scale=0.5, layer_decay=0.5, batch_norm="keep")
        run(out.with_name(f"tuned-{out.stem}"), "float64", epochs=3, tuning=tuning, backbone=BATCH_NORM_ACT)
        if processes.rank() == 0:
            run_folder.write_whole(out, lambda path: torch.save(results, path))


def fork(count: int, job: str, out: Path) -> bool:
    """Do the job in `count` processes with torchrun's environment variables; True if all succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
            code = 1
            try:
                work(job, out)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    exits = [os.waitpid(child, 0)[1] for child in children]  # a list: wait for all, even after a failure
    return not any(exits)


def main(job: str, out: Path, counts: list[int]) -> int:
    """Do the job as a process of torchrun, or with counts in forked worlds of that many processes each."""
    if not counts:
        work(job, out)
        return 0
    # A fork saves importing everything again.
    return 0 if all(fork(count, job, out.with_name(f"{count}{out.suffix}")) for count in counts) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]]))
