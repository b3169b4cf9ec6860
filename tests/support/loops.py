"""Three steps of CorInfoMaxLoss in others' loops: tests/loops.py LOOP OUT, LOOP plain, ddp or lightning."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from corinfomax import CorInfoMaxLoss

BATCH, DIM, STEPS, LR = 24, 6, 3, 0.05


class TwoViews(nn.Module):
    """A network whose one forward takes both views, as DistributedDataParallel wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, DIM)).double()

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x1), self.body(x2)


def pairs() -> list[Tensor]:
    """Of each step the two views of this process's part of the batch."""
    rng = torch.Generator().manual_seed(1)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    each = BATCH // size
    batches = [torch.randn(2, BATCH, 3, 8, 8, generator=rng, dtype=torch.float64) for _ in range(STEPS)]
    return [batch[:, rank * each : (rank + 1) * each] for batch in batches]


def by_hand(network: nn.Module) -> None:
    """The loop that everybody writes."""
    criterion, optimizer = CorInfoMaxLoss(DIM), torch.optim.SGD(network.parameters(), lr=LR)
    for x1, x2 in pairs():
        optimizer.zero_grad()
        criterion(*network(x1, x2)).loss.backward()
        optimizer.step()


def ddp(network: TwoViews) -> None:
    """The same, with the network wrapped."""
    dist.init_process_group("gloo")
    by_hand(DistributedDataParallel(network))
    dist.destroy_process_group()


def lightning(network: TwoViews) -> None:
    """The same, as a LightningModule."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.criterion = network, CorInfoMaxLoss(DIM)

        def training_step(self, batch: Any, index: int) -> Tensor:
            terms = self.criterion(*self.network(*batch))
            return terms.loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(pairs(), batch_size=None))  # type: ignore[arg-type]


def main(loop: str, out: Path) -> None:
    network = TwoViews()
    {"plain": by_hand, "ddp": ddp, "lightning": lightning}[loop](network)
    if os.environ.get("RANK", "0") == "0":
        torch.save(network.state_dict(), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
