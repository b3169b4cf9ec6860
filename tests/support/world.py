"""Each process of test_distributed.py: tests/world.py JOB OUT [COUNT …]; the first of each world writes OUT."""

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
from corinfomax import network as hardware
from corinfomax.cli import main as cli
from corinfomax.images import cache
from corinfomax.objective.covariance import CorInfoMaxLoss, Moments, corinfomax_loss
from corinfomax.objective.kernel import KernelLoss
from corinfomax.recipes.fields import Loss
from corinfomax.runtime import processes, run_folder
from corinfomax.training import loop
from corinfomax.training import step as learner

CPU = torch.device("cpu")
BATCH, DIM, STEPS = 24, 6, 4


def loss_and_gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Some steps of a network with BatchNorm in 2-D and 1-D: every term, gradient, moment and buffer."""
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
    criterion = CorInfoMaxLoss(DIM)
    here = processes.share(BATCH)
    rng = torch.Generator().manual_seed(1)
    kept = {}
    for step in range(STEPS):
        x1, x2 = torch.randn(2, BATCH, 3, 8, 8, generator=rng, dtype=torch.float64).to(dtype)
        network.zero_grad()
        terms = criterion(network(x1[here]), network(x2[here]))
        terms.loss.backward()
        processes.average_gradients(network.parameters())
        kept |= {f"{step} {name}": term.detach() for name, term in terms._asdict().items()}
        kept |= {f"{step} gradient {name}": p.grad.clone() for name, p in network.named_parameters()}
        kept |= {
            f"{step} {name}": buffer.clone() for name, buffer in (*criterion.named_buffers(), *network.named_buffers())
        }
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.05 * p.grad
    return kept


def pure_loss() -> dict[str, torch.Tensor]:
    """The loss as a function: its gradient to this process's rows, put together."""
    views, teacher = torch.randn(2, 3, BATCH, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    here = processes.share(BATCH)
    found = {}
    for name, taught in (("", []), ("taught ", [t[here] for t in teacher])):
        rows = [z[here].clone().requires_grad_() for z in views]
        terms, moments = corinfomax_loss(rows, Moments.initial(DIM, views=3), alpha=20.0, teacher=taught)
        terms.loss.backward()
        parts = {"loss": terms.loss.detach(), "gradient": put_together(rows), **moments._asdict()}
        found |= {f"{name}{part}": tensor for part, tensor in parts.items()}
    rows = [z[here].clone().requires_grad_() for z in views]
    terms = KernelLoss(DIM, temperature=0.5)(*rows)
    terms.loss.backward()
    gradient = put_together(rows) / processes.size()  # the module's is for a mean over processes
    return found | {"kernel gradient": gradient} | {f"kernel {name}": x.detach() for name, x in terms._asdict().items()}


def put_together(rows: list[torch.Tensor]) -> torch.Tensor:
    """The gradient to every process's rows of three views."""
    whole = torch.zeros(3, BATCH, DIM, dtype=torch.float64)
    whole[:, processes.share(BATCH)] = torch.stack([row.grad for row in rows])
    return processes.total(whole)


def run(out: Path, precision: str, **knobs: Any) -> None:
    """Twenty steps of the training loop, or two an epoch of `knobs`."""
    # A large batch, few dimensions and small steps: elsewhere rounding grows tenfold with each step for longer, as it
    # does within one process when a weight is changed by 1e-15.
    projector = replace(tiny.RECIPE.projector, widths=(32, 4), batch_norm=True)
    optim = replace(tiny.RECIPE.optim, lr=0.001, start_lr=0.0005, clip=2.0)
    recipe = replace(tiny.RECIPE, batch=40, projector=projector, optim=optim, precision=precision)
    recipe = replace(recipe, **{"epochs": 10, **knobs})
    splits = cache.load(out.parent / "data", side=16, progress=False, holdout=0.0, cache=out.parent / "cache")
    out.mkdir(exist_ok=True)
    loop.pretrain(recipe, splits, out, device=CPU, pace=loop.Pace(1, scores=0, diagnoses=0), facts={})


def fail(out: Path) -> None:
    """In step 5 the projections of the last process are no numbers; each says what it heard of it, after step 8."""
    splits = cache.load(out.parent / "data", side=16, progress=False, holdout=0.0, cache=out.parent / "cache")
    real, calls = learner.ready, []

    def poisoned(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
        calls.append(x)
        bad = len(calls) == 11 and processes.rank() == processes.size() - 1
        return real(x, model) * (math.nan if bad else 1.0)

    learner.ready = poisoned
    run = out.parent / "failed"
    run.mkdir(exist_ok=True)
    try:
        loop.pretrain(tiny.RECIPE, splits, run, device=CPU, pace=loop.Pace(4, scores=0, diagnoses=0), facts={})
    except FloatingPointError as error:
        out.with_name(f"{out.name}-{processes.rank()}").write_text(str(error))


def hang(out: Path) -> None:
    """After two steps the last process goes silent, as if its machine were lost; the first says what it sees."""
    splits = cache.load(out.parent / "data", side=16, progress=False, holdout=0.0, cache=out.parent / "cache")
    real, calls = learner.ready, []

    def silent(x: torch.Tensor, model: nn.Module) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 5 and processes.rank() == 1:
            time.sleep(20)
            os._exit(0)
        return real(x, model)

    learner.ready = silent
    run = out.parent / "silent"
    run.mkdir(exist_ok=True)
    began = time.monotonic()
    try:
        loop.pretrain(tiny.RECIPE, splits, run, device=CPU, pace=loop.Pace(4, scores=0, diagnoses=0), facts={})
    except ConnectionError as error:
        out.write_text(f"{error} after {time.monotonic() - began:.0f} s")


def differ(out: Path) -> None:
    """The first process takes longer than an answer may, which is known and waited for; then the command, whose images
    or recipe differ by process, and of whose processors one is faster in bfloat16."""
    if processes.rank() == 0:
        time.sleep(6)
    processes.wait()
    shared = ["pretrain", "--cache", str(out.parent / "cache"), "--holdout", "0", "--no-evaluate", "--no-report"]
    here = out.parent / f"images-{processes.rank()}"
    cli.main([*shared, str(here), "--out", str(out.parent / "run"), *tiny.KNOBS])
    seed = str(processes.rank())
    cli.main([*shared, str(out.parent / "images-0"), "--out", str(out.parent / "again"), *tiny.KNOBS, "--seed", seed])
    hardware.multiplies_bfloat16 = lambda device: processes.rank() == 0
    cli.main([*shared, str(out.parent / "images-0"), "--out", str(out.parent / "mixed"), *tiny.KNOBS])


def work(job: str, out: Path) -> None:
    """What one process of the world does."""
    if job in ("hang", "differ"):
        processes.ANSWER = timedelta(seconds=3)
    with processes.group(CPU):
        if job == "fail":
            fail(out)
            return
        if job == "hang":
            hang(out)
            return
        if job == "differ":
            differ(out)
            return
        if job == "uneven":
            processes.share(BATCH + 1)
        kept = {
            "double": loss_and_gradients(torch.float64),
            "float": loss_and_gradients(torch.float32),
            "pure": pure_loss(),
        }
        for precision in ("float32", "float64"):
            run(out.with_name(f"{precision}-{out.stem}"), precision)
        run(out.with_name(f"taught-{out.stem}"), "float64", epochs=3, teacher=0.7)
        run(out.with_name(f"kernel-{out.stem}"), "float64", epochs=3, loss=Loss(name="kernel"))
        if processes.rank() == 0:
            run_folder.write_whole(out, lambda path: torch.save(kept, path))


def fork(count: int, job: str, out: Path) -> bool:
    """Do the job in `count` processes with the environment that torchrun would give; whether all ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
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
    ends = [os.waitpid(child, 0)[1] for child in children]  # every one is waited for
    return not any(ends)


def main(job: str, out: Path, counts: list[int]) -> int:
    """Without counts this process is one that torchrun started; with them, worlds of so many are forked in turn."""
    if not counts:
        work(job, out)
        return 0
    # Forked from here they need not import everything again.
    return 0 if all(fork(count, job, out.with_name(f"{count}{out.suffix}")) for count in counts) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]]))
