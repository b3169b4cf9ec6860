"""Three steps of the loops in examples/, on this process's part of each batch: loops.py ddp OUT, or lightning."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from corinfomax import CorInfoMaxLoss

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import loss_in_a_loop

BATCH, DIM, STEPS, LR = 24, 6, 3, 0.05


def build_network() -> loss_in_a_loop.TwoViews:
    """A small network without BatchNorm, whose statistics would differ between processes."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    return loss_in_a_loop.TwoViews(backbone, nn.Linear(8 * 36, DIM)).double()


def pairs() -> list[Tensor]:
    """Of each step the two views of this process's part of the batch."""
    rng = torch.Generator().manual_seed(1)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    each = BATCH // size
    batches = [torch.randn(2, BATCH, 3, 8, 8, generator=rng, dtype=torch.float64) for _ in range(STEPS)]
    return [batch[:, rank * each : (rank + 1) * each] for batch in batches]


def plain(network: nn.Module) -> None:
    """The loop of the example."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    loss_in_a_loop.train(network, pairs(), CorInfoMaxLoss(DIM), optimizer)


def ddp(network: nn.Module) -> None:
    """The same, with the network wrapped."""
    dist.init_process_group("gloo")
    plain(DistributedDataParallel(network))
    dist.destroy_process_group()


def lightning(network: loss_in_a_loop.TwoViews) -> None:
    """The LightningModule of the example, with this optimiser."""
    import lightning as L
    from loss_in_lightning import CorInfoMax

    module = CorInfoMax(network, DIM)
    module.configure_optimizers = lambda: torch.optim.SGD(network.parameters(), lr=LR)
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
    trainer.fit(module, torch.utils.data.DataLoader(pairs(), batch_size=None))  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    network = build_network()
    {"ddp": ddp, "lightning": lightning}[sys.argv[1]](network)
    if os.environ.get("RANK", "0") == "0":
        torch.save(network.state_dict(), Path(sys.argv[2]))
